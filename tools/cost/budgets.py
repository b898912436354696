"""Budgets of kernels: what a line of the record may have at most."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MARGIN = 1.03
_KEY = ("backend", "card", "layer", "layout", "direction")
_ISSUE = 0  # of a phase's cycles, as .pipes.Use has them


def budget_of(line: dict[str, Any]) -> dict[str, Any]:
    """What of a line is held to: instructions per vector by phase; of each kernel registers,
    blocks per multiprocessor, spilled bytes, the share of narrow accesses where x is streamed, and
    16-byte loads before the first use in each loop."""
    kernels = {
        kernel["kernel"]: {
            name: kernel[name]
            for name in ("registers", "blocks_per_multiprocessor", "spilled_bytes",
                         "narrow_accesses")
        } | {"loads": {loop: loads for loop, (loads, _) in kernel["loads_before_use"].items()}}
        for kernel in line["kernels"]
    }  # fmt: skip
    phases = {phase: cycles[_ISSUE] for phase, cycles in line["per_vector"].items()}
    head = {name: line[name] for name in (*_KEY, "compiler")}
    return head | {"instructions": phases, "kernels": kernels}


def exceeded(budget: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """What of a line is over its budget, in words. Instructions and narrow accesses may be 3 % up;
    nothing else may be worse. A phase of less than one instruction per vector is passed over."""
    found = []
    now = budget_of(line)
    for phase, count in now["instructions"].items():
        allowed = MARGIN * max(budget["instructions"].get(phase, 0.0), 1.0)
        if count > allowed:
            found.append(f"{phase}: {count:.2f} instructions per vector, at most {allowed:.2f}")
    for kernel, of in now["kernels"].items():
        allowed_of = budget["kernels"].get(kernel)
        if allowed_of is None:
            found.append(f"{kernel}: no such kernel in the budget")
            continue
        if of["spilled_bytes"] > allowed_of["spilled_bytes"]:
            found.append(f"{kernel}: {of['spilled_bytes']} bytes spilled")
        blocks = allowed_of["blocks_per_multiprocessor"]
        if of["blocks_per_multiprocessor"] < blocks:
            found.append(f"{kernel}: {of['blocks_per_multiprocessor']} blocks per multiprocessor "
                         f"({of['registers']} registers), at least {blocks}")  # fmt: skip
        if of["narrow_accesses"] > MARGIN * allowed_of["narrow_accesses"] + 0.002:
            found.append(f"{kernel}: {of['narrow_accesses']:.1%} of the accesses are of less than "
                         f"16 bytes, at most {allowed_of['narrow_accesses']:.1%}")  # fmt: skip
        for loop, loads in allowed_of["loads"].items():
            if of["loads"].get(loop, 0) < loads:
                found.append(f"{kernel}, {loop}: {of['loads'].get(loop, 0)} loads before the first "
                             f"use, at least {loads}")  # fmt: skip
    return found


def read(path: Path) -> list[dict[str, Any]]:
    budgets: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return budgets


def renew(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Budgets that are in the file become what the lines have now; others are added."""
    old = {tuple(b[k] for k in _KEY): b for b in (read(path) if path.exists() else [])}
    for line in lines:
        old[tuple(line[k] for k in _KEY)] = budget_of(line)
    rows = ",\n ".join(json.dumps(budget) for budget in old.values())
    path.write_text(f"[\n {rows}\n]\n", encoding="utf-8")
