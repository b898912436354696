"""Forward in two launches: squeeze with partial hidden sums, then the rest of the MLP and scale.

The mean is local to a channel and the hidden layer is linear before its activation. So a program
that has some channels and some positions contributes to the hidden sums ``W1[:, its channels]``
times its part of the mean; the programs of the second launch add the parts up in a fixed order,
which is all that is exchanged. Each weight is read once per program and launch, for all of the
program's images: where weights outweigh an image, a program has several.

The halves of the operation are the same kernels, told to leave out the MLP.
"""

import triton
import triton.language as tl

from .pointwise import value
from .tiles import (
    load_tile,
    locate,
    make_scale,
    mean_divisor,
    of_group,
    outgoing,
    per_channel,
    per_row,
    prologue,
    rows_of,
    saved_at,
    set_group,
    store_mask,
    store_tile,
    sum_parts,
)

# Extents in units: how many there are says nothing that would be worth a build of its own.
SIZES = (
    "batch", "channels_units", "positions_units", "x_stride_units", "y_stride_units",
    "residual_stride_units", "hidden", "tiles", "splits", "steps", "walk", "parts",
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
    batch, channels_units, positions_units, x_stride_units, hidden, tiles, splits, steps, walk,
    BEFORE: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    AFFINE: tl.constexpr = affine_scale is not None
    IMAGES: tl.constexpr = W * G

    first_image, first_channel, tile, split = locate(tl.program_id(0), tiles, splits, IMAGES, BC)
    of_channel = first_channel + tl.arange(0, BC)
    g, c = rows_of(G, BC)
    c = first_channel + c
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)

    # This program's part of the mean.
    mean = tl.zeros([IMAGES, BC], ACC)
    for k in range(walk if W > 1 else 1):
        first = first_image + k * G
        b = first + g
        live = (b < batch) & (c < channels)
        end, n_row = mean_divisor(lengths, b, live, positions, ACC)
        sums = tl.zeros([G * BC, BS], ACC)
        for i in range(steps):
            s = (split * steps + i) * BS + tl.arange(0, BS)
            ok = live[:, None] & (s < positions)[None, :]
            if lengths is not None:
                ok = ok & (s[None, :] < end[:, None])
            raw = load_tile(
                x, first, first_channel, s, ok, x_stride, batch, channels, positions,
                LAST, FLAT, ACC, INDEX, G, BC,
            )  # fmt: skip
            q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
            if AFFINE:  # elsewhere p is 0 where nothing was loaded
                p = tl.where(ok, p, 0.0)
            sums += p
        of_these = first + tl.arange(0, G)
        live_image = of_these < batch
        ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
        found = mean_of(sums, lengths, of_these, live_image, ok_mean, positions, G, BC, ACC)
        mean = set_group(mean, found, k, W)

    image = first_image + tl.arange(0, IMAGES)
    live_image = image < batch
    if z_parts is not None:
        ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
        where_z = (image * splits + split)[:, None] * channels + of_channel[None, :]
        tl.store(z_parts + where_z, mean.to(z_parts.dtype.element_ty), mask=ok_mean)
    if hidden_parts is not None:
        part = (image * tiles + tile) * splits + split
        for r0 in range(0, hidden, BR):
            r = r0 + tl.arange(0, BR)
            partial = hidden_layer(w1, mean, r, of_channel, channels, hidden, ACC)
            ok_h = live_image[:, None] & (r < hidden)[None, :]
            tl.store(hidden_parts + part[:, None] * hidden + r[None, :], partial, mask=ok_h)


@triton.jit
def hidden_layer(w1, mean, r, of_channel, channels, hidden, ACC: tl.constexpr):
    """``W1[r, channels] mean[., channels]``: ``[images, len(r)]``, over the program's channels."""
    ok_w = (r < hidden)[:, None] & (of_channel < channels)[None, :]
    where_w = r.to(tl.int64)[:, None] * channels + of_channel[None, :]
    w = tl.load(w1 + where_w, mask=ok_w, other=0.0).to(ACC)
    return tl.sum(w[None, :, :] * mean[:, None, :], axis=2)


@triton.jit
def output_layer(w2, inner, of_channel, r, channels, hidden, u, row0, ACC: tl.constexpr):
    """Adds ``W2[row0 + channel, r] inner[., r]`` to u, ``[images, BC, BR]``, not yet summed over
    r."""
    ok_w = (of_channel < channels)[:, None] & (r < hidden)[None, :]
    where_w = (row0 + of_channel).to(tl.int64)[:, None] * hidden + r[None, :]
    w = tl.load(w2 + where_w, mask=ok_w, other=0.0).to(ACC)
    return u + w[None, :, :] * inner[:, None, :]


