"""Kernels written in PTX, translated and run on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
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


class Kernels:
    """Those of a module."""

    def __init__(self, text: str, name: str) -> None:
        self.module = Module(HEADER + text, f"{name}.ptx")
        path, self._library = _machine()
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
        words = [
            ctypes.c_uint64(a.ctypes.data if isinstance(a, np.ndarray) else a) for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(word) for word in words))
        self._library.simt_set_approximations(approximations)
        error = self._library.ptx_run(
            ctypes.byref(entry), grid, block, cluster, shared, int(cooperative), pointers,
            ctypes.c_uint64(seed), None, 0,
        )  # fmt: skip
        if error:
            raise RuntimeError(error.decode())
