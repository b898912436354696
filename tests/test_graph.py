"""Squeeze-and-excitation found by dataflow: nothing is fused that is something else, and each
refusal names its true cause."""

from __future__ import annotations

import re

import pytest
import torch

import graph_cases
from graph_compare import compare

#: Cases that compute something else in eval, by their layers.
_BY_MODE = ("Norm", "Statistics", "Dropout")


@pytest.mark.parametrize(
    ("case", "training"),
    [
        pytest.param(case, training, id=f"{case.__name__}-{'train' if training else 'eval'}",
                     marks=[] if training or any(w in case.__name__ for w in _BY_MODE)
                     else [pytest.mark.slow])
        for case in graph_cases.CASES for training in (True, False)
    ],
)  # fmt: skip
def test_adversarial_modules_compute_what_eager_does(
    case: type[graph_cases.Case], training: bool
) -> None:
    torch.manual_seed(0)
    module = case().to(case.dtype).train(training)
    x = torch.randn(graph_cases.SHAPE, dtype=case.dtype)
    report = compare(module, x, tolerance=case.tolerance)
    if training and "Norm" in case.__name__:  # and as under Inductor
        compare(module, x, tolerance=case.tolerance, norm_in_training=True)
    fused = case.fused if isinstance(case.fused, int) else case.fused[not training]
    assert len(report.fused) == fused, report
    if case.cause is not None and not fused:
        assert any(re.search(case.cause, f.note) for f in report.refused), report
