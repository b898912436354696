"""A run's curves as a picture; ``python -m senet_kernels.train.plots RUN...`` draws them again."""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from .extras import why_no_curves
from .record import CURVES, Row, read_rows

BLUE, ORANGE, GREY = "#2563eb", "#f59e0b", "#6b7280"


def draw(rows: list[Row], path: Path) -> bool:
    """Loss, accuracy and learning rate over epochs; matplotlib must import.

    Returns:
        Whether it was drawn: not without a finished epoch.
    """
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    x = [row["epoch"] for row in epochs]
    for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
        for part, colour in (("train", GREY), ("test", BLUE)):
            axis.plot(x, [row[f"{part}_{name}"] for row in epochs], color=colour, label=part)
        axis.set_ylabel(name)  # in training with label smoothing and augmentation
        axis.legend(frameon=False)
    rate.plot(x, [row["lr"] for row in epochs], color=ORANGE)
    rate.set_ylabel("learning rate")
    for axis in (loss, accuracy, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        _mark_stages(axis, epochs)
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
    return True


def _mark_stages(axis: Any, epochs: list[Row]) -> None:
    """A line where a stage of fine-tuning ends and the next begins."""
    for before, after in pairwise(epochs):
        if before["stage"] != after["stage"]:
            axis.axvline(before["epoch"] + 0.5, color="black", linewidth=0.8, linestyle=":")


def main(folders: list[str]) -> int:
    """Draw the curves of these runs; the exit status."""
    reason = why_no_curves()
    if reason is not None:
        print(f"no curves: {reason}", file=sys.stderr)
        return 1
    for folder in folders:
        path = Path(folder) / CURVES
        if not draw(read_rows(Path(folder)), path):
            print(f"{folder}: no finished epoch", file=sys.stderr)
            return 1
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
