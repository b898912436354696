"""The error budgets: ours against the eager block's, both against float64 on the same inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import EXACT_BACKENDS, BackendCase
from checkout import ROOT
from problems import Spec, build
from senet_kernels import squeeze_excite

SEEDS = 8
HALF = (torch.bfloat16, torch.float16)

# Mean error over eager's at most, by dtype: for the activations' and for the parameters' results.
MEAN_BUDGET = {torch.bfloat16: (1.02, 1.02), torch.float16: (1.02, 1.02), torch.float32: (1.25, 2)}
# Largest error over eager's at most; one ulp of the largest value on top.
MAX_BUDGET = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 4.0}
# In float64: of the element and the largest value together.
DOUBLE_BUDGET = 1e-12

_SPECS = (
    Spec((4, 64, 14, 14), 16),
    Spec((4, 64, 14, 14), 16, layout="channels_last"),
    Spec((1, 48, 56, 56), 12),
    Spec((8, 96, 7, 7), 24, activation="silu", before="silu"),
    Spec((8, 96, 7, 7), 24, layout="channels_last", before="hardswish", gate="hardsigmoid"),
    Spec((4, 64, 14, 14), 16, before="relu", bias=False),
    Spec((4, 64, 14, 14), 16, residual="contiguous", after="relu"),
    Spec((4, 64, 14, 14), 16, layout="channels_last", residual="channels_last", after="relu"),
    Spec((4, 64, 11, 13), 16, residual="contiguous", after="silu"),
    Spec((2, 512, 2, 2), 128),
    Spec((4, 32, 300), 8, activation="gelu", gate="tanh"),
    Spec((4, 64, 14, 14), 16, shift=True),
    Spec((4, 64, 14, 14), 16, weighted=True),
    Spec((4, 64, 14, 14), 16, affine=True, before="silu"),
    Spec((4, 64, 14, 14), None),
    Spec((4, 64, 14, 14), 16, lengths=True),
    Spec((4, 64, 14, 14), part="squeeze", before="silu"),
    Spec((4, 64, 14, 14), part="channel_scale", gate="sigmoid", shift=True, after="silu"),
)


def _cases(dtypes: Iterable[torch.dtype]) -> list[Any]:
    return [
        pytest.param(backend, spec, id=f"{backend}-{spec}")
        for backend in EXACT_BACKENDS
        for spec in (replace(s, dtype=dtype) for dtype in dtypes for s in _SPECS)
        if spec.fits(backend)
    ]


def _is_activation(name: str) -> bool:
    return name in ("y", "dx", "dresidual")


@pytest.mark.parametrize(("backend", "spec"), _cases(MEAN_BUDGET), indirect=["backend"])
def test_error_against_eager(backend: BackendCase, spec: Spec) -> None:
    log_ratios: dict[str, list[float]] = {}
    sums: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        problem = build(replace(spec, seed=seed, device=backend.device))
        expected = problem.expected()
        ours = problem.run(squeeze_excite, backend=backend.name)
        # In float32 the two forms users write differ by up to a third in error, either way round,
        # with the processor's matrix library: the budget is over the larger.
        forms = (oracle.eager_block, oracle.block)[: 1 if spec.dtype in HALF else 2]
        eagers = [problem.run(form) for form in forms]
        for name, right in expected.items():
            eager = max((e[name] for e in eagers), key=partial(oracle.mean_error, expected=right))
            _check_max(name, ours[name], eager, right, spec.dtype)
            # An error below a hundredth of an ulp is luck (a short vector), not accuracy.
            floor = 0.01 * oracle.ulp(spec.dtype) * right.abs().mean().item()
            errors = [oracle.mean_error(t, right) + floor for t in (ours[name], eager)]
            log_ratios.setdefault(name, []).append(math.log(errors[0] / errors[1]))
            totals = sums.setdefault(name, [0.0, 0.0])
            totals[:] = [total + e for total, e in zip(totals, errors, strict=True)]
    for name, logs in log_ratios.items():
        if spec.dtype in HALF:
            ratio = sums[name][0] / sums[name][1]
        else:
            ratio = math.exp(math.fsum(logs) / len(logs))
        budget = MEAN_BUDGET[spec.dtype][0 if _is_activation(name) else 1]
        assert ratio <= budget, f"{name}: mean error is {ratio:.3f} of eager's, budget {budget}"


def _check_max(name: str, ours: Tensor, eager: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    allowed = MAX_BUDGET[dtype] * oracle.max_error(eager, right)
    allowed += oracle.ulp(dtype) * oracle.largest(right)
    error = oracle.max_error(ours, right)
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize(("backend", "spec"), _cases((torch.float64,)), indirect=["backend"])
def test_double_precision(backend: BackendCase, spec: Spec) -> None:
    problem = build(replace(spec, device=backend.device))
    actual = problem.run(squeeze_excite, backend=backend.name)
    for name, right in problem.expected().items():
        error = (actual[name] - right).abs()
        allowed = DOUBLE_BUDGET * (right.abs() + oracle.largest(right))
        assert (error <= allowed).all(), f"{name}: largest error {error.max().item():.3g}"


def promise() -> str:
    """These numbers in words, for docs/reliability.json."""
    first = (
        "Errors are distances from float64 on the same inputs; eager is the block with 1x1 "
        "convolutions (in float32 that or matrix products, whichever is further off). "
        f"Over {SEEDS} random inputs:"
    )
    said = [first]
    for dtype, (activations, parameters) in MEAN_BUDGET.items():
        name = str(dtype).removeprefix("torch.")
        said.append(
            f"{name}: the mean error is at most {activations:g} times eager's in y, dx and "
            f"d_residual, {parameters:g} times in the gradients of parameters; the largest error "
            f"at most {MAX_BUDGET[dtype]:g} times eager's and one unit in the last place of the "
            "largest value."
        )
    said.append(
        f"float64: at most {DOUBLE_BUDGET:g} of the sum of the value and the largest value."
    )
    return "<br>".join(said)


def test_the_page_promises_these_numbers() -> None:
    """docs/reliability.md is generated from this file, see ``tools/reliability.py``."""
    rows = json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))["rows"]
    test = "tests/test_budgets.py::test_error_against_eager"
    promises = [row["promise"] for row in rows if row["tests"].get("CPU", [""])[0] == test]
    assert promises == [promise()]
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"| {promise()} |" in page, "python -m tools.reliability"
