"""The parameters' gradients: sums over the batch, each by one program in a fixed order."""

import triton
import triton.language as tl

from .backward_kernels import through_gate
from .forward_kernels import load_u, store_u
from .pointwise import value
from .tiles import saved_at, sum_parts

IDENTITY = tl.constexpr("identity")  # as a default: Triton 3.6 takes no plain string for one
CHAIN = tl.constexpr(64)  # additions one after another: more of them cost accuracy


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
    for first in range(0, batch, CHAIN * BB):
        chain = tl.zeros([BO, BI], ACC)
        for b0 in range(first, tl.minimum(first + CHAIN * BB, batch), BB):
            b = (b0 + tl.arange(0, BB)).to(tl.int64)
            ok_l = (b < batch)[:, None] & (o < rows)[None, :]
            ok_r = (b < batch)[:, None] & (i < columns)[None, :]
            v_l = tl.load(left + b[:, None] * rows + o[None, :], mask=ok_l, other=0.0)
            v_r = tl.load(right + b[:, None] * columns + i[None, :], mask=ok_r, other=0.0)
            v_r = tl.where(ok_r, value(F, v_r), 0.0)
            chain += tl.sum(v_l[:, :, None] * v_r[:, None, :], axis=0)
        total += chain
    ok = (o < rows)[:, None] & (i < columns)[None, :]
    where = o.to(tl.int64)[:, None] * columns + i[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def column_sums(
    a, out, rows, columns, a_stride, i, ACC: tl.constexpr, BB: tl.constexpr,
    factor=None, factor_stride=0, per_factor=1, F: tl.constexpr = IDENTITY,
):  # fmt: skip
    """``out[i] = sum over rows of a[row, i]``, times ``F(factor[row // per_factor, i])`` where
    given."""
    if out is not None:
        total = tl.zeros([BB, i.shape[0]], ACC)
        for first in range(0, rows, CHAIN * BB):
            chain = tl.zeros([BB, i.shape[0]], ACC)
            for b0 in range(first, tl.minimum(first + CHAIN * BB, rows), BB):
                b = (b0 + tl.arange(0, BB)).to(tl.int64)
                ok = (b < rows)[:, None] & (i < columns)[None, :]
                v = tl.load(a + b[:, None] * a_stride + i[None, :], mask=ok, other=0.0)
                if factor is not None:
                    where = (b // per_factor)[:, None] * factor_stride + i[None, :]
                    f = tl.load(factor + where, mask=ok, other=0.0).to(ACC)
                    v = tl.where(ok, v * value(F, f), 0.0)
                chain += v
            total += chain
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
                outer_products(
                    du, z, dw2, outputs, channels, batch, pid, "identity", ACC, BB, BO, BI
                )
    elif pid < w2_tiles + w1_tiles:
        if dw1 is not None:
            outer_products(
                dh, z, dw1, hidden, channels, batch, pid - w2_tiles, "identity", ACC, BB, BO, BI
            )
    else:
        i = (pid - w2_tiles - w1_tiles) * BV + tl.arange(0, BV)
        rows, n = batch * splits, channels
        column_sums(du, db2, batch, outputs, outputs, i, ACC, BB)
        column_sums(dh, db1, batch, hidden, hidden, i, ACC, BB)
        column_sums(ds, dalpha, batch, n, n, i, ACC, BB)
        column_sums(ds, dbeta, batch, n, n, i, ACC, BB, u, outputs, 1, GATE)
        column_sums(da_parts, daffine_scale, rows, n, n, i, ACC, BB)
        column_sums(db_parts, daffine_shift, rows, n, n, i, ACC, BB)


@triton.jit(do_not_specialize=("batch", "channels", "outputs", "splits", "du_tiles"))
def half_parameters_kernel(
    dots_parts, u, beta, da_parts, db_parts,
    du, dalpha, dbeta, daffine_scale, daffine_shift,  # out, or None
    batch, channels, outputs, splits, du_tiles,
    GATE: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """What ``half_backward_kernel`` left in parts: du, by tiles of images and channels, then the
    sums over the batch."""
    pid = tl.program_id(0)
    if pid < du_tiles:
        if du is not None:
            across = tl.cdiv(channels, BV)
            image = (pid // across).to(tl.int64) * BB + tl.arange(0, BB)
            c = (pid % across) * BV + tl.arange(0, BV)
            live = image < batch
            ok = live[:, None] & (c < channels)[None, :]
            ds = sum_parts(dots_parts, image, live, splits, c, outputs, BB, BP, ACC)
            gate_in, shift = load_u(u, image, c, ok, channels, SHIFT, ACC)
            dshift = tl.zeros_like(ds)
            if SHIFT:
                dshift = sum_parts(
                    dots_parts, image, live, splits, channels + c, outputs, BB, BP, ACC
                )
            du_gate = through_gate(ds, gate_in, beta, c, channels, GATE, ACC)
            store_u(du, du_gate, dshift, image, c, ok, channels, SHIFT)
    else:
        i = (pid - du_tiles) * BV + tl.arange(0, BV)
        rows, n, o = batch * splits, channels, outputs
        column_sums(dots_parts, dalpha, rows, n, o, i, ACC, BB)
        column_sums(dots_parts, dbeta, rows, n, o, i, ACC, BB, u, o, splits, GATE)
        column_sums(da_parts, daffine_scale, rows, n, n, i, ACC, BB)
        column_sums(db_parts, daffine_shift, rows, n, n, i, ACC, BB)
