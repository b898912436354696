"""The first of the backward pass: sums over positions, and what follows of one channel.

With m = dy after'(pre): ds = sum of m p, dshift = sum of m, du = [beta ds gate'(u), dshift].
"""

import triton
import triton.language as tl

from .access import (
    SIZES,
    across,
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
)
from .excite import scale_of
from .pointwise import chain, value
from .scale import before_after
from .squeeze import sum_of_splits


@triton.jit
def through_after(dy, pre, kept, F: tl.constexpr):
    """m = dy after'(pre). For relu the mask stands for ``pre``, which identity does without."""
    if F.after == "identity":
        return dy
    elif F.after == "relu":
        return tl.where(kept, dy, 0.0)
    else:
        return chain(F.after, pre, dy, F.approx)


@triton.jit
def load_u(u, image, c, channels, ok, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """Pre-gate and shift (where SHIFT) of channels of an image, out of ``[B, C or 2C]``."""
    at = image * (2 * channels if SHIFT else channels) + c
    gate_in = tl.load(u + at, mask=ok, other=0.0).to(ACC)
    shift = gate_in
    if SHIFT:
        shift = tl.load(u + at + channels, mask=ok, other=0.0).to(ACC)
    return gate_in, shift


@triton.jit
def finish_sums(
    total, total_m, u, alpha, beta, ds, du, factors, image, c, batch, channels, ok,
    SHIFT: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """From the sums: ds, du (of [B, outputs]) and the factors that dx needs, each if wanted."""
    gate_in, shift = load_u(u, image, c, channels, ok, SHIFT, total.dtype)
    at = image * channels + c
    if ds is not None:
        tl.store(ds + at, total, mask=ok)
    if beta is not None:
        beta = tl.load(beta + c, mask=ok, other=0.0).to(total.dtype)
    if du is not None:
        of_u = image * (2 * channels if SHIFT else channels) + c
        d = chain(F.gate, gate_in, total)
        if beta is not None:
            d *= beta
        tl.store(du + of_u, d.to(du.dtype.element_ty), mask=ok)
        if SHIFT:
            tl.store(du + of_u + channels, total_m.to(du.dtype.element_ty), mask=ok)
    if factors is not None:
        if alpha is not None:
            alpha = tl.load(alpha + c, mask=ok, other=0.0).to(total.dtype)
        tl.store(factors + at, scale_of(gate_in, alpha, beta, F.gate), mask=ok)
        if SHIFT:
            tl.store(factors + batch.to(tl.int64) * channels + at, shift, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def bwd_reduce_kernel(
    dy, x, residual, mask, a, b, u, alpha, beta,
    ds, du, factors,  # out: [B, C], [B, outputs], [outputs / C, B, C], or None
    parts,  # out: the sums [splits, 1 or 2, B, C] where T.SPLIT, in place of those above; else None
    batch, channels, positions, inner_units, dy_stride, x_stride, residual_stride, mask_stride,
    per_image, blocks, tiles, rounds,
    SHIFT: tl.constexpr, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Programs are those of the squeeze."""
    inner = inner_units * T.UNIT
    if T.LAST:
        channels = inner
    else:
        positions = inner
    AGAIN: tl.constexpr = F.after != "identity" and F.after != "relu"
    image, block = locate(per_image, blocks)
    split = 0
    if T.SPLIT:
        split = block // tiles
        block -= split * tiles
    BC: tl.constexpr = T.BI if T.LAST else T.BO
    BS: tl.constexpr = T.BO if T.LAST else T.BI
    STEPS: tl.constexpr = T.STEPS
    ROUND: tl.constexpr = STEPS * BS
    first = split * rounds * ROUND
    c = tile_channels(block * BC, T)
    ok_c = c < channels
    ac = None
    bc = None
    scale = 0.0
    shift = None
    if a is not None:
        ac = across(per_channel(a, c, channels, 1.0, T.ACC), T)
        bc = across(per_channel(b, c, channels, 0.0, T.ACC), T)
    if AGAIN:
        gate_in, of_u = load_u(u, image, c, channels, ok_c, SHIFT, T.ACC)
        beta_c = None if beta is None else per_channel(beta, c, channels, 1.0, T.ACC)
        alpha_c = None if alpha is None else per_channel(alpha, c, channels, 0.0, T.ACC)
        scale = across(scale_of(gate_in, alpha_c, beta_c, F.gate), T)
        if SHIFT:
            shift = across(of_u, T)
    offsets = tile_offsets(c, tile_positions(first, T), inner, T)
    at_x = x + image * (x_stride.to(tl.int64) * T.UNIT) + offsets
    at_dy = dy + image * (dy_stride.to(tl.int64) * T.UNIT) + offsets
    at_residual = at_x
    if residual is not None:
        at_residual = residual + image * (residual_stride.to(tl.int64) * T.UNIT) + offsets
    if mask is not None:
        mask += image * mask_stride
    step = position_step(inner, T)
    total = zero_tile(T)
    total_m = zero_tile(T)
    for s0 in range(first, tl.minimum(first + rounds * ROUND, positions), ROUND):
        loaded = ()
        for k in tl.static_range(STEPS):
            ok = inside(c, tile_positions(s0 + k * BS, T), channels, positions, k < T.FULL, T)
            loaded = loaded + (load_block(at_dy, k * step, ok), load_block(at_x, k * step, ok))
        these = zero_tile(T)
        these_m = zero_tile(T)
        for k in tl.static_range(STEPS):
            s = tile_positions(s0 + k * BS, T)
            kept = None
            pre = None
            if F.after == "relu":
                kept = load_tile_mask(mask, c, s, block * BC, s0 + k * BS, channels, positions, T)
            v = loaded[2 * k + 1].to(T.ACC)
            p = v
            if a is not None:
                p = v * ac + bc
            p = value(F.before, p, F.approx)
            if AGAIN:
                added = None
                if residual is not None:
                    ok = inside(c, s, channels, positions, k < T.FULL, T)
                    added = load_block(at_residual, k * step, ok).to(T.ACC)
                pre = before_after(v, ac, bc, scale, shift, added, F)
            m = through_after(loaded[2 * k].to(T.ACC), pre, kept, F)
            # Outside m is 0, and p whatever follows of x = 0: a NaN too, where a or b is one.
            if (a is not None or AGAIN) and not (k < T.FULL and T.EVEN):
                ok = inside(c, s, channels, positions, k < T.FULL, T)
                p = tl.where(ok, p, 0.0)
                m = tl.where(ok, m, 0.0)
            these += m * p
            if SHIFT:
                these_m += m
        total += these
        total_m += these_m
        at_x += T.STEPS * step
        at_dy += T.STEPS * step
        if residual is not None:
            at_residual += T.STEPS * step
    found = over_positions(total, T)
    found_m = over_positions(total_m, T)
    if T.SPLIT:
        plane = batch.to(tl.int64) * channels
        at = parts + split * (2 * plane if SHIFT else plane) + image * channels + c
        tl.store(at, found, mask=ok_c)
        if SHIFT:
            tl.store(at + plane, found_m, mask=ok_c)
    else:
        finish_sums(
            found, found_m, u, alpha, beta, ds, du, factors, image, c, batch, channels, ok_c,
            SHIFT, F,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def finish_sums_kernel(
    parts, u, alpha, beta, ds, du, factors, batch, channels, splits,
    SHIFT: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Where several programs share the sums: their parts in a fixed order, and what follows."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane = batch.to(tl.int64) * channels
    ok = at < plane
    stride = 2 * plane if SHIFT else plane
    total = sum_of_splits(parts, at, stride, splits, ok, ACC)
    total_m = total
    if SHIFT:
        total_m = sum_of_splits(parts, at + plane, stride, splits, ok, ACC)
    image = tl.where(ok, at // channels, 0)
    c = tl.where(ok, at % channels, 0)
    finish_sums(
        total, total_m, u, alpha, beta, ds, du, factors, image, c, batch, channels, ok, SHIFT, F
    )
