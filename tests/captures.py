"""Networks with fused blocks beside the same networks written out, and the ways to capture them.

A ``Case`` makes two modules with the same parameters under the same names: ``fused`` calls the
package, ``plain`` the definition in :mod:`oracle` (or the unconverted original). A ``Capture``
turns the fused one into what is then trained.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import oracle
from models import library
from problems import Spec, build
from senet_kernels import FusedSEBlock, channel_scale, fuse_se_blocks, squeeze, squeeze_excite

IMAGE_CHANNELS = 3
#: Positions of the inputs, and the batch: no two extents are the same, as symbolic tracing takes
#: equal ones for one.
SPACE = {1: (12,), 2: (6, 7), 3: (6, 7, 2)}
BATCH, OTHER_BATCH = 5, 9
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Net(nn.Module):
    """A convolution, a block with parameters, and a convolution: gradients of what lies before
    the block, in it and behind it."""

    def __init__(self, block: nn.Module, channels: int, dims: int = 2) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[dims]
        self.stem = convolution(IMAGE_CHANNELS, channels, 3, padding=1)
        self.block = block
        self.head = convolution(channels, 4, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        y = self.block(x) if lengths is None else self.block(x, lengths)
        return self.head(y)


class Call(nn.Module):
    """One call of ``squeeze_excite`` (or ``oracle.block``), its tensors being parameters. The
    residual is computed from x."""

    def __init__(self, spec: Spec, function: Callable[..., Tensor]) -> None:
        super().__init__()
        problem = build(replace(spec, dtype=torch.float64))
        self.names = [n for n in problem.tensors if n not in ("x", "residual")]
        for name in self.names:
            value = problem.tensors[name]
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.function, self.options = function, problem.options
        self.with_residual = spec.residual is not None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {n: getattr(self, n) for n in self.names}
        affine = (given.pop("affine_scale"), given.pop("affine_shift"))
        return self.function(
            x, given.pop("w1"), given.pop("b1"), given.pop("w2"), given.pop("b2"),
            before_affine=None if affine[0] is None else affine, lengths=lengths,
            residual=torch.sin(x) if self.with_residual else None, **given, **self.options,
        )  # fmt: skip


class Block(nn.Module):
    """A ``FusedSEBlock``, or its definition computed from its parameters."""

    def __init__(self, block: FusedSEBlock, residual: bool, plain: bool) -> None:
        super().__init__()
        self.inner, self.residual, self.plain = block, residual, plain

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.sin(x) if self.residual else None
        if not self.plain:
            return self.inner(x, residual=residual)
        own = self.inner
        steps = {"before": own.before, "after": own.after, "residual": residual}
        if own.fc2 is None:
            assert own.alpha is not None
            assert own.beta is not None
            u = torch.cat([own.alpha, own.beta]).expand(len(x), -1)
            return oracle.channel_scale(x, u, gate="identity", **steps)
        w1 = None if own.fc1 is None else own.fc1.weight.flatten(1)
        b1 = None if own.fc1 is None else own.fc1.bias
        w2 = w1.t() if own.excitation == "tied" else own.fc2.weight.flatten(1)
        return oracle.block(
            x, w1, b1, w2, own.fc2.bias, activation=own.activation, gate=own.gate, alpha=own.alpha,
            beta=own.beta, **steps,
        )  # fmt: skip


class HandWritten(nn.Module):
    """Squeeze-and-excitation as people write it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3))
        u = self.fc2(torch.relu(self.fc1(z)))
        return x * torch.sigmoid(u)[:, :, None, None]


