"""A graph of PyTorch calls, before autograd, as values: who writes which memory, and when.

Dynamo's graph is the program in the order it runs, with in-place operators and views. Two things
make values of it. In-place operators return the tensor they overwrite, so all later reads of that
tensor are first redirected to the operator: a node then stands for one version of one tensor. And
each node knows the storages it lies in, from Dynamo's fake tensors, so that a write through an
alias (a view, ``x.data``) is seen: :meth:`Flow.writer` tells what has overwritten a node since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from . import spelling
from .spelling import Op

#: Operators that change the shape or the memory of their argument in place.
_METADATA = frozenset((
    "squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims", "as_strided", "resize", "set",
    "resize_as", "swap",
))  # fmt: skip

#: Autocast entries and the gradient mode that a node runs under, in words that compare.
Context = tuple[Any, ...]


def tensor_of(node: Node) -> Tensor | None:
    """The fake tensor of a node; None where it makes none."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def dtype_of(node: Node) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def shape_of(node: Node) -> tuple[Any, ...]:
    tensor = tensor_of(node)
    return () if tensor is None else tuple(tensor.shape)


class Flow:
    """The values of a graph. Making one redirects reads in the graph; :meth:`restore` undoes it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order: dict[Node, int] = {}
        self.ops: dict[Node, Op | None] = {}
        #: The node that first made the tensor: the same for all its versions.
        self.origin: dict[Node, Node] = {}
        self.context: dict[Node, Context] = {}
        self._storages: dict[Node, tuple[Any, ...]] = {}
        #: Names of storages that stand for others.
        self._same: dict[Any, Any] = {}
        self._holders: dict[Any, list[Node]] = defaultdict(list)
        self._writes: dict[Any, list[tuple[int, Node]]] = defaultdict(list)
        #: Storages that others than this graph's nodes may hold.
        self._foreign: set[Any] = set()
        #: Storages of which nothing is known for sure.
        self._opaque: set[Any] = set()
        self._arguments: list[tuple[Node, Any, Any]] = []
        self._read()

    # ---- reading the graph ----

    def _read(self) -> None:
        for position, node in enumerate(self.graph.nodes):
            self.order[node] = position
        for node in self.graph.nodes:
            op = spelling.read(node)
            self.ops[node] = op
            self._add_storages(node)
            self.origin[node] = node
            if op is not None and op.inplace:
                self._redirect(node)
            for target in spelling.written(node, op):
                self._write(target, node)
            if op is not None and op.inplace and op.name in _METADATA:
                self._opaque.update(self._storages[node])
        self._read_contexts()

    def _add_storages(self, node: Node) -> None:
        value = node.meta.get("example_value", node.meta.get("val"))
        keys = []
        source = self._returned(node)
        for tensor in _tensors(value):
            key, sure = _storage(tensor)
            if source is not None and self._storages[source]:
                self._same[key] = self._storages[source][0]
            key = self._same.get(key, key)
            keys.append(key)
            if not sure:
                self._opaque.add(key)
            self._holders[key].append(node)
        if not keys and node.op == "get_attr":
            keys = [("attribute", node.target)]
            self._holders[keys[0]].append(node)
        self._storages[node] = tuple(keys)
        unknown = self.ops[node] is None and node.target not in spelling.HARMLESS
        if node.op in ("placeholder", "get_attr") or (node.op != "output" and unknown):
            self._foreign.update(keys)

    def _returned(self, node: Node) -> Node | None:
        """The input that a node returns, though its fake tensor has memory of its own."""
        op = self.ops[node]
        source = op.get("input") if op is not None and spelling.is_idle_dropout(op) else None
        return source if isinstance(source, Node) else None

    def _redirect(self, node: Node) -> None:
        """Let what reads the overwritten tensor from here on read this node."""
        target = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(target, Node) or tensor_of(target) is None or tensor_of(node) is None:
            return
        if self._storages[target] != self._storages[node]:
            return
        self.origin[node] = self.origin[target]
        for user in list(target.users):
            if self.order[user] > self.order[node]:
                self._arguments.append((user, user.args, user.kwargs))
                user.replace_input_with(target, node)

    def restore(self) -> None:
        """Give the graph back as it was; only where nothing has been rewritten."""
        for node, args, kwargs in reversed(self._arguments):
            node.args, node.kwargs = args, kwargs

    def _write(self, target: Node, by: Node) -> None:
        for key in self._storages.get(target, ()):
            self._writes[key].append((self.order[by], by))

    def _read_contexts(self) -> None:
        autocasts: dict[Node, tuple[Any, ...]] = {}
        others: tuple[Any, ...] = ()
        grad: bool | None = None  # as it was on entry
        entered: list[Node] = []
        for node in self.graph.nodes:
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name == "_enter_autocast":
                autocasts[node] = tuple(node.args[:3])
            elif name == "_exit_autocast":
                autocasts.pop(node.args[0], None)
            elif name in ("_set_grad_enabled", "set_grad_enabled"):
                grad = bool(node.args[0])
            elif self.ops[node] is None and _is_switch(node, name):
                others = (*others, node.name)
            if grad is None:
                entered.append(node)
            self.context[node] = (tuple(autocasts.values()), grad, others)
        ambient = any(
            tensor.requires_grad
            for node in entered
            if node.op not in ("placeholder", "get_attr")
            for tensor in _tensors(node.meta.get("example_value"))
        )
        for node in entered:
            autocast, _, others = self.context[node]
            self.context[node] = (autocast, ambient, others)

    # ---- questions ----

    def products(self) -> list[Node]:
        """The products of tensors, in order."""
        return [
            node for node, op in self.ops.items()
            if op is not None and op.name == "mul" and tensor_of(node) is not None
        ]  # fmt: skip

    def op(self, node: Any) -> Op | None:
        return self.ops.get(node) if isinstance(node, Node) else None

    def is_opaque(self, node: Node) -> bool:
        """Whether it is not known what memory a node lies in."""
        return any(key in self._opaque for key in self._storages[node])

    def writer(
        self, node: Node, start: Node, stop: Node, exempt: Collection[Node] = frozenset()
    ) -> Node | None:
        """What writes to a node's memory between two others; None if nothing does."""
        first, last = self.order[start], self.order[stop]
        for key in self._storages[node]:
            for position, by in self._writes.get(key, ()):
                if first < position < last and by not in exempt:
                    return by
        return None

    def is_intact(self, node: Node, reader: Node) -> bool:
        """Whether a node holds what it computed when another reads it."""
        return self.writer(node, node, reader) is None

    def owner(self, node: Node) -> Node | None:
        """The input of the graph whose memory a node lies in."""
        for key in self._storages[node]:
            for holder in self._holders[key]:
                if holder.op in ("placeholder", "get_attr"):
                    return holder
        return None

    def why_write_stays(self, node: Node, removed: Collection[Node]) -> str | None:
        """Why an in-place node cannot be removed: who would miss what it writes. None: nobody, or
        it writes nothing."""
        op = self.ops[node]
        if op is None or not op.inplace:
            return None
        for key in self._storages[node]:
            if key in self._foreign:
                return f"{node} overwrites an input of the graph, or what others may hold"
            for holder in self._holders[key]:
                if holder in removed or self.origin.get(holder) is self.origin[node]:
                    continue
                if any(self.order[u] > self.order[node] and u not in removed for u in holder.users):
                    return f"{node} overwrites what {holder}, read later, holds too"
        return None

    def stand_in(self, old: Node, new: Node) -> None:
        """Let a new node take the place of another, which is left without users."""
        old.replace_all_uses_with(new)
        for user in new.users:
            self.ops[user] = spelling.read(user)
        self.add(new, old)
        self._storages[new] = self._storages[old]
        for key in self._storages[old]:
            self._holders[key].append(new)

    def add(self, new: Node, at: Node) -> None:
        """Enter a new node that computes beside another one."""
        self.order[new] = self.order[at]
        self.ops[new] = None
        self.origin[new] = new
        self.context[new] = self.context[at]
        self._storages[new] = ()

    def forget(self, node: Node) -> None:
        """Strike out a node that has been erased."""
        self.ops[node] = None
        for key in self._storages.pop(node):
            self._holders[key].remove(node)
            self._writes[key] = [w for w in self._writes[key] if w[1] is not node]


def _is_switch(node: Node, name: str) -> bool:
    """Whether a node may change how those after it compute."""
    return not node.all_input_nodes and any(
        word in name for word in ("enter", "exit", "push", "pop", "set_", "increment", "decrement")
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> tuple[Any, bool]:
    """What names a tensor's memory, and whether that is sure."""
    if not isinstance(tensor, FakeTensor) and type(tensor) not in (Tensor, torch.nn.Parameter):
        return ("object", id(tensor)), False
    try:
        return tensor.untyped_storage()._cdata, True
    except (NotImplementedError, RuntimeError):
        return ("object", id(tensor)), False
