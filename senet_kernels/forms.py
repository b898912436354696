"""What a squeeze-and-excitation module of any make computes, and what it is made of.

A form says how the operation computes a module's forward; parts are the children whose work that
does, to be checked for changes before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .pointwise import POINTWISE
from .validation import DTYPES
from .watched import as_it_is, classes_of, is_guarded, is_setting

Path = tuple[str, ...]  # names of children, from a module downwards
Foreign = Any  # a module of a class that is not known here


class Refusal(Exception):
    """A module cannot be fused; the message says why."""


class Part(NamedTuple):
    """A child whose work the fused operation does, and what it was when recognised.

    ``names`` are the attributes that decide what it computes, read at once by ``read``: one call
    and one comparison before each call of the module. ``known`` are all its attributes then: a new
    one may hide one of its class, or be one that its functions ask for. ``lookups`` are what those
    find elsewhere, in its class or not at all, on which compiled code guards.
    """

    path: Path  # (): the module itself, which may have become a subclass
    kind: type[nn.Module]
    children: int
    own: int  # parameters and buffers, of a module that is not a child
    names: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]]
    values: tuple[Any, ...]
    known: frozenset[str]
    lookups: tuple[tuple[str, Any], ...]


class Mlp(NamedTuple):
    """A block whose excitation is one or two layers: ``squeeze_excite`` computes all of it."""

    fc1: Path | None  # None: a single layer
    fc2: Path
    activation: str
    gate: str
    parts: tuple[Part, ...]
    residual: Callable[[Foreign, Tensor], Tensor] | None = None  # what is added to the product
    ranks: tuple[int, ...] = (4,)  # numbers of dimensions of x it was recognised for
    # Its second argument, `lengths`, as squeeze_excite takes it; None: it has no such argument.
    lengths: Callable[[Tensor, Tensor], Tensor] | None = None
    # Whether it follows autocast; one that leaves it, or casts by itself, runs there as it is.
    autocast: bool = True
    dtypes: tuple[torch.dtype, ...] = DTYPES  # of x; one that casts may compute otherwise in some


class Halves(NamedTuple):
    """A block with any other excitation, which runs between ``squeeze`` and ``channel_scale``."""

    excite: Callable[[Foreign, Tensor], Tensor]  # (module, z [B, C]) -> pre-gate u [B, C]
    gate: str
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = (4,)


Form = Mlp | Halves


def class_name(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


# ---- the pieces: pointwise functions and layers ----

_TORCH = "torch.nn.modules.activation."
_TIMM = "timm.layers.activations."
_TIMM_ME = "timm.layers.activations_me."
_TRANSFORMERS = "transformers.activations."

#: Further classes of pointwise modules by the table's names, beside torch's own, which have the
#: same names but for case. Arguments are checked in ``pointwise_name``.
_POINTWISE_CLASSES: dict[str, tuple[str, ...]] = {
    "identity": ("torch.nn.modules.linear.Identity",),
    "silu": (_TIMM + "Swish", _TIMM_ME + "SwishMe"),
    "gelu": (_TIMM + "GELU", _TRANSFORMERS + "GELUActivation"),
    "gelu_tanh": (_TIMM + "GELUTanh",),
    "hardswish": (_TIMM + "HardSwish", _TIMM_ME + "HardSwishMe"),
    "mish": (_TIMM + "Mish", _TIMM_ME + "MishMe"),
    "sigmoid": (_TIMM + "Sigmoid",),
    "hardsigmoid": (_TIMM + "HardSigmoid", _TIMM_ME + "HardSigmoidMe"),
    "tanh": (_TIMM + "Tanh",),
}
_LOWER_CASE = {name.replace("_", ""): name for name in POINTWISE}
_POINTWISE_NAMES = {
    _TORCH + c: _LOWER_CASE[c.lower()]
    for c in nn.modules.activation.__all__
    if c.lower() in _LOWER_CASE
} | {c: name for name, classes in _POINTWISE_CLASSES.items() for c in classes}
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pointwise_name(module: nn.Module) -> str | None:
    """The table's name for a pointwise module; None where the table has no such function."""
    name = _POINTWISE_NAMES.get(class_name(module))
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != 0.01:
        return None
    return name


