"""Pictures of a record. Each is drawn from the record and nothing else."""

from __future__ import annotations

from pathlib import Path

from benchmarks.extras import why_left_out
from benchmarks.summary import Record

from . import bars, models, roofline, sweep

DRAWINGS = {
    "layers": (("", bars.draw), ("-roofline", roofline.draw)),
    "models": (("", models.draw_speed), ("-price", models.draw_price)),
    "sweep": (("", sweep.draw),),
}
TITLES = {
    ("layers", ""): "Speed-up per layer",
    ("layers", "-roofline"): "Roofline: bytes per second against a copy",
    ("models", ""): "Speed-up of whole networks",
    ("models", "-price"): "The price of SE",
    ("sweep", ""): "Cost of a layer as its extents grow",
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
