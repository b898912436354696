"""What the results must be: the operation written out from its definition, and error budgets.

``block`` is the definition. In float64 it is the oracle; in the dtype under test, with 1x1
convolutions for the two layers, it is the eager block people have in their models, whose error
is the yardstick for ours. Nothing here but names comes from the package under test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from senet_kernels.pointwise import POINTWISE


def _clamped(t: Tensor) -> Tensor:
    """``t.clamp(0, 1)`` with the derivative 1 at its ends, where torch's is 0 from 2.15 on."""
    return torch.where((t >= 0) & (t <= 1), t, t.clamp(0, 1))


# What is not written out is torch's function of that name; the names alone are the package's.
_WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "leaky_relu": lambda t: F.leaky_relu(t, 0.01),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    # F.hardsigmoid's derivative is a float32 1/6, in float64 too; the kinks are the same.
    "hardsigmoid": lambda t: F.relu6(t + 3) / 6,
    "hardsigmoid_02": lambda t: _clamped(0.2 * t + 0.5),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: _WRITTEN_OUT.get(name) or getattr(F, name) for name in POINTWISE
}

#: Where the derivative jumps.
KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "leaky_relu": (0.0,),
    "hardsigmoid": (-3.0, 3.0),
    "hardsigmoid_02": (-2.5, 2.5),
}

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def matmul_linear(v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """``[B, K] -> [B, M]`` by a matrix product."""
    out = v @ w.flatten(1).T
    return out if b is None else out + b


def conv_linear(v: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """``[B, K] -> [B, M]`` by a 1x1 convolution, as timm and torchvision do it."""
    return F.conv2d(v[:, :, None, None], w.reshape(*w.shape[:2], 1, 1), b).flatten(1)


def block(
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
    linear: Linear = matmul_linear,
) -> Tensor:
    """Squeeze-and-excitation by its definition, in the dtype of its inputs."""
    z = squeeze(x, before=before, before_affine=before_affine, lengths=lengths)
    h = z if w1 is None else FUNCTIONS[activation](linear(z, w1, b1))
    return channel_scale(
        x, linear(h, w2, b2), gate=gate, before=before, before_affine=before_affine, after=after,
        residual=residual, alpha=alpha, beta=beta,
    )  # fmt: skip


def _spread(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(*v.shape, *[1] * (x.dim() - 2))


def prologue(x: Tensor, before: str, before_affine: tuple[Tensor, Tensor] | None) -> Tensor:
    if before_affine is not None:
        a, b = before_affine
        x = _spread(a, x) * x + _spread(b, x)
    return FUNCTIONS[before](x)


def squeeze(
    x: Tensor,
    *,
    before: str = "identity",
    before_affine: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The mean over space."""
    rows = prologue(x, before, before_affine).flatten(2)
    if lengths is None:
        return rows.mean(2)
    means = [row[:, :n].mean(1) for row, n in zip(rows, lengths, strict=True)]
    return torch.stack(means) if means else rows.mean(2)


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
    """What follows the excitation."""
    channels = x.shape[1]
    scale = FUNCTIONS[gate](u[:, :channels])
    if beta is not None:
        scale = beta * scale
    if alpha is not None:
        scale = alpha + scale
    y = prologue(x, before, before_affine) * _spread(scale, x)
    if u.shape[1] == 2 * channels and channels:
        y = y + _spread(u[:, channels:], x)
    if residual is not None:
        y = y + residual
    return FUNCTIONS[after](y)


def eager_block(*args: Any, **kwargs: Any) -> Tensor:
    """The block as models have it."""
    return block(*args, **kwargs, linear=conv_linear)


def ulp(dtype: torch.dtype) -> float:
    """Spacing of numbers just above 1."""
    return torch.finfo(dtype).eps


def mean_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().mean().item()


def max_error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item()


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def allowed_error(
    right: Tensor, magnitude: float, dtype: torch.dtype, x_dtype: torch.dtype, steps: int = 1
) -> Tensor:
    """How far a result of this dtype, of a call on x of that one, may be from the oracle's.

    ``steps`` are spacings of subnormal numbers: more than one where terms of sums are subnormal.
    See :func:`assert_like_oracle` for the rest.
    """
    accumulated = torch.float64 if x_dtype == torch.float64 else torch.float32
    own = ulp(dtype) if dtype in (torch.bfloat16, torch.float16) else 8 * ulp(dtype)
    smallest = torch.finfo(dtype).smallest_normal * ulp(dtype)
    return own * right.abs() + 8 * ulp(accumulated) * magnitude + steps * smallest


def raise_where(wrong: Tensor, name: str, got: Tensor, right: Tensor, allowed: Tensor) -> None:
    """AssertionError with the first element that is wrong, if there is one."""
    if not wrong.any():
        return
    at = tuple(wrong.nonzero()[0].tolist())
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {right.numel()} elements are wrong, first at {at}: "
        f"got {got[at].item()!r}, expected {right[at].item()!r} "
        f"(allowed error {allowed[at].item():.3g})"
    )


def assert_like_oracle(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    magnitudes: dict[str, float],
    dtype: torch.dtype,
) -> None:
    """Every tensor is the oracle's up to the rounding a float32 accumulation may leave.

    bfloat16 and float16 results may be one ulp of themselves off (computed in float32, rounded
    once); on top come a few float32 ulps of ``magnitudes``: the sum of the absolute values of the
    terms, which is what cancellation is measured against. One wrong or missing element of a sum
    is orders of magnitude more.
    """
    for name, right in expected.items():
        got = actual[name]
        assert got.dtype == dtype, f"{name}: dtype {got.dtype}"
        assert got.shape == right.shape, f"{name}: shape {tuple(got.shape)}"
        if not right.numel():
            continue
        allowed = allowed_error(right, magnitudes[name], dtype, dtype)
        off = (got.double() - right).abs()
        wrong = ~(off <= allowed)  # NaN is wrong
        raise_where(wrong, name, got, right, allowed)
