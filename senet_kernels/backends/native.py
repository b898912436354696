"""The C++ backend: loads the compiled library, which implements the ``native_*`` ops.

The library is looked for beside the package and loaded on first use, not at import. Where it is
missing the reason is kept: the build record says why nothing was built.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
NAME = "native"


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty when it never ran."""
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


@functools.cache
def _load() -> str | None:
    libraries = sorted(_PACKAGE.glob("_native*.so"))
    if not libraries:
        reason = build_record().get("reason", "this is a source tree that was never built")
        return (
            f"the compiled library is not installed: {reason}; "
            "'pip install --no-build-isolation .' builds it"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the compiled library {libraries[0].name} does not load: {error}"
    return None


def unavailable() -> str | None:
    """Why the native backend cannot be used in this process; None when it can."""
    return _load()


def describe() -> str:
    """One line for ``backends()``: how the library was built and which variant runs here."""
    record = build_record()
    isas = ", ".join(record.get("isas", ())) or "unknown"
    return (
        f"C++ kernels for {isas}; running {torch.ops.senet_kernels.native_isa()}; "
        f"compiler {record.get('compiler', 'unknown')}"
    )
