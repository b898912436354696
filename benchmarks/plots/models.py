"""Whole networks: speed-up over the original, and what SE costs beside the network without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Entry, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Found = tuple[float, float, float]  # a figure and its interval


def _dots(
    record: Record,
    path: Path,
    names: list[str],
    value: Callable[[Entry, str], Found | None],
    title: str,
    label: str,
    line: float,
) -> bool:
    """A dot with its 95 % interval for each variant: networks as rows, a panel for each mode, dtype
    and layout, with one scale."""
    found = {
        (id(entry), name): figure
        for entry in record["results"] for name in names
        if (figure := value(entry, name)) is not None and math.isfinite(figure[0])
    }  # fmt: skip
    names = [name for name in names if any(key[1] == name for key in found)]
    if not names:
        return False
    plt = pyplot()
    panels = list(dict.fromkeys((e["mode"], e["dtype"], e["layout"]) for e in record["results"]))
    rows = list(dict.fromkeys((e["network"], e["batch"]) for e in record["results"]))
    several = len({batch for _, batch in rows}) > 1
    figure, axes = plt.subplots(
        1, len(panels), sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(3.6 + 3.2 * len(panels), 1.4 + 0.14 * len(rows) * (len(names) + 1)),
    )  # fmt: skip
    for axis, panel in zip(axes[0], panels, strict=True):
        for entry in record["results"]:
            if (entry["mode"], entry["dtype"], entry["layout"]) == panel:
                row = rows.index((entry["network"], entry["batch"]))
                for k, name in enumerate(names):
                    if (id(entry), name) in found:
                        place = row - 0.35 + 0.7 * (k + 0.5) / len(names)
                        _dot(axis, place, found[id(entry), name], COLOURS.get(name, FALLBACK))
        axis.axvline(line, color="#374151", linewidth=1.2, linestyle="--", zorder=1)
        axis.set_title(f"{panel[0]}, {panel[1]}, {SHORT_LAYOUT[panel[2]]}", loc="left", fontsize=10)
        axis.set_xlabel(label, fontsize=8)
        quiet_axis(axis, "x")
    axes[0, 0].set_xlim(*_range(list(found.values()), line))
    texts = [f"{network}, batch {batch}" if several else network for network, batch in rows]
    axes[0, 0].set_yticks(range(len(rows)), texts, fontsize=8)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(f"{title}, {where(record)}", fontsize=10)
    handles = [plt.Line2D([], [], marker="o", color=COLOURS.get(n, FALLBACK), label=n)
               for n in names]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _dot(axis: Axes, place: float, figure: Found, colour: str) -> None:
    middle, low, high = figure
    axis.plot([low, high], [place, place], color=colour, linewidth=1.6, alpha=0.6, zorder=2)
    axis.plot([middle], [place], marker="o", markersize=4.5, color=colour, zorder=3)


def _range(figures: list[Found], line: float) -> tuple[float, float]:
    """Of the axis: it holds every dot, and nine of ten ends of intervals."""
    dots = [line, *(f[0] for f in figures)]
    lows, highs = sorted(f[1] for f in figures), sorted(f[2] for f in figures)
    low = min(*dots, lows[len(lows) // 20])
    high = max(*dots, highs[-1 - len(highs) // 20])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def draw_speed(record: Record, path: Path) -> bool:
    """Speed-up over the original."""
    metric = summary.metric_of(record)
    names = [n for n in record["providers"] if n not in ("original", "no-se", "compile-no-se")]

    def value(entry: Entry, name: str) -> Found | None:
        found = summary.ratio(entry, metric, name, "original")
        return None if found is None else (found["ratio"], found["ci_low"], found["ci_high"])

    label = "speed-up over the original (bar: 95 % interval)"
    return _dots(record, path, names, value, "Whole networks", label, 1)


def draw_price(record: Record, path: Path) -> bool:
    """Time beyond that of the same network without SE, in per cent of the latter."""
    metric = summary.metric_of(record)
    names = [n for n in record["providers"] if n not in ("no-se", "compile-no-se")]

    def value(entry: Entry, name: str) -> Found | None:
        return summary.price(entry, metric, name)

    label = "% over the network without SE (bar: 95 % interval)"
    return _dots(record, path, names, value, "The price of SE", label, 0)
