"""Values of a module's attributes as they were, to be compared with what they are: also those whose
owner changes them in place, as lists, configuration objects and tensors."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SETTINGS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, FunctionType,
             BuiltinFunctionType, type, Enum)  # fmt: skip
#: Modules whose contents are taken to stay what they are.
LIBRARIES = frozenset(("torch", *sys.stdlib_module_names)) - {"__main__"}
INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
# More objects than this in an attribute are not gone through before each call, nor more elements.
_MOST_OBJECTS, _MOST_ELEMENTS = 64, 4096


class TooLarge(Exception):
    """A value holds more than is gone through before each call."""


def is_setting(value: Any) -> bool:
    """Whether a value cannot be changed in place, so that it is compared as it is."""
    if isinstance(value, tuple):
        return all(map(is_setting, value))
    return isinstance(value, _SETTINGS)


def is_guarded(value: Any) -> bool:
    """Whether Dynamo can guard on what :func:`as_it_is` made of a value."""
    if type(value) is dict:
        return all(map(is_guarded, value.values()))
    return all(map(is_guarded, value)) if type(value) in (list, set) else is_setting(value)


class Snapshot:
    """An object or a tensor as it was. It equals what is the same now; the one that was, or a copy.

    ``state`` is made by ``read``, which is called again for what it is compared with.
    """

    def __init__(self, read: Callable[[Any], Any], value: Any) -> None:
        self.read, self.state = read, read(value)

    def __eq__(self, other: object) -> bool:
        try:
            now = other.state if isinstance(other, Snapshot) else self.read(other)
            return bool(self.state == now)
        except (AttributeError, TypeError, ValueError, RuntimeError, TooLarge):
            return False

    __hash__ = None  # type: ignore[assignment]


class _Contents:
    """A tensor's numbers: ``==`` of tensors is a tensor."""

    def __init__(self, t: Tensor) -> None:
        self.t = t.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Contents):
            return False
        a, b = self.t, other.t
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    __hash__ = None  # type: ignore[assignment]


def _of_tensor(t: Any) -> Any:
    if not isinstance(t, Tensor):
        raise TypeError
    if t.numel() > _MOST_ELEMENTS:
        raise TooLarge
    return type(t), t.requires_grad, _Contents(t)


def _of_array(value: Any) -> Any:
    if memoryview(value).nbytes > 8 * _MOST_ELEMENTS:
        raise TooLarge
    return (
        type(value),
        str(getattr(value, "dtype", "")),
        getattr(value, "shape", ()),
        value.tobytes(),
    )


def _of_deque(value: Any) -> Any:
    return type(value), list(map(as_it_is, value))


def _of_method(value: Any) -> Any:
    return as_it_is(value.__func__), _Same(value.__self__)


class _Same:
    """An object that is to be the same one; a module, whose attributes others watch."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _of_partial(value: Any) -> Any:
    return as_it_is(value.func), list(map(as_it_is, value.args)), as_it_is(value.keywords)


def _of_object(value: Any) -> Any:
    """The class, and the attributes, of its own and in slots."""
    kind = type(value)
    if isinstance(value, nn.Module):  # one that is no child
        return kind, _contents({n: v for n, v in vars(value).items() if n not in _OF_OTHERS})
    slots = [n for cls in kind.__mro__ for n in _slots(cls) if hasattr(value, n)]
    own = getattr(value, "__dict__", {})
    return kind, _contents(own), {n: as_it_is(getattr(value, n)) for n in slots}


_OF_OTHERS = ("training", "_parameters", "_buffers")


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))


def _of_function(value: Any) -> Any:
    """A function of the user's: its code, defaults, closure, and the globals that it names."""
    code = value.__code__
    found: dict[str, Any] = {}
    for name in names_in(code) & value.__globals__.keys():
        named = value.__globals__[name]
        if not isinstance(named, ModuleType):
            found[name] = as_it_is(named)
        elif package_of(named) not in LIBRARIES:
            raise TooLarge
    defaults = value.__defaults__, value.__kwdefaults__
    cells = [cell.cell_contents for cell in cells_of(value)]
    return _Code(code), as_it_is(defaults), as_it_is(cells), found


class _Code:
    """The code of a function; pickled as a digest of it."""

    def __init__(self, code: CodeType | str) -> None:
        self.code = code

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Code):
            return False
        if isinstance(self.code, str) and isinstance(other.code, CodeType):
            if self.code != digest_of(other.code):
                return False
            self.code = other.code
        return self.code == other.code

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        code = self.code
        return _Code, (code if isinstance(code, str) else digest_of(code),)


