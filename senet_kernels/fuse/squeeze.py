"""The squeeze, read backwards: a mean over all of space, in any of its spellings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .flow import Flow, shape_of, tensor_of
from .nodes import HALF, Mismatch, is_number, known_equal, value_of, words
from .reader import Reader
from .spelling import Op


def is_pool(flow: Flow, node: Any) -> bool:
    op = flow.op(node)
    if op is None:
        return False
    if op.name in ("div", "mul"):
        inner = flow.op(op.get("input"))
        return inner is not None and inner.name == "sum"
    return op.name == "mean" or op.name.startswith(("adaptive_avg_pool", "avg_pool"))


def squeezed(reader: Reader, node: Any) -> Node:
    """The map of which a node is the mean over space."""
    node = reader.through_views(node)
    op = reader.flow.op(node)
    name = "" if op is None else op.name
    if op is None or not op.known:
        raise Mismatch(f"{words(node)} stands where the squeeze (a mean over space) is expected")
    if name.startswith("adaptive_avg_pool"):
        size = op.get("output_size")
        if any(s != 1 for s in (size if isinstance(size, (tuple, list)) else (size,))):
            raise Mismatch(f"{node} pools to {size}, not to 1")
        x = reader.input_of(node)
        reader.take(node)
        return _whole(node, x)
    if name.startswith("avg_pool"):
        return _average(reader, node, op)
    count: Any = None
    if name in ("div", "mul"):
        total, scale = op.get("input"), op.get("other")
        inner = reader.flow.op(total)
        if inner is None or inner.name != "sum":
            raise Mismatch(f"{words(node)} stands where the squeeze is expected")
        reader.input_of(node)
        reader.take(node)
        extents = [*shape_of(inner.get("input"))[2:]]
        count = math.prod(extents) if extents else 0
        scale = value_of(scale)
        right = not isinstance(scale, Tensor) and (
            statically_known_true(scale == count) if name == "div"
            else is_number(scale) and isinstance(count, int) and scale == 1 / count
        )  # fmt: skip
        if not right:
            raise Mismatch(f"{total} is a sum that is not divided by the number of positions")
        node, op = total, inner
    elif name != "mean":
        raise Mismatch(f"{words(node)} stands where the squeeze (a mean over space) is expected")
    _check_dtype(node, op)
    x = reader.input_of(node)
    reader.take(node)
    return _over_space(reader, node, x, op)


def _check_dtype(node: Node, op: Op) -> None:
    """Refuse a reduction in a dtype of its own, but that of its input, or float32 of a half
    precision, in which the kernels compute."""
    given, dtype = tensor_of(op.get("input")), op.get("dtype")
    if dtype is None or (given is not None and dtype == given.dtype):
        return
    if given is None or dtype != torch.float32 or given.dtype not in HALF:
        raise Mismatch(f"{node} is computed in another dtype")


def _over_space(reader: Reader, node: Node, x: Any, op: Op) -> Node:
    """What is reduced over all its spatial dimensions, maybe in steps."""
    rank, dims = len(shape_of(x)), op.get("dim")
    if not isinstance(x, Node) or dims is None:
        raise Mismatch(f"{node} is the mean of all elements")
    dims = sorted(d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    inner = reader.flow.op(x)
    space = list(range(2, rank))
    if dims == space and rank == 3 and inner is not None and inner.name in _FLATTENING:
        source = reader.input_of(x)  # x.flatten(2).mean(-1)
        assert isinstance(source, Node)
        given = shape_of(source)
        if len(given) > 2 and known_equal(given[:2], shape_of(x)[:2]):
            reader.take(x)
            return source
    if op.name == "mean" and inner is not None and inner.name == "mean":
        outer, source = inner.get("dim"), inner.get("input")  # x.mean(3).mean(2)
        keep = bool(inner.get("keepdim", False))
        outer = [outer] if not isinstance(outer, (tuple, list)) else list(outer)
        whole = len(shape_of(source))
        if whole > 3 and None not in outer:
            outer = sorted(d % whole for d in outer)
            mine = dims if keep else [_before_reduction(d, outer) for d in dims]
            if sorted({*outer, *mine}) == list(range(2, whole)):
                reader.input_of(x)
                reader.take(x)
                return _whole(node, source)
    if dims != space or rank < 3:
        raise Mismatch(f"{node} is a {op.name} over dimensions {dims}, expected {space}")
    return x


def _average(reader: Reader, node: Node, op: Op) -> Node:
    x, kernel = reader.input_of(node), op.get("kernel_size")
    space = shape_of(x)[2:]
    kernel = value_of(kernel)
    kernel = tuple(kernel) if isinstance(kernel, (tuple, list)) else (kernel,) * len(space)
    padding = op.get("padding", 0)
    padding = padding if isinstance(padding, (tuple, list)) else (padding,)
    if (
        not known_equal([value_of(k) for k in kernel], space)
        or any(p != 0 for p in padding)
        or op.get("divisor_override") is not None
    ):
        raise Mismatch(f"{node} is an average over a window, not over all positions")
    reader.take(node)
    return _whole(node, x)


def _whole(node: Node, x: Any) -> Node:
    if not isinstance(x, Node) or len(shape_of(x)) < 3:
        raise Mismatch(f"{node} does not pool a map")
    return x


_FLATTENING = frozenset(("view", "reshape", "flatten"))


def _before_reduction(dim: int, reduced: list[int]) -> int:
    """The dimension that ``dim`` was before these were taken out."""
    for r in reduced:
        dim += r <= dim
    return dim
