"""docs/reliability.md from its data: ``python -m tools.reliability``; ``--run``: its tests first.

``docs/reliability.json`` says, hazard by hazard, what is promised and which tests hold it, by the
place where they run; ``docs/reliability_results.json`` what they gave when last run here;
``docs/fuzz.json`` what the fuzzer found, ``docs/sanitizers.json`` (``make sanitize``) what the
sanitizers said, and ``docs/mutants.json`` (``make mutants``) which mutants of the kernels the suite
kills. The page is made of these, and of a hash of the kernels' text: it says of each record
whether it is of the kernels as they are. A test compares, so that after a change of the kernels
the page has to be generated anew; a record that has become stale by it fails nothing, and is told.

``make reliability`` runs every test named: on the CPU, on the simulation of CUDA, in Triton's
interpreter and, where there is one, on a GPU; ``--place`` chooses, ``--slow`` runs slow cases too.
``--check`` writes nothing: exit code 1 where the page is not what would be generated.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tools.mutation_sites import FILES, text_hash

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE, DATA, RESULTS, FUZZ, SANITIZERS, MUTANTS = (
    DOCS / name
    for name in (
        "reliability.md",
        "reliability.json",
        "reliability_results.json",
        "fuzz.json",
        "sanitizers.json",
        "mutants.json",
    )
)
PLACES: dict[str, tuple[str, dict[str, str]]] = {
    "CPU": ("not simulated", {}),
    "simulated CUDA": ("simulated or test_cuda_on_cpu or test_simt", {}),
    "Triton interpreter": ("triton", {"TRITON_INTERPRET": "1"}),
    "GPU": ("", {}),
}
#: A backend's kernels, plans and launches: what tests, the fuzzer and sanitizers say is
#: about these, while mutants are of the kernels alone (``FILES``).
SOURCES = {
    "triton": ("senet_kernels/backends/triton/*.py",),
    "cuda": ("csrc/*.*", "csrc/cuda/*"),
    "cpu": ("csrc/*.*", "csrc/cpu/*"),
}
#: The kernels that a place's results are about.
KERNELS_IN = {
    "CPU": ("cpu",),
    "simulated CUDA": ("cuda",),
    "Triton interpreter": ("triton",),
    "GPU": ("triton", "cuda"),
}
NOT_YET, NOT_RUN, NOT_RECORDED = "not yet run on a GPU", "not run", "not recorded"
#: The folders whose text decides about results.
RECORDED_OF = ("csrc", "senet_kernels", "tests")
AS_THEY_ARE, STALE = "of the kernels as they are", "of earlier kernels: stale"
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
        "commit": commit(),
        "kernels": kernels(),
        "tests": {test: dict(sorted(counts[test].items())) for test in sorted(counts)},
    }


def kernels() -> dict[str, str]:
    """What a record says it is of."""
    return {backend: source_hash(backend) for backend in SOURCES}


def source_hash(backend: str) -> str:
    """Of all of a backend as it is."""
    files = sorted(path for pattern in SOURCES[backend] for path in ROOT.glob(pattern))
    text = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:16]


def of_kernels(recorded: dict[str, str] | None, backends: Iterable[str]) -> str:
    """Whether a record is of the kernels as they are, in words."""
    if recorded is None:
        return NOT_RECORDED
    now = kernels()
    stale = [b for b in backends if recorded.get(b) != now[b]]
    fresh = [b for b in backends if b not in stale]
    if stale and fresh:
        return f"{AS_THEY_ARE}: {', '.join(fresh)}; {STALE}: {', '.join(stale)}"
    return STALE if stale else AS_THEY_ARE


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def uncommitted() -> list[str]:
    """What differs from the commit in what a record is about; a record itself is not."""
    return _git("status", "--porcelain", "--", *RECORDED_OF).splitlines()


def refuse_uncommitted() -> None:
    """End here, where a record would be of no commit."""
    if changed := uncommitted():
        sys.exit("a record is of a commit: commit or stash first\n" + "\n".join(changed))


def commit() -> str:
    found = _git("describe", "--always", "--abbrev=12") or "unknown"
    return f"{found}-dirty" if uncommitted() else found


def outcome(row: dict[str, Any], place: str, results: dict[str, Any]) -> str:
    """The last result of a row's tests in one place, in words."""
    if place == "GPU" and place not in results:
        return NOT_YET
    if place not in results:
        return NOT_RECORDED
    total: Counter[str] = Counter()
    for test in row["tests"][place]:
        total.update(results[place]["tests"].get(test, {NOT_RUN: 1}))
    if not total["passed"] + total["failed"]:
        return NOT_RUN
    said = [f"{total[name]} {name}" for name in (*_OUTCOMES, NOT_RUN) if total[name]]
    return ", ".join(said)


