"""Bytes per second of the least traffic, against size, and the copy as the roof."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from benchmarks import summary
from benchmarks.regimes import REGIMES, regime
from benchmarks.summary import SHORT_LAYOUT, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, where


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
            found = {
                r: [
                    e["bytes"] / 1e6
                    for e in chosen
                    if regime(e["bytes"], record["environment"]) == r
                ]
                for r in REGIMES
            }
            ends = [max(v) for v in found.values() if v]
            for end in ends[:-1]:
                axis.axvline(end * 1.12, color="#9ca3af", linewidth=0.8, linestyle=":")
    for axis in axes[-1]:
        axis.set_xlabel("size of x, MB (dotted: between regimes)", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s of the least traffic", fontsize=8)
    figure.suptitle(f"Roofline against a copy \u2013 {where(record)}", fontsize=11)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
