"""Any legal call, drawn at random, against the oracle; those that once were wrong; and the fuzzer
that draws them for longer."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fuzz
from backend_cases import EXACT_BACKENDS, BackendCase, require
from random_calls import RandomCall, calls, check_call, plans_of
from senet_kernels.features import COLUMNS as FEATURE_COLUMNS

# Calls in the gate; the others take a fiftieth of a second and more for each.
FEW = {"native": 120, "reference": 60, "simulated-cuda": 40, "triton": 12}
each_backend = pytest.mark.parametrize("backend", EXACT_BACKENDS, ids=str)


def _draw_and_check(backend: BackendCase, examples: int) -> int:
    """How many calls were checked."""
    checked = 0

    def check(call: RandomCall) -> None:
        nonlocal checked
        checked += check_call(call)

    chosen = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    chosen(given(calls(str(backend), plans_of(backend)))(check))()
    return checked


@pytest.mark.usefixtures("poisoned_empty")
@each_backend
def test_any_call(backend: BackendCase, record_property: Callable[[str, object], None]) -> None:
    require(backend)
    record_property("calls", _draw_and_check(backend, FEW.get(str(backend), 120)))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_empty")
@each_backend
def test_any_call_long(backend: BackendCase) -> None:
    require(backend)
    _draw_and_check(backend, 20 * FEW.get(str(backend), 120))


# ---- what was found ----

CORPUS = [
    line
    for file in sorted(fuzz.CORPUS.glob("*.jsonl"))
    for line in file.read_text().splitlines()
    if line
]


@pytest.mark.usefixtures("poisoned_empty")
@each_backend
def test_corpus(backend: BackendCase) -> None:
    """What was wrong on one backend is right on all."""
    require(backend)
    for line in CORPUS:
        call = RandomCall.from_json(line)
        spec = replace(call.spec, device=backend.device)
        mine = replace(call, backend=str(backend), spec=spec)
        if spec.fits(backend):
            assert check_call(mine), f"too near a kink: {line}"


def test_corpus_is_not_empty() -> None:
    assert len(CORPUS) >= 5


# ---- the fuzzer ----


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(calls("simulated-cuda", ("", "exchange=none")))
def test_a_call_survives_json(call: RandomCall) -> None:
    assert RandomCall.from_json(call.to_json()) == call
    assert "\n" not in call.to_json()


# The reference with a fault that only some calls meet.
_FAULTY = """
import sys
sys.path[:0] = ["tests"]
import fuzz
fuzz.prepare()
import senet_kernels.reference as reference
if sys.argv[1] == "faulty":
    right = reference._apply_scale
    def wrong(p, u, gate, after, residual, alpha, beta):
        y = right(p, u, gate, after, residual, alpha, beta)
        return y * 1.01 if residual is not None and p.shape[1] > 4 else y
    reference._apply_scale = wrong
arguments = sys.argv[2:]
if arguments[:1] == ["--reproduce"]:
    sys.exit(fuzz.main(arguments))
log = fuzz.Log(fuzz.Path(arguments[0]))
fuzz.work("reference", 300, 7, log, enough=1)
"""


def _faulty(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _FAULTY, *arguments], cwd=fuzz.HERE.parent, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_a_planted_fault_is_found_and_reproduced(tmp_path: Path) -> None:
    done = _faulty("faulty", str(tmp_path / "log"))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads((tmp_path / "log").read_text())["found"]
    assert len(found) == 1, done.stdout + done.stderr
    call = RandomCall.from_json(found[0]["call"])
    # As small as it goes.
    assert call.spec.residual is not None
    assert call.spec.shape[1] <= 9
    assert call.spec.dtype == torch.float32
    # The command that is printed, one line: wrong with the fault, right without.
    (line,) = [part for part in done.stdout.splitlines() if "--reproduce" in part]
    arguments = shlex.split(line)
    assert arguments[:2] == ["python", "tests/fuzz.py"]
    again = _faulty("faulty", *arguments[2:])
    assert again.returncode == 1, again.stdout + again.stderr
    assert again.stdout.startswith("wrong: y: ")
    without = _faulty("sound", *arguments[2:])
    assert without.returncode == 0, without.stdout + without.stderr
    assert without.stdout == "right\n"


def test_a_process_that_dies_is_a_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last call is in the report, with the command."""
    line = RandomCall("reference").to_json()
    script = tmp_path / "dies.py"
    script.write_text(f"""
import json, os, sys
path = sys.argv[sys.argv.index("--log") + 1]
state = dict(cases=3, discarded=0, found=[], call={line!r})
open(path, "w").write(json.dumps(state))
os.abort()
""")
    monkeypatch.setattr(fuzz, "SCRIPT", script)
    state = fuzz.supervise("reference", 1.0, 0, tmp_path)
    assert state["cases"] == 3
    assert state["found"] == [{"call": line, "error": "the process ended with -6"}]
    corpus = tmp_path / "corpus" / "found.jsonl"
    for _ in range(2):
        fuzz.remember(state["found"], corpus)
    (kept,) = corpus.read_text().splitlines()  # once
    assert RandomCall.from_json(kept) == RandomCall("reference")


def test_workers_are_of_backends_there_are() -> None:
    there = {str(BackendCase(name, device)) for name, device in FEATURE_COLUMNS}
    assert {backend for backend, _ in fuzz.WORKERS.values()} == {
        *there, "simulated-cuda", "reference", "triton",
    }  # fmt: skip
