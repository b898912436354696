"""Key cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Each group is one layer, layout and mode, so eager and fused stand side by side. To guard against a
regression on one machine: ``--benchmark-autosave``, later ``--benchmark-compare
--benchmark-compare-fail=median:10%``.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .problem import FORWARD, TOLERANCE, TRAINING, Case, Problem, largest_error, oracle
from .providers import FUSED, LIMIT, make_call, make_provider, results, unavailable
from .workloads import Layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = (
    Layer(256, 56, 56, 16, "relu", "sigmoid"),  # seresnet50: bytes decide
    Layer(2048, 7, 7, 128, "relu", "sigmoid"),  # seresnet50: weights larger than an image
    Layer(144, 28, 28, 6, "silu", "sigmoid"),  # efficientnet_b0
    Layer(960, 7, 7, 240, "relu", "hardsigmoid"),  # mobilenetv3_large_100
    Layer(256, 8, 8, 32, "relu", "sigmoid", shift=True),  # lc0_20x256
)


@pytest.mark.parametrize("name", ["eager-conv", "eager-linear", *FUSED, LIMIT])
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layer(
    benchmark: BenchmarkFixture, layer: Layer, layout: str, mode: str, name: str
) -> None:
    if name == LIMIT and mode != FORWARD:
        pytest.skip("the copy has no backward")
    if name in FUSED and (reason := unavailable(name, DEVICE)):
        pytest.skip(f"{name}: {reason}")
    case = Case(layer, "fp32", layout, batch=8)
    problem = Problem.create(case, DEVICE)
    module = make_provider(name).build(problem)
    if name != LIMIT:
        want, got = oracle(problem), results(module, problem)
        assert largest_error(got, want, want) <= TOLERANCE[case.dtype]

    call = make_call(module, problem, mode)
    benchmark.group = f"{layer.name} {layout} {mode}"
    benchmark.extra_info |= {"provider": name, "bytes": case.bytes}

    def step() -> None:
        call(0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(mode != FORWARD):
        benchmark(step)
