"""Effective bandwidth (the least traffic over the time) against size, and the copy as the roof."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.regimes import REGIMES, regime
from benchmarks.summary import SHORT_LAYOUT, Record

from .style import COLOURS, FALLBACK, plain_ticks, pyplot, quiet_axis, set_title, wide_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _name_regimes(axis: Axes, sizes: list[int], record: Record) -> None:
    """The regimes at the top of the axis, dotted lines between them."""
    found = {r: [s / 1e6 for s in sizes if regime(s, record["environment"]) == r] for r in REGIMES}
    spans = [(name, own[0], own[-1]) for name, own in found.items() if own]
    edges = [math.sqrt(a[2] * b[1]) for a, b in pairwise(spans)]
    for edge in edges:
        axis.axvline(edge, color="#9ca3af", linewidth=0.8, linestyle=":")
    lows = [sizes[0] / 1e6, *edges] if spans else []
    for (name, *_), low, high in zip(spans, lows, [*edges, sizes[-1] / 1e6], strict=False):
        axis.annotate(
            name, (math.sqrt(low * high), 1), xycoords=("data", "axes fraction"), xytext=(0, -2),
            textcoords="offset points", ha="center", va="top", fontsize=7, color="#6b7280",
        )  # fmt: skip


def draw(record: Record, path: Path) -> bool:
    """Write the picture; False where the record has nothing to draw."""
    entries = [e for e in record["results"] if "clone" in e["providers"]]
    metric = summary.metric_of(record)
    if not entries:
        return False
    plt = pyplot()
    modes = list(dict.fromkeys(e["mode"] for e in entries))
    layouts = [name for name in SHORT_LAYOUT if any(e["layout"] == name for e in entries)]
    figure, axes = plt.subplots(
        len(modes), len(layouts), figsize=(5.2 * len(layouts), 3.4 * len(modes)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, mode in zip(axes, modes, strict=True):
        for axis, layout in zip(row, layouts, strict=True):
            chosen = [e for e in entries if (e["mode"], e["layout"]) == (mode, layout)]
            for name in [*record["providers"], summary.LIMIT]:
                # a copy has no backward: its forward is the roof of both
                points = sorted(
                    (e["bytes"] / 1e6, summary.bandwidth(e, metric, name) / 1e9)
                    for e in chosen
                )  # fmt: skip
                points = [p for p in points if math.isfinite(p[1])]
                if not points:
                    continue
                roof = name == summary.LIMIT
                if roof:  # several layers may have one size
                    sizes = dict.fromkeys(size for size, _ in points)
                    points = [(s, median(v for size, v in points if size == s)) for s in sizes]
                axis.plot(
                    *zip(*points, strict=True),
                    "-" if roof else "o",
                    color=COLOURS.get(name, FALLBACK),
                    linewidth=1.4,
                    markersize=4.5 if name in record["contenders"] else 3.5,
                    label=f"{name} (the roof)" if roof else name,
                    zorder=2 if roof else 3,
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{mode}, {SHORT_LAYOUT[layout]}", loc="left", fontsize=10)
            quiet_axis(axis, "both")
            plain_ticks(axis.xaxis)
            plain_ticks(axis.yaxis)
            _name_regimes(axis, sorted({e["bytes"] for e in chosen}), record)
    for axis in axes[-1]:
        axis.set_xlabel("size of x, MB", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("effective bandwidth, GB/s", fontsize=8)
    set_title(figure, record, "Roofline: the least bytes there are to move, over the time it took")
    handles, names = axes[0, 0].get_legend_handles_labels()
    wide_legend(figure, dict(zip(names, handles, strict=True)))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
