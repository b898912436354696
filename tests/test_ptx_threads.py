"""PTX, executed on a CPU: memory, warps, blocks and clusters, in several orders of threads."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import pytest

import test_ptx
from ptx import compiling
from ptx.opcodes import OPCODES
from ptx.running import Kernels
from ptx.thread_kernels import ATOMICS, MMA, SPECIAL, TEXT

pytestmark = pytest.mark.skipif(not compiling.build.compiler(), reason="no C++ compiler")

SEEDS = range(6)
Array = np.ndarray[Any, Any]


@functools.cache
def kernels() -> Kernels:
    return Kernels(TEXT, "threads")


def _zeros(*shape: int, dtype: Any = np.uint32) -> Array:
    return np.zeros(shape, dtype)


def _drawn(*shape: int, dtype: Any = np.uint32, seed: int = 0) -> Array:
    most = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, most, shape, dtype, endpoint=True)


def _aligned(a: Array) -> Array:
    """A copy at a multiple of 16 bytes."""
    memory = np.zeros(a.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def test_every_opcode_has_a_test() -> None:
    """A row of the table that no kernel of these tests uses is one nobody has looked at."""
    used = test_ptx.kernels().module.used | kernels().module.used
    assert {row.pattern for row in set(OPCODES) - used} == set()


def test_special_registers() -> None:
    out = _zeros(4, 64, len(SPECIAL))
    kernels().run("special", out, grid=4, block=64, cluster=2)
    for block, thread in np.ndindex(4, 64):
        expected = {
            "tid.x": thread, "tid.y": 0, "tid.z": 0, "ntid.x": 64, "ntid.y": 1, "ctaid.x": block,
            "nctaid.x": 4, "laneid": thread % 32, "warpid": thread // 32,
            "cluster_ctarank": block % 2, "cluster_nctarank": 2, "cluster_ctaid.x": block % 2,
            "cluster_nctaid.x": 2, "clusterid.x": block // 2, "nclusterid.x": 2,
        }  # fmt: skip
        assert dict(zip(SPECIAL, map(int, out[block, thread]), strict=True)) == expected


def test_states_of_memory() -> None:
    given, out = _aligned(_drawn(64, 8)), _aligned(_zeros(64, 8))
    kernels().run("states", given, out, grid=2, shared=512)
    for a, b in zip(given, out, strict=True):
        assert list(b[:4]) == [a[3], a[2], a[1], a[0]]
        assert list(b[4:6]) == list(a[6:8])
        # -2, with its sign, and the second of three constants.
        assert b[6] == 0x1234 - 2
        assert b[7] == (a[4] >> 16 | (a[4] & 0xFFFF) << 16)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("misaligned", r"16 bytes to an address that is no multiple \(threads.ptx:\d+"),
        ("beyond", r"bytes \d+ to \d+ of 640 of shared memory \(threads.ptx:\d+\)"),
        ("not_shared", "an address outside the block's shared memory taken as one in it"),
        ("traps", r"thread 3: trap \(threads.ptx:\d+\)"),
        ("divergent", "__syncthreads in divergent code"),
        ("workspace", "trap"),
    ],
)
def test_what_is_wrong_is_found_with_its_line(kernel: str, message: str) -> None:
    data = _aligned(_zeros(64))[1:]
    with pytest.raises(RuntimeError, match=f"^{kernel}: .*{message}"):
        kernels().run(kernel, data, shared=128)


def test_memory_for_barriers_of_the_grid() -> None:
    """Zero at first, in every launch; a launch that is not cooperative has none, see above."""
    for _ in range(2):
        data = np.full(1, 7, np.uint32)
        kernels().run("workspace", data, cooperative=True)
        assert data[0] == 0


def test_calls_and_branches() -> None:
    out = _zeros(64)
    kernels().run("calls", out, grid=2)
    assert list(out) == [5 * i + sum(k * k for k in range(5)) for i in range(64)]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, _ in ATOMICS])
def test_atomics(kind: str, name: str) -> None:
    change = next(f for k, n, f in ATOMICS if (k, n) == (kind, name))
    bits = int(kind[1:])
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    before, operand = (_drawn(64, dtype=dtype, seed=i) for i in range(2))
    before[:8], operand[4:12] = operand[:8], before[4:12]
    after = np.array([change(int(a), int(b)) % 2**bits for a, b in
                      zip(before, operand, strict=True)], object)  # fmt: skip
    memory, old = before.copy(), np.zeros_like(before)
    kernels().run(f"atom_{name}_{kind}", memory, operand, old, grid=2)
    assert np.array_equal(old, before)
    assert [int(x) % 2**bits for x in memory] == list(after)
    if name != "exch":
        memory = before.copy()
        kernels().run(f"red_{name}_{kind}", memory, operand, old, grid=2)
        assert [int(x) % 2**bits for x in memory] == list(after)


def test_compare_and_swap() -> None:
    memory, expected, old = _drawn(32), _drawn(32), _zeros(32)
    expected[::2] ^= 1
    before = memory.copy()
    kernels().run("cas", memory, expected, old)
    assert np.array_equal(old, before)
    assert np.array_equal(memory, np.where(expected == before, 77, before))


@pytest.mark.parametrize("seed", SEEDS)
def test_additions_to_one_place(seed: int) -> None:
    count, total = _zeros(1), _zeros(1, dtype=np.float32)
    kernels().run("count", count, total, grid=3, block=96, seed=seed)
    assert (int(count[0]), float(total[0])) == (3 * 96, 144.0)


@pytest.mark.parametrize("load", ["acqu", "vola", "rela"])
def test_flags(load: str) -> None:
    """Polls wait for stores, and end in a deadlock where there are none."""
    for seed in SEEDS:
        data, flag, out = _zeros(32), _zeros(1), _zeros(3 * 32)
        kernels().run(f"flag_{load}", data, flag, out, grid=3, cooperative=True, seed=seed)
        assert list(out[32:]) == 2 * [100 + i for i in range(32)]
    with pytest.raises(RuntimeError, match="deadlock; block 0: threads 0-31 wait at a flag"):
        kernels().run("flag_nobody", _zeros(1), seed=0)


def test_tickets() -> None:
    """Atomic operations that change nothing are polls: they wait, and end in a deadlock where
    nobody comes."""
    for seed in SEEDS:
        counters, order = _zeros(3), np.full(5, 99, np.uint32)
        kernels().run("tickets", counters, order, grid=5, cooperative=bool(seed % 2), seed=seed)
        assert sorted(order) == list(range(5))
        assert list(counters) == [5, 5, 0]
    with pytest.raises(RuntimeError, match="deadlock; block 0: threads 0-31 wait at a flag"):
        kernels().run("ticket_of_nobody", _zeros(1), seed=0)


def test_named_barriers() -> None:
    given = _drawn(2, 128)
    for seed in SEEDS:
        out = np.zeros_like(given)
        kernels().run("named", given, out, grid=2, block=128, shared=512, seed=seed)
        assert np.array_equal(out, np.roll(given, 64, axis=1))
    with pytest.raises(RuntimeError, match=r"barrier 1 for \d+ threads, which others use for"):
        kernels().run("named_differently", _zeros(1), block=64)
    with pytest.raises(RuntimeError, match="a barrier for 0 threads of 128: they are no whole"):
        kernels().run("named_differently", _zeros(1), block=128)


def test_copies_of_fewer_bytes() -> None:
    """What is left is zero."""
    given, out = _aligned(_drawn(64, 4)), _aligned(_zeros(64, 4))
    for seed in SEEDS:
        kernels().run("cp_async_part", given, out, block=64, shared=2048, seed=seed)
        for thread in range(64):
            size = min(16, thread % 32)
            whole, part = given[thread].tobytes(), out[thread].tobytes()
            assert part == whole[:size] + bytes(16 - size)


def test_reductions_of_warps() -> None:
    for seed in SEEDS:
        given = _drawn(32, seed=seed)
        given[::5] = given[0]
        if seed == 1:
            given[1::2] = 7
        out = _aligned(_zeros(32, 16))
        kernels().run("reductions", given, out, seed=seed)
        values = [int(x) for x in given]
        signed = [x - 2**32 * (x >> 31) for x in values]
        for lane in range(32):
            own = range(lane % 2, 32, 2)
            mask = sum(1 << i for i in own)
            same = len({values[i] for i in own}) == 1
            assert [int(x) for x in out[lane]] == [
                sum(values[i] for i in own) % 2**32, min(signed[i] for i in own) % 2**32,
                max(values[i] for i in own), max(signed) % 2**32,
                functools.reduce(lambda a, b: a & b, [values[i] for i in own]),
                functools.reduce(lambda a, b: a | b, [values[i] for i in own]),
                functools.reduce(lambda a, b: a ^ b, [values[i] for i in own]),
                sum(1 << i for i in own if values[i] == values[lane]),
                sum(1 << i for i in range(32) if values[i] == values[lane]),
                mask if same else 0, int(same), mask, max(own), int(lane == max(own)),
                int(lane == 31), 0,
            ]  # fmt: skip


@pytest.mark.parametrize("kernel", ["reversed_bar", "reversed_barrier"])
def test_barriers_of_a_block(kernel: str) -> None:
    given = _drawn(2, 96)
    for seed in SEEDS:
        out = np.zeros_like(given)
        kernels().run(kernel, given, out, grid=2, block=96, shared=384, seed=seed)
        assert np.array_equal(out, given[:, ::-1])


def test_a_missing_barrier_is_noticed() -> None:
    given = _drawn(2, 96)
    wrong = 0
    for seed in SEEDS:
        out = np.zeros_like(given)
        kernels().run("reversed_nothing", given, out, grid=2, block=96, shared=384, seed=seed)
        wrong += not np.array_equal(out, given[:, ::-1])
    assert wrong == len(SEEDS)


@pytest.mark.parametrize(("name", "words"), [("group", 4), ("all", 1)])
def test_asynchronous_copies(name: str, words: int) -> None:
    given = _aligned(_drawn(2, 64, words))
    for seed in SEEDS:
        out = _zeros(2, 64)
        kernels().run(f"cp_async_{name}", given, out, grid=2, block=64, shared=256 * words,
                      seed=seed)  # fmt: skip
        assert np.array_equal(out, given[:, ::-1, 0])


def test_a_copy_that_is_not_waited_for_is_noticed() -> None:
    given = _drawn(1, 64)
    wrong = 0
    for seed in SEEDS:
        out = _zeros(1, 64)
        # The block may even be gone first, which is an error.
        with contextlib.suppress(RuntimeError):
            kernels().run("cp_async_late", given, out, block=64, shared=256, seed=seed)
        wrong += not np.array_equal(out, given[:, ::-1])
    assert wrong == len(SEEDS)


def test_bulk_copies() -> None:
    given = _aligned(_drawn(64))
    for seed in SEEDS:
        out = _zeros(64)
        kernels().run("bulk_fenced", given, out, block=64, shared=512, seed=seed)
        assert np.array_equal(out, given)
    with pytest.raises(RuntimeError, match="has not executed the proxy fence"):
        kernels().run("bulk_unfenced", given, out, block=64, shared=512)


def test_arrivals_at_an_mbarrier() -> None:
    for seed in SEEDS:
        out = _zeros(2, 64)
        kernels().run("arrive", _zeros(1), out, grid=2, block=64, shared=512, seed=seed)
        expected = [[64 * b + (t ^ 31) for t in range(64)] for b in range(2)]
        assert out.tolist() == expected


def test_shared_memory_of_a_cluster() -> None:
    for seed in SEEDS:
        out = _zeros(6, 32, 2)
        kernels().run("cluster", _zeros(1), out, grid=6, cluster=3, shared=512, seed=seed)
        for block, thread in np.ndindex(6, 32):
            first = block // 3 * 3
            after, self = first + (block + 1) % 3, block
            assert list(out[block, thread]) == [32 * after + thread, 32 * self + thread + 1000]


@pytest.mark.parametrize("words", [1, 2])
def test_asynchronous_stores(words: int) -> None:
    for seed in SEEDS:
        out = _zeros(4, 32)
        kernels().run(f"st_async_{words}", _zeros(1), out, grid=4, cluster=2, shared=512, seed=seed)
        for block, thread in np.ndindex(4, 32):
            assert out[block, thread] == (block ^ 1) * 32 + thread + 1000 * (words - 1)


@pytest.mark.parametrize("how", ["idx", "up", "down", "bfly"])
def test_shuffles(how: str) -> None:
    """As the manual's own code has it; lanes of a segment share its width."""
    draw = np.random.default_rng(1)
    for width in (32, 16, 8, 4, 2):
        values, b = _drawn(32), draw.integers(0, 40, 32).astype(np.uint32)
        segment = 32 - width
        c = np.full(32, segment << 8 | (0 if how == "up" else 31), np.uint32)
        out, inside = _zeros(32), _zeros(32)
        kernels().run(f"shfl_{how}", values, b, c, out, inside)
        for lane in range(32):
            by = int(b[lane]) & 31
            last = lane & segment | (int(c[lane]) & 31) & ~segment & 31
            source, ok = {
                "idx": ((lane & segment) | (by & ~segment & 31), None),
                "up": (lane - by, lane - by >= last),
                "down": (lane + by, lane + by <= last), "bfly": (lane ^ by, lane ^ by <= last),
            }[how]  # fmt: skip
            ok = source <= last if ok is None else ok
            assert (bool(inside[lane]), out[lane]) == (ok, values[source if ok else lane])