@triton.jit
def output_sums(u, u_shift, b2, of_channel, channels, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """The pre-gate and the shift, ``[images, BC]`` each, from what ``output_layer`` added up."""
    gate_in = tl.sum(u, axis=2) + per_channel(b2, of_channel, channels, 0.0, ACC)[None, :]
    shift = tl.sum(u_shift, axis=2)
    if SHIFT and b2 is not None:
        shift += per_channel(b2 + channels, of_channel, channels, 0.0, ACC)[None, :]
    return gate_in, shift


@triton.jit
def load_u(u, image, of_channel, ok, channels, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """The pre-gate and the shift out of ``[B, C or 2C]``."""
    where = (image * (channels * (2 if SHIFT else 1)))[:, None] + of_channel[None, :]
    gate_in = tl.load(u + where, mask=ok, other=0.0).to(ACC)
    if SHIFT:
        shift = tl.load(u + where + channels, mask=ok, other=0.0).to(ACC)
    else:
        shift = tl.zeros_like(gate_in)
    return gate_in, shift


@triton.jit
def store_u(u, gate_in, shift, image, of_channel, ok, channels, SHIFT: tl.constexpr):
    """The reverse of :func:`load_u`."""
    where = (image * (channels * (2 if SHIFT else 1)))[:, None] + of_channel[None, :]
    tl.store(u + where, gate_in.to(u.dtype.element_ty), mask=ok)
    if SHIFT:
        tl.store(u + where + channels, shift.to(u.dtype.element_ty), mask=ok)


@triton.jit
def write_tile(
    p, ok, scale, shift, residual, y, mask, first_image, first_channel, s0,
    residual_stride, y_stride, batch, channels, positions,
    AFTER: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y, and the bit mask where it is kept, of the tile at position ``s0``."""
    s = s0 + tl.arange(0, BS)
    pre = outgoing(
        p, scale, shift, residual, first_image, first_channel, s, ok, residual_stride, batch,
        channels, positions, SHIFT, LAST, FLAT, ACC, INDEX, G, BC,
    )  # fmt: skip
    if mask is not None:
        keep = ((pre <= 0) == 0) & ok
        store_mask(
            keep.to(tl.int32), mask, first_image, first_channel, s0, batch, channels, positions,
            LAST, INDEX, G, BC, BS,
        )  # fmt: skip
    store_tile(
        y, value(AFTER, pre), first_image, first_channel, s, ok, y_stride, batch, channels,
        positions, LAST, FLAT, INDEX, G, BC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def scale_kernel(
    x, residual, affine_scale, affine_shift, b1, w2, b2, alpha, beta,
    hidden_parts, z_parts,  # [B, parts, hidden]; [B, splits, C] or None
    u_given,  # [B, C or 2C] where the MLP is not ours (then the five before are None); else None
    y, saved, mask,  # out; saved and mask None where not kept; y may be x
    batch, channels_units, positions_units, x_stride_units, y_stride_units,
    residual_stride_units, hidden, tiles, splits, steps, walk, parts,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_Y: tl.constexpr,
    UNIT_RES: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    y_stride = y_stride_units.to(tl.int64) * UNIT_Y
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    IMAGES: tl.constexpr = W * G

    # The last images first: the squeeze left them in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    first_image, first_channel, tile, split = locate(pid, tiles, splits, IMAGES, BC)
    image = first_image + tl.arange(0, IMAGES)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]

    if u_given is not None:
        gate_in, shift = load_u(u_given, image, of_channel, ok_mean, channels, SHIFT, ACC)
    else:
        h_at, u_at = saved_at(batch, channels, hidden, TWO_LAYERS)
        u = tl.zeros([IMAGES, BC, BR], ACC)
        u_shift = tl.zeros([IMAGES, BC, BR], ACC)
        for r0 in range(0, hidden, BR):
            r = r0 + tl.arange(0, BR)
            inner = sum_parts(hidden_parts, image, live_image, parts, r, hidden, IMAGES, BK, ACC)
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
        gate_in, shift = output_sums(u, u_shift, b2, of_channel, channels, SHIFT, ACC)
        if saved is not None:
            first_split = ok_mean & (split == 0)
            store_u(saved + u_at, gate_in, shift, image, of_channel, first_split, channels, SHIFT)
            if z_parts is not None:
                z = sum_parts(
                    z_parts, image, live_image, splits, of_channel, channels, IMAGES, BP, ACC
                )
                where_z = image[:, None] * channels + of_channel[None, :]
                tl.store(saved + where_z, z, mask=first_split)
    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)

    g, c = rows_of(G, BC)
    c = first_channel + c
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    for k in range(walk if W > 1 else 1):
        first = first_image + k * G
        live = (first + g < batch) & (c < channels)
        scale_row = per_row(of_group(scale, k, W), G * BC)
        shift_row = per_row(of_group(shift, k, W), G * BC)
        for i in range(steps):
            s0 = (split * steps + i) * BS
            s = s0 + tl.arange(0, BS)
            ok = live[:, None] & (s < positions)[None, :]
            raw = load_tile(
                x, first, first_channel, s, ok, x_stride, batch, channels, positions,
                LAST, FLAT, ACC, INDEX, G, BC,
            )  # fmt: skip
            q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
            write_tile(
                p, ok, scale_row, shift_row, residual, y, mask, first, first_channel, s0,
                residual_stride, y_stride, batch, channels, positions,
                AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
            )  # fmt: skip


@triton.jit(do_not_specialize=("batch", "channels", "splits"))
def add_parts_kernel(
    z_parts, z,  # [B, splits, C]; out: [B, C]
    batch, channels, splits,
    ACC: tl.constexpr, BB: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The squeeze alone, where several programs share a mean: their parts in a fixed order."""
    across = tl.cdiv(channels, BV)
    image = (tl.program_id(0) // across).to(tl.int64) * BB + tl.arange(0, BB)
    c = (tl.program_id(0) % across) * BV + tl.arange(0, BV)
    live = image < batch
    mean = sum_parts(z_parts, image, live, splits, c, channels, BB, BP, ACC)
    where = image[:, None] * channels + c[None, :]
    tl.store(z + where, mean.to(z.dtype.element_ty), mask=live[:, None] & (c < channels)[None, :])
