"""What the names in a class's code stand for, to be compared with what they stand for later.

Of a class's ``forward``, and of the functions that it names, these are looked at: the attributes of
their classes, their code and default arguments, which a reload exchanges in place, the globals and
closures that they read, and the functions of PyTorch that they, or PyTorch's layers, call. All of
it is read before each call of a converted module, one C call for each place (:func:`what_changed`).
"""

from __future__ import annotations

import copyreg
import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .watched import (
    INSTALLED,
    LIBRARIES,
    as_it_is,
    cells_of,
    classes_of,
    codes_in,
    is_installed,
    is_setting,
    names_in,
    package_of,
    root_of,
)

#: A reader, where it reads, what it gave, and whether something else is right as well.
Read = tuple[Callable[[Any], Any], Any, Any, Callable[[Any], bool] | None]


class Reads(NamedTuple):
    """What is read before each call. A class with another number of names may have a new one that
    its code asks for; which names it had says whether it has. Of classes that are not PyTorch's
    the names are compared in any case: one may go as another comes."""

    places: tuple[Read, ...]
    classes: tuple[Any, ...]  # their namespaces
    sizes: tuple[int, ...]  # of each, how many names it had
    names: tuple[frozenset[str], ...]


class Unwatchable(Exception):
    """An attribute that a class's code asks for cannot be compared with what it was."""


class Asked(NamedTuple):
    """Names and strings in the code of functions; a string may be given to ``getattr``."""

    names: frozenset[str]
    strings: frozenset[str]  # and names that code with handlers for errors asks for
    any_name: bool  # it may ask for names that are made when it runs
    calls_type: bool  # the builtin, not an attribute of that name

    def asks_for(self, name: str) -> bool:
        """Whether they may look it up on an object."""
        return self.any_name or name in self.names or name in self.strings


_DYNAMIC = frozenset((
    "getattr", "hasattr", "vars", "dir", "eval", "exec", "attrgetter", "methodcaller", "__dict__",
    "__getattribute__", "__getattr__",
))  # fmt: skip


def definitions(kind: type[nn.Module], name: str) -> Iterator[Any]:
    """What each class of a module's has by a name: ``super()`` may ask for any of them."""
    return (vars(cls)[name] for cls in classes_of(kind) if name in vars(cls))


def asked_by(kind: type[nn.Module]) -> Asked:
    """What ``forward``, and the functions of the class that it names, ask for."""
    names: set[str] = set()
    strings: set[str] = set()
    calls_type = False
    waiting, seen = ["forward"], set()
    while waiting:
        for value in definitions(kind, waiting.pop()):
            function = _function(value)
            if function is None or function.__code__ in seen:
                continue
            seen.add(function.__code__)
            for code in codes_in(function.__code__):
                waiting += set(code.co_names) - names
                names |= set(code.co_names)
                calls_type = calls_type or ("type" in code.co_names and _calls_type(code))
                strings |= {c for c in code.co_consts if isinstance(c, str)}
                if getattr(code, "co_exceptiontable", b""):
                    strings |= set(code.co_names)
    return Asked(frozenset(names), frozenset(strings), bool(names & _DYNAMIC), calls_type)


def _calls_type(code: CodeType) -> bool:
    """Whether it is the builtin, and not an attribute, as a device has one."""
    steps = dis.get_instructions(code)
    return any(s.argval == "type" and s.opname in ("LOAD_GLOBAL", "LOAD_NAME") for s in steps)


def _function(value: Any) -> FunctionType | None:
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return value if isinstance(value, FunctionType) else None


# ---- PyTorch's own, as it was when this was imported ----

_OF_TENSORS = {name: getattr(Tensor, name) for name in dir(Tensor)}
_OF_TORCH: dict[int, dict[str, Any]] = {
    id(vars(module)): dict(vars(module)) for module in (torch, F)
}
#: Attributes that decide how any object is called, and looked up.
_PROTOCOLS = frozenset(("__call__", "__getattr__", "__getattribute__"))
_CALLS = ("__call__", "_call_impl", "__getattr__")


_TORCH = str(Path(torch.__file__).parent)


def _is_torchs(function: FunctionType) -> bool:
    return function.__code__.co_filename.startswith(_TORCH)


def _check_own(owner: Any, name: str, value: Any) -> None:
    """Refuse a function in a library's class or module that is somebody else's: that of PyTorch is
    PyTorch's, those of others are of some library's."""
    function = _function(value)
    if function is None:
        return
    if package_of(owner) == "torch":
        is_own = _is_torchs(function)
    else:
        is_own = is_installed(function) or not _is_library(owner)
    if not is_own:
        raise Unwatchable(f"{owner.__name__}.{name}, which it calls, has been replaced")


