"""How programs find their part of an image, and the elements of a block in it.

An image is ``outer`` rows of ``inner`` adjacent elements: channels of positions, or (``LAST``,
channels-last) positions of channels. There are two kinds of blocks:

* a tile, ``[BO, BI]``: BO outer by BI inner indices. The sums walk tiles along the positions.
* flat vectors, ``[BLOCK, VEC]``: BLOCK runs of VEC adjacent elements (16 bytes), whatever rows they
  belong to. What writes an image takes these where vectors are aligned.

Extents and strides are counted in units of 1 to 16 elements, the unit being a constant: so the
compiler knows as much about alignment as is true, without a build per extent.
"""

from typing import NamedTuple

import triton
import triton.language as tl

#: Integers that kernels are not compiled anew for.
SIZES = (
    "batch", "channels", "positions", "inner_units", "extent", "hidden", "outputs", "width",
    "depth", "x_stride", "dy_stride", "y_stride", "residual_stride", "mask_stride", "blocks",
    "per_image", "tiles", "splits", "rounds", "vectors", "per_row", "rows", "dz_tiles",
    "w2_tiles", "w1_tiles",
)  # fmt: skip


class Functions(NamedTuple):
    """The pointwise steps of a call. ``approx`` is how a sigmoid is computed where images are
    streamed, see :mod:`.pointwise`."""

    activation: tl.constexpr
    gate: tl.constexpr
    before: tl.constexpr
    after: tl.constexpr
    approx: tl.constexpr


class Tile(NamedTuple):
    """Constants of kernels that walk an image by tiles."""

    LAST: bool
    BO: int
    BI: int
    STEPS: int  # tiles that are loaded before the first is used
    FULL: int  # so many of them need no mask along the positions
    EVEN: bool  # channels are a multiple of the tile's
    UNIT: int  # divides the inner extent and every stride between images
    WIDE: bool  # offsets within an image pass 32 bits
    SPLIT: bool  # several programs share a sum
    ACC: tl.dtype


class Flat(NamedTuple):
    """Constants of kernels that take an image as flat vectors."""

    LAST: bool
    ROW: (
        str  # how vectors lie in rows: "aligned"; "halves", which are; "pair": a row may end inside
    )
    VEC: int
    BLOCK: int
    STEPS: int  # blocks that are loaded before the first is used
    EVEN: bool  # vectors of an image are a multiple of a program's
    UNIT: int
    ACC: tl.dtype


@triton.jit
def divide(n, divisor):
    """``n // d`` for 0 <= n < 2^31; ``divisor`` is :func:`.plan.divisor` of d."""
    magic = (divisor & 0xFFFFFFFF).to(tl.uint32)
    shift = ((divisor >> 32) & 31).to(tl.uint32)
    return (tl.umulhi(n.to(tl.uint32) * 2, magic) >> shift).to(tl.int32)


@triton.jit
def locate(per_image, blocks):
    """This program's image, in 64 bits, and its number among the ``blocks`` of the image."""
    program = tl.program_id(0)
    image = divide(program, per_image)
    return image.to(tl.int64), program - image * blocks


@triton.jit
def mean_extent(lengths, image, positions):
    """Up to which position an image counts in the mean, and how many do (0 if out of range)."""
    end = positions
    n = positions
    if lengths is not None:
        length = tl.load(lengths + image)
        right = (length >= 0) & (length <= positions)
        n = tl.where(right, length, 0).to(tl.int32)
        end = tl.minimum(tl.maximum(length, 0), positions).to(tl.int32)
    return end, n


# -- tiles -----------------------------------------------------------------------------------------


@triton.jit
def tile_channels(c0, T: tl.constexpr):
    """The channels of a tile that begins at ``c0``."""
    return c0 + tl.arange(0, T.BI if T.LAST else T.BO)


@triton.jit
def tile_positions(s0, T: tl.constexpr):
    """The positions of a tile that begins at ``s0``."""
    return s0 + tl.arange(0, T.BO if T.LAST else T.BI)


@triton.jit
def zero_tile(T: tl.constexpr):
    BO: tl.constexpr = T.BO
    BI: tl.constexpr = T.BI
    return tl.zeros([BO, BI], T.ACC)


@triton.jit
def across(v, T: tl.constexpr):
    """A number per channel, as a row or column of a tile."""
    return v[None, :] if T.LAST else v[:, None]


@triton.jit
def along(v, T: tl.constexpr):
    """A number per position, as a column or row of a tile."""
    return v[:, None] if T.LAST else v[None, :]


@triton.jit
def tile_offsets(c, s, inner, T: tl.constexpr):
    """Offsets in an image of a tile's elements."""
    if T.WIDE:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    if T.LAST:
        return s[:, None] * inner + c[None, :]
    else:
        return c[:, None] * inner + s[None, :]


@triton.jit
def position_step(inner, T: tl.constexpr):
    """How many elements lie between a tile and the next one along the positions."""
    if T.LAST:
        step = inner * T.BO
        if T.WIDE:
            step = inner.to(tl.int64) * T.BO
    else:
        step = T.BI
    return step


@triton.jit
def inside(c, s, channels, end, full: tl.constexpr, T: tl.constexpr):
    """The mask of a tile: a constant, which the compiler drops, where all of it is known to be
    inside. (Triton 3.6 returns no None.)"""
    if full and T.EVEN:
        return tl.full([1, 1], 1, tl.int1)
    elif full:
        return across(c < channels, T)
    elif T.EVEN:
        return along(s < end, T)
    else:
        return along(s < end, T) & across(c < channels, T)


@triton.jit
def load_block(pointer, offsets, ok):
    """Elements of an image as they are, 0 outside."""
    return tl.load(pointer + offsets, mask=ok, other=0.0)


