"""Ahead-of-time compilation of the Triton kernels for GPUs that need not be here.

Proves that they compile, fit, do not spill and move 16 bytes at a time where alignment allows.
Says nothing about results, races or speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).with_name("compile_triton.py")

# Capability: shared memory a block may have, multiprocessors of a typical part.
DEVICES = {80: (166912, 108), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}

# What networks have: option set, and whether every access to an image can be 16 bytes wide.
_RELU = {"residual": True, "after": "relu"}
_SILU = {"before": "silu", "activation": "silu"}
_LAYERS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"shape": [256, 256, 56, 56], "hidden": 16, "dtype": "bfloat16", **_RELU}, True),
    ({"shape": [256, 96, 112, 112], "hidden": 4, "dtype": "bfloat16", **_SILU,
      "layout": "channels_last"}, True),
    ({"shape": [256, 2048, 7, 7], "hidden": 128, "dtype": "bfloat16", **_RELU}, False),
    ({"shape": [1, 1024, 14, 14], "hidden": 64, "dtype": "float32",
      "layout": "channels_last"}, True),
    ({"shape": [1, 1152, 7, 7], "hidden": 48, "dtype": "float16", **_SILU}, False),
    ({"shape": [256, 72, 28, 28], "hidden": 24, "dtype": "float16", "gate": "hardsigmoid",
      "before": "hardswish"}, True),
    ({"shape": [64, 512, 28, 28], "hidden": None, "dtype": "bfloat16", "bias": False,
      "layout": "channels_last"}, True),
    ({"shape": [512, 256, 8, 8], "hidden": 32, "dtype": "float16", "shift": True, **_RELU}, True),
    ({"shape": [256, 64, 8, 8], "hidden": 16, "dtype": "bfloat16", **_SILU}, True),
    ({"shape": [256, 112, 7, 7], "hidden": 28, "dtype": "float16", **_RELU}, False),
)  # fmt: skip
# Enough to see that a target compiles at all.
_FEW = (0, 2)
# Every further feature; correct is enough, some of libdevice's double-precision functions spill.
_REST: tuple[dict[str, Any], ...] = (
    {"shape": [2, 65, 13, 17], "hidden": 5, "dtype": "float32", "affine": True, "lengths": True,
     "shift": True, "weighted": True, "residual": True, "activation": "gelu", "gate": "tanh",
     "before": "mish", "after": "gelu_tanh"},
    {"shape": [2, 64, 14, 14], "hidden": 16, "dtype": "float64", "layout": "channels_last",
     "before": "gelu", "after": "relu"},
)  # fmt: skip


def _compile(capability: int, options: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What the kernels of each option set became."""
    multiprocessors = DEVICES[capability][1]
    lines = "\n".join(json.dumps({**o, "multiprocessors": multiprocessors}) for o in options)
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), str(capability)],
        input=lines, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(capability: int, kernels: list[dict[str, Any]], wide: bool) -> None:
    # One launch forward where images are resident, else two; three backward.
    resident = kernels[0]["kernel"] == "resident_kernel"
    assert len(kernels) == (4 if resident else 5)
    for kernel in kernels:
        assert kernel["STACK"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= DEVICES[capability][0], f"shared memory: {kernel}"
        if wide and kernel["kernel"] != "parameters_kernel":
            assert kernel["loads_16"], f"narrow loads: {kernel}"
            if kernel["kernel"] in ("scale_kernel", "dx_kernel", "resident_kernel"):
                assert kernel["stores_16"], f"narrow stores: {kernel}"


@pytest.mark.parametrize("capability", DEVICES)
def test_kernels_compile_without_spills(capability: int) -> None:
    layers = list(_LAYERS) if capability == 90 else [_LAYERS[i] for i in _FEW]
    compiled = _compile(capability, [options for options, _ in layers])
    for kernels, (_, wide) in zip(compiled, layers, strict=True):
        _check(capability, kernels, wide)


def test_every_feature_compiles() -> None:
    for kernels in _compile(90, list(_REST)):
        assert len(kernels) == 5
        assert all(kernel["shared"] <= DEVICES[90][0] for kernel in kernels)


def test_prepared_calls_launch_what_triton_launches() -> None:
    """The second call of a kind goes past Triton's own launcher, straight to the kernel."""
    script = _SCRIPT.with_name("prepared_launches.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    launches = {"two launches, forward": 2, "one launch, forward": 1}
    for name, found in report.items():
        assert found["first"] == found["second"], name
        assert len(found["first"]) == launches.get(name, 3), name
    assert set(launches) < set(report)


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
            "residual": la["after"] == "add_relu", "dtype": "bfloat16",
        })
        for la in layers for batch in (1, 256) for layout in ("contiguous", "channels_last")
    }  # fmt: skip
    return [json.loads(text) for text in sorted(distinct)]


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("part", range(8))
def test_layers_of_real_networks(capability: int, part: int) -> None:
    layers = _workloads()[part::8]
    for options, kernels in zip(layers, _compile(capability, layers), strict=True):
        spilled = [k for k in kernels if k["STACK"]]
        assert not spilled, f"{options}: {spilled}"
