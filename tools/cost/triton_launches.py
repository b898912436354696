"""``python -m tools.cost.triton_launches CAPABILITY MULTIPROCESSORS``: the launches of Triton's
kernels for calls, with how often the basic blocks of their PTX run.

A line of JSON on standard input is a call, see ``tests/compile_triton.py``; the answer to it is a
line of JSON with a list of launches. The ops' own host code runs on meta tensors; what it would
launch is compiled, and some of the programs of its grid are executed on the CPU (``tests/ptx``) on
memory that is zero. A process of its own, since Triton's driver is replaced.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

from .machine_code import for_tests

compiling = for_tests()

import triton  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import compile_triton  # noqa: E402
from ptx import running  # noqa: E402
from senet_kernels.backends.triton import launch, operands  # noqa: E402
from senet_kernels.backends.triton.plan import Device  # noqa: E402

#: Programs of a grid that are executed. Those over images are alike but for the last; those of the
#: MLP's gradients are of four kinds.
_SAMPLE, _SAMPLE_OF_GRADIENTS = 6, 16


def _sample(programs: int, kernel: str) -> list[int]:
    """Evenly spaced numbers of programs."""
    most = min(programs, _SAMPLE_OF_GRADIENTS if "excite_bwd" in kernel else _SAMPLE)
    return [int((i + 0.5) * programs / most) for i in range(most)]


class _Memory:
    """Zeros in place of meta tensors, as far as anybody touches them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Any, Any]] = {}

    def address(self, tensor: Any) -> int:
        if id(tensor) not in self._held:
            size = tensor.untyped_storage().nbytes() + 256
            self._held[id(tensor)] = np.zeros(size, np.uint8), tensor
        return -(-int(self._held[id(tensor)][0].ctypes.data) // 128) * 128


def _execute(name: str, ptx: str, words: list[int], programs: int, metadata: Any) -> dict[str, Any]:
    path, _ = running._machine()
    library = compiling.linked(ptx, f"triton-{name}", path, counts=True)
    entry = compiling.entries_of(library, ptx)[name]
    blocks = len(compiling.Module(ptx, counts=True).leaders)
    # Two more pointers, to scratch memory of Triton's own.
    values = [*words, 0, 0][: entry.parameters]
    assert len(values) == entry.parameters
    chosen = _sample(programs, name)
    running.launch(
        entry, values, grid=(programs, 1, 1), block=32 * metadata.num_warps,
        shared=metadata.shared, seed=1, only=chosen,
    )  # fmt: skip
    warps, threads = (ctypes.c_uint64 * blocks)(), (ctypes.c_uint64 * blocks)()
    library.ptx_take_counts(warps, threads, ctypes.c_uint64(blocks))
    scale = programs / len(chosen)
    return {"warps": [n * scale for n in warps], "threads": [n * scale for n in threads]}


def main() -> None:
    capability, multiprocessors = int(sys.argv[1]), int(sys.argv[2])
    triton.runtime.driver.set_active(compile_triton._Driver(capability))
    device = Device(f"sm_{capability}", multiprocessors)
    operands._device = lambda _: device
    found: list[dict[str, Any]] = []
    memory = _Memory()

    def count_instead(self: Any, grid: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> None:
            compiled = self.warmup(*args, grid=grid, **kwargs)
            kinds = compiled.src.signature
            words = []
            for name, value in zip(self.arg_names, args, strict=False):
                if kinds[name] == "constexpr":
                    continue
                pointer = kinds[name].startswith("*")
                words.append(memory.address(value) if pointer else int(value) & (2**64 - 1))
            ptx = compiled.asm["ptx"]
            found.append({
                "kernel": self.__name__, "ptx": ptx, "programs": grid[0],
                "threads_per_program": 32 * compiled.metadata.num_warps,
                "shared": compiled.metadata.shared,
                "splits": dict(zip(self.arg_names, args, strict=False)).get("splits", 1),
                **_execute(self.__name__, ptx, words, grid[0], compiled.metadata),
            })  # fmt: skip

        return count

    JITFunction.__getitem__ = count_instead
    CompiledKernel._init_handles = compile_triton._load_nothing
    for line in sys.stdin:
        launch.forget()
        passes = []
        for call in compile_triton._calls(json.loads(line)):
            found.clear()
            memory = _Memory()
            call()
            passes.append(list(found))
        print(json.dumps(passes), flush=True)


if __name__ == "__main__":
    main()
