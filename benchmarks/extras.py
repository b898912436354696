"""The optional libraries of a report: which can be used, asked before anything is written."""

from __future__ import annotations

import sys
from functools import cache

from senet_kernels._libraries import Unusable, why_not

#: By what is left out without them: modules, and the names used of each.
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "progress bar": (("tqdm", "tqdm"),),
    "tables": (("rich.console", "Console"), ("rich.table", "Table"), ("rich.text", "Text"),
               ("rich.markup", "escape")),
    "plots": (("matplotlib.pyplot", "subplots"), ("matplotlib.backends.backend_agg",)),
    "page": (("jinja2", "Environment"),),
}  # fmt: skip


@cache
def why_left_out(what: str) -> Unusable | None:
    """Why there is none of ``what``; None where there is."""
    return next(filter(None, (why_not(*module) for module in NEEDS[what])), None)


def announce(*optional: str) -> None:
    """Say what will be left out, and why."""
    for what in optional:
        reason = why_left_out(what)
        if reason is not None:
            print(f"no {what}: {reason}", file=sys.stderr)


def lacks(needed: str) -> bool:
    """Whether what cannot be left out cannot be had; says why."""
    reason = why_left_out(needed)
    if reason is not None:
        print(f"the {needed} cannot be made: {reason}", file=sys.stderr)
    return reason is not None
