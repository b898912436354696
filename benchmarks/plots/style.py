"""What the pictures have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.summary import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def where(record: Record) -> str:
    """Hardware and torch, for a title."""
    env = record["environment"]
    device = env["device"] if env["device"] != "cpu" else f"{env['cpu']}, {env['threads']} threads"
    return f"{device}, torch {env['torch']}"
