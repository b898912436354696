"""The last of the backward pass: dx = (m scale + dz / n) before'(q) a, with m = dy after'(pre), and
the residual's gradient m. By flat vectors, or by tiles, which sums for ``before_affine`` need."""

import triton
import triton.language as tl

from .access import (
    SIZES,
    across,
    along,
    flat_factor,
    flat_inside,
    flat_positions,
    flat_rows,
    flat_vectors,
    inside,
    load_block,
    load_tile_mask,
    locate,
    over_positions,
    per_channel,
    position_step,
    tile_channels,
    tile_offsets,
    tile_positions,
    zero_tile,
    zero_vectors,
)
from .bwd_reduce import through_after
from .pointwise import chain
from .scale import before_after


@triton.jit
def mean_gradient(lengths, image, positions, ACC: tl.constexpr):
    """Up to which position elements reach the mean, and what they do so with: 1 / n."""
    end = positions
    n = positions
    if lengths is not None:
        length = tl.load(lengths + image)
        n = tl.where((length >= 0) & (length <= positions), length, 0)
        end = tl.minimum(length, positions)
    n = n.to(ACC)
    one = n * 0 + 1.0
    return end, tl.where(n > 0, one / tl.where(n > 0, n, 1.0), float("nan"))


@triton.jit
def gradient(m, q, scale, dmean, counts, F: tl.constexpr):
    """dq. ``scale`` is None where x reaches y by the mean alone, ``dmean`` where not by it;
    ``counts`` tells which positions are in the mean, None for all."""
    if dmean is not None:
        if counts is not None:
            dmean = tl.where(counts, dmean, 0.0)
        if scale is not None:
            d = m * scale + dmean
        else:
            d = dmean + m * 0
    else:
        d = m * scale
    return chain(F.before, q, d, F.approx)


