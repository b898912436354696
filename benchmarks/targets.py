"""``python -m benchmarks targets RECORD ...``: what the GPU kernels are to reach, and what records
of ``layers`` say of it.

Figures of a CPU are shown and decide nothing. Not yet run on a GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean

from senet_kernels._command_line import Parser

from . import records, summary
from .layer_run import LayerBench
from .problem import BACKWARD, DTYPES, FORWARD, FORWARD_GRAPH, LAYOUTS, TRAINING, Case
from .regimes import CLASSES, MEMORY, MIXED, ONE_FITS, REREAD, TITLES, TWO_FIT
from .summary import Entry, Record
from .workloads import load_networks

EAGER, COMPILED = "eager-conv", "compile-max"
STRICT_EAGER = "eager-linear"  # the stronger form of eager
BATCHES = (1, 256)
SMALL_IMAGE = 1_000_000  # bytes
YES, SO_FAR, NO, NOT_MEASURED = "yes", "so far", "no", "not measured"
NOT_ON_GPU = "not on a GPU"

# Least speed as a part of clone's, forward and backward, of each contender and class of layers.
OF_CLONE: dict[str, dict[str, tuple[float, float]]] = {
    "native": {TWO_FIT: (0.92, 0.90), ONE_FITS: (0.85, 0.85), REREAD: (0.80, 0.75)},
    "triton": {MEMORY: (0.75, 0.75)},
}
# Least geometric mean over the layers, by contender, baseline and mode.
SPEEDUPS: dict[str, dict[tuple[str, str], float]] = {
    "native": {(EAGER, FORWARD): 3.0, (COMPILED, FORWARD): 1.4, (COMPILED, BACKWARD): 1.25},
    "triton": {
        (EAGER, FORWARD): 2.5, (EAGER, TRAINING): 2.5,
        (COMPILED, FORWARD): 1.2, (COMPILED, TRAINING): 1.2,
    },
}  # fmt: skip
CONTENDERS = tuple(SPEEDUPS)
Measured = tuple[Record, Entry]


@dataclass(frozen=True)
class Line:
    """One target. ``wanted`` is empty for what is only to be reported."""

    contender: str
    what: str
    wanted: str
    figure: str = ""
    measured: str = ""  # on how many cases
    met: str = NOT_MEASURED

    @property
    def cells(self) -> list[str]:
        return [self.contender, self.what, self.wanted, self.figure, self.measured, self.met]


def _verdict(right: bool, count: int, expected: int) -> str:
    if not right:
        return NO
    return YES if count >= expected else SO_FAR


class Targets:
    """The lines, from the entries of all records; of a case measured twice the last counts."""

    def __init__(self, found: Sequence[Record]) -> None:
        self.records = [record for record in found if record["kind"] == "layers"]
        devices = [record["environment"]["device"] for record in self.records]
        self.on_gpu = bool(devices) and "cpu" not in devices
        cases: dict[tuple[object, ...], Measured] = {}
        for record in self.records:
            for e in record["results"]:
                if e["batch"] in BATCHES:
                    key = (
                        record.get("neighbours"),
                        *(e[k] for k in (*LayerBench.key_fields, "mode")),
                    )
                    cases[key] = record, e
        self.neighbours = [case for key, case in cases.items() if key[0]]
        self.plain = [case for key, case in cases.items() if not key[0]]
        layers = {layer for n in load_networks().values() for layer, _ in n.layers}
        # Cases of one mode and batch; of one mode; and of the small single images of one mode.
        self.block = len(layers) * len(LAYOUTS) * len(DTYPES)
        self.matrix = self.block * len(BATCHES)
        self.small = sum(
            Case(layer, dtype, layout, 1).bytes <= SMALL_IMAGE
            for layer in layers for dtype in DTYPES for layout in LAYOUTS
        )  # fmt: skip

    def lines(self) -> Iterator[Line]:
        for contender in CONTENDERS:
            for line in self._of(contender):
                decides = self.on_gpu or line.met == NOT_MEASURED
                yield line if decides else replace(line, met=NOT_ON_GPU)

    def _of(self, who: str) -> Iterator[Line]:
        yield self._right(who)
        for name, wanted in OF_CLONE[who].items():
            for mode, least in zip((FORWARD, BACKWARD), wanted, strict=True):
                yield self._of_clone(who, name, mode, least)
        for mode in (FORWARD, BACKWARD):
            yield self._of_clone(who, MIXED, mode, None)
        for (baseline, mode), least in SPEEDUPS[who].items():
            yield self._speedup(who, baseline, mode, least)
            if baseline == EAGER:
                yield self._speedup(who, STRICT_EAGER, mode, least)
        yield self._losses(who)
        for baseline in (EAGER, COMPILED):
            for mode in (FORWARD, BACKWARD, TRAINING):
                yield self._speedup(who, baseline, mode, None, neighbours=True)
        if who == "native":
            yield from self._single_images(who)
            yield self._host(who, FORWARD, "without grad", 5.0)
            yield self._host(who, FORWARD_GRAPH, "with grad", 10.0)

    def _right(self, who: str) -> Line:
        count = {"ok": 0, "wrong": 0, "n/a": 0, "memory": 0}
        for _, entry in self.plain:
            for name, provider in entry["providers"].items():
                if name == who:
                    lacks = "memory" in provider.get("reason", "")
                    count["memory" if lacks else provider["status"]] += 1
        total, expected = sum(count.values()), 3 * self.matrix
        names = {"ok": "right", "wrong": "wrong", "n/a": "refused", "memory": "too large here"}
        return Line(
            who, "right: layers, types, layouts, batch 1 and 256, modes", "all",
            ", ".join(f"{count[key]} {name}" for key, name in names.items() if count[key]),
            f"{total} of {expected}" if total else "",
            _verdict(not count["wrong"] + count["n/a"], total, expected) if total else NOT_MEASURED,
        )  # fmt: skip

    def _of_clone(self, who: str, name: str, mode: str, wanted: float | None) -> Line:
        found = []
        settled = 0  # cases in the class with their figure, or known to be in another
        for record, entry in self.plain:
            if (entry["mode"], entry["batch"]) != (mode, BATCHES[-1]):
                continue
            regime, kind = summary.regimes_of(record, entry, who)
            if name in (regime, kind):
                provider = entry["providers"].get(who, {})
                if over := provider.get(summary.metric_of(record), {}).get("over_limit"):
                    found.append((1 / over, summary.case_name(entry)))
                    settled += 1
            elif regime is not None:
                settled += kind is not None or not (name in CLASSES and regime == MEMORY)
        what = f"{mode}, share of clone's speed, {TITLES[name].removeprefix('... ')}"
        least = "" if wanted is None else f"every layer ≥ {wanted:.0%}"
        if not found:
            return Line(who, what, least)
        worst, where = min(found)
        mean = geometric_mean(value for value, _ in found)
        return Line(
            who, what, least, f"least {worst:.0%} ({where}), mean {mean:.0%}",
            f"{len(found)}; {settled} of {self.block} classified",
            "reported" if wanted is None else _verdict(worst >= wanted, settled, self.block),
        )  # fmt: skip

    def _ratios(
        self, cases: list[Measured], who: str, baseline: str, mode: str
    ) -> list[tuple[float, str]]:
        return [
            (figure["ratio"], summary.case_name(entry))
            for record, entry in cases
            if entry["mode"] == mode
            and (figure := summary.ratio(entry, summary.metric_of(record), who, baseline))
        ]

    def _speedup(
        self, who: str, baseline: str, mode: str, wanted: float | None, neighbours: bool = False
    ) -> Line:
        found = self._ratios(self.neighbours if neighbours else self.plain, who, baseline, mode)
        what = f"{mode}, geometric mean over {baseline}"
        what += ", with the neighbours" if neighbours else ""
        least = "" if wanted is None else f"≥ {wanted:g}×"
        if not found:
            return Line(who, what, least)
        mean, (worst, where) = geometric_mean(value for value, _ in found), min(found)
        return Line(
            who, what, least, f"{mean:.2f}×, least {worst:.2f}× ({where})",
            str(len(found)) if neighbours else f"{len(found)} of {self.matrix}",
            "reported" if wanted is None else _verdict(mean >= wanted, len(found), self.matrix),
        )  # fmt: skip

    def _losses(self, who: str) -> Line:
        found = [r for m in (FORWARD, TRAINING) for r in self._ratios(self.plain, who, COMPILED, m)]
        what, wanted = f"slower than {COMPILED} by more than 5 %", "none"
        if not found:
            return Line(who, what, wanted)
        lost, (worst, where) = sum(value < summary.LOSS for value, _ in found), min(found)
        expected = 2 * self.matrix
        return Line(
            who, what, wanted, f"{lost}, least {worst:.2f}× ({where})",
            f"{len(found)} of {expected}", _verdict(not lost, len(found), expected),
        )  # fmt: skip

    def _single_images(self, who: str) -> Iterator[Line]:
        images = [entry for _, entry in self.plain if entry["batch"] == 1]
        for mode, most in ((FORWARD, 1), (BACKWARD, 2)):
            found = [(e, _launches(e, who)) for e in images if e["mode"] == mode]
            yield self._largest(who, f"batch 1, {mode}: launches", most, "", found, self.block)
        small = [e for e in images if e["mode"] == FORWARD and e["bytes"] <= SMALL_IMAGE]
        yield self._largest(
            who, "batch 1, forward, images up to 1 MB: time in a CUDA graph", 5, " µs",
            [(e, summary.microseconds(e, "device", who)) for e in small], self.small,
            lacking="" if self.on_gpu else "a CPU has no CUDA graph",
        )  # fmt: skip

    def _largest(
        self, who: str, what: str, most: float, unit: str, values: list[tuple[Entry, float]],
        expected: int, lacking: str = "",
    ) -> Line:  # fmt: skip
        found = [(value, summary.case_name(e)) for e, value in values if not math.isnan(value)]
        wanted = f"≤ {most:g}{unit}"
        if not found:
            return Line(who, what, wanted, lacking)
        (worst, where), over = max(found), sum(v > most for v, _ in found)
        return Line(
            who, what, wanted, f"most {worst:.3g}{unit} ({where}), {over} over",
            f"{len(found)} of {expected}", _verdict(not over, len(found), expected),
        )  # fmt: skip

    def _host(self, who: str, mode: str, grad: str, most: float) -> Line:
        what, wanted = f"host time of a call {grad}", f"≤ {most:g} µs"
        for record in reversed(self.records):
            for entry in record.get("small_call", []):
                value = summary.microseconds(entry, "host", who)
                if entry["mode"] == mode and not math.isnan(value):
                    right = _verdict(value <= most, 1, 1)
                    return Line(who, what, wanted, f"{value:.1f} µs", "1", right)
        return Line(
            who, what, wanted, "" if self.on_gpu else "on a CPU a call does its work itself"
        )


def _launches(entry: Entry, who: str) -> float:
    """Kernels and copies of a call, NaN where they were not counted."""
    counts = entry["providers"].get(who, {}).get("launches", {})
    return counts["kernels"] + counts["copies"] if "kernels" in counts else math.nan


def text(found: Sequence[Record]) -> str:
    """Markdown: the targets, then every loss beyond 5 %."""
    targets = Targets(found)
    devices = {r["environment"]["device"]: r["environment"]["torch"] for r in targets.records}
    out = [f"On {', '.join(f'{d}, torch {t}' for d, t in devices.items())}.", ""]
    head = ["backend", "target", "wanted", "figure", "cases", "met"]
    out += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines = list(targets.lines())
    out += [f"| {' | '.join(line.cells)} |" for line in lines]
    losses = [loss for record in targets.records for loss in summary.losses(record)
              if loss[0] in CONTENDERS]  # fmt: skip
    out += ["", f"Losses beyond 5 %: {len(losses) or 'none'}"]
    out += ["", *(f"- {summary.loss_text(loss)}" for loss in losses)] if losses else []
    wanted = [line.met for line in lines if line.wanted]
    count = {name: wanted.count(name) for name in (YES, SO_FAR, NO, NOT_MEASURED, NOT_ON_GPU)}
    out.append(
        f"\n{count[YES]} of {len(wanted)} targets met, {count[SO_FAR]} so far, {count[NO]} missed, "
        f"{count[NOT_MEASURED]} not measured"
        + (f", {count[NOT_ON_GPU]} {NOT_ON_GPU}" if count[NOT_ON_GPU] else "")
    )
    return "\n".join(out) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks targets", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the same as Markdown")
    args = parser.parse_args(argv)
    try:
        found = [records.read(path) for path in args.records]
        if all(record["kind"] != "layers" for record in found):
            raise records.InvalidRecord(f"{args.records[0]}: expected a record of layers")
        written = text(found)
        if args.out:
            args.out.write_text(written)
    except (OSError, records.InvalidRecord) as error:
        print(f"targets: {error}", file=sys.stderr)
        return 2
    print(written, end="")
    return 0
