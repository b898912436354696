"""The CUDA kernels, simulated on the CPU: every policy of their plans, every simulated device, any
order of threads, under AddressSanitizer too. The suite for all backends runs them as well, as the
backend ``simulated-cuda``.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import cuda_on_cpu
from backend_cases import SIMULATED
from policies import A100, DEVICES, PLAN, POLICIES, SMALL_90, parsed
from problems import LAYOUTS, Problem, Spec, build, check, pairwise
from senet_kernels import squeeze_excite

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=str(cuda_on_cpu.why_not())),
]

_SANITIZED = os.environ.get(cuda_on_cpu.SANITIZED) == "1"
# Positions that units of eight divide and do not; channels that blocks do not share evenly, even
# where a block's part is a multiple of 64 bytes; weights larger than the image.
SHAPES = (((5, 136, 6, 8), 12), ((5, 160, 3, 5), 6), ((5, 136, 2, 4), 72), ((5, 133, 5, 5), 3))
BLOCKS: tuple[dict[str, Any], ...] = (
    {},
    {"before": "silu", "activation": "silu"},
    {"before": "relu", "residual": "contiguous", "after": "relu"},
    {"shift": True, "weighted": True, "gate": "hardsigmoid"},
    {"lengths": True, "before": "hardswish"},
    {"hidden": None, "before": "gelu"},
    {"residual": "channels_last", "after": "gelu", "dy_layout": "channels_last"},
    {"bias": False, "weighted": True, "after": "relu", "affine": True},
    {"residual": "misaligned", "after": "silu", "activation": "gelu"},
    {"dy_layout": "misaligned_channels_last"},
    {"part": "squeeze", "before": "silu"},
    {"part": "squeeze", "lengths": True, "affine": True},
    {"part": "channel_scale", "gate": "sigmoid", "before": "hardswish"},
    {"part": "channel_scale", "residual": "contiguous", "after": "relu", "shift": True},
    {"part": "channel_scale", "weighted": True, "affine": True, "after": "gelu"},
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the whole product. Small: of all that a call takes the most is for its threads. Four images: a
# ring of three slots goes round. The first shape is legal for every policy.
SMALL_SHAPES = (((4, 136, 2, 4), 72), ((4, 104, 3, 5), 6), ((4, 101, 5, 5), 3))
MORE_BLOCKS: tuple[dict[str, Any], ...] = (
    *BLOCKS,
    {"hidden": None, "shift": True, "weighted": True},
    {"affine": True, "shift": True, "lengths": True, "before": "hardswish", "after": "relu"},
    {"residual": "sliced_channels", "dy_layout": "sliced_channels", "after": "relu"},
)


def _is_legal(policy: str, spec: Spec) -> bool:
    """Whether the plan takes the policy; tests hold it to that, and to the reverse."""
    asked = parsed(policy)
    channels, positions = spec.shape[1], spec.shape[2] * spec.shape[3]
    last = "channels_last" in spec.layout
    if asked.get("axis") == "space" and not last:
        return False
    if asked.get("resident") != "1":
        return True
    # Both passes of the whole operation, and 16-byte accesses to x, dy and the residual. (Ops copy
    # what is not laid out like x.)
    if spec.part != "whole" or spec.dtype == torch.float64:
        return False
    misaligned = "misaligned_channels_last" if last else "misaligned"
    images = (spec.layout, spec.residual, spec.dy_layout)
    if misaligned in images or ("sliced_channels" in images and not last and positions % 8):
        return False
    return (channels if last else channels * positions) % 8 == 0


def _may_not_fit(policy: str, spec: Spec) -> bool:
    """Whether the plan may have no room for the weights that the policy wants to stay. Devices have
    163 KB of shared memory and more, of which the rest takes no more than 40."""
    asked = parsed(policy)
    if asked.get("weights") != "1" or spec.part != "whole":
        return False
    channels, outputs = spec.shape[1], spec.shape[1] * (1 + spec.shift)
    weights = outputs * channels if spec.hidden is None else spec.hidden * (channels + outputs)
    # Blocks that cut an image in space have all of the weights each.
    blocks = 1 if asked.get("axis") == "space" else int(asked.get("blocks", 1))
    return weights * spec.dtype.itemsize / blocks > 120 << 10


# All that is chosen of a case beside its device; every pair of choices that is legal is in one.
CHOICES: dict[str, tuple[Any, ...]] = {
    "policy": tuple(POLICIES),
    "dtype": DTYPES,
    "layout": ("contiguous", "channels_last", "misaligned", "misaligned_channels_last"),
    "shape": SHAPES,
    "block": BLOCKS,
}


def _spec(row: dict[str, Any], seed: int = 0) -> Spec:
    shape, hidden = row["shape"]
    return replace(Spec(shape, hidden, row["dtype"], row["layout"], seed=seed), **row["block"])


def _computes(row: dict[str, Any]) -> bool:
    policy, spec = row["policy"], _spec(row)
    fits = spec.fits(SIMULATED) and not _may_not_fit(policy, spec)
    return fits and _is_legal(policy, spec)


def _cases() -> list[Any]:
    cases = []
    devices = {policy: itertools.cycle(devices) for policy, devices in POLICIES.items()}
    seen = set()
    for i, row in enumerate(pairwise(CHOICES, _computes)):
        policy, spec = row["policy"], _spec(row, seed=i)
        device = next(devices[policy])
        # Under sanitizers the gate runs one case of each policy: they take half a second.
        marks = [pytest.mark.slow] if _SANITIZED and policy in seen else []
        seen.add(policy)
        name = f"{policy or 'automatic'}-{device}-{spec}"
        cases.append(pytest.param(policy, device, spec, id=name, marks=marks))
    return cases


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Any:
    def to(policy: str) -> None:
        monkeypatch.setenv(PLAN, policy)

    return to


def _as_asked(policy: str, part: str, launches: list[str]) -> None:
    """The launches are of the kind that the policy says."""
    asked = parsed(policy)
    # Forward the squeeze adds up, backward the scaling, and only where blocks share channels; the
    # other passes of the halves have nothing to exchange.
    adding = {"squeeze": 0, "channel_scale": 1}
    for i in range(2):
        exchange = asked.get("exchange")
        if part != "whole" and not (adding[part] == i and asked.get("axis") == "space"):
            exchange = exchange and "none"
        if exchange:
            blocks = asked["blocks"] if exchange == "cluster" else "1"
            assert f" cluster={blocks} " in launches[i]
            assert launches[i].endswith(" cooperative") == (exchange == "grid")
        if "threads" in asked:
            assert f" threads={asked['threads']} " in launches[i]


def _is_refused(problem: Problem) -> None:
    with pytest.raises(RuntimeError, match=f"{PLAN}: (axis=space|resident=1) is for"):
        problem.run(squeeze_excite, backend="native")


def computes_right(policy: str, spec: Spec, simulation: cuda_on_cpu.Simulation) -> None:
    simulation.take_launches()
    check(build(spec), squeeze_excite, backend="native")
    launches = simulation.take_launches()
    assert 2 <= len(launches) <= 3, launches
    _as_asked(policy, spec.part, launches)


@pytest.mark.parametrize(("policy", "device", "spec"), _cases())
def test_policies(policy: str, device: int, spec: Spec, force: Any) -> None:
    force(policy)
    with cuda_on_cpu.plugged_in(spec.seed, device) as simulation:
        computes_right(policy, spec, simulation)


def _pairs(row: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
    return itertools.combinations(enumerate(row), 2)


def test_every_legal_pair_of_choices_is_in_a_case() -> None:
    legal = set()
    for row in itertools.product(*(range(len(choices)) for choices in CHOICES.values())):
        chosen = {n: CHOICES[n][i] for n, i in zip(CHOICES, row, strict=True)}
        if not legal.issuperset(_pairs(row)) and _computes(chosen):
            legal.update(_pairs(row))
    rows = ([CHOICES[n].index(c) for n, c in row.items()] for row in pairwise(CHOICES, _computes))
    assert set(itertools.chain.from_iterable(map(_pairs, rows))) == legal


@pytest.mark.parametrize("layout", CHOICES["layout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_what_is_not_legal_is_refused(dtype: torch.dtype, layout: str, force: Any) -> None:
    """All of it, that is, what the cases above leave out; with one image each."""
    with cuda_on_cpu.plugged_in() as simulation:
        for block, ((_, *sizes), hidden) in itertools.product(BLOCKS, SHAPES):
            spec = replace(Spec((1, *sizes), hidden, dtype, layout), **block)
            problem = build(spec)
            for policy in (policy for policy in POLICIES if not _is_legal(policy, spec)):
                force(policy)
                simulation.use(0, POLICIES[policy][0])
                _is_refused(problem)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "weights=1" in policy])
def test_weights_that_do_not_fit_are_refused(policy: str, force: Any) -> None:
    force(policy)
    spec = Spec((1, 136, 6, 8), 800, layout="channels_last", shift=True)
    assert _may_not_fit(policy, spec)
    for device in POLICIES[policy]:
        with (
            cuda_on_cpu.plugged_in(device=device),
            pytest.raises(RuntimeError, match=f"{PLAN}: the weights do not fit"),
        ):
            build(spec).run(squeeze_excite, backend="native")


def _hold_to(policy: str, spec: Spec, simulation: cuda_on_cpu.Simulation) -> bool:
    """Whether the policy, which is forced, gives results, and right ones; or else is refused where
    it is not legal, or may not fit."""
    if not _is_legal(policy, spec):
        _is_refused(build(spec))
        return False
    try:
        computes_right(policy, spec, simulation)
    except RuntimeError as error:
        if "the weights do not fit" in str(error) and _may_not_fit(policy, spec):
            return False
        raise
    return True


def _groups() -> list[Any]:
    """Policy, device, dtype and layout. All that the product has beside them is one test: tens of
    thousands of them would take minutes to collect."""
    grid = itertools.product(POLICIES.items(), DTYPES, LAYOUTS)
    return [
        pytest.param(policy, device, dtype, layout, id=f"{policy or 'automatic'}-{device}-"
                     f"{str(dtype).removeprefix('torch.')}-{layout}")
        for (policy, devices), dtype, layout in grid
        for device in devices
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "device", "dtype", "layout"), _groups())
def test_every_policy_with_everything(
    policy: str, device: int, dtype: torch.dtype, layout: str, force: Any
) -> None:
    """Every policy, device, dtype, layout, shape and block, with nothing left out: what is not
    legal has to be refused. 97,200 cases, a quarter of an hour of one core."""
    force(policy)
    outcomes: Counter[bool] = Counter()
    wrong = {}
    with cuda_on_cpu.plugged_in(0, device) as simulation:
        for i, (block, (shape, hidden)) in enumerate(itertools.product(MORE_BLOCKS, SMALL_SHAPES)):
            spec = replace(Spec(shape, hidden, dtype, layout, seed=i), **block)
            simulation.use(i, device)
            try:
                outcomes[_hold_to(policy, spec, simulation)] += 1
            except (AssertionError, RuntimeError, pytest.fail.Exception) as error:
                wrong[str(spec)] = str(error)
    assert not wrong, f"{len(wrong)} of {i + 1}: {wrong}"
    assert outcomes[True] or not _is_legal(policy, Spec(SMALL_SHAPES[0][0], 72, dtype, layout))


@pytest.mark.parametrize(
    "policy", ["", "exchange=none,resident=1", "exchange=cluster,blocks=2,resident=0"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_rows(policy: str, dtype: torch.dtype, force: Any) -> None:
    """Several warps share the sum of a row."""
    force(policy)
    problem = build(Spec((3, 4, 50, 44), 2, dtype, before="relu"))
    for seed in range(6):
        with cuda_on_cpu.plugged_in(seed, SMALL_90):
            check(problem, squeeze_excite, backend="native")


@pytest.mark.parametrize("positions", range(1, 12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_of_short_rows(positions: int, dtype: torch.dtype) -> None:
    """Backward a unit may be of up to eight channels, each with a byte of the mask."""
    problem = build(Spec((3, 24, positions), 5, dtype, after="relu"))
    for seed in range(2):
        with cuda_on_cpu.plugged_in(seed, A100):
            check(problem, squeeze_excite, backend="native")


@pytest.mark.parametrize(
    "policy", ["exchange=none,resident=0", "exchange=none,resident=1", "exchange=cluster,blocks=2"]
)
@pytest.mark.parametrize("positions", [1, 3, 49, 575])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_of_several_stretches(
    policy: str, positions: int, dtype: torch.dtype, force: Any
) -> None:
    """Forward the bits of so many units are gathered at a time, here of 512: some bytes of the mask
    have bits of two stretches."""
    blocks = int(parsed(policy).get("blocks", 1))
    channels = 16 * blocks * (9000 // (16 * positions) + 1)
    assert channels * positions // 8 // blocks > 2 * 512
    force(f"threads=32,{policy}")
    problem = build(Spec((2, channels, positions), 5, dtype, residual="contiguous", after="relu"))
    for seed in range(3):
        with cuda_on_cpu.plugged_in(seed, SMALL_90) as simulation:
            simulation.take_launches()
            check(problem, squeeze_excite, backend="native")
            assert f"cluster={blocks} " in simulation.take_launches()[0]


@pytest.mark.parametrize("channels", [1000, 1200])
def test_rows_of_channels_in_two_parts(channels: int, force: Any) -> None:
    """As many as the threads of a block have room for twice, forward or backward."""
    force("exchange=none,resident=0")
    with cuda_on_cpu.plugged_in(1, A100):
        check(
            build(Spec((2, channels, 5), 3, layout="channels_last")),
            squeeze_excite,
            backend="native",
        )


def _bits(problem: Problem) -> list[bytes]:
    results = problem.run(squeeze_excite, backend="native")
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in results.values()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy or "automatic")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_in_any_order(policy: str, layout: str, force: Any) -> None:
    # Contiguous the rows are no whole bytes of the mask.
    shape = (5, 136, 4, 6) if layout == "channels_last" else (5, 136, 3, 7)
    spec = Spec(shape, 12, torch.bfloat16, layout, residual=layout, after="relu")
    if not _is_legal(policy, spec):
        pytest.skip("not a policy for this layout")
    force(policy)
    problem = build(spec)
    expected = None
    for seed in range(9):
        with cuda_on_cpu.plugged_in(seed, POLICIES[policy][0]):
            bits = _bits(problem)
        assert expected is None or bits == expected
        expected = bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((1, 64, 28, 28), 16), ((1, 512, 7, 7), 128), ((2, 32, 40, 41), 8)]
)
def test_one_launch_forward_two_backward(
    device: int, layout: str, shape: tuple[int, ...], hidden: int
) -> None:
    spec = Spec(shape, hidden, torch.float16, layout, before="silu", activation="silu")
    problem = build(spec)
    with cuda_on_cpu.plugged_in(1, device) as simulation:
        with torch.no_grad():
            problem.call(squeeze_excite, backend="native")
        assert len(simulation.take_launches()) == 1
        check(problem, squeeze_excite, backend="native")
        assert len(simulation.take_launches()) <= 3


@pytest.mark.parametrize("policy", [p for p in POLICIES if "resident" in p])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("after", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [None, "contiguous"])
def test_what_is_read_is_asked_for(
    policy: str, layout: str, after: str, residual: str | None, force: Any
) -> None:
    """Once, all of it and nothing else: what does not come into shared memory by itself. (Each
    slice is of whole sectors here.)"""
    force(policy)
    if "axis=space" in policy and layout == "contiguous":
        pytest.skip("not a policy for this layout")
    residual = residual and layout
    spec = Spec((5, 160, 4, 8), 6, torch.float16, layout, dy_layout=layout)
    spec = replace(spec, residual=residual, after=after)
    problem = build(spec)
    t = problem.tensors
    resident = "resident=1" in policy
    with cuda_on_cpu.plugged_in(3, POLICIES[policy][0]) as simulation:
        with simulation.accesses() as forward, torch.no_grad():
            problem.call(squeeze_excite, backend="native")
        x = t["x"].requires_grad_()
        y = problem.call(squeeze_excite, backend="native")
        with simulation.accesses() as backward:
            torch.autograd.grad(y, x, problem.dy)
    first = [] if resident else ["x"]
    assert forward.prefetches() == _sectors(*(t[n] for n in (*first, "residual")))
    again = [x] + ([] if resident else [problem.dy])
    assert backward.prefetches() == _sectors(*again, t["residual"] if after == "silu" else None)


@pytest.mark.parametrize("policy", [p for p in POLICIES if "resident" in p])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 160, 4, 8), (3, 160, 7, 7)], ids=["4x8", "7x7"])
def test_bytes_moved(policy: str, layout: str, shape: tuple[int, ...], force: Any) -> None:
    """2N forward and 3N backward where an image stays in shared memory; one more reading of ``x``,
    or of ``dy``, where it does not. A residual and its gradient add N each. In a sum, rows that
    share a word of 16 bytes read it each."""
    force(policy)
    if "axis=space" in policy and layout == "contiguous":
        pytest.skip("not a policy for this layout")
    spec = Spec(shape, 6, torch.float16, layout, dy_layout=layout, residual=layout, after="relu")
    problem = build(spec)
    row = 2 * shape[2] * shape[3] if layout == "contiguous" else 2 * shape[1]
    of_sum = sum(-(-(r + 1) * row // 16) - r * row // 16 for r in range(8)) * 16 / (8 * row)
    once = 1 if "resident=1" in policy else 1 + of_sum
    with cuda_on_cpu.plugged_in(3, POLICIES[policy][0]) as simulation:
        x = problem.tensors["x"].requires_grad_()
        residual = problem.tensors["residual"].requires_grad_()
        with simulation.accesses() as forward:
            y = problem.call(squeeze_excite, backend="native")
        with simulation.accesses() as backward:
            dx, dresidual = torch.autograd.grad(y, (x, residual), problem.dy)
    assert [forward.times("r", t) for t in (x, residual)] == [once, 1]
    assert forward.times("w", y) == 1
    assert [backward.times("r", t) for t in (problem.dy, x)] == [once, of_sum]
    assert [backward.times("r", t) for t in (residual, y)] == [0, 0]
    assert [backward.times("w", t) for t in (dx, dresidual)] == [1, 1]


@pytest.mark.parametrize("policy", [p for p in POLICIES if "weights=1" in p])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kept_weights_are_not_read_again(policy: str, layout: str, force: Any) -> None:
    """The products read the copy in shared memory, which single accesses make; without one they
    read every weight for every image."""
    if "axis=space" in policy and layout == "contiguous":
        pytest.skip("not a policy for this layout")
    problem = build(Spec((5, 160, 4, 8), 16, torch.float16, layout, shift=True))
    x, w1, w2 = (problem.tensors[name] for name in ("x", "w1", "w2"))
    for kept in (True, False):
        force(policy if kept else policy.replace("weights=1", "weights=0"))
        with cuda_on_cpu.plugged_in(3, POLICIES[policy][0]) as simulation:
            with simulation.accesses() as forward:
                y = problem.call(squeeze_excite, {**problem.tensors, "x": x.requires_grad_()},
                                 backend="native")  # fmt: skip
            with simulation.accesses() as backward:
                torch.autograd.grad(y, x, problem.dy)
        for accesses, w in itertools.product((forward, backward), (w1, w2)):
            assert accesses.times("r", w) == 0 if kept else accesses.times("r", w) >= len(x)


def _sectors(*tensors: torch.Tensor | None) -> Counter[int]:
    """The first byte of every 32."""
    return Counter(
        address
        for t in tensors
        if t is not None
        for address in range(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), 32)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_no_positions(device: int) -> None:
    """Where there is nothing to copy no block waits for a copy: that deadlocked."""
    for shape, hidden in (((5, 136, 0, 4), 6), ((1, 1, 0), 1), ((3, 64, 2, 0), None)):
        problem = build(Spec(shape, hidden, torch.bfloat16))
        with cuda_on_cpu.plugged_in(1, device):
            with torch.no_grad():
                assert problem.call(squeeze_excite, backend="native").shape == shape
                y = problem.call(squeeze_excite, backend="native", inplace=True)
                assert y is problem.tensors["x"]
            results = problem.run(squeeze_excite, backend="native")
        assert results["dw2"].isnan().all()  # the mean of nothing


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("blocks", "expected name=value"),
        ("speed=1", "expected exchange, blocks, axis"),
        ("threads=33", "out of range"),
        ("exchange=cluster,blocks=2", "this device has no such clusters"),
        ("blocks=60", "more than the image can be cut into"),
    ],
)
def test_policies_that_cannot_be(policy: str, message: str, force: Any) -> None:
    force(policy)
    with (
        cuda_on_cpu.plugged_in(device=A100),
        pytest.raises(RuntimeError, match=f"{PLAN}: .*{message}"),
    ):
        build(Spec()).run(squeeze_excite, backend="native")


# What the host does for a call, between entering the device of x and leaving it.
_STEPS = {
    "forward": ["plan", "memory", "stream", "forward"],
    "backward": ["plan", "memory", "stream", "backward"],
    "poison": ["stream", "poison"],
    "plan": ["plan"],
}


@pytest.mark.skipif(_SANITIZED, reason="no kernel runs")
@pytest.mark.parametrize("poison", ["0", "1"])
def test_everything_happens_on_the_device_of_x(
    poison: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the current device is; and it is that again afterwards, also when a call throws."""
    monkeypatch.setenv("SENET_KERNELS_POISON", poison)
    calls = cuda_on_cpu.pretended_devices().split("call ")[1:]
    assert len(calls) == 4 * len(_STEPS) * 4
    seen = set()
    for call in calls:
        head, *events, outcome, after = call.splitlines()
        name, of_x, current, how = head.split()
        device, before = of_x.removeprefix("x="), current.removeprefix("current=")
        launches = name in ("forward", "backward")
        assert outcome == ("threw" if how != "works" and launches else "returned"), call
        assert after == f"after {before}", call
        assert [event.split(" ", 1)[1] for event in events] == [device] * len(events), call
        steps = [event.split()[0] for event in events]
        assert (steps[0], steps[-1]) == ("enter", "leave"), call
        expected = _STEPS[name]
        if how == "out_of_memory" and launches:
            expected = expected[: expected.index("memory") + 1]
        assert [s for s in steps[1:-1] if s in expected] in (
            expected, [s for s in expected if s != "memory"]
        ), call  # fmt: skip
        seen.update(steps)
    assert seen == {s for steps in _STEPS.values() for s in steps} | {"enter", "leave"}


