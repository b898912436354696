"""What a person reads at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from . import digest, processors, summary
from .summary import Mean, Record, Row

MOST_LOSSES = 20


def _coloured(mean: Mean) -> Text:
    text = mean.text()
    if mean.wrong:
        return Text(text, style="bold white on red")
    if not mean.layers:
        return Text(text, style="dim")
    if mean.value < summary.LOSS:
        return Text(text, style="red")
    return Text(text, style="green" if mean.value > 1 / summary.LOSS else "")


def _worst(row: Row) -> Text:
    if row.worst is None:
        return Text("n/a", style="dim")
    layer, ratio = row.worst
    style = "red" if ratio < summary.LOSS else "dim"
    return Text(f"{ratio:.2f}x  {layer.split('-')[0]}", style=style)


def _table(record: Record, mode: str, rows: list[Row], first: str = "network") -> Table:
    baselines = list(dict.fromkeys(name for row in rows for name in row.speedup))
    many = len({(row.contender, row.type) for row in rows}) > 1
    limit = next(e["limit_in_clones"] for e in record["results"] if e["mode"] == mode)
    limit_name = "clone" if limit == 1 else f"{limit:g} clones"
    table = Table(
        title=f"{mode}: speed-up of {', '.join(record['contenders'])}", title_justify="left"
    )
    if many:
        table.add_column("provider, type")
    table.add_column(first, no_wrap=True)
    table.add_column("layout", no_wrap=True, min_width=6)
    table.add_column("layers", justify="right", no_wrap=True, min_width=6)
    for name in baselines:
        table.add_column(f"vs\n{name}", justify="right", no_wrap=True)
    table.add_column(f"time /\n{limit_name}", justify="right", no_wrap=True)
    table.add_column(f"worst layer\nvs {baselines[0]}" if baselines else "worst", no_wrap=True)
    for row in rows:
        overall = row.network == "all layers"
        cells: list[str | Text] = [f"{row.contender} {row.type}"] if many else []
        cells += [row.network, row.layout, str(row.layers)]
        cells += [_coloured(row.speedup[name]) for name in baselines if name in row.speedup]
        cells += [row.over_limit.text(""), _worst(row)]
        if overall:
            table.add_section()
        table.add_row(*cells, style="bold" if overall else "", end_section=overall)
    return table


def _small(record: Record) -> Table:
    first = record["small_call"][0]
    shape = f"{first['batch']}x{first['layer'].split('-')[0]} {first['dtype']}"
    table = Table(title=f"one small call, {shape}: microseconds", title_justify="left")
    table.add_column("mode")
    names = [*record["providers"]]
    for name in names:
        table.add_column(name, justify="right")
    for what, metric, entry in summary.small_calls(record):
        cells = []
        for name in names:
            value = summary.microseconds(entry, metric, name)
            status = entry["providers"][name]["status"]
            cells.append(f"{value:.1f}" if math.isfinite(value) else status)
        table.add_row(what, *cells)
    return table


def _plain(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """A table of ready text, the first line its head."""
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(lines[0]):
        table.add_column(head, justify="left" if index == 0 else "right")
    for line in lines[1:]:
        table.add_row(*(cell.replace("**", "").replace("`", "") for cell in line))
    return table


def _print_layers(record: Record, console: Console) -> None:
    for mode in summary.modes(record):
        if rows := list(summary.rows(record, mode)):
            console.print(_table(record, mode, rows))
        if rows := list(summary.regime_rows(record, mode)):
            console.print(_table(record, mode, rows, "regime"))


def print_report(record: Record, console: Console) -> None:
    """Tables, losses, and whatever has no figure."""
    env = record["environment"]
    blocks = dict.fromkeys((e["dtype"], e["batch"]) for e in record["results"])
    what = ", ".join(f"{dtype} batch {batch}" for dtype, batch in blocks)
    device = processors.name(env) if env["device"] == "cpu" else env["device"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    console.print(
        f"\n[bold]{device}{threads}[/], torch {env['torch']}{', ' + what if what else ''}"
    )
    if record["kind"] == "layers":
        _print_layers(record, console)
    else:
        for title, lines in digest.blocks(record):
            console.print(_plain(title, lines))
    if record["kind"] == "layers" and record["results"]:
        console.print(
            "Geometric mean over the distinct layers, each counted once; (n/m): only n of m layers "
            "have the figure.\ntime/clone: over the least traffic, at the speed of a same-size "
            f"copy in this run.\nTimes: {summary.metric_of(record)}, {record['cache_state']}.",
            style="dim",
            highlight=False,
        )
    if record.get("small_call"):
        console.print(_small(record))
    _print_losses(record, console)
    for (name, status, reason), count in summary.missing(record).items():
        style = "bold red" if status == "wrong" else "yellow"
        times = f" ({count} measurements)" if count else ""
        console.print(f"[{style}]{name} {status}[/]{times}: {escape(reason)}", highlight=False)
    many, every = summary.disturbed(record)
    if many > 0.1 * every:
        console.print(
            f"[bold yellow]other processes kept the CPU busy[/] during {many} of {every} "
            "measurements: do not trust these figures, run again on a quiet machine"
        )
    if record["not_measured"]:
        console.print(
            f"[yellow]{len(record['not_measured'])} cases not measured[/]: the time was up; "
            "give more with --budget SECONDS"
        )
    if record["status"] != "complete":
        console.print(f"[bold yellow]{record['status']}[/]: the figures above are what there was")


def _print_losses(record: Record, console: Console) -> None:
    found = summary.losses(record)
    if not found:
        if record["results"]:
            console.print("losses: nothing slower than a baseline by more than 5 %")
        return
    console.print(f"[red]losses[/]: {len(found)} slower than a baseline by more than 5 %")
    for contender, baseline, entry, figure in found[:MOST_LOSSES]:
        console.print(
            f"  {figure['ratio']:.2f}x [{figure['ci_low']:.2f}, {figure['ci_high']:.2f}]  "
            f"{contender} vs {baseline}: {summary.case_name(entry)} {entry['mode']}",
            markup=False,
            highlight=False,
        )
    if len(found) > MOST_LOSSES:
        console.print(f"  and {len(found) - MOST_LOSSES} more in the record")
