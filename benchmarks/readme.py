"""``python -m benchmarks.readme FILE.md ...``: renew the figures in Markdown files.

A file says itself what goes where. Between

    <!-- benchmark:begin TABLE RECORD.json -->
    <!-- benchmark:end -->

comes what the record, a path from the file's folder, gives: ``TABLE`` is ``layers``, ``models`` or
``sweep`` for all there is to say, ``layers-short`` for means, losses and the first plot,
``models-short`` for times and price alone, ``models-gain`` for a line for each network; with
``-zh`` at the end the latter and ``layers-short`` in Chinese.
``--check`` changes nothing and only says whether the blocks are what the records give (exit code 1
if not).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from senet_kernels._command_line import Parser

from . import digest, plots, records, summary
from .digest import Lines
from .page import warnings
from .summary import Record

BLOCK = re.compile(
    r"(<!-- benchmark:begin (?P<table>[\w-]+) (?P<record>\S+) -->\n).*?(<!-- benchmark:end -->)",
    re.DOTALL,
)
TABLES = (
    "layers", "layers-short", "layers-short-zh", "models", "models-short", "models-gain",
    "models-gain-zh", "sweep",
)  # fmt: skip
MOST_LOSSES = 8
MOST_LOSSES_IN_SHORT = 3
NOTE = (
    "Geometric mean over the distinct layers of each network; (n/m): only n of m layers have the "
    "figure. Limit: the least traffic at the speed of `x.clone()` in the same run."
)

#: What the words of the short tables are in Chinese; figures, names and commands stay.
CHINESE = (
    (r"^Losses beyond 5 %, (\d+) in all: ", r"慢 5 % 以上的情形，共 \1 处："),
    (r"; and (\d+) smaller ones in the record", r"；其余 \1 处较小的见记录"),
    (r"^Nothing is slower than what it has to beat by more than 5 %", "没有一处比对手慢 5 % 以上"),
    (r"\bforward\+backward\b", "前向+反向"),
    (r"\bforward\b", "前向"),
    (r"\bgraph built\b", "建图"),
    (r"\bvs\b", "对"),
    (r"\| layers \|", "| 层数 |"),
    (r"\btime / limit\b", "时间 / limit"),
    (r"\b(\d+) threads\b", r"\1 线程"),
    (r"^!\[Speed-up per layer\]", "![各层的加速比]"),
    (r"^!\[Speed-up of whole networks\]", "![整网加速比]"),
    (r"\| network \|", "| 网络 |"),
    (r", fused\b", "，融合后"),
    (r"\bprice of SE, ", "SE 的代价，"),
    (r"(\d) % to (-?\d+) %", r"\1 % → \2 %"),
    (r"\.$", "。"),
)


def _in_chinese(text: str) -> str:
    for pattern, chinese in CHINESE:
        text = re.sub(pattern, chinese, text, flags=re.MULTILINE)
    return text


def _table(lines: Lines) -> list[str]:
    head, *rest = lines
    rows = ["| " + " | ".join(line) + " |" for line in rest]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]


def _stamp(record: Record) -> str:
    blocks = dict.fromkeys((e["dtype"], e["batch"]) for e in record["results"])
    what = ""
    if record["kind"] == "layers":
        what = ", " + ", ".join(f"{dtype} batch {batch}" for dtype, batch in blocks)
    else:
        what = ", " + ", ".join(dict.fromkeys(dtype for dtype, _ in blocks))
    env = record["environment"]
    commit = f", commit {env['commit'][:10]}" if env["commit"] else ""
    return f"{plots.style.where(record)}{what}, {env['date'][:10]}{commit}."


def _losses(record: Record, most: int = MOST_LOSSES) -> str:
    found = summary.losses(record)
    if not found:
        return "Nothing is slower than what it has to beat by more than 5 %."
    named = "; ".join(summary.loss_text(loss) for loss in found[:most])
    more = len(found) - most
    tail = f"; and {more} smaller ones in the record" if more > 0 else ""
    return f"Losses beyond 5 %, {len(found)} in all: {named}{tail}."


def _layers(record: Record) -> list[str]:
    out: list[str] = []
    for contender in record["contenders"]:
        lines = digest.contender_lines(record, contender)
        out += ["", f"Speed-up of `{contender}`:", "", *_table(lines)]
    out += ["", NOTE]
    regimes = list(digest.regime_lines(record))
    if len(regimes) > 1:
        out += ["", "The same by what decides the time, over all networks and layouts:", ""]
        out += _table(regimes)
    out += ["", _losses(record)]
    if record["small_call"]:
        first = record["small_call"][0]
        shape = f"{first['batch']}x{first['layer'].split('-')[0]}"
        out += ["", *_table(digest.small_call(record)), ""]
        out += [f"The small call is {shape}, {first['dtype']}: overhead."]
    return out


def _layers_short(record: Record) -> list[str]:
    """A line per mode, data type and batch: the means over all layers."""
    baselines = summary.baselines_of(record, "")
    several = len({(entry["dtype"], entry["batch"]) for entry in record["results"]}) > 1
    lines = [["", "layers", *(f"vs `{name}`" for name in baselines), "time / limit"]]
    for mode in dict.fromkeys(entry["mode"] for entry in record["results"]):
        for row in summary.rows(record, mode):
            if row.network == "all layers" and row.contender in record["contenders"]:
                cells = [row.speedup[n].text("×") if n in row.speedup else "" for n in baselines]
                what = f"{mode}, {f'{row.type}, ' if several else ''}`{row.contender}`"
                lines.append([what, str(row.layers), *cells, row.over_limit.text("×")])
    return ["", *_table(lines), "", _losses(record, MOST_LOSSES_IN_SHORT)]


def _others(record: Record, short: bool) -> list[str]:
    out: list[str] = []
    for title, lines in digest.blocks(record):
        if short and title.startswith("memory"):
            continue
        out += ["", f"{title[0].upper()}{title[1:]}:", "", *_table(lines)]
    return [*out, "", _losses(record)]


def render(record: Record, table: str, images: Sequence[tuple[str, str]]) -> str:
    """The block between the marks; ``images`` are (title, path)."""
    out = [_stamp(record)]
    if table == "layers":
        out += _layers(record)
    elif table.startswith("layers-short"):
        out += _layers_short(record)
        images = images[:1]
    elif table.startswith("models-gain"):
        out += ["", *_table(digest.model_gains(record))]
        images = images[:1]
    else:
        out += _others(record, table.endswith("-short"))
    for text in warnings(record):
        out += ["", f"**{text}**"]
    for title, path in images:
        out += ["", f"![{title}]({path})"]
    return "\n".join([*out, "", "```sh", record["command"], "```"])


def _images(path: Path, record: Record, start: Path) -> list[tuple[str, str]]:
    """Pictures beside a record, as a Markdown file in ``start`` names them."""
    found = []
    for suffix, _ in plots.DRAWINGS[record["kind"]]:
        image = path.with_name(f"{path.stem}{suffix}.png")
        if image.exists():
            relative = Path(os.path.relpath(image.resolve(), start)).as_posix()
            found.append((plots.TITLES[record["kind"], suffix], relative))
    return found


def renewed(text: str, start: Path) -> str:
    """A Markdown text with its blocks as the records give them now.

    Raises:
        ValueError: there is no block, its table is unknown or does not fit the record.
        OSError: a record cannot be read.
    """

    def block(match: re.Match[str]) -> str:
        table, path = match["table"], start / match["record"]
        if table not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
        record = records.read(path)
        if table.partition("-")[0] != record["kind"]:
            raise ValueError(f"{match['record']}: has {record['kind']}, {table} was asked for")
        body = render(record, table, _images(path, record, start))
        if table.endswith("-zh"):
            body = _in_chinese(body)
        return f"{match[1]}{body}\n{match[4]}"

    new, count = BLOCK.subn(block, text)
    if not count:
        raise ValueError("expected a block <!-- benchmark:begin TABLE RECORD.json --> ...")
    return new


def renew_files(
    prog: str, doc: str | None, renew: Callable[[str, Path], str], argv: Sequence[str] | None
) -> int:
    """The command line of what renews blocks in Markdown files; returns the exit status.

    ``renew`` takes a text and the file's folder.
    """
    parser = Parser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    changed = False
    for path in args.files:
        old = path.read_text(encoding="utf-8")
        try:
            new = renew(old, path.resolve().parent)
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        changed |= new != old
        if not args.check:
            path.write_text(new, encoding="utf-8")
    return int(changed and args.check)


def main(argv: Sequence[str] | None = None) -> int:
    return renew_files("python -m benchmarks.readme", __doc__, renewed, argv)


if __name__ == "__main__":
    sys.exit(main())
