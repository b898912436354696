"""Excitations that are not one or two layers: any code between a squeeze and a product."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .flow import Flow, shape_of
from .reader import Mismatch, Reader, is_pool, is_vector, known_equal


@dataclass
class HalvesMatch:
    """A product with gates that come of the mean of what they scale, in whatever way."""

    x: Node
    pool: Node  # the mean, one number per image and channel
    u: Node  # before the gate
    gate: str
    end: Node
    squeeze: list[Node]  # what computes the mean
    middle: list[Node]  # what computes u of it
    scale: list[Node]  # the gate and its views


def find_halves(flow: Flow, end: Node) -> HalvesMatch:
    """The squeeze and the product around an excitation of any kind.

    Raises:
        Mismatch: there are none; the message says why.
    """
    op = flow.op(end)
    assert op is not None
    reason = Mismatch("it is no product of two tensors")
    for x_name, g_name in (("input", "other"), ("other", "input")):
        if not isinstance(op.get(x_name), Node) or not isinstance(op.get(g_name), Node):
            continue
        try:
            return _read(flow, end, x_name, g_name)
        except Mismatch as mismatch:
            reason = mismatch
    raise reason


def _read(flow: Flow, end: Node, x_name: str, g_name: str) -> HalvesMatch:
    reader = Reader(flow, end)
    x, g = reader.input_of(end, x_name), reader.input_of(end, g_name)
    shape = shape_of(end)
    if len(shape) < 3 or not known_equal(shape_of(x), shape):
        raise Mismatch(f"{x} does not have the shape of the product")
    vector = reader.through_views(g)
    if not known_equal(shape_of(g), (*shape[:2], *(1,) * (len(shape) - 2))) and not (
        known_equal(shape_of(g), shape) and is_vector(vector, *shape[:2])
    ):
        raise Mismatch(f"{g} is not one number per image and channel")
    gate, u = reader.read_gate(vector)
    if not is_vector(u, *shape[:2]):
        raise Mismatch(f"{u} is not [B, C]")
    pool, squeeze = _pool_of(flow, end, u, x)
    middle = _between(flow, pool, u)
    mine = {*middle, pool, *squeeze}
    for node in (*squeeze, *reader.inner):
        others = {*mine, *reader.inner, end}
        if any(user not in others for user in node.users):
            raise Mismatch(f"{node} is used elsewhere")
    if flow.context[pool] != flow.context[end]:
        raise Mismatch("autocast or the gradient mode changes inside")
    if flow.writer(x, squeeze[-1], end) is not None:
        raise Mismatch(f"{x} is overwritten between squeeze and product")
    return HalvesMatch(x, pool, u, gate, end, squeeze, middle, reader.inner)


def _pool_of(flow: Flow, end: Node, u: Node, x: Node) -> tuple[Node, list[Node]]:
    """The mean of x that u comes of."""
    seen: set[Node] = set()
    stack = [u]
    while stack and len(seen) < _MOST:
        node = stack.pop()
        if node in seen or node is x:
            continue
        seen.add(node)
        if is_pool(flow, node) and is_vector(node, *shape_of(x)[:2]):
            reader = Reader(flow, end)
            source = reader.squeezed(node)
            if source is x and len(shape_of(node)) >= 2:
                return node, reader.inner
        stack += [n for n in node.all_input_nodes if n.op not in ("placeholder", "get_attr")]
    raise Mismatch(f"{u} comes of no mean of {x}")


def _between(flow: Flow, pool: Node, u: Node) -> list[Node]:
    """All that u needs and that comes of the mean, in order."""
    after = {pool}
    for node in flow.graph.nodes:
        if flow.order[node] > flow.order[pool] and any(n in after for n in node.all_input_nodes):
            after.add(node)
    needed: set[Node] = set()
    stack = [u]
    while stack:
        node = stack.pop()
        if node not in needed and node in after and node is not pool:
            needed.add(node)
            stack += node.all_input_nodes
    return sorted(needed, key=flow.order.__getitem__)


#: Nodes that are looked through for a mean.
_MOST = 40
