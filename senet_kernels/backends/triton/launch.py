"""The ops' implementation: operands, scratch memory, launches. Imported on the first call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from senet_kernels.ops import Needs, mask_numel, saved_numel
from senet_kernels.pointwise import POINTWISE

from .backward_kernels import dots_kernel, dx_kernel, parameters_kernel
from .forward_kernels import scale_kernel, squeeze_kernel
from .operands import Images, Operands, make_operands, units, wide
from .plan import Plan, ceil_div
from .resident_kernel import resident_kernel

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Of the kernel that sums over the batch: images at a time, a tile of a weight, a vector's columns.
_BATCH_BLOCK, _TILE_ROWS, _TILE_COLUMNS, _VECTOR = 8, 32, 32, 128


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current stream of the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _extents(o: Operands, plan: Plan, **images: Images) -> dict[str, Any]:
    """Extents and strides as the kernels take them, in units, and what follows from them."""
    arguments: dict[str, Any] = {"batch": o.shape.batch, "hidden": o.shape.hidden}
    named = {"channels": ("C", o.shape.channels), "positions": ("S", o.shape.positions)}
    short = {"x": "X", "dy": "DY", "residual": "RES"}
    named |= {f"{name}_stride": (short[name], t.stride) for name, t in images.items()}
    for name, (letter, extent) in named.items():
        arguments[f"{name}_units"], arguments[f"UNIT_{letter}"] = units(extent)
    return arguments | {
        "LAST": o.shape.last, "ACC": _ACCUMULATE[o.accumulate],
        "INDEX": tl.int64 if wide(o, plan, *images.values()) else tl.int32,
        "G": plan.G, "BC": plan.BC, "BS": plan.BS, "BR": plan.BR, "num_warps": plan.warps,
    }  # fmt: skip


def _counts(plan: Plan) -> dict[str, int]:
    return {"tiles": plan.tiles, "splits": plan.splits, "steps": plan.steps}


def _functions(o: Operands, *names: str) -> dict[str, int]:
    return {name.upper(): POINTWISE[getattr(o.options, name)].code for name in names}


def forward(
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
    options: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``triton_forward``; see :mod:`senet_kernels.ops`."""
    o = make_operands(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options)
    shape, plan = o.shape, o.plan
    added = o.images("residual", residual)
    two_layers = w1 is not None
    y = o.dense()
    saved = o.scratch(saved_numel(x, w1, w2) if save else 0)
    keep_mask = save and o.options.after == "relu"
    mask = x.new_empty((mask_numel(x) if keep_mask else 0,), dtype=torch.uint8)

    if o.resident is not None:
        with _on(x):
            if o.resident.programs:
                resident_kernel[(o.resident.programs,)](
                    o.x.tensor, added.tensor, o.affine_scale, o.affine_shift, o.lengths,
                    o.w1, o.b1, o.w2, o.b2, o.alpha, o.beta,
                    y, saved if save else None, mask if keep_mask else None,
                    **_extents(o, o.resident, x=o.x, residual=added),
                    **_functions(o, "activation", "gate", "before", "after"),
                    SHIFT=shape.outputs > shape.channels,
                )  # fmt: skip
        return o.finish(y), saved, mask

    # The mean of a program that has all positions is final: straight into what is saved.
    z_final = plan.splits == 1 and save
    if z_final:
        z = saved
    elif save or not two_layers:
        z = o.scratch(shape.batch, plan.splits, shape.channels)
    else:
        z = None
    parts = plan.tiles * plan.splits if two_layers else plan.splits
    exchanged = o.scratch(shape.batch, parts, shape.hidden) if two_layers else z

    if plan.programs:
        with _on(x):
            squeeze_kernel[(plan.programs,)](
                o.x.tensor, o.affine_scale, o.affine_shift, o.lengths, o.w1,
                z, exchanged if two_layers else None,
                **_extents(o, plan, x=o.x), **_counts(plan), **_functions(o, "before"),
            )  # fmt: skip
            scale_kernel[(plan.programs,)](
                o.x.tensor, added.tensor, o.affine_scale, o.affine_shift, o.b1, o.w2, o.b2,
                o.alpha, o.beta, exchanged, None if z_final else z,
                y, saved if save else None, mask if keep_mask else None,
                **_extents(o, plan, x=o.x, residual=added) | {"hidden": shape.inner},
                **_counts(plan), parts=parts,
                **_functions(o, "activation", "gate", "before", "after"),
                TWO_LAYERS=two_layers, SHIFT=shape.outputs > shape.channels,
                BK=plan.BK,
            )  # fmt: skip
    return o.finish(y), saved, mask


