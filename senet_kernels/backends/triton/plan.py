"""How a call is cut into launches and programs, and why: plain numbers, cached by shape.

Needs no Triton. The numbers follow from hardware limits and from machine code, not yet run on a
GPU: a block of 128 threads has one access of 16 bytes per thread in a tile, and several tiles in
flight.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

#: Threads of a warp, as tiles are laid out. (AMD's may have 64: tiles of a block then fit two.)
_LANES = 32
_WARPS = 4
# As if a block had so many, where each operation of a program costs the interpreter the same.
_INTERPRETED_WARPS = 32
# Tiles in flight, best first: maps of 7 * 2^k positions take 7 or 13 steps of 2^k. More of 16 bytes
# for each thread would leave room for fewer than eight blocks.
_STEPS, _WIDE_STEPS = (13, 7, 4, 2, 1), (7, 4, 2, 1)
# In fp64, or where pointwise steps need many registers.
_CROWDED_STEPS = (4, 2, 1)
# Channels-last, the widest tile.
_MOST_CHANNELS = 256
# Programs per multiprocessor below which an image's positions are shared.
_WANTED = 4
#: Images and outputs of a tile of a product, and how many terms at a time.
PRODUCT = (16, 32, 32)
PRODUCT_FP64 = (16, 16, 8)
#: Columns of a vector that one program sums.
VECTOR = 64
#: Elements of [B, C] that one program finishes.
BLOCK = 512


class Device(NamedTuple):
    """What a plan depends on."""

    architecture: str  # as the compiler names it: sm_90, gfx942; empty for the interpreter
    multiprocessors: int

    @property
    def warps(self) -> int:
        """Of a block."""
        return _WARPS if self.architecture else _INTERPRETED_WARPS

    @property
    def capability(self) -> int:
        """Of NVIDIA's GPUs: 90 for sm_90; 0 for others."""
        name = self.architecture
        return int(name[3:]) if name.startswith("sm_") else 0


class Shape(NamedTuple):
    """The extents of a call. ``hidden`` is None for a single layer, ``outputs`` C or 2C; a half of
    the operation, which has no MLP, has None and 0. ``alignment`` divides every stride between
    images, in elements."""

    batch: int
    channels: int
    positions: int
    hidden: int | None
    outputs: int
    last: bool  # channels-last
    alignment: int = 16

    @property
    def inner(self) -> int:
        """Columns of w2."""
        return self.channels if self.hidden is None else self.hidden

    @property
    def image(self) -> int:
        return self.channels * self.positions

    @property
    def rows(self) -> tuple[int, int]:
        """Outer and inner extent: adjacent elements are along the latter."""
        return (self.positions, self.channels) if self.last else (self.channels, self.positions)


class TilePlan(NamedTuple):
    """How tiles walk an image."""

    outer: int  # extents of a tile, powers of two
    inner: int
    steps: int  # tiles in flight
    full: int  # of them, those that need no mask along the positions
    even: bool
    unit: int
    wide: bool
    tiles: int  # programs that share an image by channels
    splits: int  # ... and by positions
    rounds: int  # that a program walks, of ``steps`` tiles each
    warps: int

    @property
    def blocks(self) -> int:
        return self.tiles * self.splits


class FlatPlan(NamedTuple):
    """How flat vectors cover an image."""

    row: str  # "aligned": rows are whole vectors; "halves": of them; "pair": of neither
    vec: int
    block: int
    steps: int
    even: bool
    unit: int
    vectors: int
    blocks: int
    warps: int


