"""Squeeze-and-excitations of a graph become calls of the public functions."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from senet_kernels import api, autograd, public_ops

from .find import Match, find, is_near
from .flow import Flow, dtype_of, tensor_of
from .grow import grow, take_casts, why_not, why_rounded
from .nodes import Mismatch
from .reader import LAYERS
from .report import Finding, GraphReport, place_of


class Door(NamedTuple):
    """What a graph is rewritten for."""

    is_graph: bool  # it is kept: calls of the public op, for whatever backend there is then
    steps: bool  # whether residual and activations join


COMPILE = Door(False, True)


def rewrite_module(
    module: GraphModule, *, norm_in_training: bool, door: Door = COMPILE
) -> GraphReport:
    """:func:`rewrite` for a graph and those inside it: bodies of checkpoints and of other
    higher-order operators."""
    report = GraphReport()
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            found = rewrite(inner.graph, norm_in_training=norm_in_training, door=door)
            if found.fused:
                inner.graph.lint()
                inner.recompile()
            report += found
    return report


def rewrite(graph: Graph, *, norm_in_training: bool, door: Door = COMPILE) -> GraphReport:
    """Put one call in the place of each squeeze-and-excitation for which there is a kernel.

    Args:
        graph: of PyTorch calls before autograd, with fake tensors as ``example_value``, as Dynamo
            makes it; where nothing is fused it stays as it was.
        norm_in_training: whether a BatchNorm that computes its statistics joins.
        door: what the calls are to be, and what joins them.
    """
    flow = Flow(graph)
    fused: list[Finding] = []
    refused: list[Finding] = []
    for node in flow.products():
        if flow.op(node) is None:  # part of one that was fused
            continue
        place = place_of(node)
        try:
            match = _match(flow, node, norm_in_training, door)
        except Mismatch as mismatch:
            if is_near(flow, node):
                refused.append(Finding(node.name, place, str(mismatch)))
            continue
        _replace(flow, match, door)
        fused.append(Finding(node.name, place, _describe(match)))
    if not fused:
        flow.restore()
    return GraphReport(tuple(fused), tuple(refused))


def _match(flow: Flow, node: Node, norm_in_training: bool, door: Door) -> Match:
    match = find(flow, node)
    take_casts(flow, match)
    reason = why_not(flow, match) or why_rounded(flow, match)
    if reason is not None:
        raise Mismatch(reason)
    grow(flow, match, norm_in_training, steps=door.steps, affine=not door.is_graph)
    reason = None if door.is_graph else _why_no_kernel(flow, match)
    if reason is not None:
        raise Mismatch(reason)
    return match


def _describe(match: Match) -> str:
    layers = "one layer" if match.w1 is None else f"two layers, {match.activation}"
    shift = ["shift"] if match.shift else []
    return ", ".join([f"squeeze_excite: {layers}, gate {match.gate}", *shift, *match.absorbed])


@contextmanager
def _as_there(flow: Flow, node: Node) -> Iterator[None]:
    """Under the autocast that a node runs under."""
    with ExitStack() as stack:
        for device, dtype, enabled in flow.context[node][0]:
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield


def _why_no_kernel(flow: Flow, match: Match) -> str | None:
    """Why the operation would not run fused, asked with fake tensors; None where it would."""
    x = tensor_of(match.x)
    w1, b1, w2, b2, residual = (
        None if n is None else tensor_of(n)
        for n in (match.w1, match.b1, match.w2, match.b2, match.residual)
    )
    assert x is not None
    assert w2 is not None
    end = tensor_of(match.end)
    assert end is not None
    affine = None
    if match.norm is not None or match.affine is not None:
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        with _fake_mode(x):
            affine = (x.new_empty(x.shape[1], dtype=wide), x.new_empty(x.shape[1], dtype=wide))
    try:
        with torch.no_grad(), _as_there(flow, match.end), _fake_mode(x):
            explanation = api.explain(
                x, w1, b1, w2, b2, activation=match.activation, gate=match.gate,
                before=match.before, before_affine=affine, after=match.after, residual=residual,
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        return f"not a call that squeeze_excite takes: {error}"
    if explanation.backend == "fallback":
        reasons = [f"{name}: {reason}" for name, reason in explanation.passed_over]
        return "no kernel takes it here (" + "; ".join(reasons or ["by choice"]) + ")"
    return None


def _fake_mode(x: Tensor) -> Any:
    mode = getattr(x, "fake_mode", None)
    return ExitStack() if mode is None else mode


def norm_affine(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A BatchNorm as ``a x + b``, a and b ``[C]``; in training it updates its statistics.

    Arguments are those of ``torch.nn.functional.batch_norm``.
    """
    if training or running_mean is None or running_var is None:
        F._verify_batch_size(x.size())  # type: ignore[attr-defined]
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            with torch.no_grad():  # through .data: a BatchNorm makes no new version of them either
                running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
                unbiased = var * (count / (count - 1))
                running_var.data.lerp_(unbiased.to(running_var.dtype), momentum)
    else:
        mean, var = running_mean, running_var
    a = torch.rsqrt(var + eps)
    if weight is not None:
        a = a * weight
    b = -mean * a if bias is None else bias - mean * a
    return a, b


