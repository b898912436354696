"""Squeeze-and-excitation in a graph, found from its product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from senet_kernels.pointwise import ACTIVATIONS

from .flow import Flow, shape_of, tensor_of
from .reader import Mismatch, Reader, is_pool, is_vector, known_equal, words


@dataclass
class Match:
    """A squeeze-and-excitation: what it reads, and the nodes that compute it."""

    x: Node  # the tensor that is squeezed and scaled
    w1: Node | None
    b1: Node | None
    w2: Node | None
    b2: Node | None
    activation: str
    gate: str
    end: Node  # what it gives
    inner: list[Node]  # all other nodes it consists of
    shift: bool = False  # w2 has 2C rows
    before: str | None = None
    norm: Node | None = None
    affine: tuple[Node, Node] | None = None
    residual: Node | None = None
    after: str | None = None
    absorbed: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> set[Node]:
        return {*self.inner, self.end}


def find(flow: Flow, end: Node) -> Match:
    """The squeeze-and-excitation that ends in this product.

    Raises:
        Mismatch: there is none; the message says why.
    """
    op = flow.op(end)
    assert op is not None
    reasons: list[Mismatch] = []
    for x_name, g_name in (("input", "other"), ("other", "input")):
        x, g = op.get(x_name), op.get(g_name)
        if not isinstance(x, Node) or not isinstance(g, Node):
            continue
        reader = Reader(flow, end)
        try:
            return _read(reader, x_name, g_name)
        except Mismatch as mismatch:
            mismatch.depth = len(reader.inner) + (len(shape_of(x)) > 2)
            reasons.append(mismatch)
    raise max(reasons, key=lambda m: m.depth, default=Mismatch("it is no product of two tensors"))


def _read(reader: Reader, x_name: str, g_name: str) -> Match:
    flow, end = reader.flow, reader.end
    x, g = reader.input_of(end, x_name), reader.input_of(end, g_name)
    shape = shape_of(end)
    if len(shape) < 3 or not known_equal(shape_of(x), shape):
        raise Mismatch(f"{x} does not have the shape of the product")
    batch, channels = shape[:2]
    vector = reader.through_views(g)
    if not _broadcasts(g, vector, shape):
        raise Mismatch(
            f"{g} is {_text(shape_of(g))}, where one number per image and channel, "
            f"{_text((*shape[:2], *(1,) * (len(shape) - 2)))}, is expected"
        )
    vector, is_weighted_sum = reader.plus_one(vector)  # x (1 + g) is x g + x
    gate, u = reader.read_gate(vector)
    u = reader.through_views(u)
    outputs, half = channels, reader.half(u, channels)
    if half is not None and is_weighted_sum:
        raise Mismatch(f"{u} is half of a vector, and 1 is added to its gate")
    if half is not None:
        u, end = _read_shift(reader, half, channels)
        outputs = 2 * channels
    if not is_vector(u, batch, outputs):
        raise Mismatch(f"{u} is not [B, C]")
    h, w2, b2 = reader.layer(u, outputs, "the last layer of the excitation")
    w1 = b1 = None
    activation = "identity"
    h = reader.through_views(h)
    before_layer = len(reader.inner)
    if is_pool(flow, h):
        z = reader.squeezed(h)
        if not statically_known_true(shape_of(w2)[1] == channels):
            raise Mismatch(f"the weight of {u} has not C columns")
    else:
        del reader.inner[before_layer:]
        name = reader.function_name(h)
        if name in ACTIVATIONS:
            activation, h = name, reader.through_views(reader.function_input(h))
        hidden = h
        what = "a layer of the excitation"
        op = flow.op(h)
        if op is not None and op.name == "leaky_relu":
            raise Mismatch(f"{h} has the slope {op.get('negative_slope')}, the kernels' is 0.01")
        z, w1, b1 = reader.layer(h, shape_of(w2)[1], what)
        if not is_vector(hidden, batch, shape_of(w2)[1]):
            raise Mismatch(f"{hidden} is not [B, R]")
        if not statically_known_true(shape_of(w1)[1] == channels):
            raise Mismatch(f"the weight of {hidden} has not C columns")
        z = reader.squeezed(z)
    if z is not x:
        source = reader.through_views(z)  # a copy or a cast to its own dtype
        if source not in (x, reader.past_casts(x)) or not known_equal(shape_of(z)[:2], shape[:2]):
            raise Mismatch(_another(flow, z, x))
    _check_context(flow, [*reader.inner, end])
    _check_users(flow, reader.inner, end)
    return Match(
        x, w1, b1, w2, b2, activation, gate, end, reader.inner, shift=half is not None,
        residual=x if is_weighted_sum else None, absorbed=["residual"] if is_weighted_sum else [],
    )  # fmt: skip


def _read_shift(
    reader: Reader, half: tuple[Node, int, list[Node]], channels: Any
) -> tuple[Node, Node]:
    """Scale-and-shift: the vector that both come from, and the sum that ends it."""
    flow, product = reader.flow, reader.end
    u, index, nodes = half
    total = next(iter(product.users)) if len(product.users) == 1 else None
    op = flow.op(total)
    if total is None or op is None or op.name != "add" or op.get("alpha", 1) != 1 or index != 0:
        raise Mismatch(f"{nodes[0]} is half of a vector whose other half is not added")
    other = "other" if op.get("input") is product else "input"
    reader.input_of(total, "input" if other == "other" else "other")
    reader.inner.append(product)
    shift = reader.input_of(total, other)
    if not known_equal(
        shape_of(shift), (*shape_of(product)[:2], *(1,) * (len(shape_of(product)) - 2))
    ):
        raise Mismatch(f"{words(shift)} is added, not one number per image and channel")
    found = reader.half(reader.through_views(shift), channels)
    if found is None or found[0] is not u or found[1] != 1:
        raise Mismatch(f"{words(shift)} is added, not the other half of {u}")
    reader.inner.extend(dict.fromkeys((*nodes, *found[2])))
    return reader.through_views(u), total


def _text(shape: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _another(flow: Flow, z: Node, x: Node) -> str:
    if flow.origin.get(z) is not None and flow.origin.get(z) is flow.origin.get(x):
        return f"{z} is overwritten between squeeze and product"
    return f"{words(z)} is squeezed, and is not the tensor that is scaled, {x}"


def _broadcasts(g: Node, vector: Node, shape: tuple[Any, ...]) -> bool:
    """Whether a factor is one number per image and channel, and its views keep it so."""
    given = shape_of(g)
    aligned = (*shape[:2], *(1,) * (len(shape) - 2))
    if known_equal(given, aligned):
        return True
    return known_equal(given, shape) and is_vector(vector, *shape[:2])


def _check_context(flow: Flow, nodes: list[Node]) -> None:
    contexts = [flow.context[n] for n in nodes]
    for what, i in (("autocast", 0), ("the gradient mode", 1), ("a mode", 2)):
        if any(c[i] != contexts[0][i] for c in contexts):
            raise Mismatch(f"{what} changes inside")


def _check_users(flow: Flow, inner: list[Node], end: Node) -> None:
    mine = {*inner, end}
    for node in inner:
        for user in node.users:
            if user not in mine:
                who = "what the graph returns" if user.op == "output" else str(user)
                raise Mismatch(f"{node} is used elsewhere, by {who}")


def is_near(flow: Flow, end: Node) -> bool:
    """Whether a product looks like that of an excitation: a factor broadcasts over space for each
    image, or is computed from a squeeze."""
    op = flow.op(end)
    assert op is not None
    shape = shape_of(end)
    for node in (op.get("input"), op.get("other")):
        if not isinstance(node, Node) or tensor_of(node) is None or len(shape) < 3:
            continue
        given = shape_of(node)
        if known_equal(given, (*shape[:2], *(1,) * (len(shape) - 2))):
            return True
        if not known_equal(given, shape) and _comes_from_a_pool(flow, node):
            return True
        step = flow.op(node)
        if step is not None and step.name in ("expand", "expand_as"):
            return True
    return False


def _comes_from_a_pool(flow: Flow, node: Node) -> bool:
    seen: set[Node] = set()
    stack = [node]
    while stack and len(seen) < _NEAR:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_pool(flow, node):
            return True
        stack.extend(n for n in node.all_input_nodes if tensor_of(n) is not None)
    return False


#: Nodes that are looked through for a squeeze.
_NEAR = 40
