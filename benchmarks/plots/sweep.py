"""One layer, each of its extents growing alone: how many times as fast as eager."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Record

from .style import COLOURS, FALLBACK, plain_ticks, pyplot, quiet_axis, set_title, wide_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "batch": "batch: images", "channels": "channels",
    "positions": "positions: height times width", "hidden": "hidden channels",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")


def draw(record: Record, path: Path, mode: str) -> bool:
    """Write the picture of a mode, a panel for each axis; False where there is nothing to draw."""
    baselines = summary.baselines_of(record, "")
    if not baselines or not any(e["mode"] == mode for e in record["results"]):
        return False
    plt = pyplot()
    over = baselines[0]
    names = [name for name in record["providers"] if name != over]
    kinds = list(dict.fromkeys((a["dtype"], a["layout"]) for a in record["axes"]))
    axes_names = list(dict.fromkeys(axis["axis"] for axis in record["axes"]))
    columns = min(2, len(axes_names))
    lines = math.ceil(len(axes_names) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(1 + 4 * columns, 1.3 + 2.8 * lines), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    found: dict[str, object] = {}
    for axis in axes.flat[len(axes_names) :]:
        axis.remove()
    for axis, extent in zip(axes.flat, axes_names, strict=False):
        for (dtype, layout), style in zip(kinds, STYLES * len(kinds), strict=False):
            points = summary.sweep_points(record, extent, mode, dtype, layout)
            for name in names:
                line = _line(axis, record, points, name, over, style)
                kind = SHORT_LAYOUT[layout] if len({d for d, _ in kinds}) == 1 else dtype
                if line is not None:
                    found[f"{name}, {kind}" if len(kinds) > 1 else name] = line
        axis.axhline(1, color="#374151", linewidth=1, linestyle="--", zorder=1)
        axis.set_xscale("log", base=2)
        plain_ticks(axis.xaxis)
        axis.set_xlabel(LABELS.get(extent, extent), fontsize=9)
        quiet_axis(axis, "both")
    axes[0, 0].set_ylim(bottom=0)
    for row in axes:
        row[0].set_ylabel(f"speed-up over {over}", fontsize=8)
    base, side = record["base"], record["base"]["side"]
    at = f"{base['batch']}x{base['channels']}x{side}x{side}, {base['hidden']} hidden"
    set_title(figure, record, f"One extent of {at} growing, {mode}: speed relative to {over}")
    order = sorted(found, key=lambda label: names.index(label.partition(",")[0]))
    wide_legend(figure, {label: found[label] for label in order})
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _line(
    axis: Axes, record: Record, points: list[tuple[int, summary.Entry]], name: str, over: str,
    style: str,
) -> object | None:  # fmt: skip
    """A provider's speed-ups along an axis; None where it has none."""
    metric = summary.metric_of(record)
    ratios = [
        (value, summary.microseconds(e, metric, over) / summary.microseconds(e, metric, name))
        for value, e in points
    ]
    ratios = [pair for pair in ratios if math.isfinite(pair[1])]
    if not ratios:
        return None
    (line,) = axis.plot(
        *zip(*ratios, strict=True), style, marker="o", color=COLOURS.get(name, FALLBACK),
        markersize=3, linewidth=1.4,
    )  # fmt: skip
    return line
