"""``python -m benchmarks report [RECORD ...]``: tables, CSV, plots and one HTML page.

Without a record, those committed in ``benchmarks/results``. The page has everything in it: it can
be sent, and opened without a network. ``--pictures`` draws the plots beside each record instead.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from senet_kernels._command_line import Parser, make_writable

from . import digest, extras, plots, records, summary
from .options import LOCAL_RESULTS
from .summary import Record
from .verdict import verdict

#: Headings of the records, in the order of the page: what matters most to most first.
KINDS = {"models": "Whole networks", "layers": "Layers", "sweep": "One layer, its extents growing"}
TEMPLATE = Path(__file__).with_name("page.html.j2")


def committed() -> list[Path]:
    return sorted(LOCAL_RESULTS.parent.glob("*.json"))


def warnings(record: Record) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    env = record["environment"]
    if env.get("uncommitted_changes"):
        found.append("Taken with uncommitted changes: the commit does not say what ran.")
    if record["status"] != "complete":
        found.append(f"The run is {record['status']}: these are the figures there were.")
    many, every = summary.disturbed(record)
    if many > 0.1 * every:
        found.append(
            f"Other processes kept the CPU busy during {many} of {every} measurements: do not "
            "trust these figures."
        )
    if record["not_measured"]:
        found.append(f"{len(record['not_measured'])} cases not measured: the time was up.")
    return found


def _flat(values: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": text for inner, text in _flat(value).items()}
        elif isinstance(value, list):
            found[key] = ", ".join(map(str, value))
        elif value is not None:
            found[key] = str(value)
    return found


def _section(record: Record, name: str, images: list[tuple[str, Path]]) -> dict[str, Any]:
    env = record["environment"]
    commit = f", commit {env['commit'][:10]}" if env["commit"] else ""
    return {
        "name": name,
        "title": KINDS[record["kind"]],
        "machine": plots.style.machine(record),
        "verdict": verdict(record),
        "what": f"{plots.style.where(record)}, {env['date'][:10]}{commit}",
        "command": record["command"],
        "warnings": warnings(record),
        "images": [
            {"title": title, "data": base64.b64encode(path.read_bytes()).decode()}
            for title, path in images
        ],
        "tables": [
            {
                "title": summary.capital(title),
                "lines": [[c.replace("**", "").replace("`", "") for c in line] for line in lines],
            }
            for title, lines in digest.blocks(record)
        ],
        "losses": [summary.loss_text(loss) for loss in summary.losses(record)],
        "missing": [
            f"{provider} {status}: {reason}" + (f" ({count} measurements)" if count else "")
            for (provider, status, reason), count in summary.missing(record).items()
        ],
        "environment": _flat(
            {**env, "clocks": record["clocks"], "caches hold": record["cache_state"]}
        ),
    }


def render(found: Sequence[tuple[Path, Record]], folder: Path) -> str:
    """The page; plots are drawn into ``folder`` on the way."""
    sections = []
    kinds = list(KINDS)
    for path, record in sorted(found, key=lambda pair: kinds.index(pair[1]["kind"])):
        drawn = plots.draw(record, folder / path.name)
        titles = {p: plots.TITLES[record["kind"], p.stem.removeprefix(path.stem)] for p in drawn}
        sections.append(_section(record, path.stem, [(titles[p], p) for p in drawn]))
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(records=sections)


def _renew_pictures(found: Sequence[tuple[Path, Record]]) -> int:
    if reason := extras.why_left_out("plots"):
        print(f"--pictures: {reason}", file=sys.stderr)
        return 2
    for path, record in found:
        print("written:", *plots.draw(record, path))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    parser.add_argument("--out", type=Path, default=LOCAL_RESULTS, metavar="DIR")
    parser.add_argument(
        "--pictures", action="store_true", help="renew the plots beside the records, nothing else"
    )
    parser.add_argument("--quiet", action="store_true", help="no tables on the terminal")
    args = parser.parse_args(argv)
    if extras.lacks("page"):
        return 2
    extras.announce(*(() if args.quiet else ("tables",)), "plots")
    paths = args.records or committed()
    try:
        found = [(path, records.read(path)) for path in paths]
    except (OSError, records.InvalidRecord) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if args.pictures:
        return _renew_pictures(found)
    try:
        make_writable(args.out)
    except OSError as error:
        print(f"--out: {args.out} cannot be written to: {error.strerror}", file=sys.stderr)
        return 2
    for path, record in found:
        records.write_csv(record, args.out / f"{path.stem}.csv")
        if not args.quiet:
            from .__main__ import tables

            tables(record)
    target = args.out / "report.html"
    target.write_text(render(found, args.out))
    print(f"written: {target}, and {len(found)} CSV tables and their plots beside it")
    return 0
