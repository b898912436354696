"""What is asked of nodes of a graph, one by one: their kind, shape and users, and how a message
names them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .flow import Flow, shape_of, tensor_of
from .spelling import CASTS, Op

HALF = frozenset((torch.bfloat16, torch.float16))


class Mismatch(Exception):
    """Why a product is not that of a squeeze-and-excitation; ``depth`` is how far it looked so."""

    depth = 0


def known_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether shapes are equal for all extents the graph is for, without a new guard."""
    return len(a) == len(b) and all(
        statically_known_true(p == q) for p, q in zip(a, b, strict=True)
    )


def same_kind(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of one dtype and device."""
    s, t = (tensor_of(n) if isinstance(n, Node) else None for n in (a, b))
    return s is not None and t is not None and s.dtype == t.dtype and s.device == t.device


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_idle(node: Node, op: Op) -> bool:
    """Whether an operation gives what it is given: a cast to the same dtype, a product by 1."""
    one = op.name in ("mul", "div") and is_number(op.get("other")) and op.get("other") == 1
    return (
        (op.name in CASTS or (one and not op.get("rounding_mode")))
        and not op.inplace
        and same_kind(node, op.get("input"))
    )


def is_cast(node: Node, op: Op) -> bool:
    """Whether an operation gives what it is given but for the rounding between float32 and a half
    precision. :func:`.grow.why_rounded` says whether that may be left out."""
    if op.name not in CASTS or op.inplace or not isinstance(op.get("input"), Node):
        return False
    source, result = tensor_of(op.get("input")), tensor_of(node)
    if source is None or result is None or source.device != result.device:
        return False
    other = {source.dtype, result.dtype} - {torch.float32}
    return len(other) == 1 and other <= HALF


def words(node: Any) -> str:
    """A node as a message names it."""
    if not isinstance(node, Node):
        return repr(node)
    if node.op in ("placeholder", "get_attr"):
        return f"{node}, an input of the graph,"
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in CASTS:
        return f"{node}, a cast ({name}),"
    return f"{node}, the result of {name or node.target},"


def shape_text(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def value_of(value: Any) -> Any:
    """A number of the program, or the symbol that stands for it."""
    if isinstance(value, Node):
        return value.meta.get("example_value", value.meta.get("val"))
    return value


def is_vector(node: Node, batch: Any, channels: Any) -> bool:
    """Whether a tensor is ``[B, C]`` up to extents of 1."""

    def long(extents: Sequence[Any]) -> list[Any]:
        return [e for e in extents if not statically_known_true(e == 1)]

    return known_equal(long(shape_of(node)), long((batch, channels)))


def check_users(nodes: Collection[Node], among: Collection[Node]) -> None:
    """Refuse to replace nodes that others than ``among`` read."""
    for node in nodes:
        for user in node.users:
            if user not in among:
                who = "what the graph returns" if user.op == "output" else str(user)
                raise Mismatch(f"{node} is used elsewhere, by {who}")


def check_context(flow: Flow, nodes: Collection[Node]) -> None:
    """Refuse nodes that do not all run under the same modes."""
    contexts = [flow.context[n] for n in nodes]
    for what, i in (("autocast", 0), ("the gradient mode", 1), ("a mode", 2)):
        if any(c[i] != contexts[0][i] for c in contexts):
            raise Mismatch(f"{what} changes inside")


def sources(node: Node, stop: Node | None = None) -> Iterator[Node]:
    """A node and the tensors that it is computed of, not beyond ``stop``; not too many."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node not in seen and node is not stop:
            seen.add(node)
            yield node
            waiting += [n for n in node.all_input_nodes if tensor_of(n) is not None]


#: Nodes that are looked through for a squeeze.
_MOST = 40
