"""What a module is made of, as it was when it was recognised, to be checked before each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import itemgetter
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .namespaces import Asked, Unwatchable, asked_by, definitions, of_child, what_changed
from .watched import as_it_is, is_guarded, is_setting

Path = tuple[str, ...]  # names of children, from a module downwards
Foreign = Any  # a module of a class that is not known here
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Refusal(Exception):
    """A module cannot be fused; the message says why."""


class Rare(NamedTuple):
    """What few parts have, and what must stay so."""

    slots: tuple[tuple[str, str, bool], ...]  # what is registered: kind, name, whether it is None
    first: Path | None  # another name of the same object

    def holds(self, module: nn.Module, child: nn.Module) -> bool:
        """Whether it still is so; ``module`` is the one that was fused."""
        facts = child.__dict__
        for kind, name, empty in self.slots:
            if name not in facts[kind] or (facts[kind][name] is None) is not empty:
                return False
        return self.first is None or find(module, self.first) is child


class Quick(NamedTuple):
    """Of a part, what is compared before each call."""

    path: Path
    kind: type | None  # None: the module itself
    children: tuple[str, ...]  # their names, in order
    # Names of parameters and of buffers; () without any; None of PyTorch's own layers, which ask
    # for no others than they have.
    registered: tuple[frozenset[str], ...] | None
    read: Callable[[Any], Any] | None  # of the attributes that decide what it computes
    values: Any  # what that gave
    known: int  # number of attributes
    rare: Rare | None


class Part(NamedTuple):
    """A module or a child whose work the fused operation does, and what it was when recognised.

    ``quick`` is what is asked before each call. A new attribute may hide one of its class, or be
    one that its code asks for. ``lookups`` are what that finds elsewhere, in its class or not at
    all, on which compiled code guards.
    """

    path: Path  # (): the module itself, which may have become a subclass
    kind: type[nn.Module]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    known: frozenset[str]
    asked: Asked
    lookups: tuple[tuple[str, Any], ...]
    quick: tuple[Any, ...]  # a Quick


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


def find(module: nn.Module, path: Path) -> Foreign:
    """The child at ``path``. Raises KeyError where there is none."""
    for name in path:
        child = module._modules[name]
        if child is None:
            raise KeyError(name)
        module = child
    return module


# What every module has, and what conversion adds.
_OURS = frozenset(("_senet_form", "_senet_backend"))
OF_ANY_MODULE = frozenset(vars(nn.Module())) | _OURS
# Attributes of torch's own layers that their parameters say better: pruners change them on purpose.
_EXTENTS = frozenset(("in_channels", "out_channels", "in_features", "out_features"))
# Attributes of norms, which are called all the same.
_OF_NORMS = frozenset(("eps", "momentum", "num_features"))


def part_of(module: nn.Module, path: Path, words: frozenset[str] = frozenset()) -> Part:
    """The child at ``path`` as it is now.

    Args:
        words: what the code of ``module`` names, and may ask of a child.

    Raises:
        Refusal: something of it cannot be watched for changes.
    """
    child = find(module, path)
    facts = vars(child)
    ignored = OF_ANY_MODULE
    if path:
        unseen = frozenset(("inplace",))
        unseen |= _EXTENTS if isinstance(child, LINEAR) else frozenset()
        unseen |= _OF_NORMS if isinstance(child, _NormBase) else frozenset()
        ignored |= unseen - words
        _check_code(child, path)
    asked = asked_by(type(child))
    settings = {
        name: _watched(asked, name, value) for name, value in facts.items() if name not in ignored
    }
    names, values = tuple(settings), tuple(settings.values())
    ours = frozenset() if path else _OURS
    known = frozenset(facts) | ours
    words_of_class = asked.names & {"__class__", "_get_name", *(["type"] * asked.calls_type)}
    if not path and words_of_class - known:
        what = ", ".join(sorted(words_of_class))
        raise Refusal(f"its forward asks for its class ({what}), which is another when it is fused")
    lookups = _lookups(type(child), asked, known)
    lookups += tuple(
        (name, _UNGUARDED)
        for name, value in settings.items()
        if asked.asks_for(name) and not is_guarded(value)
    )
    quick = Quick(
        path, type(child) if path else None, tuple(child._modules), _registered(child),
        *_reader(names, values), len(known), _rare(module, child, path, words),
    )  # fmt: skip
    # A plain tuple is unpacked in a third of the instructions.
    return Part(path, type(child), names, values, known, asked, lookups, tuple(quick))


def _rare(module: nn.Module, child: nn.Module, path: Path, words: frozenset[str]) -> Rare | None:
    # Of a layer that is called, weight and bias are what they are at the call.
    is_called = isinstance(child, LINEAR) and not words & _OF_LAYERS
    slots = tuple(
        (kind, name, value is None)
        for kind in ("_parameters", "_buffers", "_modules")
        for name, value in vars(child)[kind].items()
        if (not is_called if isinstance(child, LINEAR) else value is None)
    )
    names = (other for other, same in descendants(module) if same is child)
    first = next(names, path)
    return Rare(slots, None if first == path else first) if slots or first != path else None


_OF_LAYERS = frozenset(("weight", "bias", "_parameters", "parameters", "named_parameters"))


def _check_code(child: nn.Module, path: Path) -> None:
    """Refuse a child whose code is not what it was when another of its class was recognised."""
    try:
        reason = what_changed(of_child(type(child))[1])
    except Unwatchable as unwatchable:
        reason = str(unwatchable)
    if reason is not None:
        raise Refusal(f"its child {'.'.join(path)}: {reason}")


def kinds_of(parts: tuple[Part, ...]) -> tuple[type[nn.Module], ...]:
    """The classes of children among parts."""
    return tuple(dict.fromkeys(part.kind for part in parts if part.path))


def _watched(asked: Asked, name: str, value: Any) -> Any:
    """A value to compare with later: of one that cannot be gone through, which it is."""
    try:
        return as_it_is(value)
    except Exception:  # TooLarge, or what its own code raises
        if name in asked.names or name in asked.strings:
            raise Refusal(f"its {name!r} cannot be watched for changes") from None
        return value


def _lookups(
    kind: type[nn.Module], asked: Asked, known: frozenset[str]
) -> tuple[tuple[str, Any], ...]:
    """What ``forward`` and what it calls may look up on a module and that the instance has no
    attribute for: functions and settings of its class, and names that need not be there."""
    found = []
    for name in sorted(asked.names | asked.strings):
        if name in known or name.startswith("__") or not name.isidentifier():
            continue
        value = next(definitions(kind, name), None)
        if value is not None:
            if isinstance(value, (staticmethod, classmethod, FunctionType)):
                # Not the function, which pickle finds by its name, patched by then perhaps.
                found.append((name, _METHOD if isinstance(value, FunctionType) else _STATIC))
            elif is_setting(value):
                found.append((name, value))
        elif name in asked.strings and not hasattr(kind, name):
            found.append((name, _ABSENT))
    return tuple(found)


# What a lookup finds, where that is no setting.
_ABSENT, _METHOD, _STATIC = "nothing of this name", "a method of the class", "another function"
# An attribute that compiled code cannot watch.
_UNGUARDED = "an object"


def _reader(
    names: tuple[str, ...], values: tuple[Any, ...]
) -> tuple[Callable[[Any], Any] | None, Any]:
    """Reads these names of a mapping at once; and what it gives. None: there are no names."""
    if not names:
        return None, ()
    if len(names) == 1:  # itemgetter would give no tuple
        names, values = names * 2, values * 2
    return itemgetter(*names), values


def _registered(child: nn.Module) -> tuple[frozenset[str], ...] | None:
    if type(child).__module__.startswith("torch.nn.modules."):
        return None
    names = frozenset(child._parameters), frozenset(child._buffers)
    return names if any(names) else ()


class Change(NamedTuple):
    """What is new of a part of a module; in words where somebody asks."""

    module: nn.Module
    part: Part

    def __str__(self) -> str:
        return _what_is_new(self.module, self.part)


def changed_reason(module: nn.Module, parts: tuple[Part, ...]) -> Change | None:
    """What has happened to a recognised module since, so that its own forward must run."""
    of_module = module.__dict__
    for part in parts:
        path, kind, children, registered, read, values, known, rare = part.quick
        child: Foreign = module
        facts = of_module
        try:
            for name in path:
                child = facts["_modules"][name]
                facts = child.__dict__
            if (
                # Ours on the left: it is asked first whether it equals the other.
                (read is None or values == read(facts))
                and (tuple(facts["_modules"]) == children if children else not facts["_modules"])
                and (
                    registered is None
                    or (
                        facts["_parameters"].keys() == registered[0]
                        and facts["_buffers"].keys() == registered[1]
                        if registered
                        else not (facts["_parameters"] or facts["_buffers"])
                    )
                )
                and (len(facts) == known or not _hidden(child, part))
                and (rare is None or rare.holds(module, child))
                and (
                    # Hooks of the module itself fire as ever: it is called. The rest of this is
                    # `not hook_reason(child)`, without the call.
                    kind is None
                    or (
                        type(child) is kind
                        and "forward" not in facts
                        and not (
                            facts["_forward_hooks"]
                            or facts["_forward_pre_hooks"]
                            or facts["_backward_hooks"]
                            or facts["_backward_pre_hooks"]
                        )
                    )
                )
            ):
                continue
        except Exception:  # None in a child's place; numbers of tensors; what `==` may raise
            pass
        return Change(module, part)
    return None


def guard(module: nn.Module, parts: tuple[Part, ...]) -> bool:
    """Read, while Dynamo traces, what may be changed later, so that it is guarded: whether all of
    it is as it was. What Dynamo cannot guard on, :func:`changed_reason` has seen at trace time."""
    for part in parts:
        child: Foreign = module
        try:
            for name in part.path:
                child = child._modules[name]
            if type(child) is not part.kind and part.path:
                return False
            if tuple(child._modules) != part.quick[_CHILDREN]:
                return False
            registered = part.quick[_REGISTERED]
            if registered is not None:
                for names, now in zip(
                    registered or ((), ()), (child._parameters, child._buffers), strict=True
                ):
                    if len(now) != len(names) or not all(name in now for name in names):
                        return False
            for name, value in part.lookups:
                if not _finds(child, name, value):
                    return False
            for name, value in zip(part.names, part.values, strict=True):
                if is_guarded(value) and getattr(child, name) != value:
                    return False
            if part.path and not _finds(child, "forward", _METHOD):
                return False
            rare = part.quick[_RARE]
            if rare is not None:
                for _, name, empty in rare.slots:
                    if (getattr(child, name) is None) is not empty:
                        return False
                if rare.first is not None and find(module, rare.first) is not child:
                    return False
            if part.path and hook_reason(child) is not None:
                return False
        except (AttributeError, KeyError):
            return False
    return True


# Dynamo guards what is read of a tuple: of a Quick's fields these alone.
_CHILDREN, _REGISTERED, _RARE = map(Quick._fields.index, ("children", "registered", "rare"))


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
    new = frozenset(vars(child).keys() - part.known)
    return _hides(type(child), part.asked, new)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)  # asked before each call of a module that was given an attribute
def _hides(kind: type[nn.Module], asked: Asked, new: frozenset[str]) -> str | None:
    return next((n for n in sorted(new) if asked.asks_for(n) or hasattr(kind, n)), None)


def _what_is_new(module: nn.Module, part: Part) -> str:
    its = f"its child {'.'.join(part.path)}" if part.path else "it"
    try:
        child = find(module, part.path)
    except KeyError:
        return f"{its} is gone"
    if part.path:
        if type(child) is not part.kind:
            return f"{its} is a {type(child).__name__}"
        reason = hook_reason(child)
        if reason is not None:
            return f"{its} {reason}"
    facts = vars(child)
    quick = Quick(*part.quick)
    if tuple(child._modules) != quick.children:
        return f"{its} has other children, or in another order"
    if quick.registered not in (None, _registered(child)):
        return f"{its} has other parameters or buffers"
    if quick.rare is not None and not quick.rare.holds(module, child):
        return f"{its} has something where it had nothing, or is no longer one with another child"
    for name, value in zip(part.names, part.values, strict=True):
        if name not in facts:
            return f"{its} has no attribute {name!r} any more"
        try:
            same = bool((value,) == (facts[name],))
        except Exception:
            same = False
        if not same:
            return f"{its} has another {name!r} than when it was fused"
    hidden = _hidden(child, part)
    return f"{its} has a {hidden!r} of its own" if hidden else f"{its} is not what it was"


def descendants(module: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            yield tuple(name.split(".")), child


def parts_of(module: nn.Module, *, called: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """All descendants, but for those under the children in ``called``, which still are called."""
    return tuple(part_of(module, path) for path, _ in descendants(module) if path[0] not in called)