def test_votes() -> None:
    """The halves of a warp vote apart."""
    for seed in SEEDS:
        given = np.random.default_rng(seed).integers(0, 2, 32).astype(np.uint32)
        given[16:] *= seed % 2
        out = _aligned(_zeros(32, 4))
        kernels().run("votes", given, out, seed=seed)
        for lane in range(32):
            half = slice(0, 16) if lane < 16 else slice(16, 32)
            ballot = sum(int(given[i]) << i for i in range(half.start, half.stop))
            mask = 0xFFFF << half.start
            some = int(given[half].any())
            assert list(out[lane]) == [ballot, some, 1 - some, mask]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loads_of_matrices(count: int, transposed: bool) -> None:
    matrices = _aligned(_drawn(4, 8, 8, dtype=np.uint16))
    out = _zeros(32, count)
    suffix = "_trans" if transposed else ""
    kernels().run(f"ldmatrix_{count}{suffix}", matrices, out, shared=48 * 32)
    for lane, i in np.ndindex(32, count):
        matrix = matrices[i].T if transposed else matrices[i]
        low, high = (int(x) for x in matrix[lane // 4, 2 * (lane % 4) :][:2])
        assert out[lane, i] == high << 16 | low


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stores_of_matrices(count: int, transposed: bool) -> None:
    matrices = _drawn(4, 8, 8, dtype=np.uint16)
    given = _zeros(32, count)
    for lane, i in np.ndindex(32, count):
        matrix = matrices[i].T if transposed else matrices[i]
        low, high = (int(x) for x in matrix[lane // 4, 2 * (lane % 4) :][:2])
        given[lane, i] = high << 16 | low
    out = _aligned(_zeros(4, 8, 4))
    suffix = "_trans" if transposed else ""
    kernels().run(f"stmatrix_{count}{suffix}", given, out, shared=48 * 32)
    assert (out.view(np.uint16)[:count] == matrices[:count]).all()


def _halves(values: Array, kind: str) -> Array:
    """16-bit patterns, or 32-bit ones of tf32; of small integers, which all have."""
    single = values.astype(np.float32)
    if kind == "f16":
        return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    return bits if kind == "tf32" else (bits >> 16).astype(np.uint16)


@pytest.mark.parametrize("name", MMA)
def test_products_of_matrices(name: str) -> None:
    """Exact for small integers. Which lane has what is as the manual's figures say."""
    shape, registers = MMA[name]
    kind = name.partition("_")[0]
    depth = int(shape.partition("k")[2])
    each = 1 if kind == "tf32" else 2
    draw = np.random.default_rng(2)
    a, b = (draw.integers(-9, 9, s) for s in ((16, depth), (depth, 8)))
    c = draw.integers(-9, 9, (16, 8))
    left, right = _halves(a, kind), _halves(b, kind)
    fragments = {"a": _zeros(32, registers), "b": _zeros(32, registers // 2)}
    sums = _aligned(_zeros(32, 4, dtype=np.float32))
    for lane in range(32):
        group, place = divmod(lane, 4)
        for r in range(registers):
            row, column = group + 8 * (r % 2), each * place + 4 * each * (r // 2)
            words = [int(left[row, column + e]) << 16 * e for e in range(each)]
            fragments["a"][lane, r] = sum(words)
        for r in range(registers // 2):
            words = [int(right[each * place + 4 * each * r + e, group]) << 16 * e
                     for e in range(each)]  # fmt: skip
            fragments["b"][lane, r] = sum(words)
        for i in range(4):
            sums[lane, i] = c[group + 8 * (i // 2), 2 * place + i % 2]
    kernels().run(f"mma_{name}", fragments["a"], fragments["b"], sums)
    expected = a @ b + c
    for lane, i in np.ndindex(32, 4):
        group, place = divmod(lane, 4)
        assert sums[lane, i] == expected[group + 8 * (i // 2), 2 * place + i % 2]
