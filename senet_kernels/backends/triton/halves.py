"""The ops for the halves of the operation: the squeeze alone, the scaling alone.

The same kernels as for the whole, without the MLP; prepared, and cut, in the same way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from senet_kernels.ops import after_code, mask_numel

from .backward_kernels import half_backward_kernel
from .forward_kernels import add_parts_kernel, scale_kernel, squeeze_kernel
from .launch import (
    BATCH_BLOCK,
    KEEPS_NO_RESIDUAL,
    VECTOR,
    check_mask,
    empty_gradients,
    finished,
    first_call,
    launch_over_images,
    launch_values,
    on_device,
    reads_x_twice,
    run,
    wanted,
)
from .launcher import Launch
from .operands import HALF_NAMES, Inputs, Kind, examine
from .parameter_kernels import half_parameters_kernel
from .plan import Choice, ceil_div

# Parts at a time in the launches that add them up, of BATCH_BLOCK times VECTOR elements each.
_PARTS = 4


def _tiles(kind: Kind) -> int:
    """Programs that share the ``[B, C]`` vectors."""
    return ceil_div(kind.shape.batch, BATCH_BLOCK) * ceil_div(kind.shape.channels, VECTOR)


class Squeeze:
    """Squeezes of one kind."""

    def __init__(self, kind: Kind, choice: Choice) -> None:
        shape, plan = kind.shape, choice.plan
        self.kind = kind
        values = launch_values(kind, plan)
        self.squeeze = launch_over_images(squeeze_kernel, plan, values)
        self.parts = (shape.batch, plan.splits, shape.channels)
        values |= {"channels": shape.channels, "BP": min(values["BP"], _PARTS)}
        self.add = None
        if plan.splits > 1:
            self.add = Launch(add_parts_kernel, _tiles(kind), values, warps=4)

    def __call__(self, inputs: Inputs) -> Tensor:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, _, _, _, _, a, b, lengths = kind.arranged(inputs)
        z = like.new_empty(like.shape[:2])
        parts = z if self.add is None else kind.scratch(like, *self.parts)
        with on_device(like):
            self.squeeze(x, a, b, lengths, None, parts, None)
            if self.add is not None:
                self.add(parts, z)
        return z


class ChannelScale:
    """Scalings of one kind."""

    def __init__(self, kind: Kind, x: Tensor, save: bool, choice: Choice) -> None:
        self.kind = kind
        self.keeps_mask = save and kind.options.after == "relu"
        self.mask = mask_numel(x) if self.keeps_mask else 0
        self.scale = launch_over_images(scale_kernel, choice.plan, launch_values(kind, choice.plan))

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, u, residual, alpha, beta, a, b = kind.arranged(inputs)
        y = kind.dense(like)
        mask = like.new_empty((self.mask,), dtype=torch.uint8)
        bits = mask if self.keeps_mask else None
        with on_device(like):
            self.scale(
                x, residual, a, b, None, None, None, alpha, beta, None, None, u, y, None, bits
            )
        return kind.finish(y, like), mask


class HalfBackward:
    """Backward calls of one kind of half."""

    def __init__(self, inputs: Inputs, kind: Kind, needs: int, choice: Choice) -> None:
        """dy is None for the squeeze, dz for the scaling; ``needs`` is that of the scaling."""
        x, u, _, alpha, beta, a, b, _, dy, _ = inputs
        shape, plan = kind.shape, choice.plan
        self.kind = kind
        self.scales = dy is not None
        self.masked = self.scales and kind.options.after == "relu"
        self.wanted = wanted((x, u, x if self.scales else None, alpha, beta, a, b), needs)
        _, du, _, *sums = self.wanted
        of_dots, of_affine = du or any(sums[:2]), any(sums[2:])
        columns = shape.channels * (2 if kind.shift else 1)
        self.dots = (shape.batch, plan.splits, columns) if of_dots else None
        self.affine = (shape.batch, plan.splits, shape.channels) if of_affine else None

        values = launch_values(kind, plan)
        values["READS_X"] = reads_x_twice(kind.options, a) or of_dots
        self.to_dx = launch_over_images(half_backward_kernel, plan, values)
        self.parameters = None
        if of_dots or of_affine:
            du_tiles = _tiles(kind) if du else 0
            programs = du_tiles + (ceil_div(shape.channels, VECTOR) if any(sums) else 0)
            values |= {
                "channels": shape.channels, "outputs": columns, "du_tiles": du_tiles,
                "BP": min(values["BP"], _PARTS),
            }  # fmt: skip
            self.parameters = Launch(half_parameters_kernel, programs, values, warps=4)

    def __call__(self, inputs: Inputs, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, u, residual, alpha, beta, a, b, lengths, dy, dz = kind.arranged(inputs)
        # The gradient of u is contiguous, whatever u is.
        originals = (like, u, like if self.scales else None, *inputs[3:7])
        written = empty_gradients(kind, like, originals, self.wanted)
        dx, du, dresidual, *rest = written
        dots = None if self.dots is None else kind.scratch(like, *self.dots)
        da = db = None
        if self.affine is not None:
            da, db = kind.scratch(like, *self.affine), kind.scratch(like, *self.affine)
        with on_device(like):
            self.to_dx(
                dy, dz, x, u, residual, mask if self.masked else None, a, b, lengths, alpha, beta,
                dx, dresidual, dots, da, db,
            )  # fmt: skip
            if self.parameters is not None:
                self.parameters(dots, u, beta, da, db, du, *rest)
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
        return first_call("squeeze", kind, x, partial(Squeeze, kind), inputs)

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
        return first_call("channel_scale", kind, x, partial(ChannelScale, kind, x, save), inputs)

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
        return first_call(op, kind, x, partial(HalfBackward, inputs, kind, needs), inputs, mask)

    gradients: tuple[Tensor, ...] = run(
        op, (*inputs, mask), options, needs, first=first, arguments=(inputs, mask)
    )
    return gradients
