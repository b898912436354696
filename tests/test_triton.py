"""What only the Triton backend has: plans, launches, index widths. Kernels run interpreted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from problems import Spec, build, check
from senet_kernels import explain, squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import plan, tuning
from senet_kernels.backends.triton.plan import (
    Choice,
    Device,
    Plan,
    Shape,
    candidates,
    fixed_choice,
    is_legal,
    make_plan,
    make_resident_plan,
)

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

H200 = Device("sm_90", 132)


@pytest.fixture(autouse=True)
def _nothing_prepared() -> Iterator[None]:
    """Tests here change what prepared calls depend on."""
    tuning.forget()  # and what was prepared
    yield
    tuning.enable(False)
    tuning.forget()


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


@pytest.mark.parametrize("device", [H200, Device("sm_80", 108), Device("", 1)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_plans_cover_the_image_in_legal_tiles(device: Device, itemsize: int) -> None:
    for shape in _workload_shapes() + _ODD:
        p = make_plan(shape, itemsize, device)
        for n in (p.G, p.BC, p.BS, p.BR, p.BK, p.warps):
            assert n >= 1, (shape, p)
            assert n & (n - 1) == 0, (shape, p)
        assert p.tiles * p.BC >= shape.channels, (shape, p)
        assert p.splits * p.steps * p.BS >= shape.positions, (shape, p)
        assert (p.splits - 1) * p.steps * p.BS < max(1, shape.positions), (shape, p)
        groups = plan.ceil_div(shape.batch, p.G * p.W)
        assert p.programs == groups * p.tiles * p.splits, (shape, p)
        assert p.steps <= 64, "longer chains of additions cost accuracy"
        assert p.G * p.BC * p.BS <= 16384, "too large for registers"
        assert (p.BC if shape.last else p.BS) % 8 == 0, "a byte of the mask has eight bits"


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_resident_plans_hold_whole_images(forward: bool) -> None:
    shapes = _workload_shapes() + _ODD
    plans = [(s, make_resident_plan(s, 2, H200, forward=forward)) for s in shapes]
    for shape, p in plans:
        if p is not None:
            assert shape.channels <= p.BC
            assert shape.positions <= p.BS
            assert p.G * p.BC * p.BS <= 8192, "too large for registers"
            assert p.programs * p.G >= shape.batch
            assert (p.BC if shape.last else p.BS) % 8 == 0, "a byte of the mask has eight bits"
    assert {p is None for _, p in plans} == {False, True}


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_candidates_are_legal(forward: bool) -> None:
    several = 0
    for shape in (_workload_shapes() + _ODD)[::7]:
        found = candidates(shape, 2, H200, forward)
        assert found[0] == fixed_choice(shape, 2, H200, forward)
        assert len(set(found)) == len(found)
        assert all(is_legal(choice, shape) for choice in found), (shape, found)
        several += len(found) > 3
    assert several > 50


@pytest.mark.parametrize(
    "wrong",
    [{"BC": 12}, {"BC": 0}, {"tiles": 1}, {"splits": 3}, {"steps": 1}, {"programs": 5},
     {"BS": 4, "steps": 8}, {"warps": 3}, {"G": 2.0}],
    ids=str,
)  # fmt: skip
def test_illegal_plans_are_told(wrong: dict[str, Any]) -> None:
    shape = Shape(3, 20, 30, 4, 20, False)
    right = Plan(G=1, BC=16, BS=8, BR=4, BK=2, tiles=2, splits=2, steps=2, programs=12, warps=4)
    assert is_legal(Choice(right), shape)
    assert not is_legal(Choice(right._replace(**wrong)), shape)
    assert not is_legal(Choice(right, resident=True), shape)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], None]:
    """Makes the plans those of a device."""
    from senet_kernels.backends.triton import operands

    def use(device: Device) -> None:
        monkeypatch.setattr(operands, "INTERPRETER", device)

    return use


# More programs per image than the interpreter's own plans have, and more images per program.
_SPECS = (
    Spec((1, 20, 40, 41), 5, torch.float32, residual="contiguous", after="relu"),
    Spec((1, 20, 40, 41), 5, torch.float32, "channels_last", before="silu", affine=True),
    Spec((2, 12, 70, 33), None, torch.float32, lengths=True, after="silu"),
    Spec((2, 260, 7, 9), 3, torch.float32, "channels_last", shift=True, weighted=True),
    Spec((2, 300, 3, 5), 20, torch.bfloat16, "channels_last", after="relu"),
    Spec((2, 9, 30, 31), None, torch.float64, shift=True, after="relu", residual="permuted"),
    # Rows that begin anywhere, moved as runs.
    Spec((2, 144, 7, 9), 6, torch.bfloat16, residual="contiguous", after="relu"),
    Spec((2, 72, 9, 19), 5, before="silu", affine=True, shift=True, lengths=True),
    Spec((2, 20, 40, 41), dtype=torch.bfloat16, part="squeeze", lengths=True, affine=True),
    Spec((2, 20, 40, 41), part="channel_scale", layout="channels_last", residual="contiguous",
         after="relu", shift=True, weighted=True, gate="tanh", before="silu", affine=True),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_split_images(spec: Spec, on_device: Callable[[Device], None]) -> None:
    on_device(H200)
    check(build(spec), squeeze_excite, backend="triton")


_FORCED = (
    Plan(G=2, BC=8, BS=8, BR=4, BK=2, tiles=2, splits=2, steps=2, programs=0, warps=4),
    Plan(G=4, BC=16, BS=8, BR=2, BK=1, tiles=1, splits=4, steps=1, programs=0, warps=4),
    Plan(G=1, BC=16, BS=32, BR=8, BK=16, tiles=1, splits=1, steps=1, programs=0, warps=4),
    Plan(G=1, BC=8, BS=8, BR=4, BK=2, tiles=2, splits=2, steps=2, programs=0, warps=4, W=2),
    Plan(G=1, BC=16, BS=32, BR=2, BK=1, tiles=1, splits=1, steps=1, programs=0, warps=4, W=4),
    Plan(G=2, BC=8, BS=32, BR=4, BK=2, tiles=2, splits=1, steps=1, programs=0, warps=4,
         flat=True),
    Plan(G=1, BC=8, BS=32, BR=8, BK=2, tiles=2, splits=1, steps=1, programs=0, warps=4, W=2,
         flat=True),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("forced", _FORCED, ids=str)
def test_every_cut_gives_the_result(
    forced: Plan, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the plan: it decides about speed only."""
    programs = plan.ceil_div(3, forced.G * forced.W) * forced.tiles * forced.splits
    flat = forced.flat and layout == "contiguous"
    choice = Choice(forced._replace(programs=programs, flat=flat))
    monkeypatch.setattr(tuning, "fixed_choice", lambda *_: choice)
    for hidden, shift in ((5, True), (None, False)):
        spec = Spec((3, 13, 3, 9), hidden, layout=layout, residual=layout, shift=shift,
                    affine=True, lengths=True, weighted=True, before="silu",
                    after="relu")  # fmt: skip
        check(build(spec), squeeze_excite, backend="triton")


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_64_bit_offsets_give_the_same_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends.triton import launch

    spec = Spec((3, 20, 5, 7), 4, layout=layout, residual=layout, after="relu", before="silu")
    narrow = build(spec).run(squeeze_excite, backend="triton")
    launch.forget()
    monkeypatch.setattr(launch, "wide", lambda *_: True)
    wide = build(spec).run(squeeze_excite, backend="triton")
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@interpreted
def test_offsets_are_wide_where_they_must_be() -> None:
    from senet_kernels.backends.triton import operands

    def wide(*shape: int, last: bool = False) -> bool:
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        if last:
            x = x.to(memory_format=torch.channels_last)
        w = torch.empty(shape[1], shape[1], device="meta", dtype=torch.bfloat16)
        kind = operands.examine((x, w, None, w), options=0)
        return operands.wide(kind, make_plan(kind.shape, x.element_size(), H200))

    operands_device = operands._device
    operands._device = lambda _: H200
    try:
        assert not wide(1024, 2048, 56, 56)  # more than 2^32 elements, but not in a program
        assert wide(1, 4, 1 << 15, 1 << 15)
        assert wide(1, 64, 1 << 13, 1 << 13, last=True)
    finally:
        operands._device = operands_device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, int]]]:
    """The kernels launched, and with which options."""
    from senet_kernels.backends.triton import launch

    seen: list[tuple[str, dict[str, int]]] = []
    call = launch.Launch.__call__

    def record(self: launch.Launch, *pointers: Any) -> None:
        seen.append((self.kernel.fn.__name__, self._options))
        call(self, *pointers)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    return seen


