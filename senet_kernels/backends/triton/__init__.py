"""The Triton backend: the ``triton_*`` ops on CUDA devices, and on CPU tensors under Triton's
interpreter (``TRITON_INTERPRET=1`` when the package is imported), which is for tests. Not yet run
on a GPU: what is known comes from the interpreter and from compiling ahead of time.

Importing this costs neither Triton nor CUDA; both are touched on the first call.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from senet_kernels import ops
from senet_kernels.pointwise import Options

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Device types with kernels.
DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def _is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


#: Why the Triton backend cannot be used in this process; None when it can.
UNAVAILABLE: str | None = (
    None
    if _is_installed()
    else "Triton is not installed: 'pip install triton', in the version your torch names"
)


def describe() -> str:
    """One line for ``backends()``."""
    how = "interpreted, for tests only" if INTERPRETED else "compiled at the first call of a kind"
    return f"Triton {version('triton')}, {how}"


def notes(
    x: Tensor, w1: Tensor | None, w2: Tensor, options: Options, affine: bool
) -> tuple[str, ...]:
    """How a call with these tensors would be cut; the steps around it make no difference."""
    from . import operands, plan, tuning

    kind = operands.examine((x, w1, None, w2), 0)
    return tuple(
        f"{direction}: {plan.describe(tuning.planned(direction, kind.shape, x, kind.device))}"
        for direction in ("forward", "backward")
    )


# The interpreter keeps what a program knows of itself in globals.
_one_at_a_time = threading.Lock() if INTERPRETED else nullcontext()


def _on_first_call(module: str, op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if UNAVAILABLE is not None:
            raise RuntimeError(f"backend 'triton' is not available: {UNAVAILABLE}")
        with _one_at_a_time:
            return getattr(importlib.import_module(f"{__name__}.{module}"), op)(*args)

    return call


_OPS = {
    "launch": ("forward", "forward_", "backward"),
    "halves": ("squeeze", "squeeze_backward", "channel_scale", "channel_scale_backward"),
}
for _module, _names in () if ops.SHARED else _OPS.items():
    for _name in _names:
        for _device in DEVICES:
            ops.library.impl(f"triton_{_name}", _on_first_call(_module, _name), _device.upper())
