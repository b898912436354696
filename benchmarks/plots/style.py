"""What the pictures have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks import processors
from benchmarks.summary import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# One provider, one colour in every picture.
COLOURS = {
    "eager-conv": "#9ca3af",
    "eager-linear": "#6b7280",
    "timm": "#b45309",
    "compile": "#dc2626",
    "compile-max": "#f87171",
    "native": "#2563eb",
    "triton": "#f59e0b",
    "cuda": "#10b981",
    "halves": "#7c3aed",
    "reference": "#d1d5db",
    "clone": "#111827",
    "original": "#9ca3af",
    "fused": "#60a5fa",
    "neighbours": "#2563eb",
    "compile-fused": "#f59e0b",
    "no-se": "#111827",
    "compile-no-se": "#374151",
}
FALLBACK = "#0891b2"


def pyplot() -> Any:
    """matplotlib without a display. Raises ImportError where it is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def quiet_axis(axis: Axes, grid: str) -> None:
    axis.grid(axis=grid, color="#e5e7eb", zorder=0)  # type: ignore[arg-type]
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def machine(record: Record) -> str:
    """The processor or the GPU."""
    env = record["environment"]
    return str(env["device"]) if env["device"] != "cpu" else processors.name(env)


def where(record: Record) -> str:
    """Hardware and torch, for a title."""
    env = record["environment"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    return f"{machine(record)}{threads}, torch {env['torch']}"


def set_title(figure: Figure, record: Record, text: str) -> None:
    """What is shown, and below it where it was measured; broken into lines that fit the figure."""
    room = int(figure.get_figwidth() * 12)  # letters of size 10
    lines = [
        line
        for part in (text, where(record))
        for line in textwrap.wrap(part, room, break_on_hyphens=False)
    ]
    figure.suptitle("\n".join(lines), fontsize=10)


def plain_ticks(axis: Axis) -> None:
    """Numbers as people write them, on a logarithmic axis: 0.1, 1, 10; 2 and 5 between them where
    there are fewer than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if axis.get_transform().base == 10 and high < 100 * low:  # type: ignore[attr-defined]
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def wide_legend(figure: Figure, found: Mapping[str, Any]) -> None:
    """A legend below, of labels and handles, in as many columns as the figure has room for."""
    longest = max(map(len, found))
    room = figure.get_figwidth() * 14  # letters
    fits = sum(len(name) + 7 for name in found) <= room
    columns = len(found) if fits else max(1, int(room / (longest + 7)))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8
    )