@triton.jit
def per_channel(pointer, c, channels, default: tl.constexpr, ACC: tl.constexpr):
    """A parameter at channels ``c``, or its default where the pointer is None."""
    if pointer is not None:
        return tl.load(pointer + c, mask=c < channels, other=0.0).to(ACC)
    else:
        return tl.zeros_like(c).to(ACC) + default


@triton.jit
def over_positions(total, T: tl.constexpr):
    """A tile's sum over positions: a number per channel."""
    return tl.sum(total, axis=0 if T.LAST else 1)


@triton.jit
def tile_mask_bytes(mask, c, s, c0, s0, channels, positions, T: tl.constexpr):
    """Pointers to the bytes with the bits of the tile at ``(c0, s0)``, and which there are: the
    image's rows are padded to whole bytes."""
    if T.LAST:
        o, byte, outer, inner = s, c0 // 8, positions, channels
    else:
        o, byte, outer, inner = c, s0 // 8, channels, positions
    row_bytes = (inner + 7) // 8
    byte += tl.arange(0, T.BI // 8)
    ok = (o < outer)[:, None] & (byte < row_bytes)[None, :]
    if T.WIDE:
        o = o.to(tl.int64)
    return mask + (o[:, None] * row_bytes + byte[None, :]), ok


@triton.jit
def load_tile_mask(mask, c, s, c0, s0, channels, positions, T: tl.constexpr):
    """Whether ``after="relu"`` let the elements of a tile through."""
    at, ok = tile_mask_bytes(mask, c, s, c0, s0, channels, positions, T)
    packed = tl.load(at, mask=ok, other=0).to(tl.int32)
    bits = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
    BO: tl.constexpr = T.BO
    BI: tl.constexpr = T.BI
    return tl.reshape(bits & 1, [BO, BI]) != 0


@triton.jit
def store_tile_mask(keep, mask, c, s, c0, s0, channels, positions, T: tl.constexpr):
    """A bit per element of a tile; those outside of the image are 0."""
    if T.LAST:
        keep = keep & (c < channels)[None, :]
    else:
        keep = keep & (s < positions)[None, :]
    BO: tl.constexpr = T.BO
    BYTES: tl.constexpr = T.BI // 8
    bits = tl.reshape(keep.to(tl.int32), [BO, BYTES, 8]) << tl.arange(0, 8)[None, None, :]
    at, ok = tile_mask_bytes(mask, c, s, c0, s0, channels, positions, T)
    tl.store(at, tl.sum(bits, axis=2).to(tl.uint8), mask=ok)


# -- flat vectors ----------------------------------------------------------------------------------


@triton.jit
def zero_vectors(T: tl.constexpr):
    BLOCK: tl.constexpr = T.BLOCK
    VEC: tl.constexpr = T.VEC
    return tl.zeros([BLOCK, VEC], T.ACC)


@triton.jit
def flat_vectors(block, T: tl.constexpr):
    """Numbers of a block's vectors, and the offsets of their elements."""
    v = block * T.BLOCK + tl.arange(0, T.BLOCK)
    return v, v[:, None] * T.VEC + tl.arange(0, T.VEC)[None, :]


@triton.jit
def flat_inside(v, vectors, T: tl.constexpr):
    """The mask of vectors, a constant where all of them are known to be inside."""
    if T.EVEN:
        return tl.full([1, 1], 1, tl.int1)
    else:
        return (v < vectors)[:, None]


@triton.jit
def flat_rows(v, per_row, extent, T: tl.constexpr):
    """Where vectors lie. Channels-last: their first channel and position. Else: the first channel,
    and the position of the first element; or of both halves. ``extent`` is the inner one."""
    if T.LAST:
        s = divide(v, per_row)  # of vectors in a row
        return (v - s * (extent // T.VEC)) * T.VEC, s
    else:
        e = v * T.VEC
        if T.ROW == "halves":
            e = e[:, None] + tl.arange(0, 2)[None, :] * (T.VEC // 2)
        row = divide(e, per_row)  # of elements in a row
        return row, e - row * extent


@triton.jit
def of_halves(v, T: tl.constexpr):
    """A number per half of each vector, for each element."""
    BLOCK: tl.constexpr = T.BLOCK
    VEC: tl.constexpr = T.VEC
    HALF: tl.constexpr = T.VEC // 2
    return tl.reshape(tl.broadcast_to(v[:, :, None], [BLOCK, 2, HALF]), [BLOCK, VEC])


@triton.jit
def flat_factor(pointer, row, s, extent, channels, T: tl.constexpr, times=1.0):
    """A number per channel, ``times`` another, for each element of the vectors; for those outside,
    of some channel."""
    k = tl.arange(0, T.VEC)[None, :]
    if T.LAST:
        return tl.load(pointer + (row[:, None] + k)).to(T.ACC) * times
    else:
        row = tl.minimum(row, channels - 1)
        first = tl.load(pointer + row).to(T.ACC) * times
        if T.ROW == "aligned":
            return first[:, None]
        elif T.ROW == "halves":
            return of_halves(first, T)
        else:
            second = tl.load(pointer + tl.minimum(row + 1, channels - 1)).to(T.ACC) * times
            return tl.where(k < (extent - s)[:, None], first[:, None], second[:, None])


@triton.jit
def flat_positions(s, extent, T: tl.constexpr):
    """The position of each element."""
    if T.LAST:
        return s[:, None]
    elif T.ROW == "halves":
        return of_halves(s, T) + (tl.arange(0, T.VEC) % (T.VEC // 2))[None, :]
    else:
        at = s[:, None] + tl.arange(0, T.VEC)[None, :]
        return tl.where(at >= extent, at - extent, at)
