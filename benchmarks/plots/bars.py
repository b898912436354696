"""Speed-up over eager, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import summary
from benchmarks.summary import SHORT_LAYOUT, Entry, Record

from .style import COLOURS, FALLBACK, pyplot, quiet_axis, set_title, wide_legend

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


def _write_heights(axis: Axes, heights: list[float], marks: list[list[float]], room: float) -> None:
    """On top of each bar, and of the marks that lie there, what it is."""
    for place, height in enumerate(heights):
        if math.isfinite(height):
            near = [m[place] for m in marks if -0.02 * room < m[place] - height < 0.11 * room]
            axis.annotate(
                f"{height:.1f}", (place, max([height, *near])),
                xytext=(0, 4.5 if near else 1.5), textcoords="offset points",
                ha="center", fontsize=7, color="#111827", zorder=5,
            )  # fmt: skip


def _name_networks(axis: Axes, names: list[str]) -> None:
    """Above the axis, over the bars of each; slanted where a name is wider than its bars."""
    for name in dict.fromkeys(names):
        places = [i for i, other in enumerate(names) if other == name]
        narrow = len(places) * 0.36 * 72 < 4.8 * len(name)
        axis.annotate(
            name, (sum(places) / len(places), 1), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", fontsize=8, color="#374151",
            ha="left" if narrow else "center", va="bottom", rotation=30 if narrow else 0,
        )  # fmt: skip


def draw(record: Record, path: Path) -> bool:
    """Write the picture; False where the record has nothing to draw."""
    baselines = summary.baselines_of(record, "")
    if not record["results"] or not baselines:
        return False
    plt = pyplot()
    over = baselines[0]
    layouts = [name for name in SHORT_LAYOUT if any(e["layout"] == name for e in record["results"])]
    modes = summary.modes(record)
    panels = [(mode, layout) for mode in modes for layout in layouts]
    widest = max(len(_bars(record, layout, mode)) for mode, layout in panels)
    figure, axes = plt.subplots(
        len(panels), 1, sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(max(7.0, 2.2 + 0.36 * widest), 1.2 + 2.35 * len(panels)),
    )  # fmt: skip
    drawn = [
        _panel(axis, record, mode, layout, over)
        for axis, (mode, layout) in zip(axes[:, 0], panels, strict=True)
    ]
    top = max(drawn)
    axes[0, 0].set_ylim(0, 1.12 * top)
    bars = _bars(record, panels[-1][1], panels[-1][0])
    if len(record["contenders"]) == 1:
        for axis, (mode, layout) in zip(axes[:, 0], panels, strict=True):
            own = _bars(record, layout, mode)
            heights = _ratios(record, own, record["contenders"][0], over)
            marks = [_ratios(record, own, name, over) for name in _marks(record, over)]
            _write_heights(axis, heights, marks, top)
    networks = list(dict.fromkeys(name for name, _ in bars))
    axes[0, 0].set_title(axes[0, 0].get_title("left"), loc="left", fontsize=10,
                         pad=20 if len(networks) > 1 else 6)  # fmt: skip
    if len(networks) > 1:
        _name_networks(axes[0, 0], [name for name, _ in bars])
    labels = [entry["layer"].split("-")[0].replace("x", "\u00d7") for _, entry in bars]
    axes[-1, 0].set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    first = record["results"][0]
    whose = "Squeeze-excite layers" + (f" of {networks[0]}" if len(networks) == 1 else "")
    what = f"{first['dtype']}, batch {first['batch']}"
    set_title(figure, record, f"{whose}, {what}: speed relative to {over}")
    handles, names = axes[0, 0].get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: names[i] not in record["contenders"])
    wide_legend(figure, {names[i]: handles[i] for i in order})
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return True


def _marks(record: Record, over: str) -> dict[str, str]:
    """The baselines that are shown as marks, and how."""
    baselines = summary.baselines_of(record, "")
    shown = [n for n in MARKS if n in baselines and n != over and n not in record["contenders"]]
    return {name: MARKS[name] for name in shown}


def _ratios(record: Record, bars: list[tuple[str, Entry]], name: str, over: str) -> list[float]:
    return [_ratio(entry, summary.metric_of(record), name, over) for _, entry in bars]


def _panel(axis: Axes, record: Record, mode: str, layout: str, over: str) -> float:
    """Bars, marks and limits of a mode and layout; returns the height that the axis should show."""
    bars, metric = _bars(record, layout, mode), summary.metric_of(record)
    width = 0.8 / max(1, len(record["contenders"]))
    shown: list[float] = []
    for k, contender in enumerate(record["contenders"]):
        heights = _ratios(record, bars, contender, over)
        places = [i - 0.4 + width * (k + 0.5) for i in range(len(bars))]
        colour = COLOURS.get(contender, FALLBACK)
        axis.bar(places, heights, width, color=colour, label=contender, zorder=2)
        shown += heights
    for name, marker in _marks(record, over).items():
        heights = _ratios(record, bars, name, over)
        axis.plot(
            heights, marker, color=COLOURS[name], markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.6, label=name, zorder=4,
        )  # fmt: skip
        shown += heights
    limits = [_ratio(e, metric, "clone", over, e["limit_in_clones"]) for _, e in bars]
    ends = [i + side for i in range(len(bars)) for side in (-0.42, 0.42)]
    axis.hlines(
        limits, ends[::2], ends[1::2], color="black", linewidth=1.4,
        label="limit: copy speed (where in range)",
    )  # fmt: skip
    axis.axhline(1, color="#374151", linewidth=0.8, linestyle="--", zorder=3)
    axis.set_xlim(-0.7, len(bars) - 0.3)
    axis.set_title(f"{mode}, {SHORT_LAYOUT[layout]}", loc="left", fontsize=10)
    axis.set_ylabel(f"speed-up over {over}", fontsize=8)
    quiet_axis(axis, "y")
    names = [name for name, _ in bars]
    for i in range(1, len(names)):
        if names[i] != names[i - 1]:
            axis.axvline(i - 0.5, color="#9ca3af", linewidth=0.8)
    # A limit far above every bar must not flatten the bars.
    highest = max((v for v in shown if math.isfinite(v)), default=1)
    tops = max((v for v in limits if math.isfinite(v)), default=0)
    return max(1.2, highest, min(tops, 1.3 * highest))
