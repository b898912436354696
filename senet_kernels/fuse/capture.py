"""The forward of one module as a graph, by Dynamo. Nothing is run: the module is interpreted with
fake tensors, and whatever it does besides the graph's operations is a reason to give up.
"""

from __future__ import annotations

import ast
import dis
import logging
import random
import re
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from senet_kernels.watched import codes_in

_TORCH = str(Path(torch.__file__).parent)
#: Dynamo has state of its own.
_LOCK = threading.RLock()


class NotCaptured(Exception):
    """A module's forward is not all in one graph; the message says why."""

    fails = False  # whether it is because the forward raises


class Capture(NamedTuple):
    """The graph of a forward, and what of the module and its surroundings it was made from."""

    module: GraphModule
    x: Node
    tensors: dict[Node, tuple[str, Tensor]]  # parameters and buffers among its inputs, with names
    words: frozenset[str]  # names and strings in the code that was read, PyTorch's own aside
    reads_training: bool
    any_extents: bool  # an operator of PyTorch's, no branch, may have tied it to those of x


def capture(module: nn.Module, x: Tensor) -> Capture:
    """The graph of ``module.forward(x)``, valid for all extents of x but its channels.

    The module's own hooks are not part of it. A forward that needs several graphs, changes what
    outlives it, branches on numbers, extents, or on what may change unseen between calls, or
    returns anything but one tensor has no such graph.

    Raises:
        NotCaptured: so it is; or this PyTorch lacks what this takes.
    """
    with _LOCK, _quiet(), _random_numbers_kept():
        output = _interpret(module, x)
        found = output.graph_capture_output
        if output.backend_input is None:
            raise NotCaptured("it computes nothing of x")
        _check_code(found.bytecode)
        for guard in found.output_graph.guards:
            _check_guard(guard, found.output_graph)
        _check_extents(output.backend_input.fake_mode.shape_env, x)
        token = object()
        run = output.forward_callable(compiled_fn=lambda *_: (token,))
        graph = output.backend_input.graph_module
        returned = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        if len(returned) != 1 or run(module, x) is not token:
            raise NotCaptured("it returns something else than one tensor")
        node, tensors = _inputs(output.backend_input, module, x)
    training = any(guard.name.endswith(".training") for guard in found.output_graph.guards)
    fake = node.meta["example_value"]
    free = [isinstance(n, torch.SymInt) and n.node.maybe_as_int() is None for n in fake.shape]
    return Capture(
        graph, node, tensors, _words(found.traced_code), training, all(free[:1] + free[2:])
    )


def _interpret(module: nn.Module, x: Tensor) -> Any:
    try:
        import torch.fx.experimental._config as shapes
        from torch._dynamo import config, mark_dynamic
        from torch._dynamo.convert_frame import fullgraph_capture
        from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
        from torch._dynamo.utils import get_metrics_context
    except ImportError as error:
        raise NotCaptured(f"this PyTorch has no Dynamo that captures it: {error}") from error
    for dim in (0, *range(2, x.dim())):
        mark_dynamic(x, dim)
    try:
        dynamo = cast("Any", config)  # which has its functions from run time
        # Numbers are what they are now, whatever Dynamo has seen of this code before.
        options = {
            "side_effect_replay_policy": "error", "reorderable_logging_functions": set(),
            "automatic_dynamic_shapes": False, "specialize_float": True,
        }  # fmt: skip
        with (
            get_metrics_context(),
            dynamo.patch({name: v for name, v in options.items() if hasattr(config, name)}),
            cast("Any", shapes).patch(backed_size_oblivious=True),
        ):
            return fullgraph_capture(module.forward, (x,))
    except TorchRuntimeError as error:
        what = f"it fails on {x.dim()}-dimensional input: {_cause(error)}{_place(error)}"
        raise _failed(what) from error
    except TorchDynamoException as error:
        raise NotCaptured(f"Dynamo cannot trace it: {_cause(error)}{_place(error)}") from error
    except RuntimeError as error:
        message, _, changed = str(error).partition("double check: ")
        if "side effects" not in message:
            raise NotCaptured(f"Dynamo cannot trace it: {_cause(error)}") from error
        what = ", ".join(dict.fromkeys(map(_source, ast.literal_eval(changed or "[]"))))
        raise NotCaptured(f"its forward changes what outlives it: {what}") from error
    except Exception as error:  # whatever a stranger's module raises
        what = f"{type(error).__name__}: {_cause(error)}"
        raise _failed(f"it fails on {x.dim()}-dimensional input: {what}") from error


