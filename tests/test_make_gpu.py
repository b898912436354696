"""``make gpu``'s runner: stages fail, hang and are skipped without harm to the others.

The runner needs no GPU; what its stages find out on one is not tested here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import gpu

PYTHON = sys.executable


def _stage(name: str, code: str, share: float = 0.5, **more: Any) -> gpu.Stage:
    return gpu.Stage(name, share, lambda seconds: gpu.Task([PYTHON, "-c", code]), **more)


def _is_gone(pid: int) -> bool:
    """Whether a process is dead or dying: a signal takes a moment to arrive."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], gpu.Runner]:
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    return lambda budget: gpu.Runner(tmp_path / "out", budget)


def _summary(runner: gpu.Runner) -> dict[str, Any]:
    return json.loads((runner.out / "summary.json").read_text())


def test_a_failure_does_not_stop_the_next(runner: Callable[[float], gpu.Runner]) -> None:
    def broken(seconds: float) -> gpu.Task:
        raise KeyError("prepared badly")

    def refused(seconds: float) -> gpu.Task:
        raise gpu.SkipStage("not in the mood")

    run = runner(60)
    assert not run.run([
        _stage("failing", "import sys; print('why'); sys.exit(3)"),
        gpu.Stage("absent", 0.5, lambda seconds: gpu.Task(["/no/such/program"])),
        gpu.Stage("broken", 0.5, broken),
        gpu.Stage("refused", 0.5, refused),
        _stage("suspicious", "print('1 fault')", finds_fault=lambda log: "1 fault" in log),
        _stage("fine", "print('42 of 42')", conclude=str.strip),
    ])  # fmt: skip
    lines = {s["stage"]: s for s in _summary(run)["stages"]}
    assert {name: s["status"] for name, s in lines.items()} == {
        "failing": "failed", "absent": "failed", "broken": "failed", "refused": "skipped",
        "suspicious": "failed", "fine": "ok",
    }  # fmt: skip
    assert (lines["failing"]["returncode"], lines["failing"]["detail"]) == (3, "why")
    assert "/no/such/program" in lines["absent"]["detail"]
    assert "prepared badly" in lines["broken"]["detail"]
    assert lines["refused"]["detail"] == "not in the mood"
    assert lines["fine"]["detail"] == "42 of 42"
    assert (run.out / "fine.log").read_text() == "42 of 42\n"
    text = (run.out / "summary.txt").read_text()
    assert all(name in text and s["status"] in text for name, s in lines.items())


def test_no_failure_is_success(runner: Callable[[float], gpu.Runner]) -> None:
    assert runner(60).run([_stage("fine", "")])


_STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def test_what_hangs_is_killed_with_its_children(runner: Callable[[float], gpu.Runner]) -> None:
    run = runner(10)
    begin = time.monotonic()
    assert not run.run([_stage("stubborn", _STUBBORN, share=0.2), _stage("next", "")])
    assert time.monotonic() - begin < 8
    first, second = _summary(run)["stages"]
    assert (first["status"], second["status"]) == ("timeout", "ok")
    assert "stopped at its limit of 2 s" in first["detail"]
    pids = [int(word) for word in (run.out / "stubborn.log").read_text().split()]
    assert len(pids) == 2
    assert all(map(_is_gone, pids))


def test_children_left_behind_are_killed(runner: Callable[[float], gpu.Runner]) -> None:
    code = "import subprocess as s, sys; print(s.Popen([sys.executable, '-c', '{}']).pid)"
    run = runner(30)
    assert run.run([_stage("careless", code.format("import time; time.sleep(600)"))])
    assert _is_gone(int((run.out / "careless.log").read_text()))


def test_interrupted_before_killed(runner: Callable[[float], gpu.Runner]) -> None:
    code = """
import sys, time
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit("half of it")
"""
    run = runner(60)
    # Long enough for Python to start on a busy machine.
    run.run([_stage("long", code, share=0.2, finds_fault=lambda log: True)])
    (stage,) = _summary(run)["stages"]
    assert stage["status"] == "timeout"
    assert stage["detail"].endswith("half of it")


