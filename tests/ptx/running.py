"""Kernels written in PTX, translated and run on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import compiling
from .translate import Module

HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"


@functools.cache
def _machine() -> tuple[Any, Any]:
    """The simulation without any kernels: its file, and the library."""
    flags = [flag for flag in compiling.FLAGS if flag.startswith("-I")]
    path = compiling.build.build("ptx_driver.so", [(compiling.HERE / "driver.cpp", flags)])
    library = ctypes.CDLL(str(path))
    library.ptx_run.restype = ctypes.c_char_p
    library.simt_set_approximations.argtypes = [ctypes.c_uint64]
    return path, library


def launch(
    entry: Any,
    words: Sequence[int],
    *,
    grid: tuple[int, int, int],
    block: int,
    cluster: int = 1,
    shared: int = 0,
    cooperative: bool = False,
    seed: int = 0,
    approximations: int = 0,
    only: Sequence[int] = (),
) -> None:
    """One launch of a kernel, whose parameters are of at most 8 bytes; ``only`` are the numbers of
    the clusters that run, by default all.

    Raises:
        RuntimeError: what the simulation found.
    """
    library = _machine()[1]
    values = [ctypes.c_uint64(word) for word in words]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    chosen = (ctypes.c_uint32 * len(only))(*only) if only else None
    library.simt_set_approximations(approximations)
    error = library.ptx_run(
        ctypes.byref(entry), (ctypes.c_uint * 3)(*grid), block, cluster, shared, int(cooperative),
        pointers, ctypes.c_uint64(seed), chosen, len(only),
    )  # fmt: skip
    if error:
        raise RuntimeError(error.decode())


class Kernels:
    """Those of a module."""

    def __init__(self, text: str, name: str) -> None:
        self.module = Module(HEADER + text, f"{name}.ptx")
        path, _ = _machine()
        self._entries = compiling.entries(HEADER + text, name, path)

    def run(
        self,
        kernel: str,
        *arguments: np.ndarray[Any, Any] | int,
        grid: int = 1,
        block: int = 32,
        cluster: int = 1,
        shared: int = 0,
        cooperative: bool = False,
        seed: int = 0,
        approximations: int = 0,
    ) -> None:
        """One launch. Arrays are given by their addresses.

        Raises:
            RuntimeError: what the simulation found.
        """
        entry = self._entries[kernel]
        assert len(arguments) == entry.parameters
        words = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        launch(
            entry, words, grid=(grid, 1, 1), block=block, cluster=cluster, shared=shared,
            cooperative=cooperative, seed=seed, approximations=approximations,
        )  # fmt: skip
