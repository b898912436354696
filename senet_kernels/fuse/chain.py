"""Graph nodes back to the children of a module that computed them, one after the other."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .flow import Flow, shape_of
from .halves import HalvesMatch
from .nodes import Mismatch, words
from .reader import Reader

#: The shape that the first child takes, extents 0 and 1 of the mean by their numbers, None for an
#: extent of 1; and children by their paths, in the order they are called.
Steps = tuple[tuple[int | None, ...], tuple[tuple[str, ...], ...]]


def read_chain(flow: Flow, match: HalvesMatch) -> tuple[Steps, set[Node]]:
    """The children that are an excitation, and all nodes that they are.

    Raises:
        Mismatch: something else takes part.
    """
    value = match.pool
    nodes: set[Node] = set()
    children: list[tuple[str, ...]] = []
    shape: tuple[int | None, ...] | None = None
    while True:
        value = _past_views(flow, match, value, nodes)
        if shape is None:
            shape = _shape(value, match.pool)
        if value is match.u:
            break
        user = next(n for n in match.middle if value in n.all_input_nodes)
        path, group, output = _call(flow, match, user, value)
        children.append(path)
        nodes |= group
        value = output
    if not children or not set(match.middle) <= nodes:
        raise Mismatch("its excitation is not a chain of its children")
    return (shape, tuple(children)), nodes


def _past_views(flow: Flow, match: HalvesMatch, value: Node, nodes: set[Node]) -> Node:
    """What views of a value there are before another child takes it."""
    while value is not match.u:
        users = [n for n in match.middle if value in n.all_input_nodes]
        if len(users) != 1:
            raise Mismatch(f"{words(value)} goes several ways in the excitation")
        if Reader(flow, match.end).through_views(users[0]) is users[0] or _paths(users[0]):
            break
        value = users[0]
        nodes.add(value)
    return value


def _shape(value: Node, pool: Node) -> tuple[int | None, ...]:
    batch, channels = shape_of(pool)[:2]
    found: list[int | None] = []
    for extent in shape_of(value):
        if statically_known_true(extent == 1):
            found.append(None)
        elif 0 not in found and statically_known_true(extent == batch):
            found.append(0)
        elif statically_known_true(extent == channels):
            found.append(1)
        else:
            raise Mismatch(f"{words(value)} is no view of the mean")
    if found[:1] != [0]:
        raise Mismatch(f"{words(value)} does not begin with the images")
    return tuple(found)


def _call(
    flow: Flow, match: HalvesMatch, first: Node, value: Node
) -> tuple[tuple[str, ...], set[Node], Node]:
    """The outermost child whose whole call starts here and is within the excitation."""
    for path in _paths(first):
        group = {n for n in flow.graph.nodes if n.op.startswith("call") and path in _paths(n)}
        inside = group & set(match.middle)
        outputs = [n for n in inside if any(u not in group for u in n.users)]
        given = {a for n in inside for a in n.all_input_nodes if a not in group}
        given = {a for a in given if a.op not in ("placeholder", "get_attr")}
        rest = {n for n in group - inside if n.users and any(u not in group for u in n.users)}
        if len(outputs) == 1 and given == {value} and not rest and not group & _around(match):
            return path, group, outputs[0]
    raise Mismatch(f"{words(first)} is no child's call in the excitation")


def _around(match: HalvesMatch) -> set[Node]:
    return {match.pool, match.end, *match.squeeze, *match.scale}


def _paths(node: Node) -> list[tuple[str, ...]]:
    """The children that a node was computed in, outermost first; not those called repeatedly."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    found = []
    for name, _ in stack.values():
        steps = [s for s in re.findall(r"\w+", name.partition("]")[2]) if s != "_modules"]
        if steps and "@" not in name:
            found.append(tuple(steps))
    return found
