"""Rows of the summary, computed from a record and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from senet_kernels.timing import is_busy

from .providers import BASELINES, LIMIT
from .regimes import CLASSES, MEMORY, REGIMES, memory_class, regime
from .stats import geomean

Record = dict[str, Any]
Entry = dict[str, Any]  # of record['results']
LOSS = 0.95  # slower than a baseline by more than 5 %

SHORT_LAYOUT = {"contiguous": "NCHW", "channels_last": "NHWC"}


def entries_of(record: Record) -> list[Entry]:
    """Everything that was measured."""
    return [*record["results"], *record.get("small_call", [])]


def modes(record: Record) -> list[str]:
    """What was timed, in the order of the results: forward, forward+backward."""
    return list(dict.fromkeys(entry["mode"] for entry in record["results"]))


def capital(text: str) -> str:
    """A title: the first letter as a capital, the rest as it is."""
    return f"{text[0].upper()}{text[1:]}"


def small_calls(record: Record) -> Iterator[tuple[str, str, Entry]]:
    """(what, metric, entry) of the small call: wall time, and where it was taken host time."""
    for entry in record.get("small_call", []):
        yield entry["mode"], "wall", entry
        if any("host" in provider for provider in entry["providers"].values()):
            yield f"{entry['mode']}, host", "host", entry


@dataclass(frozen=True)
class Mean:
    """A geometric mean over the layers that have the figure, ``of`` how many."""

    value: float
    layers: int
    of: int
    wrong: bool = False

    def text(self, suffix: str = "x") -> str:
        if self.wrong:
            return "wrong"
        if not self.layers:
            return "n/a"
        partial = "" if self.layers == self.of else f" ({self.layers}/{self.of})"
        return f"{self.value:.2f}{suffix}{partial}"


@dataclass(frozen=True)
class Row:
    """One line: a contender on the layers of one network, in one layout and mode."""

    network: str
    contender: str
    dtype: str
    batch: int | None  # None: all there are
    layout: str
    mode: str
    layers: int
    speedup: dict[str, Mean]  # over each baseline
    over_limit: Mean
    worst: tuple[str, float] | None  # layer and speed-up over the first baseline

    @property
    def type(self) -> str:
        """Data type and batch, for a column of a table."""
        return f"{self.dtype} {'all b' if self.batch is None else f'b{self.batch}'}"


def metric_of(record: Record) -> str:
    """``device`` where device times were taken, else ``wall``."""
    entries = entries_of(record)
    return "device" if any(entry.get("speedup", {}).get("device") for entry in entries) else "wall"


def _figure(entry: Entry, metric: str, contender: str, baseline: str) -> float | None:
    speedups = entry.get("speedup", {}).get(metric, {})
    return speedups.get(contender, {}).get(baseline, {}).get("ratio")


def _over_limit(entry: Entry, metric: str, name: str) -> float | None:
    return entry["providers"].get(name, {}).get(metric, {}).get("over_limit")


def _mean(values: Iterable[float | None], *, wrong: bool) -> Mean:
    every = list(values)
    present = [value for value in every if value is not None]
    return Mean(geomean(present), len(present), len(every), wrong)


def make_row(
    entries: list[Entry], network: str, contender: str, baselines: list[str], metric: str
) -> Row:
    """Geometric means over ``entries``, which share dtype and mode."""
    first = entries[0]
    batches = {entry["batch"] for entry in entries}
    layouts = list(dict.fromkeys(entry["layout"] for entry in entries))

    def wrong(*names: str) -> bool:
        got = [e["providers"].get(name, {}).get("status") for e in entries for name in names]
        return "wrong" in got

    head = baselines[0] if baselines else ""
    figures = [(e["layer"], _figure(e, metric, contender, head)) for e in entries]
    known = [(layer, value) for layer, value in figures if value is not None]
    return Row(
        network=network,
        contender=contender,
        dtype=first["dtype"],
        batch=first["batch"] if len(batches) == 1 else None,
        layout=SHORT_LAYOUT[layouts[0]] if len(layouts) == 1 else "both",
        mode=first["mode"],
        layers=len({entry["layer"] for entry in entries}),
        speedup={
            name: _mean(
                (_figure(e, metric, contender, name) for e in entries),
                wrong=wrong(contender, name),
            )
            for name in baselines
        },
        over_limit=_mean(
            (_over_limit(e, metric, contender) for e in entries), wrong=wrong(contender)
        ),
        worst=min(known, key=lambda pair: pair[1]) if known and not wrong(contender) else None,
    )


def baselines_of(record: Record, contender: str) -> list[str]:
    return [name for name in BASELINES if name in record["providers"] and name != contender]


def rows(record: Record, mode: str) -> Iterator[Row]:
    """One row per contender, dtype, batch, network and layout; an overall row ends each block, and
    one over all batches where there are several."""
    metric = metric_of(record)
    entries = [entry for entry in record["results"] if entry["mode"] == mode]
    blocks = dict.fromkeys((entry["dtype"], entry["batch"]) for entry in entries)
    for contender in record["contenders"]:
        baselines = baselines_of(record, contender)
        for dtype, batch in blocks:
            block = [e for e in entries if (e["dtype"], e["batch"]) == (dtype, batch)]
            for network in record["networks"]:
                names = {layer["layer"] for layer in network["layers"]}
                for layout in SHORT_LAYOUT:
                    own = [e for e in block if e["layer"] in names and e["layout"] == layout]
                    if own:
                        yield make_row(own, network["network"], contender, baselines, metric)
            yield make_row(block, "all layers", contender, baselines, metric)
        for dtype in dict.fromkeys(dtype for dtype, _ in blocks):
            if sum(dtype == other for other, _ in blocks) > 1:
                every = [entry for entry in entries if entry["dtype"] == dtype]
                yield make_row(every, "all layers", contender, baselines, metric)


def regimes_of(record: Record, entry: Entry, contender: str) -> tuple[str | None, str | None]:
    """The regime of an entry, and in that of memory the class of the contender's plan."""
    found = regime(entry["bytes"], record["environment"])
    plan = entry["providers"].get(contender, {}).get("plan")
    return found, memory_class(plan) if found == MEMORY else None