def _failed(message: str) -> NotCaptured:
    error = NotCaptured(message)
    error.fails = True
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and logged errors about what is refused anyway, with the reason."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Python's own: Dynamo draws some where a forward does."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _cause(error: BaseException) -> str:
    """The lines of an error of Dynamo's that say what it is about."""
    failed = re.search(r"got (\w+)\([\"'](.*?)[\"']\)", str(error))
    if failed is not None:
        return f"{failed[1]}: {failed[2].partition(chr(92))[0]}"[:200]
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines[:1] if line]
    kept += [line.partition(": ")[2] for line in lines if line.startswith("Explanation:")]
    return " ".join(": ".join(kept).split())[:300]


def _place(error: BaseException) -> str:
    frames = re.findall(r'File "([^"]*)", line (\d+)', str(error))
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return f" ({Path(own[-1][0]).name}:{own[-1][1]})" if own else ""


def _source(name: str) -> str:
    """A source of Dynamo's as people write it: ``self.fc1.weight``, ``LOG``."""
    name = re.sub(r"\.__dict__\['(\w+)'\]", r".\1", name)
    name = re.sub(r"\.?\b_(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", name)
    return re.sub(r"\b[LG]\['([^']*)'\]", r"\1", name)


#: What Dynamo itself puts around a graph: its call, and, for PyTorch's profiler, its time.
_DYNAMOS = (
    "__compiled_fn", "__import_torch_dot__dynamo", "__import_torch_dot_autograd_dot_profiler",
)  # fmt: skip


def _check_code(code: types.CodeType) -> None:
    """Refuse code around the graph that does more than to call it."""
    for step in dis.get_instructions(code):
        name = str(step.argval)
        stores = step.opname.startswith(("STORE_", "DELETE_")) and "FAST" not in step.opname
        if "hook" in name and step.opname.startswith("LOAD_"):
            raise NotCaptured("its forward registers a hook on a tensor")
        if stores or (step.opname == "LOAD_GLOBAL" and not name.startswith(_DYNAMOS)):
            what = "sets an attribute" if step.opname == "STORE_ATTR" else "does more than compute"
            raise NotCaptured(f"its forward {what} ({step.opname} {name})")


#: Guards on what a name stands for: a module, a function, a class. They are code, not state.
_CODE = frozenset((
    "MODULE_MATCH", "FUNCTION_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "HASATTR",
    "DUPLICATE_INPUT", "NAME_MATCH", "SHAPE_ENV", "NOT_PRESENT_IN_GENERIC_DICT",
))  # fmt: skip
_OWN_TENSOR = re.compile(r"\._(?:parameters|buffers)\['[^']*'\]$")
_OWN = re.compile(r"L\['(\w+)'\]((?:\._modules\['[^']*'\])*)(.*)", re.DOTALL)


