"""Kernels for a GPU run by default once each has proven itself on the user's own card.

The first call of a kind runs the kernel on synthetic data and compares it with float64, and its
time with eager PyTorch; the verdict is kept on disk for the card, the driver and the versions.
docs/backends.md has the whole. ``SENET_KERNELS_GPU`` is ``verify`` (the default), ``trust``
(kernels run unasked) or ``off`` (they run by name alone). Kernels for the CPU are proven by the
project's own tests, and run unasked.

:func:`status` says what is known, :func:`forget` drops it, :func:`freeze` pins it, and
:func:`senet_kernels.verify` asks for all that a model needs. The logger is ``senet_kernels.trust``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from senet_kernels.features import Call

from . import verdicts
from .kinds import INFERENCE, TRAINING, class_of, kind_of
from .verdicts import (
    COMPILED_CLASSES,
    REFUSED,
    SLOWER,
    TRUSTED,
    TRUSTED_CLASSES,
    UNPROVEN,
    KernelMistrustWarning,
    Question,
    Status,
    Verdict,
    as_lines,
    forget,
    freeze,
    status,
)

__all__ = [
    "REFUSED",
    "SLOWER",
    "TRUSTED",
    "UNPROVEN",
    "KernelMistrustWarning",
    "Question",
    "Status",
    "Verdict",
    "as_lines",
    "forget",
    "freeze",
    "status",
]

ENVIRONMENT_VARIABLE = "SENET_KERNELS_GPU"
MODES = ("verify", "trust", "off")

# A plain global, on which torch.compile guards.
_mode: str = os.environ.get(ENVIRONMENT_VARIABLE) or "verify"

#: Backends whose kernels are to be proven on a device type.
ASKED: set[tuple[str, str]] = {("native", "cuda"), ("triton", "cuda")}


def mode() -> str:
    """What ``SENET_KERNELS_GPU`` says.

    Raises:
        ValueError: it is none of the three.
    """
    if _mode not in MODES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(MODES)}, got {_mode!r}"
        )
    return _mode


def is_asked(backend: str, device: str) -> bool:
    """Whether the kernels of a backend for a device type run only after a proof."""
    return (backend, device) in ASKED and mode() == "verify"


def why_off(backend: str, device: str) -> str | None:
    """Why kernels run only when asked for by name; None where they run by default."""
    if (backend, device) in ASKED and mode() == "off":
        return f"{ENVIRONMENT_VARIABLE} is off; backend={backend!r} runs it all the same"
    return None


def verdict_on(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    outputs: int,
    differentiated: bool,
    *,
    may_prove: bool,
) -> Verdict:
    """The verdict on the kernels of an eager call, see :mod:`.verdicts`."""
    if may_prove and _is_capturing(x):
        # What has not been called before may have to be compiled, or allocate what stays.
        reason = "a CUDA graph is being captured, and this process has not made such a call before"
        verdicts.once(f"{reason}: PyTorch's own operators run")
        return Verdict(UNPROVEN, reason, final=False)
    try:
        direction = TRAINING if differentiated else INFERENCE
        kind = kind_of(backend, call, x, w1, w2, outputs, direction)
        verdict = verdicts.decide(kind, may_prove=may_prove)
    except Warning:  # one that the user has made an error
        raise
    except Exception as error:  # of a plan, of PyTorch: a call must not fail of being looked after
        verdicts.complain(f"a kernel could not be tried: {type(error).__name__}: {error}")
        return Verdict(UNPROVEN, f"it could not be tried: {error}")
    for listen in verdicts.listeners:
        listen(kind, verdict)
    return verdict


def _is_capturing(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()


def runs_where_traced(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    outputs: int,
    differentiated: bool,
    compiling: bool,
) -> bool:
    """Whether a call that is traced, or transformed by torch.func, runs on kernels.
    ``compiling``: in compiled code, for which kernels are measured against it."""
    device = f"{x.device.type}:{x.device.index}" if x.device.type != "cpu" else "cpu"
    _load_at_trace_time(device)
    # Where there is none, nothing is asked of extents, which may be symbols.
    if not (verdicts.any_compiled if compiling else verdicts.any_trusted):
        return False
    table = COMPILED_CLASSES if compiling else TRUSTED_CLASSES
    direction = TRAINING if differentiated else INFERENCE
    hidden = 0 if w1 is None else w1.shape[0]
    return f"{device} {class_of(backend, call, x, hidden, outputs, direction)}" in table


def any_compiled(device: torch.device) -> bool:
    """Whether any kernel on a device runs in compiled code."""
    _load_at_trace_time(f"{device.type}:{device.index}" if device.type != "cpu" else "cpu")
    return verdicts.any_compiled


def compiled_classes() -> tuple[str, ...]:
    """The classes of calls that run on kernels in compiled code, on the cards of this process."""
    return tuple(sorted(COMPILED_CLASSES))


def _load_at_trace_time(device: str) -> None:
    verdicts.load(device)


# Dynamo runs it, and does not trace it: torch.compiler.assume_constant_result, which would import
# Dynamo.
_load_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]
