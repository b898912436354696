"""Which resource decides the time of a layer: latency, cache or memory (docs/performance.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LATENCY, CACHE, MIXED, MEMORY = "latency", "cache", "mixed", "memory"
REGIMES = (LATENCY, CACHE, MIXED, MEMORY)
TITLES = {
    LATENCY: "latency: the cost of a call decides",
    CACHE: "cache: the second reading comes from the last-level cache",
    MIXED: "mixed: between cache and memory",
    MEMORY: "memory: bytes decide",
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
