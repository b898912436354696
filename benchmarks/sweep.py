"""``python -m benchmarks sweep``: one layer, and each of its extents growing alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .layer_run import LayerBench
from .options import SweepOptions
from .problem import Case
from .workloads import Layer

VALUES = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "channels": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "positions": (4, 7, 10, 14, 20, 28, 40, 56, 112),  # sides of the square
    "hidden": (4, 8, 16, 32, 64, 128, 256, 512),
}
CUDA_VALUES = {**VALUES, "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
BASE_NAME = {"positions": "side"}


def thinned(values: tuple[int, ...], points: int) -> tuple[int, ...]:
    """At most ``points`` of the values, evenly spread, the ends among them."""
    if not points or points >= len(values):
        return values
    if points == 1:
        return values[:1]
    last = len(values) - 1
    return tuple(values[round(i * last / (points - 1))] for i in range(points))


@dataclass
class SweepRun(LayerBench):
    """Cases along the axes; a point that several axes share is measured once."""

    kind: ClassVar[str] = "sweep"
    options: SweepOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        self.record["base"] = self.options.base
        self.record["axes"] = [
            {
                "axis": axis,
                "dtype": dtype,
                "layout": layout,
                "points": [
                    {"value": v**2 if axis == "positions" else v, "layer": c.layer.name,
                     "batch": c.batch}
                    for v, c in self._line(axis, dtype, layout)
                ],
            }
            for axis in self.options.axes
            for dtype in self.options.dtypes
            for layout in self.options.layouts
        ]  # fmt: skip

    def _line(self, axis: str, dtype: str, layout: str) -> list[tuple[int, Case]]:
        options = self.options
        name = BASE_NAME.get(axis, axis)
        values = (CUDA_VALUES if options.device.type == "cuda" else VALUES)[axis]
        chosen = dict.fromkeys([*thinned(values, options.points), options.base[name]])
        line = []
        for value in sorted(chosen):
            at = {**options.base, name: value}
            layer = Layer(at["channels"], at["side"], at["side"], at["hidden"], "relu", "sigmoid")
            line.append((value, Case(layer, dtype, layout, at["batch"])))
        return line

    def cases(self) -> list[Case]:
        options = self.options
        return list(
            dict.fromkeys(
                case
                for dtype in options.dtypes
                for layout in options.layouts
                for axis in options.axes
                for _, case in self._line(axis, dtype, layout)
            )
        )

    def _run(self, progress: Callable[[list[Any]], Any]) -> None:
        self.measure_all(self.cases(), lambda case: False, progress)
