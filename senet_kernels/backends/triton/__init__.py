"""The Triton backend: the ``triton_*`` ops on CUDA devices, and on CPU tensors under Triton's
interpreter (``TRITON_INTERPRET=1`` when the package is imported), which is for tests. Not yet run
on a GPU: what is known comes from the interpreter and from compiling ahead of time.

Importing this costs neither Triton nor CUDA. Triton is imported when it is first asked whether it
can be used, CUDA is touched on the first call.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senet_kernels import ops
from senet_kernels._libraries import why_not
from senet_kernels.pointwise import Options, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Device types with kernels.
DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def _why_no_compiler() -> str | None:
    """Why Triton cannot compile the C library through which it talks to the GPU's driver; None
    where it can, or need not: interpreted, or with such a library in its cache.

    It runs the program that CC names, else gcc or clang. (Triton for Windows brings a compiler.)
    """
    if INTERPRETED or sys.platform != "linux":
        return None
    named = os.environ.get("CC")
    if named is None:
        if shutil.which("gcc") or shutil.which("clang"):
            return None
        found = "CC is not set, and neither gcc nor clang is on PATH"
    else:
        # The first word: what follows may be arguments.
        if shutil.which("".join(named.split()[:1])):
            return None
        found = f"CC is {named!r}, which is no program that can be run"
    home = os.environ.get("TRITON_HOME") or Path.home()
    cache = os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache")
    if any(any(Path(cache).glob(f"*/{name}_utils*.so")) for name in ("cuda", "hip")):
        return None
    return (
        f"Triton needs a C compiler at run time, and {found}: install gcc, or set CC to a C "
        "compiler, before the process starts"
    )


#: Why the Triton backend cannot be used in this process; None when it can.
UNAVAILABLE: str | None


def __getattr__(name: str) -> Any:
    """``UNAVAILABLE``, found out when it is first read: only importing Triton shows it."""
    if name != "UNAVAILABLE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = why_not("triton", "jit", "__version__") or why_not("triton.language", "constexpr")
    remedy = "'pip install triton', in the version your torch names"
    globals()[name] = _why_no_compiler() if reason is None else f"{reason}; {remedy}"
    return globals()[name]


def describe() -> str:
    """One line for ``backends()``."""
    import triton

    how = "interpreted, for tests only" if INTERPRETED else "compiled at the first call of a kind"
    return f"Triton {triton.__version__}, {how}"


def notes(
    x: Tensor, w1: Tensor | None, w2: Tensor, options: Options, given: frozenset[str]
) -> tuple[str, ...]:
    """How a call with these tensors, and the optional arguments ``given``, would be cut: forward
    and, for all gradients, backward."""
    from . import operands, plan

    kind = operands.examine((x, w1, None, w2), pack(options))
    cut = kind.shape, x.element_size(), kind.device
    masked, again = options.after == "relu", options.after_again
    affine = "before_affine" in given
    crowded = plan.is_crowded(options.before, again)
    forward = plan.make_plan(*cut, masked=masked, crowded=crowded)
    backward = plan.make_plan(*cut, masked=masked, crowded=crowded, sums_in_dx=affine)
    layers = 1 if w1 is None else 2
    return (
        f"forward: {plan.describe(forward, 2 + layers)}",
        f"backward: {plan.describe(backward, 2 + layers + affine)}",
    )


def launches(
    x: Tensor,
    device: torch.device,
    aligned: bool,
    param_dtype: torch.dtype,
    form: str,
    hidden: int,
    outputs: int,
    options: Options,
    given: Collection[str],
    training: bool,
) -> tuple[str, ...]:
    """The constants that kernels of any form are compiled with, for the names of verdicts: forward
    and, when ``training``, backward. Arguments as for the native backend's."""
    from . import operands, plan

    last, _ = operands._layout(x.shape, x.stride())
    whole = form in ("two layers", "single layer (w1=None)")
    shape = plan.Shape(
        x.shape[0], x.shape[1], x.shape[2:].numel(), hidden if form == "two layers" else None,
        outputs if whole else 0, last,
    )  # fmt: skip
    stride = x.stride(0) if operands._image_is_dense(x, last) else shape.image
    shape = shape._replace(alignment=math.gcd(shape.image, stride, 16) or 1)
    cut = shape, x.element_size(), operands._device(device)
    masked = training and form != "squeeze alone" and options.after == "relu"
    crowded = plan.is_crowded(options.before, options.after_again)
    forward = plan.make_plan(*cut, masked=masked, crowded=crowded, lengths="lengths" in given)
    said = [f"forward: {plan.constants(forward)}"]
    if training:
        backward = plan.make_plan(*cut, masked=masked, crowded=crowded)
        said.append(f"backward: {plan.constants(backward)}")
        if "before_affine" in given:  # whose gradients may be wanted, or not
            backward = plan.make_plan(*cut, masked=masked, crowded=crowded, sums_in_dx=True)
            said.append(f"to before_affine: {plan.constants(backward)}")
    return tuple(said)


def kernel_files() -> list[Path]:
    """What the kernels are made of, for :mod:`senet_kernels.trust`."""
    return sorted(Path(__file__).parent.glob("*.py"))


# The interpreter keeps what a program knows of itself in globals.
_one_at_a_time = threading.Lock() if INTERPRETED else nullcontext()


def _on_first_call(module: str, op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        reason = sys.modules[__name__].UNAVAILABLE  # as an attribute: see __getattr__
        if reason is not None:
            raise RuntimeError(f"backend 'triton' is not available: {reason}")
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