_OF_IMAGES = ["resident_kernel"], ["resident_backward_kernel", "parameters_kernel"]
_SHARED = ["squeeze_kernel", "scale_kernel"], ["dots_kernel", "dx_kernel", "parameters_kernel"]


@interpreted
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, _OF_IMAGES),
        ({"layout": "channels_last", "residual": "contiguous", "after": "relu"}, _OF_IMAGES),
        ({"shape": (2, 20, 30, 31)}, _SHARED),
        ({"hidden": None}, _SHARED),
        ({"part": "squeeze"}, (["squeeze_kernel"], ["half_backward_kernel"])),
        ({"part": "squeeze", "shape": (2, 2, 70, 31)},
         (["squeeze_kernel", "add_parts_kernel"], ["half_backward_kernel"])),
        ({"part": "channel_scale"},
         (["scale_kernel"], ["half_backward_kernel", "half_parameters_kernel"])),
    ],
    ids=str,
)  # fmt: skip
def test_launches_of_a_step(
    launches: list[tuple[str, Any]], options: dict[str, Any],
    expected: tuple[list[str], list[str]],
) -> None:  # fmt: skip
    problem = build(replace(Spec((2, 16, 5, 7), 4), **options))
    y = problem.call(squeeze_excite, problem.leaves(), backend="triton")
    assert [name for name, _ in launches] == expected[0]
    launches.clear()
    y.backward(problem.dy)
    assert [name for name, _ in launches] == expected[1]


