"""Compiled Triton kernels on CPU tensors: the PTX of every launch, executed (``tests/ptx``).

``SENET_TEST_TRITON_PTX=90 TRITON_INTERPRET=1 python -m pytest tests/test_triton.py`` runs what the
interpreter runs, on the PTX that Triton emits for compute capability 9.0 in place of the
interpreter. The package takes itself for interpreted, and so takes CPU tensors; Triton does not.

Nothing here knows a kernel of the package. What a launch of any ``triton.jit`` function hands to
the compiled kernel, through Triton or prepared, is what its PTX gets: arguments by the signature
that it was compiled for, grid, warps, shared memory, cluster. Machine code is not made.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ptx import compiling, running

#: The compute capability for which kernels are compiled, as 90; set before anything is imported.
EXECUTE = "SENET_TEST_TRITON_PTX"
_FLOATS = {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}


def capability() -> int | None:
    """Whether this process executes PTX, and of which capability."""
    return int(os.environ[EXECUTE]) if os.environ.get(EXECUTE) else None


class Launches:
    """What has been launched, and how the next ones run."""

    def __init__(self) -> None:
        self.seed = 0
        self.approximations = 0
        #: Kernels launched so far.
        self.names: list[str] = []
        #: Applied to the PTX of each launch.
        self.change: Callable[[str], str] | None = None


#: Of this process.
launches = Launches()


class _Driver:
    """As much of a driver as Triton asks for. A device for each capability: Triton keeps compiled
    kernels by its number."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.capability = capability
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _words(value: Any, kind: Any) -> Iterator[int]:
    """An argument as its parameters have it: none of a constant, each element of a tuple."""
    if isinstance(kind, (tuple, list)):
        for element, of in zip(value, kind, strict=True):
            yield from _words(element, of)
    elif kind != "constexpr":
        if hasattr(value, "data_ptr"):
            value = value.data_ptr()
        if kind in _FLOATS:
            yield int.from_bytes(struct.pack(f"<{_FLOATS[kind]}", value), "little")
        elif isinstance(kind, str) and kind.startswith(("*", "i", "u")):
            yield int(value) & (2**64 - 1)
        else:
            raise TypeError(f"an argument of Triton's type {kind} is not passed on here")


@functools.cache
def _entry(ptx: str, kernel: str) -> Any:
    path, _ = running._machine()
    return compiling.entries(ptx, f"triton-{kernel}", path)[kernel]


class Launcher:
    """In place of Triton's: executes the PTX of a compiled kernel."""

    def __init__(self, compiled: Any) -> None:
        self.name, self.metadata = compiled.name, compiled.metadata
        self.kinds = list(compiled.src.signature.values())
        text = compiled.asm["ptx"]
        self.ptx = text if isinstance(text, str) else text.decode()

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, described: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        """Raises RuntimeError: what the simulation found; ValueError: see ``ptx.translate``."""
        words = [w for value, kind in zip(arguments, self.kinds, strict=True)
                 for w in _words(value, kind)]  # fmt: skip
        metadata = self.metadata
        entry = _entry(launches.change(self.ptx) if launches.change else self.ptx, self.name)
        # Up to two more are pointers to memory of Triton's own.
        size = x * y * z * metadata.num_ctas * metadata.global_scratch_size
        scratch = torch.empty(size, dtype=torch.uint8)
        words = [*words, scratch.data_ptr() if size else 0, 0][: entry.parameters]
        if len(words) != entry.parameters:
            raise ValueError(f"{self.name} takes {entry.parameters} parameters, not {words}")
        launches.names.append(self.name)
        running.launch(
            entry, words, grid=(x * metadata.num_ctas, y, z), block=32 * metadata.num_warps,
            cluster=metadata.num_ctas, shared=metadata.shared,
            cooperative=getattr(metadata, "launch_cooperative_grid", False),
            seed=launches.seed, approximations=launches.approximations,
        )  # fmt: skip


def _prepare(self: Any) -> None:
    """In place of loading a kernel: see :class:`Launcher`."""
    self.module = self.function = self.n_regs = self.n_spills = 0
    if self._run is None:
        self._run = Launcher(self)


def install(capability: int) -> Callable[[int], None]:
    """From now on Triton compiles for this capability, down to PTX, and launches execute it.
    Returns what changes the capability: kernels that were prepared for another are to be forgotten.

    Raises:
        RuntimeError: Triton has been imported as an interpreter already.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    # Of its own: what it has for these kernels is without machine code.
    os.environ["TRITON_CACHE_DIR"] = str(compiling.OUT / "triton")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    import triton
    import triton.language as tl
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    if not isinstance(tl.sum, JITFunction):
        raise RuntimeError("Triton interprets kernels already: it was imported too early")
    CUDABackend.make_cubin = lambda *_: b""
    CompiledKernel._init_handles = _prepare

    def use(capability: int) -> None:
        triton.runtime.driver.set_active(_Driver(capability))

    use(capability)
    return use
