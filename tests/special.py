"""Values that are not numbers, and where they may spread to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from problems import Problem

Function = Callable[[Tensor], Tensor]


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 +Inf, 3 -Inf."""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


def in_float32(problem: Problem) -> Problem:
    tensors = {n: None if t is None else t.float() for n, t in problem.tensors.items()}
    # Contiguous, as torch's own gelu refuses gradients whose elements overlap.
    dy = problem.dy.float().contiguous()
    return replace(problem, tensors=tensors, dy=dy, dtype=torch.float32)


# At NaN and Inf torch's vectorised and scalar loops do not always agree: relu6'(NaN) is 0 or 1,
# hardswish'(NaN) NaN or 1, gelu(Inf) NaN or Inf. Either will do, and so will a derivative of NaN
# at NaN.


def vectorised(name: str, fn: Function) -> Function:
    return lambda t: fn(t.contiguous())


def scalar(name: str, fn: Function) -> Function:
    if name == "relu6":  # by the vectorised loop it is 0 in some places and 1 in others
        return _relu6_with_slope_at_nan
    if name == "hardsigmoid":
        return lambda t: _relu6_with_slope_at_nan(t + 3) / 6
    return lambda t: fn(t.repeat_interleave(2, dim=-1)[..., ::2])


def _relu6_with_slope_at_nan(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), t, F.relu6(t))


def uncancelled(name: str, fn: Function) -> Function:
    """gelu of large negative numbers is small; eager's 1 + tanh is 0 there, and Inf times 0 NaN."""
    if name == "gelu":
        return lambda t: 0.5 * t * torch.erfc(t * -math.sqrt(0.5))
    if name == "gelu_tanh":
        return lambda t: t * torch.sigmoid(math.sqrt(8 / math.pi) * (t + 0.044715 * t**3))
    return fn


def nan_derivative(name: str, fn: Function) -> Function:
    return lambda t: torch.where(t.isnan(), t * math.nan, fn(t))


def limits(name: str, fn: Function) -> Function:
    """At infinity the limits of value and derivative, where eager's own are artefacts, Inf * 0; and
    hardsigmoid's derivative at NaN is 0, as ``F.hardsigmoid``'s scalar loop has it."""
    if name == "hardsigmoid":
        return lambda t: torch.where(t.isnan(), t.detach(), fn(t.nan_to_num(0)))
    if name not in ("silu", "gelu", "gelu_tanh", "mish"):
        return fn

    def with_slope(t: Tensor) -> Tensor:
        there = torch.where(t.isposinf(), t, fn(t.detach()))
        return torch.where(t.isinf(), there, fn(t.masked_fill(t.isinf(), 0.0)))

    return with_slope


@contextmanager
def by_rule(rule: Callable[[str, Function], Function]) -> Iterator[None]:
    """The oracle's functions as one of the above makes them."""
    functions = oracle.FUNCTIONS
    oracle.FUNCTIONS = {
        name: fn if name == "identity" else rule(name, fn) for name, fn in functions.items()
    }
    try:
        yield
    finally:
        oracle.FUNCTIONS = functions
