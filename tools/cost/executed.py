"""How often the basic blocks of the CUDA kernels run: their PTX is executed on the simulation of
``tests/simt`` as a launch plan for a card has it, for one and for two images per group of blocks.

What a block does for an image is the difference; what is left of the first run is done once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.workloads import Layer

from .cards import Card
from .machine_code import OUT, for_tests

PLAN = "SENET_KERNELS_CUDA_PLAN"
_VERSION = "1"  # of how it is counted here
#: Of the simulated devices, that which runs code for a target: see ``tests/simt/runtime.cpp``.
DEVICES = {"90a": 0, "80": 1, "120": 3}


class Plan(NamedTuple):
    """A launch plan, read from the words in which the library describes it."""

    words: str
    blocks: int  # of an image
    threads: int
    shared: int  # bytes of a block, to the KB
    per_multiprocessor: int
    resident: bool
    slots: int
    groups: int
    policy: str  # which forces it


def plan_of(words: str, card: Card, batch: int) -> Plan:
    """Raises ValueError where the words are those of no plan."""
    found = re.search(r"(\d+) threads and (\d+) KB each, (\d+) blocks? per multiprocessor", words)
    if not found:
        raise ValueError(f"no launch plan: {words}")
    threads, kilobytes, each = map(int, found.groups())
    several = re.search(r"(\d+) blocks per image", words)
    blocks = int(several[1]) if several else 1
    resident = "single pass" in words
    slots = (2 if "prefetched" in words else 1) if resident else 0
    exchange = (
        "cluster" if "cluster of" in words else "grid" if "global memory" in words else "none"
    )
    axis = "space" if "split in space" in words else "channels"
    # As csrc/cuda/plan.cpp shares images out.
    room = max(1, card.multiprocessors * each // blocks)
    groups = -(-batch // -(-batch // room))
    policy = f"exchange={exchange},blocks={blocks},axis={axis},resident={int(resident)}"
    policy += f",slots={slots}" if slots else ""
    policy += f",weights={int('weights kept' in words)},groups=1"
    return Plan(words, blocks, threads, kilobytes << 10, each, resident, slots, groups, policy)


class Touched(NamedTuple):
    """What the requests of warps on a line of PTX touch, see ``tests/ptx/counts.h``."""

    line: int
    shared: bool
    requests: int
    bytes: int
    sectors: int
    wavefronts: int
    least: int


class _Touched(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in Touched._fields)


class Counts(NamedTuple):
    """Of a kernel: executions of each basic block, by warps and by threads, of one group of blocks
    of the grid: once, and for each image."""

    kernel: str
    target: str
    once: tuple[list[int], list[int]]
    image: tuple[list[int], list[int]]


@functools.cache
def module_of(kernel: str, target: str) -> tuple[str, list[int]]:
    """PTX with the places in the source, and at which lines its blocks begin."""
    compiling = for_tests()
    text = compiling.ptx_of(kernel, target, "-lineinfo")
    return text, compiling.Module(text, counts=True).leaders


def _finder(simulation: Path) -> Any:
    compiling = for_tests()

    class CountingFinder(compiling.Finder):  # type: ignore[misc]
        """Finds PTX that counts."""

        def __init__(self) -> None:
            super().__init__(simulation)
            self.libraries: dict[tuple[str, str], ctypes.CDLL] = {}
            self.watches = False

        def _load(self, kernel: str, capability: int) -> int:
            target = compiling._TARGETS.get(capability, str(capability))
            text, _ = module_of(kernel, target)
            name = f"{compiling.instance(kernel)[0].removesuffix('.cuh')}-{target}"
            library = compiling.linked(text, name, simulation, counts=True)
            self.libraries[kernel, target] = library
            library.ptx_watch(int(self.watches))
            return int(compiling.entries_of(library, text)[kernel].run)

        def take(self) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
            found = {}
            for key, library in self.libraries.items():
                count = len(module_of(*key)[1])
                warps, threads = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
                library.ptx_take_counts(warps, threads, ctypes.c_uint64(count))
                if any(threads):
                    found[key] = (list(warps), list(threads))
            return found

        def watch(self, on: bool) -> None:
            self.watches = on
            for library in self.libraries.values():
                library.ptx_watch(int(on))

        def take_accesses(self) -> dict[tuple[str, str], list[Touched]]:
            found = {}
            for key, library in self.libraries.items():
                most = module_of(*key)[0].count("\n")
                rows = (_Touched * most)()
                library.ptx_take_accesses.restype = ctypes.c_uint64
                count = library.ptx_take_accesses(rows, ctypes.c_uint64(most))
                if count:
                    found[key] = [
                        Touched(*(getattr(row, name) for name in Touched._fields))
                        for row in rows[:count]
                    ]
            return found

    return CountingFinder()


@functools.cache
def _counting() -> Any:
    return _finder(_simulation().finder.simulation)


def _simulation() -> Any:
    for_tests()
    import cuda_on_cpu

    return cuda_on_cpu.simulation()


@contextmanager
def _forced(policy: str) -> Iterator[None]:
    before = os.environ.get(PLAN)
    os.environ[PLAN] = policy
    try:
        yield
    finally:
        if before is None:
            del os.environ[PLAN]
        else:
            os.environ[PLAN] = before


def _run(
    layer: Layer, last: bool, plans: tuple[Plan, Plan], target: str, batch: int,
    take: Callable[[Any], Any],
) -> list[Any]:  # fmt: skip
    """What ``take`` takes of the finder after the forward and after the backward pass."""
    from senet_kernels import squeeze_excite

    for_tests()
    import cuda_on_cpu

    form = torch.channels_last if last else torch.contiguous_format
    shape = (batch, layer.channels, layer.height, layer.width)
    x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=form).requires_grad_()
    outputs = layer.channels * (1 + layer.shift)
    inner = layer.channels if layer.hidden is None else layer.hidden
    w1 = None if layer.hidden is None else torch.zeros(inner, layer.channels, dtype=x.dtype)
    b1 = None if layer.hidden is None else torch.zeros(inner, dtype=x.dtype)
    w2, b2 = torch.zeros(outputs, inner, dtype=x.dtype), torch.zeros(outputs, dtype=x.dtype)
    parameters = [None if t is None else t.requires_grad_() for t in (w1, b1, w2, b2)]
    simulation, finder = _simulation(), _counting()
    before, simulation.finder = simulation.finder, finder
    try:
        with cuda_on_cpu.plugged_in(1, DEVICES[target], ptx=0):
            with _forced(plans[0].policy):
                y = squeeze_excite(
                    x, *parameters, activation=layer.activation or "relu", gate=layer.gate,
                    backend="native",
                )  # fmt: skip
            forward = take(finder)
            with _forced(plans[1].policy):
                y.backward(torch.zeros_like(y))
            return [forward, take(finder)]
    finally:
        simulation.finder = before


def counts(
    layer: Layer, last: bool, plans: tuple[Plan, Plan], target: str
) -> tuple[list[Counts], list[Counts]]:
    """Of each kernel of the forward and of the backward pass, in bfloat16 with all gradients.

    Args:
        layer: taken without its neighbours.
        last: channels-last.
        plans: of the two passes.
        target: ``90a``, ``80`` or ``120``, of the PTX.

    They are kept in ``build/cost``, by the kernels' sources and the translator.
    """
    sources = [path.read_text() for path in sorted(for_tests().SOURCES.iterdir())]
    parts = [_VERSION, repr(layer), repr(last), repr([p.policy for p in plans]), target,
             for_tests()._translator(), *sources]  # fmt: skip
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    product = OUT / f"counts-{key}.json"
    if not product.exists():
        one, two = (
            _run(layer, last, plans, target, batch, lambda finder: finder.take())
            for batch in (1, 2)
        )
        passes = []
        for first, second in zip(one, two, strict=True):
            found = []
            for (kernel, of), numbers in first.items():
                pairs = list(zip(numbers, second[kernel, of], strict=True))
                image = [[b - a for a, b in zip(x, y, strict=True)] for x, y in pairs]
                once = [[2 * a - b for a, b in zip(x, y, strict=True)] for x, y in pairs]
                found.append([kernel, of, once, image])
            passes.append(found)
        for_tests().write(product, json.dumps(passes))
    forward, backward = json.loads(product.read_text())
    return [Counts(*row) for row in forward], [Counts(*row) for row in backward]


def accesses(
    layer: Layer, last: bool, plans: tuple[Plan, Plan], target: str
) -> list[dict[tuple[str, str], list[Touched]]]:
    """What each kernel, by its name and target, touches of memory for an image: forward, backward.
    Copies of whole slices are not among it."""
    finder = _counting()
    finder.watch(True)
    try:
        return _run(layer, last, plans, target, 1, lambda f: f.take_accesses())
    finally:
        finder.watch(False)
        finder.take()
