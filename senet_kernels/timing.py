"""Time of a step with and without ``fuse_se_blocks``, and what else ran meanwhile."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .convert import unfuse_se_blocks
from .parity import tensors


def infer(model: nn.Module, x: Tensor) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    """A forward and a backward pass, of the sum of all outputs that have gradients.

    Raises:
        RuntimeError: none has.
    """
    outputs = [y for y in tensors(model(x)) if y.requires_grad]
    if not outputs:
        raise RuntimeError("no output has a gradient")
    torch.autograd.backward([y.sum() for y in outputs])
    model.zero_grad(set_to_none=True)


class OtherLoad:
    """Cores that other processes kept busy between creation and ``read``; None if unknown.

    A neighbour on the same cores makes every OpenMP barrier wait for its time slice, which turns a
    millisecond into tens: such a measurement must be told from a quiet one.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()

    def read(self) -> float | None:
        end = self._now()
        if self._start is None or end is None or end[0] - self._start[0] < 0.05:
            return None
        return max(0.0, (end[1] - self._start[1]) / (end[0] - self._start[0]))


def leave_cores(watched_s: float = 0.3) -> str | None:
    """Let PyTorch use no more threads than other processes leave cores; says so where it had to.

    With more, each operator waits for a thread that waits for its time slice: ten times as long.

    Args:
        watched_s: seconds to watch the others for.
    """
    load = OtherLoad()
    time.sleep(watched_s)
    busy, threads = load.read(), torch.get_num_threads()
    if busy is None or not is_busy(busy):
        return None
    free = max(1, round((os.cpu_count() or 1) - busy))
    if free >= threads:
        return None
    torch.set_num_threads(free)
    return f"other processes use {busy:.1f} cores: {free} instead of {threads} threads here"


class Times(NamedTuple):
    """Of a step, in seconds, and how much faster the fused model is."""

    original: float  # the median
    fused: float
    ratio: float  # original over fused: the median over the rounds
    low: float  # its interval, see summary
    high: float
    rounds: int
    cores_busy_elsewhere: float | None  # see OtherLoad


def times(
    model: nn.Module,
    x: Tensor,
    step: Callable[[nn.Module, Tensor], None],
    fuse: Callable[[nn.Module], object],
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
    spare: float = 0.0,
) -> Times:
    """A step, original and fused, turn by turn, for about ``seconds``: one round at least, and none
    begun that would not end in time. ``train`` runs in train mode.

    Where that is not enough for an interval, ``spare`` seconds more are taken, up to
    :data:`ENOUGH` rounds, but for as long as a round lasts, which is left to whoever is next.
    BatchNorm's statistics are those of before afterwards.
    """
    rounds: list[tuple[float, float]] = []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    start, others, longest = time.perf_counter(), OtherLoad(), 0.0
    while not rounds or time.perf_counter() - start + longest < _limit(
        len(rounds), seconds, spare - longest
    ):
        begin = time.perf_counter()
        turns = [(unfuse_se_blocks, 0), (fuse, 1)]
        took = [0.0, 0.0]
        # Whoever comes second finds other caches: each does in turn.
        for switch, i in turns if len(rounds) % 2 == 0 else turns[::-1]:
            # The mode first: what a module is replaced by may depend on it.
            model.train(step is train)
            switch(model)
            took[i] = _timed(model, x, step)
        rounds.append((took[0], took[1]))
        longest = max(longest, time.perf_counter() - begin)
        progress(f"round {len(rounds)}, {time.perf_counter() - start:.0f} of {seconds:.0f} s")
    fuse(model)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return summary(rounds, others.read())


#: Rounds whose interval says something.
ENOUGH = 3


def _limit(rounds: int, seconds: float, spare: float) -> float:
    """When the next round has to have ended."""
    return seconds if rounds >= ENOUGH else seconds + max(0.0, spare)


def _timed(model: nn.Module, x: Tensor, step: Callable[[nn.Module, Tensor], None]) -> float:
    """Seconds of a step, the second one after a switch: the first takes its snapshots."""
    step(model, x)
    _wait(x)
    begin = time.perf_counter()
    step(model, x)
    _wait(x)
    return time.perf_counter() - begin


#: Cores that others keep busy beside a measurement that is to be trusted.
QUIET = 0.2
#: Quantiles of Student's distribution for 95 %, by the number of samples.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def summary(rounds: list[tuple[float, float]], busy: float | None) -> Times:
    """Of rounds of (original, fused) seconds, and the cores that others kept busy.

    The interval is of 95 %: from 6 rounds on by binomial ranks, of fewer Student's, for logarithms
    of the ratios; of one round it is from 0 to infinity. Where others kept cores busy, which delays
    the two unequally, all rounds lie in it.
    """
    ratios = sorted(original / fused for original, fused in rounds)
    middle, count = statistics.median(ratios), len(ratios)
    low, high = 0.0, math.inf
    if count in _STUDENT:
        logs = [math.log(ratio) for ratio in ratios]
        reach = _STUDENT[count] * statistics.stdev(logs) / math.sqrt(count)
        low, high = (math.exp(statistics.fmean(logs) + side * reach) for side in (-1, 1))
    elif count > 1:
        left_out = _left_out(count)
        low, high = ratios[left_out], ratios[-1 - left_out]
    if count > 1 and is_busy(busy):
        low, high = min(low, ratios[0]), max(high, ratios[-1])
    return Times(
        statistics.median(original for original, _ in rounds),
        statistics.median(fused for _, fused in rounds),
        middle, min(low, middle), max(high, middle), count, busy,
    )  # fmt: skip


def is_busy(cores: float | None) -> bool:
    """Whether others kept so many cores busy that times are not to be trusted."""
    return cores is not None and cores > QUIET


def _left_out(count: int) -> int:
    """How many of ``count`` sorted samples lie outside the 95 % interval of the median, on each
    side: by binomial ranks, which assume no distribution."""
    left_out, tail = 0, 0.5**count
    while tail <= 0.025:  # of the median below the sample of this rank
        left_out += 1
        tail += math.comb(count, left_out) * 0.5**count
    return max(left_out - 1, 0)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
