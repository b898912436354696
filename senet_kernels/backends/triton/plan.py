"""How a call is cut into programs: one readable decision per kind of call, cached.

Needs no Triton. The numbers are estimates from hardware limits, not yet run on a GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Elements of x a program holds at a time: four 16-byte vectors of bf16 for each of 128 threads.
_TILE = 4096
# For wide, small maps: fewer parts of the hidden sums to exchange, at the price of registers.
_LARGEST_TILE = 8192
# Terms of a weight product in registers at a time, of all threads and of the 32 of a warp.
_PRODUCTS = 4096
_PRODUCTS_OF_WARP = 512
# ... while two tensors are there, in the backward pass of an image on chip.
_BACKWARD_PRODUCTS = 512
# At most so many programs share an image by channels, unless their tiles would be too large with
# so few positions: each reads all the parts of all the others.
_PARTS, _FEW_POSITIONS = 16, 8
# At most so many images share a reading of the weights: more would leave _PRODUCTS too few columns.
_WALK = 8
# ... fewer where a tile is larger than most, or is moved element by element; one where both: the
# compiler would run out of registers.
_WALK_OF_OTHERS = 2
# A chain of additions longer than this costs accuracy.
_CHAIN = 64
# Elements of an image that stays in the registers of one block.
_LARGEST_RESIDENT = 8192
# Elements of weights that one block may read while the others have nothing to do.
_RESIDENT_WEIGHTS = 1 << 15
# Bytes of one position a channels-last program should have side by side.
_SLICE_BYTES = 128


class Device(NamedTuple):
    """What a plan depends on."""

    architecture: str  # as the compiler names it: sm_90, gfx942; empty for the interpreter
    multiprocessors: int


class Shape(NamedTuple):
    """The extents of a call. ``hidden`` is None for a single layer, ``outputs`` C or 2C; a half of
    the operation, which has no MLP, has None and 0."""

    batch: int
    channels: int
    positions: int
    hidden: int | None
    outputs: int
    last: bool  # channels-last
    after_again: bool = False  # whether the backward pass computes the argument of `after` again

    @property
    def inner(self) -> int:
        """The extent that programs exchange partial sums of in the forward pass."""
        if self.hidden is None:
            return self.channels if self.outputs else 0
        return self.hidden

    @property
    def image(self) -> int:
        return self.channels * self.positions

    @property
    def weights_outweigh_images(self) -> bool:
        """Whether the two weights have more elements than an image: read once per image they would
        make the kernels wait for the second-level cache."""
        return 2 * self.inner > self.positions


class Plan(NamedTuple):
    """Constants and counts of the launches over images."""

    G: int  # images per tile
    BC: int  # channels per program
    BS: int  # positions at a time
    BR: int  # hidden channels at a time
    BK: int  # parts at a time
    tiles: int  # programs that share an image by channels
    splits: int  # ... and by positions
    steps: int  # tiles a program walks, of one group of images
    programs: int
    warps: int
    W: int = 1  # groups of images that a program takes one after another, for each weight it reads
    flat: bool = False  # tiles are moved as runs of all their positions, whatever these divide by


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _clamp(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))


def _is_flat(shape: Shape, itemsize: int, bc: int) -> bool:
    """Whether rows of positions begin anywhere, but runs of ``bc`` channels at multiples of 16
    bytes. (Double precision need only be right.)"""
    vector = 16 // itemsize
    return (
        not shape.last
        and itemsize < 8
        and shape.positions % vector > 0
        and bc * shape.positions % vector == 0
        and shape.image % vector == 0
    )


@functools.lru_cache(maxsize=4096)
def make_plan(shape: Shape, itemsize: int, device: Device, tile: int = _TILE) -> Plan:
    """The plan for a call; ``itemsize`` is that of x. With ``tile`` elements at a time."""
    channels, positions = power_of_two(shape.channels), power_of_two(shape.positions)
    largest = max(tile, _LARGEST_TILE)
    if itemsize == 8:
        tile, largest = tile // 2, largest // 2
    fewest_channels = power_of_two(ceil_div(shape.channels, _PARTS))
    fewest_channels = min(channels, fewest_channels, largest // _FEW_POSITIONS)
    flat = False
    if shape.last:
        # A byte of the bit mask holds eight channels.
        bc = max(_clamp(channels, 8, _SLICE_BYTES // itemsize), fewest_channels)
        bs = _clamp(tile // bc, 1, positions)
    else:
        bs = _clamp(positions, _FEW_POSITIONS, 1024)
        bc = max(_clamp(tile // bs, 1, channels), fewest_channels)
        # Twice as many programs as elsewhere, if need be: all positions must be in the tile.
        of_flat = min(bc, largest // bs)
        if (
            _is_flat(shape, itemsize, of_flat) and positions <= bs
            and ceil_div(shape.channels, of_flat) <= 2 * _PARTS
        ):  # fmt: skip
            flat, bc = True, of_flat
        bs = _clamp(largest // bc, _FEW_POSITIONS, bs)

    # Several images in a tile that one does not fill, as long as the device stays full.
    tiles = max(1, ceil_div(shape.channels, bc))
    wanted = 4 * device.multiprocessors
    heavy = shape.weights_outweigh_images
    g, room = 1, tile // (bc * bs)
    while 2 * g <= room and g < shape.batch and shape.batch * tiles >= 2 * g * wanted:
        g *= 2
    # And several tiles for each reading of weights that outweigh an image: then half as many
    # programs will do, each has as much to wait for.
    walk, longest = 1, _WALK
    large = bc * bs > tile
    by_element = not (shape.last or flat or shape.positions * itemsize % 16 == 0)
    if large or by_element:
        # The latter would spill, by 40 to 112 bytes.
        crowded = by_element or (flat and itemsize == 4 and shape.after_again)
        longest = 1 if large and crowded else _WALK_OF_OTHERS
    while (
        heavy and g == 1 and 2 * walk <= min(longest, shape.batch)
        and 2 * shape.batch * tiles >= 2 * walk * wanted
    ):  # fmt: skip
        walk *= 2

    groups = ceil_div(shape.batch, g * walk)
    iterations = max(1, ceil_div(shape.positions, bs))
    splits = _clamp(wanted // max(1, groups * tiles), 1, min(iterations, _PARTS))
    if walk > 1:
        splits = 1
    steps = ceil_div(iterations, max(splits, ceil_div(iterations, _CHAIN)))
    splits = ceil_div(iterations, steps)

    warps = _warps(g * bc * bs, itemsize, flat or by_element or walk > 1)
    products = min(_PRODUCTS, warps * _PRODUCTS_OF_WARP)
    br = _clamp(products // (g * walk * bc), 1, power_of_two(shape.inner))
    return Plan(
        G=g,
        BC=bc,
        BS=bs,
        BR=br,
        BK=min(power_of_two(tiles * splits), 16),
        tiles=tiles,
        splits=splits,
        steps=steps,
        programs=groups * tiles * splits,
        warps=warps,
        W=walk,
        flat=flat,
    )


@functools.lru_cache(maxsize=4096)
def make_resident_plan(
    shape: Shape, itemsize: int, device: Device, *, forward: bool = True, however_few: bool = False
) -> Plan | None:
    """The plan for one launch over images, whole ones in a program; None where that is not worth
    it: a single layer, an image too large for registers, or (unless ``however_few``) few images
    with weights that one program would read for too long.

    The backward pass holds two tensors, and gives each thread half as many elements.
    """
    channels, positions = power_of_two(shape.channels), max(8, power_of_two(shape.positions))
    if shape.last:
        channels, positions = max(8, channels), power_of_two(shape.positions)
    elements = channels * positions
    largest = _LARGEST_RESIDENT if itemsize < 8 else _LARGEST_RESIDENT // 2
    weights = (shape.hidden or 0) * (shape.channels + shape.outputs)
    enough = shape.batch >= device.multiprocessors or weights <= _RESIDENT_WEIGHTS
    if not shape.hidden or elements > largest or not (enough or however_few):
        return None
    g = 1
    while 2 * g * elements <= _TILE and shape.batch >= 8 * g * device.multiprocessors:
        g *= 2
    products = _PRODUCTS if forward else _BACKWARD_PRODUCTS
    flat = _is_flat(shape, itemsize, shape.channels)
    warps = _warps(g * elements, itemsize, flat)
    return Plan(
        G=g,
        BC=channels,
        BS=positions,
        BR=_clamp(products // (g * channels), 1, power_of_two(shape.hidden)),
        BK=1,
        tiles=1,
        splits=1,
        steps=1,
        programs=ceil_div(shape.batch, g),
        warps=warps if forward else min(2 * warps, 16),
        flat=flat,
    )


class Choice(NamedTuple):
    """A plan, and whether it is one for whole images in a program."""

    plan: Plan
    resident: bool = False


def describe(choice: Choice) -> str:
    """How a call is cut, in words."""
    p, resident = choice
    if resident:
        return f"one launch over images, {p.G} on chip per program"
    images = f", {p.G * p.W} at a time" if p.G * p.W > 1 else ""
    return f"two launches over images{images}, shared by {p.tiles * p.splits} programs"


def fixed_choice(shape: Shape, itemsize: int, device: Device, forward: bool) -> Choice:
    """What a call gets unless it is tuned or pinned."""
    resident = make_resident_plan(shape, itemsize, device, forward=forward)
    if resident is not None:
        return Choice(resident, True)
    return Choice(make_plan(shape, itemsize, device))


def candidates(shape: Shape, itemsize: int, device: Device, forward: bool) -> list[Choice]:
    """What is worth timing: tiles and thread counts about those of the fixed choice, which comes
    first, both strategies, and rows where runs were chosen."""
    found = {fixed_choice(shape, itemsize, device, forward): None}
    plans = [
        Choice(make_plan(shape, itemsize, device, tile)) for tile in (_TILE // 2, _TILE, 2 * _TILE)
    ]
    resident = make_resident_plan(shape, itemsize, device, forward=forward, however_few=True)
    plans += [] if resident is None else [Choice(resident, True)]
    plans += [Choice(p._replace(flat=False), whole) for p, whole in plans if p.flat]
    for plan, of_images in plans:
        for warps in (plan.warps // 2, plan.warps, plan.warps * 2):
            if 2 <= warps <= 16:
                found[Choice(plan._replace(warps=warps), of_images)] = None
    return list(found)


def is_legal(choice: Choice, shape: Shape) -> bool:
    """Whether launches cut so are sound and reach every element of such a call."""
    plan, resident = choice
    sizes = (plan.G, plan.BC, plan.BS, plan.BR, plan.BK, plan.warps, plan.W)
    counts = (*sizes, plan.tiles, plan.splits, plan.steps, plan.programs)
    return (
        all(type(n) is int and n >= 0 for n in counts)
        and plan.flat in (False, True)
        and all(n >= 1 and n & (n - 1) == 0 for n in sizes)
        and (plan.BC if shape.last else plan.BS) % 8 == 0  # a byte of the mask has eight bits
        and plan.tiles * plan.BC >= shape.channels
        and plan.splits * plan.steps * plan.BS >= shape.positions
        # The last split has a position, or its part of the mean would be no number.
        and (plan.splits - 1) * plan.steps * plan.BS < max(1, shape.positions)
        and plan.programs == ceil_div(shape.batch, plan.G * plan.W) * plan.tiles * plan.splits
        and (plan.W == 1 or (plan.G == 1 and shape.outputs > 0 and not resident))
        and (not plan.flat or (not shape.last and plan.splits == plan.steps == 1))
        and (not resident or (bool(shape.hidden) and plan.tiles == plan.splits == plan.steps == 1))
    )


def _warps(elements: int, itemsize: int, crowded: bool = False) -> int:
    """32 elements of the accumulation type for each thread; 16 of fp64, or where threads have more
    to remember: where each element is, moved alone or in a run, or vectors of several images."""
    return _clamp(elements * (2 if itemsize == 8 or crowded else 1) // 1024, 4, 16)
