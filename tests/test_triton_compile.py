"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be here.

Proves that they compile, fit, do not spill and move 16 bytes at a time where alignment allows.
Says nothing about results, races or speed; of the results the interpreter says something, see
``interpreter.py``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from senet_kernels.backends.triton.plan import why_no_cluster

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("compile_triton.py")

# Capability: shared memory a block may have, multiprocessors of a typical part.
DEVICES = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}

# Where `make` puts a Triton that compiles sums over a cluster, which the one that belongs to torch
# need not be able to.
_NEWER = Path(__file__).parent.parent / "build" / "triton38"

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
# Images that one block cannot hold, a cluster can.
_CLUSTERS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"shape": [256, 64, 16, 16], "hidden": 16, "dtype": "float16", "shift": True, **_RELU}, True),
    ({"shape": [256, 128, 14, 14], "hidden": 16, "dtype": "bfloat16", "layout": "channels_last",
      **_RELU}, True),
    ({"shape": [256, 256, 14, 14], "hidden": 16, "dtype": "bfloat16", **_SILU}, False),
    ({"shape": [1, 256, 14, 14], "hidden": 16, "dtype": "float32"}, True),
)  # fmt: skip
# Every further feature; correct is enough, some of libdevice's double-precision functions spill.
_REST: tuple[dict[str, Any], ...] = (
    {"shape": [2, 65, 13, 17], "hidden": 5, "dtype": "float32", "affine": True, "lengths": True,
     "shift": True, "weighted": True, "residual": True, "activation": "gelu", "gate": "tanh",
     "before": "mish", "after": "gelu_tanh"},
    {"shape": [2, 64, 14, 14], "hidden": 16, "dtype": "float64", "layout": "channels_last",
     "before": "gelu", "after": "relu"},
    {"shape": [2, 17, 5, 7], "hidden": 5, "dtype": "float64", "affine": True, "lengths": True,
     "shift": True, "weighted": True, "residual": True, "gate": "tanh", "after": "mish"},
    {"shape": [2, 65, 13, 17], "part": "squeeze", "dtype": "float64", "affine": True,
     "lengths": True, "before": "mish"},
    {"shape": [2, 65, 13, 17], "part": "channel_scale", "dtype": "float32", "affine": True,
     "shift": True, "weighted": True, "residual": True, "gate": "tanh", "before": "relu6",
     "after": "leaky_relu"},
)  # fmt: skip


class _Compiled(NamedTuple):
    """What the kernels of each option set became, and how many cubins that took."""

    kernels: list[list[dict[str, Any]]]
    cubins: int


def _compile(
    capability: int, options: list[dict[str, Any]], path: Path | None = None
) -> list[list[dict[str, Any]]]:
    """What the kernels of each option set became, with the Triton that lies in ``path``."""
    return _compiled(capability, json.dumps(options), path).kernels


@functools.cache
def _compiled(capability: int, options: str, path: Path | None) -> _Compiled:
    multiprocessors = DEVICES[capability][1]
    given = [{**o, "multiprocessors": multiprocessors} for o in json.loads(options)]
    printed = _run(_SCRIPT, str(capability), "\n".join(map(json.dumps, given)), path)
    *lines, cubins = printed.splitlines()
    return _Compiled([json.loads(line) for line in lines], int(cubins))