def _is_library(owner: Any) -> bool:
    module = owner if isinstance(owner, ModuleType) else sys.modules.get(owner.__module__)
    if module is sys.modules["__main__"]:  # a launcher's file, and what its user typed
        return False
    return str(getattr(module, "__file__", None)).startswith(INSTALLED)


def _own_names(namespace: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(n for n in namespace if not n.startswith("__") or n in _PROTOCOLS)


def _has_names(names: frozenset[str], namespace: Mapping[str, Any]) -> bool:
    """Whether it is only Python's own that is new, as what ``copyreg`` notes on a class."""
    return names == _own_names(namespace)


def _let_python_note(cls: type) -> None:
    """Have Python put on a class what it does when the first instance is copied and when somebody
    asks for annotations: later, its number of names would say that there is a new one."""
    note: Any = getattr(copyreg, "_slotnames", id)
    note(cls)
    inspect.get_annotations(cls)


def _calls_are_torchs(namespace: Mapping[str, Any]) -> bool:
    """Whether it is PyTorch that calls modules in another way: torch.fx and make_fx do."""
    functions = (_function(namespace[name]) for name in _CALLS)
    return all(function is None or _is_torchs(function) for function in functions)


#: What Python looks up for operators, by their signs, which bytecode has: as one opcode with an
#: argument, before Python 3.11 as an opcode for each.
_OPERATORS = {
    "*": "mul", "+": "add", "-": "sub", "/": "truediv", "@": "matmul", "**": "pow",
    "MULTIPLY": "mul", "ADD": "add", "SUBTRACT": "sub", "TRUE_DIVIDE": "truediv",
    "MATRIX_MULTIPLY": "matmul", "POWER": "pow",
}  # fmt: skip


def _operators(code: CodeType) -> set[str]:
    """Names of methods that operators in a function's code stand for."""
    found: set[str] = set()
    for step in dis.get_instructions(code):
        kind, _, name = step.opname.partition("_")
        sign = step.argrepr if name == "OP" else name
        operator = _OPERATORS.get(sign.rstrip("="))
        if kind in ("BINARY", "INPLACE") and operator is not None:
            in_place = kind == "INPLACE" or sign.endswith("=")
            found |= {f"__{prefix}{operator}__" for prefix in ("", "r", *("i" * in_place))}
    return found


_some_global: Any = None


def _equals(then: Any) -> bool:
    equal: bool = _some_global == then
    return equal


def _is_same(then: Any) -> bool:
    return _some_global is then


_CODE = (FunctionType, BuiltinFunctionType, type)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (int, float, str, type(None)))


