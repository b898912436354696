"""Multiply-adds of the fused operations, for ``torch.utils.flop_counter``.

Importing this module registers the formulas: from then on ``FlopCounterMode`` counts the two
layers of an excitation as it counts them in eager PyTorch. The package imports it as soon as
torch's counter is imported, which itself costs Triton's import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from .ops import BACKENDS_WITH_OPS, Needs

_Shape = Sequence[int]


def _forward(
    x: _Shape, w1: _Shape | None, b1: _Shape | None, w2: _Shape, *rest: Any, **kwargs: Any
) -> int:
    """``W1 z`` and ``W2 h`` for each image; as everywhere in torch, pointwise work counts 0."""
    first = 0 if w1 is None else w1[0] * w1[1]
    return 2 * x[0] * (first + w2[0] * w2[1])


def _backward(
    dy: _Shape, x: _Shape, w1: _Shape | None, b1: _Shape | None, w2: _Shape, *rest: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """A product for each gradient that is asked for, and for what it needs on the way."""
    needs = rest[-1]
    first = 0 if w1 is None else w1[0] * w1[1]
    second = w2[0] * w2[1]
    products = 0
    if needs & Needs.W2:
        products += second
    if needs & (Needs.X | Needs.W1 | Needs.B1):
        products += second  # dh, or dz of a single layer
    if needs & Needs.W1:
        products += first
    if needs & Needs.X:
        products += first
    return 2 * x[0] * products


def _register() -> None:
    ops = torch.ops.senet_kernels
    formulas: dict[str, Callable[..., int]] = {
        "squeeze_excite": _forward,
        "native_forward_": _forward,
    }
    for backend in BACKENDS_WITH_OPS:
        formulas |= {f"{backend}_forward": _forward, f"{backend}_backward": _backward}
    for name, formula in formulas.items():
        target = getattr(ops, name)
        if target not in flop_registry:  # the module may be imported twice, from two paths
            register_flop_formula(target)(formula)


_register()


def multiply_adds(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of one forward pass, by torch's counter: convolutions and matrix products.

    Nothing is computed: a copy of the model without values runs on the meta device.

    Args:
        model: any module that takes one tensor; counted in evaluation mode.
        shape: of its input.
    """
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    copied = copy.deepcopy(model, tensors).eval()  # deepcopy takes them for copied already
    dtype = next((p.dtype for p in model.parameters()), None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copied(torch.empty(tuple(shape), device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2