def regime_rows(record: Record, mode: str) -> Iterator[Row]:
    """One row per contender, dtype, batch and regime, over all networks and layouts; then one per
    class of the memory regime, where the contender's plans tell it.

    ``Row.network`` is the regime. Nothing where the record does not know its caches.
    """
    metric = metric_of(record)
    entries = [entry for entry in record["results"] if entry["mode"] == mode]
    for contender in record["contenders"]:
        baselines = baselines_of(record, contender)
        for dtype, batch in dict.fromkeys((e["dtype"], e["batch"]) for e in entries):
            for name in (*REGIMES, *CLASSES):
                own = [
                    e
                    for e in entries
                    if (e["dtype"], e["batch"]) == (dtype, batch)
                    and name in regimes_of(record, e, contender)
                ]
                if own:
                    yield make_row(own, name, contender, baselines, metric)


def ratio(entry: Entry, metric: str, contender: str, baseline: str) -> dict[str, float] | None:
    """Speed-up of a contender over a baseline, with its interval; None where there is none."""
    speedups = entry.get("speedup", {}).get(metric, {})
    found: dict[str, float] | None = speedups.get(contender, {}).get(baseline)
    return found


def price(entry: Entry, metric: str, name: str) -> tuple[float, float, float] | None:
    """What SE adds to a network's time, in per cent, with its interval: a variant beside the same
    network without SE, compiled beside compiled where that was measured."""
    compiled = name.startswith("compile")
    without = "compile-no-se" if compiled else "no-se"
    faster = ratio(entry, metric, name, without)
    if faster is None and name == "original":
        other = ratio(entry, metric, without, name)  # the original is no contender
        if other is None:
            return None
        faster = {"ratio": 1 / other["ratio"], "ci_low": 1 / other["ci_high"],
                  "ci_high": 1 / other["ci_low"]}  # fmt: skip
    if faster is None:
        return None
    return tuple(100 * (1 / faster[k] - 1) for k in ("ratio", "ci_high", "ci_low"))  # type: ignore[return-value]


def bandwidth(entry: Entry, metric: str, name: str) -> float:
    """Bytes per second: the least traffic of the mode over a provider's time; NaN without one.

    A copy's own traffic is 2N in any mode.
    """
    clones = 1.0 if name == LIMIT else entry["limit_in_clones"]
    return clones * 2 * entry["bytes"] / (1e-6 * microseconds(entry, metric, name))


# -- sweeps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """Between two values of an axis another provider becomes the fastest."""

    at: float
    before: str
    after: str


def sweep_points(
    record: Record, axis: str, mode: str, dtype: str, layout: str
) -> list[tuple[int, Entry]]:
    """(value, entry) along an axis, as far as it was measured."""
    line = next(
        a for a in record["axes"] if (a["axis"], a["dtype"], a["layout"]) == (axis, dtype, layout)
    )
    entries = {
        (e["layer"], e["batch"]): e
        for e in record["results"]
        if (e["mode"], e["dtype"], e["layout"]) == (mode, dtype, layout)
    }
    keys = [(point["value"], (point["layer"], point["batch"])) for point in line["points"]]
    return [(value, entries[key]) for value, key in keys if key in entries]


