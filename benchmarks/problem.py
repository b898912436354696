"""Inputs of one benchmark case, and the fp64 oracle every provider is held to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .workloads import Layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD, FORWARD_GRAPH, TRAINING = "forward", "forward, graph built", "forward+backward"
BACKWARD = "backward"  # alone, again and again through a graph built once

# Largest error over largest value of the oracle. Wide enough for eager's own rounding, narrow
# enough that one wrong vector or a missing term shows; the test suite holds the tight bounds.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}


@dataclass(frozen=True)
class Case:
    """What identifies a measurement, apart from mode and provider."""

    layer: Layer
    dtype: str
    layout: str
    batch: int

    @property
    def bytes(self) -> int:
        """Size of x."""
        layer = self.layer
        return self.batch * layer.channels * layer.positions * DTYPES[self.dtype].itemsize

    @property
    def name(self) -> str:
        return f"{self.layer.name} {self.dtype} b{self.batch} {self.layout}"


def limit_in_clones(layer: Layer, mode: str) -> float:
    """Least traffic over that of ``x.clone()``, which reads and writes N bytes: 2N.

    Forward reads x and writes y; backward reads x and dy and writes dx: 5N together. A residual
    is read once more in forward, and its gradient written once more in backward. What ``after``
    needs for backward, a bit per element, is not counted; ``before`` needs nothing further.
    """
    forward = 3 if layer.add else 2
    backward = 4 if layer.add else 3
    return {TRAINING: forward + backward, BACKWARD: backward}.get(mode, forward) / 2


@dataclass
class Problem:
    """Tensors of one case. ``x``, ``dy`` and ``residual`` may come in several copies (cold L2).

    Values keep clear of the kinks of relu and friends (biases and residual are large next to what
    is added to them), so a last-bit difference in a hidden unit cannot flip a derivative and every
    provider can be held to one bound.
    """

    case: Case
    x: list[Tensor]
    dy: list[Tensor]
    residual: list[Tensor | None]
    weights: dict[str, Tensor] = field(repr=False)  # w1 [R, C], b1 [R], w2 [C or 2C, R], b2

    @classmethod
    def create(cls, case: Case, device: torch.device, *, copies: int = 1, seed: int = 0) -> Problem:
        layer, dtype = case.layer, DTYPES[case.dtype]
        # Drawn where they are used: a GPU's 10^8 numbers take a processor seconds.
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, layer.channels, layer.height, layer.width)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def image(value: Tensor) -> Tensor:
            return value.to(device, dtype).to(memory_format=LAYOUTS[case.layout])

        x = image(normal(*shape).add_(0.3).clamp_(-2.9, 2.9))
        dy = image(normal(*shape).add_(0.3))
        residual = None
        if layer.add:
            value = normal(*shape)
            residual = image(value.clamp_(-1, 1) + 4 * value.sign())
        inner = layer.hidden or layer.channels
        weights = {}
        if layer.hidden is not None:
            sign = torch.ones(inner, device=device)
            sign[1::2] = -1
            weights["w1"] = normal(inner, layer.channels) * (0.5 / math.sqrt(layer.channels))
            weights["b1"] = sign * (0.6 + torch.rand(inner, generator=generator, device=device))
        rows = 2 * layer.channels if layer.shift else layer.channels
        weights["w2"] = normal(rows, inner) * (0.5 / math.sqrt(inner))
        weights["b2"] = 0.1 * normal(rows)
        return cls(
            case,
            [x, *(x.clone() for _ in range(copies - 1))],
            [dy, *(dy.clone() for _ in range(copies - 1))],
            [
                residual,
                *(None if residual is None else residual.clone() for _ in range(copies - 1)),
            ],
            {name: value.to(device, dtype) for name, value in weights.items()},
        )


# Of x, that the oracle takes at a time.
_ORACLE_ELEMENTS = 1 << 22

_POINTWISE = {
    None: lambda t: t,
    "relu": lambda t: t.clamp(min=0),
    "relu6": lambda t: t.clamp(0, 6),
    "silu": lambda t: t / (1 + (-t).exp()),
    "hardswish": lambda t: t * (t / 6 + 0.5).clamp(0, 1),
    "gelu_tanh": lambda t: t / (1 + (-math.sqrt(8 / math.pi) * (t + 0.044715 * t**3)).exp()),
    "sigmoid": lambda t: 1 / (1 + (-t).exp()),
    "hardsigmoid": lambda t: (t / 6 + 0.5).clamp(0, 1),
}


def oracle(problem: Problem) -> dict[str, Tensor]:
    """Output ``y`` and every gradient in fp64, some images at a time to bound the memory."""
    layer = problem.case.layer
    step = max(1, _ORACLE_ELEMENTS // (layer.channels * layer.positions))
    weights = {name: w.double().requires_grad_() for name, w in problem.weights.items()}
    images: dict[str, list[Tensor]] = {"y": [], "x": []}
    if layer.add:
        images["residual"] = []
    totals = {name: torch.zeros_like(w) for name, w in weights.items()}
    for start in range(0, problem.case.batch, step):
        part = slice(start, start + step)
        x = problem.x[0][part].double().requires_grad_()
        inputs = {"x": x}
        p = _POINTWISE[layer.before](x)
        h = p.sum((2, 3)) / layer.positions
        if layer.hidden is not None:
            h = _POINTWISE[layer.activation](h @ weights["w1"].t() + weights["b1"])
        u = h @ weights["w2"].t() + weights["b2"]
        y = p * _POINTWISE[layer.gate](u[:, : layer.channels])[:, :, None, None]
        if layer.shift:
            y = y + u[:, layer.channels :, None, None]
        if layer.add:
            inputs["residual"] = problem.residual[0][part].double().requires_grad_()
            y = y + inputs["residual"]
        y = _POINTWISE[layer.after](y)
        everything = {**inputs, **weights}
        grads = torch.autograd.grad(y, everything.values(), problem.dy[0][part].double())
        images["y"].append(y.detach())
        for name, grad in zip(everything, grads, strict=True):
            if name in totals:
                totals[name] += grad
            else:
                images[name].append(grad)
    return {**{name: torch.cat(parts) for name, parts in images.items()}, **totals}


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor], names: Iterable[str]) -> float:
    """Worst over the named tensors of max |got - want| / max |want|; NaN counts as infinite."""
    worst = 0.0
    for name in names:
        error = (got[name].detach().reshape(want[name].shape) - want[name]).abs_().max().item()
        scale = max(want[name].abs().max().item(), 1e-6)
        worst = max(worst, error / scale) if math.isfinite(error) else math.inf
    return worst
