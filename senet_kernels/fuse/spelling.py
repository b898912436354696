"""The one table of spellings: which operation a node of a graph calls, in whatever words.

``F.relu(x)``, ``torch.relu(x)``, ``x.relu_()``, ``F.relu(x, inplace=True)`` and ``aten.relu`` are
one operation, ``relu``, with the same named arguments. To teach the matcher another spelling, add
it here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

#: Operations and the names of their arguments in the order of their positions.
PARAMETERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("relu", "relu6", "silu", "hardswish", "mish", "hardsigmoid"),
                    ("input", "inplace")),
    **dict.fromkeys(("sigmoid", "tanh", "detach", "clone", "contiguous"), ("input",)),
    "gelu": ("input", "approximate"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
    "hardtanh": ("input", "min_val", "max_val", "inplace"),
    "clamp": ("input", "min", "max"),
    "mul": ("input", "other"),
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "div": ("input", "other", "rounding_mode"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "sum": ("input", "dim", "keepdim", "dtype"),
    **{f"adaptive_avg_pool{n}d": ("input", "output_size") for n in (1, 2, 3)},
    **{f"avg_pool{n}d": ("input", "kernel_size", "stride", "padding", "ceil_mode",
                         "count_include_pad", "divisor_override") for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    **{f"conv{n}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
       for n in (1, 2, 3)},
    "convolution": ("input", "weight", "bias", "stride", "padding", "dilation", "transposed",
                    "output_padding", "groups"),
    "addmm": ("input", "mat1", "mat2", "beta", "alpha"),
    "mm": ("input", "mat2"),
    "t": ("input",),
    "permute": ("input", "dims"),
    "slice": ("input", "dim", "start", "end", "step"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum",
                   "eps"),
    "dropout": ("input", "p", "training", "inplace"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "split_size_or_sections", "dim"),
    "getitem": ("input", "index"),
    # Views, whose result has the elements of the input in the same order.
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand",
                     "expand_as", "view_as", "reshape_as"), ("input",)),
    **dict.fromkeys(("to", "type", "type_as", "float", "double", "half", "bfloat16"), ("input",)),
}  # fmt: skip

#: What keeps elements in their order, so that a ``[B, C]`` vector stays one.
VIEWS = frozenset(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as",
     "view_as", "reshape_as", "contiguous", "clone")
)  # fmt: skip
#: Views where they change neither dtype nor device.
CASTS = frozenset(("to", "type", "type_as", "float", "double", "half", "bfloat16"))

#: Other names of the same operation; of in-place operators without their mark.
_ALIASES = {
    "clip": "clamp", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div",
    "swish": "silu", "special_expit": "sigmoid", "expit": "sigmoid", "subtract": "sub",
    "split_with_sizes": "split", "_unsafe_view": "view", "hard_sigmoid": "hardsigmoid",
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
                     "feature_alpha_dropout"), "dropout"),
}  # fmt: skip

#: Where an operation's function lives under its own name.
_HOMES = (F, torch, torch._C._nn, operator, torch.special)
_AUGMENTED = {
    operator.iadd: "add", operator.isub: "sub", operator.imul: "mul", operator.itruediv: "div",
}  # fmt: skip
_ORDER_OF_TORCH_BATCH_NORM = (
    "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
)  # fmt: skip

#: PyTorch's own functions that write to an argument though their names do not say so.
_STATISTICS = ("running_mean", "running_var")


class Op(NamedTuple):
    """What a node computes."""

    name: str
    args: dict[str, Any]  # those that were given, by name; empty for operations not in the table
    inplace: bool = False  # it returns its first argument, overwritten
    known: bool = False  # in the table

    def get(self, name: str, default: Any = None) -> Any:
        return self.args.get(name, default)


def read(node: Node) -> Op | None:
    """The operation of a node; None for one that is not PyTorch's own."""
    target = node.target
    parameters: tuple[str, ...] | None = None
    inplace = False
    if node.op == "call_method":
        name = str(target)
    elif node.op != "call_function":
        return None
    elif isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims"):
            return None
        name = target._schema.name.partition("::")[2]
        parameters = tuple(
            "input" if a.name == "self" else a.name for a in target._schema.arguments
        )
    elif target in _AUGMENTED:
        name, inplace = _AUGMENTED[target], True
    else:
        name = getattr(target, "__name__", "")
        if not any(getattr(home, name, None) is target for home in _HOMES):
            return None
        if target is torch.batch_norm:
            parameters = _ORDER_OF_TORCH_BATCH_NORM
    if name.endswith("_") and not name.endswith("__"):
        name, inplace = name[:-1], True
    name = _ALIASES.get(name, name)
    known = PARAMETERS.get(name)
    if known is None:
        return Op(name, {}, inplace or node.kwargs.get("inplace", False) is True)
    args: dict[str, Any] = dict(zip(parameters or known, node.args, strict=False))
    args.update((_ALIASES_OF_ARGUMENTS.get(k, k), v) for k, v in node.kwargs.items())
    inplace = inplace or args.get("inplace") is True
    return Op(name, args, inplace, True)


