"""Tensors as the kernels take them: dense images in one of two layouts, dense parameters.

What is not laid out so is copied first; a result whose layout is not one of the kernels' is
written beside and copied over. Needs no Triton.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from senet_kernels.ops import inner_is_channels
from senet_kernels.pointwise import Options, unpack
from senet_kernels.reference import accumulate_dtype
from senet_kernels.validation import DTYPES

from .plan import Device, Plan, Shape

# Channels and positions are counted in 32 bits, with a tile to spare.
_LARGEST_EXTENT = 2**30

# The interpreter has no device; a small one makes plans with large tiles and few programs.
INTERPRETER = Device((0, 0), 1)


# The ops' tensors, in the order of their arguments; dy, the backward op's first, stands last here.
NAMES = (
    "x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale", "affine_shift",
    "lengths", "dy",
)  # fmt: skip
_IMAGES = ("residual", "dy")  # besides x

#: As many of NAMES as an op has; None where not given.
Inputs = tuple[Tensor | None, ...]


class Kind(NamedTuple):
    """What calls with the same shapes, strides, dtypes, options and device have in common."""

    shape: Shape
    device: Device
    options: Options
    accumulate: torch.dtype
    direct: bool  # whether y and dx, laid out as eager has them, are in a layout of the kernels
    strides: dict[str, int]  # from image to image, of the images given, as the kernels see them
    copied: tuple[int, ...]  # positions of the inputs that have no layout of the kernels

    def arranged(self, inputs: Inputs) -> Inputs:
        """The inputs in layouts of the kernels."""
        if not self.copied:
            return inputs
        x, arranged = inputs[0], list(inputs)
        assert x is not None
        for i in self.copied:
            t = inputs[i]
            assert t is not None
            arranged[i] = self.dense(x).copy_(t) if NAMES[i] in self.strides else t.contiguous()
        return tuple(arranged)

    def dense(self, x: Tensor) -> Tensor:
        """An empty tensor of the kernels' layout: for a result, or for a copy."""
        if self.direct:
            return torch.empty_like(x)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def finish(self, written: Tensor, x: Tensor) -> Tensor:
        """A result that was written to ``dense()``, in the strides it must have."""
        return written if self.direct else torch.empty_like(x).copy_(written)

    def scratch(self, x: Tensor, *extents: int) -> Tensor:
        return torch.empty(extents, dtype=self.accumulate, device=x.device)


def _image_is_dense(t: Tensor, last: bool) -> bool:
    """Whether every image is dense: channels adjacent (``last``), or positions adjacent."""
    sizes, strides = t.shape, t.stride()
    channels = sizes[1]
    expected = channels if last else 1
    for d in range(t.dim() - 1, 1, -1):
        if sizes[d] != 1 and strides[d] != expected:
            return False
        expected *= sizes[d]
    return channels == 1 or strides[1] == (1 if last else expected)


@functools.lru_cache(maxsize=4096)
def _layout(sizes: torch.Size, strides: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether kernels walk such an x channels-last, and can write y and dx directly."""
    x = torch.empty_strided(sizes, strides, device="meta")
    y = torch.empty_like(x)
    last = inner_is_channels(x)
    direct = _image_is_dense(y, last) and (sizes[0] <= 1 or y.stride(0) == sizes[1:].numel())
    return last, direct


def _check_images(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        raise RuntimeError(
            f"{name}: expected shape, dtype and device of x, got {list(t.shape)} {t.dtype} "
            f"on {t.device}"
        )


def _check_parameter(name: str, t: Tensor, w2: Tensor, *extents: int) -> None:
    trailing = t.shape[len(extents) :]
    if tuple(t.shape[: len(extents)]) != extents or math.prod(trailing) != 1:
        raise RuntimeError(f"{name}: expected shape {list(extents)}, got {list(t.shape)}")
    if t.dtype != w2.dtype or t.device != w2.device:
        raise RuntimeError(
            f"{name}: expected {w2.dtype} on {w2.device} (those of w2), got {t.dtype} on {t.device}"
        )


def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def examine(inputs: Inputs, options: int) -> Kind:
    """Check what a raw call may get wrong, and choose the layout."""
    given = {name: t for name, t in zip(NAMES, inputs, strict=False) if t is not None}
    x, w2 = given["x"], given["w2"]
    if x.dim() < 3 or x.dtype not in DTYPES:
        raise RuntimeError(
            f"x: expected [B, C, *spatial] of a floating dtype, got {list(x.shape)} {x.dtype}"
        )
    batch, channels = x.shape[:2]
    positions, outputs = x.shape[2:].numel(), w2.shape[0]
    hidden = given["w1"].shape[0] if "w1" in given else 0
    if outputs not in (channels, 2 * channels):
        raise RuntimeError(f"w2: expected {channels} or {2 * channels} rows, got {outputs}")
    if max(outputs, positions, hidden) > _LARGEST_EXTENT:
        raise RuntimeError(f"x, w1: expected extents up to {_LARGEST_EXTENT}, got {list(x.shape)}")
    if w2.dtype != x.dtype and (w2.dtype != torch.float32 or x.dtype == torch.float64):
        raise RuntimeError(f"w2: expected {x.dtype} (that of x) or float32, got {w2.dtype}")

    last, direct = _layout(x.shape, x.stride())
    shape = Shape(batch, channels, positions, hidden, outputs, last)
    extents = {
        "w1": (hidden, channels), "b1": (hidden,), "w2": (outputs, shape.inner), "b2": (outputs,),
        "alpha": (channels,), "beta": (channels,), "affine_scale": (channels,),
        "affine_shift": (channels,),
    }  # fmt: skip
    strides: dict[str, int] = {}
    copied: list[int] = []
    for i, (name, t) in enumerate(zip(NAMES, inputs, strict=False)):
        if t is None:
            continue
        if name == "x" or name in _IMAGES:
            _check_images(name, t, x)
            dense = _image_is_dense(t, last)
            strides[name] = t.stride(0) if dense else shape.image
        elif name == "lengths":
            if tuple(t.shape) != (batch,):
                raise RuntimeError(f"lengths: expected shape {[batch]}, got {list(t.shape)}")
            dense = t.is_contiguous()
        else:
            _check_parameter(name, t, w2, *extents[name])
            dense = t.is_contiguous()
        if not dense:
            copied.append(i)
    return Kind(
        shape, _device(x.device), unpack(options), accumulate_dtype(x.dtype), direct, strides,
        tuple(copied),
    )  # fmt: skip


def wide(kind: Kind, plan: Plan) -> bool:
    """Whether offsets within a program's tiles pass 32 bits (with room for what is masked)."""
    shape = kind.shape
    walk = shape.image if shape.last else plan.BC * shape.positions
    apart = max(shape.image, *kind.strides.values())
    return plan.G * apart + walk + plan.BS * shape.channels >= 2**30


def units(n: int) -> tuple[int, int]:
    """``n`` as a count of units; the unit is the largest power of two up to 16 that divides n."""
    unit = math.gcd(n, 16)
    return n // unit, unit
