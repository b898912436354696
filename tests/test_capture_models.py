"""Real networks of other libraries, converted and exported: every gradient is that of the network
before it was converted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import captures
import oracle
from models import REAL_MODELS, RealModel, output
from senet_kernels import fuse_se_blocks


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    return captures.gradients((lambda v: output(model, v), dict(model.named_parameters())), (x,))


@pytest.mark.slow
@pytest.mark.parametrize("neighbours", [False, True], ids=["", "neighbours"])
@pytest.mark.parametrize("real", REAL_MODELS, ids=str)
def test_exported(real: RealModel, neighbours: bool) -> None:
    model, x = real.make().double(), real.input().double()
    right = _gradients(model, x)
    report = fuse_se_blocks(model, neighbours=neighbours)
    program = torch.export.export(model, (x,))
    operators = captures.operators(program.graph_module)
    assert operators <= captures.PUBLIC
    assert operators
    # torch's hardsigmoid has a float32 constant in its float64 derivative.
    rtol = 1e-6 if "hardsigmoid" in str(report) else 1e-10
    got = _gradients(program.module(), x)
    for name, value in right.items():
        if value is not None:
            found = got[name]
            assert found is not None, name
            assert oracle.max_error(found, value) <= rtol * oracle.largest(value), name
