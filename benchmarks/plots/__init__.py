"""Pictures of a record. Each is drawn from the record and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.extras import why_left_out
from benchmarks.summary import Record

from . import bars, models, roofline, sweep

DRAWINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "layers": (("", bars.draw), ("-roofline", roofline.draw)),
    "models": (("", models.draw_speed), ("-price", models.draw_price)),
    "sweep": (
        ("", partial(sweep.draw, mode="forward")),
        ("-backward", partial(sweep.draw, mode="backward")),
        ("-training", partial(sweep.draw, mode="forward+backward")),
    ),
}
TITLES = {
    ("layers", ""): "Speed-up per layer",
    ("layers", "-roofline"): "Roofline: effective bandwidth against a copy",
    ("models", ""): "Speed-up of whole networks",
    ("models", "-price"): "The price of SE",
    ("sweep", ""): "Speed-up of a layer as its extents grow, forward",
    ("sweep", "-backward"): "Speed-up of a layer as its extents grow, backward",
    ("sweep", "-training"): "Speed-up of a layer as its extents grow, forward and backward",
}


def draw(record: Record, path: Path) -> list[Path]:
    """Write the pictures that the record has figures for beside ``path``; returns their paths, none
    without matplotlib."""
    if why_left_out("plots") is not None:
        return []
    found = []
    for suffix, function in DRAWINGS[record["kind"]]:
        target = path.with_name(f"{path.stem}{suffix}.png")
        if function(record, target):
            found.append(target)
    return found
