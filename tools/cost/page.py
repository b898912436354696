"""``python -m tools.cost.page FILE.md ...``: renew the tables of prices in Markdown files.

Between

    <!-- cost:begin BACKEND CARD RECORD.json -->
    <!-- cost:end -->

comes a table of what the record (a path from the file's folder, written by ``python -m tools.cost
--record``) says of the layers of the default networks; a line for each layer and layout.
``--check`` changes nothing and only says whether the tables are what the records give (exit code 1
if not).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme import renew_files
from benchmarks.workloads import DEFAULT_NETWORKS

from .record import HEAD, LAYOUTS, layers

BLOCK = re.compile(
    r"(<!-- cost:begin (?P<backend>\w+) (?P<card>[\w ]+?) (?P<record>\S+) -->\n).*?"
    r"(<!-- cost:end -->)",
    re.DOTALL,
)
_DIRECTIONS = ("forward", "backward")
_SHORT = {"special functions": "special", "loads and stores": "loads"}


def _loads(line: dict[str, Any]) -> str:
    """In the loops that stream, the fewest 16-byte loads before the first is used."""
    found = [
        loads
        for kernel in line["kernels"]
        for name, (loads, _) in kernel["loads_before_use"].items()
        if name in ("sum", "write") and loads
    ]
    return str(min(found)) if found else "-"


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{share:.0%}" for share in sorted(shares))
    return low if low == high else f"{low.rstrip('%')}-{high}"


def _cells(line: dict[str, Any] | None) -> list[str]:
    if line is None:
        return ["n/a"] * 6
    each = line["kernels"]
    registers = "/".join(str(k["registers"]) for k in each)
    blocks = "/".join(str(k["blocks_per_multiprocessor"]) for k in each)
    return [
        f"{line['instructions_per_vector']:.0f}",
        f"{registers}, {blocks}",
        _loads(line),
        _SHORT.get(line["binds"], line["binds"]),
        f"{line['ceiling']:.0%}",
        _range(line["expected"]),
    ]


def table(record: dict[str, Any], backend: str, card: str) -> str:
    """The table in Markdown.

    Raises:
        ValueError: the record has nothing of the backend on the card.
    """
    lines = {
        (line["layer"], line["layout"], line["direction"]): line
        for line in record["rows"]
        if (line["backend"], line["card"]) == (backend, card)
    }
    if not lines:
        raise ValueError(f"the record has nothing of {backend} on {card}")
    of_card = record["cards"][card]
    slots = {line["direction"]: line["slots_per_vector"] for line in lines.values()}
    head = ["layer", "layout"]
    for direction in _DIRECTIONS:
        head += [f"{direction}: instructions", "registers, blocks", "loads", "binds", "ceiling",
                 "expected"]  # fmt: skip
    rows = []
    for layer in layers(DEFAULT_NETWORKS):
        for layout in LAYOUTS:
            of = [lines.get((layer.name, layout, direction)) for direction in _DIRECTIONS]
            if any(of):
                rows.append([layer.name, layout, *_cells(of[0]), *_cells(of[1])])
    what = (
        f"**{HEAD[0].upper()}{HEAD[1:]}.** `{backend}` on {card} "
        f"({of_card['copy_speed'] / 1e12:.2f} TB/s, {of_card['multiprocessors']} multiprocessors "
        f"at {of_card['clock'] / 1e9:.2f} GHz), {record['dtype']}, batch {record['batch']}. Beside "
        f"the bytes of a forward pass {slots['forward']:.0f} instructions per vector fit, beside "
        f"those of a backward pass {slots['backward']:.0f}."
    )
    pairs = len({key[:2] for key in lines})
    summaries = "; ".join(_summary(lines, direction) for direction in _DIRECTIONS)
    text = [what, "", *("| " + " | ".join(row) + " |" for row in [head, *rows]), "",
            f"Of all {pairs} pairs of layer and layout in the record: {summaries}."]  # fmt: skip
    text.insert(3, "|" + "---|" * len(head))
    return "\n".join([*text, *_touched(lines)])


_WHAT = {
    "read": "global, read", "written": "global, written", "shared_read": "shared, read",
    "shared_written": "shared, written",
}  # fmt: skip


def _touched(lines: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """A table of what accesses touch, of the lines of the record that say it."""
    rows = []
    for (layer, layout, direction), line in lines.items():
        if "touched" not in line:
            continue
        of = {phase: line["touched"].get(phase, {}) for phase in ("sum", "mlp", "write")}
        cells = [
            " ".join(f"{phase} {found[what]:.1f}" for phase, found in of.items() if what in found)
            for what in _WHAT
        ]
        rows.append([layer, layout, direction, *(cell or "-" for cell in cells)])
    if not rows:
        return []
    head = ["layer", "layout", "direction", *_WHAT.values()]
    what = (
        "What accesses touch, by phase: bytes of the 32-byte sectors in a request of a warp over "
        "the bytes asked for (below 1 where lanes ask for the same), and wavefronts of shared "
        "memory over those without bank conflicts; copies of whole slices are not among them."
    )
    table = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return ["", what, "", table[0], "|" + "---|" * len(head), *table[1:]]


def _summary(lines: dict[tuple[str, str, str], dict[str, Any]], direction: str) -> str:
    of = [line for key, line in lines.items() if key[2] == direction]
    bound: dict[str, int] = {}
    for line in of:
        bound[line["binds"]] = bound.get(line["binds"], 0) + 1
    found = sorted(sum(line["expected"]) / 2 for line in of)
    binds = ", ".join(f"{name} {n}" for name, n in sorted(bound.items(), key=lambda i: -i[1]))
    return (
        f"{direction}, what binds: {binds}; expected (the middle), as a share of a copy: "
        f"median {found[len(found) // 2]:.0%}, from {found[0]:.0%} to {found[-1]:.0%}"
    )


def renewed(text: str, folder: Path) -> str:
    """A Markdown text with its tables as the records give them.

    Raises:
        OSError, ValueError: a record cannot be read, or there is no table.
    """

    def block(found: re.Match[str]) -> str:
        record = json.loads((folder / found["record"]).read_text(encoding="utf-8"))
        return f"{found[1]}{table(record, found['backend'], found['card'])}\n{found[5]}"

    new, count = BLOCK.subn(block, text)
    if not count:
        raise ValueError("expected a block <!-- cost:begin BACKEND CARD RECORD.json --> ...")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return renew_files("python -m tools.cost.page", __doc__, renewed, argv)


if __name__ == "__main__":
    sys.exit(main())