# None of these allocates, waits, or makes a stream: what a capture would refuse, or what only
# PyTorch's allocator and streams may do.
_HOST_CALLS = {
    "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute", "cudaGetDevice",
    "cudaGetErrorString", "cudaGetLastError", "cudaLaunchKernelEx", "cudaMemsetAsync",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaOccupancyMaxActiveClusters",
    "cudaSetDevice", "cudaStreamIsCapturing", "cudaThreadExchangeStreamCaptureMode",
}  # fmt: skip


def test_host_code_neither_allocates_nor_waits() -> None:
    text = "\n".join(path.read_text() for path in cuda_on_cpu.CUDA.iterdir() if path.is_file())
    found = set(re.findall(r"\b(cu(?:da)?[A-Z]\w*)\s*\(", text))
    assert found == _HOST_CALLS
    assert "<<<" not in text


@pytest.fixture
def outside_sanitizers() -> None:
    if _SANITIZED:
        pytest.skip("is such a process itself")


@pytest.mark.usefixtures("outside_sanitizers")
def test_sanitizers_see_tensors() -> None:
    code = "import ctypes, torch; t = torch.empty(24); ctypes.memset(t.data_ptr() + 96, 0, 4)"
    done = cuda_on_cpu.sanitized([sys.executable, "-c", code])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def _sanitized_pytest(*arguments: str) -> None:
    cuda_on_cpu.compile_library(sanitize=True)  # here: compilers would be preloaded, too
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *arguments]
    done: subprocess.CompletedProcess[str] = cuda_on_cpu.sanitized(command)
    shown = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, shown
    assert " passed" in done.stdout, shown


# In the gate tensors end at guard pages (test_guard_pages.py), and every access of the PTX to
# shared memory is checked (tests/ptx/threads.h).
@pytest.mark.slow
@pytest.mark.usefixtures("outside_sanitizers")
def test_clean_under_sanitizers() -> None:
    files = ["tests/test_accuracy.py", "tests/test_cuda_on_cpu.py"]
    # Small tensors alone: the large ones of test_odd_shapes take minutes so.
    chosen = "(simulated and pairs) or (test_policies and not cannot)"
    _sanitized_pytest(*files, "-m", "not slow", "-k", chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("outside_sanitizers")
def test_more_is_clean_under_sanitizers() -> None:
    chosen = "(simulated and (pairs or blocks)) or (test_policies and not cannot)"
    _sanitized_pytest("tests/test_accuracy.py", "tests/test_cuda_on_cpu.py", "-k", chosen)
