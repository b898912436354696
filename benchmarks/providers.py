"""Who computes: eager PyTorch as users write it, torch.compile, the fused backends, and a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from senet_kernels import (
    Explanation,
    FusedSEBlock,
    channel_scale,
    dispatch,
    explain,
    squeeze,
    squeeze_excite,
    trust,
)
from senet_kernels._libraries import load

from .problem import BACKWARD, DTYPES, FORWARD, TRAINING, Problem
from .strategies import STRATEGIES, Strategy
from .workloads import Layer

Call = Callable[[int], Any]  # argument: which copy of the buffers to use

BASELINES = ("eager-conv", "eager-linear", "timm", "compile", "compile-max")
# Not in a default run on a CPU: one is eager-conv under another name, the other takes minutes.
GPU_BASELINES = ("timm", "compile-max")
FUSED = dispatch.KERNELS
# What runs where no kernel takes a call, and the oracle.
PLAIN = tuple(name for name in dispatch.NAMES if name not in FUSED)
LIMIT = "clone"
# The two halves of the op with library matrix products in between: the other strategy for layers
# whose weights outweigh their images.
COMPOSED = ("halves",)
IN_PLACE = "native-inplace"  # over its input, as inference may

# In place where the networks themselves do it (activation after fc1, the step after the block).
_ACTIVATION: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda t: t,
    "relu": lambda t: F.relu(t, inplace=True),
    "relu6": lambda t: F.relu6(t, inplace=True),
    "silu": lambda t: F.silu(t, inplace=True),
    "hardswish": lambda t: F.hardswish(t, inplace=True),
}
_GATE = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
_TIMM_NAMES = {"hardswish": "hard_swish", "hardsigmoid": "hard_sigmoid"}
_BEFORE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
}


_WEIGHTS = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}


def _fill(block: nn.Module, problem: Problem, *, linear: bool = False) -> None:
    """Give a block the layers of a problem: 1x1 convolutions as in timm, or linear ones."""
    case = problem.case
    for name, weight, bias in (("fc1", "w1", "b1"), ("fc2", "w2", "b2")):
        if weight in problem.weights:
            value = problem.weights[weight]
            rows, columns = value.shape
            unit = nn.Linear(columns, rows) if linear else nn.Conv2d(columns, rows, 1)
            unit = unit.to(value.device, DTYPES[case.dtype])
            with torch.no_grad():
                unit.weight.copy_(value.reshape(unit.weight.shape))
                unit.bias.copy_(problem.weights[bias])
            setattr(block, name, unit)
    if case.layout == "channels_last":  # what model.to(memory_format=...) does to the weights
        block.to(memory_format=torch.channels_last)


class _Block(nn.Module):
    """A block written out in PyTorch."""

    def __init__(self, problem: Problem, *, linear: bool = False) -> None:
        super().__init__()
        self.layer: Layer = problem.case.layer
        self.linear = linear
        _fill(self, problem, linear=linear)


class EagerSE(_Block):
    """timm's form: mean, fc1, act, fc2, gate, product; ``linear`` swaps the 1x1 convolutions."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        p = _BEFORE[layer.before](x)
        z = p.mean((2, 3), keepdim=not self.linear)
        u = self.fc2(z if layer.hidden is None else _ACTIVATION[layer.activation](self.fc1(z)))
        if self.linear:
            u = u[:, :, None, None]
        if layer.shift:
            scale, shift = u.chunk(2, dim=1)
            y = p * _GATE[layer.gate](scale) + shift
        else:
            y = p * _GATE[layer.gate](u)
        if residual is not None:
            y += residual
        return _ACTIVATION[layer.after](y)


class FusedSE(FusedSEBlock):
    """The same parameters in a ``FusedSEBlock``, as users have it, on one backend."""

    def __init__(self, problem: Problem, backend: str, strategy: Strategy | None = None) -> None:
        layer = problem.case.layer
        super().__init__(
            layer.channels,
            hidden=layer.hidden,
            activation=layer.activation,
            gate=layer.gate,
            before=layer.before,
            after=layer.after,
            scale_and_shift=layer.shift,
            excitation="single" if layer.hidden is None else "two",
            backend=backend,
        )
        self.strategy = strategy  # in force during a step, see make_call
        _fill(self, problem)


