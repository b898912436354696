"""A module against its rewritten graph: outputs, gradients, buffers, inputs, attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from senet_kernels.fuse import GraphReport, compile_backend
from senet_kernels.fuse.rewrite import rewrite_module

State = dict[str, Tensor]


def rewritten(
    module: nn.Module, reports: list[GraphReport], *, norm_in_training: bool = False, **how: Any
) -> Callable[..., Any]:
    """The module's graphs, rewritten and run as they are; the reports are added to the list.

    With ``norm_in_training`` they are those that Inductor is given.
    """
    if norm_in_training:

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            reports.append(rewrite_module(graph, norm_in_training=True))
            return graph.forward

        return torch.compile(module, backend=backend, **how)
    options = {"inductor": False, "report": reports.append}
    return torch.compile(module, backend=compile_backend, options=options, **how)


def observe(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> State | Exception:
    """All that a call and its backward pass leave behind."""
    torch.manual_seed(1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    given = [leaf * 1.0 for leaf in leaves]
    try:
        outputs = list(tensors(call(*given)))
        loss = sum(
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
            for y in outputs if y.requires_grad
        )  # fmt: skip
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    except RuntimeError as error:
        return error
    state = {f"output {i}": y for i, y in enumerate(outputs)}
    state |= {f"input {i}": x for i, x in enumerate(given)}
    state |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
    state |= {f"state {k}": v for k, v in module.state_dict().items()}
    for name, value in vars(module).items():
        if not name.startswith("_"):
            items = value if isinstance(value, (list, tuple)) else [value]
            state |= {
                f"attribute {name} {i}": torch.as_tensor(v)
                for i, v in enumerate(items) if isinstance(v, (Tensor, int, float))
            }  # fmt: skip
    return {k: v.detach().clone() for k, v in state.items()}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)


def difference(a: State, b: State) -> tuple[float, str]:
    """The largest difference, relative to the largest number of its tensor, and where it is."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    worst = (0.0, "")
    for name, p in a.items():
        q = b[name]
        assert p.shape == q.shape, name
        assert p.dtype == q.dtype, (name, p.dtype, q.dtype)
        if p.numel() and p.is_floating_point():
            scale = p.double().abs().max().item() + 1e-4  # a gradient may be 0 but for rounding
            worst = max(worst, ((p.double() - q.double()).abs().max().item() / scale, name))
        elif not torch.equal(p, q):
            worst = (float("inf"), name)
    return worst


def compare(
    module: nn.Module, *inputs: Tensor, tolerance: float, may_raise: bool = False, **how: Any
) -> GraphReport:
    """Both, on copies; returns the report.

    Where the module's own call raises, the rewritten one raises too, unless ``may_raise``.
    """
    torch._dynamo.reset()
    plain, other = copy.deepcopy(module), copy.deepcopy(module)
    reports: list[GraphReport] = []
    expected = observe(plain, plain, *inputs)
    got = observe(rewritten(other, reports, **how), other, *inputs)
    if isinstance(expected, Exception):
        assert may_raise or isinstance(got, Exception)
    elif isinstance(got, Exception):
        raise got
    else:
        error, where = difference(expected, got)
        assert error <= tolerance, (where, error)
    return sum(reports, GraphReport())
