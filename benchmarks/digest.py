"""Tables of networks and sweeps as plain text cells, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from . import summary
from .networks import BASE
from .regimes import TITLES
from .summary import SHORT_LAYOUT, Entry, Record, Row

Lines = list[list[str]]  # the first is the head


def blocks(record: Record) -> Iterator[tuple[str, Lines]]:
    """(title, lines) of every table of a record."""
    if record["results"]:
        yield from _blocks_of_results(record)
    if record.get("small_call"):
        yield "one small call", small_call(record)


def _blocks_of_results(record: Record) -> Iterator[tuple[str, Lines]]:
    if record["kind"] == "models":
        modes = summary.modes(record)
        yield from ((f"{mode}: time and speed-up", model_times(record, mode)) for mode in modes)
        if _timed(record, ["no-se"], summary.metric_of(record)):
            yield from ((f"{mode}: the price of SE", model_prices(record, mode)) for mode in modes)
        yield "memory and calls of a step", model_costs(record)
    elif record["kind"] == "sweep":
        yield "where the fastest changes", sweep_crossovers(record)
        for mode in summary.modes(record):
            yield (
                f"{mode}: microseconds where each axis begins, half way, and where it ends",
                sweep_ends(record, mode),
            )
    else:
        modes = summary.modes(record)
        for mode in modes:
            yield f"{mode}: speed-up of layers", layers(record, mode)
        for mode in modes:
            if len(lines := regime_lines(record, mode)) > 1:
                yield f"{mode}: by what decides the time", lines


def time_text(microseconds: float) -> str:
    if not math.isfinite(microseconds):
        return "n/a"
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.0f} ms"
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.1f} µs"


def ratio_text(figure: dict[str, float] | None) -> str:
    """A speed-up and its interval."""
    if figure is None:
        return "n/a"
    low, high = figure["ci_low"], figure["ci_high"]
    return f"{figure['ratio']:.2f}× [{low:.2f}, {high:.2f}]"


def _kinds(record: Record) -> bool:
    """Whether dtype and layout vary, so that lines must say which."""
    return len({(e["dtype"], e["layout"]) for e in record["results"]}) > 1


def _name(entry: Entry, long: bool) -> str:
    kind = f" {entry['dtype']} {SHORT_LAYOUT[entry['layout']]}" if long else ""
    return f"{entry['network']} b{entry['batch']} {entry['size']}²{kind}"


def _wrong(entry: Entry, name: str) -> bool:
    return entry["providers"].get(name, {}).get("status") == "wrong"


# -- layers ----------------------------------------------------------------------------------------


def _row_cells(row: Row, baselines: Sequence[str]) -> list[str]:
    """A contender that is a baseline too has no speed-up over itself."""
    cells = [row.speedup[name].text("×") if name in row.speedup else "" for name in baselines]
    return [*cells, row.over_limit.text("×")]


def layers(record: Record, mode: str) -> Lines:
    """Networks and layouts down, baselines across, one contender after the other."""
    baselines = summary.baselines_of(record, "")
    rows = list(summary.rows(record, mode))
    kinds = len({row.type for row in rows}) > 1
    own = len(record["contenders"]) > 1
    out = [["network", "layout", *(["contender"] if own else []), *(["type"] if kinds else []),
            *(f"vs {name}" for name in baselines), "time / limit"]]  # fmt: skip
    for row in rows:
        start = [row.network, row.layout, *([row.contender] if own else [])]
        line = [*start, *([row.type] if kinds else []), *_row_cells(row, baselines)]
        out.append([f"**{c}**" for c in line] if row.network == "all layers" else line)
    return out


def regime_lines(record: Record, mode: str) -> Lines:
    """One line per regime, over all networks and layouts."""
    baselines = summary.baselines_of(record, "")
    rows = list(summary.regime_rows(record, mode))
    kinds = len({row.type for row in rows}) > 1
    out = [["regime", "contender", *(["type"] if kinds else []), "layers",
            *(f"vs {name}" for name in baselines), "time / limit"]]  # fmt: skip
    for row in rows:
        start = [TITLES[row.network], row.contender, *([row.type] if kinds else [])]
        out.append([*start, str(row.layers), *_row_cells(row, baselines)])
    return out


def small_call(record: Record) -> Lines:
    """What one tiny call takes: overhead."""
    names = record["providers"]
    out = [["one small call", *names]]
    for what, metric, entry in summary.small_calls(record):
        values = [summary.microseconds(entry, metric, name) for name in names]
        out.append([what, *(f"{v:.1f} µs" if v == v else "n/a" for v in values)])
    return out


# -- networks --------------------------------------------------------------------------------------


def _timed(record: Record, names: Sequence[str], metric: str) -> list[str]:
    """Providers that have a figure anywhere."""
    return [n for n in names if any(math.isfinite(summary.microseconds(e, metric, n))
            for e in record["results"])]  # fmt: skip


def model_times(record: Record, mode: str) -> Lines:
    """Time of the original, speed-ups over it, and of our op inside torch.compile over that."""
    metric, long = summary.metric_of(record), _kinds(record)
    names = [n for n in _timed(record, record["providers"], metric)
             if n not in ("original", "no-se", "compile-no-se")]  # fmt: skip
    inside = {"compile", "compile-fused"} <= set(names)
    head = ["network", "original", *names, *(["compile-fused vs compile"] if inside else [])]
    out = [head]
    for entry in record["results"]:
        if entry["mode"] != mode:
            continue
        cells = [
            "**wrong**" if _wrong(entry, n)
            else ratio_text(summary.ratio(entry, metric, n, "original"))
            for n in names
        ]  # fmt: skip
        if inside:
            cells.append(ratio_text(summary.ratio(entry, metric, "compile-fused", "compile")))
        first = time_text(summary.microseconds(entry, metric, "original"))
        out.append([_name(entry, long), first, *cells])
    return out


def model_prices(record: Record, mode: str) -> Lines:
    """Per cent of time that SE adds to the network without it."""
    metric, long = summary.metric_of(record), _kinds(record)
    names = [n for n in _timed(record, record["providers"], metric)
             if n not in ("no-se", "compile-no-se")]  # fmt: skip
    plain = [n for n in names if n not in BASE or "compile-no-se" in record["providers"]]
    out = [["network", "without SE", *plain]]
    for entry in record["results"]:
        if entry["mode"] != mode:
            continue
        cells = []
        for name in plain:
            found = summary.price(entry, metric, name)
            cells.append("n/a" if found is None
                         else f"{found[0]:+.0f} % [{found[1]:+.0f}, {found[2]:+.0f}]")  # fmt: skip
        without = time_text(summary.microseconds(entry, metric, "no-se"))
        out.append([_name(entry, long), without, *cells])
    return out


def model_gains(record: Record) -> Lines:
    """A line for each network: what fusing gains, and the price of SE before and after, by mode."""
    metric, long = summary.metric_of(record), _kinds(record)
    modes = summary.modes(record)
    prices = [f"price of SE, {mode}" for mode in modes]
    out = [["network", *(f"{mode}, fused" for mode in modes), *prices]]
    rows: dict[str, dict[str, list[str]]] = {}
    for entry in record["results"]:
        before, after = (summary.price(entry, metric, name) for name in ("original", "fused"))
        price = f"{before[0]:.0f} % → {after[0]:.0f} %" if before and after else "n/a"
        gain = ratio_text(summary.ratio(entry, metric, "fused", "original"))
        rows.setdefault(_name(entry, long), {})[entry["mode"]] = [gain, price]
    none = ["n/a", "n/a"]
    for name, found in rows.items():
        out.append([name, *(found.get(mode, none)[i] for i in (0, 1) for mode in modes)])
    return out


def _megabytes(entry: Entry, name: str, what: str) -> str:
    value = entry["providers"].get(name, {}).get(what)
    return "n/a" if value is None else f"{value / 1e6:.1f}"


def _calls(entry: Entry, name: str) -> str:
    found = entry["providers"].get(name, {}).get("launches", {})
    value = found.get("kernels", found.get("operators"))
    return "n/a" if value is None else str(value)


def model_costs(record: Record) -> Lines:
    """Megabytes kept for backward, the allocator's peak where known, launches or operators."""
    long = _kinds(record)
    entries = [e for e in record["results"] if e["mode"] == "forward+backward"]
    names = [n for n in record["providers"]
             if any("saved_bytes" in e["providers"].get(n, {}) for e in entries)]  # fmt: skip
    peak = any("peak_bytes" in e["providers"].get(n, {}) for e in entries for n in names)
    counted = "kernels" if record["environment"]["device"] != "cpu" else "operators"
    called = [n for n in names if any("launches" in e["providers"].get(n, {}) for e in entries)]
    head = ["network", *(f"{n}: MB saved" for n in names)]
    head += [f"{n}: MB peak" for n in names] if peak else []
    out = [[*head, *(f"{n}: {counted}" for n in called)]]
    for entry in entries:
        cells = [_megabytes(entry, n, "saved_bytes") for n in names]
        cells += [_megabytes(entry, n, "peak_bytes") for n in names] if peak else []
        out.append([_name(entry, long), *cells, *(_calls(entry, n) for n in called)])
    return out


