"""Reading a graph backwards along the dataflow: layers, functions, gates, the squeeze, each in any
of its spellings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from senet_kernels.pointwise import ACTIVATIONS, GATES

from .flow import Flow, shape_of, tensor_of
from .nodes import (
    Mismatch,
    is_cast,
    is_idle,
    is_number,
    is_vector,
    known_equal,
    shape_text,
    value_of,
    words,
)
from .spelling import CASTS, VIEWS, Op, is_idle_dropout


class Reader:
    """Reads backwards from one product; ``inner`` has the nodes it has read through."""

    def __init__(self, flow: Flow, end: Node) -> None:
        self.flow, self.end = flow, end
        self.inner: list[Node] = []

    def take(self, node: Node) -> Op:
        """Read through a node."""
        op = self.flow.op(node)
        assert op is not None
        self.inner.append(node)
        return op

    def input_of(self, node: Node, name: str = "input") -> Any:
        """An argument of a node, which must be what its maker computed."""
        op = self.flow.op(node)
        assert op is not None
        source = op.get(name)
        if isinstance(source, Node):
            writer = self.flow.writer(source, source, node)
            if writer is not None:
                raise Mismatch(f"{source} is overwritten, by {writer}, before {node} reads it")
            if self.flow.is_opaque(source):
                raise Mismatch(f"it is not known what memory {source} lies in")
        return source

    def through_views(self, node: Any) -> Any:
        """Past views and identities, which keep the order of elements."""
        while (op := self.flow.op(node)) is not None:
            if op.name == "dropout" and not op.inplace:
                if not is_idle_dropout(op):
                    break
            elif op.name == "getitem":
                index = op.get("index")
                if not _takes_all(index, shape_of(op.get("input"))):
                    break
            elif op.name == "slice":
                part = slice(op.get("start"), op.get("end"), op.get("step"))
                shape, dim = shape_of(op.get("input")), op.get("dim", 0)
                if not _takes_all(part, shape[dim:]):
                    break
            elif op.name in CASTS or is_number(op.get("other")):
                if not is_idle(node, op) and not is_cast(node, op):
                    break
            elif op.name in ("mean", "sum"):
                if not _is_of_one(op):
                    break
            elif op.name not in VIEWS or op.inplace:
                break
            source = self.input_of(node)
            if not isinstance(source, Node) or tensor_of(source) is None:
                break
            self.take(node)
            node = source
        return node

    def past_casts(self, node: Node) -> Node:
        """What casts and idle operations are made of."""
        while (op := self.flow.op(node)) is not None and (is_idle(node, op) or is_cast(node, op)):
            node = self.input_of(node)
        return node

    def vector_of(self, x: Node, g: Node) -> Node:
        """The ``[B, C]`` vector, up to extents of 1, that the factor g of x is a view of."""
        shape = shape_of(self.end)
        if len(shape) < 3 or not known_equal(shape_of(x), shape):
            raise Mismatch(f"{x} does not have the shape of the product")
        vector: Node = self.through_views(g)
        aligned = (*shape[:2], *(1,) * (len(shape) - 2))
        if not known_equal(shape_of(g), aligned) and not (
            known_equal(shape_of(g), shape) and is_vector(vector, *shape[:2])
        ):
            raise Mismatch(
                f"{g} is {shape_text(shape_of(g))}, where one number per image and channel, "
                f"{shape_text(aligned)}, is expected"
            )
        return vector

    # ---- layers ----

    def layer(self, node: Any, outputs: Any, what: str) -> tuple[Node, Node, Node | None]:
        """``(input, weight, bias)`` of a linear layer or 1x1 convolution of a vector per image."""
        op = self.flow.op(node)
        batch = shape_of(self.end)[0]
        if op is not None and op.name in ("addmm", "mm"):
            return self._matrix_product(node, op, outputs)
        if op is None or op.name not in LAYERS or op.get("transposed", False):
            raise Mismatch(f"{words(node)} stands where {what} is expected")
        x, weight, bias = self.input_of(node), op.get("weight"), op.get("bias")
        if not isinstance(weight, Node) or not isinstance(x, Node):
            raise Mismatch(f"the weight of {node} is no tensor")
        shape, given = shape_of(weight), shape_of(x)
        if len(shape) < 2:
            raise Mismatch(f"the weight of {node} is no matrix")
        if op.name == "linear":
            features, rest = given[-1:], given[1:-1]
        else:
            features, rest = given[1:2], given[2:]
            if not all(statically_known_true(k == 1) for k in shape[2:]):
                raise Mismatch(f"{node} is no 1x1 convolution")
            if op.get("groups", 1) != 1:
                raise Mismatch(f"{node} is a convolution with groups={op.get('groups')}")
            padding = op.get("padding", 0)
            if padding not in ("same", "valid", 0) and any(p != 0 for p in padding):
                raise Mismatch(f"{node} is a convolution with padding={padding}")
        if (
            not known_equal(given[:1] + features, (batch, shape[1]))
            or not all(statically_known_true(r == 1) for r in rest)
            or not statically_known_true(shape[0] == outputs)
        ):
            raise Mismatch(f"{node} is no layer of one vector per image")
        self.take(node)
        return x, weight, bias if isinstance(bias, Node) else None

    def _matrix_product(self, node: Node, op: Op, outputs: Any) -> tuple[Node, Node, Node | None]:
        """A linear layer as exported programs have it: ``bias + x weight.T``."""
        bias = op.get("input") if op.name == "addmm" else None
        x = self.input_of(node, "input" if bias is None else "mat1")
        turned = self.flow.op(op.get("mat2"))
        dims = [1, 0] if turned is None or turned.name == "t" else list(turned.get("dims", ()))
        if turned is None or turned.name not in ("t", "permute") or dims != [1, 0]:
            raise Mismatch(f"the weight of {node} is no transposed matrix")
        weight = turned.get("input")
        scaled = op.get("alpha", 1) != 1 or op.get("beta", 1) != 1
        shape = (shape_of(self.end)[0], shape_of(weight)[1])
        if scaled or not known_equal(shape_of(x), shape):
            raise Mismatch(f"{node} is no layer of one vector per image")
        if bias is not None and not known_equal(shape_of(bias), (outputs,)):
            raise Mismatch(f"{node} adds no bias per channel")
        self.take(node)
        if set(op.get("mat2").users) == {node}:
            self.take(op.get("mat2"))
        return x, weight, bias

    def half(self, node: Any, channels: Any) -> tuple[Node, int, list[Node]] | None:
        """``(v, i, nodes)`` where a node is half i of the ``[B, 2C]`` vector v."""
        op = self.flow.op(node)
        if op is None or op.name != "getitem":
            return None
        source, index = self.input_of(node), op.get("index")
        parts = self.flow.op(source)
        if parts is not None and parts.name in ("chunk", "split") and index in (0, 1):
            size = parts.get("chunks" if parts.name == "chunk" else "split_size_or_sections")
            size = [size] if is_number(size) else list(size)
            wanted = [2] if parts.name == "chunk" else [channels] * len(size)
            v = self.input_of(source)
            if parts.get("dim", 0) == 1 and known_equal(size, wanted) and isinstance(v, Node):
                return v, index, [node, source]
        elif isinstance(index, tuple) and len(index) > 1 and index[0] == slice(None):
            rest = all(i is None or i is Ellipsis or i == slice(None) for i in index[2:])
            first = index[1] in (slice(None, channels), slice(0, channels))
            last = index[1] in (slice(channels, None), slice(channels, 2 * channels))
            if rest and (first or last) and isinstance(source, Node):
                return source, int(last), [node]
        return None

    # ---- functions ----

    def function_name(self, node: Any) -> str | None:
        """The activation or gate that a node computes; None if it computes none."""
        op = self.flow.op(node)
        if op is None:
            return None
        if op.name == "gelu":
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(op.get("approximate", "none"))
        if op.name == "leaky_relu":
            return "leaky_relu" if op.get("negative_slope", 0.01) == 0.01 else None
        if op.name == "mul":
            return None if self._sigmoid_factor(node, op) is None else "silu"
        if op.name == "hardtanh" and _bounds(op) == (0, 6):
            return "relu6"
        return op.name if op.name in ACTIVATIONS or op.name in GATES else None

    def _sigmoid_factor(self, node: Node, op: Op) -> tuple[Node, Node] | None:
        """``(v, sigmoid(v))`` where a node is their product."""
        for v, s in ((op.get("input"), op.get("other")), (op.get("other"), op.get("input"))):
            factor = self.flow.op(s)
            if factor is None or factor.name != "sigmoid" or factor.inplace:
                continue
            alone = factor.get("input") is v and set(s.users) == {node}
            if alone and self.flow.is_intact(v, node):
                return v, s
        return None

    def function_input(self, node: Node) -> Node:
        """Read through an activation or gate."""
        op = self.take(node)
        if op.name == "mul":
            pair = self._sigmoid_factor(node, op)
            assert pair is not None
            v, s = pair
            self.take(s)
            self.input_of(s)
            return v
        source = self.input_of(node)
        if not isinstance(source, Node):
            raise Mismatch(f"{node} has no tensor to read")
        return source

    def line(self, node: Any) -> tuple[Any, float, float]:
        """``(v, m, k)`` where a node is ``m v + k`` with numbers m and k, read through as far as
        that goes."""
        slope, shift = 1.0, 0.0
        while (op := self.flow.op(node)) is not None and op.name in ("mul", "add", "sub", "div"):
            v, n = op.get("input"), op.get("other")
            if is_number(v) and isinstance(n, Node) and op.name in ("mul", "add"):
                v, n = n, v
            if not isinstance(v, Node) or not is_number(n):
                break
            if op.get("alpha", 1) != 1 or op.get("rounding_mode") or (op.name == "div" and not n):
                break
            m, k = {
                "mul": (n, 0.0), "add": (1.0, n), "sub": (1.0, -n),
                "div": (1.0 / n if n else 0.0, 0.0),
            }[op.name]  # fmt: skip
            slope, shift = slope * m, slope * k + shift
            self.input_of(node, "input" if v is op.get("input") else "other")
            self.take(node)
            node = v
        return node, slope, shift

    def read_gate(self, node: Node) -> tuple[str, Node]:
        """``(gate, u)``; hard sigmoids are read however they are written out."""
        name = self.function_name(node)
        if name in GATES:
            return name, self.function_input(node)
        mark = len(self.inner)
        clipped, a, b = self.line(node)
        op = self.flow.op(clipped)
        if op is not None and op.name in ("relu6", "clamp", "hardtanh"):
            low, high = _bounds(op)
            source = self.input_of(clipped)
            self.take(clipped)
            v, m, k = self.line(source)
            if low is not None and high is not None and isinstance(v, Node):
                got = (a * m, a * k + b, a * low + b, a * high + b)
                for gate, (clips, row) in _HARD.items():
                    if all(abs(p - q) < 1e-6 for p, q in zip(got, row, strict=True)):
                        if op.name in clips:
                            return gate, v
                        raise Mismatch(f"{clipped} has other gradients at its ends than {gate}")
            raise Mismatch(f"{words(node)} is no gate that the kernels have (a clamp of a line)")
        del self.inner[mark:]
        op = self.flow.op(node)
        if op is not None and op.name == "leaky_relu":
            raise Mismatch(f"{node} is a leaky_relu, no gate that the kernels have")
        return "identity", node

    def plus_one(self, node: Node) -> tuple[Node, bool]:
        """``(v, True)`` where a node is ``v + 1``; otherwise the node itself."""
        op = self.flow.op(node)
        if op is not None and op.name == "add" and op.get("alpha", 1) == 1:
            for one, name in (("input", "other"), ("other", "input")):
                if is_number(op.get(one)) and op.get(one) == 1 and isinstance(op.get(name), Node):
                    source = self.input_of(node, name)
                    self.take(node)
                    return self.through_views(source), True
        return node, False


T = TypeVar("T")


def read_product(flow: Flow, end: Node, read: Callable[[Reader, Node, Node], T]) -> T:
    """What ``read(reader, x, g)`` makes of a product, with either factor for x.

    Raises:
        Mismatch: it makes nothing of it; of the two reasons that which was found last.
    """
    op = flow.op(end)
    assert op is not None
    reasons = [Mismatch("it is no product of two tensors")]
    for names in (("input", "other"), ("other", "input")):
        x, g = map(op.get, names)
        if not isinstance(x, Node) or not isinstance(g, Node):
            continue
        reader = Reader(flow, end)
        try:
            return read(reader, *(reader.input_of(end, name) for name in names))
        except Mismatch as mismatch:
            mismatch.depth = len(reader.inner) + (len(shape_of(x)) > 2)
            reasons.append(mismatch)
    raise max(reasons[1:], key=lambda m: m.depth, default=reasons[0])


#: Operations of an input and a weight.
LAYERS = frozenset(("linear", "conv1d", "conv2d", "conv3d", "convolution"))
#: What clips, and slope, intercept, lower and upper bound of ``clip(slope u + intercept)``. The
#: gradient of clamp at its ends is 1, that of relu6 and hardtanh 0.
_HARD = {
    "hardsigmoid": (("relu6", "hardtanh"), (1 / 6, 0.5, 0.0, 1.0)),
    "hardsigmoid_02": (("clamp",), (0.2, 0.5, 0.0, 1.0)),
}


def _bounds(op: Op) -> tuple[Any, Any]:
    if op.name == "relu6":
        return 0, 6
    if op.name == "hardtanh":
        return op.get("min_val", -1.0), op.get("max_val", 1.0)
    low, high = op.get("min"), op.get("max")
    return (low if is_number(low) else None), (high if is_number(high) else None)


def _is_of_one(op: Op) -> bool:
    """Whether a reduction has one element to reduce each time."""
    shape, dims = shape_of(op.get("input")), op.get("dim")
    if dims is None or op.get("dtype") is not None:
        return False
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    return all(statically_known_true(shape[d] == 1) for d in dims)


def _takes_all(index: Any, shape: Sequence[Any]) -> bool:
    """Whether an index, of slices and None, leaves every element where it is."""
    index = index if isinstance(index, tuple) else (index,)
    extents = iter(shape)
    for i in index:
        if i is None:
            continue
        if i is Ellipsis:  # what comes after it is not counted out
            return all(j is None or j is Ellipsis or j == slice(None) for j in index)
        extent = next(extents, None)
        if not isinstance(i, slice) or i.step not in (None, 1) or i.start not in (None, 0):
            return False
        stop = None if i.stop == 2**63 - 1 else value_of(i.stop)  # the last, as aten says it
        if stop is not None and not statically_known_true(stop >= extent):
            return False
    return True
