"""What a record says, in a few words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from . import processors, summary
from .digest import Lines
from .stats import geomean
from .summary import Record


def verdict(record: Record) -> str:
    """The means, a sentence for each mode; of a record without results, that it has none."""
    parts = list(_PARTS[record["kind"]](record)) if record["results"] else []
    return ". ".join(parts) + "." if parts else "No result."


class Gain(NamedTuple):
    """Of the whole networks of a record in one mode."""

    mean: float  # geometric, of the speed of the fused networks over the originals'
    low: float
    high: float
    count: int
    price: tuple[float, float] | None  # of SE, before and after: medians, per cent


def gain(record: Record, mode: str) -> Gain | None:
    """What fusing gains whole networks; None without a figure."""
    metric = summary.metric_of(record)
    entries = [e for e in record["results"] if e["mode"] == mode]
    found = [summary.ratio(e, metric, "fused", "original") for e in entries]
    known = [figure["ratio"] for figure in found if figure is not None]
    if not known:
        return None
    both = [(summary.price(e, metric, "original"), summary.price(e, metric, "fused"))
            for e in entries]  # fmt: skip
    prices = [(before[0], after[0]) for before, after in both if before and after]
    before, after = (median(column) for column in zip(*prices, strict=True)) if prices else (0, 0)
    price = (before, after) if prices else None
    return Gain(geomean(known), min(known), max(known), len(known), price)


def _of_models(record: Record) -> Iterator[str]:
    for mode in summary.modes(record):
        found = gain(record, mode)
        if found is None:
            continue
        text = f"{summary.capital(mode)}: fused networks run at {found.mean:.2f}× the speed"
        if found.count > 1:
            text += f" ({found.low:.2f} to {found.high:.2f})"
        if found.price:
            before, after = found.price
            text += f"; what SE adds to the time of the network without it {_falls(before, after)}"
        yield text


def _falls(before: float, after: float) -> str:
    went = "falls" if after < before else "goes"
    return f"{went} from {before:.0f} % to {after:.0f} % (median)"


def _overall(record: Record, mode: str, contender: str) -> dict[str, summary.Row]:
    """The means over all layers, of each dtype; the last row of a dtype is that of all batches."""
    rows = [r for r in summary.rows(record, mode) if r.contender == contender]
    return {row.dtype: row for row in rows if row.network == "all layers"}


def _of_layers(record: Record) -> Iterator[str]:
    for contender in record["contenders"]:
        for mode in summary.modes(record):
            overall = _overall(record, mode, contender)
            for dtype, row in overall.items():
                speeds = row.speedup.items()
                means = [f"{mean.text('×')} that of {name}" for name, mean in speeds if mean.layers]
                kind = f", {dtype}" if len(overall) > 1 else ""
                what = f"{summary.capital(mode)}{kind}, {row.layers} layers"
                yield f"{what}: the speed of {contender} is {', '.join(means)}"
    found = len(summary.losses(record))
    yield f"{found} of {summary.comparisons(record)} comparisons lost by more than 5 %"


def _of_sweep(record: Record) -> Iterator[str]:
    metric = summary.metric_of(record)
    for contender in record["contenders"]:
        for mode in summary.modes(record):
            entries = [e for e in record["results"] if e["mode"] == mode]
            first = 0
            for entry in entries:
                times = {n: summary.microseconds(entry, metric, n) for n in record["providers"]}
                known = {n: t for n, t in times.items() if math.isfinite(t)}
                first += bool(known) and min(known, key=lambda name: known[name]) == contender
            points = f"{first} of {len(entries)} points"
            yield f"{summary.capital(mode)}: {contender} is the fastest at {points}"


_PARTS = {"models": _of_models, "layers": _of_layers, "sweep": _of_sweep}


# -- several records


def results(records: Sequence[Record]) -> Lines:
    """A line for each record and mode: of networks their gain, of layers their speed.

    Raises:
        ValueError: they are of several kinds, or of a kind that has no such table.
    """
    kinds = {record["kind"] for record in records}
    if kinds == {"models"}:
        return _results_of_models(records)
    if kinds == {"layers"}:
        return _results_of_layers(records)
    raise ValueError(f"expected records of models, or of layers, got {', '.join(sorted(kinds))}")


def _results_of_models(records: Sequence[Record]) -> Lines:
    head = ["machine", "networks", "mode", "speed, fused", "range", "price of SE"]
    out = [head]
    for record in records:
        networks = len({entry["network"] for entry in record["results"]})
        for mode in summary.modes(record):
            if found := gain(record, mode):
                before, after = found.price or (math.nan, math.nan)
                price = f"{before:.0f} % to {after:.0f} %" if found.price else "n/a"
                span = f"{found.low:.2f} to {found.high:.2f}"
                name = processors.name(record["environment"])
                out.append([name, str(networks), mode, f"{found.mean:.2f}×", span, price])
    return out


def _results_of_layers(records: Sequence[Record]) -> Lines:
    baselines = list(dict.fromkeys(n for r in records for n in summary.baselines_of(r, "")))
    out = [["machine", "layers", "mode", *(f"vs `{name}`" for name in baselines), "lost"]]
    for record in records:
        for contender in record["contenders"]:
            for mode in summary.modes(record):
                lost = f"{len(summary.losses(record, mode))} of {summary.comparisons(record, mode)}"
                for row in _overall(record, mode, contender).values():
                    means = {name: mean.text("×") for name, mean in row.speedup.items()}
                    cells = [means.get(name, "n/a") for name in baselines]
                    name = processors.name(record["environment"])
                    out.append([name, str(row.layers), mode, *cells, lost])
    return out


def machines(records: Sequence[Record]) -> Lines:
    """A line for each record: what it is of, and what it says of its machine."""
    out = [["machine", "vectors", "cache per core", "last cache", "record of", "taken", "commit"]]
    for record in records:
        env = record["environment"]
        caches = env.get("caches") or {}
        sizes = [_bytes(caches[name]) if caches.get(name) else "n/a" for name in ("core", "last")]
        vectors = _VECTORS.get(env.get("cpu_capability"), "n/a")
        stamp = [env["date"][:10], (env["commit"] or "n/a")[:10]]
        out.append([processors.name(env), vectors, *sizes, record["kind"], *stamp])
    return out


_VECTORS = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "plain"}


def _bytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