class Halves(nn.Module):
    """Efficient channel attention between the two halves, with every step they have."""

    def __init__(self, channels: int, plain: bool, shift: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2 if shift else 1, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, channels))
        self.alpha = nn.Parameter(torch.linspace(-0.2, 0.4, channels))
        self.beta = nn.Parameter(torch.linspace(0.8, 1.2, channels))
        self.plain = plain

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        steps: dict[str, Any] = {"before": "silu", "before_affine": (self.scale, self.shift)}
        halves = (oracle.squeeze, oracle.channel_scale) if self.plain else (squeeze, channel_scale)
        z = halves[0](x, lengths=lengths, **steps)
        u = self.conv(z[:, None]).flatten(1)
        return halves[1](x, u, gate="tanh", after="gelu", residual=torch.sin(x),
                         alpha=self.alpha, beta=self.beta, **steps)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network by name: ``make(plain)`` builds the fused one, or the one written out."""

    name: str
    make: Callable[[bool], nn.Module]
    channels: int = 8
    dims: int = 2
    lengths: bool = False

    def net(self, plain: bool = False) -> nn.Module:
        """In float64 and training mode, its parameters those of the other one, and so large that
        no unit is dead."""
        net = Net(self.make(plain), self.channels, self.dims).double()
        rng = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5, generator=rng)
        return net

    def inputs(self, batch: int = BATCH, larger: int = 0) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(batch)
        space = tuple(extent + larger for extent in SPACE[self.dims])
        x = torch.randn(batch, IMAGE_CHANNELS, *space, generator=rng, dtype=torch.float64)
        if not self.lengths:
            return (x,)
        positions = x[0, 0].numel()
        return x, torch.randint(1, positions + 1, (batch,), generator=rng)

    def __str__(self) -> str:
        return self.name


def _call(spec: Spec) -> Case:
    def make(plain: bool) -> nn.Module:
        return Call(spec, oracle.block if plain else squeeze_excite)

    dims = len(spec.shape) - 2
    return Case(f"call-{spec}", make, spec.shape[1], dims, spec.lengths)


def _block(name: str, residual: bool = False, **options: Any) -> Case:
    def make(plain: bool) -> nn.Module:
        return Block(FusedSEBlock(8, **{"reduction": 2, **options}), residual, plain)

    return Case(f"FusedSEBlock-{name}", make)


def _converted(name: str, original: Callable[[], nn.Module], **how: Any) -> Case:
    def make(plain: bool) -> nn.Module:
        model = original()
        if not plain:
            report = fuse_se_blocks(model, strict=True, **how)
            assert report.replaced
        return model

    return Case(f"converted-{name}", make)


_C8 = (BATCH, 8, *SPACE[2])
_OPTIONS = tuple(_call(spec) for spec in (
    Spec(_C8, 4),
    Spec(_C8, 4, residual="contiguous", after="relu", weights="conv"),
    Spec(_C8, 4, before="silu", affine=True, gate="hardsigmoid"),
    Spec(_C8, 4, weighted=True, gate="hardsigmoid_02", activation="silu"),
    Spec(_C8, 4, shift=True, residual="contiguous", after="mish", gate="tanh"),
    Spec(_C8, None, bias=False, gate="hardsigmoid", before="relu"),
    Spec(_C8, 4, lengths=True, weighted=True, affine=True, before="hardswish"),
    Spec((BATCH, 8, *SPACE[1]), 4, lengths=True, shift=True, after="gelu_tanh"),
    Spec((BATCH, 8, *SPACE[3]), 4, residual="contiguous", weighted=True, before="leaky_relu"),
))  # fmt: skip
_BLOCKS = (
    _block("plain"),
    _block("steps", residual=True, before="silu", after="relu", gate="hardsigmoid"),
    _block("shift", scale_and_shift=True, weighted_sum=True),
    _block("single", excitation="single", bias=False),
    _block("tied", excitation="tied", activation="silu"),
    _block("constant", excitation="constant", residual=True, after="relu"),
)
_CONVERTED = (
    _converted("hand-written", lambda: HandWritten(8, 4)),
    _converted("halves", lambda: library("timm").layers.EcaModule(8, kernel_size=3)),
    _converted("neighbours", lambda: nn.Sequential(nn.SiLU(), HandWritten(8, 4)), neighbours=True),
)
_HALVES = (
    Case("halves", lambda plain: Halves(8, plain)),
    Case("halves-shift", lambda plain: Halves(8, plain, shift=True)),
    Case("halves-lengths", lambda plain: Halves(8, plain), lengths=True),
)
CASES = (*_OPTIONS, *_BLOCKS, *_CONVERTED, *_HALVES)
#: One of each kind, for captures that take long.
FEW = (_OPTIONS[4], _BLOCKS[1], _CONVERTED[0], _CONVERTED[1], _HALVES[0])


# ---- gradients ----

#: A model that was captured, as a function of its inputs, and its parameters by the model's names.
Captured = tuple[Callable[..., Tensor], dict[str, Tensor]]


def own(module: nn.Module) -> Captured:
    """A module and its parameters."""
    return module, dict(module.named_parameters())


def gradients(captured: Captured, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """``y``, and the gradients of a sum of squares with respect to x and every parameter."""
    function, parameters = captured
    for parameter in parameters.values():
        parameter.grad = None
    x = inputs[0].detach().requires_grad_()
    y = function(x, *inputs[1:])
    y.square().sum().backward()
    found: dict[str, Tensor | None] = {n: p.grad for n, p in parameters.items()}
    return {"y": y.detach(), "x": x.grad, **found}


def penalties(captured: Captured, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    """The same of a loss that holds the square of the gradient with respect to x."""
    function, parameters = captured
    for parameter in parameters.values():
        parameter.grad = None
    x = inputs[0].detach().requires_grad_()
    y = function(x, *inputs[1:])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (y.sum() + dx.square().sum()).backward()
    found: dict[str, Tensor | None] = {n: p.grad for n, p in parameters.items()}
    return {"y": y.detach(), "x": x.grad, "dx": dx.detach(), **found}


def assert_same(got: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> None:
    """Every gradient is there and equal to 1e-10 of its largest element."""
    assert got.keys() == right.keys()
    missing = [name for name, value in right.items() if value is not None and got[name] is None]
    assert missing == [], f"no gradient: {missing}"
    for name, value in right.items():
        if value is not None:
            atol = 1e-10 * max(1.0, oracle.largest(value))
            torch.testing.assert_close(
                got[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- captures ----


def dynamic_shapes(case: Case) -> tuple[Any, ...]:
    """Batch and every extent of space may change."""
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = {2 + i: torch.export.Dim(f"size{i}", min=2, max=64) for i in range(case.dims)}
    return ({0: batch, **sizes}, {0: batch})[: 1 + case.lengths]


def export(
    case: Case, *, strict: bool = False, dynamic: bool = False, net: nn.Module | None = None
) -> torch.export.ExportedProgram:
    """The case's fused network, or ``net``, by ``torch.export``."""
    return torch.export.export(
        case.net() if net is None else net, case.inputs(),
        dynamic_shapes=dynamic_shapes(case) if dynamic else None, strict=strict,
    )  # fmt: skip


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def by_make_fx(case: Case, net: nn.Module | None = None, **how: Any) -> Captured:
    """The forward of the case's fused network, or of ``net``, as a graph of operators, the
    parameters being arguments."""
    net = case.net() if net is None else net
    names, values = zip(*net.named_parameters(), strict=True)

    def forward(parameters: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        result: Tensor = torch.func.functional_call(net, given, inputs)
        return result

    graph = make_fx(forward, **how)(values, *case.inputs())
    assert operators(graph) <= PUBLIC
    parameters = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    return (lambda *inputs: graph(tuple(parameters.values()), *inputs)), parameters


def checkpointed(module: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Recomputed in backward."""

    def call(*inputs: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)
        return result

    return call


class CheckpointInside(nn.Module):
    """A network that recomputes its block in backward, as it is captured."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y = self.net.stem(x)
        y = torch.utils.checkpoint.checkpoint(self.net.block, y, use_reentrant=False)
        result: Tensor = self.net.head(y)
        return result


def operators(graph: torch.fx.GraphModule) -> set[str]:
    """Names of this package's operators in a graph and in those inside it."""
    return {
        node.target.name().split("::")[1]
        for module in graph.modules() if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "namespace", None) == "senet_kernels"
    }  # fmt: skip


#: What a captured graph may call.
PUBLIC = {"squeeze_excite", "squeeze", "channel_scale"}
