"""Time of one layer along each axis, and where the fastest changes."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, where


def draw(record: Record, path: Path) -> bool:
    """Write the picture; False where the record has nothing to draw."""
    if not record["results"]:
        return False
    plt = pyplot()
    metric = summary.metric_of(record)
    axes_names = list(dict.fromkeys(axis["axis"] for axis in record["axes"]))
    modes = list(dict.fromkeys(e["mode"] for e in record["results"]))
    rows = [
        (mode, *kind)
        for mode in modes
        for kind in dict.fromkeys((e["dtype"], e["layout"]) for e in record["results"])
    ]
    figure, axes = plt.subplots(
        len(rows), len(axes_names), figsize=(3.4 * len(axes_names), 2.7 * len(rows) + 0.6),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    names = [*record["providers"], summary.LIMIT]
    for line, (mode, dtype, layout) in zip(axes, rows, strict=True):
        for axis, name_of_axis in zip(line, axes_names, strict=True):
            points = summary.sweep_points(record, name_of_axis, mode, dtype, layout)
            for name in names:
                times = [(v, summary.microseconds(e, metric, name)) for v, e in points]
                times = [t for t in times if math.isfinite(t[1])]
                if times:
                    axis.plot(
                        *zip(*times, strict=True), "--" if name == summary.LIMIT else "o-",
                        color=COLOURS.get(name, FALLBACK), markersize=3, linewidth=1.3, label=name,
                    )  # fmt: skip
            for crossing in summary.crossovers(points, record["providers"], metric):
                axis.axvline(crossing.at, color="#9ca3af", linewidth=0.8, linestyle=":")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"{name_of_axis}: {mode}, {SHORT_LAYOUT[layout]}", loc="left",
                           fontsize=8)  # fmt: skip
            quiet_axis(axis, "both")
        line[0].set_ylabel("µs", fontsize=8)
    base, side = record["base"], record["base"]["side"]
    at = f"{base['batch']}x{base['channels']}x{side}x{side}, {base['hidden']} hidden"
    figure.suptitle(f"One extent of {at} growing (dotted: the fastest changes) \u2013 "
                    f"{where(record)}", fontsize=10)  # fmt: skip
    found: dict[str, object] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True
