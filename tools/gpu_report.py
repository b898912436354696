"""What ``make gpu`` has found, in words: the verdicts, and times beside the computed ones."""

from __future__ import annotations

from pathlib import Path

from benchmarks.records import read_json
from tools.cost.beside import RECORD, beside, summary, table
from tools.gpu_verdicts import FINE, counted

RECORDS = ("layers", "layers-native", "all-layers")


def _verdicts(path: Path) -> list[str]:
    found = read_json(path)
    wrong = [
        f"  {verdict['outcome']}: {name}: {verdict['text']}"
        for name, verdict in found.items()
        if verdict["outcome"] not in FINE
    ]
    return [f"{path.stem}: {counted(found) or 'none yet'}", *wrong]


def lines(out: Path) -> list[str]:
    """For the summary; ``report.md`` has each figure."""
    found = []
    for path in sorted([*out.glob("verdicts-*.json"), *out.glob("situations-*.json")]):
        found += _verdicts(path) if ".before" not in path.name else []
    records = [read_json(out / f"{name}.json") for name in RECORDS]
    figures = [f for record in records if record for f in beside(record, read_json(RECORD))]
    if figures:
        (out / "report.md").write_text(table(figures) + "\n")
        found += summary(figures)
    return found
