"""Forward in one launch: a program holds whole images on chip and computes their MLP itself."""

import triton
import triton.language as tl

from .forward_kernels import SIZES, mean_of, output_layer, write_tile
from .pointwise import value
from .tiles import (
    make_scale,
    mean_divisor,
    per_channel,
    per_row,
    pointers,
    prologue,
    rows_of,
    saved_at,
)


@triton.jit(do_not_specialize=SIZES)
def resident_kernel(
    x, residual, affine_scale, affine_shift, lengths, w1, b1, w2, b2, alpha, beta,
    y, saved, mask,  # out; saved and mask None where not kept
    batch, channels_units, positions_units, x_stride_units, residual_stride_units, hidden,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SHIFT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC

    first_image = tl.program_id(0).to(tl.int64) * G
    first_channel = tl.program_id(0) * 0
    image = first_image + tl.arange(0, G)
    of_channel = tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    g, c = rows_of(G, BC)
    live = (first_image + g < batch) & (c < channels)
    s = tl.arange(0, BS)
    ok = live[:, None] & (s < positions)[None, :]

    at = pointers(
        x, first_image, first_channel, s, x_stride, channels, positions, LAST, INDEX, G, BC
    )
    raw = tl.load(at, mask=ok, other=0.0).to(ACC)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
    p = tl.where(ok, p, 0.0)
    counted = p
    if lengths is not None:
        end, n_row = mean_divisor(lengths, first_image + g, live, positions, ACC)
        counted = tl.where(s[None, :] < end[:, None], p, 0.0)
    mean = mean_of(counted, lengths, image, live_image, ok_mean, positions, G, BC, ACC)

    h_at, u_at = saved_at(batch, channels, hidden, True)
    u = tl.zeros([G, BC, BR], ACC)
    u_shift = tl.zeros([G, BC, BR], ACC)
    for r0 in range(0, hidden, BR):
        r = r0 + tl.arange(0, BR)
        ok_w = (r < hidden)[:, None] & (of_channel < channels)[None, :]
        where_w = r.to(tl.int64)[:, None] * channels + of_channel[None, :]
        w = tl.load(w1 + where_w, mask=ok_w, other=0.0).to(ACC)
        inner = tl.sum(w[None, :, :] * mean[:, None, :], axis=2)
        inner += per_channel(b1, r, hidden, 0.0, ACC)[None, :]
        if saved is not None:
            where_h = h_at + image[:, None] * hidden + r[None, :]
            tl.store(saved + where_h, inner, mask=live_image[:, None] & (r < hidden)[None, :])
        inner = tl.where((r < hidden)[None, :], value(ACTIVATION, inner), 0.0)
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
        tl.store(saved + image[:, None] * channels + of_channel[None, :], mean, mask=ok_mean)
        outputs = channels * (2 if SHIFT else 1)
        where_u = u_at + image[:, None] * outputs + of_channel[None, :]
        tl.store(saved + where_u, gate_in, mask=ok_mean)
        if SHIFT:
            tl.store(saved + where_u + channels, shift, mask=ok_mean)

    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
    write_tile(
        p, ok, per_row(scale, ROWS), per_row(shift, ROWS), residual, y, mask, first_image,
        first_channel, 0, residual_stride, batch, channels, positions,
        AFTER, SHIFT, LAST, ACC, INDEX, G, BC, BS,
    )  # fmt: skip