class Namespaces:
    """Where the names in the code of classes are looked up, and what was there."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[Any, dict[str, Any]]] = {}  # namespaces, with what they have
        self.names: dict[int, tuple[Any, frozenset[str]]] = {}
        self.of_tensors: dict[str, Any] = {}
        self.objects: dict[int, tuple[Callable[[Any], Any], Any, Any]] = {}
        self.functions: set[FunctionType] = set()
        self.packages: set[str] = set()
        self.followed: set[tuple[ModuleType, frozenset[str]]] = set()

    def add_class(self, kind: type[nn.Module]) -> None:
        asked = asked_by(kind)
        self.packages.update(map(package_of, classes_of(kind)))
        for cls in classes_of(kind):
            of_class: Any = vars(cls)
            _let_python_note(cls)
            self.names[id(cls)] = of_class, _own_names(of_class)
            for name in of_class:
                if name in ("forward", *_PROTOCOLS) or (
                    asked.asks_for(name) and not name.startswith("__")
                ):
                    _check_own(cls, name, of_class[name])
                    self._add(of_class, cls, name, _class_attribute(name, of_class[name]))
                    self.add_function(_function(of_class[name]))
        of_modules: Any = vars(nn.Module)
        for name in (*_CALLS, *(n for n in asked.names if n in of_modules)):
            if isinstance(of_modules[name], FunctionType):
                _check_own(nn.Module, name, of_modules[name])
                self._add(of_modules, nn.Module, name, of_modules[name])

    def _add(self, namespace: Any, owner: Any, name: str, value: Any) -> None:
        self.items.setdefault(id(owner), (namespace, {}))[1][name] = value

    def add_function(self, function: FunctionType | None) -> None:
        if function is None or function in self.functions:
            return
        self.functions.add(function)
        names = names_in(function.__code__)
        theirs = _is_torchs(function)
        if not theirs:
            self.objects[id(function)] = _OF_FUNCTION, function, (
                function.__code__, _copied(function.__defaults__), _copied(function.__kwdefaults__),
            )  # fmt: skip
            for cell in cells_of(function):
                self._add_cell(cell)
        if not theirs or function.__module__ == F.__name__:
            called = names if theirs else names.union(*map(_operators, codes_in(function.__code__)))
            self.of_tensors |= {n: _OF_TENSORS[n] for n in called & _OF_TENSORS.keys()}
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if not theirs:
                if is_installed(function):
                    _check_own(sys.modules.get(function.__module__, torch), name, value)
                self._add(function.__globals__, function.__globals__, name, value)
                self._add_value(value)
            if isinstance(value, ModuleType):
                self._add_module(value, names, follow=not theirs)

    def _add_value(self, value: Any) -> None:
        function = _function(value)
        if function is not None and self._is_near(function):
            self.add_function(function)

    def _is_near(self, function: FunctionType) -> bool:
        """Whether what a function does may change: of a library, that it is the same is enough."""
        return not is_installed(function) or package_of(function) in self.packages

    def _add_cell(self, cell: Any) -> None:
        value = cell.cell_contents
        if not isinstance(value, type):  # of super()
            try:
                seen = as_it_is(value)
            except Exception as error:  # TooLarge, or what its own code raises
                raise Unwatchable("its closure cannot be watched for changes") from error
            self.objects[id(cell)] = _OF_CELL, cell, (seen, seen)
            self._add_value(value)

    def _add_module(self, module: ModuleType, names: frozenset[str], follow: bool) -> None:
        namespace = vars(module)
        known = _OF_TORCH.get(id(namespace), namespace)
        if known is namespace and module is not nn and package_of(module) in LIBRARIES:
            return
        for name in names:
            value = known.get(name, module)
            if isinstance(value, ModuleType):  # as in torch.nn.functional.relu
                if follow and (value in (nn, F) or package_of(value) not in LIBRARIES):
                    self._follow(value, names)
            else:
                _check_own(module, name, value)
                self._add(namespace, namespace, name, value)
                if module is F:
                    self.add_function(_function(value))
                elif module is not torch:
                    self._add_value(value)

    def _follow(self, module: ModuleType, names: frozenset[str]) -> None:
        if (module, names) not in self.followed:
            self.followed.add((module, names))
            self._add_module(module, names, follow=True)

    def add(self, other: Namespaces) -> None:
        """What another has; where it saw something else under a name, nothing is right there."""
        for key, (namespace, values) in other.items.items():
            mine = self.items.setdefault(key, (namespace, {}))[1]
            for name, value in values.items():
                if mine.setdefault(name, value) is not value and mine[name] != value:
                    mine[name] = _NOTHING
        self.names |= other.names
        self.of_tensors |= other.of_tensors
        self.objects |= other.objects

    def guards(self) -> tuple[FunctionType, ...]:
        """Functions that say whether globals are what they were, as Dynamo can trace and guard
        them: constants, and functions."""
        found = []
        for namespace, given in self.items.values():
            if type(namespace) is not dict or root_of(namespace.get("__name__")) in LIBRARIES:
                continue
            for name, value in given.items():
                if _is_constant(value) or isinstance(value, _CODE):
                    asks = _equals if _is_constant(value) else _is_same
                    code = asks.__code__.replace(co_names=(name,))  # of that global
                    found.append(FunctionType(code, namespace, "guard", (value,)))
        return tuple(found)

    def reads(self) -> Reads:
        """A read for each place."""
        found: list[Read] = []
        for key, (namespace, given) in self.items.items():
            excuse = _calls_are_torchs if key == id(nn.Module) else None
            found.append((*_reader(itemgetter, given, namespace), excuse))
        if self.of_tensors:
            found.append((*_reader(attrgetter, self.of_tensors, Tensor), None))
        found += [(read, owner, values, None) for read, owner, values in self.objects.values()]
        theirs: list[tuple[Any, int, frozenset[str]]] = []
        for namespace, own in self.names.values():
            # One that has changed since it was seen is not as it was, whatever its size is now.
            as_seen = _own_names(namespace) == own
            if namespace.get("__module__", "").startswith("torch."):
                theirs.append((namespace, len(namespace) if as_seen else -1, own))
            else:
                names = tuple(namespace) if as_seen else ()
                found.append((tuple, namespace, names, partial(_has_names, own)))
        classes, sizes, of_classes = zip(*theirs, strict=True) if theirs else ((), (), ())
        return Reads(tuple(found), classes, sizes, of_classes)


_OF_FUNCTION = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_OF_CELL = attrgetter("cell_contents", "cell_contents")
_NOTHING = object()


def _reader(
    getter: Callable[..., Callable[[Any], Any]], given: Mapping[str, Any], owner: Any
) -> tuple[Callable[[Any], Any], Any, Any]:
    """The first three of a :data:`Read`. A tuple equals one with the same objects, whatever ``==``
    of them is (a tensor, or False of NaN), so that of one name the value is read twice; a function
    alone is compared alone, in less time."""
    names, values = tuple(given), tuple(given.values())
    if len(names) > 1:
        return getter(*names), owner, values
    if isinstance(values[0], FunctionType):
        return getter(*names), owner, values[0]
    return getter(*names, *names), owner, values * 2


def _copied(value: Any) -> Any:
    try:
        return as_it_is(value)
    except Exception:  # TooLarge, or what its own code raises
        return value


def _class_attribute(name: str, value: Any) -> Any:
    if is_setting(value) or _function(value) is not None:
        return value
    try:
        return as_it_is(value)
    except Exception as error:
        raise Unwatchable(f"its class's {name!r} cannot be watched for changes") from error


def words_of(kind: type[nn.Module]) -> frozenset[str]:
    """What the code of a class, and the functions that it reaches, names: also by another name, as
    of what is imported so, and by a string, as it may be given to ``getattr``."""
    asked = asked_by(kind)
    words = asked.names | asked.strings
    for function in namespaces_of(kind).functions:
        if not _is_torchs(function):
            words |= names_in(function.__code__) | _spoken(function)
    return words


def _spoken(function: FunctionType) -> frozenset[str]:
    strings = {c for code in codes_in(function.__code__) for c in code.co_consts}
    globals_ = function.__globals__
    values = [globals_[name] for name in names_in(function.__code__) & globals_.keys()]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [cell.cell_contents for cell in cells_of(function)]
    return frozenset(filter(None, map(spelled, (*strings, *values))))


def spelled(value: Any) -> str | None:
    """The name that a value is, or has; a module's is where it is, not what."""
    try:
        name = value if isinstance(value, (str, ModuleType)) else value.__name__
    except Exception:  # it has none, or says so in its own way
        return None
    return name if isinstance(name, str) else None


