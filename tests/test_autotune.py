"""Inductor's own choice between a public op and its decomposition."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import senet_kernels
from senet_kernels import public_ops

CALL = "torch.ops.senet_kernels.squeeze_excite"


@pytest.fixture
def tuned() -> Iterator[None]:
    lowering = pytest.importorskip("torch._inductor.lowering")
    if not hasattr(lowering, "user_lowerings"):
        pytest.skip("the Inductor of this torch does not tune operators that are defined elsewhere")
    user_lowerings = lowering.user_lowerings
    before = dict(user_lowerings)
    senet_kernels.autotune_in_inductor()
    yield
    user_lowerings.clear()
    user_lowerings.update(before)


class _Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = senet_kernels.FusedSEBlock(8, after="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, x)
        return y


def _plain() -> nn.Module:
    # Its input is no buffer yet when the op is lowered.
    return nn.Sequential(nn.Hardtanh(), senet_kernels.FusedSEBlock(8), nn.ReLU())


def _compiled(model: nn.Module, decompose: bool) -> tuple[float, str]:
    """How far a program of ``model``, compiled again, is from it; and the code."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    x = torch.randn(2, 8, 5, 7)
    program = torch.export.export(model, (x,))
    torch._dynamo.reset()
    options: dict[str, Any] = {"max_autotune": True, "fx_graph_cache": False}
    with torch.no_grad(), config.patch({"test_configs.force_custom_op_decomposition": decompose}):
        call: Callable[[Tensor], Tensor] = torch.compile(program.module(), options=options)
        y, code = run_and_get_code(call, x)
        return (y - model(x)).abs().max().item(), "\n".join(code)


@pytest.mark.parametrize("decompose", [True, False])
def test_either_may_be_chosen(tuned: None, decompose: bool) -> None:
    difference, code = _compiled(_plain().eval(), decompose)
    assert difference < 1e-6
    assert (CALL not in code) == decompose


def test_a_call_with_tensors_by_keyword_keeps_the_op(tuned: None) -> None:
    difference, code = _compiled(_Joined().eval(), True)
    assert difference < 1e-6
    assert CALL in code


def test_asking_twice_registers_once(tuned: None) -> None:
    from torch._inductor.lowering import user_lowerings

    first = dict(user_lowerings)
    senet_kernels.autotune_in_inductor()
    assert user_lowerings == first
    assert set(public_ops.OPS.values()) <= set(first)


def test_a_torch_that_cannot_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import kernel

    monkeypatch.delattr(kernel, "custom_op", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.kernel.custom_op", None)
    with pytest.raises(RuntimeError, match="expected a torch whose Inductor tunes custom op"):
        senet_kernels.autotune_in_inductor()
