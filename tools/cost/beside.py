"""``python -m tools.cost.beside RECORD.json``: measured times of layers beside the computed ones.

RECORD is one of ``python -m benchmarks layers`` on a card that prices were computed for (see
:mod:`tools.cost.record`); ``--cost FILE`` names another record of prices. Of each figure there are
the time, the copy's beside it, what was computed (with blocks out of step, and in step), and the
ratio of the measured time to the middle of these. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "computed" / "cost.json"
LAYOUT = {"contiguous": "NCHW", "channels_last": "NHWC"}
_LIMIT = "clone"


class Figure(NamedTuple):
    """Microseconds of a pass over a layer."""

    backend: str
    layer: str
    layout: str
    direction: str
    measured: float
    copy: float | None  # the time of the least traffic, at the measured speed of a copy
    computed: tuple[float, float] | None
    plan: str
    problem: str = ""  # why there is no time
    clock: str = "device"  # or "wall": what the host needs may be in the time

    @property
    def ratio(self) -> float | None:
        """Of the measured time to the computed one."""
        if self.problem or not self.computed:
            return None
        return self.measured / (sum(self.computed) / 2)


def card_of(device: str, names: Iterable[str]) -> str | None:
    """The card that a device is, of those that prices were computed for; a part of one (MIG) is
    none of them."""
    words = device.replace("-", " ").split()
    if "MIG" in words:
        return None
    return next((name for name in names if name.split()[-1] in words), None)


def _time(provider: dict[str, Any]) -> tuple[float | None, str]:
    """Of the device where it was measured, else of the wall clock; and which of the two."""
    for clock in ("device", "wall"):
        if (found := provider.get(clock, {}).get("median_us")) is not None:
            return found, clock
    return None, "device"


def _reason(provider: dict[str, Any]) -> str:
    """Why there is no time."""
    of_device: str = provider.get("device", {}).get("reason", "not timed")
    return of_device if provider["status"] == "ok" else provider.get("reason", provider["status"])


def _is_ours(provider: str) -> bool:
    return provider.split("-")[0] in ("native", "triton")


def beside(record: dict[str, Any], cost: dict[str, Any]) -> list[Figure]:
    """The figures of a record of layers, of the project's own backends."""
    card = card_of(record["environment"]["device"], cost.get("cards", {}))
    computed = {
        (row["backend"], row["layer"], row["layout"], row["direction"]): tuple(
            sorted(row["expected_us"])
        )
        for row in cost.get("rows", [])
        if row["card"] == card and cost["batch"]
    }
    found = []
    for entry in record["results"]:
        layout, direction = LAYOUT[entry["layout"]], entry["mode"]
        copies = entry["providers"].get(_LIMIT, {})
        priced = (entry["dtype"], entry["batch"]) == ("bf16", cost.get("batch"))
        for name in filter(_is_ours, record["contenders"]):
            provider = entry["providers"].get(name, {"status": "n/a", "reason": "not measured"})
            time, clock = _time(provider)
            copy = copies.get(clock, {}).get("median_us")
            key = (name, entry["layer"], layout, direction)
            found.append(
                Figure(
                    name, entry["layer"], layout, direction, time or 0.0,
                    copy * entry["limit_in_clones"] if copy else None,
                    computed.get(key) if priced else None, provider.get("plan", ""),
                    "" if time else _reason(provider), clock,
                )
            )  # fmt: skip
    return found


def summary(figures: Sequence[Figure]) -> list[str]:
    """A line for each backend and direction."""
    lines = []
    for key in dict.fromkeys((f.backend, f.direction) for f in figures):
        of = [f for f in figures if (f.backend, f.direction) == key and not f.problem]
        names = {(f.layer, f.layout) for f in of}
        text = f"{key[0]} {key[1]}: {len(names)} pairs of layer and layout"
        by_wall = sum(f.clock == "wall" for f in of)
        text += f" ({by_wall} by wall time: no graph could hold them)" if by_wall else ""
        shares = sorted(f.copy / f.measured for f in of if f.copy)
        if shares:
            text += (
                f"; of the speed of a copy: median {median(shares):.0%}, "
                f"from {shares[0]:.0%} to {shares[-1]:.0%}"
            )
        ratios = sorted(f.ratio for f in of if f.ratio)
        if ratios:
            text += (
                f"; measured over computed: median {median(ratios):.2f}, "
                f"from {ratios[0]:.2f} to {ratios[-1]:.2f}"
            )
        elif of:
            text += "; nothing was computed for this device"
        lines.append(text)
    return lines


def table(figures: Sequence[Figure]) -> str:
    """Each figure, in Markdown."""
    rows = ["| backend | layer | layout | pass | measured, µs | copy, µs | computed, µs | ratio |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for f in figures:
        computed = "{:.0f} to {:.0f}".format(*f.computed) if f.computed else "n/a"
        cells = [
            f.backend, f.layer, f.layout, f.direction,
            f.problem or f"{f.measured:.1f}" + " (wall)" * (f.clock == "wall"),
            f"{f.copy:.1f}" if f.copy else "n/a", computed, f"{f.ratio:.2f}" if f.ratio and not
            f.problem else "n/a",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cost.beside", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--cost", type=Path, default=RECORD)
    given = parser.parse_args(argv)
    record, cost = (json.loads(path.read_text()) for path in (given.record, given.cost))
    figures = beside(record, cost)
    print("\n".join([table(figures), "", *summary(figures)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
