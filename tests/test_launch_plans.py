"""How the CUDA kernels would be launched on devices that need not be here."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cuda_on_cpu
import policies
from benchmarks import regimes
from benchmarks.workloads import load_networks
from policies import PLAN, POLICIES, parsed
from problems import Spec, build
from senet_kernels import explain, features, squeeze_excite
from senet_kernels.backends import native
from senet_kernels.backends.native import Gpu, launch_plan

pytestmark = pytest.mark.skipif(
    bool(native.UNAVAILABLE or native.unavailable_on("cuda")),
    reason="the library was built without CUDA kernels",
)

T4 = Gpu(75, 40, 65_536, 65_536, 1024)
A100 = Gpu(80, 108, 166_912, 167_936)
RTX_3090 = Gpu(86, 82, 101_376, 102_400, 1536)
H100 = Gpu(90, 132, 232_448, 233_472)
RTX_5090 = Gpu(120, 170, 101_376, 102_400, 1536)
GPUS = (T4, A100, RTX_3090, H100, RTX_5090)


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if last else t


def _plan(
    gpu: Gpu, channels: int, hidden: int, side: int,
    after: str = "identity", last: bool = False, backward: bool = False,
) -> str:  # fmt: skip
    x = _tensor(256, channels, side, side, last=last)
    w1, w2 = _tensor(hidden, channels), _tensor(channels, hidden)
    given = ("residual",) if after == "relu" else ()
    return launch_plan(x, w1, w2, after=after, given=given, backward=backward, gpu=gpu)


def test_the_layers_of_se_resnet_50() -> None:
    """An H100 keeps every image in one block's shared memory or a cluster's, for a single pass."""
    for channels, hidden, side in ((256, 16, 56), (512, 32, 28), (1024, 64, 14), (2048, 128, 7)):
        for last, backward in itertools.product((False, True), repeat=2):
            plan = _plan(H100, channels, hidden, side, last=last, backward=backward)
            assert "single pass" in plan, plan
            assert "element by element" not in plan
    assert "cluster of" in _plan(H100, 256, 16, 56)
    assert "exchange through global memory" in _plan(A100, 256, 16, 56)  # it has no clusters


def test_the_classes_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read from the words of a plan."""
    for channels, side in ((2048, 7), (256, 56)):
        assert regimes.memory_class(_plan(H100, channels, 16, side)) == regimes.TWO_FIT
    monkeypatch.setenv(PLAN, "exchange=none,resident=1,slots=1")
    assert regimes.memory_class(_plan(H100, 2048, 16, 7)) == regimes.ONE_FITS
    monkeypatch.setenv(PLAN, "exchange=none,resident=0")
    assert regimes.memory_class(_plan(H100, 2048, 16, 7)) == regimes.REREAD


@pytest.mark.parametrize("side", [14, 7])
def test_a_bit_mask_of_odd_rows_costs_nothing(side: int) -> None:
    """14x14 and 7x7 are no whole bytes of a mask."""
    for last in (False, True):
        without = _plan(H100, 1024, 64, side, last=last)
        with_mask = _plan(H100, 1024, 64, side, after="relu", last=last)
        assert "single pass" in without
        assert "single pass" in with_mask
        assert "element by element" not in with_mask


def test_a_plan_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN, "exchange=none,resident=0")
    assert _plan(H100, 1024, 64, 14).startswith("one block per image")
    assert "two passes" in _plan(H100, 1024, 64, 14)
    monkeypatch.setenv(PLAN, "speed=1")
    assert "expected exchange, blocks" in _plan(H100, 1024, 64, 14)


# Calls, and which of their passes take the lean loops.
_SMALL = Spec((2, 16, 6, 8), 4, torch.bfloat16)
_BOTH, _NEITHER = ("forward", "backward"), ()
_LEAN: tuple[tuple[Spec, tuple[str, ...]], ...] = (
    (_SMALL, _BOTH),
    (replace(_SMALL, layout="channels_last", before="hardswish"), _BOTH),
    (replace(_SMALL, residual="contiguous", after="relu"), _BOTH),
    (replace(_SMALL, residual="contiguous"), ("backward",)),
    (replace(_SMALL, after="relu"), ("backward",)),
    (replace(_SMALL, shape=(2, 16, 5, 7), residual="contiguous", after="relu"), ("forward",)),
    (replace(_SMALL, after="silu"), _NEITHER),
    (replace(_SMALL, lengths=True), _NEITHER),
    (replace(_SMALL, affine=True), _NEITHER),
    (replace(_SMALL, shift=True), _NEITHER),
    (replace(_SMALL, before="gelu"), _NEITHER),
    (replace(_SMALL, dtype=torch.float32, before="silu"), _BOTH),
    (replace(_SMALL, dtype=torch.float32, before="relu"), _NEITHER),
    (replace(_SMALL, shape=(2, 16, 1, 7)), _NEITHER),
)


@pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=str(cuda_on_cpu.why_not()))
@pytest.mark.parametrize(("spec", "lean"), _LEAN, ids=str)
def test_lean_loops_are_named_where_they_run(spec: Spec, lean: tuple[str, ...]) -> None:
    """By the plan's words, and by the kernels that are launched on a simulated device."""
    problem = build(spec)
    with cuda_on_cpu.plugged_in(device=policies.H100) as simulation:
        problem.run(squeeze_excite, backend="native")
        launches = "\n".join(simulation.take_launches())
    launched = re.findall(r"(forward|backward)_kernel<.*, (\d)>", launches)
    assert {direction for direction, _ in launched} == set(_BOTH)
    assert {direction for direction, way in launched if way != "0"} == set(lean)
    optional = {"lengths": spec.lengths, "residual": spec.residual, "before_affine": spec.affine}
    given = [name for name, value in optional.items() if value]
    x, w1, w2 = (problem.tensors[name] for name in ("x", "w1", "w2"))
    assert x is not None
    assert w2 is not None
    for direction in _BOTH:
        plan = launch_plan(
            x, w1, w2, before=spec.before, after=spec.after, given=given,
            backward=direction == "backward", gpu=H100,
        )  # fmt: skip
        assert ("lean loops" in plan) == (direction in lean), plan


# Exchange, axis, residency, and whether weights are kept.
_Kind = tuple[str, str, bool, bool]


def _kind(plan: str) -> _Kind:
    exchange = next((name for words, name in (("cluster of", "cluster"), ("global memory", "grid"))
                     if words in plan), "none")  # fmt: skip
    axis = "space" if "split in space" in plan else "channels"
    return exchange, axis, "single pass" in plan, "weights kept" in plan


def _forced_kind(policy: str) -> _Kind:
    asked = parsed(policy)
    exchange, axis = asked.get("exchange", "none"), asked.get("axis", "channels")
    return exchange, axis, asked.get("resident") == "1", asked.get("weights") == "1"


def test_every_kind_of_plan_for_real_layers_is_forced_by_a_policy() -> None:
    """What runs on a device has run on the CPU, under sanitizers and in races."""
    layers = {x for n in load_networks(neighbours=True).values() for x, _ in n.layers}
    chosen: dict[_Kind, str] = {}
    for layer, gpu, batch, last, backward in itertools.product(
        layers, GPUS, (1, 32, 256), (False, True), (False, True)
    ):
        inner = layer.hidden or layer.channels
        x = _tensor(batch, layer.channels, layer.positions, 1, last=last)
        w1 = _tensor(inner, layer.channels) if layer.hidden else None
        w2 = _tensor(layer.channels * (1 + layer.shift), inner)
        after = layer.after or "identity"
        given = ("residual",) if layer.add else ()
        plan = launch_plan(x, w1, w2, after=after, given=given, backward=backward, gpu=gpu)
        chosen[_kind(plan)] = f"{layer}, {batch=}, {last=}, {backward=} on sm_{gpu.capability}"
    assert len(chosen) > 10
    forced = set(map(_forced_kind, POLICIES))
    assert not {kind: where for kind, where in chosen.items() if kind not in forced}


def _least_that_is_wide(
    single: bool, ratio: int, shift: bool, affine: bool, dtype: torch.dtype
) -> int:
    """The least C that is too wide for the CUDA kernels."""
    low, high = 1, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        x = _tensor(1, middle, 1, 1, dtype=dtype)
        inner = middle if single else max(1, middle // ratio)
        wide = features.is_wide(x, inner, middle * (2 if shift else 1), affine)
        low, high = (low, middle) if wide else (middle, high)
    return high


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.capability)
def test_what_is_not_too_wide_has_a_plan(gpu: Gpu) -> None:
    forms = [(True, 1), (False, 1), (False, 4), (False, 1 << 20)]
    for (single, ratio), shift, affine in itertools.product(forms, (False, True), (False, True)):
        for dtype in (torch.bfloat16, torch.float64):
            channels = _least_that_is_wide(single, ratio, shift, affine, dtype) - 1
            hidden = channels if single else max(1, channels // ratio)
            w1 = None if single else _tensor(hidden, channels, dtype=dtype)
            w2 = _tensor(channels * (2 if shift else 1), hidden, dtype=dtype)
            for last, backward, batch, side in itertools.product(
                (False, True), (False, True), (1, 300), (1, 14)
            ):
                x = _tensor(batch, channels, side, side, dtype=dtype, last=last)
                # relu: bits of its mask are gathered in shared memory
                given = ("before_affine",) if affine else ("residual",)
                plan = launch_plan(x, w1, w2, after="relu", given=given, backward=backward, gpu=gpu)
                where = f"{list(x.shape)}, R={hidden}, {shift=}, {affine=}, {last=}, {backward=}"
                assert not plan.startswith("no plan"), f"{where}: {plan}"


def test_real_layers_are_not_wide() -> None:
    """Nor is 65,537, which one test of launch grids is about; 20,000 by 20,000 is."""
    for channels, hidden in ((7392, 1848), (3712, 232), (2688, 112), (65_537, 1)):
        assert not features.is_wide(_tensor(1, channels, 1, 1), hidden, channels, affine=False)
    assert features.is_wide(_tensor(1, 20_000, 1, 1), 20_000, 20_000, affine=False)


def test_wide_calls_still_run_fused_on_the_cpu() -> None:
    x, w1, w2 = torch.randn(1, 4, 3), torch.randn(30_000, 4), torch.randn(4, 30_000)
    answer = explain(x, w1, None, w2, None)
    assert answer.call.wide
    assert answer.backend == "native"
    y, right = (squeeze_excite(x, w1, None, w2, None, backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
