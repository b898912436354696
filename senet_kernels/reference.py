"""Squeeze-and-excitation in plain PyTorch: the definition, and the oracle of the kernels.

Everything is composed of differentiable torch operations: any device, any floating dtype, any
layout, double backward, forward-mode AD and ``torch.func`` transforms work. bfloat16 and float16
are computed in float32 and rounded once, as the kernels do.

Hu, Shen, Albanie, Sun, Wu: Squeeze-and-Excitation Networks, arXiv:1709.01507.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from .pointwise import POINTWISE, Options
from .tensors import untraced


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and the MLP are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_is_on(device: str) -> bool:
    """Whether autocast is enabled for a device type; False for types it does not know."""
    known = device in _HAVE_AUTOCAST or is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


# So that the usual call need not ask.
_HAVE_AUTOCAST = frozenset(d for d in ("cpu", "cuda") if is_autocast_available(d))


_P = ParamSpec("_P")


def _outside_autocast(
    function: Callable[Concatenate[Tensor, _P], Tensor],
) -> Callable[Concatenate[Tensor, _P], Tensor]:
    """Autocast would round the MLP to bfloat16 or float16: the dtypes given are those meant."""

    @functools.wraps(function)
    def wrapper(x: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        if not autocast_is_on(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapper


def per_channel(v: Tensor, ndim: int) -> Tensor:
    """``[C]`` or ``[B, C]`` -> broadcastable against ``[B, C, *spatial]``."""
    lead = 1 if v.dim() == 1 else v.shape[0]
    return v.reshape(lead, v.shape[-1], *([1] * (ndim - 2)))


def _prologue(x: Tensor, before: str, before_affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """``before(a_c x + b_c)`` in the accumulation dtype."""
    q = x.to(accumulate_dtype(x.dtype))
    if before_affine is not None:
        a, b = (per_channel(v.to(q.dtype), x.dim()) for v in before_affine)
        q = a * q + b
    return POINTWISE[before].fn(q)


def _mean_over_space(p: Tensor, lengths: Tensor | None) -> Tensor:
    """``[B, C, *spatial] -> [B, C]``; with lengths, over the first ``lengths[b]`` positions."""
    if lengths is None:
        return p.mean(dim=tuple(range(2, p.dim())))
    return masked_mean(p, lengths)


def masked_mean(p: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the first ``lengths[b]`` positions, ``[B, C]`` in the accumulation dtype.

    A length outside ``0..S`` gives NaN, and so does an empty mean, as ``torch.mean`` does.
    """
    dtype = accumulate_dtype(p.dtype)
    positions = p[0, 0].numel() if p.numel() else p.shape[2:].numel()
    counted = torch.arange(positions, device=p.device) < lengths[:, None]
    counted = counted.reshape(p.shape[0], 1, *p.shape[2:])
    total = torch.where(counted, p, 0.0).sum(dim=tuple(range(2, p.dim())), dtype=dtype)
    n = torch.where((lengths >= 0) & (lengths <= positions), lengths, 0).to(dtype)
    return torch.where(n > 0, 1.0, torch.nan)[:, None] * total / n.clamp(min=1)[:, None]


def matrix(w: Tensor) -> Tensor:
    """``[R, C]`` out of a weight with trailing extents of 1, so that its gradient comes back with
    the weight's own strides (channels-last 1x1 convolutions too: DDP compares them)."""
    if w.dim() == 2:
        return w
    with untraced():
        channels_last = w.stride(-1) == w.shape[1]
    if channels_last:
        w = w.movedim(1, -1)
        return w.reshape(w.shape[0], w.shape[-1])
    return w.reshape(w.shape[0], w.shape[1])


def _excite(
    z: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    """``u = W2 activation(W1 z + b1) + b2``; with ``w1`` None, ``u = W2 z + b2``."""

    def linear(v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        out = v @ matrix(w).to(v.dtype).t()
        return out if b is None else out + b.to(v.dtype)

    h = z if w1 is None else POINTWISE[activation].fn(linear(z, w1, b1))
    return linear(h, w2, b2)


def _apply_scale(
    p: Tensor,
    u: Tensor,
    gate: str,
    after: str,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    channels = p.shape[1]
    u = u.to(p.dtype)
    scale = POINTWISE[gate].fn(u[:, :channels])
    if beta is not None:
        scale = beta.to(p.dtype) * scale
    if alpha is not None:
        scale = alpha.to(p.dtype) + scale
    y = p * per_channel(scale, p.dim())
    if u.shape[1] == 2 * channels:
        y = y + per_channel(u[:, channels:], p.dim())
    if residual is not None:
        y = y + residual.to(p.dtype)
    return POINTWISE[after].fn(y)


@_outside_autocast
def squeeze(
    x: Tensor,
    *,
    before: str = "identity",
    before_affine: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Mean over space of ``before(a_c x + b_c)``: ``[B, C, *spatial] -> [B, C]``."""
    return _mean_over_space(_prologue(x, before, before_affine), lengths).to(x.dtype)


@_outside_autocast
def channel_scale(
    x: Tensor,
    u: Tensor,
    *,
    gate: str = "identity",
    before: str = "identity",
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str = "identity",
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """``after(p (alpha + beta gate(u)) + shift + residual)``; u is ``[B, C]`` or ``[B, 2C]``."""
    p = _prologue(x, before, before_affine)
    return _apply_scale(p, u, gate, after, residual, alpha, beta).to(x.dtype)


@_outside_autocast
def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    before: str = "identity",
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str = "identity",
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The whole operation; see :func:`senet_kernels.squeeze_excite` for shapes and meaning.

    Arguments are taken as already validated; ``"identity"`` stands for None.
    """
    # One prologue for both uses, so that their gradients meet before they are rounded.
    p = _prologue(x, before, before_affine)
    u = _excite(_mean_over_space(p, lengths), w1, b1, w2, b2, activation)
    return _apply_scale(p, u, gate, after, residual, alpha, beta).to(x.dtype)


def squeeze_excite_flat(
    options: Options,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """:func:`squeeze_excite` with its tensors by position, in the order of the raw ops."""
    return squeeze_excite(
        x, w1, b1, w2, b2, **options._asdict(), before_affine=_pair(affine_scale, affine_shift),
        residual=residual, alpha=alpha, beta=beta, lengths=lengths,
    )  # fmt: skip


def squeeze_flat(
    options: Options,
    x: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """:func:`squeeze` likewise."""
    affine = _pair(affine_scale, affine_shift)
    return squeeze(x, before=options.before, before_affine=affine, lengths=lengths)


def channel_scale_flat(
    options: Options,
    x: Tensor,
    u: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
) -> Tensor:
    """:func:`channel_scale` likewise."""
    return channel_scale(
        x, u, gate=options.gate, before=options.before,
        before_affine=_pair(affine_scale, affine_shift), after=options.after, residual=residual,
        alpha=alpha, beta=beta,
    )  # fmt: skip


def _pair(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if scale is None or shift is None else (scale, shift)
