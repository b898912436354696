"""docs/reliability.md from its data: ``python -m tools.reliability``; ``--run``: its tests first.

``docs/reliability.json`` says, hazard by hazard, what is promised and which tests hold it, by the
place where they run; ``docs/reliability_results.json`` what they gave when last run here;
``docs/fuzz.json`` what the fuzzer found, and ``docs/mutants.json`` (``make mutants``) which mutants
of the kernels the suite kills. The page is made of these and of nothing else; a test compares.

``make reliability`` runs every test named: on the CPU, on the simulation of CUDA, in Triton's
interpreter and, where there is one, on a GPU; ``--place`` chooses, ``--slow`` runs slow cases too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.mutation_sites import FILES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE, DATA, RESULTS, FUZZ, MUTANTS = (
    DOCS / name
    for name in (
        "reliability.md",
        "reliability.json",
        "reliability_results.json",
        "fuzz.json",
        "mutants.json",
    )
)
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "CPU": ("not simulated", {}),
    "simulated CUDA": ("simulated or test_cuda_on_cpu or test_simt", {}),
    "Triton interpreter": ("triton", {"TRITON_INTERPRET": "1"}),
    "GPU": ("", {}),
}
NOT_YET = "not yet run on a GPU"
_OUTCOMES = ("passed", "failed", "skipped")


def tests_of(place: str) -> list[str]:
    """The tests that hold a promise there, each once."""
    rows = json.loads(DATA.read_text())["rows"]
    return sorted({test for row in rows for test in row["tests"].get(place, ())})


def marks(place: str, slow: bool) -> str:
    """Pytest's ``-m`` for a place."""
    parts = ["gpu" if place == "GPU" else "not gpu"]
    return " and ".join(parts if slow else [*parts, "not slow"])


