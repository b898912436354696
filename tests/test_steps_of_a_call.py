"""What a small call costs before its kernel runs: the steps of Python's interpreter, counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import senet_kernels
from senet_kernels import FusedSEBlock, backends, squeeze_excite

# As counted by Python 3.11. Not more than before kernels had to prove themselves on a GPU: a call
# on the CPU pays nothing for that. Other versions have other steps.
pytestmark = [
    pytest.mark.skipif(not backends()["native"], reason="no native backend"),
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counted for Python 3.11"),
]

_PACKAGE = os.path.dirname(senet_kernels.__file__)


def _steps(call: Callable[[], object]) -> int:
    """How many instructions the interpreter executes in a call; in torch, where they are fewer or
    more with its version, none are counted."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_code.co_filename.startswith(_PACKAGE):
            count += 1
        return trace

    for _ in range(3):
        call()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _layers(*, trained: bool) -> tuple[torch.Tensor, ...]:
    shapes = (4, 16), (4,), (16, 4), (16,)
    return tuple(torch.randn(shape).requires_grad_(trained) for shape in shapes)


def test_a_call_without_gradients() -> None:
    x, layers = torch.randn(1, 16, 4, 4), _layers(trained=False)
    assert _steps(lambda: squeeze_excite(x, *layers, backend="native")) <= 211


def test_a_call_with_gradients() -> None:
    x, layers = torch.randn(1, 16, 4, 4), _layers(trained=True)
    assert _steps(lambda: squeeze_excite(x, *layers, backend="native")) <= 293


def test_a_module() -> None:
    x, block = torch.randn(1, 16, 4, 4), FusedSEBlock(16, 4).eval()
    with torch.no_grad():
        assert _steps(lambda: block(x)) <= 449
