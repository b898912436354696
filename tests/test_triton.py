"""What only the Triton backend has: plans, launches, index widths. Kernels run interpreted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from problems import Spec, build, check
from senet_kernels import explain, squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import plan
from senet_kernels.backends.triton.plan import (
    Device,
    FlatPlan,
    Shape,
    TilePlan,
    divisor,
    make_plan,
    tile_plan,
)

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

H200 = Device("sm_90", 132)


@pytest.fixture(autouse=True)
def _nothing_prepared() -> Iterator[None]:
    """Tests here change what prepared calls depend on."""
    if triton.INTERPRETED:
        from senet_kernels.backends.triton import launch

        launch.forget()
        yield
        launch.forget()
    else:
        yield


def _workload_shapes() -> list[Shape]:
    path = Path(__file__).parent.parent / "benchmarks" / "workloads.json"
    return [
        Shape(batch, la["channels"], la["height"] * la["width"], la["hidden"],
              la["channels"], last)
        for network in json.loads(path.read_text())["networks"]
        for la in network["layers"]
        for batch in (1, 8, 256)
        for last in (False, True)
    ]  # fmt: skip


_ODD = [
    Shape(b, c, s, r, o * c, last)
    for b in (0, 1, 5, 65537)
    for c in (0, 1, 3, 17, 4097, (1 << 21) + 1)
    for s in (0, 1, 49, 1 << 20)
    for r, o in ((None, 0), (None, 1), (0, 1), (1, 2), (257, 1))
    for last in (False, True)
]


def _is_cover(shape: Shape, p: TilePlan) -> bool:
    """Whether tiles reach every element, and no program has none."""
    bs, bc = (p.outer, p.inner) if shape.last else (p.inner, p.outer)
    walked = p.rounds * p.steps * bs
    return (
        p.tiles * bc >= shape.channels
        and p.splits * walked >= shape.positions
        and (p.splits - 1) * walked < max(1, shape.positions)
    )


@pytest.mark.parametrize("device", [H200, Device("sm_80", 108), Device("", 1)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_plans_cover_the_image(device: Device, itemsize: int, masked: bool) -> None:
    ways = set()
    for shape in _workload_shapes() + _ODD:
        for sums_in_dx in (False, True):
            made = make_plan(shape, itemsize, device, masked=masked, sums_in_dx=sums_in_dx)
            sums, writes = made.sums, made.writes
            ways.add(type(writes))
            if isinstance(writes, FlatPlan):
                assert not sums_in_dx
                assert writes.vectors * writes.vec == shape.image
                covered = writes.blocks * writes.block * writes.steps
                assert covered >= writes.vectors, (shape, writes)
                assert writes.even == (covered == writes.vectors)
                assert (writes.vec, shape.rows[1] % 8) == (8, 0) or not masked
                assert covered * writes.vec < 2**31
            for p in (sums, *([writes] if isinstance(writes, TilePlan) else [])):
                assert p.outer & (p.outer - 1) == p.inner & (p.inner - 1) == 0, (shape, p)
                assert p.inner % 8 == 0, "a byte of the mask has eight bits"
                assert _is_cover(shape, p), (shape, p)
                assert p.full <= p.steps
                if shape.positions:
                    full = p.full * (p.outer if shape.last else p.inner)
                    assert full <= shape.positions, (shape, p)
                assert shape.rows[1] % p.unit == 0
                assert p.outer * p.inner <= 8192, "too large for registers"
                assert p.warps in (1, 2, 4) or not device.architecture
    assert ways == ({TilePlan} if itemsize == 8 else {FlatPlan, TilePlan})


def test_divisors() -> None:
    """As kernels divide by them, for extents and numbers up to 2^31."""
    random = Random(0)
    ends = [1, 2, 3, 7, 49, 196, 3136, 2**16 - 1, 2**30 - 1, 2**30, 2**31 - 1]
    for d in [*ends, *(random.randrange(1, 2 ** random.randrange(1, 32)) for _ in range(300))]:
        packed = divisor(d)
        magic, shift = packed & 0xFFFFFFFF, packed >> 32 & 31
        assert 2**32 < packed < 2**63
        multiples = [d * random.randrange(2**31 // d + 1) for _ in range(40)]
        for n in [0, 1, d - 1, d, 2**31 - 1, *multiples, *(m - 1 for m in multiples if m)]:
            if n < 2**31:
                assert (2 * n * magic >> 32) >> shift == n // d, (n, d)


def test_layers_of_real_networks_have_loads_in_flight() -> None:
    """At least four tiles before the first is used, or all there are; and streaming programs
    enough for every multiprocessor."""
    for shape in _workload_shapes():
        made = make_plan(shape, 2, H200, masked=False)
        count = plan.ceil_div(shape.positions, made.sums.outer if shape.last else made.sums.inner)
        assert made.sums.steps >= min(4, count), (shape, made)
        if isinstance(made.writes, FlatPlan):
            assert made.writes.steps >= 2
        if shape.batch == 256:
            assert made.sums.splits <= 2, (shape, made)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], None]:
    """Makes the plans those of a device, but for instructions that the interpreter has not."""
    from senet_kernels.backends.triton import build, operands

    def use(device: Device) -> None:
        monkeypatch.setattr(operands, "_device", lambda _: device)
        monkeypatch.setattr(build, "INSTRUCTIONS", {})

    return use


# Programs that share images, and blocks of 128 threads, which the interpreter's own plans have not.
_SPECS = (
    Spec((1, 3, 20, 41), 5, torch.float32, residual="contiguous", after="relu", weighted=True),
    Spec((1, 9, 20, 21), 5, torch.float32, "channels_last", before="silu", affine=True),
    Spec((1, 2, 30, 33), None, torch.bfloat16, shift=True, lengths=True, after="silu"),
    Spec((1, 20, 3, 5), 20, torch.bfloat16, "channels_last", after="relu"),
    # Rows of vectors, and rows that begin anywhere.
    Spec((1, 20, 7, 8), 6, torch.bfloat16, residual="contiguous", after="relu", shift=True),
    Spec((1, 10, 6, 6), 3, torch.bfloat16, lengths=True, before="silu"),
    Spec((1, 24, 7, 9), 6, torch.float16, residual="contiguous", after="gelu"),
    Spec((1, 8, 20, 21), dtype=torch.bfloat16, part="squeeze", lengths=True, affine=True),
    Spec((1, 4, 20, 21), part="channel_scale", residual="contiguous",
         after="relu", shift=True, weighted=True, gate="tanh", before="silu", affine=True),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_plans_of_a_gpu(spec: Spec, on_device: Callable[[Device], None]) -> None:
    on_device(H200)
    check(build(spec), squeeze_excite, backend="triton")


_CUTS: tuple[dict[str, Any], ...] = (
    {"outer": 8, "inner": 8, "steps": 2, "rounds": 1}, {"outer": 16, "inner": 8, "steps": 1},
    {"outer": 2, "inner": 32, "steps": 4, "rounds": 1},
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cut", _CUTS, ids=str)
def test_every_cut_gives_the_result(
    cut: dict[str, Any], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the plan: it decides about speed only."""
    right = plan.tile_plan

    def forced(shape: Shape, *args: Any, in_flight: bool = True, **more: Any) -> TilePlan:
        p = right(shape, *args, in_flight=in_flight, **more)._replace(full=0, **cut)
        p = p if in_flight else p._replace(steps=1)
        bs, bc = (p.outer, p.inner) if shape.last else (p.inner, p.outer)
        count = plan.ceil_div(shape.positions, bs * p.steps)
        p = p._replace(tiles=plan.ceil_div(shape.channels, bc), rounds=min(p.rounds, count))
        p = p._replace(splits=plan.ceil_div(count, p.rounds), even=shape.channels % bc == 0)
        assert _is_cover(shape, p)
        return p

    monkeypatch.setattr(plan, "tile_plan", forced)
    make_plan.cache_clear()
    for hidden, shift in ((5, True), (None, False)):
        spec = Spec((3, 13, 3, 9), hidden, layout=layout, residual=layout, shift=shift,
                    affine=True, lengths=True, weighted=True, before="silu",
                    after="relu")  # fmt: skip
        check(build(spec), squeeze_excite, backend="triton")
    make_plan.cache_clear()


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_64_bit_offsets_give_the_same_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launch

    spec = Spec((3, 20, 5, 7), 4, layout=layout, residual=layout, after="relu", before="silu")
    narrow = build(spec).run(squeeze_excite, backend="triton")
    launch.forget()
    right = plan.tile_plan
    monkeypatch.setattr(plan, "tile_plan", lambda *a, **k: right(*a, **k)._replace(wide=True))
    make_plan.cache_clear()
    wide = build(spec).run(squeeze_excite, backend="triton")
    make_plan.cache_clear()
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("last", [False, True])
def test_offsets_are_wide_where_they_must_be(last: bool) -> None:
    def wide(batch: int, channels: int, positions: int) -> bool:
        shape = Shape(batch, channels, positions, 16, channels, last)
        made = make_plan(shape, 2, H200, masked=False)
        if made.sums.wide:
            assert isinstance(made.writes, TilePlan)
            assert made.writes.wide
        return made.sums.wide

    assert not wide(1024, 2048, 56 * 56)  # more than 2^32 elements, but not in an image
    assert wide(1, 4, 1 << 30)
    assert wide(1, 64, 1 << 26)
    assert tile_plan(Shape(1, 64, (1 << 25) - 8, 16, 64, last), 2, H200).wide


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """The kernels launched, and with which options."""
    from senet_kernels.backends.triton import launcher

    seen: list[tuple[str, dict[str, int]]] = []
    call = launcher.Launch.__call__

    def record(self: launcher.Launch, *pointers: Any) -> None:
        seen.append((self.kernel.fn.__name__, self._options))
        call(self, *pointers)

    monkeypatch.setattr(launcher.Launch, "__call__", record)
    return seen


