"""The price of a kernel: what it takes of a card, which resource binds, and what the model of
events expects."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .cards import Card, occupancy
from .events import DEFAULT, Assumed, Multiprocessor, Phase, seconds
from .pipes import Use
from .profile import PHASES, LoopCount

BATCH = 256


class Work(NamedTuple):
    """What one launch does, whichever backend it is of.

    ``uses`` by phase, ``once`` of the whole launch beside that, in warps' cycles, are of all blocks
    of a group for one image; ``moves`` and ``l2`` bytes of memory and of L2 by phase for one image.
    """

    kernel: str
    uses: dict[str, Use]
    once: Use
    groups: int  # of blocks, each of which takes some of the images
    blocks: int  # of a group
    threads: int
    shared: int  # bytes per block
    registers: int
    spills: int
    images: int  # in all
    moves: dict[str, float]
    l2: dict[str, float]
    latency: dict[str, float]  # seconds in a phase in which a block does nothing
    in_flight: dict[str, float]  # bytes that a block asks memory for at a time
    l2_in_flight: dict[str, float]  # ... and L2
    stages: int
    loops: list[LoopCount]
    narrow: float

    @property
    def per_image(self) -> Use:
        total = Use(0)
        for of_phase in self.uses.values():
            total = total.plus(of_phase)
        return total

    @property
    def total(self) -> Use:
        return Use(0).plus(self.per_image, self.images).plus(self.once, self.groups)


class Price(NamedTuple):
    """Seconds, of the whole batch, on one card."""

    occupancy: int  # blocks per multiprocessor
    limits: dict[str, float]  # if nothing but that resource counted
    expected: tuple[float, float]  # with blocks in step, and not: see .events


def limits(work: Work, card: Card) -> dict[str, float]:
    """Seconds by resource, with perfect balance and overlap."""
    total = work.total
    per_scheduler = card.clock * card.schedulers * card.multiprocessors
    return {
        "memory": work.images * sum(work.moves.values()) / card.copy_speed,
        "issue": total.issue / per_scheduler,
        "ALU": total.alu / per_scheduler,
        "FMA": total.fma / per_scheduler,
        "special functions": total.special / per_scheduler,
        "loads and stores": total.memory / (card.clock * card.multiprocessors),
        "L2": work.images * sum(work.l2.values()) / card.l2_speed,
    }


def cycles(use: Use, schedulers: int) -> float:
    """Of a multiprocessor, for what its warps do: the busiest pipe."""
    return max(max(use.issue, use.alu, use.fma, use.special) / schedulers, use.memory)


def price(work: Work, card: Card, assumed: Assumed = DEFAULT) -> Price:
    each = max(1, occupancy(card, work.registers, work.threads, work.shared))
    grid = work.groups * work.blocks
    at_a_time = min(grid, each * card.multiprocessors)
    busy = min(card.multiprocessors, at_a_time)
    together = math.ceil(at_a_time / busy)
    waves = math.ceil(grid / at_a_time)
    of = Multiprocessor(card.clock, card.copy_speed / busy, card.l2_speed / busy, card.schedulers)
    phases = [
        Phase(
            name,
            cycles(work.uses.get(name, Use(0)), card.schedulers) / work.blocks,
            work.moves.get(name, 0.0) / work.blocks,
            work.l2.get(name, 0.0) / work.blocks,
            work.latency.get(name, 0.0),
            work.in_flight.get(name, 0.0),
            work.l2_in_flight.get(name, 0.0),
        )
        for name in PHASES
        if name == "load" or name in work.uses
    ]
    phases = [p for p in phases if p.name == "load" or any(p[1:])]
    if not work.stages:
        phases = [p for p in phases if any(p[1:])]
    images = math.ceil(work.images / work.groups)
    slow, fast = (
        seconds(
            phases, images=images * waves, blocks=together, warps=math.ceil(work.threads / 32),
            stages=work.stages, of=of, in_step=in_step, assumed=assumed,
        )
        for in_step in (True, False)
    )  # fmt: skip
    once = cycles(work.once, card.schedulers) / work.blocks * together / card.clock
    start = assumed.launch + once
    return Price(each, limits(work, card), (start + slow, start + fast))


def row(
    works: list[Work], card: Card, passes: int, x_bytes: float, assumed: Assumed = DEFAULT
) -> dict[str, Any]:
    """A line of the record: launches of one pass over a layer, one after another.

    Args:
        passes: how often the bytes of x are moved at least: 2 forward, 3 backward.
        x_bytes: of x, all images.
    """
    prices = [price(work, card, assumed) for work in works]
    copy = passes * x_bytes / card.copy_speed
    totals = {name: sum(p.limits[name] for p in prices) for name in prices[0].limits}
    binds = max(totals, key=totals.__getitem__)
    vectors = x_bytes / 16 / 32  # of a warp
    per_vector = {
        phase: [round(sum(w.uses.get(phase, Use(0))[i] * w.images for w in works) / vectors, 2)
                for i in range(len(Use._fields))]
        for phase in PHASES
        if any(phase in w.uses and w.uses[phase].issue for w in works)
    }  # fmt: skip
    expected = [sum(p.expected[i] for p in prices) for i in (0, 1)]
    issue = sum(w.total.issue for w in works) / vectors
    return {
        "kernels": [
            {
                "kernel": w.kernel, "registers": w.registers, "spilled_bytes": w.spills,
                "threads": w.threads, "shared": w.shared, "blocks": w.blocks * w.groups,
                "blocks_per_multiprocessor": p.occupancy, "narrow_accesses": round(w.narrow, 4),
                "loads_before_use": {x.name: [x.loads, x.of] for x in reversed(w.loops)},
                "expected_us": [round(t * 1e6, 2) for t in p.expected],
            }
            for w, p in zip(works, prices, strict=True)
        ],
        "instructions_per_vector": round(issue, 2),
        "slots_per_vector": round(card.slots_per_vector(passes), 1),
        "per_vector": per_vector,
        "bytes_moved": round(sum(w.images * sum(w.moves.values()) for w in works)),
        "bytes_from_l2": round(sum(w.images * sum(w.l2.values()) for w in works)),
        "copy_us": round(copy * 1e6, 2),
        "limits_us": {name: round(t * 1e6, 2) for name, t in totals.items()},
        "binds": binds,
        "ceiling": round(copy / max(totals.values()), 4),
        "expected_us": [round(t * 1e6, 2) for t in expected],
        "expected": [round(copy / t, 4) for t in expected],
    }  # fmt: skip
