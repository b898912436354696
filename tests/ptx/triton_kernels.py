"""Triton kernels of these tests' own, with what the package's may come to use: programs that wait
for others by tickets and counters, products of matrices fed by asynchronous copies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wait(counter, n):
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < n:
        pass


@triton.jit
def _done(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def centred_kernel(
    x,
    sums,
    y,
    counters,
    groups,
    tiles,
    size,
    BLOCK: tl.constexpr,
):
    """y = x minus the sum of its group of ``tiles`` rows, in one launch: the sums of group g are
    handed out before the differences of group g - 1. The last program leaves the counters zero."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    group, row = ticket // (2 * tiles), ticket % (2 * tiles)
    i = tl.arange(0, BLOCK)
    if row < tiles:
        if group < groups:
            row += group * tiles
            v = tl.load(x + row * size + i, mask=i < size, other=0.0, eviction_policy="evict_last")
            tl.store(sums + row, tl.sum(v.to(tl.float32)))
            _done(counters + 1 + group)
    else:
        group -= 1
        if group >= 0:
            _wait(counters + 1 + group, tiles)
            k = tl.arange(0, 16)
            first = group * tiles
            total = tl.sum(
                tl.load(sums + first + k, mask=k < tiles, other=0.0, cache_modifier=".cg")
            )
            at = (first + row - tiles) * size + i
            v = tl.load(x + at, mask=i < size, other=0.0, eviction_policy="evict_first")
            tl.store(y + at, (v.to(tl.float32) - total).to(y.dtype.element_ty), mask=i < size)
    tl.debug_barrier()
    if tl.atomic_add(counters + 1 + groups, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for k in range(groups + 2):
            tl.store(counters + k, 0)


@triton.jit
def product_kernel(
    a, b, c, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c[z] = a[z] b[z], for each z of a grid of three axes."""
    batch = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    i, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    a += batch * tl.num_programs(0) * ROWS * inner
    b += batch * inner * COLUMNS
    c += batch * tl.num_programs(0) * ROWS * COLUMNS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, inner, STEP, num_stages=STAGES):
        k = first + tl.arange(0, STEP)
        left = tl.load(a + i[:, None] * inner + k[None, :], mask=(k < inner)[None, :], other=0.0)
        right = tl.load(b + k[:, None] * COLUMNS + j[None, :], mask=(k < inner)[:, None], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * COLUMNS + j[None, :], total)
