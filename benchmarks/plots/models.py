"""Whole networks: speed-up over the original, and what SE costs beside the network without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Entry, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, where


def _grouped(
    record: Record,
    path: Path,
    names: list[str],
    value: Callable[[Entry, str], float],
    title: str,
    label: str,
    line: float,
) -> bool:
    """Bars per network and variant, one panel per mode, dtype and layout."""
    names = [n for n in names if any(math.isfinite(value(e, n)) for e in record["results"])]
    if not names:
        return False
    plt = pyplot()
    panels = list(dict.fromkeys((e["mode"], e["dtype"], e["layout"]) for e in record["results"]))
    networks = list(dict.fromkeys(e["network"] for e in record["results"]))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(6.0, 1.5 * len(networks)), 2.6 * len(panels) + 0.8),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    width = 0.8 / len(names)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        entries = {e["network"]: e for e in record["results"]
                   if (e["mode"], e["dtype"], e["layout"]) == panel}  # fmt: skip
        for k, name in enumerate(names):
            heights = [value(entries[n], name) if n in entries else math.nan for n in networks]
            places = [i - 0.4 + width * (k + 0.5) for i in range(len(networks))]
            axis.bar(places, heights, width, color=COLOURS.get(name, FALLBACK), label=name,
                     zorder=2)  # fmt: skip
            for place, height in zip(places, heights, strict=True):
                if math.isfinite(height):
                    axis.annotate(f"{height:.2f}" if line else f"{height:.0f}", (place, height),
                                  ha="center", va="bottom", fontsize=6)  # fmt: skip
        axis.axhline(line, color="#374151", linewidth=0.8, linestyle="--", zorder=3)
        axis.set_title(f"{panel[0]}, {panel[1]}, {SHORT_LAYOUT[panel[2]]}", loc="left", fontsize=10)
        axis.set_ylabel(label, fontsize=8)
        quiet_axis(axis, "y")
    axes[-1, 0].set_xticks(range(len(networks)), networks, fontsize=8, rotation=20, ha="right")
    figure.suptitle(f"{title} \u2013 {where(record)}", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def draw_speed(record: Record, path: Path) -> bool:
    """Speed-up over the original."""
    metric = summary.metric_of(record)
    names = [n for n in record["providers"] if n not in ("original", "no-se", "compile-no-se")]

    def value(entry: Entry, name: str) -> float:
        found = summary.ratio(entry, metric, name, "original")
        return math.nan if found is None else found["ratio"]

    return _grouped(record, path, names, value, "Whole networks", "speed-up over the original", 1)


def draw_price(record: Record, path: Path) -> bool:
    """Time beyond that of the same network without SE, in per cent of the latter."""
    metric = summary.metric_of(record)
    names = [n for n in record["providers"] if n not in ("no-se", "compile-no-se")]

    def value(entry: Entry, name: str) -> float:
        found = summary.price(entry, metric, name)
        return math.nan if found is None else found[0]

    return _grouped(record, path, names, value, "The price of SE", "% over the network without SE",
                    0)  # fmt: skip