def backward(
    dy: Tensor,
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
    saved: Tensor,
    mask: Tensor,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """``triton_backward``; see :mod:`senet_kernels.ops`."""
    o = make_operands(x, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift, lengths, options)
    shape, plan, after = o.shape, o.plan, o.options.after
    if saved.numel() != saved_numel(x, w1, w2) or saved.dtype != o.accumulate:
        raise RuntimeError("saved: expected what the forward op returned for these arguments")
    if after == "relu" and mask.numel() != mask_numel(x):
        raise RuntimeError("mask: expected what the forward op returned for these arguments")
    gradient = o.images("dy", dy)
    added = o.images("residual", residual if after not in ("identity", "relu") else None)
    two_layers, shift = w1 is not None, shape.outputs > shape.channels

    # In the order of Needs; parameters' are written dense, see _finish.
    like = (x, w1, b1, w2, b2, x, alpha, beta, affine_scale, affine_shift)
    written: list[Tensor | None] = [
        None if t is None or not needs & (1 << i)
        else o.dense() if t is x
        else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for i, t in enumerate(like)
    ]  # fmt: skip
    dx, dw1, db1, dw2, db2, dresidual, *rest = written
    inner = shape.hidden if two_layers else shape.outputs
    parts = plan.tiles * plan.splits if two_layers else plan.splits
    dots = o.scratch(shape.batch, plan.splits, shape.outputs)
    exchanged = o.scratch(shape.batch, parts, inner)
    ds = o.scratch(shape.batch, shape.channels)
    du = o.scratch(shape.batch, shape.outputs)
    dh = o.scratch(shape.batch, shape.hidden) if two_layers else None
    da, db = (
        o.scratch(shape.batch, plan.splits, shape.channels)
        if needs & (Needs.AFFINE_SCALE | Needs.AFFINE_SHIFT)
        else None
        for _ in range(2)
    )
    reads_x = (
        affine_scale is not None
        or o.options.before != "identity"
        or after not in ("identity", "relu")
    )
    common = {
        **_extents(o, plan, x=o.x, dy=gradient, residual=added), **_counts(plan),
        **_functions(o, "gate", "before", "after"),
        "TWO_LAYERS": two_layers, "SHIFT": shift,
    }  # fmt: skip
    bits = mask if after == "relu" else None
    with _on(x):
        if plan.programs:
            dots_kernel[(plan.programs,)](
                gradient.tensor, o.x.tensor, added.tensor, bits, o.affine_scale, o.affine_shift,
                o.w2, o.alpha, o.beta, saved, dots, exchanged, **common,
            )  # fmt: skip
            dx_kernel[(plan.programs,)](
                gradient.tensor, o.x.tensor, added.tensor, bits, o.affine_scale, o.affine_shift,
                o.lengths, o.w1 if two_layers else o.w2, o.alpha, o.beta, saved, dots, exchanged,
                dx, dresidual, ds, du, dh, da, db,
                **common, **_functions(o, "activation"),
                inner=inner, parts=parts, READS_X=reads_x, BK=plan.BK,
            )  # fmt: skip
        if any(t is not None for t in (dw1, db1, dw2, db2, *rest)):
            w2_tiles = _weight_tiles(dw2, shape.outputs, shape.inner)
            w1_tiles = _weight_tiles(dw1, shape.hidden, shape.channels)
            vectors = ceil_div(max(shape.outputs, shape.hidden), _VECTOR)
            parameters_kernel[(w2_tiles + w1_tiles + vectors,)](
                ds, du, dh, saved, da, db, dw1, db1, dw2, db2, *rest,
                shape.batch, shape.channels, shape.hidden, shape.outputs, plan.splits,
                w2_tiles, w1_tiles, **_functions(o, "activation", "gate"),
                TWO_LAYERS=two_layers, ACC=common["ACC"],
                BB=_BATCH_BLOCK, BO=_TILE_ROWS, BI=_TILE_COLUMNS, BV=_VECTOR, num_warps=4,
            )  # fmt: skip
    return tuple(_finish(o, t, like_, x) for t, like_ in zip(written, like, strict=True))


def _weight_tiles(dw: Tensor | None, rows: int, columns: int) -> int:
    if dw is None:
        return 0
    return ceil_div(rows, _TILE_ROWS) * ceil_div(columns, _TILE_COLUMNS)


def _finish(o: Operands, written: Tensor | None, like: Tensor | None, x: Tensor) -> Tensor:
    """A gradient in the strides of what it belongs to; empty where none was asked for."""
    if written is None or like is None:
        return x.new_empty((0,))
    if like is x:
        return o.finish(written)
    if like.is_contiguous() and like.stride() == written.stride():
        return written
    return torch.empty_like(like).copy_(written)
