"""Excitations that are not one or two layers: any code between a squeeze and a product."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .flow import Flow, shape_of
from .nodes import Mismatch, check_context, check_users, is_vector, sources
from .reader import Reader, read_product
from .squeeze import is_pool, squeezed


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
    return read_product(flow, end, _read)


def _read(reader: Reader, x: Node, g: Node) -> HalvesMatch:
    flow, end = reader.flow, reader.end
    shape = shape_of(end)
    vector = reader.vector_of(x, g)
    gate, u = reader.read_gate(vector)
    if not is_vector(u, *shape[:2]):
        raise Mismatch(f"{u} is not [B, C]")
    pool, squeeze = _pool_of(flow, end, u, x)
    middle = _between(flow, pool, u)
    around = [*squeeze, *reader.inner]
    check_users(around, {*middle, *around, pool, end})
    check_context(flow, [pool, end])
    if flow.writer(x, squeeze[-1], end) is not None:
        raise Mismatch(f"{x} is overwritten between squeeze and product")
    return HalvesMatch(x, pool, u, gate, end, squeeze, middle, reader.inner)


def _pool_of(flow: Flow, end: Node, u: Node, x: Node) -> tuple[Node, list[Node]]:
    """The mean of x that u comes of."""
    for node in sources(u, x):
        if is_pool(flow, node) and is_vector(node, *shape_of(x)[:2]):
            reader = Reader(flow, end)
            if squeezed(reader, node) is x and len(shape_of(node)) >= 2:
                return node, reader.inner
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
