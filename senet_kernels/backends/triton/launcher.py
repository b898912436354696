"""A kernel made ready to launch, with all its arguments but the pointers. Imported on the first
call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import triton
from torch import Tensor

from . import INTERPRETED
from .runtime import of_gpus


class CannotCompileError(RuntimeError):
    """Triton does not compile a kernel for this device with these constants."""


#: Called before a kernel is compiled, for whoever watches for what hangs: that takes long.
listeners: list[Callable[[], None]] = []


class Launch:
    """A kernel with all its arguments but the pointers; called with these it launches.

    Triton's way from a call to a launch binds, specialises and hashes some forty arguments. What
    comes out depends on dtypes, alignment, integers and constants, which are all the same in a
    prepared call: so it is taken once, and then the compiled kernel is called directly.
    """

    def __init__(
        self, kernel: Any, programs: int, values: Mapping[str, Any], *, warps: int
    ) -> None:
        """``values`` has every argument that is no pointer, and may have more."""
        names = kernel.arg_names
        pointers = sum(name not in values for name in names)
        self.kernel = kernel
        self._programs = programs
        self._options = {"num_warps": warps}
        self._rest = tuple(values[name] for name in names[pointers:])
        self._compiled: Callable[..., None] | None = None
        self._first = threading.Lock()

    def __call__(self, *pointers: Tensor | None) -> None:
        compiled = self._compiled
        if compiled is None:
            if not self._programs:
                return
            with self._first:  # other threads would compile it too, and to other options
                compiled = self._compiled
                if compiled is None:
                    self._compile_and_launch(pointers)
                    return
        compiled(*pointers, *self._rest)

    def _compile_and_launch(self, pointers: tuple[Tensor | None, ...]) -> None:
        if not INTERPRETED:
            self._choose_options(pointers)
        kernel = self.kernel[(self._programs,)](*pointers, *self._rest, **self._options)
        if kernel is not None:  # the interpreter has none
            self._compiled = kernel[(self._programs, 1, 1)]

    def _choose_options(self, pointers: tuple[Tensor | None, ...]) -> None:
        """Compile the kernel, and spare it spills that it need not have.

        Left to choose how many registers a thread may have, the assembler gives up a value or two
        of some kernels to stay just below a number that lets one more block run. Given that very
        number as a bound it mostly finds room for them; otherwise given all there are, or all
        there are for half as many threads.
        """
        best = self._compile(pointers, self._options)
        registers = of_gpus().registers
        if registers is None:
            return
        warps = self._options["num_warps"]
        for fewer, bound in (
            (warps, best.n_regs), (warps, registers // (32 * warps)),
            (warps // 2, registers // max(1, 32 * (warps // 2))),
        ):  # fmt: skip
            if not best.n_spills or not fewer:
                return
            options = self._options | {"num_warps": fewer, "maxnreg": min(255, bound)}
            kernel = self._compile(pointers, options)
            if kernel.n_spills < best.n_spills:
                best, self._options = kernel, options

    def _compile(self, pointers: tuple[Tensor | None, ...], options: Mapping[str, int]) -> Any:
        """The kernel, compiled and loaded: only then are its registers known."""
        grid = (self._programs, 1, 1)
        for listen in listeners:
            listen()
        try:
            kernel = self.kernel.warmup(*pointers, *self._rest, grid=grid, **options)
        except RuntimeError as error:  # MLIR's passes, and LLVM, raise no error of Triton's own
            raise CannotCompileError(
                f"Triton {triton.__version__} does not compile {self.kernel.__name__} with "
                f"{dict(options)}: {error}"
            ) from error
        kernel[grid]
        return kernel