def excite_with_kept_output(*args: Any, **options: Any) -> Tensor:
    """``squeeze_excite`` where another operator keeps its output for backward in any case."""
    with autograd.output_is_kept():
        return api.squeeze_excite(*args, **options)


def _is_kept(flow: Flow, y: Node) -> bool:
    """Whether a layer that reads y keeps it, for the gradient of its weight."""
    for user in y.users:
        op = flow.op(user)
        if op is None or op.name not in LAYERS or op.get("input") is not y:
            continue
        weight = op.get("weight")
        given = tensor_of(weight) if isinstance(weight, Node) else None
        # Under autocast a layer keeps a copy in its own dtype.
        if given is not None and given.requires_grad and dtype_of(user) == dtype_of(y):
            return True
    return False


def _replace(flow: Flow, match: Match, door: Door) -> None:
    graph, nodes = flow.graph, match.nodes
    options: dict[str, Any] = {"activation": match.activation, "gate": match.gate}
    for name in ("before", "after", "residual"):
        if getattr(match, name) is not None:
            options[name] = getattr(match, name)
    if match.norm is not None:
        options["before_affine"] = _insert_norm(flow, match.norm)
    with graph.inserting_before(match.end):
        if match.affine is not None:
            pair = [graph.call_method("reshape", (n, -1)) for n in match.affine]
            options["before_affine"] = tuple(pair)
            for node in pair:
                flow.add(node, match.end)
        arguments = (match.x, match.w1, match.b1, match.w2, match.b2)
        if door.is_graph:
            call = graph.call_function(public_ops.OPS["squeeze_excite"], arguments, options)
        else:
            kept = match.after == "relu" and _is_kept(flow, match.end)
            target = excite_with_kept_output if kept else api.squeeze_excite
            call = graph.call_function(target, arguments, options)
    call.meta = dict(match.end.meta)
    flow.stand_in(match.end, call)
    for node in sorted(nodes, key=flow.order.__getitem__, reverse=True):
        graph.erase_node(node)
        flow.forget(node)


def _insert_norm(flow: Flow, norm: Node) -> tuple[Node, Node]:
    op = flow.op(norm)
    assert op is not None
    given = (
        op.get("input"), op.get("running_mean"), op.get("running_var"), op.get("weight"),
        op.get("bias"), op.get("training", False), op.get("momentum", 0.1), op.get("eps", 1e-5),
    )  # fmt: skip
    with flow.graph.inserting_before(norm):
        pair = flow.graph.call_function(norm_affine, given)
        a, b = (flow.graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
    for node in (pair, a, b):
        flow.add(node, norm)
    return a, b