_ALIASES_OF_ARGUMENTS = {"self": "input", "tensor": "input", "axis": "dim", "keepdims": "keepdim"}


def is_idle_dropout(op: Op) -> bool:
    """Whether an operation is a dropout that drops nothing."""
    return op.name == "dropout" and (op.get("training", True) is False or op.get("p", 0.5) == 0)


def written(node: Node, op: Op | None) -> Iterator[Node]:
    """The arguments whose memory a node writes to: all of them for what is not PyTorch's own."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return
    if isinstance(target, torch._ops.OpOverload):
        given = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False))
        given.update(node.kwargs)
        for argument in target._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _nodes(given.get(argument.name))
        return
    if op is None:
        if isinstance(target, torch._ops.HigherOrderOperator) and not _bodies_write(node):
            return
        if target not in HARMLESS:
            yield from node.all_input_nodes
        return
    out = node.kwargs.get("out")
    if out is not None:
        yield from _nodes(out)
    if op.inplace or op.name == "setitem":
        yield from _nodes(node.args[0] if node.args else node.kwargs.get("input"))
    if op.name == "batch_norm" and op.get("training", False) is not False:
        for statistic in _STATISTICS:
            yield from _nodes(op.get(statistic))
    elif not op.known and op.name in ("instance_norm", "embedding", "embedding_bag"):
        yield from node.all_input_nodes


def _bodies_write(node: Node) -> bool:
    """Whether the graphs that a higher-order operator runs write to what they are given; True where
    they cannot be read."""
    owner = node.graph.owning_module
    bodies = [
        getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"
    ]
    graphs = [body.graph for body in bodies if isinstance(body, GraphModule)]
    return not graphs or any(_writes_to_inputs(graph) for graph in graphs)


def _writes_to_inputs(graph: Graph) -> bool:
    for node in graph.nodes:
        for target in written(node, read(node)):
            # Past views and in-place operators, to what made the memory.
            while target.op in ("call_function", "call_method"):
                op = read(target)
                if op is not None and op.known and not op.inplace and op.name not in _MAY_ALIAS:
                    break
                first = next((a for a in target.args if isinstance(a, Node)), None)
                if first is None:
                    break
                target = first
            else:
                return True
    return False


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


_MAY_ALIAS = VIEWS | CASTS | {
    "detach", "getitem", "chunk", "split", "dropout", "t", "permute", "slice",
}  # fmt: skip

#: Functions that are not in PyTorch's public homes and neither write nor keep what they get.
HARMLESS = frozenset((
    torch._C._autograd._get_data_attr,  # type: ignore[attr-defined]
    torch._C._log_api_usage_once,
    getattr, len, torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not,
    torch.sym_sum, torch._check,
))  # fmt: skip
