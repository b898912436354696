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

    Args:
        rows: the lines of ``metrics.jsonl``.
        path: of the picture.

    Returns:
        Whether it was drawn: not without a finished epoch.
    """
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    run = next((row for row in rows if row["kind"] == "run"), {})
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    x = [row["epoch"] for row in epochs]
    mark = "o" if len(x) == 1 else ""
    best = max(epochs, key=lambda row: row["test_accuracy"])  # the first of the best, as best.pt
    for axis, name, factor, label in (
        (loss, "loss", 1, "cross-entropy"), (accuracy, "accuracy", 100, "accuracy, %"),
    ):  # fmt: skip
        for part, text, colour in (
            ("train", _train_label(run, name), GREY),
            ("test", "test", BLUE),
        ):
            values = [factor * row[f"{part}_{name}"] for row in epochs]
            axis.plot(x, values, color=colour, label=text, marker=mark)
        axis.set_ylabel(label)
    accuracy.plot(
        [best["epoch"]], [100 * best["test_accuracy"]], "o", color=BLUE,
        label=f"best: {100 * best['test_accuracy']:.1f} % (epoch {best['epoch']})",
    )  # fmt: skip
    rate.plot(x, [row["lr"] for row in epochs], color=ORANGE, marker=mark)
    rate.set_ylabel("learning rate")
    for axis in (loss, accuracy):
        axis.legend(frameon=False, fontsize=9)
    for axis in (loss, accuracy, rate):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        _mark_stages(axis, epochs)
    figure.suptitle(_title(run), fontsize=11)
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)
    return True


def _title(run: Row) -> str:
    """The network, its data and the size of the run, as far as they are recorded."""
    options = run.get("options", {})
    parts = [options.get("model"), run.get("data")]
    if "batch" in run:
        parts.append(f"batch {run['batch']}")
    parts.append(options.get("precision"))
    return ", ".join(map(str, filter(None, parts))) or "Training"


def _train_label(run: Row, name: str) -> str:
    """What the training curve is of: not what the test curve is of."""
    options = run.get("options", {})
    ways = ["label smoothing"] if name == "loss" and options.get("label_smoothing") else []
    ways += ["augmented"] if options.get("augment", "none") != "none" else []
    return f"train ({', '.join(ways)})" if ways else "train"


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
