"""Tensors against pages that nobody may touch: a read or a write one element too far kills the
process. For what AddressSanitizer does not see: Triton's interpreter, and vector code as it is
shipped.

Run as a program: ``python guard_pages.py BACKEND [simulated]`` computes forward and backward of odd
shapes, each tensor once with its end and once with its beginning at such a page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import conftest
from backend_cases import BackendCase
from problems import Spec, build, check
from senet_kernels import squeeze_excite

PAGE = mmap.PAGESIZE
_NOT_EVEN_READ = 0
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(t: Tensor, side: str) -> Tensor:
    """A copy of ``t``, strides included, whose memory ends (``side`` is "end") or begins at a
    forbidden page."""
    if t.untyped_storage().nbytes() == 0:
        return t
    elements = 1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
    size = elements * t.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    _kept.append(memory)  # for ever: a tensor may outlive every name it has here
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, _NOT_EVEN_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = PAGE if side == "begin" else (pages + 1) * PAGE - size
    flat = torch.frombuffer(memory, dtype=t.dtype, count=elements, offset=first)
    copy = flat.as_strided(t.shape, t.stride())
    copy.copy_(t)
    return copy


_EVERYTHING: dict[str, Any] = {
    "residual": "contiguous", "after": "relu", "weighted": True, "affine": True, "before": "silu",
    "lengths": True, "shift": True,
}  # fmt: skip


def _specs(few: bool) -> Iterator[Spec]:
    """Extents that no tile and no vector divides, in both layouts, and every argument there is."""
    # The first two of each dtype: rows that begin anywhere, images that are whole vectors.
    shapes = [((2, 12, 3, 7), 3), ((3, 24, 13), 5), ((2, 5, 3, 7), 3), ((1, 33, 5, 5), 9)]
    for number, (shape, hidden) in enumerate(shapes[:2] if few else shapes):
        for dtype in (torch.float32, torch.bfloat16):
            if few and number != (dtype == torch.bfloat16):
                continue
            for layout in ("contiguous", "channels_last"):
                spec = Spec(shape, hidden, dtype, layout)
                yield spec
                yield replace(spec, **_EVERYTHING)
                yield replace(spec, hidden=None, residual="contiguous", after="silu")


def main(backend: str, simulated: bool) -> None:
    conftest.pytest_configure()
    torch.set_num_threads(2)
    case = BackendCase(backend, "cpu", simulated=simulated)
    with case.running(seed=1):
        for number, spec in enumerate(_specs(few=backend == "triton")):
            # Beyond the end is where a mask is forgotten: the interpreter, which is slow, sees
            # the other side now and then.
            for side in ("end", "begin") if backend != "triton" or number % 4 == 1 else ("end",):
                problem = build(spec)
                for name, t in problem.tensors.items():
                    problem.tensors[name] = None if t is None else guarded(t, side)
                problem.dy = guarded(problem.dy, side)
                print(spec, side, flush=True)  # the last one said is the one that crashed
                check(problem, squeeze_excite, backend=backend)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1], "simulated" in sys.argv[2:])
