"""Squeeze-and-excitation in a graph, found from its product."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from senet_kernels.pointwise import ACTIVATIONS

from .flow import Flow, shape_of, tensor_of
from .nodes import Mismatch, check_context, check_users, is_vector, known_equal, sources, words
from .reader import Reader, read_product
from .squeeze import is_pool, squeezed


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
    return read_product(flow, end, _read)


def _read(reader: Reader, x: Node, g: Node) -> Match:
    flow, end = reader.flow, reader.end
    shape = shape_of(end)
    batch, channels = shape[:2]
    vector = reader.vector_of(x, g)
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
        z = squeezed(reader, h)
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
        z = squeezed(reader, z)
    if z is not x:
        source = reader.through_views(z)  # a copy or a cast to its own dtype
        if source not in (x, reader.past_casts(x)) or not known_equal(shape_of(z)[:2], shape[:2]):
            raise Mismatch(_another(flow, z, x))
    check_context(flow, [*reader.inner, end])
    check_users(reader.inner, {*reader.inner, end})
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


def _another(flow: Flow, z: Node, x: Node) -> str:
    if flow.origin.get(z) is not None and flow.origin.get(z) is flow.origin.get(x):
        return f"{z} is overwritten between squeeze and product"
    return f"{words(z)} is squeezed, and is not the tensor that is scaled, {x}"


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
        if not known_equal(given, shape) and any(is_pool(flow, n) for n in sources(node)):
            return True
        step = flow.op(node)
        if step is not None and step.name in ("expand", "expand_as"):
            return True
    return False
