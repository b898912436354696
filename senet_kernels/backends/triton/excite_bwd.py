"""The MLP's backward pass: dh, dz, and the parameters' gradients, each sum in a fixed order."""

import triton
import triton.language as tl

from .access import SIZES
from .excite import load_matrix, multiply, product, product_tile, store_matrix, zero_product
from .pointwise import chain, value

IDENTITY = tl.constexpr("identity")
CHAIN = tl.constexpr(64)  # additions one after another: more of them cost accuracy


@triton.jit(do_not_specialize=SIZES)
def hidden_bwd_kernel(
    du, w2, h, dh, batch, hidden, outputs, tiles, ACTIVATION: tl.constexpr, P: tl.constexpr
):
    """dh = (W2ᵀ du) act'(h)."""
    i, r = product_tile(tl.program_id(0), tiles, P)
    v = product(du, w2, i, r, batch, hidden, outputs, "identity", False, P)
    v = chain(ACTIVATION, load_matrix(h, i, r, batch, hidden, P.ACC), v)
    store_matrix(dh, v, i, r, batch, hidden)


@triton.jit
def weight_tile(
    left, right, out, tile, rows, columns, batch, ACTIVATION: tl.constexpr, P: tl.constexpr
):
    """``out[o, j] = sum over images of left[b, o] act(right[b, j])``, one tile of it."""
    o, j = product_tile(tile, tl.cdiv(columns, P.BN), P)
    total = zero_product(P)
    for first in range(0, batch, CHAIN * P.BK):
        chained = zero_product(P)
        for b0 in range(first, tl.minimum(first + CHAIN * P.BK, batch), P.BK):
            i = b0 + tl.arange(0, P.BK)
            a = tl.trans(load_matrix(left, i, o, batch, rows, P.ACC))
            b = value(ACTIVATION, load_matrix(right, i, j, batch, columns, P.ACC))
            chained += multiply(a, b, P.PRECISION)
        total += chained
    store_matrix(out, total, o, j, rows, columns)


@triton.jit
def column_sums(
    a, out, j, rows, columns, ACC: tl.constexpr,
    factor=None, width=0, F: tl.constexpr = IDENTITY, BB: tl.constexpr = 16,
):  # fmt: skip
    """``out[j] = sum over rows of a[row, j]``, times ``F(factor[row, j])`` where given, whose rows
    have ``width`` elements."""
    if out is not None:
        total = tl.zeros([BB, j.shape[0]], ACC)
        for first in range(0, rows, CHAIN * BB):
            chained = tl.zeros([BB, j.shape[0]], ACC)
            for b0 in range(first, tl.minimum(first + CHAIN * BB, rows), BB):
                i = b0 + tl.arange(0, BB)
                v = load_matrix(a, i, j, rows, columns, ACC)
                if factor is not None:
                    ok = (i < rows)[:, None] & (j < columns)[None, :]
                    where = i.to(tl.int64)[:, None] * width + j[None, :]
                    f = value(F, tl.load(factor + where, mask=ok, other=0.0).to(ACC))
                    v = tl.where(ok, v * f, 0.0)
                chained += v
            total += chained
        tl.store(out + j, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=j < columns)


@triton.jit(do_not_specialize=SIZES)
def excite_bwd_kernel(
    last,  # [B, depth]: dh, or du where there is a single layer
    w,  # W1, or W2: [depth, C]
    du, dh, inner, z, u, ds,
    dz, dw2, dw1, db2, db1, dalpha, dbeta,  # out, or None
    batch, channels, outputs, hidden, width, depth, dz_tiles, w2_tiles, w1_tiles,
    ACTIVATION: tl.constexpr, F: tl.constexpr, P: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dz = wᵀ last, and the parameters' gradients, which need no more: tiles of one launch.
    ``inner`` is h, or z where there is a single layer, of ``width`` columns."""
    tile = tl.program_id(0)
    if tile < dz_tiles:
        i, c = product_tile(tile, tl.cdiv(channels, P.BN), P)
        v = product(last, w, i, c, batch, channels, depth, "identity", False, P)
        store_matrix(dz, v, i, c, batch, channels)
    elif tile < dz_tiles + w2_tiles:
        if dw2 is not None:
            weight_tile(du, inner, dw2, tile - dz_tiles, outputs, width, batch, ACTIVATION, P)
    elif tile < dz_tiles + w2_tiles + w1_tiles:
        if dw1 is not None:
            of_w1 = tile - dz_tiles - w2_tiles
            weight_tile(dh, z, dw1, of_w1, hidden, channels, batch, "identity", P)
    else:
        j = (tile - dz_tiles - w2_tiles - w1_tiles) * BV + tl.arange(0, BV)
        column_sums(du, db2, j, batch, outputs, P.ACC)
        column_sums(dh, db1, j, batch, hidden, P.ACC)
        column_sums(ds, dalpha, j, batch, channels, P.ACC)
        column_sums(ds, dbeta, j, batch, channels, P.ACC, u, outputs, F.gate)


@triton.jit(do_not_specialize=SIZES)
def sums_kernel(
    ds, u, da_parts, db_parts,
    dalpha, dbeta, da, db,  # out, or None
    batch, channels, outputs, rows, F: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sums over the batch of what is there per channel: of a half, and for ``before_affine``."""
    j = tl.program_id(0) * BV + tl.arange(0, BV)
    column_sums(ds, dalpha, j, batch, channels, ACC)
    column_sums(ds, dbeta, j, batch, channels, ACC, u, outputs, F.gate)
    column_sums(da_parts, da, j, rows, channels, ACC)
    column_sums(db_parts, db, j, rows, channels, ACC)