@triton.jit(do_not_specialize=SIZES)
def dx_flat_kernel(
    dy, x, residual, mask, a, b, lengths, factors, dz,
    dx, dresidual,
    batch, channels, positions, extent, dy_stride, x_stride, residual_stride, y_stride,
    mask_stride, per_image, blocks, per_row, vectors,
    SHIFT: tl.constexpr, READS_X: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """``dy`` is None for the squeeze alone, ``dz`` for the scaling alone. dx and dresidual have
    ``y_stride``."""
    image, block = locate(per_image, blocks)
    AGAIN: tl.constexpr = dy is not None and F.after != "identity" and F.after != "relu"
    out = image * (y_stride.to(tl.int64) * T.UNIT)
    scales = factors
    if factors is not None:
        scales = factors + image * channels
    end, share = mean_gradient(lengths, image, positions, T.ACC)
    STEPS: tl.constexpr = T.STEPS
    loaded = ()
    for k in tl.static_range(STEPS):
        v, e = flat_vectors(block * STEPS + k, T)
        ok = flat_inside(v, vectors, T)
        g = zero_vectors(T)
        if dy is not None:
            g = load_block(dy + image * (dy_stride.to(tl.int64) * T.UNIT), e, ok)
        raw = g
        r = g
        if READS_X:
            raw = load_block(x + image * (x_stride.to(tl.int64) * T.UNIT), e, ok)
        if AGAIN and residual is not None:
            r = load_block(residual + image * (residual_stride.to(tl.int64) * T.UNIT), e, ok)
        loaded = loaded + ((g, raw, r),)
    for k in tl.static_range(STEPS):
        v, e = flat_vectors(block * STEPS + k, T)
        ok = flat_inside(v, vectors, T)
        row, s = flat_rows(v, per_row, extent, T)
        g, raw, r = loaded[k]
        ac = None
        bc = None
        scale = None
        shift = None
        dmean = None
        counts = None
        pre = None
        kept = None
        if a is not None:
            ac = flat_factor(a, row, s, extent, channels, T)
            bc = flat_factor(b, row, s, extent, channels, T)
        if factors is not None:
            scale = flat_factor(scales, row, s, extent, channels, T)
            if SHIFT and AGAIN:
                shifts = scales + batch.to(tl.int64) * channels
                shift = flat_factor(shifts, row, s, extent, channels, T)
        if dz is not None:
            dmean = flat_factor(dz + image * channels, row, s, extent, channels, T, share)
            if lengths is not None:
                counts = flat_positions(s, extent, T) < end
        q = zero_vectors(T)
        m = q
        if READS_X:
            q = raw.to(T.ACC)
            if AGAIN:
                added = None
                if residual is not None:
                    added = r.to(T.ACC)
                pre = before_after(q, ac, bc, scale, shift, added, F)
            if a is not None:
                q = q * ac + bc
        if dy is not None:
            if F.after == "relu":  # VEC is 8, and rows are whole bytes
                byte = tl.load(mask + image * mask_stride + v, mask=v < vectors, other=0)
                bits = byte.to(tl.int32)[:, None] >> tl.arange(0, T.VEC)[None, :]
                kept = (bits & 1) != 0
            m = through_after(g.to(T.ACC), pre, kept, F)
        if dresidual is not None:
            tl.store(dresidual + out + e, m.to(dresidual.dtype.element_ty), mask=ok)
        if dx is not None:
            d = gradient(m, q, scale, dmean, counts, F)
            if a is not None:
                d *= ac
            tl.store(dx + out + e, d.to(dx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def dx_tile_kernel(
    dy, x, residual, mask, a, b, lengths, factors, dz,
    dx, dresidual, da_parts, db_parts,  # the latter [B, splits, C], of the affine's gradients
    batch, channels, positions, inner_units, dy_stride, x_stride, residual_stride, y_stride,
    mask_stride, per_image, blocks, tiles, splits, rounds,
    SHIFT: tl.constexpr, READS_X: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The same."""
    inner = inner_units * T.UNIT
    if T.LAST:
        channels = inner
    else:
        positions = inner
    AGAIN: tl.constexpr = dy is not None and F.after != "identity" and F.after != "relu"
    image, block = locate(per_image, blocks)
    split = block // tiles
    BC: tl.constexpr = T.BI if T.LAST else T.BO
    BS: tl.constexpr = T.BO if T.LAST else T.BI
    c0 = (block - split * tiles) * BC
    first = split * rounds * BS
    c = tile_channels(c0, T)
    out = image * (y_stride.to(tl.int64) * T.UNIT)
    ac = None
    bc = None
    scale = None
    shift = None
    dmean = None
    if a is not None:
        ac = across(per_channel(a, c, channels, 1.0, T.ACC), T)
        bc = across(per_channel(b, c, channels, 0.0, T.ACC), T)
    if factors is not None:
        scales = factors + image * channels
        scale = across(per_channel(scales, c, channels, 0.0, T.ACC), T)
        if SHIFT and AGAIN:
            shifts = scales + batch.to(tl.int64) * channels
            shift = across(per_channel(shifts, c, channels, 0.0, T.ACC), T)
    end, share = mean_gradient(lengths, image, positions, T.ACC)
    if dz is not None:
        dmean = across(per_channel(dz + image * channels, c, channels, 0.0, T.ACC), T) * share
    if mask is not None:
        mask += image * mask_stride
    offsets = tile_offsets(c, tile_positions(first, T), inner, T)
    sum_a = zero_tile(T)
    sum_b = zero_tile(T)
    for s0 in range(first, tl.minimum(first + rounds * BS, positions), BS):
        s = tile_positions(s0, T)
        ok = inside(c, s, channels, positions, False, T)
        pre = None
        kept = None
        counts = None
        raw = zero_tile(T)
        m = raw
        q = raw
        if READS_X:
            x_offsets = image * (x_stride.to(tl.int64) * T.UNIT) + offsets
            raw = load_block(x, x_offsets, ok).to(T.ACC)
            q = raw
            if AGAIN:
                r = None
                if residual is not None:
                    there = residual + image * (residual_stride.to(tl.int64) * T.UNIT)
                    r = load_block(there, offsets, ok).to(T.ACC)
                pre = before_after(raw, ac, bc, scale, shift, r, F)
            if a is not None:
                q = raw * ac + bc
        if dy is not None:
            g = load_block(dy + image * (dy_stride.to(tl.int64) * T.UNIT), offsets, ok)
            if F.after == "relu":
                kept = load_tile_mask(mask, c, s, c0, s0, channels, positions, T)
            m = through_after(g.to(T.ACC), pre, kept, F)
        if dresidual is not None:
            tl.store(dresidual + out + offsets, m.to(dresidual.dtype.element_ty), mask=ok)
        if dx is not None or da_parts is not None:
            if lengths is not None:
                counts = along(s < end, T)
            d = gradient(m, q, scale, dmean, counts, F)
            if dx is not None:
                of_x = d
                if a is not None:
                    of_x = d * ac
                tl.store(dx + out + offsets, of_x.to(dx.dtype.element_ty), mask=ok)
            if da_parts is not None:
                d = tl.where(ok, d, 0.0)
                sum_a += d * raw
                sum_b += d
        offsets += position_step(inner, T)
    if da_parts is not None:
        at = (image * splits + split) * channels + c
        tl.store(da_parts + at, over_positions(sum_a, T), mask=c < channels)
        tl.store(db_parts + at, over_positions(sum_b, T), mask=c < channels)
