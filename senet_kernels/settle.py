"""From the backend that could run a call to the one that does, where kernels are to be proven."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, features, trust
from .dispatch import BackendChoice
from .pointwise import Options
from .tensors import PLAIN_TYPES, requires_grad
from .trust.verdicts import once

# Prepared calls that are kept for each kind. Who has more (a new shape in every step) asks again.
_MOST_KNOWN = 4096


class ResolvedCall(NamedTuple):
    """What one kind of call resolves to; cached per kind, see :mod:`senet_kernels.resolve`."""

    options: Options
    code: int
    call: features.Call
    choice: BackendChoice
    asks: trust.Question | bool = False  # whether the choice is still to be proven


class KernelMistrustError(dispatch.BackendUnavailableError):
    """A backend was asked for by name whose kernel was found wrong on this machine."""


class _Matrices(NamedTuple):
    """Of a call's tensors, in the order of the raw ops, those that its kind depends on."""

    w1: Tensor | None
    w2: Tensor | None
    residual: Tensor | None
    outputs: int  # rows of w2, columns of u


def _matrices(form: str, tensors: tuple[Tensor | None, ...]) -> _Matrices:
    last: Tensor | None
    if form == "squeeze alone":
        w1 = w2 = residual = None
        last = tensors[0]
    elif form == "channel_scale alone":
        w1, w2, last, residual = None, None, tensors[1], tensors[2]
    else:
        w1, w2, last, residual = tensors[1], tensors[3], tensors[3], tensors[5]
    assert last is not None
    outputs = last.shape[1] if w2 is None else last.shape[0]
    return _Matrices(w1, w2, residual, outputs)


def settle(
    resolved: ResolvedCall,
    tensors: tuple[Tensor | None, ...],
    backend: str | None,
    compiling: bool,
    may_prove: bool,
) -> ResolvedCall:
    """A call whose kernels are to be proven, with the choice that their verdicts lead to.

    Args:
        resolved: what :func:`senet_kernels.resolve.resolve` found.
        tensors: of the call, in the order of the raw ops, the residual at least.
        backend: as in :func:`senet_kernels.squeeze_excite`.
        compiling: whether torch is.
        may_prove: False asks what is known.

    Raises:
        KernelMistrustError: a backend asked for by name is not to be trusted.
    """
    x = tensors[0]
    assert x is not None
    of = _matrices(resolved.call.form, tensors)
    differentiated = requires_grad(*tensors)
    if compiling or type(x) not in PLAIN_TYPES:
        return _settle_traced(resolved, x, of, backend, differentiated)
    runs = may_prove  # else it is a question alone
    if torch._C._are_functorch_transforms_active():  # where nothing is proven either
        x, may_prove, differentiated = _unwrapped(x), False, True
        of = of._replace(residual=None if of.residual is None else _unwrapped(of.residual))
    asks = resolved.asks
    assert isinstance(asks, trust.Question)
    key = (
        x.shape, x.stride(), x.device, x.data_ptr() & 15, differentiated, of.outputs,
        None if of.w1 is None else of.w1.shape[0],
        None if of.residual is None else (of.residual.stride(), of.residual.data_ptr() & 15),
    )  # fmt: skip
    answers = asks.known
    known = answers.get(key)
    if known is not None:
        answer: ResolvedCall = known
        return answer
    answer, is_final = _settle_eagerly(resolved, x, of, backend, differentiated, may_prove, runs)
    if is_final and runs:
        if len(answers) >= _MOST_KNOWN:
            answers.clear()
        answers[key] = answer
    return answer


def _settle_eagerly(
    resolved: ResolvedCall,
    x: Tensor,
    of: _Matrices,
    backend: str | None,
    differentiated: bool,
    may_prove: bool,
    runs: bool,
) -> tuple[ResolvedCall, bool]:
    """The call with its choice, and whether that is final in this process."""
    call, choice = resolved.call, resolved.choice
    requested = dispatch.requested_backend(backend)
    against: tuple[tuple[str, str], ...] = ()
    is_final = True
    while trust.is_asked(choice.backend, call.device):
        verdict = trust.verdict_on(
            choice.backend, call, x, of.w1, of.w2, of.outputs, differentiated, of.residual,
            may_prove=may_prove, runs=runs,
        )  # fmt: skip
        is_final = is_final and verdict.final
        if verdict.state == trust.UNPROVEN and may_prove:
            instead = "PyTorch's own operators run"
            if requested != "auto":
                instead = f"backend={requested!r} was asked for, and runs all the same"
            once(f"{verdict.name or choice.backend}: {verdict.reason}: {instead}")
        if requested != "auto":
            if verdict.state == trust.REFUSED:
                raise _mistrust(requested, f": {verdict.reason}")
            break
        if verdict.state == trust.TRUSTED:
            break
        against = (*against, (choice.backend, f"{verdict.state}: {verdict.reason}"))
        choice = dispatch.choose(call, requested, against)
    return resolved._replace(choice=choice, asks=False), is_final


def _mistrust(requested: str, why: str) -> KernelMistrustError:
    return KernelMistrustError(
        f"backend={requested!r} was asked for, and its kernel was found wrong on this "
        f"machine{why}; {trust.ENVIRONMENT_VARIABLE}=trust runs it "
        "all the same, senet_kernels.trust.forget() has it tried anew"
    )


def _settle_traced(
    resolved: ResolvedCall, x: Tensor, of: _Matrices, backend: str | None, differentiated: bool
) -> ResolvedCall:
    """The same in compiled code, where nothing can be proven, by the verdicts that there are."""
    call, choice = resolved.call, resolved.choice
    requested = dispatch.requested_backend(backend)
    if requested != "auto":
        if trust.is_asked(choice.backend, call.device) and trust.is_mistrusted_where_traced(
            choice.backend, call, x, of.w1, of.outputs, differentiated, of.residual
        ):
            raise _mistrust(requested, "")
        return resolved._replace(asks=False)
    reason = "no verdict lets it run in compiled code; senet_kernels.verify(..., compiled=True)"
    against: tuple[tuple[str, str], ...] = ()
    while trust.is_asked(choice.backend, call.device) and not trust.runs_in_compiled_code(
        choice.backend, call, x, of.w1, of.outputs, differentiated, of.residual
    ):
        against = (*against, (choice.backend, reason))
        choice = dispatch.choose(call, "auto", against)
    return resolved._replace(choice=choice, asks=False)


def _unwrapped(images: Tensor) -> Tensor:
    """The images that a kernel is given under transforms: vmap's are folded into the batch."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(images):
        mapped = functorch.is_batchedtensor(images)
        axis = functorch.maybe_get_bdim(images) if mapped else 0
        images = functorch.get_unwrapped(images)
        if mapped:
            images = images.movedim(axis, 0).flatten(0, 1)
    return images
