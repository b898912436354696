"""The excitation: h = W1 z + b1, u = W2 act(h) + b2, and the factors of each channel made of u.

Products are of 16 or more images at a time, each tile by one program; no image is touched.
"""

import triton
import triton.language as tl

from .access import SIZES
from .pointwise import value


@triton.jit
def load_matrix(p, i, j, rows, columns, ACC: tl.constexpr):
    """p[i, j], 0 outside."""
    where = i.to(tl.int64)[:, None] * columns + j[None, :]
    ok = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(p + where, mask=ok, other=0.0).to(ACC)


@triton.jit
def store_matrix(p, v, i, j, rows, columns):
    where = i.to(tl.int64)[:, None] * columns + j[None, :]
    ok = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(p + where, v.to(p.dtype.element_ty), mask=ok)


@triton.jit
def load_row(p, j, columns, default: tl.constexpr, ACC: tl.constexpr):
    """A parameter at ``j`` as a row, or its default where the pointer is None."""
    if p is not None:
        return tl.load(p + j, mask=j < columns, other=0.0).to(ACC)[None, :]
    else:
        return tl.zeros_like(j).to(ACC)[None, :] + default


@triton.jit
def multiply(left, right, PRECISION: tl.constexpr):
    """A product of tiles; in float64 without ``tl.dot``, which few devices have for it."""
    if left.dtype == tl.float64:
        return tl.sum(left[:, :, None] * right[None, :, :], axis=1)
    else:
        return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def zero_product(P: tl.constexpr):
    BM: tl.constexpr = P.BM
    BN: tl.constexpr = P.BN
    return tl.zeros([BM, BN], P.ACC)


@triton.jit
def product(
    a, w, i, j, batch, width, depth, F: tl.constexpr, TRANSPOSED: tl.constexpr, P: tl.constexpr
):
    """``F(a)[i, :] w[:, j]`` of ``a[batch, depth]`` and ``w[depth, width]``, or ``w[width, depth]``
    where TRANSPOSED. Each tile's product begins at 0, so that no chain of additions is long."""
    total = zero_product(P)
    for k0 in range(0, depth, P.BK):
        k = k0 + tl.arange(0, P.BK)
        left = value(F, load_matrix(a, i, k, batch, depth, P.ACC))
        if TRANSPOSED:
            right = tl.trans(load_matrix(w, j, k, width, depth, P.ACC))
        else:
            right = load_matrix(w, k, j, depth, width, P.ACC)
        total += multiply(left, right, P.PRECISION)
    return total


@triton.jit
def product_tile(tile, tiles, P: tl.constexpr):
    """The rows and columns of tile number ``tile``, of ``tiles`` side by side."""
    return (tile // tiles) * P.BM + tl.arange(0, P.BM), (tile % tiles) * P.BN + tl.arange(0, P.BN)


@triton.jit(do_not_specialize=SIZES)
def hidden_kernel(z, w1, b1, h, batch, channels, hidden, tiles, P: tl.constexpr):
    """h = W1 z + b1, before the activation."""
    i, r = product_tile(tl.program_id(0), tiles, P)
    v = product(z, w1, i, r, batch, hidden, channels, "identity", True, P)
    store_matrix(h, v + load_row(b1, r, hidden, 0.0, P.ACC), i, r, batch, hidden)


@triton.jit
def scale_of(u, alpha, beta, GATE: tl.constexpr):
    """alpha + beta gate(u), alpha and beta being rows or None."""
    scale = value(GATE, u)
    if beta is not None:
        scale *= beta
    if alpha is not None:
        scale += alpha
    return scale


@triton.jit
def store_factors(u, shifts, alpha, beta, factors, i, c, batch, channels, F: tl.constexpr):
    """Scale and shift of each channel, ``[1 or 2, B, C]``, from the pre-gate and the shift: from
    the latter where ``shifts``."""
    if shifts:
        store_matrix(factors + batch.to(tl.int64) * channels, u, i, c, batch, channels)
    else:
        alphas = None if alpha is None else load_row(alpha, c, channels, 0.0, u.dtype)
        betas = None if beta is None else load_row(beta, c, channels, 1.0, u.dtype)
        store_matrix(factors, scale_of(u, alphas, betas, F.gate), i, c, batch, channels)


@triton.jit(do_not_specialize=SIZES)
def gates_kernel(
    inner,  # [B, depth]: h, or z where there is a single layer
    w2, b2, alpha, beta,
    u, factors,  # out: [B, outputs] or None, [outputs / C, B, C]
    batch, channels, outputs, depth, tiles,
    ACTIVATION: tl.constexpr, F: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """u = W2 act(inner) + b2 and the factors. Tiles of the shift follow those of the gates."""
    program = tl.program_id(0)
    programs = tl.cdiv(batch, P.BM) * tiles
    shifts = program >= programs
    i, c = product_tile(tl.where(shifts, program - programs, program), tiles, P)
    row0 = tl.where(shifts, channels, 0)
    w2 += row0.to(tl.int64) * depth
    v = product(inner, w2, i, c, batch, channels, depth, ACTIVATION, True, P)
    if b2 is not None:
        v += load_row(b2 + row0, c, channels, 0.0, P.ACC)
    if u is not None:
        where = i.to(tl.int64)[:, None] * outputs + (row0 + c)[None, :]
        tl.store(u + where, v, mask=(i < batch)[:, None] & (c < channels)[None, :])
    store_factors(v, shifts, alpha, beta, factors, i, c, batch, channels, F)


@triton.jit(do_not_specialize=SIZES)
def factors_kernel(
    u, alpha, beta, factors, batch, channels, outputs, tiles, F: tl.constexpr, P: tl.constexpr
):
    """The factors where u is given."""
    program = tl.program_id(0)
    programs = tl.cdiv(batch, P.BM) * tiles
    shifts = program >= programs
    i, c = product_tile(tl.where(shifts, program - programs, program), tiles, P)
    row0 = tl.where(shifts, channels, 0)
    where = i.to(tl.int64)[:, None] * outputs + (row0 + c)[None, :]
    ok = (i < batch)[:, None] & (c < channels)[None, :]
    v = tl.load(u + where, mask=ok, other=0.0).to(P.ACC)
    store_factors(v, shifts, alpha, beta, factors, i, c, batch, channels, F)
