"""``python -m benchmarks.readme RECORD.json README.md``: renew the figures in a README.

Replaces what lies between ``<!-- benchmark:begin -->`` and ``<!-- benchmark:end -->`` by a table,
the plot beside the record, and the command that made them. ``--check`` only says whether the block
is what the record gives (exit code 1 if not).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import summary
from .summary import Record, Row

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

MOST_LOSSES = 8
NOTE = (
    "Geometric mean over the distinct layers of each network; (n/m): only n of m layers have the "
    "figure. Limit: the least traffic at the speed of `x.clone()` in the same run."
)


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    return [*(row.speedup[name].text("×") for name in baselines), row.over_limit.text("×")]


def _table(record: Record, contender: str) -> list[str]:
    """Markdown lines: networks and layouts down, modes and baselines across."""
    baselines = summary.baselines_of(record, contender)
    modes = list(dict.fromkeys(entry["mode"] for entry in record["results"]))
    lines: dict[tuple[str, str, str, int], list[str]] = {}
    for mode in modes:
        for row in summary.rows(record, mode):
            if row.contender == contender:
                key = (row.network, row.layout, row.dtype, row.batch)
                lines.setdefault(key, []).extend(_cells(row, baselines))
    kinds = {key[2:] for key in lines}
    head = ["network", "layout", *(["type"] if len(kinds) > 1 else [])]
    for mode in modes:
        head += [f"{mode}: vs {name}" for name in baselines] + ["time / limit"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (network, layout, dtype, batch), cells in lines.items():
        start = [network, layout, *([f"{dtype} b{batch}"] if len(kinds) > 1 else [])]
        if network == "all layers":
            start, cells = [f"**{text}**" for text in start], [f"**{text}**" for text in cells]
        out.append("| " + " | ".join([*start, *cells]) + " |")
    return out


def _small_call(record: Record) -> list[str]:
    names = record["providers"]
    out = ["| one small call | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for entry in record["small_call"]:
        values = [summary.microseconds(entry, "wall", name) for name in names]
        cells = [f"{value:.1f} µs" if value == value else "n/a" for value in values]
        out.append(f"| {entry['mode']} | " + " | ".join(cells) + " |")
    first = record["small_call"][0]
    shape = first["layer"].split("-")[0]
    return [*out, "", f"The small call is {first['batch']}x{shape}, {first['dtype']}: overhead."]


def render(record: Record, plot: str | None) -> str:
    """The block between the marks."""
    env = record["environment"]
    blocks = dict.fromkeys((e["dtype"], e["batch"]) for e in record["results"])
    what = ", ".join(f"{dtype} batch {batch}" for dtype, batch in blocks)
    where = env["device"] if env["device"] != "cpu" else f"{env['cpu']}, {env['threads']} threads"
    commit = f", commit {env['commit'][:10]}" if env["commit"] else ""
    out = [f"{where}, torch {env['torch']}, {what}, {env['date'][:10]}{commit}."]
    for contender in record["contenders"]:
        out += ["", f"Speed-up of `{contender}`:", "", *_table(record, contender)]
    out += [
        "",
        NOTE,
    ]
    losses = summary.losses(record)
    if losses:
        named = [
            f"{contender} vs {baseline} {figure['ratio']:.2f}× ({entry['layer'].split('-')[0]} "
            f"{summary.SHORT_LAYOUT[entry['layout']]} {entry['mode']})"
            for contender, baseline, entry, figure in losses[:MOST_LOSSES]
        ]
        more = len(losses) - len(named)
        tail = f"; and {more} smaller ones in the record" if more else ""
        out += ["", f"Losses beyond 5 %, {len(losses)} in all: {'; '.join(named)}{tail}."]
    else:
        out += ["", "No layer is slower than a baseline by more than 5 %."]
    if record["small_call"]:
        out += ["", *_small_call(record)]
    if plot:
        out += ["", f"![Speed-up per layer]({plot})"]
    return "\n".join([*out, "", "```sh", record["command"], "```"])


def replace_block(text: str, block: str) -> str:
    """``text`` with its marked block replaced; ValueError where there is not exactly one."""
    pattern = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
    found = len(pattern.findall(text))
    if found != 1:
        raise ValueError(f"expected one block {BEGIN} ... {END}, found {found}")
    return pattern.sub(lambda _: f"{BEGIN}\n{block}\n{END}", text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    record = json.loads(args.record.read_text())
    image = args.record.with_suffix(".png")
    start = args.readme.resolve().parent
    plot = Path(os.path.relpath(image.resolve(), start)).as_posix() if image.exists() else None
    old = args.readme.read_text()
    new = replace_block(old, render(record, plot))
    if args.check:
        return int(new != old)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