def hook_reason(module: nn.Module) -> str | None:
    """Why a module must really be called rather than computed elsewhere; None if it need not."""
    facts = module.__dict__
    if "forward" in facts:
        return "has its own forward"
    if (
        facts["_forward_hooks"]
        or facts["_forward_pre_hooks"]
        or facts["_backward_hooks"]
        or facts["_backward_pre_hooks"]
    ):
        return "has hooks"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def not_a_matrix(layer: nn.Module) -> str | None:
    """Why a layer is not just a matrix and a bias on ``[B, C]``; None if it is."""
    if type(layer) not in LINEAR:
        return f"is a {type(layer).__name__}"
    if isinstance(layer, nn.Linear):
        return None
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ones = tuple(1 for _ in layer.kernel_size)
    padded = layer.padding not in ("valid", "same", tuple(0 for _ in ones))
    if layer.kernel_size != ones or layer.stride != ones or layer.groups != 1 or padded:
        return "is not a plain 1x1 convolution"
    return None


def find(module: nn.Module, path: Path) -> Foreign:
    """The child at ``path``. Raises KeyError where there is none."""
    for name in path:
        child = module._modules[name]
        if child is None:
            raise KeyError(name)
        module = child
    return module


# What every module has, and what conversion adds.
_OF_ANY_MODULE = frozenset((*vars(nn.Module()), "_senet_form", "_senet_backend"))
# Attributes of torch's own layers that their parameters say better: pruners change them on purpose.
_EXTENTS = frozenset(("in_channels", "out_channels", "in_features", "out_features"))
# Attributes of norms, which are called all the same.
_OF_NORMS = frozenset(("eps", "momentum", "num_features"))
# What torch's layers call, which some patch: kernels do what it did when this was imported.
_FUNCTIONAL = vars(F)
_read_functions = itemgetter("conv1d", "conv2d", "conv3d", "linear")
_FUNCTIONS = _read_functions(_FUNCTIONAL)
_CONV1D, _CONV2D, _CONV3D = (c._conv_forward for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_LAYERS_ARE_TORCHS = all(isinstance(f, BuiltinFunctionType) for f in _FUNCTIONS) and {
    f.__code__.co_filename for f in (_CONV1D, _CONV2D, _CONV3D)
} == {nn.modules.conv._ConvNd.extra_repr.__code__.co_filename}
_REPLACED = "a function that torch's layers call has been replaced"

#: The forward of each class of children, when the first of it was recognised or called: whoever
#: patches ``nn.Conv2d.forward`` later means the layers of fused modules too.
_FORWARDS: dict[type[nn.Module], Any] = {}


def part_of(module: nn.Module, path: Path) -> Part:
    """The child at ``path`` as it is now.

    Raises:
        Refusal: its class has been patched since another of it was recognised.
    """
    child = find(module, path)
    if not _LAYERS_ARE_TORCHS:
        raise Refusal(_REPLACED)
    if path and not _is_as_known(type(child)):
        raise Refusal(f"its child {'.'.join(path)} is of a class whose forward was changed")
    ignored = _OF_ANY_MODULE
    if path:
        ignored |= {"inplace"}
        ignored |= _EXTENTS if isinstance(child, LINEAR) else frozenset()
        ignored |= _OF_NORMS if isinstance(child, _NormBase) else frozenset()
    settings = {
        name: _watched(type(child), name, value)
        for name, value in vars(child).items()
        if name not in ignored
    }
    # Hooks of the module itself fire as ever: it is called.
    hooks: dict[str, Any] = {name: {} for name in (_HOOKS if path else ())}
    facts = {**settings, **hooks}
    names = tuple(facts)
    known = frozenset(vars(child)) | (frozenset() if path else {"_senet_form", "_senet_backend"})
    names_asked = frozenset().union(*_asked_by_class(type(child)))
    if not path and ({"type", "__class__"} & names_asked) - known:
        raise Refusal("its forward asks for its class, which is another one when it is fused")
    lookups = _lookups(type(child), known)
    lookups += tuple(
        (name, _UNGUARDED)
        for name, value in settings.items()
        if name in names_asked and not is_guarded(value)
    )
    return Part(
        path, type(child), len(child._modules), _own(vars(child)), names, _reader(names),
        tuple(facts.values()), known, lookups,
    )  # fmt: skip


def _watched(kind: type[nn.Module], name: str, value: Any) -> Any:
    """A value to compare with later: of one that cannot be gone through, which it is."""
    try:
        return as_it_is(value)
    except Exception:  # TooLarge, or what its own code raises
        if any(name in asked for asked in _asked_by_class(kind)):
            raise Refusal(f"its {name!r} cannot be watched for changes") from None
        return value


def _lookups(kind: type[nn.Module], known: frozenset[str]) -> tuple[tuple[str, Any], ...]:
    """What ``forward`` and what it calls may look up on a module and that the instance has no
    attribute for: functions and settings of its class, and names that need not be there."""
    of_class = _namespace(kind)
    names, strings = _asked_by_class(kind)
    found = []
    for name in sorted(names | strings):
        if name in known or name.startswith("__") or not name.isidentifier():
            continue
        if name in of_class:
            value = of_class[name]
            if isinstance(value, (staticmethod, classmethod, FunctionType)):
                # Not the function, which pickle finds by its name, patched by then perhaps.
                found.append((name, _METHOD if isinstance(value, FunctionType) else _STATIC))
            elif is_setting(value):
                found.append((name, value))
        elif name in strings and not hasattr(kind, name):
            found.append((name, _ABSENT))
    return tuple(found)


def _namespace(kind: type[nn.Module]) -> dict[str, Any]:
    of_class: dict[str, Any] = {}
    for cls in reversed(classes_of(kind)):
        of_class |= vars(cls)
    return of_class


def _asked_by_class(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    return _asked_by_forward(_namespace(kind))


def _asked_by_forward(of_class: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Attribute names in the code of ``forward`` and of the functions that it names, and strings
    there, which ``getattr`` may be given."""
    names: set[str] = set()
    strings: set[str] = set()
    waiting, seen = ["forward"], set()
    while waiting:
        value = of_class.get(waiting.pop())
        code = getattr(getattr(value, "__func__", value), "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        new = set(code.co_names) - names
        names |= new
        strings |= {c for c in code.co_consts if isinstance(c, str)}
        waiting += new
    return frozenset(names), frozenset(strings)


# What a lookup finds, where that is no setting.
_ABSENT, _METHOD, _STATIC = "nothing of this name", "a method of the class", "another function"
# An attribute that compiled code cannot watch.
_UNGUARDED = "an object"


def _is_as_known(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is what it was when first asked; of torch's own, its own."""
    forward = kind.forward
    if kind in _FORWARDS:
        return forward is _FORWARDS[kind]
    if kind.__module__.startswith("torch.nn.") and forward.__module__ != kind.__module__:
        defined = next(cls for cls in kind.__mro__ if "forward" in vars(cls))
        if forward.__module__ != defined.__module__:
            return False
    _FORWARDS[kind] = forward
    return True


def _reader(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """Reads these names of a mapping at once."""
    return itemgetter(*names) if len(names) > 1 else partial(_read_few, names)


def _read_few(names: tuple[str, ...], facts: dict[str, Any]) -> tuple[Any, ...]:
    """What ``itemgetter`` does not give as a tuple: one value, or none."""
    return tuple(facts[name] for name in names)


def _own(facts: Any) -> int:
    return len(facts["_parameters"]) + len(facts["_buffers"])


def stale_reason(module: nn.Module, parts: tuple[Part, ...]) -> str | None:
    """What has happened to a recognised module since, so that its own forward must run."""
    if (
        _read_functions(_FUNCTIONAL) != _FUNCTIONS
        or nn.Conv2d._conv_forward is not _CONV2D
        or nn.Conv1d._conv_forward is not _CONV1D
        or nn.Conv3d._conv_forward is not _CONV3D
    ):
        return _REPLACED
    of_module = module.__dict__
    for part in parts:
        path, kind, children, own, _, read, values, known, _ = part
        child: Foreign = module
        facts = of_module
        try:
            for name in path:
                child = facts["_modules"][name]
                facts = child.__dict__
            as_it_was = (
                values == read(facts)
                and len(facts["_modules"]) == children
                and (len(facts) == len(known) or not _hidden(child, part))
                and (
                    (
                        type(child) is kind
                        and (kind.forward is _FORWARDS.get(kind) or _is_as_known(kind))
                        and "forward" not in facts
                    )
                    if path
                    else _own(facts) == own
                )
            )
        # None in a child's place; and numbers of other tensors are not compared.
        except (AttributeError, KeyError, RuntimeError, ValueError):
            as_it_was = False
        if not as_it_was:
            return _what_is_new(module, part)
    return None


def guard(module: nn.Module, parts: tuple[Part, ...]) -> bool:
    """Read, while Dynamo traces, what may be changed later, so that it is guarded: whether all of
    it is as it was. What Dynamo cannot guard on, :func:`stale_reason` has seen at trace time."""
    for part in parts:
        child: Foreign = module
        try:
            for name in part.path:
                child = child._modules[name]
            if type(child) is not part.kind and part.path:
                return False
            for name, value in part.lookups:
                if not _finds(child, name, value):
                    return False
            for name, value in zip(part.names, part.values, strict=True):
                if name not in _HOOKS and is_guarded(value) and getattr(child, name) != value:
                    return False
            if part.path and not _finds(child, "forward", _METHOD):
                return False
            if part.path and hook_reason(child) is not None:
                return False
        except (AttributeError, KeyError):
            return False
    return True


def _finds(child: Foreign, name: str, value: Any) -> bool:
    if value is _UNGUARDED:
        return False
    if value is _ABSENT:
        return not hasattr(child, name)
    found = getattr(child, name)
    if value is _METHOD:
        return bool(found.__func__ is getattr(type(child), name))
    if value is _STATIC:
        return bool(found == getattr(type(child), name))
    return bool(found == value)


def _hidden(child: nn.Module, part: Part) -> str | None:
    """An attribute that is new and hides one of its class, or that its class asks for."""
    new = vars(child).keys() - part.known
    asked = {name for name, _ in part.lookups}
    return next((n for n in sorted(new) if n in asked or hasattr(type(child), n)), None)


def _what_is_new(module: nn.Module, part: Part) -> str:
    its = f"its child {'.'.join(part.path)}" if part.path else "it"
    try:
        child = find(module, part.path)
    except KeyError:
        return f"{its} is gone"
    if part.path:
        if type(child) is not part.kind:
            return f"{its} is a {type(child).__name__}"
        if not _is_as_known(part.kind):
            return f"the class of {its} has another forward than when it was fused"
        reason = hook_reason(child)
        if reason is not None:
            return f"{its} {reason}"
    facts = vars(child)
    if len(child._modules) != part.children:
        return f"{its} has other children"
    if not part.path and _own(facts) != part.own:
        return f"{its} has other parameters or buffers"
    for name, value in zip(part.names, part.values, strict=True):
        if name not in facts:
            return f"{its} has no attribute {name!r} any more"
        try:
            same = bool((value,) == (facts[name],))
        except (RuntimeError, ValueError):
            same = False
        if not same:
            return f"{its} has another {name!r} than when it was fused"
    hidden = _hidden(child, part)
    return f"{its} has a {hidden!r} of its own" if hidden else f"{its} is not what it was"


#: A class, and its functions at some time: a reader of its namespace, and what it gave.
Functions = tuple[tuple[type, Callable[[Any], tuple[Any, ...]], tuple[Any, ...]], ...]


def functions_of(kind: type[nn.Module]) -> Functions:
    """What a module of a class may call of it, from the class up to torch's Module."""
    found = []
    for cls in classes_of(kind):
        names = tuple(n for n, v in vars(cls).items() if not n.startswith("__"))
        found.append((cls, _reader(names), tuple(vars(cls)[n] for n in names)))
    return tuple(found)


def is_patched(functions: Functions) -> bool:
    """Whether a class has other functions than it had."""
    try:
        for cls, read, values in functions:
            if read(cls.__dict__) != values:
                return True
    # Gone; or a tensor, which is not compared.
    except (KeyError, RuntimeError, ValueError):
        return True
    return False


def own_parameter(layer: Foreign, name: str) -> Any:
    """``getattr(layer, name)``, which is slow to find a parameter: it looks elsewhere first."""
    try:
        return layer.__dict__["_parameters"][name]
    except KeyError:  # made by hand, or by a hook
        return getattr(layer, name)


def weight_and_bias(layer: Foreign) -> tuple[Any, Any]:
    """Both at once."""
    try:
        owned = layer.__dict__["_parameters"]
        return owned["weight"], owned["bias"]
    except KeyError:
        return layer.weight, layer.bias


def descendants(module: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            yield tuple(name.split(".")), child


def parts_of(module: nn.Module, *, called: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """All descendants, but for those under the children in ``called``, which still are called."""
    return tuple(part_of(module, path) for path, _ in descendants(module) if path[0] not in called)


def own_input(module: Foreign, x: Tensor) -> Tensor:
    return x


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
