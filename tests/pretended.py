"""A pretended GPU: the CPU, on which the Triton backend's ops are the C++ kernels with a planted
fault, and are to be proven as on a card.

``pretend()`` in a process makes it so for good; the fault is read from the environment variable
``PRETENDED_FAULT``, or a file of that name, at each call. ``wrong on 3x12x5x7; dies on 2x20x33x31``
plants faults in calls of these shapes alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senet_kernels import dispatch, features, ops, resolve, trust
from senet_kernels.backends import native, triton
from senet_kernels.trust import kinds, store, verdicts, worker

FAULT = "PRETENDED_FAULT"

#: What a kernel may do wrong, and the word for it in a verdict.
FAULTS = {
    "wrong": "wrong", "one element wrong": "wrong", "gradient wrong": "wrong",
    "stale parameter gradient": "wrong", "unwritten": "unwritten", "writes behind": "wrote outside",
    "writes before": "wrote outside", "overwrites x": "wrote outside", "race": "races",
    "swallows NaN": "special values", "leaks NaN": "special values", "raises": "failed",
}  # fmt: skip
SLOW = "slow"
SIGNALS = {"dies": signal.SIGSEGV, "killed": signal.SIGKILL}
HANGS = "hangs"

launches = 0
_runs = 0


def fault(x: Tensor) -> str:
    """The one that is planted now in calls with this x: by the environment, or for processes that
    run already by a file beside the verdicts."""
    path = Path(os.environ.get("SENET_KERNELS_CACHE", os.devnull), FAULT)
    planted = os.environ.get(FAULT) or (path.read_text() if path.exists() else "")
    of_shape = dict(part.split(" on ")[::-1] for part in planted.split("; ") if " on " in part)
    return of_shape.get("x".join(map(str, x.shape)), "") if of_shape else planted


def _copy(t: Tensor, like: Tensor) -> Tensor:
    """Into memory that PyTorch operators allocate, as a Triton kernel's results are."""
    return torch.empty_like(like if like.shape == t.shape else t, dtype=t.dtype).copy_(t)


def _spoil(y: Tensor, x: Tensor) -> None:
    """What a faulty kernel does to its result."""
    global _runs
    _runs += 1
    planted = fault(x)
    if planted in SIGNALS:
        os.kill(os.getpid(), SIGNALS[planted])
        time.sleep(5)
    if planted == HANGS:
        time.sleep(600)
    if planted == "raises":
        raise RuntimeError("an illegal memory access was encountered")
    if planted == SLOW:
        time.sleep(0.003)
    if not y.numel():
        return
    end = y.storage_offset() + sum((n - 1) * s for n, s in zip(y.shape, y.stride(), strict=True))
    first, last = y.as_strided((1,), (1,)), y.as_strided((1,), (1,), end)
    if planted == "wrong":
        y.mul_(1.01)
    elif planted == "one element wrong":
        last.add_(0.5)
    elif planted == "unwritten":
        last.fill_(torch.nan)
    elif planted == "race" and _runs % 2:
        first.mul_(1.0001).add_(0.001)
    elif planted == "overwrites x":
        x.as_strided((1,), (1,)).fill_(3.0)
    elif planted == "swallows NaN":
        y.nan_to_num_()
    elif planted == "leaks NaN" and y.isnan().any():
        y.fill_(torch.nan)
    elif planted == "writes behind" and _has_room(y, end + 1):
        y.as_strided((1,), (1,), end + 1).fill_(1.0)
    elif planted == "writes before" and _has_room(y, y.storage_offset() - 1):
        y.as_strided((1,), (1,), y.storage_offset() - 1).fill_(1.0)


def _has_room(y: Tensor, place: int) -> bool:
    return 0 <= place < y.untyped_storage().nbytes() // y.element_size()


def _native(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.senet_kernels, f"native_{name}").default
    return op


def _op(name: str) -> Callable[..., Any]:
    backward = name.endswith("backward")

    def call(*args: Any) -> Any:
        global launches
        launches += 1
        results = _native(name)(*args)
        if results is None:  # in place
            _spoil(args[0], args[0])
            return None
        x = args[1] if backward else args[0]
        single = isinstance(results, Tensor)
        copies = [_copy(t, x) for t in ((results,) if single else results)]
        if not backward:
            _spoil(copies[0], x)
        elif fault(x) == "gradient wrong":
            copies[0].mul_(1.2)
        elif fault(x) == "stale parameter gradient" and len(copies) > 3:
            copies[3].add_(1.0)
        return copies[0] if single else tuple(copies)

    return call


def _files() -> list[Path]:
    return [Path(__file__)]


_LIBRARY = torch.library.Library(ops.NAMESPACE, "IMPL")
_NAMES = tuple(name.removeprefix("native_") for name in ops.NATIVE_OPS)
_pretended = False


def define_ops() -> None:
    """The ops of the Triton backend on CPU tensors, once in a process."""
    global _pretended
    if not _pretended and not triton.INTERPRETED:
        _pretended = True
        for name in _NAMES:
            _LIBRARY.impl(f"triton_{name}", _op(name), "CPU")


def pretend(set_to: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make it so; ``set_to`` as ``monkeypatch.setattr``, for a while."""
    define_ops()
    set_to(triton, "UNAVAILABLE", None)
    set_to(triton, "notes", lambda *args: ("forward: pretended", "backward: pretended"))
    set_to(triton, "launches", lambda *args: ("pretended",))
    set_to(triton, "kernel_files", _files)
    set_to(triton, "describe", lambda: "pretended")
    set_to(features, "COLUMNS", (*features.COLUMNS, ("triton", "cpu")))
    cells = {row: (*cells, features.FUSED) for row, cells in features.FEATURES.items()}
    set_to(features, "FEATURES", cells)
    set_to(dispatch, "ORDER", ("triton", "fallback"))
    set_to(dispatch, "AUTOMATIC", {"cpu": ("triton",)})
    set_to(trust, "ASKED", {("triton", "cpu")})
    set_to(trust, "_mode", "verify")
    set_to(kinds, "_triton_version", lambda: "pretended")
    set_to(worker, "IMPORTS", ["pretended_worker"])
    kinds.kernel_hash.cache_clear()
    kinds.environment.cache_clear()


def why_not() -> str | None:
    """Why there can be no pretended card."""
    if triton.INTERPRETED:
        return "the ops are Triton's own under its interpreter"
    return native.UNAVAILABLE


def as_new_process() -> None:
    """Forget what this process knows of verdicts."""
    for table in (
        verdicts._memory, verdicts._later, verdicts._devices, verdicts._loaded, verdicts._begun,
        verdicts._said, verdicts._waited, verdicts._ran, verdicts.COMPILED, verdicts.MISTRUSTED,
        store._complained, resolve._RESOLVED,
    ):  # fmt: skip
        table.clear()
    verdicts._frozen = verdicts._forked = False
    verdicts.any_compiled = verdicts.any_mistrusted = False
    kinds.kernel_hash.cache_clear()
    kinds.environment.cache_clear()