def crossovers(
    points: list[tuple[int, Entry]], providers: list[str], metric: str, margin: float = 0.03
) -> list[Crossing]:
    """Where the fastest provider changes; leads within ``margin`` count as level.

    The place is interpolated on logarithmic scales between the two values.
    """
    found: list[Crossing] = []
    leader, last = "", (0, {})
    for value, entry in points:
        times = {n: t for n in providers if math.isfinite(t := microseconds(entry, metric, n))}
        if not times:
            continue
        best = min(times, key=lambda name: times[name])
        if leader not in times:
            leader = best
        elif times[best] < (1 - margin) * times[leader]:
            before = [math.log(last[1][n]) for n in (best, leader)] if best in last[1] else [0, 0]
            now = [math.log(times[n]) for n in (best, leader)]
            gap, gap_now = max(0.0, before[0] - before[1]), now[1] - now[0]
            part = gap / (gap + gap_now)
            at = math.exp(math.log(last[0]) + part * (math.log(value) - math.log(last[0])))
            found.append(Crossing(at, leader, best))
            leader = best
        last = (value, times)
    return found


# Of networks: what each variant has to beat. Without SE a network computes something else.
MODEL_BASELINES = {
    "fused": ("original",),
    "neighbours": ("original",),
    "compile-fused": ("compile", "original"),
}


def _must_beat(record: Record, contender: str, baseline: str) -> bool:
    if record["kind"] == "models":
        return baseline in MODEL_BASELINES.get(contender, ())
    return True


def losses(
    record: Record, mode: str | None = None
) -> list[tuple[str, str, Entry, dict[str, float]]]:
    """(contender, baseline, entry, speed-up) wherever a contender loses by more than 5 %: in one
    mode, or in all."""
    metric = metric_of(record)
    found = [
        (contender, baseline, entry, figure)
        for entry in entries_of(record)
        for contender, over in entry.get("speedup", {}).get(metric, {}).items()
        for baseline, figure in over.items()
        if figure["ratio"] < LOSS
        and _must_beat(record, contender, baseline)
        and mode in (None, entry["mode"])
    ]
    return sorted(found, key=lambda item: item[3]["ratio"])


def comparisons(record: Record, mode: str | None = None) -> int:
    """How many figures :func:`losses` has looked at."""
    return sum(
        _must_beat(record, contender, baseline)
        for entry in entries_of(record)
        if mode in (None, entry["mode"])
        for contender, over in entry.get("speedup", {}).get(metric_of(record), {}).items()
        for baseline in over
    )


def case_name(entry: Entry, *, whole: bool = False) -> str:
    """What was measured, in a few words; of a layer its extents, or its ``whole`` name, which has
    the hidden width and the functions too."""
    layout = SHORT_LAYOUT[entry["layout"]]
    what = entry["network"] if "layer" not in entry else entry["layer"]
    if "layer" in entry and not whole:
        what = what.split("-")[0]
    return f"{what} {entry['dtype']} b{entry['batch']} {layout}"


def loss_text(loss: tuple[str, str, Entry, dict[str, float]]) -> str:
    """One of the losses."""
    contender, baseline, entry, figure = loss
    return (
        f"{contender} vs {baseline} {figure['ratio']:.2f}× "
        f"[{figure['ci_low']:.2f}, {figure['ci_high']:.2f}]: {case_name(entry)} {entry['mode']}"
    )


def disturbed(record: Record) -> tuple[int, int]:
    """How many measurements ran while other processes kept a fifth of a core busy, of how many."""
    entries = entries_of(record)
    known = [load for e in entries if (load := e.get("cores_busy_elsewhere")) is not None]
    return sum(map(is_busy, known)), len(entries)


def missing(record: Record) -> dict[tuple[str, str, str], int]:
    """(provider, status, reason) of what has no figure, and on how many measurements."""
    found: dict[tuple[str, str, str], int] = {}
    for name, reason in record["unavailable"].items():
        found[name, "n/a", reason] = 0
    for entry in entries_of(record):
        for name, status in entry["providers"].items():
            if status["status"] != "ok":
                key = (name, status["status"], status.get("reason", ""))
                found[key] = found.get(key, 0) + 1
    return found


def microseconds(entry: Entry, metric: str, name: str) -> float:
    """Median of a provider, NaN where there is none."""
    return entry["providers"].get(name, {}).get(metric, {}).get("median_us", math.nan)
