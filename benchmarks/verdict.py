"""What a record says, in a few words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from . import summary
from .stats import geomean
from .summary import Record


def verdict(record: Record) -> str:
    """The means, a sentence for each mode; of a record without results, that it has none."""
    parts = list(_PARTS[record["kind"]](record)) if record["results"] else []
    return ". ".join(parts) + "." if parts else "No result."


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _modes(record: Record) -> list[str]:
    return list(dict.fromkeys(entry["mode"] for entry in record["results"]))


def _of_models(record: Record) -> Iterator[str]:
    metric = summary.metric_of(record)
    for mode in _modes(record):
        entries = [e for e in record["results"] if e["mode"] == mode]
        found = [summary.ratio(e, metric, "fused", "original") for e in entries]
        known = [figure["ratio"] for figure in found if figure is not None]
        if not known:
            continue
        text = f"{_capital(mode)}: fused networks run at {geomean(known):.2f}× the speed"
        if len(known) > 1:
            text += f" ({min(known):.2f} to {max(known):.2f})"
        both = [(summary.price(e, metric, "original"), summary.price(e, metric, "fused"))
                for e in entries]  # fmt: skip
        prices = [(before[0], after[0]) for before, after in both if before and after]
        if prices:
            before, after = (median(column) for column in zip(*prices, strict=True))
            text += f", the price of SE from {before:.0f} % to {after:.0f} % in the median"
        yield text


def _of_layers(record: Record) -> Iterator[str]:
    for contender in record["contenders"]:
        for mode in _modes(record):
            rows = [r for r in summary.rows(record, mode) if r.contender == contender]
            # The last row of each type is that of all batches.
            overall = {r.dtype: r for r in rows if r.network == "all layers"}
            for dtype, row in overall.items():
                speeds = row.speedup.items()
                means = [f"{mean.text('×')} that of {name}" for name, mean in speeds if mean.layers]
                kind = f", {dtype}" if len(overall) > 1 else ""
                what = f"{_capital(mode)}{kind}, {row.layers} layers"
                yield f"{what}: the speed of {contender} is {', '.join(means)}"
    found = len(summary.losses(record))
    yield f"{found} of {summary.comparisons(record)} comparisons lost by more than 5 %"


def _of_sweep(record: Record) -> Iterator[str]:
    metric = summary.metric_of(record)
    for contender in record["contenders"]:
        for mode in _modes(record):
            entries = [e for e in record["results"] if e["mode"] == mode]
            first = 0
            for entry in entries:
                times = {n: summary.microseconds(entry, metric, n) for n in record["providers"]}
                known = {n: t for n, t in times.items() if math.isfinite(t)}
                first += bool(known) and min(known, key=lambda name: known[name]) == contender
            points = f"{first} of {len(entries)} points"
            yield f"{_capital(mode)}: {contender} is the fastest at {points}"


_PARTS = {"models": _of_models, "layers": _of_layers, "sweep": _of_sweep}
