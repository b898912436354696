"""Backward in three launches: sums over space, then dx, then the parameters' gradients.

With m = dy after'(pre):

1. ``dots_kernel``: ds = sum of m p and dshift = sum of m, hence du of the program's channels, and
   their part of W2ᵀ du: linear in ds again, so parts add up as in the forward pass.
2. ``dx_kernel``: dh from those parts, dz = W1ᵀ dh, dx = (m scale + dz / n) before'(q) a.
3. ``parameters_kernel``, of ``parameter_kernels.py``: sums over the batch.

The squeeze alone has only dz / n, the scaling alone nothing that dx must wait for: one launch over
images each, then a small one for what is summed over programs.
"""

import triton
import triton.language as tl

from .forward_kernels import SIZES, load_u, store_u
from .pointwise import chain
from .tiles import (
    load_mask,
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
    store_tile,
    sum_parts,
)

BACKWARD_SIZES = (*SIZES, "dy_stride_units")


@triton.jit
def load_gradient(
    dy, x, residual, mask, a_row, b_row, scale, shift, first_image, first_channel, s0, ok,
    x_stride, dy_stride, residual_stride, batch, channels, positions,
    READS_X: tl.constexpr, AFFINE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """x as it is, q, p, and m = dy after'(pre), which is 0 outside of the image. ``scale`` and
    ``shift`` are ``[rows, 1]``. Unless ``READS_X`` only m means anything."""
    s = s0 + tl.arange(0, BS)
    grad = load_tile(
        dy, first_image, first_channel, s, ok, dy_stride, batch, channels, positions,
        LAST, FLAT, ACC, INDEX, G, BC,
    )  # fmt: skip
    if READS_X:
        raw = load_tile(
            x, first_image, first_channel, s, ok, x_stride, batch, channels, positions,
            LAST, FLAT, ACC, INDEX, G, BC,
        )  # fmt: skip
    else:
        raw = grad
    q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
    if AFTER == "identity":
        m = grad
    elif AFTER == "relu":
        kept = load_mask(
            mask, first_image, first_channel, s0, batch, channels, positions,
            LAST, INDEX, G, BC, BS,
        )  # fmt: skip
        m = tl.where(kept, grad, 0.0)
    else:
        pre = outgoing(
            p, scale, shift, residual, first_image, first_channel, s, ok, residual_stride, batch,
            channels, positions, SHIFT, LAST, FLAT, ACC, INDEX, G, BC,
        )  # fmt: skip
        m = tl.where(ok, chain(AFTER, pre, grad), 0.0)
    return raw, q, p, m


@triton.jit
def store_gradient(
    m, q, scale, dmean, a_row, end, lengths, dx, dresidual, first_image, first_channel, s, ok,
    batch, channels, positions,
    SCALED: tl.constexpr, THROUGH_MEAN: tl.constexpr, SUMMED: tl.constexpr, AFFINE: tl.constexpr,
    BEFORE: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes dx and the residual's gradient, where they are wanted; returns dq (if ``SUMMED`` or
    dx is wanted). ``SCALED``: x reaches y directly; ``THROUGH_MEAN``: by the mean."""
    dense_stride = channels.to(tl.int64) * positions
    if dresidual is not None:
        store_tile(
            dresidual, m, first_image, first_channel, s, ok, dense_stride, batch, channels,
            positions, LAST, FLAT, INDEX, G, BC,
        )  # fmt: skip
    dq = q
    if dx is not None or SUMMED:
        if THROUGH_MEAN:
            dp = dmean + tl.zeros_like(q)
            if lengths is not None:
                dp = tl.where(s[None, :] < end[:, None], dp, 0.0)
            if SCALED:
                dp += m * scale
        else:
            dp = m * scale
        dq = chain(BEFORE, q, dp)
        if dx is not None:
            store_tile(
                dx, dq * a_row[:, None] if AFFINE else dq, first_image, first_channel, s, ok,
                dense_stride, batch, channels, positions, LAST, FLAT, INDEX, G, BC,
            )  # fmt: skip
    return dq


@triton.jit
def affine_sums(sum_da, sum_db, da_parts, db_parts, where, ok, G: tl.constexpr, BC: tl.constexpr):
    """Writes a program's part of the gradients of ``before_affine``, from ``[rows, BS]`` each."""
    tl.store(da_parts + where, tl.reshape(tl.sum(sum_da, axis=1), [G, BC]), mask=ok)
    tl.store(db_parts + where, tl.reshape(tl.sum(sum_db, axis=1), [G, BC]), mask=ok)


@triton.jit
def mean_gradient(dz, lengths, image, live_image, positions, ACC: tl.constexpr):
    """What each position that counts gets of dz, ``[images, BC]``."""
    end, n = mean_divisor(lengths, image, live_image, positions, ACC)
    dmean = dz / tl.where(n > 0, n, 1.0)[:, None]
    return tl.where(n[:, None] > 0, dmean, float("nan"))


@triton.jit
def factors(
    saved, alpha, beta, image, of_channel, ok, batch, channels, hidden,
    GATE: tl.constexpr, TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The pre-gate, scale and shift of the program's channels, ``[images, BC]``, from what was
    saved."""
    h_at, u_at = saved_at(batch, channels, hidden, TWO_LAYERS)
    gate_in, shift = load_u(saved + u_at, image, of_channel, ok, channels, SHIFT, ACC)
    scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
    return gate_in, scale, shift


@triton.jit
def factor_rows(
    saved, alpha, beta, first_image, of_channel, batch, channels, hidden,
    GATE: tl.constexpr, TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scale and shift of a group of images, ``[rows, 1]``: read again for each group, since those
    of all a program's images would take too many registers."""
    image = first_image + tl.arange(0, G)
    ok = (image < batch)[:, None] & (of_channel < channels)[None, :]
    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok, batch, channels, hidden,
        GATE, TWO_LAYERS, SHIFT, ACC,
    )  # fmt: skip
    return per_row(scale, G * BC), per_row(shift, G * BC)


@triton.jit
def through_gate(ds, gate_in, beta, of_channel, channels, GATE: tl.constexpr, ACC: tl.constexpr):
    """du = beta ds gate'(u)."""
    du = chain(GATE, gate_in, ds)
    if beta is not None:
        du *= per_channel(beta, of_channel, channels, 1.0, ACC)[None, :]
    return du


@triton.jit
def through_activation(
    dh, saved, dh_out, image, ok_image, first, r, batch, channels, hidden,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, ``[images, len(r)]``; written where ``first``."""
    ok = ok_image[:, None] & (r < hidden)[None, :]
    where = image[:, None] * hidden + r[None, :]
    h_at = batch.to(tl.int64) * channels
    h = tl.load(saved + h_at + where, mask=ok, other=0.0)
    dh = tl.where(ok, chain(ACTIVATION, h, dh), 0.0)
    tl.store(dh_out + where, dh, mask=ok & first)
    return dh


@triton.jit
def transposed_rows(w, v, row, ok_row, r, columns, ACC: tl.constexpr):
    """``w[row, r] v[., row]``: ``[images, rows, len(r)]``, to be summed over rows."""
    where = row.to(tl.int64)[:, None] * columns + r[None, :]
    tile = tl.load(w + where, mask=ok_row[:, None] & (r < columns)[None, :], other=0.0).to(ACC)
    return tile[None, :, :] * v[:, :, None]


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dots_kernel(
    dy, x, residual, mask, affine_scale, affine_shift, w2, alpha, beta, saved,
    dots_parts, hidden_parts,  # out: [B, splits, outputs], [B, parts, inner extent]
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, hidden, tiles, splits, steps, walk,
    GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_RES: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    dy_stride = dy_stride_units.to(tl.int64) * UNIT_DY
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC
    IMAGES: tl.constexpr = W * G

    first_image, first_channel, tile, split = locate(tl.program_id(0), tiles, splits, IMAGES, BC)
    image = first_image + tl.arange(0, IMAGES)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]

    g, c = rows_of(G, BC)
    c = first_channel + c
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    ds = tl.zeros([IMAGES, BC], ACC)
    dshift = tl.zeros([IMAGES, BC], ACC)
    for k in range(walk if W > 1 else 1):
        first = first_image + k * G
        live = (first + g < batch) & (c < channels)
        scale_row, shift_row = factor_rows(
            saved, alpha, beta, first, of_channel, batch, channels, hidden,
            GATE, TWO_LAYERS, SHIFT, ACC, G, BC,
        )  # fmt: skip
        sum_mp = tl.zeros([ROWS, BS], ACC)
        sum_m = tl.zeros([ROWS, BS], ACC)
        for i in range(steps):
            s0 = (split * steps + i) * BS
            s = s0 + tl.arange(0, BS)
            ok = live[:, None] & (s < positions)[None, :]
            raw, q, p, m = load_gradient(
                dy, x, residual, mask, a_row, b_row, scale_row, shift_row, first, first_channel,
                s0, ok, x_stride, dy_stride, residual_stride, batch, channels, positions,
                True, AFFINE, BEFORE, AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
            )  # fmt: skip
            if AFFINE:
                p = tl.where(ok, p, 0.0)
            sum_mp += m * p
            if SHIFT:
                sum_m += m
        ds = set_group(ds, tl.reshape(tl.sum(sum_mp, axis=1), [G, BC]), k, W)
        if SHIFT:
            dshift = set_group(dshift, tl.reshape(tl.sum(sum_m, axis=1), [G, BC]), k, W)

    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok_mean, batch, channels, hidden,
        GATE, TWO_LAYERS, SHIFT, ACC,
    )  # fmt: skip
    row = image * splits + split
    store_u(dots_parts, ds, dshift, row, of_channel, ok_mean, channels, SHIFT)
    du = through_gate(ds, gate_in, beta, of_channel, channels, GATE, ACC)
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
        store_u(hidden_parts, du, dshift, row, of_channel, ok_mean, channels, SHIFT)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dx_kernel(
    dy, x, residual, mask, affine_scale, affine_shift, lengths, w, alpha, beta, saved,
    dots_parts, hidden_parts,  # [B, splits, outputs]; [B, parts, inner]
    dx, dresidual, ds_out, du_out, dh_out,  # out; dh_out None for a single layer
    da_parts, db_parts,  # out: [B, splits, C] each, or None
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, hidden, inner, tiles, splits, steps, walk, parts,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    TWO_LAYERS: tl.constexpr, SHIFT: tl.constexpr, READS_X: tl.constexpr,
    LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_RES: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    dy_stride = dy_stride_units.to(tl.int64) * UNIT_DY
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    ROWS: tl.constexpr = G * BC
    IMAGES: tl.constexpr = W * G

    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the last images are in the cache
    first_image, first_channel, tile, split = locate(pid, tiles, splits, IMAGES, BC)
    image = first_image + tl.arange(0, IMAGES)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    gate_in, scale, shift = factors(
        saved, alpha, beta, image, of_channel, ok_mean, batch, channels, hidden,
        GATE, TWO_LAYERS, SHIFT, ACC,
    )  # fmt: skip

    # dh (for a single layer du stands in its place), and dz = Wᵀ dh of our channels.
    dz = tl.zeros([IMAGES, BR, BC], ACC)
    for r0 in range(0, inner, BR):
        r = r0 + tl.arange(0, BR)
        dh = sum_parts(hidden_parts, image, live_image, parts, r, inner, IMAGES, BK, ACC)
        if TWO_LAYERS:
            dh = through_activation(
                dh, saved, dh_out, image, live_image, tile + split == 0, r, batch, channels,
                hidden, ACTIVATION,
            )  # fmt: skip
        if dx is not None or da_parts is not None:
            dz += transposed_rows(w, dh, r, r < inner, of_channel, channels, ACC)
    dmean = mean_gradient(tl.sum(dz, axis=1), lengths, image, live_image, positions, ACC)
    outputs = channels * (2 if SHIFT else 1)
    first_split = ok_mean & (split == 0)
    ds = sum_parts(dots_parts, image, live_image, splits, of_channel, outputs, IMAGES, BP, ACC)
    tl.store(ds_out + image[:, None] * channels + of_channel[None, :], ds, mask=first_split)
    du = through_gate(ds, gate_in, beta, of_channel, channels, GATE, ACC)
    dshift = tl.zeros_like(du)
    if SHIFT:
        dshift = sum_parts(
            dots_parts, image, live_image, splits, channels + of_channel, outputs, IMAGES, BP, ACC
        )
    store_u(du_out, du, dshift, image, of_channel, first_split, channels, SHIFT)

    g, c = rows_of(G, BC)
    c = first_channel + c
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    for k in range(walk if W > 1 else 1):
        first = first_image + k * G
        b = first + g
        live = (b < batch) & (c < channels)
        end, n_row = mean_divisor(lengths, b, live, positions, ACC)
        scale_row, shift_row = factor_rows(
            saved, alpha, beta, first, of_channel, batch, channels, hidden,
            GATE, TWO_LAYERS, SHIFT, ACC, G, BC,
        )  # fmt: skip
        dmean_row = per_row(of_group(dmean, k, W), ROWS)
        sum_da = tl.zeros([ROWS, BS], ACC)
        sum_db = tl.zeros([ROWS, BS], ACC)
        for i in range(steps):
            s0 = (split * steps + i) * BS
            s = s0 + tl.arange(0, BS)
            ok = live[:, None] & (s < positions)[None, :]
            raw, q, p, m = load_gradient(
                dy, x, residual, mask, a_row, b_row, scale_row, shift_row, first, first_channel,
                s0, ok, x_stride, dy_stride, residual_stride, batch, channels, positions,
                READS_X, AFFINE, BEFORE, AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
            )  # fmt: skip
            dq = store_gradient(
                m, q, scale_row, dmean_row, a_row, end, lengths, dx, dresidual, first,
                first_channel, s, ok, batch, channels, positions,
                True, True, da_parts is not None, AFFINE, BEFORE, LAST, FLAT, INDEX, G, BC,
            )  # fmt: skip
            if da_parts is not None:
                dq = tl.where(ok, dq, 0.0)
                sum_da += dq * raw
                sum_db += dq
        if da_parts is not None:
            of_these = first + tl.arange(0, G)
            ok_sums = (of_these < batch)[:, None] & (of_channel < channels)[None, :]
            where_a = (of_these * splits + split)[:, None] * channels + of_channel[None, :]
            affine_sums(sum_da, sum_db, da_parts, db_parts, where_a, ok_sums, G, BC)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def half_backward_kernel(
    dy, dz, x, u, residual, mask, affine_scale, affine_shift, lengths, alpha, beta,
    dx, dresidual,  # out, or None
    dots_parts, da_parts, db_parts,  # out: [B, splits, C or 2C], [B, splits, C] twice; or None
    batch, channels_units, positions_units, x_stride_units, dy_stride_units,
    residual_stride_units, tiles, splits, steps,
    GATE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SHIFT: tl.constexpr,
    READS_X: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_X: tl.constexpr, UNIT_DY: tl.constexpr,
    UNIT_RES: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx of the squeeze alone, from dz ``[B, C]`` (dy and u are None), or of the scaling alone,
    from dy (dz is None), and what a program can say of the sums over space."""
    channels = channels_units * UNIT_C
    positions = positions_units * UNIT_S
    x_stride = x_stride_units.to(tl.int64) * UNIT_X
    dy_stride = dy_stride_units.to(tl.int64) * UNIT_DY
    residual_stride = residual_stride_units.to(tl.int64) * UNIT_RES
    AFFINE: tl.constexpr = affine_scale is not None
    SCALED: tl.constexpr = dy is not None
    ROWS: tl.constexpr = G * BC

    first_image, first_channel, tile, split = locate(tl.program_id(0), tiles, splits, G, BC)
    image = first_image + tl.arange(0, G)
    of_channel = first_channel + tl.arange(0, BC)
    live_image = image < batch
    ok_mean = live_image[:, None] & (of_channel < channels)[None, :]
    if SCALED:
        gate_in, shift = load_u(u, image, of_channel, ok_mean, channels, SHIFT, ACC)
        scale = make_scale(gate_in, alpha, beta, of_channel, channels, GATE, ACC)
        dmean = scale
    else:
        where = image[:, None] * channels + of_channel[None, :]
        given = tl.load(dz + where, mask=ok_mean, other=0.0).to(ACC)
        dmean = mean_gradient(given, lengths, image, live_image, positions, ACC)
        scale = dmean
        shift = dmean
    scale_row, shift_row, dmean_row = (
        per_row(scale, ROWS),
        per_row(shift, ROWS),
        per_row(dmean, ROWS),
    )

    g, c = rows_of(G, BC)
    b, c = first_image + g, first_channel + c
    live = (b < batch) & (c < channels)
    end, n_row = mean_divisor(lengths, b, live, positions, ACC)
    a_row = per_channel(affine_scale, c, channels, 1.0, ACC)
    b_row = per_channel(affine_shift, c, channels, 0.0, ACC)
    sum_mp = tl.zeros([ROWS, BS], ACC)
    sum_m = tl.zeros([ROWS, BS], ACC)
    sum_da = tl.zeros([ROWS, BS], ACC)
    sum_db = tl.zeros([ROWS, BS], ACC)
    for i in range(steps):
        s0 = (split * steps + i) * BS
        s = s0 + tl.arange(0, BS)
        ok = live[:, None] & (s < positions)[None, :]
        if SCALED:
            raw, q, p, m = load_gradient(
                dy, x, residual, mask, a_row, b_row, scale_row, shift_row, first_image,
                first_channel, s0, ok, x_stride, dy_stride, residual_stride, batch, channels,
                positions,
                READS_X, AFFINE, BEFORE, AFTER, SHIFT, LAST, FLAT, ACC, INDEX, G, BC, BS,
            )  # fmt: skip
            if dots_parts is not None:
                if AFFINE:
                    p = tl.where(ok, p, 0.0)
                sum_mp += m * p
                if SHIFT:
                    sum_m += m
        else:
            raw = tl.zeros([ROWS, BS], ACC)
            if READS_X:
                raw = load_tile(
                    x, first_image, first_channel, s, ok, x_stride, batch, channels, positions,
                    LAST, FLAT, ACC, INDEX, G, BC,
                )  # fmt: skip
            q, p = prologue(raw, a_row, b_row, AFFINE, BEFORE)
            m = raw
        dq = store_gradient(
            m, q, scale_row, dmean_row, a_row, end, lengths, dx, dresidual, first_image,
            first_channel, s, ok, batch, channels, positions,
            SCALED, not SCALED, da_parts is not None, AFFINE, BEFORE, LAST, FLAT, INDEX, G, BC,
        )  # fmt: skip
        if da_parts is not None:
            dq = tl.where(ok, dq, 0.0)
            sum_da += dq * raw
            sum_db += dq
    row = image * splits + split
    if dots_parts is not None:
        ds = tl.reshape(tl.sum(sum_mp, axis=1), [G, BC])
        dshift = tl.reshape(tl.sum(sum_m, axis=1), [G, BC])
        store_u(dots_parts, ds, dshift, row, of_channel, ok_mean, channels, SHIFT)
    if da_parts is not None:
        where_a = row[:, None] * channels + of_channel[None, :]
        affine_sums(sum_da, sum_db, da_parts, db_parts, where_a, ok_mean, G, BC)
