"""One launch each way for images that fit on chip: a program holds whole images and computes
their MLP itself.
"""

import triton
import triton.language as tl

from .backward_kernels import (
    BACKWARD_SIZES,
    affine_sums,
    factors,
    load_gradient,
    mean_gradient,
    store_gradient,
    through_activation,
    through_gate,
    transposed_rows,
)
from .forward_kernels import (
    SIZES,
    hidden_layer,
    mean_of,
    output_layer,
    output_sums,
    store_u,
    write_tile,
)
from .pointwise import value
from .tiles import (
    load_tile,
    make_scale,
    mean_divisor,
    per_channel,
    per_row,
    prologue,
    rows_of,
    saved_at,
)


@triton.jit(do_not_specialize=SIZES)
def resident_kernel(
    x, residual, affine_scale, affine_shift, lengths, w1, b1, w2, b2, alpha, beta,
    y, saved, mask,  # out; saved and mask None where not kept; y may be x
    batch, channels_units, positions_units, x_stride_units, y_stride_units,
    residual_stride_units, hidden,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_Y: tl.constexpr,
    UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    y_stride = y_stride_units.to(tl.int64) * UNIT_Y
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

    raw = load_tile(
        x, first_image, first_channel, s, ok, x_stride, batch, channels, positions,
        LAST, FLAT, ACC, INDEX, G, BC,
    )  # fmt: skip
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
        inner = hidden_layer(w1, mean, r, of_channel, channels, hidden, ACC)
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
    gate_in, shift = output_sums(u, u_shift, b2, of_channel, channels, SHIFT, ACC)
    if saved is not None:
        tl.store(saved + image[:, None] * channels + of_channel[None, :], mean, mask=ok_mean)
        store_u(saved + u_at, gate_in, shift, image, of_channel, ok_mean, channels, SHIFT)

    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
    write_tile(
        p, ok, per_row(scale, ROWS), per_row(shift, ROWS), residual, y, mask, first_image,
        first_channel, 0, residual_stride, y_stride, batch, channels, positions,
        AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
    )  # fmt: skip


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def resident_backward_kernel(
    dy, x, residual, mask, affine_scale, affine_shift, lengths, w1, w2, alpha, beta, saved,
    dx, dresidual, ds_out, du_out, dh_out, da_parts, db_parts,  # out: as of dx_kernel
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, hidden,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    dy_stride = dy_stride_units.to(tl.int64) * UNIT_DY
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC

    first_image = tl.program_id(0).to(tl.int64) * G
    first_channel = tl.program_id(0) * 0
    image = first_image + tl.arange(0, G)
    of_channel = tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok_mean, batch, channels, hidden,
        GATE, True, SHIFT, ACC,
    )  # fmt: skip
    scale_row = per_row(scale, ROWS)

    g, c = rows_of(G, BC)
    b = first_image + g
    live = (b < batch) & (c < channels)
    s = tl.arange(0, BS)
    ok = live[:, None] & (s < positions)[None, :]
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    raw, q, p, m = load_gradient(
        dy, x, residual, mask, a_row, b_row, scale_row, per_row(shift, ROWS), first_image,
        first_channel, 0, ok, x_stride, dy_stride, residual_stride, batch, channels, positions,
        True, AFFINE, BEFORE, AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
    )  # fmt: skip
    if AFFINE:
        p = tl.where(ok, p, 0.0)
    ds = tl.reshape(tl.sum(m * p, axis=1), [G, BC])
    du = through_gate(ds, gate_in, beta, of_channel, channels, GATE, ACC)
    du = tl.where(ok_mean, du, 0.0)
    dshift = tl.zeros([G, BC], ACC)
    if SHIFT:
        dshift = tl.reshape(tl.sum(m, axis=1), [G, BC])
    tl.store(ds_out + image[:, None] * channels + of_channel[None, :], ds, mask=ok_mean)
    store_u(du_out, du, dshift, image, of_channel, ok_mean, channels, SHIFT)

    ok_channel = of_channel < channels
    dz = tl.zeros([G, BR, BC], ACC)
    for r0 in range(0, hidden, BR):
        r = r0 + tl.arange(0, BR)
        terms = transposed_rows(w2, du, of_channel, ok_channel, r, hidden, ACC)
        if SHIFT:
            terms += transposed_rows(w2, dshift, channels + of_channel, ok_channel, r, hidden, ACC)
        dh = through_activation(
            tl.sum(terms, axis=1), saved, dh_out, image, live_image, True, r, batch, channels,
            hidden, ACTIVATION,
        )  # fmt: skip
        if dx is not None or da_parts is not None:
            dz += transposed_rows(w1, dh, r, r < hidden, of_channel, channels, ACC)
    dmean = mean_gradient(tl.sum(dz, axis=1), lengths, image, live_image, positions, ACC)
    end, n_row = mean_divisor(lengths, b, live, positions, ACC)
    dq = store_gradient(
        m, q, scale_row, per_row(dmean, ROWS), a_row, end, lengths, dx, dresidual, first_image,
        first_channel, s, ok, batch, channels, positions,
        True, True, da_parts is not None, AFFINE, BEFORE, LAST, FLAT, INDEX, G, BC,
    )  # fmt: skip
    if da_parts is not None:
        dq = tl.where(ok, dq, 0.0)
        affine_sums(
            dq * raw, dq, da_parts, db_parts, image[:, None] * channels + of_channel[None, :],
            ok_mean, G, BC,
        )  # fmt: skip
