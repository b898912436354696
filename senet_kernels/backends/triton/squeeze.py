"""The squeeze: z[b, c] = mean over positions of before(a x + b)."""

import triton
import triton.language as tl

from .access import (
    SIZES,
    across,
    inside,
    load_block,
    locate,
    mean_extent,
    over_positions,
    per_channel,
    position_step,
    tile_channels,
    tile_offsets,
    tile_positions,
    zero_tile,
)
from .pointwise import value


@triton.jit
def store_mean(total, z, where, lengths, image, positions, ok):
    """The mean out of a sum; NaN for that of nothing, as torch.mean."""
    end, n = mean_extent(lengths, image, positions)
    n = n.to(total.dtype)
    mean = tl.where(n > 0, total / tl.where(n > 0, n, 1.0), float("nan"))
    tl.store(z + where, mean.to(z.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    x, a, b, lengths,
    z,  # out: [B, C], or sums [splits, B, C] where T.SPLIT
    batch, channels, positions, inner_units, x_stride, per_image, blocks, tiles, rounds,
    F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A program has a tile of channels of one image, and ``rounds`` times STEPS tiles along the
    positions: as many accesses per thread are in flight as a round has steps."""
    inner = inner_units * T.UNIT
    if T.LAST:
        channels = inner
    else:
        positions = inner
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
    end, _ = mean_extent(lengths, image, positions)
    ac = across(per_channel(a, c, channels, 1.0, T.ACC), T)
    bc = across(per_channel(b, c, channels, 0.0, T.ACC), T)
    x += image * (x_stride.to(tl.int64) * T.UNIT)
    at = x + tile_offsets(c, tile_positions(first, T), inner, T)
    step = position_step(inner, T)
    total = zero_tile(T)
    for s0 in range(first, tl.minimum(first + rounds * ROUND, end), ROUND):
        loaded = ()
        for k in tl.static_range(STEPS):
            ok = inside(c, tile_positions(s0 + k * BS, T), channels, end, k < T.FULL, T)
            loaded = loaded + (load_block(at, k * step, ok),)
        these = zero_tile(T)
        for k in tl.static_range(STEPS):
            v = loaded[k].to(T.ACC)
            if a is not None:
                v = v * ac + bc
            v = value(F.before, v, F.approx)
            if a is not None and not (k < T.FULL and T.EVEN):  # elsewhere it is 0 outside
                ok = inside(c, tile_positions(s0 + k * BS, T), channels, end, k < T.FULL, T)
                v = tl.where(ok, v, 0.0)
            these += v
        total += these
        at += T.STEPS * step
    found = over_positions(total, T)
    if T.SPLIT:
        where = (split.to(tl.int64) * batch + image) * channels + c
        tl.store(z + where, found, mask=c < channels)
    else:
        store_mean(found, z, image * channels + c, lengths, image, positions, c < channels)


@triton.jit
def sum_of_splits(parts, where, stride, splits, ok, ACC: tl.constexpr):
    """What ``splits`` programs left at ``where``, ``stride`` apart, in their order."""
    total = tl.zeros_like(where).to(ACC)
    for k in range(splits):
        total += tl.load(parts + k * stride + where, mask=ok, other=0.0)
    return total


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    parts, lengths, z, batch, channels, positions, splits, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Where several programs share a mean: their parts in a fixed order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stride = batch.to(tl.int64) * channels
    ok = at < stride
    total = sum_of_splits(parts, at, stride, splits, ok, ACC)
    image = tl.where(ok, at // channels, 0)
    store_mean(total, z, at, lengths, image, positions, ok)
