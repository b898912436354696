"""The neighbours that a squeeze-and-excitation takes in: residual and activation after it,
activation and BatchNorm (or another affine step per channel) before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.fx import Node

from senet_kernels.pointwise import ACTIVATIONS

from .find import Match
from .flow import Flow, dtype_of, shape_of, tensor_of
from .nodes import Mismatch, is_cast, is_idle, is_number, known_equal, same_kind, words
from .reader import Reader
from .spelling import CASTS


def grow(
    flow: Flow, match: Match, norm_in_training: bool, *, steps: bool = True, affine: bool = True
) -> None:
    """Take in what may be taken in, one step after the other: residual and activations if
    ``steps``, a BatchNorm or other affine step if ``affine``.

    ``norm_in_training`` says whether a BatchNorm that computes its statistics is taken in.
    """
    if not steps:
        return
    for step in (_take_residual, _take_after, _take_before):
        _attempt(flow, match, step)
    if not affine:
        return
    _attempt(flow, match, partial(_take_norm, in_training=norm_in_training))
    if match.norm is None:
        _attempt(flow, match, _take_affine)


def take_residual(flow: Flow, match: Match) -> None:
    """Take in the sum that follows, alone."""
    _attempt(flow, match, _take_residual)


def take_casts(flow: Flow, match: Match) -> None:
    """Take in what leaves x and the output as they are: casts to the dtype that they have, products
    by 1, and casts of x to float32 and of the output back."""
    _attempt(flow, match, _take_casts)


def _take_casts(flow: Flow, match: Match) -> str:
    _take_idle(flow, match)
    end, cast = _only_user(match.end), flow.op(match.x)
    op = flow.op(end)
    if end is not None and op is not None and is_cast(end, op):
        widened = cast is not None and is_cast(match.x, cast) and _is_within(match, match.x)
        source = cast.get("input") if cast is not None and widened else match.x
        if same_kind(source, end):
            match.inner.append(match.end)
            match.end = end
            if source is not match.x:
                _set_x(match, source)
            _take_idle(flow, match)
    return ""


def _take_idle(flow: Flow, match: Match) -> None:
    while (user := _only_user(match.end)) is not None:
        op = flow.op(user)
        if op is None or not is_idle(user, op):
            break
        match.inner.append(match.end)
        match.end = user
    while (op := flow.op(match.x)) is not None and is_idle(match.x, op):
        if not _is_within(match, match.x):
            break
        _set_x(match, op.get("input"))


def _is_within(match: Match, node: Node) -> bool:
    """Whether nothing but the match reads a node."""
    nodes = match.nodes
    return all(user in nodes for user in node.users)


def _set_x(match: Match, source: Node) -> None:
    """Let what x was computed of be x."""
    match.residual = source if match.residual is match.x else match.residual
    match.inner.append(match.x)
    match.x = source


def why_rounded(flow: Flow, match: Match) -> str | None:
    """Why the kernels, which compute in float32 at least and round the output once, would not give
    what a match gives; None where they do so, or where it rounds more often."""
    x, end = tensor_of(match.x), tensor_of(match.end)
    assert x is not None
    assert end is not None
    for node in sorted(match.nodes, key=flow.order.__getitem__):
        op = flow.op(node)
        source = None if op is None else op.get("input")
        if op is None or not isinstance(source, Node) or op.name not in (*CASTS, "mean", "sum"):
            continue
        if not same_kind(node, source) and (
            {dtype_of(node), dtype_of(source)} != {x.dtype, torch.float32}
        ):
            return f"{words(node)} is of {dtype_of(node)}, x of {x.dtype}"
    if x.dtype != end.dtype:
        return f"{words(match.end)} is of {end.dtype}, x of {x.dtype}"
    return None


def _attempt(flow: Flow, match: Match, step: Callable[[Flow, Match], str | None]) -> None:
    """One step; undone where it cannot be."""
    saved = dict(vars(match))
    saved["inner"], saved["absorbed"] = list(match.inner), list(match.absorbed)
    try:
        taken = step(flow, match)
    except Mismatch:
        taken = None
    if taken is None or not _may_stay(flow, match):
        vars(match).update(saved)
    elif taken:
        match.absorbed.append(taken)


def _may_stay(flow: Flow, match: Match) -> bool:
    """Whether a grown match may still be replaced as a whole."""
    nodes = match.nodes
    return (
        all(flow.context[n] == flow.context[match.end] for n in nodes)
        and all(u in nodes for n in match.inner for u in n.users)
        and why_not(flow, match) is None
    )


def why_not(flow: Flow, match: Match) -> str | None:
    """Why the nodes of a match cannot give way to one call in the place of its end."""
    nodes = match.nodes
    for node in nodes:
        reason = flow.why_write_stays(node, nodes)
        if reason is not None:
            return reason
    for node in nodes:
        for source in node.all_input_nodes:
            by = None if source in nodes else flow.writer(source, node, match.end, nodes)
            if by is not None:
                return f"{source} is overwritten, by {by}, between {node} and {match.end}"
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _take_residual(flow: Flow, match: Match) -> str | None:
    y, total = match.end, _only_user(match.end)
    op = flow.op(total)
    if total is None or op is None or op.name != "add" or op.get("alpha", 1) != 1:
        return None
    if match.residual is not None:
        return None
    a, b = op.get("input"), op.get("other")
    other = b if a is y else a
    if not isinstance(other, Node) or other is y or not known_equal(shape_of(other), shape_of(y)):
        return None
    if not same_kind(other, y) or not same_kind(total, y) or "out" in total.kwargs:
        return None
    if not flow.is_intact(y, total) or flow.is_opaque(other):
        return None
    match.residual, match.end = other, total
    match.inner.append(y)
    return "residual"


def _take_after(flow: Flow, match: Match) -> str | None:
    y, end = match.end, _only_user(match.end)
    if end is None:
        return None
    reader = Reader(flow, end)
    name = reader.function_name(end)
    op = flow.op(end)
    if name not in ACTIVATIONS or op is None or op.name == "mul":
        return None
    if reader.function_input(end) is not y or "out" in end.kwargs:
        return None
    match.after, match.end = name, end
    match.inner.append(y)
    return f"after {name}"


def _is_mine(match: Match, node: Node) -> bool:
    """Whether only the squeeze and the product read a node, as the tensor that is scaled."""
    return node is not match.residual and _is_within(match, node)


def _take_before(flow: Flow, match: Match) -> str | None:
    x = match.x
    reader = Reader(flow, x)
    name = reader.function_name(x)
    if name not in ACTIVATIONS or not _is_mine(match, x):
        return None
    source = reader.function_input(x)
    if not known_equal(shape_of(source), shape_of(x)) or not same_kind(source, x):
        return None
    match.before, match.x = name, source
    match.inner.extend(reader.inner)
    return f"before {name}"


def _take_norm(flow: Flow, match: Match, in_training: bool) -> str | None:
    """``in_training``: also one that computes its statistics."""
    norm = match.x
    op = flow.op(norm)
    if op is None or op.name != "batch_norm" or not _is_mine(match, norm):
        return None
    training = op.get("training", False)
    if not isinstance(training, bool) or not is_number(op.get("eps", 1e-5)):
        return None
    if (training or op.get("running_mean") is None) and not in_training:
        return None
    if training and not is_number(op.get("momentum", 0.1)):
        return None
    source = Reader(flow, norm).input_of(norm)
    if not isinstance(source, Node) or not same_kind(source, norm):
        return None
    tensor = tensor_of(norm)
    assert tensor is not None
    parameters = [op.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
    wide = {torch.float32} if tensor.dtype != torch.float64 else {torch.float64}
    given = {t.dtype for p in parameters if isinstance(p, Node) and (t := tensor_of(p)) is not None}
    autocast = flow.context[norm][0]
    # In half precision without autocast the pair would be rounded, which a BatchNorm is not.
    if not given <= wide or (tensor.dtype not in wide and not autocast):
        return None
    match.norm, match.x = norm, source
    match.inner.append(norm)
    return "BatchNorm"


def _take_affine(flow: Flow, match: Match) -> str | None:
    """``x * a + b`` with a and b of one number per channel: a frozen BatchNorm."""
    total = match.x
    op = flow.op(total)
    if op is None or op.name != "add" or op.get("alpha", 1) != 1 or not _is_mine(match, total):
        return None
    for product, shift in ((op.get("input"), op.get("other")), (op.get("other"), op.get("input"))):
        step = flow.op(product)
        if step is None or step.name != "mul" or set(product.users) != {total}:
            continue
        for source, scale in (
            (step.get("input"), step.get("other")), (step.get("other"), step.get("input")),
        ):  # fmt: skip
            if not all(isinstance(n, Node) for n in (source, scale, shift)):
                continue
            reader = Reader(flow, total)
            reader.input_of(total, "input" if product is op.get("input") else "other")
            if (
                known_equal(shape_of(source), shape_of(total))
                and _is_per_channel(scale, total)
                and _is_per_channel(shift, total)
                and all(same_kind(n, total) for n in (source, scale, shift))
            ):
                match.affine, match.x = (scale, shift), source
                match.inner.extend((total, product))
                return "affine"
    return None


def _is_per_channel(node: Node, like: Node) -> bool:
    shape, space = shape_of(node), len(shape_of(like)) - 2
    return known_equal(shape[-space - 1 :], (shape_of(like)[1], *(1,) * space)) and (
        len(shape) == space + 1 or known_equal(shape[:1], (1,))
    )
