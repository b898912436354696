"""Compiles the Triton kernels for a GPU that need not be there, and prints what came out as JSON.

``python compile_triton.py TARGET``, a capability (90) or an AMD GPU (gfx942), reads option sets as
JSON lines from standard input: the fields of ``problems.Spec``, the device's ``multiprocessors``
and ``inplace``. It prints a line for each, what became of its kernels, and last how many cubins
were compiled in all. It runs the ops' own host code on meta tensors, with every launch turned into
a compilation: so these are the very kernels, constants and argument specialisations a call would
use. A process of its own, since Triton's driver is replaced and a compiler that fails may abort.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from senet_kernels import ops, pack_options
from senet_kernels.backends.triton import halves, launch, operands
from senet_kernels.backends.triton.plan import Device

# What a program could tell another one by, or order its accesses with for others to see.
BETWEEN_PROGRAMS = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?((?:atom|red|fence|membar|multimem|griddepcontrol|barrier\.cluster|"
    r"(?:ld|st)\.(?:[\w:]+\.)*(?:acquire|release|relaxed|volatile|mmio))\b[\w.:]*)",
    re.M,
)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: int | str) -> None:
        if isinstance(target, int):
            self._target = GPUTarget("cuda", target, 32)
        else:
            self._target = GPUTarget("hip", target, 32 if target.startswith("gfx11") else 64)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", text)}


_compiled: set[str] = set()


def _load_nothing(self: Any) -> None:
    """In place of loading a kernel, which finds out about its registers and spilled words."""
    if "cubin" not in self.asm:
        self.module = self.function = self.n_regs = self.n_spills = 0
        _compiled.add(self.hash)
        return
    found = _resources(self.asm["cubin"])
    _compiled.add(self.hash)
    self.module = self.function = 0
    self.n_regs, self.n_spills = found["REG"], found["STACK"] // 4


def _report(kernel: Any, compiled: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    metadata = compiled.metadata
    if "amdgcn" in compiled.asm:
        spilled = re.findall(r"vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spilled
        return {
            "kernel": kernel.__name__,
            "shared": metadata.shared,
            "STACK": sum(map(int, spilled)),
        }
    ptx = compiled.asm["ptx"]
    constants = arguments.get("T")
    positions = 1  # of a tile; flat vectors have any
    if hasattr(constants, "BO"):
        positions = constants.BO if constants.LAST else constants.BI
    return {
        "kernel": kernel.__name__,
        "hash": compiled.hash,
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "steps": constants.STEPS if constants else 0,  # accesses in flight
        "tile_positions": positions,
        "loads_16": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", ptx)),
        "between_programs": sorted(set(BETWEEN_PROGRAMS.findall(ptx))),
        "stores_16": len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", ptx)),
        **_resources(compiled.asm["cubin"]),
    }


def _calls(given: dict[str, Any]) -> list[Callable[[], object]]:
    """The calls of ops for one option set, forward and backward."""
    dtype = getattr(torch, given["dtype"])
    batch, channels, *space = given["shape"]
    hidden = given.get("hidden")
    outputs = channels * (2 if given.get("shift") else 1)
    last = given.get("layout") == "channels_last"

    def image() -> torch.Tensor:
        t = torch.empty(batch, *space, channels, dtype=dtype, device="meta").movedim(-1, 1)
        return t if last else torch.empty(batch, channels, *space, dtype=dtype, device="meta")

    def vector(*extents: int) -> torch.Tensor:
        return torch.empty(extents, dtype=dtype, device="meta")

    def if_given(name: str) -> torch.Tensor | None:
        return vector(channels) if given.get(name) else None

    x, dy = image(), image()
    residual = image() if given.get("residual") else None
    alpha, beta = if_given("weighted"), if_given("weighted")
    affine = if_given("affine"), if_given("affine")
    lengths = torch.empty(batch, dtype=torch.int64, device="meta") if given.get("lengths") else None
    names = ("activation", "gate", "before", "after")
    defaults = ("relu", "sigmoid", None, None)
    options = pack_options(**{n: given.get(n, d) for n, d in zip(names, defaults, strict=True)})
    keeps = given.get("after") == "relu"
    mask = torch.empty(ops.mask_numel(x) if keeps else 0, dtype=torch.uint8, device="meta")

    def needs(*tensors: torch.Tensor | None) -> int:
        return sum(1 << i for i, t in enumerate(tensors) if t is not None)

    if given.get("part") == "squeeze":
        arguments = (x, *affine, lengths, options)
        backward = (vector(batch, channels), *arguments, needs(x, *affine))
        return [partial(halves.squeeze, *arguments), partial(halves.squeeze_backward, *backward)]
    if given.get("part") == "channel_scale":
        tensors = (x, vector(batch, outputs), residual, alpha, beta, *affine)
        backward = (dy, *tensors, mask, options, needs(*tensors))
        return [
            partial(halves.channel_scale, *tensors, options, True),
            partial(halves.channel_scale_backward, *backward),
        ]
    biases = given.get("bias", True)
    w1 = None if hidden is None else vector(hidden, channels)
    w2 = vector(outputs, channels if hidden is None else hidden)
    b1 = None if hidden is None or not biases else vector(hidden)
    b2 = vector(outputs) if biases else None
    tensors = (x, w1, b1, w2, b2, residual, alpha, beta, *affine)
    if given.get("inplace"):
        return [partial(launch.forward_, *tensors, lengths, options)]
    saved = torch.empty(
        ops.saved_numel(x, w1, w2), device="meta",
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    return [
        partial(launch.forward, *tensors, lengths, options, True),
        partial(launch.backward, dy, *tensors, lengths, saved, mask, options, needs(*tensors)),
    ]


def main() -> None:
    name = sys.argv[1]
    target = int(name) if name.isdecimal() else name
    torch.version.hip = None if isinstance(target, int) else "7.0"
    triton.runtime.driver.set_active(_Driver(target))
    seen: list[dict[str, Any]] = []

    def compile_instead(self: Any, grid: Any) -> Any:
        def launch_nothing(*args: Any, **kwargs: Any) -> None:
            compiled = self.warmup(*args, grid=grid, **kwargs)
            if compiled.hash not in known:
                arguments = dict(zip(self.arg_names, args, strict=False))
                known[compiled.hash] = _report(self, compiled, arguments)
            seen.append(known[compiled.hash])

        return launch_nothing

    known: dict[str, dict[str, Any]] = {}
    JITFunction.__getitem__ = compile_instead
    CompiledKernel._init_handles = _load_nothing
    for line in sys.stdin:
        given = json.loads(line)
        architecture = f"sm_{target}" if isinstance(target, int) else target
        device = Device(architecture, given.pop("multiprocessors"))
        operands._device = lambda _, device=device: device
        launch.forget()
        seen.clear()
        for call in _calls(given):
            call()
        print(json.dumps(seen), flush=True)
    print(len(_compiled))


if __name__ == "__main__":
    main()
