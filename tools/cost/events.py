"""A model of a multiprocessor's time: blocks that take images one after another, each through
phases that share memory bandwidth and the schedulers.

A ceiling takes the busiest resource and forgets that phases wait for each other: a block that loads
issues little, and one that sums asks memory for nothing. Here every phase of every block takes its
share of what its neighbours leave, and the latencies between phases count in full.

Whether one block loads while its neighbour sums depends on how they fall out of step, which nothing
here knows. So there are two answers: blocks that begin together and share memory evenly stay in
step for ever; blocks that memory serves in the order in which they ask do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Assumed(NamedTuple):
    memory: float = 700e-9  # seconds until a load from memory is there
    l2: float = 270e-9  # ... from L2
    cluster_barrier: float = (
        1.2e-6  # seconds; of an exchange through L2, twice a trip there and back
    )
    grid_exchange: float = 1.5e-6
    launch: float = 2e-6  # of a kernel, until its first block runs
    warp_rate: float = (
        0.5  # instructions that one warp issues in a cycle at most, dependent ones apart
    )


DEFAULT = Assumed()


class Phase(NamedTuple):
    """What a block does for an image before it goes on.

    ``cycles`` of the multiprocessor's busiest pipe, as if the block were alone there; ``bytes`` of
    memory; ``l2_bytes`` that come from L2; ``latency`` seconds in which it does nothing. The first
    three overlap. ``in_flight`` and ``l2_in_flight`` bytes are asked of memory and of L2 at most at
    a time; 0: as many as there are.
    """

    name: str
    cycles: float = 0.0
    bytes: float = 0.0
    l2_bytes: float = 0.0
    latency: float = 0.0
    in_flight: float = 0.0
    l2_in_flight: float = 0.0


class Multiprocessor(NamedTuple):
    clock: float
    bandwidth: float  # bytes per second: its share of memory
    l2_bandwidth: float
    schedulers: int = 4


@dataclass
class _Task:
    """A phase under way."""

    phase: Phase
    most_cycles: float  # per second
    left: list[float] = field(default_factory=list)  # cycles, bytes, bytes from L2
    waits: float = 0.0
    number: int = field(default_factory=itertools.count().__next__)  # in order of beginning

    def __post_init__(self) -> None:
        self.left = [self.phase.cycles, self.phase.bytes, self.phase.l2_bytes]
        self.waits = self.phase.latency


def _rates(
    tasks: Sequence[_Task], of: Multiprocessor, assumed: Assumed, in_step: bool
) -> list[tuple[float, float, float]]:
    """Of each task, in the order of their beginning: cycles and bytes per second. What some cannot
    use goes to the others."""

    def shared(capacity: float, wanted: list[float]) -> list[float]:
        found = [0.0] * len(wanted)
        left = capacity
        for count, i in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
            found[i] = min(wanted[i], left / (len(wanted) - count))
            left -= found[i]
        return found

    cycles = shared(of.clock, [t.most_cycles if t.left[0] > 0 else 0.0 for t in tasks])

    def asked(left: float, in_flight: float, latency: float) -> float:
        if left <= 0:
            return 0.0
        return in_flight / latency if in_flight else float("inf")

    asked_memory = [asked(t.left[1], t.phase.in_flight, assumed.memory) for t in tasks]
    asked_l2 = [asked(t.left[2], t.phase.l2_in_flight, assumed.l2) for t in tasks]
    l2 = shared(of.l2_bandwidth, asked_l2)
    memory = shared(of.bandwidth, asked_memory)
    if not in_step:
        left = of.bandwidth
        for i, rate in enumerate(asked_memory):
            memory[i] = min(rate, left)
            left -= memory[i]
    return list(zip(cycles, memory, l2, strict=True))


class _Block:
    """Goes through the phases of its images; the first phase, where there are ``stages`` of it,
    runs ahead."""

    def __init__(self, phases: Sequence[Phase], images: int, stages: int, most: float) -> None:
        self.phases, self.images, self.stages, self.most = phases, images, stages, most
        self.image = 0  # in progress
        self.at = 1 if stages else 0
        self.loads = 0  # begun
        self.loaded = 0  # ended
        self.loading: _Task | None = None
        self.working: _Task | None = None

    def start(self) -> list[_Task]:
        """What runs now."""
        if self.image < self.images:
            if self.stages and self.loading is None and self.loads < min(
                self.images, self.image + self.stages
            ):  # fmt: skip
                self.loading = _Task(self.phases[0], self.most)
                self.loads += 1
            if self.working is None and (not self.stages or self.loaded > self.image):
                self.working = _Task(self.phases[self.at], self.most)
        return [t for t in (self.loading, self.working) if t]

    def end(self, task: _Task) -> None:
        if task is self.loading:
            self.loading = None
            self.loaded += 1
            return
        self.working = None
        self.at += 1
        if self.at == len(self.phases):
            self.at = 1 if self.stages else 0
            self.image += 1


def _simulated(
    phases: Sequence[Phase], images: int, blocks: int, warps: int, stages: int,
    of: Multiprocessor, assumed: Assumed, in_step: bool,
) -> float:  # fmt: skip
    most = of.clock * min(1.0, warps * assumed.warp_rate / of.schedulers)
    team = [_Block(phases, images, stages, most) for _ in range(blocks)]
    time = 0.0
    while True:
        running = [(block, task) for block in team for task in block.start()]
        if not running:
            return time
        running.sort(key=lambda pair: pair[1].number)
        rates = _rates([task for _, task in running], of, assumed, in_step)
        steps: list[float] = []
        for (_, task), rate in zip(running, rates, strict=True):
            if task.waits > 0:
                steps.append(task.waits)
            steps += [left / r for left, r in zip(task.left, rate, strict=True) if left > 0 and r]
        step = min(steps, default=0.0)
        time += step
        for (block, task), rate in zip(running, rates, strict=True):
            task.waits = max(0.0, task.waits - step)
            task.left = [
                0.0 if left - r * step <= 1e-9 * (1 + left) else left - r * step
                for left, r in zip(task.left, rate, strict=True)
            ]
            if task.waits <= 1e-15 and not any(task.left):
                block.end(task)


def seconds(
    phases: Sequence[Phase], *, images: int, blocks: int, warps: int, stages: int,
    of: Multiprocessor, in_step: bool, assumed: Assumed = DEFAULT,
) -> float:  # fmt: skip
    """Until a multiprocessor's blocks have gone through their images.

    Args:
        phases: of a block for an image; the first is its load where there are stages.
        images: that each block takes.
        blocks: on the multiprocessor.
        warps: of a block.
        stages: slices that fit at a time: the one in progress and those being loaded; 0 where
            nothing is loaded ahead.
        in_step: whether blocks stay in step with each other, see above.
    """

    def run(n: int) -> float:
        return _simulated(phases, n, blocks, warps, stages, of, assumed, in_step)

    few, more = 4, 8
    if images <= more:
        return run(images)
    # What goes on as it has begun.
    first, second = run(few), run(more)
    return second + (images - more) * (second - first) / (more - few)
