"""Something to do as soon as a module that need not be there has been imported by someone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(name: str, do: Callable[[], object]) -> None:
    """Call ``do`` once module ``name`` has been imported: now, or when it is. It is not imported
    for this."""
    if name in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Once(name, do))


class _Once(MetaPathFinder):
    """Finds one module by way of the other finders, once, and adds to what its loader does."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        with suppress(ValueError):  # another thread was here first
            sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_do(module: ModuleType) -> None:
                load(module)
                try:
                    self.do()
                except Exception as error:  # not the business of whoever imports it
                    warnings.warn(f"senet_kernels, after {name} was imported: {error!r}",
                                  RuntimeWarning, stacklevel=2)  # fmt: skip

            spec.loader.exec_module = load_and_do  # type: ignore[method-assign]
        return spec