def places_run(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Where a test of the row gave a result."""
    none = (NOT_YET, NOT_RUN, NOT_RECORDED)
    return [place for place in row["tests"] if outcome(row, place, results) not in none]


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
    lines = ["| where | command | date | commit | kernels | cases |", "|---|---|---|---|---|---|"]
    for place in PLACES:
        if place in results:
            r = results[place]
            total: Counter[str] = Counter()
            for counts in r["tests"].values():
                total.update(counts)
            cases = ", ".join(f"{total[name]} {name}" for name in _OUTCOMES if total[name])
            command = f"`{r['command']}`"
            of = of_kernels(r.get("kernels"), KERNELS_IN[place])
            lines.append(f"| {place} | {command} | {r['date']} | {r['commit']} | {of} | {cases} |")
        else:
            why = NOT_YET if place == "GPU" else "not recorded"
            lines.append(f"| {place} | `make reliability` | | | | {why} |")
    return lines


def fuzz() -> list[str]:
    """A table for each recorded run of the fuzzer."""
    lines = []
    for r in json.loads(FUZZ.read_text())["runs"]:
        calls = sum(w["calls"] for w in r["workers"])
        wrong = sum(w["wrong"] for w in r["workers"])
        of = of_kernels(r.get("kernels"), FILES)
        summary = f"{r['date']}, commit {r['commit']}: **{calls:,} calls, {wrong} wrong** ({of})."
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


def sanitizers() -> list[str]:
    """A row per sanitizer, and one for the CUDA kernels' turn, which is a test of the suite."""
    record = json.loads(SANITIZERS.read_text()) if SANITIZERS.exists() else {}
    lines = [
        "| sanitizer | over | result | command, date, commit | tools | kernels |",
        "|---|---|---|---|---|---|",
    ]
    for name, what in SANITIZED.items():
        if name in record:
            r = record[name]
            cells = [r["over"], r["result"], f"`{r['command']}`, {r['date']}, {r['commit']}"]
            cells += [r["tools"], of_kernels(r["kernels"], ["cpu"])]
        else:
            cells = ["", "not recorded", f"`make sanitize ARGS='--record {name}'`", "", ""]
        lines.append(f"| {what} | {' | '.join(c.replace('|', ' ') for c in cells)} |")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    row = {"tests": {"simulated CUDA": [_CUDA_SANITIZED]}}
    cells = [_short(_CUDA_SANITIZED), outcome(row, "simulated CUDA", results)]
    if "simulated CUDA" in results:
        r = results["simulated CUDA"]
        cells += [f"`{r['command']}`, {r['date']}, {r['commit']}", ""]
        cells += [of_kernels(r.get("kernels"), ["cuda"])]
    else:
        cells += ["", "", ""]
    what = "AddressSanitizer and UndefinedBehaviorSanitizer, simulated CUDA"
    return [*lines, f"| {what} | {' | '.join(cells)} |"]


def stale() -> list[str]:
    """What should be recorded anew, a line each."""
    said = []
    record = json.loads(MUTANTS.read_text()) if MUTANTS.exists() else {"mutants": []}
    for backend in FILES:
        of = [m for m in record["mutants"] if m["backend"] == backend]
        if not of:
            said.append(f"mutants of {backend}: not recorded")
        elif _of_mutants(of) != AS_THEY_ARE:
            said.append(f"mutants of {backend}: {_of_mutants(of)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for place, r in results.items():
        of_place = of_kernels(r.get("kernels"), KERNELS_IN[place])
        if "kernels" not in r:
            of_place = "of which kernels is not recorded"
        if of_place != AS_THEY_ARE:
            said.append(f"results, {place}: {of_place}")
    recorded = json.loads(SANITIZERS.read_text()) if SANITIZERS.exists() else {}
    for name in SANITIZED:
        kept = recorded.get(name, {}).get("kernels")
        if of_kernels(kept, ["cpu"]) != AS_THEY_ARE:
            said.append(f"sanitizers, {name}: {of_kernels(kept, ['cpu'])}")
    return said


def _of_mutants(entries: list[dict[str, Any]]) -> str:
    """Whether recorded mutants of one backend are of its kernels as they are."""
    old = sum(m["text"] != text_hash(m["backend"]) for m in entries)
    if old in (0, len(entries)):
        return STALE if old else AS_THEY_ARE
    return f"{old} of these {STALE}"


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
    lines = [summary, "", "| backend | mutants | killed | these are |", "|---|---|---|---|"]
    for backend in FILES:
        of = [m for m in found if m["backend"] == backend]
        killed = sum(m["killed"] for m in of)
        score = f"{len(of)} | {killed} | {_of_mutants(of)}" if of else "not recorded | |"
        lines.append(f"| {backend} | {score} |")
    lines += ["", "| mutant | kind | killed by |", "|---|---|---|"]
    for m in found:
        by = m["by"].partition("[")[0] if m["killed"] else f"**survived**: {m['explanation']}"
        by = _short(by) if by.startswith("tests/") else by
        where = ":".join(m["id"].split(":")[:3])
        if not (ROOT / where.partition(":")[0]).exists():
            where += " (no such file any more)"
        change = f"`{m['before']}` to `{m['after']}`".replace("|", "\\|")
        lines.append(f"| {where} {change} | {m['kind']} | {by} |")
    return lines


#: What ``make sanitize`` runs over the CPU code.
SANITIZED = {
    "address": "AddressSanitizer and UndefinedBehaviorSanitizer",
    "thread": "ThreadSanitizer",
    "valgrind": "valgrind (memcheck, with leaks)",
}
_CUDA_SANITIZED = "tests/test_cuda_on_cpu.py::test_clean_under_sanitizers"


def page() -> str:
    """The whole of docs/reliability.md."""
    parts = [
        *(_TITLE, *_currency(), _HEAD, *hazards(), _RUNS, *runs(), _FUZZ, *fuzz()),
        _ORDERING.rstrip("\n"),
        *(_SANITIZERS, *sanitizers(), _MUTANTS, *mutants(), ""),
    ]
    return "\n".join(parts)


def _currency() -> list[str]:
    """A paragraph where records are of other kernels than those in the tree."""
    if not (said := stale()):
        return [""]
    names = [line.removesuffix(f": {STALE}") for line in said]
    return ["", f"**Of earlier kernels, and not recorded anew since:** {'; '.join(names)}.", ""]


_TITLE = """\
# Reliability

What has broken in libraries like this one, what is promised here instead, and the tests that hold
the promise. Public reports are named as evidence that such things happen, not as blame."""
_HEAD = """\
This page is generated by `python -m tools.reliability` from `docs/reliability.json`,
`docs/reliability_results.json`, `docs/fuzz.json`, `docs/sanitizers.json` and `docs/mutants.json`; a
test compares. What was recorded of other kernels than those in the tree is called stale, by a hash
of their text (`tools/mutation_sites.py` lists the files): it fails no test, but the page tells, and
`python -m tools.reliability --check` warns. A test is named by its file and function:
`layouts::empty_extents` is `tests/test_layouts.py::test_empty_extents`. Where it runs:

- **CPU**: any machine; the C++ kernels, the reference, and everything around them.
- **simulated CUDA**: the CUDA sources, compiled by a C++ compiler and executed thread by thread
  (`tests/simt`). It has no memory ordering, no bank conflicts, no real asynchrony. Of the first
  there is a section below.
- **Triton interpreter**: `TRITON_INTERPRET=1`. It proves what a kernel computes, not that it
  compiles, nor anything about registers, races or launching.
- **GPU**: marked `gpu`. No kernel of this package has yet run on a GPU, and until one has, what
  these tests promise is not known to hold.

## Hazards
"""
_RUNS = """
## When these results were taken

"Not run" counts tests whose cases there are all slow, which take `ARGS=--slow`, or that are newer
than the results; alone it says that no test of the row ran there, which is no result. What is
recorded is of a commit: with changes of `csrc`, `senet_kernels` or `tests` that are not committed
nothing is run.
"""
_FUZZ = """
## The fuzzer

`make fuzz BUDGET=seconds` draws legal calls at random (shape, layout, strides, offset, dtype,
options, gradients asked for, special values, threads, plans), compares outputs and gradients with a
float64 oracle, prints a command that reproduces what is wrong, and keeps it in `tests/corpus/`,
which the gate replays. Triton runs in the interpreter, CUDA on the simulation. Recorded runs:"""
_ORDERING = """
## Memory ordering

What one block writes another one sees late, and in another order, unless both ask for it. The
exchanges of the CUDA kernels (through global memory, in a cluster's shared memory, and the rings
of asynchronous copies) are therefore checked against the PTX memory model (`tests/memory_model`):
a checker that enumerates every execution that the axioms of the PTX manual allow, of programs of
two or three blocks. As written all of them read what they should, without a data-race; with a
barrier, fence, order or scope weakened, one at a time, some do not, or it is said why the step is
spare. The PTX that nvcc emits is compared with these programs, instruction by instruction, on
every path of a thread; of the machine code it is asserted that a release is a `MEMBAR` before, an
acquire empties L1 behind, and barriers stand where the protocol has them. Programs of the Triton
kernels do not speak to each other, and their PTX has nothing by which they could. This proves
that the kernels ask for the order they need. It does not prove addresses and counts (executing
the PTX, `tests/ptx`, shows those), larger numbers of blocks than were enumerated, accesses within
a block outside of the exchanges, nor that a GPU does what its manual says: nothing of this is a
run on a GPU.
"""
_SANITIZERS = """
## Sanitizers

`make sanitize` builds the native CPU code for the sanitizers and runs it, `ARGS=--record` writes
what they said. Each must also see a fault that is planted, or it counts as failed. ThreadSanitizer
and valgrind run a program with `std::thread` in place of OpenMP (`tests/team/team.cpp`),
AddressSanitizer the tests that reach all of the code, on small tensors; what takes memory limits,
forks or threads of its own is left out (`tools/sanitize.py`). The CUDA kernels have their turn on
the simulation; on a device `make gpu` runs them under compute-sanitizer, which is not yet run on a
GPU.
"""
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
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--kernels", action="store_true", help="print what a record of docs/fuzz.json is of"
    )
    options = parser.parse_args()
    if options.kernels:
        print(json.dumps(kernels()))
        return 0
    if options.check:
        same = PAGE.read_text() == page()
        _warn()
        print(f"{PAGE.name}: {'as generated' if same else 'run python -m tools.reliability'}")
        return int(not same)
    if options.run:
        refuse_uncommitted()
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
    _warn()
    return int(failed)


def _warn() -> None:
    for line in stale():
        print("warning:", line, file=sys.stderr)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
