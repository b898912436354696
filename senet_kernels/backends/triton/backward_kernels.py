"""Backward in three launches: sums over space, then dx, then the parameters' gradients.

With m = dy after'(pre):

1. ``dots_kernel``: ds = sum of m p and dshift = sum of m, hence du of the program's channels, and
   their part of W2ᵀ du: linear in ds again, so parts add up as in the forward pass.
2. ``dx_kernel``: dh from those parts, dz = W1ᵀ dh, dx = (m scale + dz / n) before'(q) a.
3. ``parameters_kernel``: sums over the batch, each by one program in a fixed order.
"""

import triton
import triton.language as tl

from .forward_kernels import SIZES
from .pointwise import IDENTITY, RELU, chain, value
from .tiles import (
    load_mask,
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
    sum_parts,
)

BACKWARD_SIZES = (*SIZES, "dy_stride_units")


@triton.jit
def through_after(
    dy, p, scale, shift, mask, residual, first_image, first_channel, s, ok, residual_stride,
    channels, positions,
    AFTER: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """m = dy after'(pre); 0 outside of the image. ``scale`` and ``shift`` are ``[rows, 1]``."""
    if AFTER == IDENTITY:
        m = dy
    elif AFTER == RELU:
        kept = load_mask(
            mask, first_image, first_channel, s, ok, channels, positions, LAST, INDEX, G, BC
        )
        m = tl.where(kept, dy, 0.0)
    else:
        at = residual
        if residual is not None:
            at = pointers(
                residual, first_image, first_channel, s, residual_stride, channels, positions,
                LAST, INDEX, G, BC,
            )  # fmt: skip
        pre = outgoing(p, scale, shift, at, ok, SHIFT, ACC)
        m = tl.where(ok, chain(AFTER, pre, dy), 0.0)
    return m


@triton.jit
def factors(
    saved, alpha, beta, image, of_channel, ok, batch, channels, hidden,
    GATE: tl.constexpr, TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The pre-gate, scale and shift of the program's channels, ``[G, BC]``, from what was saved."""
    h_at, u_at = saved_at(batch, channels, hidden, TWO_LAYERS)
    if SHIFT:
        where = (u_at + image * (2 * channels))[:, None] + of_channel[None, :]
        shift = tl.load(saved + where + channels, mask=ok, other=0.0)
    else:
        where = (u_at + image * channels)[:, None] + of_channel[None, :]
        shift = tl.zeros(where.shape, ACC)
    gate_in = tl.load(saved + where, mask=ok, other=0.0)
    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
    return gate_in, scale, shift


@triton.jit
def through_gate(ds, gate_in, beta, of_channel, channels, GATE: tl.constexpr, ACC: tl.constexpr):
    """du = beta ds gate'(u)."""
    du = chain(GATE, gate_in, ds)
    if beta is not None:
        du *= per_channel(beta, of_channel, channels, 1.0, ACC)[None, :]
    return du


@triton.jit
def transposed_rows(w, v, row, ok_row, r, columns, ACC: tl.constexpr):
    """``w[row, r] v[., row]``: ``[G, rows, len(r)]``, to be summed over rows."""
    where = row.to(tl.int64)[:, None] * columns + r[None, :]
    tile = tl.load(w + where, mask=ok_row[:, None] & (r < columns)[None, :], other=0.0).to(ACC)
    return tile[None, :, :] * v[:, :, None]


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dots_kernel(
    dy, x, residual, mask, affine_scale, affine_shift, w2, alpha, beta, saved,
    dots_parts, hidden_parts,  # out: [B, splits, outputs], [B, parts, inner extent]
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, hidden, tiles, splits, steps,
    GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
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

    first_image, first_channel, tile, split = locate(tl.program_id(0), tiles, splits, G, BC)
    image = first_image + tl.arange(0, G)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok_mean, batch, channels, hidden,
        GATE, TWO_LAYERS, SHIFT, ACC,
    )  # fmt: skip
    scale_row = per_row(scale, ROWS)
    shift_row = per_row(shift, ROWS)

    g, c = rows_of(G, BC)
    b, c = first_image + g, first_channel + c
    live = (b < batch) & (c < channels)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    sum_mp = tl.zeros([ROWS, BS], ACC)
    sum_m = tl.zeros([ROWS, BS], ACC)
    for i in range(steps):
        s = (split * steps + i) * BS + tl.arange(0, BS)
        ok = live[:, None] & (s < positions)[None, :]
        at_x = pointers(
            x, first_image, first_channel, s, x_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        at_dy = pointers(
            dy, first_image, first_channel, s, dy_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        raw = tl.load(at_x, mask=ok, other=0.0).to(ACC)
        grad = tl.load(at_dy, mask=ok, other=0.0).to(ACC)
        q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
        m = through_after(
            grad, p, scale_row, shift_row, mask, residual, first_image, first_channel, s, ok,
            residual_stride, channels, positions, AFTER, SHIFT, LAST, ACC, INDEX, G, BC,
        )  # fmt: skip
        if AFFINE:
            p = tl.where(ok, p, 0.0)
        sum_mp += m * p
        if SHIFT:
            sum_m += m

    ds = tl.reshape(tl.sum(sum_mp, axis=1), [G, BC])
    dshift = tl.reshape(tl.sum(sum_m, axis=1), [G, BC])
    outputs = channels * (2 if SHIFT else 1)
    where_o = (image * splits + split)[:, None] * outputs + of_channel[None, :]
    tl.store(dots_parts + where_o, ds, mask=ok_mean)
    if SHIFT:
        tl.store(dots_parts + where_o + channels, dshift, mask=ok_mean)
    du = through_gate(ds, gate_in, beta, of_channel, channels, GATE, ACC)
    du = tl.where(ok_mean, du, 0.0)
    if TWO_LAYERS:
        ok_channel = of_channel < channels
        part = (image * tiles + tile) * splits + split
        for r0 in range(0, hidden, BR):
            r = r0 + tl.arange(0, BR)
            terms = transposed_rows(w2, du, of_channel, ok_channel, r, hidden, ACC)
            if SHIFT:
                terms += transposed_rows(
                    w2, dshift, channels + of_channel, ok_channel, r, hidden, ACC
                )
            ok_h = live_image[:, None] & (r < hidden)[None, :]
            where_h = part[:, None] * hidden + r[None, :]
            tl.store(hidden_parts + where_h, tl.sum(terms, axis=1), mask=ok_h)
    else:  # the one layer's output gradient is what goes back to every channel
        tl.store(hidden_parts + where_o, du, mask=ok_mean)
        if SHIFT:
            tl.store(hidden_parts + where_o + channels, dshift, mask=ok_mean)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dx_kernel(
    dy, x, residual, mask, affine_scale, affine_shift, lengths, w, alpha, beta, saved,
    dots_parts, hidden_parts,  # [B, splits, outputs]; [B, parts, inner]
    dx, dresidual, ds_out, du_out, dh_out,  # out; dh_out None for a single layer
    da_parts, db_parts,  # out: [B, splits, C] each, or None
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, hidden, inner, tiles, splits, steps, parts,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, READS_X: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    dy_stride = dy_stride_units.to(tl.int64) * UNIT_DY
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC

    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the last images are in the cache
    first_image, first_channel, tile, split = locate(pid, tiles, splits, G, BC)
    image = first_image + tl.arange(0, G)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok_mean, batch, channels, hidden,
        GATE, TWO_LAYERS, SHIFT, ACC,
    )  # fmt: skip

    # dh (for a single layer du stands in its place), and dz = Wᵀ dh of our channels.
    dz = tl.zeros([G, BR, BC], ACC)
    for r0 in range(0, inner, BR):
        r = r0 + tl.arange(0, BR)
        dh = sum_parts(hidden_parts, image, live_image, parts, r, inner, G, BK, ACC)
        if TWO_LAYERS:
            ok_h = live_image[:, None] & (r < hidden)[None, :]
            where_h = image[:, None] * hidden + r[None, :]
            h_at = batch.to(tl.int64) * channels
            h = tl.load(saved + h_at + where_h, mask=ok_h, other=0.0)
            dh = tl.where(ok_h, chain(ACTIVATION, h, dh), 0.0)
            tl.store(dh_out + where_h, dh, mask=ok_h & (tile + split == 0))
        if dx is not None or da_parts is not None:
            dz += transposed_rows(w, dh, r, r < inner, of_channel, channels, ACC)
    outputs = channels * (2 if SHIFT else 1)
    first = ok_mean & (split == 0)
    where_o = image[:, None] * outputs + of_channel[None, :]
    ds = sum_parts(dots_parts, image, live_image, splits, of_channel, outputs, G, BK, ACC)
    tl.store(ds_out + image[:, None] * channels + of_channel[None, :], ds, mask=first)
    du = through_gate(ds, gate_in, beta, of_channel, channels, GATE, ACC)
    tl.store(du_out + where_o, du, mask=first)
    if SHIFT:
        dshift = sum_parts(
            dots_parts, image, live_image, splits, channels + of_channel, outputs, G, BK, ACC
        )
        tl.store(du_out + where_o + channels, dshift, mask=first)

    g, c = rows_of(G, BC)
    b, c = first_image + g, first_channel + c
    live = (b < batch) & (c < channels)
    end, n_row = mean_divisor(lengths, b, live, positions, ACC)
    end_image, n = mean_divisor(lengths, image, live_image, positions, ACC)
    dmean = tl.sum(dz, axis=1) / tl.where(n > 0, n, 1.0)[:, None]
    dmean = tl.where(n[:, None] > 0, dmean, float("nan"))
    scale_row = per_row(scale, ROWS)
    shift_row = per_row(shift, ROWS)
    dmean_row = per_row(dmean, ROWS)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    dense_stride = channels.to(tl.int64) * positions
    sum_da = tl.zeros([ROWS, BS], ACC)
    sum_db = tl.zeros([ROWS, BS], ACC)
    for i in range(steps):
        s = (split * steps + i) * BS + tl.arange(0, BS)
        ok = live[:, None] & (s < positions)[None, :]
        at_dy = pointers(
            dy, first_image, first_channel, s, dy_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        grad = tl.load(at_dy, mask=ok, other=0.0).to(ACC)
        if READS_X:
            at_x = pointers(
                x, first_image, first_channel, s, x_stride, channels, positions,
                LAST, INDEX, G, BC,
            )  # fmt: skip
            raw = tl.load(at_x, mask=ok, other=0.0).to(ACC)
        else:
            raw = grad
        q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
        m = through_after(
            grad, p, scale_row, shift_row, mask, residual, first_image, first_channel, s, ok,
            residual_stride, channels, positions, AFTER, SHIFT, LAST, ACC, INDEX, G, BC,
        )  # fmt: skip
        if dresidual is not None:
            at_dresidual = pointers(
                dresidual, first_image, first_channel, s, dense_stride, channels, positions,
                LAST, INDEX, G, BC,
            )  # fmt: skip
            tl.store(at_dresidual, m.to(dresidual.dtype.element_ty), mask=ok)
        if dx is not None or da_parts is not None:
            if lengths is not None:
                through_mean = tl.where(s[None, :] < end[:, None], dmean_row, 0.0)
            else:
                through_mean = dmean_row
            dq = chain(BEFORE, q, m * scale_row + through_mean)
            if dx is not None:
                grad_x = dq * a_row[:, None] if AFFINE else dq
                at_dx = pointers(
                    dx, first_image, first_channel, s, dense_stride, channels, positions,
                    LAST, INDEX, G, BC,
                )  # fmt: skip
                tl.store(at_dx, grad_x.to(dx.dtype.element_ty), mask=ok)
            if da_parts is not None:
                dq = tl.where(ok, dq, 0.0)
                sum_da += dq * raw
                sum_db += dq
    if da_parts is not None:
        where_a = (image * splits + split)[:, None] * channels + of_channel[None, :]
        tl.store(da_parts + where_a, tl.reshape(tl.sum(sum_da, axis=1), [G, BC]), mask=ok_mean)
        tl.store(db_parts + where_a, tl.reshape(tl.sum(sum_db, axis=1), [G, BC]), mask=ok_mean)


@triton.jit
def outer_products(
    left, right, out, rows, columns, batch, pid, F: tl.constexpr,
    ACC: tl.constexpr, BB: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """``out[o, i] = sum over images of left[b, o] F(right[b, i])``, tile ``pid`` of it."""
    across = tl.cdiv(columns, BI)
    o = (pid // across) * BO + tl.arange(0, BO)
    i = (pid % across) * BI + tl.arange(0, BI)
    total = tl.zeros([BO, BI], ACC)
    for b0 in range(0, batch, BB):
        b = (b0 + tl.arange(0, BB)).to(tl.int64)
        ok_l = (b < batch)[:, None] & (o < rows)[None, :]
        ok_r = (b < batch)[:, None] & (i < columns)[None, :]
        v_l = tl.load(left + b[:, None] * rows + o[None, :], mask=ok_l, other=0.0)
        v_r = tl.load(right + b[:, None] * columns + i[None, :], mask=ok_r, other=0.0)
        v_r = tl.where(ok_r, value(F, v_r), 0.0)
        total += tl.sum(v_l[:, :, None] * v_r[:, None, :], axis=0)
    ok = (o < rows)[:, None] & (i < columns)[None, :]
    where = o.to(tl.int64)[:, None] * columns + i[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def column_sums(
    a, factor, out, rows, columns, factor_stride, i, F: tl.constexpr,
    ACC: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """``out[i] = sum over rows of a[row, i]``, times ``F(factor[row, i])`` where given."""
    if out is not None:
        total = tl.zeros([BB, i.shape[0]], ACC)
        for b0 in range(0, rows, BB):
            b = (b0 + tl.arange(0, BB)).to(tl.int64)
            ok = (b < rows)[:, None] & (i < columns)[None, :]
            v = tl.load(a + b[:, None] * columns + i[None, :], mask=ok, other=0.0)
            if factor is not None:
                f = tl.load(factor + b[:, None] * factor_stride + i[None, :], mask=ok, other=0.0)
                v = tl.where(ok, v * value(F, f), 0.0)
            total += v
        tl.store(out + i, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < columns)


@triton.jit(do_not_specialize=("batch", "channels", "hidden", "outputs", "splits", "w2_tiles",
                               "w1_tiles"))  # fmt: skip
def parameters_kernel(
    ds, du, dh, saved, da_parts, db_parts,
    dw1, db1, dw2, db2, dalpha, dbeta, daffine_scale, daffine_shift,  # out, or None
    batch, channels, hidden, outputs, splits, w2_tiles, w1_tiles,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, TWO_LAYERS: tl.constexpr, ACC: tl.constexpr,
    BB: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h_at, u_at = saved_at(batch, channels, hidden, TWO_LAYERS)
    z, h, u = saved, saved + h_at, saved + u_at
    if pid < w2_tiles:
        if dw2 is not None:
            if TWO_LAYERS:
                outer_products(du, h, dw2, outputs, hidden, batch, pid, ACTIVATION, ACC, BB, BO, BI)
            else:
                outer_products(du, z, dw2, outputs, channels, batch, pid, IDENTITY, ACC, BB, BO, BI)
    elif pid < w2_tiles + w1_tiles:
        if dw1 is not None:
            outer_products(
                dh, z, dw1, hidden, channels, batch, pid - w2_tiles, IDENTITY, ACC, BB, BO, BI
            )
    else:
        i = (pid - w2_tiles - w1_tiles) * BV + tl.arange(0, BV)
        column_sums(du, None, db2, batch, outputs, 0, i, IDENTITY, ACC, BB)
        column_sums(dh, None, db1, batch, hidden, 0, i, IDENTITY, ACC, BB)
        column_sums(ds, None, dalpha, batch, channels, 0, i, IDENTITY, ACC, BB)
        column_sums(ds, u, dbeta, batch, channels, outputs, i, GATE, ACC, BB)
        rows = batch * splits
        column_sums(da_parts, None, daffine_scale, rows, channels, 0, i, IDENTITY, ACC, BB)
        column_sums(db_parts, None, daffine_shift, rows, channels, 0, i, IDENTITY, ACC, BB)