# -- sweeps ----------------------------------------------------------------------------------------


def _lines_of(record: Record) -> Iterator[tuple[str, str, str, str]]:
    for mode in summary.modes(record):
        for line in record["axes"]:
            yield line["axis"], mode, line["dtype"], line["layout"]


def sweep_crossovers(record: Record) -> Lines:
    """One line per axis, mode and layout: who is fastest from where on."""
    metric = summary.metric_of(record)
    out = [["axis", "mode", "type", "fastest"]]
    for axis, mode, dtype, layout in _lines_of(record):
        points = summary.sweep_points(record, axis, mode, dtype, layout)
        if not points:
            continue
        found = summary.crossovers(points, record["providers"], metric)
        start = found[0].before if found else _fastest(points[0][1], record["providers"], metric)
        text = f"`{start}`" + "".join(f", from about {c.at:.0f} `{c.after}`" for c in found)
        where = f"{dtype} {SHORT_LAYOUT[layout]}"
        out.append([f"{axis} {points[0][0]} to {points[-1][0]}", mode, where, text])
    return out


def _fastest(entry: Entry, names: Sequence[str], metric: str) -> str:
    times = {n: t for n in names if math.isfinite(t := summary.microseconds(entry, metric, n))}
    return min(times, key=lambda name: times[name], default="n/a")


def sweep_ends(record: Record, mode: str) -> Lines:
    """Time of every provider where an axis begins, half way, and where it ends."""
    metric = summary.metric_of(record)
    names = _timed(record, record["providers"], metric)
    out = [["axis", "value", "type", *names, summary.LIMIT]]
    for axis, own, dtype, layout in _lines_of(record):
        points = summary.sweep_points(record, axis, mode, dtype, layout) if own == mode else []
        chosen = {i: points[i] for i in (0, len(points) // 2, len(points) - 1) if points}
        for value, entry in chosen.values():
            cells = [summary.microseconds(entry, metric, n) for n in [*names, summary.LIMIT]]
            texts = [f"{c:.0f}" if math.isfinite(c) else "n/a" for c in cells]
            out.append([axis, str(value), f"{dtype} {SHORT_LAYOUT[layout]}", *texts])
    return out