@interpreted
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "squeeze hidden gates scale_flat | bwd_reduce hidden_bwd excite_bwd dx_flat"),
        ({"after": "relu"},
         "squeeze hidden gates scale_tile | bwd_reduce hidden_bwd excite_bwd dx_tile"),
        ({"hidden": None}, "squeeze gates scale_flat | bwd_reduce excite_bwd dx_flat"),
        ({"affine": True},
         "squeeze hidden gates scale_flat | bwd_reduce hidden_bwd excite_bwd dx_tile sums"),
        ({"part": "squeeze"}, "squeeze | dx_flat"),
        ({"part": "squeeze", "affine": True}, "squeeze | dx_tile sums"),
        ({"part": "channel_scale"}, "factors scale_flat | bwd_reduce dx_flat"),
        ({"part": "channel_scale", "weighted": True},
         "factors scale_flat | bwd_reduce dx_flat sums"),
    ],
    ids=str,
)  # fmt: skip
def test_launches_of_a_step(
    launches: list[tuple[str, Any]], options: dict[str, Any], expected: str
) -> None:
    problem = build(replace(Spec((2, 16, 5, 7), 4), **options))
    y = problem.call(squeeze_excite, problem.leaves(), backend="triton")
    launches.append(("|_kernel", None))
    y.backward(problem.dy)
    assert " ".join(name.removesuffix("_kernel") for name, _ in launches) == expected