class InPlaceSE(_Block):
    """``squeeze_excite`` over its input; forward alone.

    The first call, which is checked, is of the problem's weights. Later ones go over one copy of x
    again and again, and there every gate is 1: x stays what it is.

    Raises:
        ValueError: there are steps around the block, which would not leave x as it is.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if self.layer.before or self.layer.after or self.layer.add:
            raise ValueError("in place: for blocks without steps around them")
        self.own: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.own is not None:
            return self._over(self.own)
        y = self._over(x.clone())
        self.own = x.clone()
        self.fc2.weight.zero_()
        self.fc2.bias.zero_()[: self.layer.channels] = 30
        return y

    def _over(self, x: Tensor) -> Tensor:
        layer, fc1, fc2 = self.layer, getattr(self, "fc1", None), self.fc2
        w1, b1 = (None, None) if fc1 is None else (fc1.weight, fc1.bias)
        return squeeze_excite(
            x, w1, b1, fc2.weight, fc2.bias, activation=layer.activation, gate=layer.gate,
            inplace=True, backend="native",
        )  # fmt: skip


class Halves(_Block):
    """``squeeze``, torch's linear layers, ``channel_scale``: by the backend that no call names."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, linear=True)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        z = squeeze(x, before=layer.before)
        u = self.fc2(z if layer.hidden is None else _ACTIVATION[layer.activation](self.fc1(z)))
        return channel_scale(
            x, u, gate=layer.gate, before=layer.before, after=layer.after, residual=residual
        )


class TimmBlock(_Block):
    """timm's own ``SEModule`` on the same parameters, the steps around it in eager PyTorch.

    Raises:
        ImportError: timm is not installed.
        ValueError: the layer is of a form that ``SEModule`` does not have.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        layer = self.layer
        if layer.hidden is None or layer.shift:
            raise ValueError("timm's SEModule has two layers, and no shift")
        self.se = load("timm.layers").SEModule(
            layer.channels,
            rd_channels=layer.hidden,
            act_layer=_TIMM_NAMES.get(layer.activation or "identity", layer.activation),
            gate_layer=_TIMM_NAMES.get(layer.gate, layer.gate),
        )
        self.se.fc1, self.se.fc2 = self.fc1, self.fc2

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        layer = self.layer
        y: Tensor = self.se(_BEFORE[layer.before](x))
        if residual is not None:
            y += residual
        return _ACTIVATION[layer.after](y)


class Clone(_Block):
    """The limit: one read and one write of x, in its own layout."""

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return x.clone()


@dataclass(frozen=True)
class Provider:
    """A named way to compute a layer."""

    name: str
    build: Callable[[Problem], nn.Module]

    @property
    def fused(self) -> bool:
        return self.name not in (*BASELINES, *COMPOSED, LIMIT)


def make_provider(name: str) -> Provider:
    """Provider by name; any name that is no baseline is a backend of senet_kernels."""
    if name == "eager-conv":
        return Provider(name, EagerSE)
    if name == "eager-linear":
        return Provider(name, lambda problem: EagerSE(problem, linear=True))
    if name == "timm":
        return Provider(name, TimmBlock)
    if name == "compile":
        return Provider(name, lambda problem: torch.compile(EagerSE(problem), dynamic=False))
    if name == "compile-max":
        # CUDA graphs are for the timer to make, of every provider alike
        mode = "max-autotune-no-cudagraphs"
        return Provider(
            name, lambda problem: torch.compile(EagerSE(problem), dynamic=False, mode=mode)
        )
    if name == LIMIT:
        return Provider(name, Clone)
    if name in COMPOSED:
        return Provider(name, Halves)
    if name == IN_PLACE:
        return Provider(name, InPlaceSE)
    backend, strategy = STRATEGIES.get(name, (name, None))
    return Provider(name, lambda problem: FusedSE(problem, backend, strategy))


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a fused backend cannot run here, found by one tiny call; None where it can."""
    if name in (*BASELINES, *COMPOSED):
        return None
    backend, strategy = STRATEGIES.get(name, ("native" if name == IN_PLACE else name, None))
    if strategy is not None and backend == "native" and device.type != "cuda":
        return "a plan of the CUDA kernels"
    try:
        import senet_kernels

        x = torch.ones(1, 16, 4, 4, device=device)
        w = torch.ones(16, 16, device=device)
        b = torch.ones(16, device=device)
        senet_kernels.squeeze_excite(x, w, b, w, b, backend=backend)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever a missing compiler, driver or library raises
        return one_line(error)
    return None