@interpreted
def test_explain_says_how_a_call_is_cut(on_device: Callable[[Device], None]) -> None:
    on_device(H200)

    def notes(*shape: int) -> str:
        x, w = torch.empty(shape), torch.empty(16, shape[1])
        return str(explain(x, w, None, w.T, None, backend="triton"))

    small = notes(2, 16, 5, 7)
    assert "forward: one launch over images, 1 on chip per program" in small
    large = notes(2, 200, 15, 16)
    assert "backward: two launches over images, shared by 13 programs" in large
    heavy = notes(256, 2048, 5, 5)
    assert "two launches over images, 8 at a time" in heavy


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
@pytest.mark.parametrize("batch", [9, 530])  # more than a program takes at once, than a chain takes
@pytest.mark.parametrize("part", ["whole", "channel_scale"])
def test_sums_over_many_images(part: str, batch: int) -> None:
    shift = part == "channel_scale"
    spec = Spec((batch, 3, 2, 2), 2, part=part, affine=True, weighted=True, shift=shift)
    check(build(spec), squeeze_excite, backend="triton")


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
    from senet_kernels.backends.triton import halves, launch

    inside, launched = [0], []

    @contextmanager
    def guard(x: torch.Tensor) -> Iterator[None]:
        assert x.shape
        inside[0] += 1
        yield
        inside[0] -= 1

    call = launch.Launch.__call__

    def guarded(self: launch.Launch, *pointers: Any) -> None:
        assert inside[0] == 1, self.kernel.fn.__name__
        launched.append(self.kernel.fn.__name__)
        call(self, *pointers)

    for module in (launch, halves):
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", guard)
    monkeypatch.setattr(launch.Launch, "__call__", guarded)
    launch.forget()
    for options in ({}, {"shape": (2, 20, 30, 31)}, {"part": "squeeze"}, {"part": "channel_scale"}):
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
        return SimpleNamespace(is_cuda=True, get_device=lambda: index, device=device)

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
    from senet_kernels.backends.triton import halves, launch
    from tools import gpu_kernels

    known = {n for module in (launch, halves) for n in vars(module) if n.endswith("_kernel")}
    assert known == gpu_kernels.TRITON_KERNELS
    gpu_kernels.run("triton", "cpu", gpu_kernels.TRITON_CASES[0])