@interpreted
@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (("x",), "bwd_reduce hidden_bwd excite_bwd dx_tile"),
        (("w1", "b1"), "bwd_reduce hidden_bwd excite_bwd"),
        (("w2",), "bwd_reduce excite_bwd"),
        (("b2",), "bwd_reduce excite_bwd"),
        (("alpha", "beta"), "bwd_reduce excite_bwd"),
        (("residual",), "dx_tile"),
        (("affine_scale",), "bwd_reduce hidden_bwd excite_bwd dx_tile sums"),
    ],
    ids=str,
)  # fmt: skip
def test_frozen_parameters_cost_no_launch(
    launches: list[tuple[str, Any]], needed: tuple[str, ...], expected: str
) -> None:
    spec = Spec((2, 16, 5, 7), 4, residual="contiguous", after="relu", weighted=True, affine=True)
    problem = build(spec)
    leaves = problem.leaves()
    right = torch.autograd.grad(
        problem.call(squeeze_excite, leaves, backend="reference"), [leaves[n] for n in needed],
        problem.dy,
    )  # fmt: skip
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in needed)
    y = problem.call(squeeze_excite, leaves, backend="triton")
    launches.clear()
    found = torch.autograd.grad(y, [leaves[n] for n in needed], problem.dy)
    assert " ".join(name.removesuffix("_kernel") for name, _ in launches) == expected
    for got, wanted in zip(found, right, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@interpreted
def test_explain_says_how_a_call_is_cut(on_device: Callable[[Device], None]) -> None:
    on_device(H200)

    def notes(*shape: int, **options: Any) -> str:
        x, w = torch.empty(shape), torch.empty(16, shape[1])
        return str(explain(x, w, None, w.T, None, backend="triton", **options))

    plain = notes(256, 64, 14, 14)
    assert "forward: 4 launches; sums by tiles of 16 x 32, 7 in flight; images" in plain
    assert "images written by flat vectors" in plain
    assert "backward: 4 launches" in plain
    odd = notes(256, 64, 7, 7, after="relu")
    assert "by tiles, since rows of 49 elements are no whole bytes of the bit mask" in odd
    assert "programs to a sum" in notes(1, 8, 112, 112)


@interpreted
def test_an_unprepared_call_is_refused_during_graph_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from senet_kernels.backends.triton import launch

    warm, cold = build(Spec((2, 16, 5, 7))), build(Spec((3, 16, 5, 7)))
    expected = warm.run(squeeze_excite, backend="triton")
    monkeypatch.setattr(launch, "_is_capturing", lambda x: True)
    again = warm.run(squeeze_excite, backend="triton")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    with pytest.raises(RuntimeError, match="before the capture, as a warm-up"):
        cold.run(squeeze_excite, backend="triton")


@interpreted
def test_what_a_prepared_call_depends_on() -> None:
    """Calls that differ in anything a kernel is compiled for are not taken for one another."""
    from senet_kernels.backends.triton import launch

    base = Spec((2, 8, 3, 5), 4)
    others: list[dict[str, Any]] = [
        {}, {"shape": (2, 8, 5, 3)}, {"shape": (3, 8, 3, 5)}, {"hidden": 5},
        {"dtype": torch.float16}, {"layout": "channels_last"}, {"layout": "misaligned"},
        {"layout": "strided"}, {"residual": "contiguous"}, {"dy_layout": "sliced_space"},
        {"bias": False}, {"weights": "transposed"}, {"gate": "tanh"}, {"lengths": True},
    ]  # fmt: skip
    kept = 0
    for changed in others:
        check(build(replace(base, **changed)), squeeze_excite, backend="triton")
        assert len(launch._calls) > kept, changed
        kept = len(launch._calls)
    # A kind that is known, with other values.
    check(build(replace(base, seed=1)), squeeze_excite, backend="triton")
    assert len(launch._calls) == kept


@interpreted
def test_sums_over_many_images() -> None:
    """More images than a chain of additions has terms, by the kernels that sum over the batch."""
    from senet_kernels.backends.triton.build import Builder
    from senet_kernels.backends.triton.operands import examine

    batch, channels, hidden = 2100, 3, 2
    x = torch.empty(1, channels, 1, 1).expand(batch, -1, -1, -1)
    w1, w2 = torch.randn(hidden, channels), torch.randn(channels, hidden)
    kind = examine((x, w1, None, w2), 0)
    made = make_plan(kind.shape, 4, kind.device, masked=False)
    build_ = Builder(kind, made, x, x.dtype)
    z, u, ds, du = (torch.randn(batch, channels) for _ in range(4))
    h, dh = torch.randn(batch, hidden), torch.randn(batch, hidden)
    found = [torch.empty_like(w2), torch.empty_like(w1)]
    found += [torch.full((n,), torch.nan) for n in (channels, hidden, channels, channels)]
    launch = build_.excite_bwd(dz=False, dw2=True, dw1=True, vectors=True)
    assert launch is not None
    launch(dh, w1, du, dh, h, z, u, ds, None, *found)
    z, u, ds, du, h, dh = (t.double() for t in (z, u, ds, du, h, dh))
    # Options 0: identity everywhere.
    right = (du.T @ h, dh.T @ z, du.sum(0), dh.sum(0), ds.sum(0), (ds * u).sum(0))
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@interpreted
def test_prepared_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launch

    monkeypatch.setattr(launch, "_MOST_KINDS", 3)
    for batch in range(1, 6):
        check(build(Spec((batch, 8, 2, 2), 2)), squeeze_excite, backend="triton")
        assert len(launch._calls) <= 3


@interpreted
def test_launches_are_made_on_the_device_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch, forward and backward, of the whole and of the halves."""
    from senet_kernels.backends.triton import halves, launch, launcher

    inside, launched = [0], []

    @contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        assert x.shape
        inside[0] += 1
        yield
        inside[0] -= 1

    call = launcher.Launch.__call__

    def guarded(self: launcher.Launch, *pointers: Any) -> None:
        assert inside[0] == 1, self.kernel.fn.__name__
        launched.append(self.kernel.fn.__name__)
        call(self, *pointers)

    for module in (launch, halves):
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", guard)
    monkeypatch.setattr(launcher.Launch, "__call__", guarded)
    launch.forget()
    relu = {"after": "relu", "affine": True}
    for options in (relu, {"part": "squeeze"}, {"part": "channel_scale"}):
        spec = replace(Spec((2, 20, 5, 7), 5), **options)  # type: ignore[arg-type]
        check(build(spec), squeeze_excite, backend="triton")
    launch.forget()
    assert len(set(launched)) >= 7


def test_threads_compile_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same options: others might add up in another order. The kernel pretended here spills
    until it has half as many threads."""
    from senet_kernels.backends.triton import launcher

    monkeypatch.setattr(launcher, "INTERPRETED", False)
    compiled, launched = [], []

    class Compiled:
        def __init__(self, warps: int) -> None:
            self.n_regs, self.n_spills, self.warps = 64, int(warps > 4), warps

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: launched.append(self.warps)

    class Kernel:
        arg_names = ("x",)

        def warmup(self, *pointers: Any, num_warps: int, **options: Any) -> Compiled:
            compiled.append(num_warps)
            time.sleep(0.01)
            return Compiled(num_warps)

        def __getitem__(self, grid: Any) -> Any:
            def run(*arguments: Any, num_warps: int, **options: Any) -> Compiled:
                launched.append(num_warps)
                return Compiled(num_warps)

            return run

    call = launcher.Launch(Kernel(), 1, {}, warps=8)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, [None] * 8))
    assert (compiled, launched) == ([8, 8, 8, 4], [4] * 8)


