"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be here.

Proves that they compile, fit, do not spill and move 16 bytes at a time where alignment allows.
Says nothing about results, races or speed; of the results the interpreter says something, see
``interpreter.py``.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from senet_kernels.backends.triton.plan import (
    Choice,
    Device,
    Shape,
    fixed_choice,
    power_of_two,
)

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("compile_triton.py")

# Capability: shared memory a block may have, multiprocessors of a typical part.
DEVICES = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}

_TARGETS = [pytest.param(capability, id=f"sm_{capability}") for capability in DEVICES]
_WORKLOADS = Path(__file__).parent.parent / "benchmarks" / "workloads.json"

_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_DTYPES = ("bfloat16", "float16", "float32")  # that are to be fast, not only right
_LAYOUTS = ("contiguous", "channels_last")

# What networks have: option set, and whether every access to an image can be 16 bytes wide. Rows of
# 49 and 196 elements are not aligned; images and runs of channels are.
_RELU = {"residual": True, "after": "relu"}
_SILU = {"before": "silu", "activation": "silu"}
_LAYERS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "bfloat16", **_RELU}, True),
    ({"shape": [256, 96, 112, 112], "hidden": 4, "dtype": "bfloat16", **_SILU,
      "layout": "channels_last"}, True),
    ({"shape": [256, 2048, 7, 7], "hidden": 128, "dtype": "bfloat16", **_RELU}, True),
    ({"shape": [1, 1024, 14, 14], "hidden": 64, "dtype": "float32",
      "layout": "channels_last"}, True),
    ({"shape": [1, 1152, 7, 7], "hidden": 48, "dtype": "float16", **_SILU}, True),
    ({"shape": [256, 1024, 14, 14], "hidden": 64, "dtype": "bfloat16", **_RELU}, True),
    # Its last launch spills on sm_90, unless it has half as many threads.
    ({"shape": [256, 1512, 7, 7], "hidden": 144, "dtype": "bfloat16", "before": "relu"}, True),
    ({"shape": [256, 672, 14, 14], "hidden": 168, "dtype": "float16", "gate": "hardsigmoid",
      "before": "hardswish"}, True),
    ({"shape": [256, 72, 28, 28], "hidden": 24, "dtype": "float16", "gate": "hardsigmoid",
      "before": "hardswish"}, True),
    ({"shape": [64, 512, 28, 28], "hidden": None, "dtype": "bfloat16", "bias": False,
      "layout": "channels_last"}, True),
    ({"shape": [512, 256, 8, 8], "hidden": 32, "dtype": "float16", "shift": True, **_RELU}, True),
    ({"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "bfloat16", **_SILU}, True),
    ({"shape": [256, 112, 7, 7], "hidden": 28, "dtype": "float16", **_RELU}, True),
    ({"shape": [256, 101, 7, 7], "hidden": 25, "dtype": "float16", **_RELU}, False),
    ({"shape": [256, 128, 7, 7], "hidden": 8, "dtype": "float32", "layout": "channels_last",
      **_RELU}, True),
    ({"shape": [256, 2048, 7, 7], "part": "squeeze", "dtype": "bfloat16"}, True),
    ({"shape": [256, 64, 56, 56], "part": "squeeze", "dtype": "float16", **_SILU,
      "layout": "channels_last"}, True),
    ({"shape": [1, 16, 112, 112], "part": "squeeze", "dtype": "float32"}, True),
    ({"shape": [256, 2048, 7, 7], "part": "channel_scale", "dtype": "bfloat16", **_RELU}, True),
    ({"shape": [256, 64, 56, 56], "part": "channel_scale", "dtype": "float16", **_SILU,
      "layout": "channels_last"}, True),
    ({"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "bfloat16", **_RELU,
      "inplace": True}, True),
    ({"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "bfloat16", **_SILU, "inplace": True}, True),
)  # fmt: skip
# Each dtype, layout and strategy once, for the targets that do not get all of them.
_FEW = (0, 1, 2, 3, 4, 11, 14)
# What those targets have beside: with it every two of target, dtype, layout and kernels meet.
_MORE: dict[int, tuple[tuple[dict[str, Any], bool], ...]] = {
    80: (
        ({"shape": [256, 64, 56, 56], "part": "squeeze", "dtype": "float16", **_SILU,
          "layout": "channels_last"}, True),
        ({"shape": [256, 2048, 7, 7], "part": "channel_scale", "dtype": "float32", **_RELU}, True),
        ({"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "float64", **_RELU,
          "inplace": True}, True),
    ),
    100: (
        ({"shape": [256, 2048, 7, 7], "part": "squeeze", "dtype": "float32"}, True),
        ({"shape": [256, 256, 56, 56], "part": "channel_scale", "dtype": "float64", **_RELU,
          "layout": "channels_last"}, True),
        ({"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "float16", **_SILU,
          "layout": "channels_last", "inplace": True}, True),
    ),
    120: (
        ({"shape": [256, 1024, 14, 14], "part": "squeeze", "dtype": "float64"}, True),
        ({"shape": [256, 64, 56, 56], "part": "channel_scale", "dtype": "float16", **_SILU,
          "layout": "channels_last"}, True),
        ({"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "float32", **_RELU,
          "inplace": True}, True),
    ),
}  # fmt: skip
# Every further feature, many at once on odd extents, and the kernels that then spill: sums for the
# gradients of all these parameters do not fit, and in double precision correct is enough.
_REST: tuple[tuple[dict[str, Any], set[str]], ...] = (
    ({"shape": [2, 65, 13, 17], "hidden": 5, "dtype": "float32", "affine": True, "lengths": True,
      "shift": True, "weighted": True, "residual": True, "activation": "gelu", "gate": "tanh",
      "before": "mish", "after": "gelu_tanh"}, {"dots_kernel", "dx_kernel"}),
    ({"shape": [2, 64, 14, 14], "hidden": 16, "dtype": "float64", "layout": "channels_last",
      "before": "gelu", "after": "relu"}, {"dx_kernel"}),
    ({"shape": [2, 17, 5, 7], "hidden": 5, "dtype": "float64", "affine": True, "lengths": True,
      "shift": True, "weighted": True, "residual": True, "gate": "tanh", "after": "mish"},
     {"resident_kernel"}),
    ({"shape": [2, 65, 13, 17], "part": "squeeze", "dtype": "float64", "affine": True,
      "lengths": True, "before": "mish"}, {"half_backward_kernel"}),
    ({"shape": [2, 65, 13, 17], "part": "channel_scale", "dtype": "float32", "affine": True,
      "shift": True, "weighted": True, "residual": True, "gate": "tanh", "before": "relu6",
      "after": "leaky_relu"}, {"half_backward_kernel"}),
)  # fmt: skip
# The same features, a few at once, where nothing may spill.
_FEATURES: tuple[dict[str, Any], ...] = (
    {"shape": [256, 256, 14, 14], "hidden": 64, "dtype": "bfloat16", "affine": True,
     "before": "relu"},
    {"shape": [256, 256, 14, 14], "hidden": 64, "dtype": "bfloat16", "affine": True,
     "before": "silu", "layout": "channels_last"},
    {"shape": [256, 256, 14, 14], "hidden": 64, "dtype": "float32", "affine": True,
     "before": "silu"},
    {"shape": [256, 256, 14, 14], "hidden": 64, "dtype": "float16", "lengths": True,
     "weighted": True, "shift": True, "residual": True, "after": "gelu"},
    {"shape": [256, 256, 14, 14], "hidden": 64, "dtype": "bfloat16", "residual": True,
     "activation": "gelu", "gate": "tanh", "before": "mish", "after": "gelu_tanh"},
    {"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "float16", "affine": True, "lengths": True,
     "shift": True, "weighted": True, "residual": True, "before": "gelu", "after": "silu"},
    {"shape": [256, 256, 14, 14], "part": "squeeze", "dtype": "bfloat16", "affine": True,
     "before": "relu"},
)  # fmt: skip


class _Compiled(NamedTuple):
    """What the kernels of each option set became, and how many cubins that took."""

    kernels: list[list[dict[str, Any]]]
    cubins: int


def _compile(capability: int, options: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What the kernels of each option set became."""
    return _compiled(capability, json.dumps(options)).kernels


@functools.cache
def _compiled(capability: int, options: str) -> _Compiled:
    multiprocessors = DEVICES[capability][1]
    given = [{**o, "multiprocessors": multiprocessors} for o in json.loads(options)]
    printed = _run(_SCRIPT, str(capability), "\n".join(map(json.dumps, given)))
    *lines, cubins = printed.splitlines()
    return _Compiled([json.loads(line) for line in lines], int(cubins))


def _run(script: Path, argument: str = "", text: str = "") -> str:
    """What a script prints, in a process that sees this package before an installed one."""
    done = subprocess.run(
        [sys.executable, str(script), *argument.split()],
        input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(_SCRIPT.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


_TO_X = ["squeeze_kernel", "scale_kernel"], ["resident_kernel"]
_TO_DX = ["dots_kernel", "dx_kernel", "parameters_kernel"], [
    "resident_backward_kernel", "parameters_kernel"
]  # fmt: skip
_LAUNCHES = {
    "whole": [[*forward, *backward] for forward in _TO_X for backward in _TO_DX],
    "inplace": list(_TO_X),
    "squeeze": [["squeeze_kernel", *add, "half_backward_kernel", *affine]
                for add in ([], ["add_parts_kernel"])
                for affine in ([], ["half_parameters_kernel"])],
    "channel_scale": [["scale_kernel", "half_backward_kernel", "half_parameters_kernel"]],
}  # fmt: skip
_WITHOUT_IMAGES = ("parameters_kernel", "half_parameters_kernel", "add_parts_kernel")


def _faults(
    capability: int,
    options: dict[str, Any],
    kernels: list[dict[str, Any]],
    wide: bool,
    may_spill: Collection[str] = (),
) -> Iterator[str]:
    """What is wrong with the kernels of an option set; ``wide``: they move 16 bytes at a time."""
    part = "inplace" if "inplace" in options else options.get("part", "whole")
    if [kernel["kernel"] for kernel in kernels] not in _LAUNCHES[part]:
        yield f"launches: {options}: {kernels}"
    for kernel in kernels:
        name, what = kernel["kernel"], f"{options}: {kernel}"
        if kernel["STACK"] and name not in may_spill:
            yield f"spills: {what}"
        if kernel["between_programs"]:
            yield f"programs synchronize, which no litmus test is about: {what}"
        if kernel["shared"] > DEVICES[capability][0]:
            yield f"shared memory: {what}"
        if wide and name not in _WITHOUT_IMAGES:
            reads, writes = _traffic(name, part, options)
            vectors = max(1, kernel["vectors"])
            if kernel["loads_16"] < reads * vectors:
                yield f"narrow loads: {what}"
            if kernel["stores_16"] < writes * vectors:
                yield f"narrow stores: {what}"


def _check(capability: int, layers: list[tuple[dict[str, Any], bool]]) -> None:
    """Compile option sets, each with whether its images are moved 16 bytes at a time. All that is
    wrong is told at once, since a run may take long."""
    compiled = _compile(capability, [options for options, _ in layers])
    found = zip(layers, compiled, strict=True)
    faults = [f for (options, wide), of in found for f in _faults(capability, options, of, wide)]
    assert not faults, "\n".join(faults)


def _after_again(options: dict[str, Any]) -> bool:
    """The gradient of what keeps no mask needs its argument, and so x and the residual."""
    return options.get("after") not in (None, "identity", "relu")


def _traffic(kernel: str, part: str, options: dict[str, Any]) -> tuple[int, int]:
    """How many images a kernel reads, and writes."""
    before, residual = bool(options.get("before")), bool(options.get("residual"))
    again = _after_again(options)
    more = residual and again
    if kernel == "half_backward_kernel":  # a squeeze's gradient needs x if `before` does
        return (before, 1) if part == "squeeze" else (2 + more, 1 + residual)
    return {
        "squeeze_kernel": (1, 0),
        "scale_kernel": (1 + residual, 1),
        "resident_kernel": (1 + residual, 1),
        "dots_kernel": (2 + more, 0),
        "dx_kernel": (1 + (before or again) + more, 1 + residual),
        "resident_backward_kernel": (2 + more, 1 + residual),
    }[kernel]


def _shape(options: dict[str, Any]) -> Shape:
    batch, channels, *space = options["shape"]
    outputs = 0 if "part" in options else channels * (2 if options.get("shift") else 1)
    last = options.get("layout") == "channels_last"
    return Shape(
        batch, channels, math.prod(space), options.get("hidden"), outputs, last,
        _after_again(options),
    )  # fmt: skip


def _choices(capability: int, options: dict[str, Any]) -> tuple[Choice, Choice]:
    """How the calls are cut, forward and backward."""
    device = Device(f"sm_{capability}", DEVICES[capability][1])
    cut = _shape(options), _SIZES[options["dtype"]], device
    return fixed_choice(*cut, forward=True), fixed_choice(*cut, forward=False)


def _is_wide(capability: int, options: dict[str, Any]) -> bool:
    """Whether the plan has images moved 16 bytes at a time."""
    shape, vector = _shape(options), 16 // _SIZES[options["dtype"]]
    if shape.last:
        return shape.channels % vector == 0
    rows = shape.positions % vector == 0
    return rows or all(choice.plan.flat for choice in _choices(capability, options))


def _with_width(
    capability: int, layers: Iterable[dict[str, Any]]
) -> list[tuple[dict[str, Any], bool]]:
    return [(options, _is_wide(capability, options)) for options in layers]


def _configurations(capability: int, options: dict[str, Any]) -> set[Any]:
    """What the kernels over images of such a call are compiled for, its option set aside."""
    dtype, last = options["dtype"], _shape(options).last
    found = set()
    for direction, (plan, resident) in enumerate(_choices(capability, options)):
        together = min(power_of_two(plan.splits), plan.BK)  # the counts themselves are arguments
        constants = plan._replace(tiles=0, splits=together, steps=0, programs=0)
        found.add((direction, dtype, last, resident, constants))
    return found


@functools.cache
def _workloads() -> list[dict[str, Any]]:
    """The distinct layers of real networks, at the two batch sizes that are planned differently,
    in both layouts."""
    layers = [la for n in json.loads(_WORKLOADS.read_text())["networks"] for la in n["layers"]]
    names = {"none": None, "add_relu": "relu"}
    distinct = {
        json.dumps({
            "shape": [batch, la["channels"], la["height"], la["width"]], "hidden": la["hidden"],
            "activation": la["activation"], "gate": la["gate"], "layout": layout,
            "before": names.get(la["before"], la["before"]),
            "after": names.get(la["after"], la["after"]),
            "residual": la["after"] == "add_relu", "shift": la.get("shift", False),
        })
        for la in layers for batch in (1, 256) for layout in _LAYOUTS
    }  # fmt: skip
    return [json.loads(text) for text in sorted(distinct)]


def _option_set(options: dict[str, Any]) -> str:
    """A single layer has no activation."""
    names = ("activation", "gate", "before", "after", "residual", "shift")
    return json.dumps([options.get(name) for name in names])


def _layers_of(
    capability: int, option_set: str, dtype: str, layout: str, resident: bool
) -> list[dict[str, Any]]:
    """Real layers, their images on chip or not if there is a choice; small batches first."""
    layers = [
        {**options, "dtype": dtype}
        for options in _workloads()
        if _option_set(options) == option_set and options["layout"] == layout
    ]
    return [o for o in layers if _choices(capability, o)[0].resident == resident] or layers


def _real_layers(capability: int) -> list[dict[str, Any]]:
    """For sm_90 a layer of every option set there is, for the other targets one of every third;
    dtypes, layouts and strategies take turns."""
    others = [c for c in DEVICES if c != 90]
    layers = []
    for i, option_set in enumerate(sorted(set(map(_option_set, _workloads())))):
        turn = i if capability == 90 else i // len(others) + i % len(others) + 1
        if capability in (90, others[i % len(others)]):
            kind = _DTYPES[turn % 3], _LAYOUTS[turn % 2], turn // 2 % 2 == 1
            found = _layers_of(capability, option_set, *kind)
            layers.append(found[len(found) // 2])
    return layers


def _hand_picked(capability: int) -> list[tuple[dict[str, Any], bool]]:
    return list(_LAYERS) if capability == 90 else [_LAYERS[i] for i in _FEW]


def _layers(capability: int) -> list[tuple[dict[str, Any], bool]]:
    real = _with_width(capability, _real_layers(capability))
    return [*_hand_picked(capability), *_MORE.get(capability, ()), *real]


def test_synchronization_of_programs_is_seen() -> None:
    """In PTX, whose other instructions are not taken for it."""
    from compile_triton import BETWEEN_PROGRAMS

    seen = ["atom.global.gpu.acq_rel.add.u32", "red.release.gpu.global.add.u32", "membar.gl",
            "fence.acq_rel.gpu", "ld.global.acquire.gpu.b32", "st.relaxed.gpu.global.u32",
            "barrier.cluster.arrive.aligned", "ld.volatile.global.u32"]  # fmt: skip
    others = ["bar.sync", "redux.sync.add.s32", "ld.global.v4.b32", "st.shared.b32", "ld.param.b64"]
    text = "".join(f"\t@%p1 {opcode} %r1, %r2;\n\t{opcode} \t%r3;\n" for opcode in seen + others)
    assert BETWEEN_PROGRAMS.findall(text) == [opcode for opcode in seen for _ in range(2)]


@pytest.mark.parametrize("capability", _TARGETS)
def test_kernels_compile_without_spills(capability: int) -> None:
    _check(capability, _layers(capability))


def test_the_gate_has_every_two_of_target_dtype_layout_and_kernels() -> None:
    """And every option set of the workloads, on sm_90 and on another target."""
    met: set[Any] = set()
    option_sets: dict[str, set[bool]] = {}
    for capability in DEVICES:
        rest = _REST if capability == 90 else ()
        for options, _ in (*rest, *_layers(capability)):
            kernels = "inplace" if "inplace" in options else options.get("part")
            kernels = kernels or ("whole", _choices(capability, options)[0].resident)
            layout = options.get("layout", "contiguous")
            factors = capability, options["dtype"], layout, kernels
            met |= set(itertools.combinations(enumerate(factors), 2))
            option_sets.setdefault(_option_set(options), set()).add(capability == 90)
    values = [{v for pair in met for at, v in pair if at == i} for i in range(4)]
    assert [len(v) for v in values] == [4, 4, 2, 5]
    every = itertools.combinations(range(4), 2)
    wanted = {((i, v), (j, w)) for i, j in every for v in values[i] for w in values[j]}
    assert wanted == met
    for options in _workloads():
        assert option_sets[_option_set(options)] == {False, True}, options


@pytest.mark.parametrize("capability", _TARGETS)
def test_the_plan_is_as_wide_as_alignment_allows(capability: int) -> None:
    """Beside the layers picked by hand it is written what they must be, whatever is planned."""
    picked = [*_LAYERS, *itertools.chain(*_MORE.values())]
    assert _with_width(capability, [options for options, _ in picked]) == picked


def test_every_feature_compiles() -> None:
    compiled = _compile(90, [options for options, _ in _REST])
    for (options, may_spill), kernels in zip(_REST, compiled, strict=True):
        assert not list(_faults(90, options, kernels, wide=False, may_spill=may_spill))


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
def test_a_few_features_at_once_do_not_spill(capability: int) -> None:
    _check(capability, _with_width(capability, _FEATURES))


def test_the_gate_compiles_few_cubins() -> None:
    """What the tests above compile: at most 400, so that the gate stays quick."""
    batches = [(c, [o for o, _ in _layers(c)]) for c in DEVICES]
    batches.append((90, [options for options, _ in _REST]))
    cubins = [_compiled(c, json.dumps(options)).cubins for c, options in batches]
    assert min(cubins) > 0
    assert sum(cubins) <= 400, cubins


def test_prepared_calls_launch_what_triton_launches() -> None:
    """The second call of a kind goes past Triton's own launcher, straight to the kernel."""
    report = json.loads(_run(_SCRIPT.with_name("prepared_launches.py")))
    launches = {"two launches, forward": 2, "two launches, backward": 3,
                "one launch, forward": 1, "one launch, backward": 2}  # fmt: skip
    assert {name: len(found["first"]) for name, found in report.items()} == launches
    for name, found in report.items():
        assert found["first"] == found["second"], name


def _matrix(capability: int) -> list[dict[str, Any]]:
    """Every layer of real networks, batch size and layout in one dtype, which is another for the
    next of them and for the next target; then in further dtypes until every configuration is
    compiled in each dtype that it is planned for."""
    target = list(DEVICES).index(capability)
    chosen = [{**o, "dtype": _DTYPES[(i + target) % 3]} for i, o in enumerate(_workloads())]
    seen = {found for options in chosen for found in _configurations(capability, options)}
    for options, dtype in itertools.product(_workloads(), _DTYPES):
        found = _configurations(capability, {**options, "dtype": dtype})
        if not found <= seen:
            chosen.append({**options, "dtype": dtype})
            seen |= found
    return chosen


def _parts(capability: int) -> list[dict[str, Any]]:
    """What `_matrix` has not: for each option set, layout and dtype the halves of the operation
    and the call in place, and in double precision the whole."""
    found: dict[str, dict[str, Any]] = {}
    option_sets = sorted(set(map(_option_set, _workloads())))
    every = itertools.product(option_sets, _SIZES, _LAYOUTS, (False, True))
    for option_set, dtype, layout, resident in every:
        layers = _layers_of(capability, option_set, dtype, layout, resident)
        whole = layers[len(found) % len(layers)]
        if _choices(capability, whole)[0].resident != resident:
            continue
        squeeze = {name: whole[name] for name in ("shape", "dtype", "layout", "before")}
        scale = {n: v for n, v in whole.items() if n not in ("hidden", "activation")}
        for options in (
            {**squeeze, "part": "squeeze"}, {**scale, "part": "channel_scale"},
            {**whole, "inplace": True}, *([whole] if whole["dtype"] == "float64" else []),
        ):  # fmt: skip
            found[json.dumps(options)] = options
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
@pytest.mark.parametrize("part", range(8))
def test_layers_of_real_networks(capability: int, part: int) -> None:
    """For each target every layer of workloads.json at batch 1 and 256 in both layouts, and every
    configuration (strategy, block sizes, number of warps, loop over images, runs) that the plan
    has for one of these in bfloat16, float16 and float32. Not every layer in every dtype: that
    would take about 10,700 cubins; this takes about 6,100, an hour of one core. `-k sm_90` runs a
    quarter of them."""
    _check(capability, _with_width(capability, _matrix(capability)[part::8]))


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
def test_parts_of_real_networks(capability: int) -> None:
    _check(capability, _with_width(capability, _parts(capability)))


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
def test_layers_of_the_gate_on_every_target(capability: int) -> None:
    """What was picked by hand for some of them."""
    _check(capability, [*_LAYERS, *itertools.chain(*_MORE.values())])


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
@pytest.mark.parametrize("number", range(12))
def test_what_tuning_would_time_compiles(capability: int, number: int) -> None:
    """Candidates may be poor, which is why they are timed; they must be there to be timed."""
    layers = [{**options, "candidate": number} for options, _ in _hand_picked(capability)]
    for options, kernels in zip(layers, _compile(capability, layers), strict=True):
        for kernel in kernels:
            assert kernel["shared"] <= DEVICES[capability][0], f"{options}: {kernel}"
