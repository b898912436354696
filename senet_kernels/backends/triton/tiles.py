"""What the kernels share: how a program's tile lies in the image, and the steps on it.

A tile is ``[G * BC, BS]``: BC channels of G images, BS positions. A program owns BC channels of
``W * G`` images, takes W such groups one after another, and walks its share of the positions. One
text serves both layouts: rows of positions (``LAST`` false) and channels-last. Extents come as a
count of units of 1 to 16, the unit being a constant: so the compiler knows as much about alignment
as is true, without a build per extent.

Rows of 49 or 196 positions begin anywhere, but channels lie one after another: where ``FLAT`` (then
the number of positions, all of which are in the tile) the tile is moved as one aligned run per
image, 16 bytes at a time, and put into rows through shared memory.
"""

import triton
import triton.language as tl

from .pointwise import value


@triton.jit
def locate(pid, tiles, splits, IMAGES: tl.constexpr, BC: tl.constexpr):
    """What program ``pid`` has, image by image: its first image and channel, tile and split."""
    split = pid % splits
    tile = (pid // splits) % tiles
    # int64, since products with it may pass 2^31.
    return (pid // splits // tiles).to(tl.int64) * IMAGES, tile * BC, tile, split


@triton.jit
def of_group(v, k, W: tl.constexpr):
    """The rows of ``[W * G, BC]`` that belong to group k of the program's images: ``[G, BC]``. A
    program has several groups only of one image each. (Loops over groups get their number as an
    argument, ``walk``: a constant one would be unrolled, which no registers suffice for.)"""
    if W > 1:
        v = tl.sum(tl.where((tl.arange(0, W) == k)[:, None], v, 0.0), axis=0)[None, :]
    return v


@triton.jit
def set_group(v, group, k, W: tl.constexpr):
    """``v`` with these rows."""
    return tl.where((tl.arange(0, W) == k)[:, None], group, v) if W > 1 else group


@triton.jit
def rows_of(G: tl.constexpr, BC: tl.constexpr):
    """Image and channel of each of the tile's rows, counted from the first: two ``[G * BC]``."""
    row = tl.arange(0, G * BC)
    return row // BC, row % BC


@triton.jit
def pointers(
    base, first_image, first_channel, s, image_stride, channels, positions,
    LAST: tl.constexpr, INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Pointers ``[rows, BS]`` to a tile of images that lie ``image_stride`` apart.

    Offsets from the tile's first row are of type INDEX, 32 bits where they fit: that halves the
    registers they take.
    """
    g, c = rows_of(G, BC)
    g, c, s = g.to(INDEX), c.to(INDEX), s.to(INDEX)
    stride = image_stride.to(INDEX)
    if LAST:
        base += first_image * image_stride + first_channel
        local = (g * stride + c)[:, None] + (s * channels.to(INDEX))[None, :]
    else:
        base += first_image * image_stride + first_channel.to(tl.int64) * positions
        local = (g * stride + c * positions.to(INDEX))[:, None] + s[None, :]
    return base + local


@triton.jit
def flat_run(
    base, first_image, first_channel, image_stride, batch, channels,
    FLAT: tl.constexpr, INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The tile as a run per image, ``[G * BC * BS]``: image and place in the run of each element,
    its pointer, and whether it is in the image."""
    i = tl.arange(0, G * BC * BS)
    g, at = i // (BC * BS), i % (BC * BS)
    there = (at < BC * FLAT) & (at < (channels - first_channel) * FLAT)
    if G > 1:
        there = there & (first_image + g < batch)
        local = g.to(INDEX) * image_stride.to(INDEX) + at
    else:
        there = there & (first_image < batch)
        local = at
    base += first_image * image_stride + first_channel.to(tl.int64) * FLAT
    return g, at, base + local, there


@triton.jit
def load_tile(
    base, first_image, first_channel, s, ok, image_stride, batch, channels, positions,
    LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``[rows, BS]`` of the accumulation type; 0 where not ``ok``."""
    BS: tl.constexpr = s.shape[0]
    if FLAT:
        g, at, where, there = flat_run(
            base, first_image, first_channel, image_stride, batch, channels, FLAT, INDEX, G, BC, BS
        )
        run = tl.load(where, mask=there, other=0.0)
        source = g * (BC * BS) + (at // BS) * FLAT + at % BS
        tile = tl.gather(run, tl.where(at % BS < FLAT, source, 0), 0)
        tile = tl.where(ok, tl.reshape(tile, [G * BC, BS]).to(ACC), 0.0)
    else:
        where = pointers(
            base, first_image, first_channel, s, image_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        tile = tl.load(where, mask=ok, other=0.0).to(ACC)
    return tile


@triton.jit
def store_tile(
    base, tile, first_image, first_channel, s, ok, image_stride, batch, channels, positions,
    LAST: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes ``[rows, BS]`` in the type of the image."""
    BS: tl.constexpr = s.shape[0]
    tile = tile.to(base.dtype.element_ty)
    if FLAT:
        g, at, where, there = flat_run(
            base, first_image, first_channel, image_stride, batch, channels, FLAT, INDEX, G, BC, BS
        )
        source = g * (BC * BS) + (at // FLAT) * BS + at % FLAT
        source = tl.where(at < BC * FLAT, source, 0)
        run = tl.gather(tl.reshape(tile, [G * BC * BS]), source, 0)
        tl.store(where, run, mask=there)
    else:
        where = pointers(
            base, first_image, first_channel, s, image_stride, channels, positions,
            LAST, INDEX, G, BC,
        )  # fmt: skip
        tl.store(where, tile, mask=ok)


@triton.jit
def per_channel(pointer, c, channels, DEFAULT: tl.constexpr, ACC: tl.constexpr):
    """A parameter at channels ``c``, or its default where the pointer is None."""
    if pointer is not None:
        v = tl.load(pointer + c, mask=c < channels, other=DEFAULT).to(ACC)
    else:
        v = tl.zeros_like(c).to(ACC) + DEFAULT
    return v


@triton.jit
def per_row(v, ROWS: tl.constexpr):
    """``[G, BC] -> [G * BC, 1]``."""
    return tl.reshape(v, [ROWS])[:, None]


@triton.jit
def prologue(raw, scale, shift, AFFINE: tl.constexpr, BEFORE: tl.constexpr):
    """q and p of the elements loaded, ``raw``, already of the accumulation type."""
    q = raw
    if AFFINE:
        q = raw * scale[:, None] + shift[:, None]
    return q, value(BEFORE, q)


@triton.jit
def mean_divisor(lengths, image, live, positions, ACC: tl.constexpr):
    """Per image: up to where positions count, and how many do (0 for a length out of range)."""
    if lengths is not None:
        end = tl.load(lengths + image, mask=live, other=0)
        n = tl.where((end >= 0) & (end <= positions), end, 0)
    else:
        end = tl.zeros_like(image) + positions
        n = end
    return end, n.to(ACC)


@triton.jit
def sum_parts(
    pointer, image, live, parts, r, extent, G: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):
    """``[G, len(r)]``: what ``parts`` programs left in ``[B, parts, extent]``, in their order."""
    total = tl.zeros([G, BK, r.shape[0]], ACC)
    for k0 in range(0, parts, BK):
        k = k0 + tl.arange(0, BK)
        where = (image[:, None] * parts + k[None, :])[:, :, None] * extent + r[None, None, :]
        there = (live[:, None] & (k < parts)[None, :])[:, :, None] & (r < extent)[None, None, :]
        total += tl.load(pointer + where, mask=there, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def outgoing(
    p, scale, shift, residual, first_image, first_channel, s, ok, residual_stride,
    batch, channels, positions,
    SHIFT: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What goes into ``after``: p scale + shift + residual."""
    pre = p * scale
    if SHIFT:
        pre += shift
    if residual is not None:
        pre += load_tile(
            residual, first_image, first_channel, s, ok, residual_stride, batch, channels,
            positions, LAST, FLAT, ACC, INDEX, G, BC,
        )  # fmt: skip
    return pre


@triton.jit
def mask_bytes(
    mask, first_image, first_channel, s0, batch, channels, positions,
    LAST: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Pointers to the bytes that have a tile's bits, and which of them there are. Rows of the
    image are padded to bytes: ``[rows, BS // 8]``, or channels-last ``[rows // 8, BS]``."""
    if LAST:
        row_bytes = (channels + 7) // 8
        g, at = rows_of(G, BC // 8)
        s = s0 + tl.arange(0, BS)
        mask += first_image * positions * row_bytes + first_channel // 8
        row = g.to(INDEX)[:, None] * positions + s.to(INDEX)[None, :]
        where = row * row_bytes + at[:, None]
        ok = ((first_image + g < batch) & (first_channel // 8 + at < row_bytes))[:, None]
        ok = ok & (s < positions)[None, :]
    else:
        row_bytes = (positions + 7) // 8
        g, c = rows_of(G, BC)
        at = s0 // 8 + tl.arange(0, BS // 8)
        mask += (first_image * channels + first_channel) * row_bytes
        where = ((g.to(INDEX) * channels + c) * row_bytes)[:, None] + at[None, :]
        ok = ((first_image + g < batch) & (first_channel + c < channels))[:, None]
        ok = ok & (at < row_bytes)[None, :]
    return mask + where, ok


@triton.jit
def store_mask(
    keep, mask, first_image, first_channel, s0, batch, channels, positions,
    LAST: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A bit per element; ``keep`` is 0 or 1."""
    if LAST:
        bits = tl.reshape(keep, [G * BC // 8, 8, BS]) << tl.arange(0, 8)[None, :, None]
        packed = tl.sum(bits, axis=1)
    else:
        bits = tl.reshape(keep, [G * BC, BS // 8, 8]) << tl.arange(0, 8)[None, None, :]
        packed = tl.sum(bits, axis=2)
    where, ok = mask_bytes(
        mask, first_image, first_channel, s0, batch, channels, positions, LAST, INDEX, G, BC, BS
    )
    tl.store(where, packed.to(tl.uint8), mask=ok)


@triton.jit
def load_mask(
    mask, first_image, first_channel, s0, batch, channels, positions,
    LAST: tl.constexpr, INDEX: tl.constexpr,
    G: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Whether ``after="relu"`` let the elements through, ``[rows, BS]``."""
    where, ok = mask_bytes(
        mask, first_image, first_channel, s0, batch, channels, positions, LAST, INDEX, G, BC, BS
    )
    packed = tl.load(where, mask=ok, other=0).to(tl.int32)
    if LAST:
        bits = packed[:, None, :] >> tl.arange(0, 8)[None, :, None]
    else:
        bits = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, [G * BC, BS]) != 0


@triton.jit
def make_scale(gate_in, alpha, beta, of_channel, channels, GATE: tl.constexpr, ACC: tl.constexpr):
    """scale = alpha + beta gate(u) of the program's channels, ``[G, BC]``."""
    scale = value(GATE, gate_in)
    if beta is not None:
        scale *= per_channel(beta, of_channel, channels, 1.0, ACC)[None, :]
    if alpha is not None:
        scale += per_channel(alpha, of_channel, channels, 0.0, ACC)[None, :]
    return scale


@triton.jit
def saved_at(batch, channels, hidden, TWO_LAYERS: tl.constexpr):
    """Where in ``saved`` the hidden pre-activation and u begin: z ``[B, C]``, then ``[B, R]`` for
    two layers, then ``[B, outputs]``."""
    h_at = batch.to(tl.int64) * channels
    u_at = h_at
    if TWO_LAYERS:
        u_at += batch.to(tl.int64) * hidden
    return h_at, u_at
