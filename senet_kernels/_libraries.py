"""Importing optional libraries, none of which is needed; and why one cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

_NEED_TORCHVISION = ("timm", "torchvision", "segmentation_models_pytorch", "transformers")
_schemas: list[torch.library.Library] = []


class Unusable(ImportError):
    """An optional library cannot be used. The text is one line: which library, what happened.

    Attributes:
        absent: nothing of that name is there: the library is not installed, and that is all.
    """

    def __init__(self, text: str, *, absent: bool = False) -> None:
        super().__init__(text)
        self.absent = absent


def load(name: str, *members: str) -> Any:
    """An optional library or a module of it, imported.

    Whether a library is usable shows only on import: a folder of logs called ``tensorboard`` is a
    namespace package that ``find_spec`` finds, and an installed library may raise anything.

    Args:
        name: of the module, such as ``"matplotlib.figure"``.
        members: names that the caller needs from it; a file of the user's may have its name.

    Raises:
        Unusable: it is not installed, does not import, or is something else of the same name.
    """
    library = name.partition(".")[0]
    if library in _NEED_TORCHVISION:
        _make_torchvision_importable()
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a library's SystemExit, or the panic of one in Rust, too
        raise _unusable(name, error) from error
    if _is_namespace(module):
        raise _unusable(name, None)
    try:
        missing = [member for member in members if not hasattr(module, member)]
    except Exception as error:  # of a module that imports its parts when they are asked for
        raise _unusable(name, error) from error
    if missing:
        place = getattr(module, "__file__", "built in")
        raise Unusable(f"{name} has no {missing[0]!r}: is {place} another module of that name?")
    return module


def why_not(name: str, *members: str) -> Unusable | None:
    """Why :func:`load` would fail; None where it does not."""
    try:
        load(name, *members)
    except Unusable as reason:
        return reason
    return None


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _unusable(name: str, error: BaseException | None) -> Unusable:
    library = name.partition(".")[0]
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else None
    found = sys.modules.get(library)
    if found is not None and _is_namespace(found):
        if error is None or f"{missing}.".startswith(f"{library}."):
            folder = next(iter(found.__path__), "?")
            return Unusable(f"{name} is not installed: the folder {folder} does not contain it")
    elif missing == library:
        return Unusable(f"{library} is not installed", absent=True)
    assert error is not None
    return Unusable(f"{name} does not import: {one_line(error)}{_place_of(library)}")


def _is_namespace(module: ModuleType) -> bool:
    """Whether it is a folder without ``__init__.py``."""
    return getattr(module, "__file__", None) is None and hasattr(module, "__path__")


def _place_of(library: str) -> str:
    """Where a library that did not import is."""
    try:
        spec = importlib.util.find_spec(library)
    except Exception:  # of a finder, or of a module without a spec
        return ""
    return f" ({spec.origin})" if spec is not None and spec.origin else ""


def _make_torchvision_importable() -> None:
    # torchvision built for CUDA beside a torch without it: its library does not load, and its
    # Python part then misses the schemas of two ops, which no model here calls.
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        if "torchvision::nms does not exist" not in str(error):
            return  # whoever needs it says so
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        _schemas.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _schemas[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