def backend_to_ask_for(
    device: torch.device, why_not: Callable[[str], str | None] | None = None
) -> str:
    """The backend of calls that name none: what was asked for, else the automatic choice; unless
    that could be the fallback: on a device whose backends run only when asked for by name, or once
    they have been proven. ``why_not``: in place of :func:`unavailable`."""
    why_not = why_not or partial(unavailable, device=device)
    requested = dispatch.requested_backend(None)
    if requested == "auto":
        for name in FUSED:
            if why_not(name) is None:
                by_name = dispatch.only_by_name(name, device.type) is not None
                by_name = by_name or trust.is_asked(name, device.type)
                return name if by_name else requested
    return requested


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shorten(f"{type(error).__name__}: {lines[0] if lines else ''}", 240)


def _explain(problem: Problem, backend: str | None) -> Explanation:
    layer, weights = problem.case.layer, problem.weights
    return explain(
        problem.x[0],
        weights.get("w1"),
        weights.get("b1"),
        weights["w2"],
        weights["b2"],
        activation=layer.activation,
        gate=layer.gate,
        before=layer.before,
        after=layer.after,
        residual=problem.residual[0],
        backend=backend,
    )


def chosen_backend(problem: Problem) -> str:
    """What senet_kernels picks by itself for this case, for the record."""
    try:
        return _explain(problem, None).backend
    except (TypeError, ValueError) as error:
        return one_line(error)


def plan_of(name: str, problem: Problem, mode: str) -> str | None:
    """How a fused backend says it cuts a pass; None where it says nothing, or runs both."""
    if name not in FUSED:
        return None
    notes = dict(note.partition(": ")[::2] for note in _explain(problem, name).notes)
    return notes.get(mode)


def make_call(module: nn.Module, problem: Problem, mode: str) -> Call:
    """A function of the buffer index that does one step of ``mode``.

    The caller sets the grad mode: forward runs under ``no_grad``.
    """
    block = getattr(module, "_orig_mod", module)  # torch.compile wraps
    call = _plain_call(module, block, problem, mode)
    strategy: Strategy | None = getattr(block, "strategy", None)
    if strategy is None:
        return call

    def forced(i: int) -> Any:
        with strategy():
            return call(i)

    return forced


def _plain_call(module: nn.Module, block: nn.Module, problem: Problem, mode: str) -> Call:
    residual = problem.residual
    if mode == FORWARD or isinstance(block, Clone):
        xs = problem.x
        return lambda i: module(xs[i], residual[i])

    leaves = [x.detach().requires_grad_() for x in problem.x]
    added = [None if r is None else r.detach().requires_grad_() for r in residual]
    if mode not in (BACKWARD, TRAINING):
        return lambda i: module(leaves[i], added[i])

    weights = list(block.parameters())
    dy = problem.dy
    inputs = [
        [x, *weights] if r is None else [x, r, *weights] for x, r in zip(leaves, added, strict=True)
    ]

    def step(i: int) -> tuple[Tensor, ...]:
        y = module(leaves[i], added[i])
        return (y, *torch.autograd.grad(y, inputs[i], dy[i]))

    graphs: list[Tensor] = []
    built_on: Any = None

    def backward(i: int) -> tuple[Tensor, ...]:
        # Autograd runs a node on the stream of its forward, and a capture follows only its own: so
        # a graph per stream, of which the last is kept (a timer keeps to one stream).
        nonlocal built_on
        stream = _stream_of(leaves[i])
        if built_on != stream:
            graphs.clear()
            graphs.extend(module(x, r) for x, r in zip(leaves, added, strict=True))
            built_on = stream
        return torch.autograd.grad(graphs[i], inputs[i], dy[i], retain_graph=True)

    return backward if mode == BACKWARD else step


def _stream_of(tensor: Tensor) -> Any:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else "cpu"


def results(module: nn.Module, problem: Problem, mode: str = TRAINING) -> dict[str, Tensor]:
    """Gradients by the oracle's names on the first buffers; of a training step the output too."""
    block = getattr(module, "_orig_mod", module)
    names = ["y", "x", *(["residual"] if problem.residual[0] is not None else [])]
    names += [_WEIGHTS[name] for name, _ in block.named_parameters()]
    call = make_call(module, problem, mode)
    if mode == BACKWARD:
        call(0)  # the second time shows what the first overwrote
        names = names[1:]
    return dict(zip(names, call(0), strict=True))