def _check_guard(guard: Any, scope: Any) -> None:
    """Refuse to depend on what may change between calls and is not seen then: state outside the
    module, and state of objects that it holds."""
    name, kind = guard.name, guard.create_fn_name()
    own = _OWN.match(name)
    argument = None if own is None else scope.local_scope.get(own[1])
    if isinstance(argument, (list, set)):  # a default of its own: no caller gives it
        raise NotCaptured(f"its forward reads {_source(name)}, which may change unseen")
    if kind == "HASATTR" and isinstance(argument, Tensor):
        raise NotCaptured(f"its forward asks for an attribute of {_source(name)} that it has not")
    twin = _other(guard) if kind == "DUPLICATE_INPUT" else ""
    if twin and (_OWN_TENSOR.search(name) or _OWN_TENSOR.search(twin)):
        both = f"{_source(name)} and {_source(twin)}"
        raise NotCaptured(f"its forward reads {both}, one tensor that may become two unseen")
    if kind == "TENSOR_MATCH" and isinstance(argument, nn.Module) and not _OWN_TENSOR.search(name):
        raise NotCaptured(f"its forward reads {_source(name)}, which may become another unseen")
    if kind in _CODE or not name:
        return
    if name.startswith("G["):
        root, _, rest = name[3:].partition("']")
        value = scope.global_scope.get(root)
        if root.startswith(("__builtins", "__import_torch")) or _is_of_torch(value):
            return
        if isinstance(value, (type, types.FunctionType)) and kind in ("TYPE_MATCH", "ID_MATCH"):
            return
        if isinstance(value, type) and _is_of_torch(_definition(value, rest.removeprefix("."))):
            return
        if not rest and isinstance(value, (int, float, complex, str, tuple, type(None))):
            return
        raise NotCaptured(f"its forward reads {_source(name)}, which may change unseen")
    if own is None or not own[3].startswith("."):
        return
    # An attribute of an attribute that is no module, parameter, hook or plain container.
    steps = re.findall(r"\.(\w+)", own[3])
    if len(steps) > 1 and not steps[0].startswith(("_", "forward")):
        raise NotCaptured(
            f"its forward reads {_source(name)}, of an object whose changes are not seen"
        )


def _other(guard: Any) -> str:
    """The other name of what a guard says is one object."""
    source = getattr(guard.create_fn, "keywords", {}).get("source_b")
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _definition(cls: type, name: str) -> type | None:
    """The class that an attribute of a class is written in."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def _is_of_torch(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        name = value.__name__
    else:
        name = value.__module__ if isinstance(value, type) else type(value).__module__
    return str(name).partition(".")[0] == "torch"


def _check_extents(shapes: Any, x: Tensor) -> None:
    """Refuse a graph that is for some extents only: one with a branch of the module's on them.
    PyTorch's own operators ask, too; what they ask is about operands that are no extents of x."""
    for guard in shapes.guards:
        asked = str(guard.sloc)
        is_branch = "evaluate_expr" in asked or "symbolic_convert.py" in asked  # the latter: assert
        if is_branch and "torch" not in asked.partition("#")[2].partition(" ")[0]:
            where = asked.partition("#")[2].split(" in ")[0].strip()
            raise NotCaptured(f"its forward branches on the extents of x ({guard.expr}; {where})")


def _inputs(
    backend: Any, module: nn.Module, x: Tensor
) -> tuple[Node, dict[Node, tuple[str, Tensor]]]:
    """The node of x, and those of the module's own tensors, renamed as the module calls them."""
    names = {id(t): name for name, t in module.named_parameters()}
    names |= {id(t): name for name, t in module.named_buffers()}
    nodes = [n for n in backend.graph_module.graph.nodes if n.op == "placeholder"]
    found: Node | None = None
    tensors: dict[Node, tuple[str, Tensor]] = {}
    for node, value in zip(nodes, backend.example_inputs, strict=True):
        if value is x:
            node._rename("x")
            found = node
        elif isinstance(value, Tensor):
            if id(value) not in names:
                raise NotCaptured(f"it reads a tensor that is no parameter of its own, {node}")
            node._rename(names[id(value)].replace(".", "_"))
            tensors[node] = (names[id(value)], value)
        elif not isinstance(value, (int, torch.SymInt)):
            raise NotCaptured(f"it reads a value from outside, {node}")
    if found is None:
        raise NotCaptured("it computes nothing of x")
    return found, tensors


def _words(codes: list[types.CodeType]) -> frozenset[str]:
    words: set[str] = set()
    for outer in codes:
        if not outer.co_filename.startswith(_TORCH):
            for code in codes_in(outer):
                words.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
    return frozenset(words)
