"""Forward in two launches: squeeze with partial hidden sums, then the rest of the MLP and scale.

The mean is local to a channel and the hidden layer is linear before its activation. So a program
that has some channels and some positions contributes to the hidden sums ``W1[:, its channels]``
times its part of the mean; the programs of the second launch add the parts up in a fixed order,
which is all that is exchanged. Each weight is read once per program and launch.
"""

import triton
import triton.language as tl

from .pointwise import value
from .tiles import (
    locate,
    make_scale,
    mean_divisor,
    outgoing,
    per_channel,
    per_row,
    pointers,
    prologue,
    rows_of,
    saved_at,
    store_mask,
    sum_parts,
)

# Extents in units: how many there are says nothing that would be worth a build of its own.
SIZES = (
    "batch", "channels_units", "positions_units", "x_stride_units", "residual_stride_units",
    "hidden", "tiles", "splits", "steps", "parts",
)  # fmt: skip


@triton.jit
def mean_of(
    sums, lengths, image, live_image, ok, positions,
    G: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``[G, BC]`` means (or parts of them) of ``[rows, BS]``; NaN for the mean of nothing, as
    torch.mean."""
    end, n = mean_divisor(lengths, image, live_image, positions, ACC)
    mean = tl.reshape(tl.sum(sums, axis=1), [G, BC])
    mean = tl.where(n[:, None] > 0, mean / tl.where(n > 0, n, 1.0)[:, None], float("nan"))
    return tl.where(ok, mean, 0.0)


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    x, affine_scale, affine_shift, lengths, w1,
    z_parts, hidden_parts,  # out: [B, splits, C] or None, [B, tiles * splits, R] or None
    batch, channels_units, positions_units, x_stride_units, hidden, tiles, splits, steps,
    BEFORE: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    AFFINE: tl.constexpr = affine_scale is not None

    first_image, first_channel, tile, split = locate(tl.program_id(0), tiles, splits, G, BC)
    image = first_image + tl.arange(0, G)
    g, c = rows_of(G, BC)
    b, c = first_image + g, first_channel + c
    live = (b < batch) & (c < channels)
    end, n_row = mean_divisor(lengths, b, live, positions, ACC)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)

    sums = tl.zeros([G * BC, BS], ACC)
    for i in range(steps):
        s = (split * steps + i) * BS + tl.arange(0, BS)
        ok = live[:, None] & (s < positions)[None, :]
        if lengths is not None:
            ok = ok & (s[None, :] < end[:, None])
        at = pointers(
            x, first_image, first_channel, s, x_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        raw = tl.load(at, mask=ok, other=0.0).to(ACC)
        q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
        if AFFINE:  # elsewhere p is 0 where nothing was loaded
            p = tl.where(ok, p, 0.0)
        sums += p

    # This program's part of the mean.
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    mean = mean_of(sums, lengths, image, live_image, ok_mean, positions, G, BC, ACC)
    if z_parts is not None:
        where_z = (image * splits + split)[:, None] * channels + of_channel[None, :]
        tl.store(z_parts + where_z, mean, mask=ok_mean)
    if hidden_parts is not None:
        part = (image * tiles + tile) * splits + split
        for r0 in range(0, hidden, BR):
            r = r0 + tl.arange(0, BR)
            ok_w = (r < hidden)[:, None] & (of_channel < channels)[None, :]
            where_w = r.to(tl.int64)[:, None] * channels + of_channel[None, :]
            w = tl.load(w1 + where_w, mask=ok_w, other=0.0).to(ACC)
            partial = tl.sum(w[None, :, :] * mean[:, None, :], axis=2)
            ok_h = live_image[:, None] & (r < hidden)[None, :]
            tl.store(hidden_parts + part[:, None] * hidden + r[None, :], partial, mask=ok_h)


@triton.jit
def output_layer(w2, inner, of_channel, r, channels, hidden, u, row0, ACC: tl.constexpr):
    """Adds ``W2[row0 + channel, r] inner[., r]`` to u, ``[G, BC, BR]``, not yet summed over r."""
    ok_w = (of_channel < channels)[:, None] & (r < hidden)[None, :]
    where_w = (row0 + of_channel).to(tl.int64)[:, None] * hidden + r[None, :]
    w = tl.load(w2 + where_w, mask=ok_w, other=0.0).to(ACC)
    return u + w[None, :, :] * inner[:, None, :]


@triton.jit
def write_tile(
    p, ok, scale, shift, residual, y, mask, first_image, first_channel, s0,
    residual_stride, batch, channels, positions,
    AFTER: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y, and the bit mask where it is kept, of the tile at position ``s0``."""
    s = s0 + tl.arange(0, BS)
    y_stride = channels.to(tl.int64) * positions
    at_residual = residual
    if residual is not None:
        at_residual = pointers(
            residual, first_image, first_channel, s, residual_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
    pre = outgoing(p, scale, shift, at_residual, ok, SHIFT, ACC)
    if mask is not None:
        keep = ((pre <= 0) == 0) & ok
        store_mask(
            keep.to(tl.int32), mask, first_image, first_channel, s0, batch, channels, positions,
            LAST, INDEX, G, BC, BS,
        )  # fmt: skip
    at_y = pointers(
        y, first_image, first_channel, s, y_stride, channels, positions,
        LAST, INDEX, G, BC,
    )  # fmt: skip
    tl.store(at_y, value(AFTER, pre).to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def scale_kernel(
    x, residual, affine_scale, affine_shift, b1, w2, b2, alpha, beta,
    hidden_parts, z_parts,  # [B, parts, hidden]; [B, splits, C] or None
    y, saved, mask,  # out; saved and mask None where not kept
    batch, channels_units, positions_units, x_stride_units, residual_stride_units,
    hidden, tiles, splits, steps, parts,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC

    # The last images first: the squeeze left them in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    first_image, first_channel, tile, split = locate(pid, tiles, splits, G, BC)
    image = first_image + tl.arange(0, G)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    outputs = channels * (2 if SHIFT else 1)
    h_at, u_at = saved_at(batch, channels, hidden, TWO_LAYERS)

    u = tl.zeros([G, BC, BR], ACC)
    u_shift = tl.zeros([G, BC, BR], ACC)
    for r0 in range(0, hidden, BR):
        r = r0 + tl.arange(0, BR)
        inner = sum_parts(hidden_parts, image, live_image, parts, r, hidden, G, BK, ACC)
        if TWO_LAYERS:
            inner += per_channel(b1, r, hidden, 0.0, ACC)[None, :]
            if saved is not None:
                ok_h = live_image[:, None] & (r < hidden)[None, :] & (tile + split == 0)
                where_h = (h_at + image * hidden)[:, None] + r[None, :]
                tl.store(saved + where_h, inner, mask=ok_h)
            inner = value(ACTIVATION, inner)
            inner = tl.where((r < hidden)[None, :], inner, 0.0)
        u = output_layer(w2, inner, of_channel, r, channels, hidden, u, 0, ACC)
        if SHIFT:
            u_shift = output_layer(
                w2, inner, of_channel, r, channels, hidden, u_shift, channels, ACC
            )
    gate_in = tl.sum(u, axis=2) + per_channel(b2, of_channel, channels, 0.0, ACC)[None, :]
    shift = tl.sum(u_shift, axis=2)
    if SHIFT and b2 is not None:
        shift += per_channel(b2 + channels, of_channel, channels, 0.0, ACC)[None, :]
    if saved is not None:
        where_u = (u_at + image * outputs)[:, None] + of_channel[None, :]
        tl.store(saved + where_u, gate_in, mask=ok_mean & (split == 0))
        if SHIFT:
            tl.store(saved + where_u + channels, shift, mask=ok_mean & (split == 0))
        if z_parts is not None:
            z = sum_parts(z_parts, image, live_image, splits, of_channel, channels, G, BK, ACC)
            where_z = image[:, None] * channels + of_channel[None, :]
            tl.store(saved + where_z, z, mask=ok_mean & (split == 0))

    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
    scale_row = per_row(scale, ROWS)
    shift_row = per_row(shift, ROWS)

    g, c = rows_of(G, BC)
    b, c = first_image + g, first_channel + c
    live = (b < batch) & (c < channels)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    for i in range(steps):
        s0 = (split * steps + i) * BS
        s = s0 + tl.arange(0, BS)
        ok = live[:, None] & (s < positions)[None, :]
        at = pointers(
            x, first_image, first_channel, s, x_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        raw = tl.load(at, mask=ok, other=0.0).to(ACC)
        q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
        write_tile(
            p, ok, scale_row, shift_row, residual, y, mask, first_image, first_channel, s0,
            residual_stride, batch, channels, positions, AFTER, SHIFT, LAST, ACC, INDEX, G, BC, BS,
        )  # fmt: skip