def test_the_guard_is_of_the_device_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launch

    def on(index: int) -> Any:
        device = torch.device("cuda", index)
        return SimpleNamespace(get_device=lambda: index, device=device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    other = launch.on_device(on(1))
    assert isinstance(other, torch.cuda.device)
    assert other.idx == 1
    assert isinstance(launch.on_device(on(0)), nullcontext)
    assert isinstance(launch.on_device(torch.empty(1)), nullcontext)


@interpreted
def test_no_arithmetic_on_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would do it on bit patterns: kernels must compute in float32 alone, or its
    verdict is worth nothing."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[Any] = []
    binary = InterpreterBuilder.binary_op

    def watched(self: Any, left: Any, right: Any, op: Any) -> Any:
        seen.extend(t.dtype.scalar for t in (left, right))
        return binary(self, left, right, op)

    monkeypatch.setattr(InterpreterBuilder, "binary_op", watched)
    for layout in ("contiguous", "channels_last"):
        spec = Spec((2, 20, 5, 7), 5, torch.bfloat16, layout, residual=layout, after="relu",
                    before="silu", affine=True, weighted=True, shift=True)  # fmt: skip
        for options in ({}, {"part": "squeeze"}, {"part": "channel_scale"}):
            check(build(replace(spec, **options)), squeeze_excite, backend="triton")
    assert tl.float32 in seen
    assert tl.bfloat16 not in seen


@interpreted
def test_the_interpreter_rounds_as_a_device_does() -> None:
    """And every bfloat16, subnormal or not, is the same number in float32."""
    import numpy as np

    import interpreter

    values = torch.cat([torch.randn(4096), torch.tensor([torch.inf, -torch.inf, 1 + 2**-8, 0.0])])
    right = values.bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(interpreter._rounded(values.numpy()), right)
    bits = torch.arange(1 << 16).to(torch.uint16)
    right = bits.view(torch.bfloat16).float().numpy()
    assert np.array_equal(interpreter._widened(bits.numpy()), right, equal_nan=True)


@interpreted
def test_what_the_sanitizer_sees() -> None:
    """``make gpu``'s script knows every kernel, and its first case is right."""
    from senet_kernels.backends.triton import build
    from tools import gpu_cases, gpu_kernels

    known = {kernel.__name__ for kernels in build.KERNELS.values() for kernel in kernels}
    assert known == gpu_cases.TRITON_KERNELS
    of_first = gpu_kernels.outcome("triton", "cpu", gpu_cases.TRITON_CASES[0])
    assert of_first["outcome"] == "ok", of_first


@pytest.mark.slow
@interpreted
def test_cases_of_make_gpu_run_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launcher
    from tools import gpu_cases, gpu_kernels

    launched: set[str] = set()
    call = launcher.Launch.__call__

    def record(self: launcher.Launch, *pointers: Any) -> None:
        launched.add(self.kernel.__name__)
        call(self, *pointers)

    monkeypatch.setattr(launcher.Launch, "__call__", record)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "triton", "cpu"])
    monkeypatch.setattr(gpu_kernels, "card", lambda backend, device: nullcontext())
    assert gpu_kernels.main() == 0
    assert launched == gpu_cases.TRITON_KERNELS
