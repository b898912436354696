"""The ops for the halves of the operation: the squeeze alone, the scaling alone.

The same kernels as for the whole, without the MLP; prepared, and cut, in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senet_kernels.ops import after_code, mask_numel

from .build import Builder
from .launch import (
    KEEPS_NO_RESIDUAL,
    AffineSums,
    check_mask,
    empty_gradients,
    finished,
    on_device,
    planned,
    run,
    wanted,
)
from .operands import HALF_NAMES, Inputs, Kind, examine


class Squeeze:
    """Squeezes of one kind."""

    def __init__(self, kind: Kind, x: Tensor, lengths: bool) -> None:
        self.kind = kind
        plan = planned(kind, x, masked=False, lengths=lengths)
        self.squeeze, self.mean = Builder(kind, plan, x, x.dtype).squeeze()
        self.parts = plan.sums.splits * x.shape[:2].numel()

    def __call__(self, inputs: Inputs) -> Tensor:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, _, _, _, _, a, b, lengths = kind.arranged(inputs)
        z = like.new_empty(like.shape[:2])
        with on_device(like):
            if self.mean is None:
                self.squeeze(x, a, b, lengths, z)
            else:
                parts = kind.scratch(like, self.parts)
                self.squeeze(x, a, b, lengths, parts)
                self.mean(parts, lengths, z)
        return z


class ChannelScale:
    """Scalings of one kind."""

    def __init__(self, kind: Kind, x: Tensor, save: bool) -> None:
        self.kind = kind
        self.keeps_mask = save and kind.options.after == "relu"
        self.mask = mask_numel(x) if self.keeps_mask else 0
        build = Builder(kind, planned(kind, x, masked=self.keeps_mask), x, x.dtype)
        self.factors, self.scale = build.factors(), build.scale()
        self.numel = (1 + kind.shift) * x.shape[:2].numel()

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, u, residual, alpha, beta, a, b = kind.arranged(inputs)
        y = kind.dense(like)
        mask = like.new_empty((self.mask,), dtype=torch.uint8)
        factors = kind.scratch(like, self.numel)
        with on_device(like):
            self.factors(u, alpha, beta, factors)
            self.scale(x, a, b, factors, residual, y, mask if self.keeps_mask else None)
        return kind.finish(y, like), mask


class HalfBackward:
    """Backward calls of one kind of half. What no gradient asked for needs is not launched."""

    def __init__(self, inputs: Inputs, kind: Kind, needs: int) -> None:
        """dy is None for the squeeze, dz for the scaling; ``needs`` is that of the scaling."""
        x, u, _, alpha, beta, a, b, _, dy, _ = inputs
        assert x is not None
        shape, options = kind.shape, kind.options
        self.kind = kind
        self.scales = dy is not None
        self.masked = self.scales and options.after == "relu"
        self.wanted = wanted((x, u, x if self.scales else None, alpha, beta, a, b), needs)
        dx, du, dresidual, dalpha, dbeta, *affine = self.wanted
        self.to_alpha = dalpha or dbeta
        again = self.scales and options.after_again
        # The mask alone tells which of dy reach the residual.
        self.reduces = self.scales and (again or any((dx, du, self.to_alpha, *affine)))
        self.only_factors = self.reduces and not (du or self.to_alpha)

        plan = planned(kind, x, masked=self.masked, sums_in_dx=any(affine))
        build = Builder(kind, plan, x, x.dtype)
        self.plane = shape.batch * shape.channels
        self.numel = (1 + kind.shift) * self.plane
        self.parts = plan.sums.splits * self.numel
        self.affine = AffineSums(plan, shape.batch, shape.channels, any(affine))
        self.factors = build.factors()
        self.reduce, self.finish = build.bwd_reduce()
        reads_x = options.before != "identity" or again or any(affine)
        self.dx = build.dx(reads_x=reads_x) if dx or dresidual or any(affine) else None
        self.sums = build.sums() if self.to_alpha or any(affine) else None

    def __call__(self, inputs: Inputs, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, u, residual, alpha, beta, a, b, lengths, dy, dz = kind.arranged(inputs)
        # The gradient of u is contiguous, whatever u is.
        originals = (like, u, like if self.scales else None, *inputs[3:7])
        written = empty_gradients(kind, like, originals, self.wanted)
        dx, du, dresidual, dalpha, dbeta, da, db = written
        bits = mask if self.masked else None
        factors = kind.scratch(like, self.numel) if self.reduces and self.dx else None
        ds = kind.scratch(like, self.plane) if self.to_alpha else None
        sums = self.affine.parts(kind, like)
        with on_device(like):
            if self.only_factors:
                self.factors(u, alpha, beta, factors)
            elif self.reduces:
                results = (u, alpha, beta, ds, du, factors)
                parts = None if self.finish is None else kind.scratch(like, self.parts)
                self.reduce(dy, x, residual, bits, a, b, *results, parts)
                if self.finish is not None:
                    self.finish(parts, *results)
            if self.dx is not None:
                self.dx(dy, x, residual, bits, a, b, lengths, factors, dz, dx, dresidual, *sums)
            if self.sums is not None:
                self.sums(ds, u, *(sums or (None, None)), dalpha, dbeta, da, db)
        return finished(kind, like, written, originals)


def squeeze(
    x: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
) -> Tensor:
    """``triton_squeeze``; see :mod:`senet_kernels.ops`."""
    inputs = (x, None, None, None, None, affine_scale, affine_shift, lengths)

    def first() -> tuple[Any, Any]:
        kind = examine(inputs, options, HALF_NAMES)
        call = Squeeze(kind, x, lengths is not None)
        return call, call(inputs)

    z: Tensor = run("squeeze", inputs, options, first=first)
    return z


def squeeze_backward(
    dz: Tensor,
    x: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """``triton_squeeze_backward``; see :mod:`senet_kernels.ops`."""
    inputs = (x, None, None, None, None, affine_scale, affine_shift, lengths, None, dz)
    dx, _, _, _, _, *affine = _half_backward(
        "squeeze_backward", inputs, options, needs & 1 | (needs & 6) << 4, None
    )
    return dx, *affine


def channel_scale(
    x: Tensor,
    u: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    options: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """``triton_channel_scale``; see :mod:`senet_kernels.ops`."""
    inputs = (x, u, residual, alpha, beta, affine_scale, affine_shift)

    def first() -> tuple[Any, Any]:
        kind = examine(inputs, options, HALF_NAMES)
        call = ChannelScale(kind, x, save)
        return call, call(inputs)

    result: tuple[Tensor, Tensor] = run("channel_scale", inputs, options, save, first=first)
    return result


def channel_scale_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    mask: Tensor,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """``triton_channel_scale_backward``; see :mod:`senet_kernels.ops`."""
    if after_code(options) in KEEPS_NO_RESIDUAL:
        residual = None
    inputs = (x, u, residual, alpha, beta, affine_scale, affine_shift, None, dy, None)
    return _half_backward("channel_scale_backward", inputs, options, needs, mask)


def _half_backward(
    op: str, inputs: Inputs, options: int, needs: int, mask: Tensor | None
) -> tuple[Tensor, ...]:
    x = inputs[0]
    assert x is not None

    def first() -> tuple[Any, Any]:
        kind = examine(inputs, options, HALF_NAMES)
        if mask is not None:
            check_mask(kind, x, mask)
        call = HalfBackward(inputs, kind, needs)
        return call, call(inputs, mask)

    gradients: tuple[Tensor, ...] = run(
        op, (*inputs, mask), options, needs, first=first, arguments=(inputs, mask)
    )
    return gradients
