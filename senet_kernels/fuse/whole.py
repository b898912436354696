"""Whether a captured forward is one squeeze-and-excitation and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .capture import Capture
from .chain import Steps, read_chain
from .find import Match, find
from .flow import Flow, shape_of
from .grow import take_casts, take_residual, why_not, why_rounded
from .halves import HalvesMatch, find_halves
from .nodes import Mismatch, known_equal, words
from .reader import Reader
from .spelling import CASTS, written


class Whole(NamedTuple):
    """A forward that is a squeeze-and-excitation, with x added where ``residual``."""

    match: Match | HalvesMatch
    residual: bool
    casts: bool  # to dtypes of its own choice, or it leaves autocast
    steps: Steps | None  # of the excitation, where it is not one or two layers


def read_whole(capture: Capture) -> Whole:
    """The squeeze-and-excitation that a forward is.

    Raises:
        Mismatch: it is none, or something more; the message says what.
    """
    graph = capture.module.graph
    casts = _leave_autocast(graph)
    flow = Flow(graph)
    steps: Steps | None = None
    match: Match | HalvesMatch
    try:
        match = _one_match(flow)
    except Mismatch as mismatch:
        found = _one_chain(flow)
        if found is None:
            _check_writes(flow, capture, set())
            raise mismatch
        match, steps, nodes = found
        _check_writes(flow, capture, nodes)
        residual = False
    else:
        _check_writes(flow, capture, set())
        residual = _complete(flow, match, capture.x)
        nodes = match.nodes
        _check_weights(match)
    _check_rest(graph, nodes)
    if match.x is not capture.x:
        raise Mismatch(f"it scales {words(match.x)}, not x itself")
    output = next(n for n in graph.nodes if n.op == "output")
    if output.args[0][0] is not match.end:
        raise Mismatch(f"it returns {words(output.args[0][0])}")
    if not _keeps_strides(capture):
        raise Mismatch("its output has other strides than channels-last input")
    casts = casts or any(
        op is not None and (op.name in CASTS or op.get("dtype") is not None)
        for op in map(flow.op, nodes)
    )
    if casts and steps is not None:
        raise Mismatch("it casts, around an excitation that is not one or two layers")
    return Whole(match, residual, casts, steps)


def _complete(flow: Flow, match: Match, x: Node) -> bool:
    """Take in what may stand around the operation; whether x is added."""
    reason = why_not(flow, match)
    if reason is not None:
        raise Mismatch(reason)
    take_casts(flow, match)
    take_residual(flow, match)
    take_casts(flow, match)
    match.w1, match.b1, match.w2, match.b2 = (
        _parameter(flow, match, node) for node in (match.w1, match.b1, match.w2, match.b2)
    )
    if match.residual not in (None, x):
        raise Mismatch(f"it adds {words(match.residual)}")
    reason = why_rounded(flow, match)
    if reason is not None:
        raise Mismatch(reason)
    return match.residual is not None


def _one_chain(flow: Flow) -> tuple[HalvesMatch, Steps, set[Node]] | None:
    """The one product whose gates come of a chain of children."""
    found = []
    for node in flow.products():
        try:
            match = find_halves(flow, node)
            steps, nodes = read_chain(flow, match)
        except Mismatch:
            continue
        if any(op is not None and op.name == "dropout" for op in map(flow.op, nodes)):
            continue  # in eval it is none, and the excitation may be one of layers
        nodes |= {*match.squeeze, *match.scale, match.end}
        if not any(flow.why_write_stays(n, nodes) for n in (*match.squeeze, *match.scale, node)):
            found.append((match, steps, nodes))
    return found[0] if len(found) == 1 else None


def _leave_autocast(graph: Graph) -> bool:
    """Take out the regions without autocast, which outside autocast are as the code around them;
    whether there were some."""
    entered = [
        node
        for node in graph.nodes
        if getattr(node.target, "__name__", "") == "_enter_autocast" and node.args[2] is False
    ]
    for node in entered:
        for user in list(node.users):
            graph.erase_node(user)
        graph.erase_node(node)
    return bool(entered)


def _one_match(flow: Flow) -> Match:
    read = [_match_or_reason(flow, node) for node in flow.products()]
    found = [match for match in read if isinstance(match, Match)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Mismatch(f"it consists of {len(found)} excitations")
    nothing = Mismatch("it multiplies no channels of [B, C, *spatial] by numbers")
    reasons = (reason for reason in read if isinstance(reason, Mismatch))
    deepest = max(reasons, key=lambda m: m.depth, default=nothing)
    raise deepest if deepest.depth else nothing


def _match_or_reason(flow: Flow, node: Node) -> Match | Mismatch:
    try:
        return find(flow, node)
    except Mismatch as mismatch:
        return mismatch


def _check_writes(flow: Flow, capture: Capture, called: set[Node]) -> None:
    """Refuse writes to what outlives the call, but by children that are called as ever."""
    for node in capture.module.graph.nodes:
        if node in called:
            continue
        for target in written(node, flow.op(node)):
            owner = flow.owner(target)
            if owner is not None:
                name = capture.tensors[owner][0] if owner in capture.tensors else owner.name
                name = "input" if owner is capture.x else name
                raise Mismatch(f"it overwrites its {name} ({_called(node)})")


def _called(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _check_weights(match: Match) -> None:
    for node in (match.w1, match.b1, match.w2, match.b2):
        if node is not None and node.op != "placeholder":
            raise Mismatch(f"a weight of it is computed: {words(node)}")


def _check_rest(graph: Graph, nodes: set[Node]) -> None:
    rest = [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
        and node not in nodes
        and not _is_size(node)
    ]
    if rest:
        what = ", ".join(dict.fromkeys(map(_called, rest)))
        raise Mismatch(f"it is squeeze-and-excitation and more: {what}")


def _parameter(flow: Flow, match: Match, node: Node | None) -> Node | None:
    """A weight or bias past slices that take all of it, and views that keep its rows."""
    if node is None:
        return None
    reader = Reader(flow, match.end)
    source: Node = reader.through_views(node)
    if not known_equal(shape_of(source)[:2], shape_of(node)[:2]):
        return node
    match.inner.extend(n for n in reader.inner if all(u in match.nodes for u in n.users))
    return source


def _is_size(node: Node) -> bool:
    value = node.meta.get("example_value")
    kinds = (int, bool, torch.SymInt, torch.SymBool, torch.Size)
    return isinstance(value, kinds) or node.target in _IDLE


#: Calls that a compiled or fused forward may leave out.
_IDLE = (torch._check, torch._C._log_api_usage_once)


def _keeps_strides(capture: Capture) -> bool:
    """Whether the output has the strides of channels-last input, asked without data: the graph,
    which is known to be an excitation alone, runs on the meta device."""
    fake = capture.x.meta["example_value"]
    if fake.dim() not in (4, 5):
        return True
    layout = torch.channels_last if fake.dim() == 4 else torch.channels_last_3d
    extents = {4: (2, 3, 5), 5: (2, 3, 5, 4)}[fake.dim()]
    shape = (extents[0], fake.shape[1], *extents[1:])
    x = torch.empty(shape, dtype=fake.dtype, device="meta", memory_format=layout)
    symbols = {str(s): n for s, n in zip(fake.shape, shape, strict=True)}
    given: list[Any] = []
    for node in capture.module.graph.nodes:
        value = node.meta.get("example_value")
        if node.op != "placeholder":
            continue
        if node is capture.x:
            given.append(x)
        elif isinstance(value, Tensor):
            given.append(torch.empty_like(capture.tensors[node][1], device="meta"))
        else:
            given.append(symbols.get(str(value), value))
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            (y,) = capture.module.forward(*given)
        except Exception:  # operators without a meta kernel, which are no part of this one
            return True
    return not isinstance(y, Tensor) or y.shape != x.shape or y.stride() == x.stride()
