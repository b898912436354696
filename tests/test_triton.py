"""What only the Triton backend has: plans, launches, index widths. Kernels run interpreted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from problems import Spec, build, check
from senet_kernels import squeeze_excite
from senet_kernels.backends import triton
from senet_kernels.backends.triton import plan
from senet_kernels.backends.triton.plan import Device, Plan, Shape, make_plan, make_resident_plan

interpreted = pytest.mark.skipif(not triton.INTERPRETED, reason="needs TRITON_INTERPRET=1")

H200 = Device((9, 0), 132)


def _workload_shapes() -> list[Shape]:
    path = Path(__file__).parent.parent / "benchmarks" / "workloads.json"
    return [
        Shape(batch, la["channels"], la["height"] * la["width"], la["hidden"] or 0,
              la["channels"], last)
        for network in json.loads(path.read_text())["networks"]
        for la in network["layers"]
        for batch in (1, 8, 256)
        for last in (False, True)
    ]  # fmt: skip


_ODD = [
    Shape(b, c, s, r, o * c, last)
    for b in (0, 1, 5, 65537)
    for c in (0, 1, 3, 17, 4097)
    for s in (0, 1, 49, 1 << 20)
    for r in (0, 1, 257)
    for o in (1, 2)
    for last in (False, True)
]


@pytest.mark.parametrize("device", [H200, Device((8, 0), 108), Device((0, 0), 1)], ids=str)
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
        groups = plan.ceil_div(shape.batch, p.G)
        assert p.programs == groups * p.tiles * p.splits, (shape, p)
        assert p.steps <= 64, "longer chains of additions cost accuracy"
        assert p.G * p.BC * p.BS <= 16384, "too large for registers"
        assert (p.BC if shape.last else p.BS) % 8 == 0, "a byte of the mask has eight bits"


def test_resident_plans_hold_whole_images() -> None:
    plans = [(s, make_resident_plan(s, 2, H200)) for s in _workload_shapes() + _ODD]
    for shape, p in plans:
        if p is not None:
            assert shape.channels <= p.BC
            assert shape.positions <= p.BS
            assert p.G * p.BC * p.BS <= 8192, "too large for registers"
            assert p.programs * p.G >= shape.batch
            assert (p.BC if shape.last else p.BS) % 8 == 0, "a byte of the mask has eight bits"
    assert any(p is not None for _, p in plans)
    assert any(p is None for _, p in plans)


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
)


@interpreted
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_split_images(spec: Spec, on_device: Callable[[Device], None]) -> None:
    on_device(H200)
    check(build(spec), squeeze_excite, backend="triton")


_FORCED = (
    Plan(G=2, BC=8, BS=8, BR=4, BK=2, tiles=2, splits=2, steps=2, programs=0, warps=4),
    Plan(G=4, BC=16, BS=8, BR=2, BK=1, tiles=1, splits=4, steps=1, programs=0, warps=4),
    Plan(G=1, BC=16, BS=32, BR=8, BK=16, tiles=1, splits=1, steps=1, programs=0, warps=4),
)


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("forced", _FORCED, ids=str)
def test_every_cut_gives_the_result(
    forced: Plan, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the plan: it decides about speed only."""
    from senet_kernels.backends.triton import operands

    programs = plan.ceil_div(3, forced.G) * forced.tiles * forced.splits
    monkeypatch.setattr(operands, "make_plan", lambda *_: forced._replace(programs=programs))
    monkeypatch.setattr(operands, "make_resident_plan", lambda *_: None)
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
        o = operands.make_operands(x, w, None, w, *[None] * 6, options=0)
        return operands.wide(o, o.plan, o.x)

    operands_device = operands._device
    operands._device = lambda _: H200
    try:
        assert not wide(1024, 2048, 56, 56)  # more than 2^32 elements, but not in a program
        assert wide(1, 4, 1 << 15, 1 << 15)
        assert wide(1, 64, 1 << 13, 1 << 13, last=True)
    finally:
        operands._device = operands_device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    launcher = InterpretedFunction.__getitem__

    def record(self: Any, grid: Any) -> Any:
        names.append(self.fn.__name__)
        return launcher(self, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", record)
    return names


@interpreted
def test_at_most_two_launches_forward_and_three_backward(launches: list[str]) -> None:
    for options in ({}, {"layout": "channels_last", "residual": "contiguous", "after": "relu"}):
        problem = build(Spec((2, 16, 5, 7), 4, **options))
        leaves = problem.leaves()
        y = problem.call(squeeze_excite, leaves, backend="triton")
        assert len(launches) <= 2
        launches.clear()
        y.backward(problem.dy)
        assert len(launches) <= 3
        launches.clear()
