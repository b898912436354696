"""What ``make gpu`` has found, in words: the verdicts, and times beside the computed ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.records import read_json
from tools.cost.beside import RECORD, Figure, beside, summary, table
from tools.gpu_verdicts import FINE, counted

RECORDS = ("layers", "layers-native", "layers-otherwise", "all-layers")


def _verdicts(path: Path) -> list[str]:
    found = read_json(path)
    wrong = [
        f"  {verdict['outcome']}: {name}: {verdict['text']}"
        for name, verdict in found.items()
        if verdict["outcome"] not in FINE
    ]
    return [f"{path.stem}: {counted(found) or 'none yet'}", *wrong]


def _figures(out: Path) -> list[str]:
    """Of each layer the first record that has a time of it."""
    cost = read_json(RECORD)
    figures: dict[tuple[str, ...], Figure] = {}
    for name in RECORDS:
        record = read_json(out / f"{name}.json")
        for figure in beside(record, cost) if record else []:
            key = (figure.backend, figure.layer, figure.layout, figure.direction)
            if key not in figures or (figures[key].problem and not figure.problem):
                figures[key] = figure
    if not figures:
        return []
    (out / "report.md").write_text(table(list(figures.values())) + "\n")
    return summary(list(figures.values()))


def _guarded(title: str, do: Callable[[], list[str]]) -> list[str]:
    """A record that cannot be read takes no other's place in the summary."""
    try:
        return do()
    except Exception as error:
        return [f"{title}: cannot be read: {type(error).__name__}: {error}"]


def lines(out: Path) -> list[str]:
    """For the summary; ``report.md`` has each figure."""
    found = []
    for path in sorted([*out.glob("verdicts-*.json"), *out.glob("situations-*.json")]):
        if ".before" not in path.name:
            found += _guarded(path.stem, partial(_verdicts, path))
    return found + _guarded("layers", partial(_figures, out))
