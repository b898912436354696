"""The C++ backend: loads the compiled library, which implements the ``native_*`` ops.

The library is beside the package and is loaded at import: it takes milliseconds, touches no
device, and whoever calls a raw op (an exported program, say) finds it there. Where it is missing
or does not load, the reason is kept and importing goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch

from senet_kernels import ops

_PACKAGE = Path(__file__).resolve().parent.parent
NAME = "native"


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the build; empty when it never ran."""
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load() -> str | None:
    """Load the library; why that is not possible, or None."""
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


#: Why the native backend cannot be used in this process; None when it can.
UNAVAILABLE: str | None = _load()


def _raise_unavailable(*args: Any) -> NoReturn:
    raise RuntimeError(f"backend 'native' is not available: {UNAVAILABLE}")


if UNAVAILABLE is not None:
    # A raw op called all the same says why instead of "could not run".
    for _op in ops.NATIVE_OPS:
        ops.library.impl(_op, _raise_unavailable, "CompositeExplicitAutograd")


def describe() -> str:
    """One line for ``backends()``: how the library was built and which variant runs here."""
    record = build_record()
    isas = ", ".join(record.get("isas", ())) or "unknown"
    return (
        f"C++ kernels for {isas}; running {torch.ops.senet_kernels.native_isa()}; "
        f"compiler {record.get('compiler', 'unknown')}"
    )
