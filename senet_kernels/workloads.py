"""Squeeze-and-excitation layers of networks, for ``python -m senet_kernels verify``."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import trust
from .api import squeeze_excite
from .trust import Verdict
from .trust.verify import verify

_SWISH = {"activation": "silu"}
_HARD = {"gate": "hardsigmoid"}
_END = {"after": "relu", "residual": True}


class Layer(NamedTuple):
    """A layer: channels, height and width, hidden channels, and what is not the default."""

    network: str
    channels: int
    side: int
    hidden: int
    options: dict[str, Any]


#: Networks as timm and torchvision build them, for images of 224 positions a side.
LAYERS: tuple[Layer, ...] = (
    *(Layer("SE-ResNet-50", c, s, c // 16, {})
      for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    *(Layer("SE-ResNet-50, end", c, s, c // 16, _END)
      for c, s in ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    *(Layer("EfficientNet-B0", c, s, r, _SWISH)
      for c, s, r in ((32, 112, 8), (96, 56, 4), (144, 56, 6), (144, 28, 6), (240, 28, 10),
                      (240, 14, 10), (480, 14, 20), (672, 14, 28), (672, 7, 28), (1152, 7, 48))),
    *(Layer("MobileNetV3-Large", c, s, r, _HARD)
      for c, s, r in ((72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (672, 7, 168),
                      (960, 7, 240))),
    *(Layer("RegNetY-8GF", c, s, r, {})
      for c, s, r in ((224, 56, 8), (448, 28, 56), (896, 14, 112), (2016, 7, 224))),
)  # fmt: skip


def run(device: str, dtype: torch.dtype, batch: int, compiled: bool, network: str | None) -> int:
    """Prove the kernels for the layers, forward and with gradients; prints a table.

    Returns:
        An exit status: 1 if a kernel was found wrong.
    """
    wanted = [layer for layer in LAYERS if network in (None, layer.network)]
    print(
        f"{trust.ENVIRONMENT_VARIABLE}={trust.mode()}, {device}, "
        f"{str(dtype).removeprefix('torch.')}, batch {batch}"
    )
    start, refused, count = time.perf_counter(), 0, 0
    for number, layer in enumerate(wanted):
        _bar(number, len(wanted))
        for last in (False, True):
            found = _verify(layer, device, dtype, batch, compiled, last)
            count += len(found)
            refused += sum(v.state == trust.REFUSED for v in found)
            for v in found:
                _bar(0, 0)
                print(_line(layer, v), flush=True)
    _bar(0, 0)
    if not count:
        print(f"nothing is to be proven on {device}: its kernels run unasked, or there are none")
        return 0
    print(f"{count} kernels, {refused} refused, {time.perf_counter() - start:.1f} s")
    return 1 if refused else 0


class _Call(nn.Module):
    """A layer as a model."""

    def __init__(self, layer: Layer, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        c, r = layer.channels, layer.hidden

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        self.w1, self.b1, self.w2, self.b2 = zeros(r, c), zeros(r), zeros(c, r), zeros(c)
        self.options = dict(layer.options)
        self.adds = self.options.pop("residual", False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        residual = x if self.adds else None
        return squeeze_excite(
            x, self.w1, self.b1, self.w2, self.b2, residual=residual, **self.options
        )


def _verify(
    layer: Layer, device: str, dtype: torch.dtype, batch: int, compiled: bool, last: bool
) -> trust.Status:
    x = torch.zeros(batch, layer.channels, layer.side, layer.side, device=device, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    return verify(_Call(layer, device, dtype), x, compiled=compiled)


def _line(layer: Layer, v: Verdict) -> str:
    words = v.name.split(" ")
    layout = next((word for word in words if word in ("rows", "channels-last")), "")
    shape = f"{layer.channels}x{layer.side}x{layer.side}, R {layer.hidden}"
    speed = "" if v.speed is None else f"{v.speed:.2f}x"
    line = f"{v.state:9}{speed:>8}  {layer.network:26}{shape:22}{words[0]}, {layout}, {words[-1]}"
    return line if v.state == trust.TRUSTED else f"{line}\n          {v.reason}"


def _bar(done: int, of: int) -> None:
    if not sys.stderr.isatty():
        return
    width = 30
    filled = width * done // of if of else 0
    text = f"[{'#' * filled}{'.' * (width - filled)}] {done}/{of}" if of else " " * 60
    sys.stderr.write(f"\r{text}\r")
    sys.stderr.flush()
