"""Interleaved timing on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import torch

from .providers import Call

SAMPLE_SECONDS = 250e-6  # far above the resolution of both clocks


class Timer(Protocol):
    """Times one sample of a call: seconds per call, averaged over an inner loop."""

    state: str  # what the caches hold when a sample starts, for the record

    def prepare(self, call: Call) -> None: ...

    def sample(self, call: Call) -> float: ...


def keep_freed_memory() -> None:
    """Makes glibc, where that is the allocator, keep what is freed for the next allocation.

    It gives blocks of 32 MB and more back to the system, unless there happens to be room in its
    heap: a call then waits for new pages, up to five times as long as for the work.
    """
    mmap_max, trim_threshold = -4, -1  # from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


class CpuTimer:
    """Wall clock, always the same buffers: they are as warm as the caches can hold them."""

    state = "hot: same buffers every call, one untimed call before each sample"

    def __init__(self, *, warm: bool = True) -> None:
        self._warm = warm  # whole networks fill the caches anew in every step
        self._inner: dict[Call, int] = {}

    def prepare(self, call: Call) -> None:
        call(0)
        if self._warm:
            call(0)
        start = time.perf_counter()
        call(0)
        spent = time.perf_counter() - start
        self._inner[call] = max(1, math.ceil(SAMPLE_SECONDS / max(spent, 1e-7)))

    def sample(self, call: Call) -> float:
        inner = self._inner[call]
        if self._warm:  # the provider before left its own buffers in the caches
            call(0)
        start = time.perf_counter()
        for _ in itertools.repeat(None, inner):
            call(0)
        spent = time.perf_counter() - start
        if spent > 20 * SAMPLE_SECONDS:  # calibrated in a quiet moment of a busy machine
            self._inner[call] = max(1, inner // 2)
        return spent / inner


class CudaTimer:
    """CUDA events around calls that walk through copies of the buffers larger than L2.

    The device is idle when a sample starts, so this is wall time: what the host needs to launch
    counts where it exceeds what the device needs to run. Not yet run on a GPU.
    """

    state = "cold L2: buffers rotate through more than three times its size"

    def __init__(self, copies: int) -> None:
        self._index = itertools.cycle(range(copies))
        self._inner: dict[Call, int] = {}

    def prepare(self, call: Call) -> None:
        for _ in range(3):
            call(next(self._index))
        spent = self._time(call, 3)
        self._inner[call] = max(3, math.ceil(SAMPLE_SECONDS / max(spent, 1e-7)))

    def sample(self, call: Call) -> float:
        call(next(self._index))
        return self._time(call, self._inner[call])

    def _time(self, call: Call, inner: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(inner):
            call(next(self._index))
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / inner


class HostTimer:
    """What a call costs the host: wall clock around calls, nothing waited for in between.

    The calls of a sample are few enough to be queued. Not yet run on a GPU.
    """

    state = "host time, device not waited for"
    CALLS = 20

    def prepare(self, call: Call) -> None:
        for _ in range(self.CALLS):
            call(0)

    def sample(self, call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in itertools.repeat(None, self.CALLS):
            call(0)
        return (time.perf_counter() - start) / self.CALLS


class GraphTimer:
    """Device time: replays of a CUDA graph that holds one call per copy of the buffers.

    No host time between kernels, and L2 is cold because the copies exceed it. Not yet run on a GPU.
    """

    state = "cold L2, CUDA graph replay"

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._graphs: dict[Call, torch.cuda.CUDAGraph] = {}
        # One pool for all: nothing a replay leaves behind is ever read, and whole networks in
        # pools of their own would not fit.
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for warm-up and capture: an autograd graph belongs to that it was built on.
        self._stream = torch.cuda.Stream()

    def prepare(self, call: Call) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # lazy initialisation must not be captured
            for _ in range(3):
                call(0)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            for index in range(self._copies):
                call(index)
        self._graphs[call] = graph

    def sample(self, call: Call) -> float:
        graph = self._graphs[call]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self._copies


def cold_copies(device: torch.device, size: int) -> int:
    """How many copies of a buffer of ``size`` bytes pass three times the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(256, max(2, math.ceil(3 * cache / max(size, 1))))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the cyclic garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class Rounds:
    """How long to go on: at least ``least`` rounds, then until time is up or ``most`` are done."""

    least: int = 5
    most: int = 30
    seconds: float = math.inf


@dataclass
class Samples:
    """Seconds per call, one entry per round, and why a provider has none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)


def _prepare(timer: Timer, call: Call) -> BaseException | None:
    try:
        timer.prepare(call)
    except Exception as error:  # a graph capture may be refused, a kernel may fail to launch
        return error
    return None


def measure(timer: Timer, calls: Mapping[str, Call], rounds: Rounds, random: Random) -> Samples:
    """One sample of every call per round, in a new random order each round."""
    out = Samples()
    begin = time.perf_counter()
    with _no_collection():
        for name, call in calls.items():
            error = _prepare(timer, call)
            if error is None:
                out.seconds[name] = []
            else:
                out.failed[name] = error
        order = list(out.seconds)
        for done in range(rounds.most):
            if done >= rounds.least and time.perf_counter() - begin > rounds.seconds:
                break
            random.shuffle(order)
            for name in order:
                out.seconds[name].append(timer.sample(calls[name]))
    return out