def namespaces_of(kind: type[nn.Module]) -> Namespaces:
    """Where the code of a class looks, and what is there now.

    Raises:
        Unwatchable: it has an attribute that cannot be compared.
    """
    namespaces = Namespaces()
    namespaces.add_class(kind)
    return namespaces


#: Of each class of a child, when the first of it was recognised: whoever patches
#: ``nn.Conv2d.forward`` later means the layers of fused modules too.
_OF_CHILDREN: dict[type[nn.Module], tuple[Namespaces, Reads]] = {}


def of_child(kind: type[nn.Module]) -> tuple[Namespaces, Reads]:
    """The same of a child's class, with what was there when it was first asked for, and the reads
    of that."""
    known = _OF_CHILDREN.get(kind)
    if known is None:
        namespaces = namespaces_of(kind)
        known = _OF_CHILDREN[kind] = namespaces, namespaces.reads()
    return known


def what_changed(reads: Reads) -> str | None:
    """The first place that is not as it was; None if there is none."""
    try:
        for read, owner, values, excuse in reads.places:
            if values != read(owner) and (excuse is None or not excuse(owner)):
                return _said(owner)
        if tuple(map(len, reads.classes)) != reads.sizes:
            for owner, names in zip(reads.classes, reads.names, strict=True):
                if _own_names(owner) != names:  # it may be Python's own that is new
                    return _said(owner)
    except Exception:  # gone; a tensor, which is not compared; what `==` may raise
        return _said(owner)
    return None


def _said(owner: Any) -> str:
    names = ("__qualname__", "__name__")
    get = owner.get if isinstance(owner, Mapping) else partial(getattr, owner)
    name = next((n for n in (get(n, None) for n in names) if isinstance(n, str)), "a closure")
    name = get("__module__", "its class") if isinstance(owner, MappingProxyType) else name
    return f"what its code finds in {name} has been changed"
