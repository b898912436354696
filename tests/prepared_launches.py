"""What prepared calls hand to compiled kernels, and what they cost the host; needs no GPU.

Compiles for a GPU that is not there and puts a recorder in place of the launch: so all of Python's
work is done, Triton's and ours, and nothing of the driver's. Prints as JSON the launches of a first
call (through Triton) and of a second (prepared), and the microseconds of the latter. A process of
its own, since Triton's driver is replaced: ``python tests/prepared_launches.py [CALLS TO TIME]``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler.compiler import CompiledKernel

from compile_triton import _Driver
from senet_kernels import ops, pack_options
from senet_kernels.backends.triton import launch, operands
from senet_kernels.backends.triton.plan import Device

_launches: list[list[Any]] = []


def _init_handles(self: Any) -> None:
    def record(*arguments: Any) -> None:
        x, y, z, _, _, _, _, _, _, *given = arguments
        _launches.append([self.name, self.hash, x, y, z, *given])

    self.module = self.function = self.n_regs = self.n_spills = 0
    self._run = record


def _readable(launches: list[list[Any]]) -> list[list[str]]:
    """Tensors by what they look like; scratch memory is not the same from call to call."""
    return [
        [f"{list(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else repr(v) for v in launched]
        for launched in launches
    ]


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """Processor time, which a busy machine distorts less than time on the clock."""
    best = float("inf")
    for _ in range(calls // 100):
        begin = time.process_time()
        for _ in range(100):
            call()
        best = min(best, time.process_time() - begin)
        _launches.clear()
    return best * 1e4


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    triton.runtime.driver.set_active(_Driver(90))
    CompiledKernel._init_handles = _init_handles
    operands._device = lambda _: Device("sm_90", 132)
    report = {}
    shapes = {"by tiles": (2, 256, 14, 14), "by flat vectors": (2, 16, 8, 8)}
    for name, (batch, channels, *space) in shapes.items():
        x = torch.empty(batch, channels, *space)
        inputs = (x, torch.empty(8, channels), None, torch.empty(channels, 8), None, x.clone(),
                  *[None] * 5)  # fmt: skip
        saved = torch.empty(ops.saved_numel(x, inputs[1], inputs[3]))
        mask = torch.empty(ops.mask_numel(x), dtype=torch.uint8)
        options = pack_options(before="silu", after="relu")
        directions = {
            "forward": lambda a=(*inputs, options, True): launch.forward(*a),
            "backward": lambda a=(x, *inputs, saved, mask, options, 43): launch.backward(*a),
        }
        for direction, call in directions.items():
            seen = []
            for _ in range(2):
                call()
                seen.append(_readable(_launches))
                _launches.clear()
            found: dict[str, Any] = {"first": seen[0], "second": seen[1]}
            if calls:
                found["microseconds"] = round(_microseconds(call, calls), 1)
            report[f"{name}, {direction}"] = found
    if calls:
        print({name: found["microseconds"] for name, found in report.items()})
    else:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
