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
from itertools import groupby

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from senet_kernels.features import Call
from senet_kernels.pointwise import Options

from . import verdicts
from .kinds import (
    INFERENCE,
    TRAINING,
    bucket,
    class_of,
    facts_of,
    kind_for,
    kind_of,
    layer_of,
    number,
)
from .verdicts import (
    COMPILED,
    MISTRUSTED,
    REFUSED,
    SLOWER,
    TRUSTED,
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


def _checked(text: str) -> str:
    """A mode, in whatever case it is written.

    Raises:
        ValueError: it is none of the three.
    """
    name = text.strip().lower()
    if name not in MODES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(MODES)}, got {text!r}"
        )
    return name


# A plain global, on which torch.compile guards.
_mode: str = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "verify")

#: Backends whose kernels are to be proven on a device type.
ASKED: set[tuple[str, str]] = {("native", "cuda"), ("triton", "cuda")}


def mode() -> str:
    """What ``SENET_KERNELS_GPU`` says.

    Raises:
        ValueError: it is none of the three.
    """
    return _mode if _mode in MODES else _checked(_mode)


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
    residual: Tensor | None = None,
    *,
    may_prove: bool,
    runs: bool,
) -> Verdict:
    """The verdict on the kernels of an eager call, see :mod:`.verdicts`; ``runs``: whether the call
    is about to be made."""
    capturing = runs and _is_capturing(x)
    try:
        direction = TRAINING if differentiated else INFERENCE
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            kind = kind_of(backend, call, x, w1, w2, outputs, direction, residual)
        if capturing:
            return verdicts.while_capturing(kind) or Verdict(UNPROVEN, _CAPTURING, final=False)
        verdict = verdicts.decide(kind, may_prove=may_prove)
    except Warning:  # one that the user has made an error
        raise
    except Exception as error:  # of a plan, of PyTorch: a call must not fail of being looked after
        verdicts.complain(f"a kernel could not be tried: {type(error).__name__}: {error}")
        return Verdict(UNPROVEN, f"it could not be tried: {error}", final=not capturing)
    if runs and verdict.state == TRUSTED:
        verdicts.lets_run(kind)
    for listen in verdicts.listeners:
        listen(kind, verdict)
    return verdict


# What has not been called before may have to be compiled, or allocate what stays.
_CAPTURING = "a CUDA graph is being captured, and this process has not made such a call before"


def _is_capturing(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    with torch.cuda.device(x.device):
        return torch.cuda.is_current_stream_capturing()


def runs_in_compiled_code(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    outputs: int,
    differentiated: bool,
    residual: Tensor | None = None,
) -> bool:
    """Whether a call that is traced runs on kernels: all that it may become at run time is trusted,
    and was measured against compiled code."""
    # Where there is none, nothing is asked of extents, which may be symbols.
    return any_compiled(x.device) and _is_in(
        COMPILED, backend, call, x, w1, outputs, differentiated, residual
    )


def is_mistrusted_where_traced(
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    outputs: int,
    differentiated: bool,
    residual: Tensor | None = None,
) -> bool:
    """Whether the kernels of a call that is traced were found wrong."""
    _load_at_trace_time(_name_of(x.device))
    return verdicts.any_mistrusted and _is_in(
        MISTRUSTED, backend, call, x, w1, outputs, differentiated, residual
    )


def _is_in(
    table: dict[str, bool],
    backend: str,
    call: Call,
    x: Tensor,
    w1: Tensor | None,
    outputs: int,
    differentiated: bool,
    residual: Tensor | None,
) -> bool:
    """Whether the variant that a traced call runs is in a table.

    Extents that are symbols become numbers, all but the batch: of that the code is guarded to the
    numbers of images that are launched in the same way.
    """
    device = _name_of(x.device)
    direction = TRAINING if differentiated else INFERENCE
    hidden, outputs = 0 if w1 is None else number(w1.shape[0]), number(outputs)
    # Of batch and positions nothing is asked where nothing is known of such layers: each question
    # is a guard, by which code is compiled anew.
    if f"{device} {layer_of(backend, call, x, hidden, outputs, direction)}" not in table:
        return False
    name = class_of(backend, call, x, hidden, outputs, direction)
    if f"{device} {name}" not in table:
        return False
    most = bucket(x.shape[0])
    least = most // 2 + 1
    if most > _MOST_BATCHES or most <= 1:
        least = most = number(x.shape[0])
    shape = [number(n) for n in x.shape[1:]]
    strides = [number(n) for n in x.stride()]
    if residual is not None and [number(n) for n in residual.stride()] != strides:
        return False
    options = call.options
    variants = _variants_at_trace_time(
        backend, device, call.device, call.dtype, call.param_dtype, options.activation,
        options.gate, options.before, options.after, call.form, facts_of(call), hidden, outputs,
        direction, name, least, most, len(shape), *shape, *strides,
    )  # fmt: skip
    divides = "ragged"
    if x.shape[0] % 16 == 0:
        divides = "whole"
    for variant in variants.split("\n"):
        last, of, key = variant.split(" ", 2)
        if of == divides and x.shape[0] <= int(last):
            return f"{device} {key}" in table
    return False


# Of larger buckets the plans are not all made: the batch becomes a number.
_MOST_BATCHES = 512


def _variants_at_trace_time(
    backend: str,
    device: str,
    device_type: str,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    activation: str,
    gate: str,
    before: str,
    after: str,
    form: str,
    given: str,
    hidden: int,
    outputs: int,
    direction: str,
    name: str,
    least: int,
    most: int,
    dims: int,
    *extents: int,
) -> str:
    """The keys of a call with ``least`` to ``most`` images, as lines of "the most images, whether
    tiles of 16 divide them, key". ``given``: of the call, from ``shift`` on. Memory is aligned."""
    options = Options(activation, gate, before, after)
    shift, weighted, affine, lengths, residual, inplace = (fact == "1" for fact in given)
    call = Call(
        device_type, dtype, param_dtype, options, form, shift, weighted, affine, lengths, residual,
        inplace,
    )  # fmt: skip
    shape, strides = extents[:dims], extents[dims:]

    def key_with(batch: int) -> str:
        return kind_for(
            backend, call, device, (batch, *shape), strides, True, hidden, outputs, direction, name
        ).key

    lines: list[str] = []
    for divides in ("ragged", "whole"):
        of_it = (b for b in range(least, most + 1) if (b % 16 == 0) == (divides == "whole"))
        for key, batches in groupby(of_it, key_with):
            *_, last = batches
            lines.append(f"{last} {divides} {key}")
    return "\n".join(lines)


_variants_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]


def any_compiled(device: torch.device) -> bool:
    """Whether any kernel on a device runs in compiled code."""
    _load_at_trace_time(_name_of(device))
    return verdicts.any_compiled


def _name_of(device: torch.device) -> str:
    """``str`` of a device, which Dynamo does not trace."""
    return f"{device.type}:{device.index}" if device.type != "cpu" else "cpu"


def compiled_classes() -> tuple[str, ...]:
    """The variants that run in compiled code, their classes and layers, on the cards of this
    process."""
    return tuple(sorted(COMPILED))


def _load_at_trace_time(device: str) -> None:
    verdicts.load(device)


# Dynamo runs it, and does not trace it: torch.compiler.assume_constant_result, which would import
# Dynamo.
_load_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]
