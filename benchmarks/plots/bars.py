"""Speed-up over eager, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Entry, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 48  # more cannot be told apart
MARKS = {"eager-linear": "o", "timm": "s", "compile": "D", "compile-max": "d"}


def _bars(record: Record, layout: str, mode: str) -> list[tuple[str, Entry]]:
    """(network, entry) in the networks' order, for the first dtype and batch of the record."""
    first = record["results"][0]
    chosen = {
        entry["layer"]: entry
        for entry in record["results"]
        if (entry["layout"], entry["mode"]) == (layout, mode)
        and (entry["dtype"], entry["batch"]) == (first["dtype"], first["batch"])
    }
    out: list[tuple[str, Entry]] = []
    for network in record["networks"]:
        layers = [layer["layer"] for layer in network["layers"]]
        layers = [name for name in layers if name in chosen]
        if layers and len(out) + len(layers) <= MOST_LAYERS:
            out += [(network["network"], chosen[name]) for name in layers]
    return out


def _ratio(entry: Entry, metric: str, name: str, over: str, factor: float = 1.0) -> float:
    mine = summary.microseconds(entry, metric, name) * factor
    return summary.microseconds(entry, metric, over) / mine if mine else math.nan


def _write_heights(axis: Axes, heights: list[float]) -> None:
    for place, height in enumerate(heights):
        if math.isfinite(height):
            axis.annotate(
                f"{height:.1f}",
                (place, 0),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                color="white",
                zorder=5,
            )


def draw(record: Record, path: Path) -> bool:
    """Write the picture; False where the record has nothing to draw."""
    baselines = summary.baselines_of(record, "")
    if not record["results"] or not baselines:
        return False
    plt = pyplot()
    metric = summary.metric_of(record)
    over = baselines[0]
    layouts = [name for name in SHORT_LAYOUT if any(e["layout"] == name for e in record["results"])]
    modes = list(dict.fromkeys(e["mode"] for e in record["results"]))
    panels = [(mode, layout) for mode in modes for layout in layouts]
    widest = max(len(_bars(record, layout, mode)) for mode, layout in panels)
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(max(7.0, 2.2 + 0.36 * widest), 1.2 + 2.35 * len(panels)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    marks = {name: mark for name, mark in MARKS.items() if name in baselines and name != over}
    for axis, (mode, layout) in zip(axes[:, 0], panels, strict=True):
        bars = _bars(record, layout, mode)
        width = 0.8 / max(1, len(record["contenders"]))
        for k, contender in enumerate(record["contenders"]):
            heights = [_ratio(entry, metric, contender, over) for _, entry in bars]
            places = [i - 0.4 + width * (k + 0.5) for i in range(len(bars))]
            axis.bar(
                places,
                heights,
                width,
                color=COLOURS.get(contender, FALLBACK),
                label=contender,
                zorder=2,
            )
            if len(record["contenders"]) == 1:
                _write_heights(axis, heights)
        for name, marker in marks.items():
            if name not in record["contenders"]:
                heights = [_ratio(entry, metric, name, over) for _, entry in bars]
                axis.plot(
                    heights,
                    marker,
                    color=COLOURS[name],
                    markersize=4.5,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    label=name,
                    zorder=4,
                )
        limits = [_ratio(e, metric, "clone", over, e["limit_in_clones"]) for _, e in bars]
        ends = [i + side for i in range(len(bars)) for side in (-0.42, 0.42)]
        axis.hlines(
            limits,
            ends[::2],
            ends[1::2],
            color="black",
            linewidth=1.4,
            label="limit: copy speed (where in range)",
        )
        axis.axhline(1, color="#374151", linewidth=0.8, linestyle="--", zorder=3)
        tops = [v for v in limits if math.isfinite(v)]
        shown = [
            r
            for name in [*record["contenders"], *marks]
            for _, e in bars
            if math.isfinite(r := _ratio(e, metric, name, over))
        ]
        # room for the names; a limit far above every bar must not flatten the bars
        top = 1.22 * max([1.2, *shown, min(max(tops, default=0), 1.3 * max(shown, default=1))])
        axis.set_ylim(0, top)
        axis.set_xlim(-0.7, len(bars) - 0.3)
        axis.set_title(f"{mode}, {SHORT_LAYOUT[layout]}", loc="left", fontsize=10)
        axis.set_ylabel(f"speed-up over {over}", fontsize=8)
        quiet_axis(axis, "y")
        names = [name for name, _ in bars]
        for i in range(1, len(names)):
            if names[i] != names[i - 1]:
                axis.axvline(i - 0.5, color="#9ca3af", linewidth=0.8)
        if axis is axes[0, 0]:
            for name in dict.fromkeys(names):
                places = [i for i, other in enumerate(names) if other == name]
                axis.text(
                    sum(places) / len(places), top * 0.985, name,
                    ha="center", va="top", fontsize=8, color="#374151",
                    rotation=0 if len(places) > 2 else 90,
                )  # fmt: skip
    labels = [entry["layer"].split("-")[0].replace("x", "\u00d7") for _, entry in bars]
    axes[-1, 0].set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    first = record["results"][0]
    figure.suptitle(
        f"Squeeze-excite layers, {first['dtype']}, batch {first['batch']} \u2013 {where(record)}",
        fontsize=11,
    )
    handles, names = axes[0, 0].get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: names[i] not in record["contenders"])
    handles, names = [handles[i] for i in order], [names[i] for i in order]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True
