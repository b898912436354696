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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("compile_triton.py")

# Capability: shared memory a block may have, multiprocessors of a typical part.
DEVICES = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}

_TARGETS = [pytest.param(capability, id=f"sm_{capability}") for capability in DEVICES]
_WORKLOADS = Path(__file__).parent.parent / "benchmarks" / "workloads.json"

_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_DTYPES = ("bfloat16", "float16", "float32")  # that are to be fast, not only right
_LAYOUTS = ("contiguous", "channels_last")
_HEAVY = ("gelu", "gelu_tanh", "mish")

# What networks have.
_RELU = {"residual": True, "after": "relu"}
_SILU = {"before": "silu", "activation": "silu"}
_LAYERS: tuple[dict[str, Any], ...] = (
    {"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "bfloat16", **_RELU},
    {"shape": [256, 96, 112, 112], "hidden": 4, "dtype": "bfloat16", **_SILU,
      "layout": "channels_last"},
    {"shape": [256, 2048, 7, 7], "hidden": 128, "dtype": "bfloat16", **_RELU},
    {"shape": [1, 1024, 14, 14], "hidden": 64, "dtype": "float32",
      "layout": "channels_last"},
    {"shape": [1, 1152, 7, 7], "hidden": 48, "dtype": "float16", **_SILU},
    {"shape": [256, 1024, 14, 14], "hidden": 64, "dtype": "bfloat16", **_RELU},
    {"shape": [256, 672, 14, 14], "hidden": 168, "dtype": "float16", "gate": "hardsigmoid",
      "before": "hardswish"},
    {"shape": [64, 512, 28, 28], "hidden": None, "dtype": "bfloat16", "bias": False,
      "layout": "channels_last"},
    {"shape": [512, 256, 8, 8], "hidden": 32, "dtype": "float16", "shift": True, **_RELU},
    {"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "bfloat16", **_SILU},
    {"shape": [256, 101, 7, 7], "hidden": 25, "dtype": "float16", **_RELU},
    {"shape": [256, 128, 7, 7], "hidden": 8, "dtype": "float32", "layout": "channels_last",
      **_RELU},
    {"shape": [256, 2048, 7, 7], "part": "squeeze", "dtype": "bfloat16"},
    {"shape": [256, 64, 56, 56], "part": "squeeze", "dtype": "float16", **_SILU,
      "layout": "channels_last"},
    {"shape": [1, 16, 112, 112], "part": "squeeze", "dtype": "float32"},
    {"shape": [256, 2048, 7, 7], "part": "channel_scale", "dtype": "bfloat16", **_RELU},
    {"shape": [256, 64, 56, 56], "part": "channel_scale", "dtype": "float16", **_SILU,
      "layout": "channels_last"},
    {"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "bfloat16", **_RELU,
      "inplace": True},
    {"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "bfloat16", **_SILU, "inplace": True},
)  # fmt: skip
# Each dtype and layout once, for the targets that do not get all of them.
_FEW = (0, 1, 2, 3, 4, 9, 11)
# What those targets have beside: with it every two of target, dtype, layout and kernels meet.
_MORE: dict[int, tuple[dict[str, Any], ...]] = {
    80: (
        {"shape": [256, 64, 56, 56], "part": "squeeze", "dtype": "float16", **_SILU,
          "layout": "channels_last"},
        {"shape": [256, 2048, 7, 7], "part": "channel_scale", "dtype": "float32", **_RELU},
        {"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "float64", **_RELU,
          "inplace": True},
    ),
    100: (
        {"shape": [256, 2048, 7, 7], "part": "squeeze", "dtype": "float32"},
        {"shape": [256, 256, 56, 56], "part": "channel_scale", "dtype": "float64", **_RELU,
          "layout": "channels_last"},
        {"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "float16", **_SILU,
          "layout": "channels_last", "inplace": True},
    ),
    120: (
        {"shape": [256, 1024, 14, 14], "part": "squeeze", "dtype": "float64"},
        {"shape": [256, 64, 56, 56], "part": "channel_scale", "dtype": "float16", **_SILU,
          "layout": "channels_last"},
        {"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "float32", **_RELU,
          "inplace": True},
    ),
}  # fmt: skip
# Every further feature, many at once on odd extents, and the kernels that may then spill: in double
# precision correct is enough.
_REST: tuple[tuple[dict[str, Any], set[str]], ...] = (
    ({"shape": [2, 65, 13, 17], "hidden": 5, "dtype": "float32", "affine": True, "lengths": True,
      "shift": True, "weighted": True, "residual": True, "activation": "gelu", "gate": "tanh",
      "before": "mish", "after": "gelu_tanh"}, set()),
    ({"shape": [2, 64, 14, 14], "hidden": 16, "dtype": "float64", "layout": "channels_last",
      "before": "gelu", "after": "relu"}, set()),
    ({"shape": [2, 17, 5, 7], "hidden": 5, "dtype": "float64", "affine": True, "lengths": True,
      "shift": True, "weighted": True, "residual": True, "gate": "tanh", "after": "mish"},
     set()),
    ({"shape": [2, 65, 13, 17], "part": "squeeze", "dtype": "float64", "affine": True,
      "lengths": True, "before": "mish"}, set()),
    ({"shape": [2, 65, 13, 17], "part": "channel_scale", "dtype": "float32", "affine": True,
      "shift": True, "weighted": True, "residual": True, "gate": "tanh", "before": "relu6",
      "after": "leaky_relu"}, set()),
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


def _rows(options: dict[str, Any]) -> tuple[int, int]:
    """How many rows an image has, and of how many adjacent elements."""
    _, channels, *space = options["shape"]
    extents = channels, math.prod(space)
    return extents if options.get("layout") != "channels_last" else (extents[1], extents[0])


def _flat(options: dict[str, Any], *, masked: bool) -> bool:
    """Whether what writes an image takes flat vectors: by the rule, written here once more."""
    outer, inner = _rows(options)
    vector = 16 // _SIZES[options["dtype"]]
    if options["dtype"] == "float64" or (masked and inner % 8):
        return False
    vector = 8 if masked else vector
    last = options.get("layout") == "channels_last"
    return inner >= vector and (inner if last else outer * inner) % vector == 0


def _launches(options: dict[str, Any]) -> list[str]:
    """The kernels of a call's forward and backward pass, all gradients asked for."""
    part, relu = options.get("part", "whole"), options.get("after") == "relu"
    affine, weighted = bool(options.get("affine")), bool(options.get("weighted"))
    keeps = relu and not options.get("inplace")
    scale = "scale_flat" if _flat(options, masked=keeps) else "scale_tile"
    dx = "dx_flat" if not affine and _flat(options, masked=relu) else "dx_tile"
    if part == "squeeze":
        dx = "dx_flat" if not affine and _flat(options, masked=False) else "dx_tile"
        return ["squeeze", dx, *(["sums"] if affine else [])]
    if part == "channel_scale":
        sums = ["sums"] if affine or weighted else []
        return ["factors", scale, "bwd_reduce", dx, *sums]
    two = options.get("hidden") is not None
    forward = ["squeeze", *(["hidden"] if two else []), "gates", scale]
    if options.get("inplace"):
        return forward
    hidden = ["hidden_bwd"] if two else []
    sums = ["sums"] if affine else []
    return [*forward, "bwd_reduce", *hidden, "excite_bwd", dx, *sums]


#: Kernels over images: how many these read, and write, beside what ``_traffic`` adds.
_IMAGES = {"squeeze": (1, 0), "scale_flat": (1, 1), "bwd_reduce": (2, 0), "dx_flat": (1, 1)}


def _traffic(kernel: str, options: dict[str, Any]) -> tuple[int, int]:
    """How many images a kernel reads, and writes."""
    before, residual = bool(options.get("before")), bool(options.get("residual"))
    again = options.get("after") not in (None, "identity", "relu")
    reads, writes = _IMAGES[kernel]
    if kernel == "scale_flat" or (kernel == "bwd_reduce" and again):
        reads += residual
    if kernel == "dx_flat":
        if options.get("part") == "squeeze":
            return int(before), 1
        reads += (before or again) + (residual and again)
        writes += residual
    return reads, writes


def _is_wide(kernel: str, options: dict[str, Any]) -> bool:
    """Whether a kernel can move 16 bytes at a time: by flat vectors, or along aligned rows."""
    rows = _rows(options)[1] * _SIZES[options["dtype"]] % 16 == 0
    return kernel.endswith("_flat") or (kernel in _IMAGES and rows)


def _faults(
    capability: int, options: dict[str, Any], kernels: list[dict[str, Any]],
    may_spill: Collection[str] = (),
) -> Iterator[str]:  # fmt: skip
    """What is wrong with the kernels of an option set."""
    names = [kernel["kernel"].removesuffix("_kernel") for kernel in kernels]
    # Where images are few, several programs share a sum.
    if [n for n in names if n not in ("mean", "finish_sums")] != _launches(options):
        yield f"launches: {options}: {names}, expected {_launches(options)}"
    for name, kernel in zip(names, kernels, strict=True):
        what = f"{options}: {kernel}"
        if kernel["STACK"] and name not in may_spill:
            yield f"spills: {what}"
        if kernel["between_programs"]:
            yield f"programs synchronize, which no litmus test is about: {what}"
        if kernel["shared"] > DEVICES[capability][0]:
            yield f"shared memory: {what}"
        if _is_wide(name, options):
            reads, writes = _traffic(name, options)
            if kernel["loads_16"] < reads * kernel["steps"]:
                yield f"narrow loads: {what}"
            if kernel["stores_16"] < writes * kernel["steps"]:
                yield f"narrow stores: {what}"
        if name in _IMAGES and name != "dx_flat":
            # Four loads before the first use in a sum, two where an image is written; two in a sum
            # too in double precision, and where many pointwise steps need the registers.
            crowded = options["dtype"] == "float64" or options.get("before") in _HEAVY
            wanted = 4 if name == "squeeze" and not crowded else 2
            count = -(-math.prod(options["shape"][2:]) // kernel["tile_positions"])
            if kernel["steps"] < min(wanted, count):
                yield f"few loads in flight: {what}"


def _check(capability: int, layers: list[dict[str, Any]]) -> None:
    """Compile option sets. All that is wrong is told at once, since a run may take long."""
    found = zip(layers, _compile(capability, layers), strict=True)
    faults = [f for options, of in found for f in _faults(capability, options, of)]
    assert not faults, "\n".join(faults)


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


def _real_layers(capability: int) -> list[dict[str, Any]]:
    """For sm_90 a layer of every option set there is, for the other targets one of every third;
    dtypes and layouts take turns."""
    others = [c for c in DEVICES if c != 90]
    layers = []
    for i, option_set in enumerate(sorted(set(map(_option_set, _workloads())))):
        turn = i if capability == 90 else i // len(others) + i % len(others) + 1
        if capability in (90, others[i % len(others)]):
            layout = _LAYOUTS[turn % 2]
            found = [
                {**o, "dtype": _DTYPES[turn % 3]} for o in _workloads()
                if _option_set(o) == option_set and o["layout"] == layout
            ]  # fmt: skip
            layers.append(found[len(found) // 2])
    return layers


def _layers(capability: int) -> list[dict[str, Any]]:
    picked = list(_LAYERS) if capability == 90 else [_LAYERS[i] for i in _FEW]
    return [*picked, *_MORE.get(capability, ()), *_real_layers(capability)]


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


def test_the_gate_has_every_two_of_target_dtype_layout_and_part() -> None:
    """And every option set of the workloads, on sm_90 and on another target."""
    met: set[Any] = set()
    option_sets: dict[str, set[bool]] = {}
    for capability in DEVICES:
        rest = [options for options, _ in _REST] if capability == 90 else []
        for options in (*rest, *_layers(capability)):
            part = "inplace" if "inplace" in options else options.get("part", "whole")
            factors = capability, options["dtype"], options.get("layout", "contiguous"), part
            met |= set(itertools.combinations(enumerate(factors), 2))
            option_sets.setdefault(_option_set(options), set()).add(capability == 90)
    values = [{v for pair in met for at, v in pair if at == i} for i in range(4)]
    assert [len(v) for v in values] == [4, 4, 2, 4]
    every = itertools.combinations(range(4), 2)
    wanted = {((i, v), (j, w)) for i, j in every for v in values[i] for w in values[j]}
    assert wanted == met
    for options in _workloads():
        assert option_sets[_option_set(options)] == {False, True}, options


def test_every_feature_compiles() -> None:
    compiled = _compile(90, [options for options, _ in _REST])
    for (options, may_spill), kernels in zip(_REST, compiled, strict=True):
        assert not list(_faults(90, options, kernels, may_spill=may_spill))


# Of AMD's GPUs: the local memory that a block may have.
_LDS = {"gfx942": 65536, "gfx950": 163840, "gfx1100": 65536}


@pytest.mark.parametrize(
    "target",
    ["gfx942", *(pytest.param(name, marks=pytest.mark.slow) for name in _LDS if name != "gfx942")],
)
def test_kernels_compile_for_amd_gpus(target: str) -> None:
    """And nothing spills, nor takes more local memory than there is."""
    layers: tuple[dict[str, Any], ...] = (
        {"shape": [256, 64, 14, 14], "hidden": 16, "dtype": "bfloat16", **_SILU, **_RELU},
        {"shape": [4, 64, 7, 7], "hidden": None, "dtype": "float16", "affine": True,
         "layout": "channels_last", "shift": True},
    )  # fmt: skip
    given = "\n".join(json.dumps({**layer, "multiprocessors": 304}) for layer in layers)
    *lines, _ = _run(_SCRIPT, target, given).splitlines()
    for layer, line in zip(layers, lines, strict=True):
        kernels = json.loads(line)
        assert len(kernels) >= len(_launches(layer))
        for kernel in kernels:
            assert kernel["STACK"] == 0, f"{layer}: {kernel}"
            assert kernel["shared"] <= _LDS[target], f"{layer}: {kernel}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
def test_a_few_features_at_once_do_not_spill(capability: int) -> None:
    _check(capability, list(_FEATURES))


def test_the_gate_compiles_few_cubins() -> None:
    """What the tests above compile: at most 430, so that the gate stays quick."""
    batches = [(c, _layers(c)) for c in DEVICES]
    batches.append((90, [options for options, _ in _REST]))
    cubins = [_compiled(c, json.dumps(options)).cubins for c, options in batches]
    assert min(cubins) > 0
    assert sum(cubins) <= 430, cubins


def test_prepared_calls_launch_what_triton_launches() -> None:
    """The second call of a kind goes past Triton's own launcher, straight to the kernel."""
    report = json.loads(_run(_SCRIPT.with_name("prepared_launches.py")))
    directions = {"forward": 4, "backward": 4}
    launches = {f"by {way}, {direction}": n for way in ("tiles", "flat vectors")
                for direction, n in directions.items()}  # fmt: skip
    # A few images: several programs share their sums.
    assert {name: len({of[0] for of in found["first"]} - {"mean_kernel", "finish_sums_kernel"})
            for name, found in report.items()} == launches  # fmt: skip
    for name, found in report.items():
        assert found["first"] == found["second"], name


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
@pytest.mark.parametrize("part", range(8))
def test_layers_of_real_networks(capability: int, part: int) -> None:
    """For each target every layer of workloads.json at batch 1 and 256 in both layouts; its dtype
    is another for the next of them, and for the next target."""
    target = list(DEVICES).index(capability)
    layers = [{**o, "dtype": _DTYPES[(i + target) % 3]} for i, o in enumerate(_workloads())]
    _check(capability, layers[part::8])


@pytest.mark.slow
@pytest.mark.parametrize("capability", _TARGETS)
def test_layers_of_the_gate_on_every_target(capability: int) -> None:
    """What was picked by hand for some of them."""
    _check(capability, [*_LAYERS, *itertools.chain(*_MORE.values())])
