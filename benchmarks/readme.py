"""``python -m benchmarks.readme [FILE.md ...]``: renew the figures in Markdown files.

Without a file, in all of the repository that have some. A file says itself what goes where. Between

    <!-- benchmark:begin TABLE RECORD.json -->
    <!-- benchmark:end -->

comes what the record, a path from the file's folder, gives: ``TABLE`` is ``layers``, ``models`` or
``sweep`` for all there is to say, ``layers-short`` for means, losses and the first plot,
``models-short`` for times and price alone, ``models-gain`` for a line for each network; with
``-zh`` at the end the latter, ``layers-short`` and ``verdict`` in Chinese; ``losses`` for what is
slower than what it has to beat, ``verdict`` for the means alone, both of records of any kind;
``results`` for those of several records of networks or of layers as one table. ``verdict`` takes
several records, too: one after the other; ``machines`` of any records is where they were taken.
Tables of ``claims.py`` are of docs/senet_claims.json, in Chinese with ``-zh`` at the end.
``--check`` changes nothing and only says whether the blocks are what the records give (exit code 1
if not).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from senet_kernels._command_line import Parser

from . import claims, digest, plots, records, summary
from .digest import Lines
from .page import KINDS, warnings
from .summary import Record
from .verdict import machines, results, verdict

BLOCK = re.compile(
    r"(<!-- benchmark:begin (?P<table>[\w-]+) (?P<record>\S+(?: \S+)*?) -->\n)"
    r".*?(<!-- benchmark:end -->)",
    re.DOTALL,
)
TABLES = (
    "layers", "layers-short", "layers-short-zh", "models", "models-short", "models-gain",
    "models-gain-zh", "sweep", "losses", "verdict", "verdict-zh", "results",
    "machines",
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
    (r"^Of (\d+) comparisons none is lost by more than 5 %", r"\1 项比较中没有一项慢 5 % 以上"),
    (r"(?i)\bforward\+backward\b", "前向+反向"),
    (r"(?i)\bforward\b", "前向"),
    (
        r": fused networks run at (\S+) the speed \((\S+) to (\S+)\)",
        r"：融合后网络的速度是原来的 \1（\2 到 \3）",
    ),
    (
        r"; what SE adds to [^.]* without it \w+ from (\d+) % to (\d+) % \(median\)",
        "；与去掉 SE 的同一网络相比，SE 多花的时间从 \\1 % 变为 \\2 %（中位数）",
    ),
    (r"(?<=）)\. ", "。"),
    (r"Whole networks, ", "整网，"),
    (r"\bZen 4 or 5\b", "Zen 4 或 5"),
    (r"\.\*\*", "。**"),
    (r"\bgraph built\b", "建图"),
    (r"\bvs\b", "对"),
    (r"\| layers \|", "| 层数 |"),
    (r"\btime / limit\b", "时间 / 下限"),
    (r"\b(\d+) threads\b", r"\1 线程"),
    (r"^!\[Speed-up per layer\]", "![各层的加速比]"),
    (r"^!\[Speed-up of whole networks\]", "![整网加速比]"),
    (r"\| network \|", "| 网络 |"),
    (r", fused\b", "，融合后"),
    (r"\bprice of SE, ", "SE 的代价，"),
    (r"\.$", "。"),
)


def _in_chinese(text: str) -> str:
    for pattern, chinese in CHINESE:
        text = re.sub(pattern, chinese, text, flags=re.MULTILINE)
    return text


def _table(lines: Lines) -> list[str]:
    """In Markdown. Figures are not broken between lines: 1.02× [1.00, 1.08]."""
    head, *rest = lines
    figure = re.compile(r"\**[+-]?\d[^a-z]*(?:(?:to|of) [^a-z]*)?")
    kept = [[c.replace(" ", "\u00a0") if figure.fullmatch(c) else c for c in line] for line in rest]
    rows = ["| " + " | ".join(line) + " |" for line in kept]
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
        return f"Of {summary.comparisons(record)} comparisons none is lost by more than 5 %."
    named = "; ".join(summary.loss_text(loss) for loss in found[:most])
    more = len(found) - most
    tail = f"; and {more} smaller ones in the record" if more > 0 else ""
    return f"Losses beyond 5 %, {len(found)} in all: {named}{tail}."


def _all_losses(record: Record) -> list[str]:
    """A line for each case; the comparisons lost in it, the worst first."""
    found = summary.losses(record)
    if not found:
        return ["", _losses(record)]
    every = summary.comparisons(record)
    lines = [["case", "mode", "", "vs", "speed-up", "95 % interval"]]
    for contender, baseline, entry, figure in found:
        interval = f"{figure['ci_low']:.2f} to {figure['ci_high']:.2f}"
        speed = f"{figure['ratio']:.2f}×"
        case = summary.case_name(entry, whole=True)
        lines.append([case, entry["mode"], f"`{contender}`", f"`{baseline}`", speed, interval])
    return ["", f"{len(found)} of {every} comparisons are lost by more than 5 %:", "",
            *_table(lines)]  # fmt: skip


def _layers(record: Record) -> list[str]:
    out: list[str] = []
    modes = summary.modes(record)
    contenders = " and ".join(f"`{name}`" for name in record["contenders"])
    for mode in modes:
        out += ["", f"{summary.capital(mode)}, speed-up of {contenders}:", ""]
        out += _table(digest.layers(record, mode))
    out += ["", NOTE]
    for mode in modes:
        if len(lines := digest.regime_lines(record, mode)) > 1:
            out += [
                "",
                f"{summary.capital(mode)}, by what decides the time, over all networks:",
                "",
            ]
            out += _table(lines)
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
    for mode in summary.modes(record):
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
        out += ["", f"{summary.capital(title)}:", "", *_table(lines)]
    return [*out, "", _losses(record)]


def render(record: Record, table: str, images: Sequence[tuple[str, str]]) -> str:
    """The block between the marks; ``images`` are (title, path)."""
    if table.startswith("verdict"):
        env = record["environment"]
        commit = f", commit {env['commit'][:10]}" if env["commit"] else ""
        what = f"{KINDS[record['kind']]}, {plots.style.machine(record)}, {env['date'][:10]}{commit}"
        return f"- **{what}.** {verdict(record)}"
    out = [_stamp(record)]
    if table == "losses":
        return "\n".join([*out, *_all_losses(record)])
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
        if table.startswith("claims-"):
            known = json.loads(path.read_text(encoding="utf-8"))
            name, chinese = table.removesuffix("-zh"), table.endswith("-zh")
            return f"{match[1]}{claims.render(known, name, _table, chinese=chinese)}\n{match[4]}"
        if table not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
        if several_in_one := {"results": results, "machines": machines}.get(table):
            several = [records.read(start / name) for name in match["record"].split()]
            return "\n".join([match[1] + "\n".join(_table(several_in_one(several))), match[4]])
        if table.startswith("verdict"):
            several = [records.read(start / name) for name in match["record"].split()]
            body = "\n".join(render(record, table, ()) for record in several)
            return f"{match[1]}{_in_chinese(body) if table.endswith('-zh') else body}\n{match[4]}"
        record = records.read(path)
        if table.partition("-")[0] not in (record["kind"], "losses", "verdict"):
            raise ValueError(f"{match['record']}: has {record['kind']}, {table} was asked for")
        body = render(record, table, _images(path, record, start))
        if table.endswith("-zh"):
            body = _in_chinese(body)
        return f"{match[1]}{body}\n{match[4]}"

    new, count = BLOCK.subn(block, text)
    if not count:
        raise ValueError("expected a block <!-- benchmark:begin TABLE RECORD.json --> ...")
    return new


def documents() -> list[Path]:
    """The Markdown files of the repository that show figures of records."""
    root = Path(__file__).parent.parent
    every = sorted([*root.glob("*.md"), *root.glob("docs/*.md")])
    return [path for path in every if BLOCK.search(path.read_text(encoding="utf-8"))]


def renew_files(
    prog: str, doc: str | None, renew: Callable[[str, Path], str], argv: Sequence[str] | None,
    every: Sequence[Path] = (),
) -> int:  # fmt: skip
    """The command line of what renews blocks in Markdown files; returns the exit status.

    ``renew`` takes a text and the file's folder; ``every`` are the files where none is given.
    """
    parser = Parser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*" if every else "+", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    changed = False
    for path in args.files or every:
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
    return renew_files("python -m benchmarks.readme", __doc__, renewed, argv, documents())


if __name__ == "__main__":
    sys.exit(main())