def is_installed(function: FunctionType) -> bool:
    """Whether a function is a library's: of those, that it is the same one is enough."""
    return function.__code__.co_filename.startswith(INSTALLED)


def cells_of(function: FunctionType) -> list[CellType]:
    """The cells of its closure that have a value so far."""
    return [cell for cell in function.__closure__ or () if cell != CellType()]


def root_of(name: Any) -> str:
    """The package of a module's name."""
    return str(name).partition(".")[0]


def package_of(owner: Any) -> str:
    """The package of a module, or of what says which module it is of."""
    return root_of(owner.__name__ if isinstance(owner, ModuleType) else owner.__module__)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def names_in(code: CodeType) -> frozenset[str]:
    """Names of globals and attributes in a function's code."""
    return frozenset(name for inner in codes_in(code) for name in inner.co_names)


def _of_class(value: Any) -> Any:
    """Settings that a class is used to hold."""
    return value, {n: v for cls in value.__mro__ for n, v in vars(cls).items()
                   if not n.startswith("__") and is_setting(v)}  # fmt: skip


def _contents(value: Any) -> dict[Any, Any]:
    return {key: as_it_is(v) for key, v in value.items()}


_READERS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (Tensor, _of_tensor), (partial, _of_partial), (deque, _of_deque),
)  # fmt: skip


class _Count(threading.local):
    """How deep, and how many objects, a value was gone through."""

    depth = 0
    seen = 0


_count = _Count()


def as_it_is(value: Any) -> Any:
    """What equals ``value`` as long as it is not changed, in place or not.

    Raises:
        TooLarge: it holds too many objects, or numbers.
    """
    if _count.depth == 0:
        _count.seen = 0
    _count.depth += 1
    _count.seen += 1
    try:
        if _count.seen > _MOST_OBJECTS or _count.depth > 8:
            raise TooLarge
        return _as_it_is(value)
    finally:
        _count.depth -= 1


def _as_it_is(value: Any) -> Any:
    if isinstance(value, type):
        foreign = package_of(value) in ("builtins", "torch", "typing")
        return value if foreign or issubclass(value, nn.Module) else Snapshot(_of_class, value)
    if isinstance(value, FunctionType) and not is_installed(value):
        return Snapshot(_of_function, value)
    if isinstance(value, MethodType):
        return Snapshot(_of_method, value)
    if not isinstance(value, tuple) and (
        is_setting(value) or isinstance(value, (nn.Parameter, ModuleType))
    ):
        return value
    if isinstance(value, tuple):
        return tuple(map(as_it_is, value))
    if isinstance(value, list):
        return list(map(as_it_is, value))
    if isinstance(value, dict):
        return _contents(value)
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, bytearray):
        return bytes(value)
    for kind, read in _READERS:
        if isinstance(value, kind):
            return Snapshot(read, value)
    if hasattr(value, "tobytes"):  # of numpy, of the module array
        return Snapshot(_of_array, value)
    if hasattr(value, "__dict__") or any(_slots(cls) for cls in type(value).__mro__):
        return Snapshot(_of_object, value)
    return value


def classes_of(kind: type[nn.Module]) -> tuple[type, ...]:
    """A class and its bases, without torch's Module."""
    return tuple(cls for cls in kind.__mro__ if cls is not nn.Module and cls is not object)


def code_of(kind: type[nn.Module]) -> str:
    """A digest of what a class's functions compute, the same in every process of this
    Python."""
    digest = hashlib.sha256(repr(sys.version_info[:2]).encode())
    for cls in classes_of(kind):
        for name, value in sorted(vars(cls).items()):
            if not name.startswith("__"):
                digest.update(repr((name, _digested(value))).encode())
    return digest.hexdigest()


def digest_of(code: CodeType) -> str:
    """The same of a function's code."""
    written = repr((sys.version_info[:2], _digested(code)))
    return hashlib.sha256(written.encode()).hexdigest()


def _digested(value: Any) -> Any:
    value = getattr(value, "__func__", getattr(value, "fget", value))
    value = getattr(value, "__code__", value)
    if isinstance(value, CodeType):
        return (value.co_code, value.co_names, tuple(map(_digested, value.co_consts)))
    if isinstance(value, (tuple, list)):
        return tuple(map(_digested, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return (
        value
        if isinstance(value, (int, float, complex, str, bytes, type(None)))
        else type(value).__qualname__
    )
