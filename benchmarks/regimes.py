"""Which resource decides the time of a layer: latency, cache or memory (docs/tuning.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LATENCY, CACHE, MIXED, MEMORY = "latency", "cache", "mixed", "memory"
REGIMES = (LATENCY, CACHE, MIXED, MEMORY)
# Of the memory regime on a GPU, by what a multiprocessor's shared memory has room for.
TWO_FIT, ONE_FITS, REREAD = "two fit", "one fits", "reread"
CLASSES = (TWO_FIT, ONE_FITS, REREAD)
TITLES = {
    LATENCY: "latency: the cost of a call decides",
    CACHE: "cache: the second reading comes from the last-level cache",
    MIXED: "mixed: between cache and memory",
    MEMORY: "memory: bytes decide",
    TWO_FIT: "... two images' slices fit on a multiprocessor",
    ONE_FITS: "... one image's slice fits",
    REREAD: "... none fits: x is read twice",
}
SMALL_ON_GPU = 4 << 20


def regime(size: int, environment: Mapping[str, Any]) -> str | None:
    """The regime of a layer whose x has ``size`` bytes; None where the caches are not known.

    On a GPU, where x starts in memory, it matters whether x stays in L2 for its second reading:
    cache up to 0.8 of L2, memory from 3 times L2. On a CPU, where buffers are used over and over,
    whether x and y together stay in the last level: up to 0.8 of it, memory from twice its size.
    Latency is below 4 MiB on a GPU and within a core's own cache on a CPU.
    """
    if environment.get("device") != "cpu":
        small, last, held, far = SMALL_ON_GPU, environment.get("l2_bytes"), size, 3.0
    else:
        caches = environment.get("caches") or {}
        small, last, held, far = caches.get("core", 0), caches.get("last"), 2 * size, 2.0
    if not last:
        return None
    if size <= small:
        return LATENCY
    if held <= 0.8 * last:
        return CACHE
    return MEMORY if held > far * last else MIXED


def memory_class(plan: str | None) -> str | None:
    """How many images' slices stay on a multiprocessor, from the words of the CUDA kernels' plan
    ("..., 2 blocks per multiprocessor, single pass, next image prefetched"); None for others."""
    blocks = re.search(r"(\d+) blocks? per multiprocessor, (single pass|two passes)", plan or "")
    if plan is None or blocks is None:
        return None
    if blocks[2] == "two passes":
        return REREAD
    return TWO_FIT if int(blocks[1]) > 1 or "next image prefetched" in plan else ONE_FITS
