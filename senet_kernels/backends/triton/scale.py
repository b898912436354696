"""The scaling: y = after(before(a x + b) scale + shift + residual), by flat vectors or by tiles."""

import triton
import triton.language as tl

from .access import (
    SIZES,
    across,
    flat_factor,
    flat_inside,
    flat_rows,
    flat_vectors,
    inside,
    load_block,
    locate,
    per_channel,
    position_step,
    store_tile_mask,
    tile_channels,
    tile_offsets,
    tile_positions,
)
from .pointwise import value


@triton.jit
def before_after(x, a, b, scale, shift, residual, F: tl.constexpr):
    """What goes into ``after``; None stands for what is not there."""
    p = x
    if a is not None:
        p = p * a + b
    pre = value(F.before, p, F.approx) * scale
    if shift is not None:
        pre += shift
    if residual is not None:
        pre += residual
    return pre


@triton.jit(do_not_specialize=SIZES)
def scale_flat_kernel(
    x, a, b, factors, residual, y, mask,
    batch, channels, extent, x_stride, residual_stride, y_stride, mask_stride,
    per_image, blocks, per_row, vectors,
    SHIFT: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    image, block = locate(per_image, blocks)
    x += image * (x_stride.to(tl.int64) * T.UNIT)
    y += image * (y_stride.to(tl.int64) * T.UNIT)
    scales = factors + image * channels
    STEPS: tl.constexpr = T.STEPS
    loaded = ()
    for k in tl.static_range(STEPS):
        v, e = flat_vectors(block * STEPS + k, T)
        ok = flat_inside(v, vectors, T)
        got = load_block(x, e, ok)
        more = got
        if residual is not None:
            there = residual + image * (residual_stride.to(tl.int64) * T.UNIT)
            more = load_block(there, e, ok)
        loaded = loaded + (got, more)
    for k in tl.static_range(STEPS):
        v, e = flat_vectors(block * STEPS + k, T)
        ok = flat_inside(v, vectors, T)
        row, s = flat_rows(v, per_row, extent, T)
        ac = None
        bc = None
        shift = None
        added = None
        if a is not None:
            ac = flat_factor(a, row, s, extent, channels, T)
            bc = flat_factor(b, row, s, extent, channels, T)
        scale = flat_factor(scales, row, s, extent, channels, T)
        if SHIFT:
            shifts = scales + batch.to(tl.int64) * channels
            shift = flat_factor(shifts, row, s, extent, channels, T)
        if residual is not None:
            added = loaded[2 * k + 1].to(T.ACC)
        pre = before_after(loaded[2 * k].to(T.ACC), ac, bc, scale, shift, added, F)
        if mask is not None:  # VEC is 8, and rows are whole bytes
            keep = ((pre <= 0) == 0).to(tl.int32) << tl.arange(0, T.VEC)[None, :]
            byte = tl.sum(keep, axis=1).to(tl.uint8)
            tl.store(mask + image * mask_stride + v, byte, mask=v < vectors)
        out = value(F.after, pre, F.approx).to(y.dtype.element_ty)
        tl.store(y + e, out, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def scale_tile_kernel(
    x, a, b, factors, residual, y, mask,
    batch, channels, positions, inner_units, x_stride, residual_stride, y_stride, mask_stride,
    per_image, blocks, tiles, rounds,
    SHIFT: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    inner = inner_units * T.UNIT
    if T.LAST:
        channels = inner
    else:
        positions = inner
    image, block = locate(per_image, blocks)
    split = block // tiles
    BC: tl.constexpr = T.BI if T.LAST else T.BO
    BS: tl.constexpr = T.BO if T.LAST else T.BI
    c0 = (block - split * tiles) * BC
    first = split * rounds * BS
    c = tile_channels(c0, T)
    ac = None
    bc = None
    shift = None
    if a is not None:
        ac = across(per_channel(a, c, channels, 1.0, T.ACC), T)
        bc = across(per_channel(b, c, channels, 0.0, T.ACC), T)
    scales = factors + image * channels
    scale = across(per_channel(scales, c, channels, 0.0, T.ACC), T)
    if SHIFT:
        shifts = scales + batch.to(tl.int64) * channels
        shift = across(per_channel(shifts, c, channels, 0.0, T.ACC), T)
    x += image * (x_stride.to(tl.int64) * T.UNIT)
    y += image * (y_stride.to(tl.int64) * T.UNIT)
    if mask is not None:
        mask += image * mask_stride
    offsets = tile_offsets(c, tile_positions(first, T), inner, T)
    for s0 in range(first, tl.minimum(first + rounds * BS, positions), BS):
        s = tile_positions(s0, T)
        ok = inside(c, s, channels, positions, False, T)
        added = None
        if residual is not None:
            there = residual + image * (residual_stride.to(tl.int64) * T.UNIT)
            added = load_block(there, offsets, ok).to(T.ACC)
        pre = before_after(load_block(x, offsets, ok).to(T.ACC), ac, bc, scale, shift, added, F)
        if mask is not None:
            keep = (pre <= 0) == 0
            store_tile_mask(keep, mask, c, s, c0, s0, channels, positions, T)
        tl.store(y + offsets, value(F.after, pre, F.approx).to(y.dtype.element_ty), mask=ok)
        offsets += position_step(inner, T)