class Plan(NamedTuple):
    """The cut of one call. ``why`` is for people."""

    sums: TilePlan
    writes: FlatPlan | TilePlan
    why: str


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def divisor(d: int) -> int:
    """What kernels divide by d with: ``n // d == (2 n * magic >> 32) >> shift`` for n < 2^31
    (Granlund and Montgomery, 1994), as ``1 << 62 | shift << 32 | magic``: a number of 64 bits,
    whatever d is."""
    d = max(1, d)
    shift = (d - 1).bit_length()
    return 1 << 62 | shift << 32 | -((-1 << (31 + shift)) // d)


def _cost(positions: int, bs: int, options: tuple[int, ...]) -> float:
    """Of walking positions by tiles of ``bs``, in positions; a mask on every tile costs a fifth."""
    count = max(1, ceil_div(positions, bs))
    steps = _steps(count, options)
    rounds = ceil_div(count, steps)
    masked = rounds > 1 and positions % (steps * bs) > 0
    return rounds * (steps + 1) * bs * (1.2 if masked else 1.0)


def _steps(count: int, options: tuple[int, ...]) -> int:
    """Tiles in flight, of ``count`` along the positions: few in vain, and then many."""
    # A round costs about as much as one more tile.
    return min(options, key=lambda n: ceil_div(count, n) * (n + 1))


def tile_plan(
    shape: Shape, itemsize: int, device: Device, *, crowded: bool = False, lengths: bool = False,
    in_flight: bool = True,
) -> TilePlan:  # fmt: skip
    """Tiles of one 16-byte access per thread where rows are aligned. ``crowded``: elements need
    many registers. Without ``in_flight`` a tile is used before the next is loaded."""
    outer, inner = shape.rows
    unit = math.gcd(inner, shape.alignment, 16) or 1
    vec = min(16 // itemsize, unit)
    wide_access = vec * itemsize == 16
    # Eight lanes of a row, 128 bytes; a byte of the bit mask has eight bits.
    bi = max(8, min((8 if wide_access else 4) * vec, power_of_two(inner)))
    warps = device.warps
    wanted = _WANTED * device.multiprocessors
    # Several rows for each thread where an access is of few bytes.
    threads = _LANES * warps * max(1, 8 // (vec * itemsize))
    bo = max(1, threads * vec // bi)
    options: tuple[int, ...] = _WIDE_STEPS if wide_access else _STEPS
    if crowded or itemsize == 8:
        options = _CROWDED_STEPS
    if shape.last and in_flight:
        widths = [n for n in range(4) if bi << n <= min(_MOST_CHANNELS, inner) and bo >> n]
        best = min(widths or [0], key=lambda n: _cost(shape.positions, bo >> n, options))
        bi, bo = bi << best, bo >> best
    elif not shape.last:
        # Fewer rows per program where there would be too few programs.
        while device.architecture and warps > 1 and shape.batch * ceil_div(outer, bo) < wanted:
            warps, bo = warps // 2, max(1, bo // 2)
    bs, bc = (bo, bi) if shape.last else (bi, bo)
    count = max(1, ceil_div(shape.positions, bs))
    steps = _steps(count, options) if in_flight else 1
    rounds = ceil_div(count, steps)
    tiles = ceil_div(shape.channels, bc)  # none without channels
    splits = min(rounds, max(1, wanted // max(1, shape.batch * tiles)))
    rounds = ceil_div(rounds, splits)
    splits = ceil_div(ceil_div(count, steps), rounds)
    full = 0
    if not lengths and in_flight:
        if shape.positions % (steps * bs) == 0:
            full = steps
        elif count <= steps:
            full = shape.positions // bs
    reach = max(shape.image, 1) + steps * bs * (shape.channels if shape.last else 1) * 2
    return TilePlan(
        outer=bo, inner=bi, steps=steps, full=full, even=shape.channels % bc == 0, unit=unit,
        wide=reach + bc * shape.positions >= 2**31, tiles=tiles, splits=splits, rounds=rounds,
        warps=warps,
    )  # fmt: skip


def flat_plan(
    shape: Shape, itemsize: int, device: Device, *, masked: bool, crowded: bool
) -> FlatPlan | None:
    """Flat vectors of 16 bytes; None where rows are no multiples of them, or their bits in the mask
    no whole bytes. (Double precision need only be right.)"""
    vec = 8 if masked else 16 // itemsize
    _, inner = shape.rows
    unit = math.gcd(shape.image, shape.alignment, 16) or 1
    aligned = inner % vec == 0
    if (
        itemsize == 8 or unit % (16 // itemsize) or shape.image % vec
        or (shape.last and not aligned) or (masked and inner % 8) or inner < vec
        or shape.image >= 2**30
    ):  # fmt: skip
        return None
    vectors = shape.image // vec
    block = _LANES * device.warps
    count = ceil_div(vectors, block)
    options = (2, 1) if crowded else (4, 3, 2)
    steps = min(options, key=lambda n: (ceil_div(count, n) * n, -n))
    pieces = "halves" if vec == 8 and inner % 4 == 0 else "pair"
    return FlatPlan(
        row="aligned" if aligned else pieces, vec=vec, block=block, steps=steps,
        even=vectors % (block * steps) == 0, unit=unit, vectors=vectors,
        blocks=ceil_div(count, steps), warps=device.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def make_plan(
    shape: Shape, itemsize: int, device: Device, *, masked: bool, lengths: bool = False,
    crowded: bool = False, sums_in_dx: bool = False,
) -> Plan:  # fmt: skip
    """The plan of one direction of a call. ``masked``: it writes or reads the bit mask.
    ``crowded``: its pointwise steps need many registers. ``sums_in_dx``: gradients of
    ``before_affine`` are wanted, which only dx can sum."""
    sums = tile_plan(shape, itemsize, device, crowded=crowded, lengths=lengths)
    flat = (
        None if sums_in_dx else flat_plan(shape, itemsize, device, masked=masked, crowded=crowded)
    )
    if flat is not None:
        return Plan(sums, flat, "flat vectors")
    writes = tile_plan(shape, itemsize, device, in_flight=False)
    if sums_in_dx:
        why = "tiles, since the gradients of before_affine are sums over them"
    elif itemsize == 8:
        why = "tiles, since float64 need only be right"
    elif masked and shape.rows[1] % 8:
        why = f"tiles, since rows of {shape.rows[1]} elements are no whole bytes of the bit mask"
    else:
        why = f"tiles, since 16-byte vectors do not fit rows of {shape.rows[1]} elements"
    return Plan(sums, writes, why)


def is_crowded(before: str, after_again: bool) -> bool:
    """Whether the pointwise steps on an image take many registers."""
    return after_again or before in ("gelu", "gelu_tanh", "mish")


def describe(plan: Plan, launches: int) -> str:
    """How a call is cut, in words; ``launches`` where no sum is shared."""
    sums = plan.sums
    shared = f", {sums.splits} programs to a sum" if sums.splits > 1 else ""
    return (
        f"{launches + (sums.splits > 1)} launches; sums by tiles of {sums.outer} x {sums.inner}, "
        f"{sums.steps} in flight{shared}; images written by {plan.why}"
    )


def constants(plan: Plan) -> str:
    """What kernels are compiled for, which alone makes them other kernels: not how many programs
    there are. Of counts that kernels loop over, whether there is more than one."""
    words = []
    for name, cut in (("sums", plan.sums), ("writes", plan.writes)):
        if isinstance(cut, TilePlan):
            cut = cut._replace(
                tiles=min(cut.tiles, 2), splits=min(cut.splits, 2), rounds=min(cut.rounds, 2)
            )
        else:
            cut = cut._replace(vectors=0, blocks=0)
        words.append(f"{name} {cut}")
    return ", ".join(words)
