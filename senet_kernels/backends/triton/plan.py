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
# Terms of a weight product in registers at a time.
_PRODUCTS = 4096
# At most so many programs share an image by channels: each reads all the parts of all the others.
_PARTS = 16
# A chain of additions longer than this costs accuracy.
_CHAIN = 64
# Elements of an image that stays in the registers of one program.
_LARGEST_RESIDENT = 8192
# Elements of weights that one program may read while the others have nothing to do.
_RESIDENT_WEIGHTS = 1 << 15
# Bytes of one position a channels-last program should have side by side.
_SLICE_BYTES = 128


class Device(NamedTuple):
    """What a plan depends on."""

    capability: tuple[int, int]
    multiprocessors: int


class Shape(NamedTuple):
    """The extents of a call. ``hidden`` is 0 for a single layer, ``outputs`` C or 2C."""

    batch: int
    channels: int
    positions: int
    hidden: int
    outputs: int
    last: bool  # channels-last

    @property
    def inner(self) -> int:
        """The extent that programs exchange partial sums of in the forward pass."""
        return self.hidden or self.channels

    @property
    def image(self) -> int:
        return self.channels * self.positions


class Plan(NamedTuple):
    """Constants and counts of the launches over images."""

    G: int  # images per program
    BC: int  # channels per program
    BS: int  # positions at a time
    BR: int  # hidden channels at a time
    BK: int  # parts at a time
    tiles: int  # programs that share an image by channels
    splits: int  # ... and by positions
    steps: int  # tiles a program walks
    programs: int
    warps: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def _clamp(n: int, low: int, high: int) -> int:
    return max(low, min(n, high))


@functools.lru_cache(maxsize=4096)
def make_plan(shape: Shape, itemsize: int, device: Device, tile: int = _TILE) -> Plan:
    """The plan for a call; ``itemsize`` is that of x. With ``tile`` elements at a time."""
    channels, positions = power_of_two(shape.channels), power_of_two(shape.positions)
    largest = max(tile, _LARGEST_TILE)
    if itemsize == 8:
        tile, largest = tile // 2, largest // 2
    fewest_channels = min(channels, power_of_two(ceil_div(shape.channels, _PARTS)))
    if shape.last:
        # A byte of the bit mask holds eight channels.
        bc = max(_clamp(channels, 8, _SLICE_BYTES // itemsize), fewest_channels)
        bs = _clamp(tile // bc, 1, positions)
    else:
        bs = _clamp(positions, 8, 1024)
        bc = max(_clamp(tile // bs, 1, channels), fewest_channels)
        bs = _clamp(largest // bc, 8, bs)

    # Several images per program where one does not fill it, and where the weights outweigh it,
    # as long as the device stays full.
    tiles = max(1, ceil_div(shape.channels, bc))
    wanted = 4 * device.multiprocessors
    heavy = 4 * shape.hidden > shape.positions
    g, room = 1, (largest if heavy else tile) // (bc * bs)
    while 2 * g <= room and g < shape.batch and shape.batch * tiles >= 2 * g * wanted:
        g *= 2

    groups = ceil_div(shape.batch, g)
    iterations = max(1, ceil_div(shape.positions, bs))
    splits = _clamp(wanted // max(1, groups * tiles), 1, min(iterations, _PARTS))
    steps = ceil_div(iterations, max(splits, ceil_div(iterations, _CHAIN)))
    splits = ceil_div(iterations, steps)

    br = _clamp(_PRODUCTS // (g * bc), 1, power_of_two(shape.inner))
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
        warps=_warps(g * bc * bs, itemsize),
    )


@functools.lru_cache(maxsize=4096)
def make_resident_plan(
    shape: Shape, itemsize: int, device: Device, *, however_few: bool = False
) -> Plan | None:
    """The plan for a forward pass in one launch, whole images in a program; None where that is
    not worth it: a single layer, an image too large for registers, or (unless ``however_few``)
    few images with weights that one program would read for too long."""
    channels, positions = power_of_two(shape.channels), max(8, power_of_two(shape.positions))
    if shape.last:
        channels, positions = max(8, channels), power_of_two(shape.positions)
    elements = channels * positions
    largest = _LARGEST_RESIDENT if itemsize < 8 else _LARGEST_RESIDENT // 2
    weights = shape.hidden * (shape.channels + shape.outputs)
    enough = shape.batch >= device.multiprocessors or weights <= _RESIDENT_WEIGHTS
    if not shape.hidden or elements > largest or not (enough or however_few):
        return None
    g = 1
    while 2 * g * elements <= _TILE and shape.batch >= 8 * g * device.multiprocessors:
        g *= 2
    return Plan(
        G=g,
        BC=channels,
        BS=positions,
        BR=_clamp(_PRODUCTS // (g * channels), 1, power_of_two(shape.hidden)),
        BK=1,
        tiles=1,
        splits=1,
        steps=1,
        programs=ceil_div(shape.batch, g),
        warps=_warps(g * elements, itemsize),
    )


class Choice(NamedTuple):
    """A plan, and whether it is one for whole images in a program."""

    plan: Plan
    resident: bool = False


def fixed_choice(shape: Shape, itemsize: int, device: Device, forward: bool) -> Choice:
    """What a call gets unless it is tuned or pinned."""
    resident = make_resident_plan(shape, itemsize, device) if forward else None
    if resident is not None:
        return Choice(resident, True)
    return Choice(make_plan(shape, itemsize, device))


def candidates(shape: Shape, itemsize: int, device: Device, forward: bool) -> list[Choice]:
    """What is worth timing: tiles and thread counts about those of the fixed choice, which comes
    first, and in the forward pass both strategies."""
    found = {fixed_choice(shape, itemsize, device, forward): None}
    plans = [
        Choice(make_plan(shape, itemsize, device, tile)) for tile in (_TILE // 2, _TILE, 2 * _TILE)
    ]
    if forward:
        resident = make_resident_plan(shape, itemsize, device, however_few=True)
        plans += [] if resident is None else [Choice(resident, True)]
    for plan, of_images in plans:
        for warps in (plan.warps // 2, plan.warps, plan.warps * 2):
            if 2 <= warps <= 16:
                found[Choice(plan._replace(warps=warps), of_images)] = None
    return list(found)


def is_legal(choice: Choice, shape: Shape) -> bool:
    """Whether launches cut so are sound and reach every element of such a call."""
    plan = choice.plan
    sizes = (plan.G, plan.BC, plan.BS, plan.BR, plan.BK, plan.warps)
    return (
        all(type(n) is int and n >= 0 for n in plan)
        and all(n >= 1 and n & (n - 1) == 0 for n in sizes)
        and (plan.BC if shape.last else plan.BS) % 8 == 0  # a byte of the mask has eight bits
        and plan.tiles * plan.BC >= shape.channels
        and plan.splits * plan.steps * plan.BS >= shape.positions
        # The last split has a position, or its part of the mean would be no number.
        and (plan.splits - 1) * plan.steps * plan.BS < max(1, shape.positions)
        and plan.programs == ceil_div(shape.batch, plan.G) * plan.tiles * plan.splits
        and (
            not choice.resident
            or (shape.hidden > 0 and plan.tiles == plan.splits == plan.steps == 1)
        )
    )


def _warps(elements: int, itemsize: int) -> int:
    """32 elements of the accumulation type for each thread, or 16 of fp64."""
    return _clamp(elements * (2 if itemsize == 8 else 1) // 1024, 4, 16)