def test_the_budget_is_for_all(runner: Callable[[float], gpu.Runner]) -> None:
    run = runner(3)
    begin = time.monotonic()
    assert not run.run([_stage(name, "import time; time.sleep(600)", 1.0) for name in "abc"])
    assert time.monotonic() - begin < 4.5
    stages = _summary(run)["stages"]
    assert {stage["status"] for stage in stages[:2]} <= {"timeout", "skipped"}
    assert stages[2]["status"] == "skipped"
    assert "no time left" in stages[2]["detail"]


def test_the_summary_is_true_at_any_moment(runner: Callable[[float], gpu.Runner]) -> None:
    run = runner(60)
    seen: list[list[str]] = []

    def look(seconds: float) -> gpu.Task:
        seen.append([s["status"] for s in _summary(run)["stages"]])
        return gpu.Task([PYTHON, "-c", f"print(open({str(run.out / 'summary.json')!r}).read())"])

    run.run([_stage("first", ""), gpu.Stage("second", 0.5, look)])
    assert seen == [["ok"]]
    during = json.loads((run.out / "second.log").read_text())
    assert [s["status"] for s in during["stages"]] == ["ok", "running"]


@pytest.mark.parametrize("argument", [(), ("--batch", "1")])
def test_stages_without_a_gpu(tmp_path: Path, argument: tuple[str, ...]) -> None:
    (tmp_path / "environment.json").write_text('{"device": "cpu", "torch": "2.11.0"}')
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, argument)}
    for name in stages.keys() - {"environment", "build"}:
        with pytest.raises(gpu.SkipStage, match=r"no CUDA device that torch 2\.11\.0 can use"):
            stages[name].prepare(60)
    assert "build_ext" in stages["build"].prepare(60).command[-1]


def test_stages_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"device": "A card", "torch": "2.11.0", "capability": "9.0"}
    (tmp_path / "environment.json").write_text(json.dumps(found))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, ("--batch", "1"))}
    assert stages["build"].prepare(60).environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "gpu and not slow" in stages["tests"].prepare(60).command
    assert stages["benchmark"].prepare(100).command[-2:] == ["--batch", "1"]
    # Without what they need.
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(gpu.SkipStage, match="compute-sanitizer is not on PATH"):
        stages["memcheck"].prepare(60)
    there = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda n: None if n == "hypothesis" else there(n))
    task = stages["suite"].prepare(60)
    assert "--ignore=tests/test_properties.py" in task.command
    assert "hypothesis is not installed" in task.note
    monkeypatch.setattr(gpu, "find_spec", lambda n: None if n == "pytest" else there(n))
    with pytest.raises(gpu.SkipStage, match="not installed: pytest"):
        stages["tests"].prepare(60)


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", False),
        ("========= ERROR SUMMARY: 10 errors\n", True),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", True),
        ("========= Error: Device not supported\n", True),
        ("", True),
    ],
)
def test_what_a_sanitizer_says(log: str, fault: bool) -> None:
    (stage,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == "memcheck")
    assert stage.finds_fault(log) == fault
    assert stage.conclude(log) == log.removeprefix("========= ").strip() * ("SUMMARY" in log)


def test_what_a_build_says() -> None:
    (stage,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == "build")
    record = {"isas": ["baseline", "avx2"], "cuda_reason": "nvcc not found"}
    log = "[1/5] c++\n" + json.dumps(record, indent=2) + "\n"
    assert stage.conclude(log) == "cpu: baseline avx2; cuda: not built: nvcc not found"
    assert stage.conclude("[1/5] c++\ninterrupted\n") == ""


def test_what_pytest_says() -> None:
    log = "test_gpu.py::test_x PASSED [100%]\n=== 3 failed, 1 passed, 2 skipped in 9.12s ===\n"
    (stage,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == "tests")
    assert stage.conclude(log) == "3 failed, 1 passed, 2 skipped in 9.12s"
    assert not stage.finds_fault(log)
    assert stage.finds_fault("=== 83 skipped, 1069 deselected in 3.82s ===\n")
    assert stage.finds_fault("")