def run(place: str, slow: bool) -> dict[str, Any]:
    """What each test of a place gives: how many of its cases passed, failed, were skipped."""
    keyword, environment = PLACES[place]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
        command += ["-m", marks(place, slow), *(["-k", keyword] if keyword else [])]
        subprocess.run([*command, *tests_of(place)], cwd=ROOT, env={**os.environ, **environment})
        counts: dict[str, Counter[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            module = case.get("classname", "").replace(".", "/")
            test = f"{module}.py::{case.get('name', '').partition('[')[0]}"
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "passed"
            counts.setdefault(test, Counter())["skipped" if "skipped" in tags else outcome] += 1
    return {
        "command": f"make reliability ARGS='--place \"{place}\"{' --slow' if slow else ''}'",
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "tests": {test: dict(sorted(counts[test].items())) for test in sorted(counts)},
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def outcome(row: dict[str, Any], place: str, results: dict[str, Any]) -> str:
    """The last result of a row's tests in one place, in words."""
    if place == "GPU" and place not in results:
        return NOT_YET
    if place not in results:
        return "not recorded"
    total: Counter[str] = Counter()
    for test in row["tests"][place]:
        total.update(results[place]["tests"].get(test, {"not run": 1}))
    said = [f"{total[name]} {name}" for name in (*_OUTCOMES, "not run") if total[name]]
    return ", ".join(said)


def _short(test: str) -> str:
    return "`" + test.removeprefix("tests/test_").replace(".py::test_", "::") + "`"


def _link(issue: str) -> str:
    repository, _, number = issue.partition("#")
    return f"[{issue}](https://github.com/{repository}/issues/{number})"


def hazards() -> list[str]:
    """The table, a row per hazard."""
    data = json.loads(DATA.read_text())["rows"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    lines = ["| hazard | promise | tests, by where they run | last result |", "|---|---|---|---|"]
    for row in data:
        seen = ", ".join(_link(issue) for issue in row["evidence"].split(", ") if issue)
        hazard = f"**{row['hazard']}**" + (f"<br>{seen}" if seen else "")
        tests = [f"{p}: {' '.join(map(_short, names))}" for p, names in row["tests"].items()]
        last = [f"{place}: {outcome(row, place, results)}" for place in row["tests"]]
        lines.append(
            f"| {hazard} | {row['promise']} | {'<br>'.join(tests)} | {'<br>'.join(last)} |"
        )
    return lines


def runs() -> list[str]:
    """When and how the results came about."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    lines = ["| where | command | date | commit | cases |", "|---|---|---|---|---|"]
    for place in PLACES:
        if place in results:
            r = results[place]
            total: Counter[str] = Counter()
            for counts in r["tests"].values():
                total.update(counts)
            cases = ", ".join(f"{total[name]} {name}" for name in _OUTCOMES if total[name])
            command = f"`{r['command']}`"
            lines.append(f"| {place} | {command} | {r['date']} | {r['commit']} | {cases} |")
        else:
            why = NOT_YET if place == "GPU" else "not recorded"
            lines.append(f"| {place} | `make reliability` | | | {why} |")
    return lines


def fuzz() -> list[str]:
    """A table for each recorded run of the fuzzer."""
    lines = []
    for r in json.loads(FUZZ.read_text())["runs"]:
        calls = sum(w["calls"] for w in r["workers"])
        wrong = sum(w["wrong"] for w in r["workers"])
        summary = f"{r['date']}, commit {r['commit']}: **{calls:,} calls, {wrong} wrong.**"
        lines += [
            "",
            f"`{r['command']}`, {summary} {r['note']}",
            "",
            "| backend | calls | seconds | wrong |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {w['worker']} | {w['calls']:,} | {w['seconds']:,} | {w['wrong']} |"
            for w in r["workers"]
        ]
    return lines


def mutants() -> list[str]:
    """The score, and a row per mutant."""
    if not MUTANTS.exists():
        return ["Not recorded."]
    record = json.loads(MUTANTS.read_text())
    found = record["mutants"]
    killed = sum(m["killed"] for m in found)
    discarded = Counter(d["why"] for d in record["discarded"])
    dropped = ", ".join(f"{n} {why}" for why, n in sorted(discarded.items())) or "none"
    summary = (
        f"**{killed} of {len(found)} killed** ({100 * killed / max(1, len(found)):.0f} %); "
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, "
        f"{record['compiler']}. Drawn and not counted: {dropped}."
    )
    lines = [summary, "", "| backend | mutants | killed |", "|---|---|---|"]
    for backend in FILES:
        of = [m for m in found if m["backend"] == backend]
        score = f"{len(of)} | {sum(m['killed'] for m in of)}" if of else "not recorded |"
        lines.append(f"| {backend} | {score} |")
    lines += ["", "| mutant | kind | killed by |", "|---|---|---|"]
    for m in found:
        by = m["by"].partition("[")[0] if m["killed"] else f"**survived**: {m['explanation']}"
        by = _short(by) if by.startswith("tests/") else by
        where = ":".join(m["id"].split(":")[:3])
        change = f"`{m['before']}` to `{m['after']}`".replace("|", "\\|")
        lines.append(f"| {where} {change} | {m['kind']} | {by} |")
    return lines


def page() -> str:
    """The whole of docs/reliability.md."""
    return "\n".join([_HEAD, *hazards(), _RUNS, *runs(), _FUZZ, *fuzz(), _MUTANTS, *mutants(), ""])


_HEAD = """\
# Reliability

What has broken in libraries like this one, what is promised here instead, and the tests that hold
the promise. Public reports are named as evidence that such things happen, not as blame.

This page is generated by `python -m tools.reliability` from `docs/reliability.json`,
`docs/reliability_results.json`, `docs/fuzz.json` and `docs/mutants.json`; a test compares. A test
is named by its file and function: `layouts::empty_extents` is
`tests/test_layouts.py::test_empty_extents`. Where it runs:

- **CPU**: any machine; the C++ kernels, the reference, and everything around them.
- **simulated CUDA**: the CUDA sources, compiled by a C++ compiler and executed thread by thread
  (`tests/simt`). It has no memory ordering, no bank conflicts, no real asynchrony.
- **Triton interpreter**: `TRITON_INTERPRET=1`. It proves what a kernel computes, not that it
  compiles, nor anything about registers, races or launching.
- **GPU**: marked `gpu`. No kernel of this package has yet run on a GPU, and until one has, what
  these tests promise is not known to hold.

## Hazards
"""
_RUNS = """
## When these results were taken
"""
_FUZZ = """
## The fuzzer

`make fuzz BUDGET=seconds` draws legal calls at random (shape, layout, strides, offset, dtype,
options, gradients asked for, special values, threads, plans), compares outputs and gradients with a
float64 oracle, prints a command that reproduces what is wrong, and keeps it in `tests/corpus/`,
which the gate replays. Triton runs in the interpreter, CUDA on the simulation. Recorded runs:"""
_MUTANTS = """
## Mutants of the kernels

A suite is worth what it notices. `make mutants` makes small changes of the kernels at places drawn
at random, one at a time (an operator, a constant, an index, a mask, a sum, a barrier), and runs the
part of the suite that is about that backend until a test fails; `tools/mutation_sites.py` says what
is changed, and `make mutants ARGS='--only ID'` runs one again. What decides about speed alone
(launch plans, prefetches, streaming hints) is left out, as are the instructions that only a GPU
executes (`csrc/cuda/seam.cuh`).
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", action="store_true", help="run the tests first")
    parser.add_argument("--place", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--slow", action="store_true", help="slow cases, too")
    options = parser.parse_args()
    failed = False
    for place in options.place if options.run else ():
        if place == "GPU" and not _has_gpu():
            print("GPU: left out, there is none")
            continue
        latest = run(place, options.slow)
        failed |= any("failed" in counts for counts in latest["tests"].values())
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[place] = latest
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page())
    return int(failed)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