def _run(script: Path, argument: str = "", text: str = "", path: Path | None = None) -> str:
    """What a script prints, in a process that sees this package before an installed one."""
    folders = [*([str(path)] if path else []), str(_SCRIPT.parent.parent)]
    done = subprocess.run(
        [sys.executable, str(script), *argument.split()],
        input=text, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
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


def _check(
    capability: int, options: dict[str, Any], kernels: list[dict[str, Any]], wide: bool
) -> None:
    part = "inplace" if "inplace" in options else options.get("part", "whole")
    assert [kernel["kernel"] for kernel in kernels] in _LAUNCHES[part]
    for kernel in kernels:
        assert kernel["STACK"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= DEVICES[capability][0], f"shared memory: {kernel}"
        name = kernel["kernel"]
        if name in _WITHOUT_IMAGES:
            continue
        if wide:
            reads, writes = _traffic(name, part, options)
            vectors = max(1, kernel["vectors"])
            assert kernel["loads_16"] >= reads * vectors, f"narrow loads: {kernel}"
            assert kernel["stores_16"] >= writes * vectors, f"narrow stores: {kernel}"


def _traffic(kernel: str, part: str, options: dict[str, Any]) -> tuple[int, int]:
    """How many images a kernel reads, and writes."""
    before, residual = bool(options.get("before")), bool(options.get("residual"))
    if kernel == "half_backward_kernel":  # a squeeze's gradient needs x if `before` does
        return (before, 1) if part == "squeeze" else (2, 1 + residual)
    return {
        "squeeze_kernel": (1, 0),
        "scale_kernel": (1 + residual, 1),
        "resident_kernel": (1 + residual, 1),
        "dots_kernel": (2, 0),
        "dx_kernel": (1 + before, 1 + residual),
        "resident_backward_kernel": (2, 1 + residual),
    }[kernel]


def _layers(capability: int) -> list[tuple[dict[str, Any], bool]]:
    return list(_LAYERS) if capability == 90 else [_LAYERS[i] for i in _FEW]


def _in_clusters(capability: int) -> list[tuple[dict[str, Any], bool]]:
    return list(_CLUSTERS) if capability == 90 else [_CLUSTERS[0]]


def _triton_for_clusters() -> Path | None:
    """A folder to find it in; None is the one of the tests."""
    return _NEWER if why_no_cluster((9, 0), version("triton")) else None


@pytest.mark.parametrize("capability", DEVICES)
def test_kernels_compile_without_spills(capability: int) -> None:
    layers = _layers(capability)
    compiled = _compile(capability, [options for options, _ in layers])
    for kernels, (options, wide) in zip(compiled, layers, strict=True):
        _check(capability, options, kernels, wide)


def test_every_feature_compiles() -> None:
    for options, kernels in zip(_REST, _compile(90, list(_REST)), strict=True):
        assert [k["kernel"] for k in kernels] in _LAUNCHES[options.get("part", "whole")]
        assert all(kernel["shared"] <= DEVICES[90][0] for kernel in kernels)


@pytest.mark.parametrize("capability", [c for c in DEVICES if c >= 90])
def test_images_in_clusters_compile(capability: int) -> None:
    """With a Triton that can; the one of the tests would put these images into two launches."""
    newer = _triton_for_clusters()
    if newer and not (newer / "triton").is_dir():
        pytest.skip("needs Triton 3.8 or newer; `make test` puts one into build/triton38")
    layers = _in_clusters(capability)
    compiled = _compile(capability, [options for options, _ in layers], newer)
    for kernels, (options, wide) in zip(compiled, layers, strict=True):
        _check(capability, options, kernels, wide)
        names = [kernel["kernel"] for kernel in kernels]
        assert names == ["resident_kernel", "resident_backward_kernel", "parameters_kernel"]
        for kernel in kernels[:2]:
            assert kernel["blocks"] > 1
            assert kernel["cluster_barriers"] > 0, f"sums stay within blocks: {kernel}"


def test_the_gate_compiles_few_cubins() -> None:
    """What the tests above compile: at most 400, so that the gate stays quick."""
    batches = [(c, [o for o, _ in _layers(c)], None) for c in DEVICES]
    batches.append((90, list(_REST), None))
    newer = _triton_for_clusters()
    if newer is None or (newer / "triton").is_dir():
        batches += [(c, [o for o, _ in _in_clusters(c)], newer) for c in DEVICES if c >= 90]
    cubins = [_compiled(c, json.dumps(options), path).cubins for c, options, path in batches]
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


def _workloads() -> list[dict[str, Any]]:
    """The distinct layers of real networks, at the two batch sizes that are planned differently."""
    path = Path(__file__).parent.parent / "benchmarks" / "workloads.json"
    layers = [la for n in json.loads(path.read_text())["networks"] for la in n["layers"]]
    names = {"none": None, "add_relu": "relu"}
    distinct = {
        json.dumps({
            "shape": [batch, la["channels"], la["height"], la["width"]], "hidden": la["hidden"],
            "activation": la["activation"], "gate": la["gate"], "layout": layout,
            "before": names.get(la["before"], la["before"]),
            "after": names.get(la["after"], la["after"]),
            "residual": la["after"] == "add_relu",
        })
        for la in layers for batch in (1, 256) for layout in ("contiguous", "channels_last")
    }  # fmt: skip
    dtypes = ("bfloat16", "float16", "float32")
    return [{**json.loads(text), "dtype": dtypes[i % 3]} for i, text in enumerate(sorted(distinct))]


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("part", range(8))
def test_layers_of_real_networks(capability: int, part: int) -> None:
    layers = _workloads()[part::8]
    for options, kernels in zip(layers, _compile(capability, layers), strict=True):
        _check(capability, options, kernels, False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("number", range(12))
def test_what_tuning_would_time_compiles(capability: int, number: int) -> None:
    """Candidates may be poor, which is why they are timed; they must be there to be timed."""
    layers = [{**options, "candidate": number} for options, _ in _layers(capability)]
    for options, kernels in zip(layers, _compile(capability, layers), strict=True):
        for kernel in kernels:
            assert kernel["shared"] <= DEVICES[capability][0], f"{options}: {kernel}"
