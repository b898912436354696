"""Squeeze-and-excitation as eager PyTorch code computes it, in the dtype of x, with linear layers.

It runs where no kernel takes a call. It moves the bytes that a model's own block moves, or fewer
(one ``addcmul`` scales and adds), and has the accuracy and the special values of eager PyTorch;
gradients are those of native autograd. :mod:`senet_kernels.reference` is the oracle instead: exact,
in float32, and slower.

Arguments are those of :func:`senet_kernels.squeeze_excite`, already validated, under autocast as
they were given. Hu, Shen, Albanie, Sun, Wu: Squeeze-and-Excitation Networks, arXiv:1709.01507.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

from .pointwise import POINTWISE, Pointwise
from .reference import masked_mean, matrix, per_channel
from .tensors import dispatch_modes, function_modes, is_captured, untraced

#: Functions whose gradient is a function of their result: in place, autograd keeps nothing more.
_KEEP_RESULT = frozenset(("relu", "leaky_relu"))


def _row(name: str | None) -> Pointwise:
    return POINTWISE[name or "identity"]


def _apply(name: str | None, x: Tensor) -> Tensor:
    row = _row(name)
    return (row.eager or row.fn)(x)


def _overwrite(name: str | None, x: Tensor) -> Tensor:
    row = _row(name)
    return x.copy_(row.fn(x)) if row.in_place is None else row.in_place(x)


def _finish(name: str | None, y: Tensor) -> Tensor:
    """``after``, over y where nobody else needs y."""
    if not _may_overwrite(y, y) or (y.requires_grad and name not in _KEEP_RESULT):
        return _apply(name, y)
    return _overwrite(name, y)


def _prologue(
    x: Tensor,
    before: str | None,
    before_affine: tuple[Tensor, Tensor] | None,
    inplace: bool,
) -> Tensor:
    """``before(a_c x + b_c)`` in the dtype of x."""
    if before_affine is not None:
        # Under autocast they may be wider than x: rounded once, after the sum, as a BatchNorm does.
        a, b = (per_channel(v, x.dim()) for v in before_affine)
        x = torch.addcmul(b, x, a, out=x) if inplace else torch.addcmul(b, x, a).type_as(x)
    return _overwrite(before, x) if inplace else _apply(before, x)


def _mean(p: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return p.mean(dim=tuple(range(2, p.dim())))
    return masked_mean(p, lengths).type_as(p)


def _scale(
    p: Tensor,
    u: Tensor,
    gate: str | None,
    after: str | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    inplace: bool,
) -> Tensor:
    shift = None
    with untraced():
        shifted = u.shape[1] != p.shape[1]
    if shifted:
        u, shift = u.chunk(2, dim=1)  # whose gradient is one concatenation
        shift = per_channel(shift, p.dim())
    g = _apply(gate, u)
    scale = g
    # Under autocast they may be wider than the gate, and do not widen the result.
    if beta is not None:
        scale = beta * scale
    if alpha is not None:
        scale = alpha + scale
    if scale.dtype != p.dtype and g.dtype == p.dtype:
        scale = scale.type_as(p)
    scale = per_channel(scale, p.dim())
    if shift is None:
        y = _multiply_add(p, scale, residual, inplace)
    else:
        y = _multiply_add(p, scale, shift, inplace)
        if residual is not None:
            y = y.add_(residual) if inplace or _may_overwrite(y, residual) else y + residual
    return _overwrite(after, y) if inplace else _finish(after, y)


def _multiply_add(p: Tensor, scale: Tensor, added: Tensor | None, inplace: bool) -> Tensor:
    """``p * scale + added``, over p if so asked for; ``added`` is like p, or one per channel."""
    if added is None:
        return p.mul_(scale) if inplace else p * scale
    if inplace:
        return torch.addcmul(added, p, scale, out=p)
    # One operator, whose backward pass would multiply both factors by 1 first; and only where its
    # result is laid out as the product would be.
    if not _is_differentiated(p, scale, added) and _sum_is_laid_out_as(p, added):
        return torch.addcmul(added, p, scale)
    y = p * scale
    return y.add_(added) if _may_overwrite(y, added) else y + added


def _is_differentiated(*tensors: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()  # which fuses them anyway
        or torch._C._are_functorch_transforms_active()
        or fwAD._current_level >= 0
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _may_overwrite(y: Tensor, added: Tensor) -> bool:
    """Whether a sum may take the place of y, which nobody else has."""
    return (
        y.dtype == added.dtype
        and not torch.compiler.is_compiling()
        # A trace is compared with one that is made without gradients.
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and fwAD._current_level < 0
        # What is captured may be trained.
        and not ((dispatch_modes() or function_modes()) and is_captured())
    )


def _sum_is_laid_out_as(p: Tensor, added: Tensor) -> bool:
    if torch._C._get_tracing_state() is not None:
        return False
    if added.shape == p.shape:
        return added.stride() == p.stride()
    if added.stride(0) < added.stride(1):
        return False
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.dim())
    return p.is_contiguous() or (last is not None and p.is_contiguous(memory_format=last))


def squeeze(
    x: Tensor,
    *,
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Mean over space of ``before(a_c x + b_c)``: ``[B, C, *spatial] -> [B, C]``."""
    return _mean(_prologue(x, before, before_affine, False), lengths)


def channel_scale(
    x: Tensor,
    u: Tensor,
    *,
    gate: str | None = None,
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """``after(p (alpha + beta gate(u)) + shift + residual)``; u is ``[B, C]`` or ``[B, 2C]``."""
    p = _prologue(x, before, before_affine, False)
    return _scale(p, u, gate, after, residual, alpha, beta, False)


def channel_affine(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    before: str | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``after(alpha before(x) + beta + residual)``; alpha and beta are ``[C]``."""
    p = _prologue(x, before, None, False)
    scale, shift = per_channel(alpha, p.dim()), per_channel(beta, p.dim())
    y = _multiply_add(p, scale, shift, False)
    if residual is not None:
        y = y.add_(residual) if _may_overwrite(y, residual) else y + residual
    return _finish(after, y)


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "relu",
    gate: str | None = "sigmoid",
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    lengths: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """The whole operation; ``inplace`` overwrites x, which then needs no gradient."""
    p = _prologue(x, before, before_affine, inplace)
    h = _mean(p, lengths)
    if w1 is not None:
        h = _apply(activation, F.linear(h, matrix(w1), b1))
    u = F.linear(h, matrix(w2), b2)
    return _scale(p, u, gate, after, residual, alpha, beta, inplace)
