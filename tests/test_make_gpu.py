"""``make gpu``'s runner: stages fail, hang and are skipped without harm to the others.

The runner needs no GPU; what its stages find out on one is not tested here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import options, records, workloads
from tools import gpu, stage_runner
from tools.stage_runner import Runner, SkipStage, Stage, Task

PYTHON = sys.executable


def _stage(name: str, code: str, share: float = 0.5, **more: Any) -> Stage:
    return Stage(name, share, lambda seconds: Task([PYTHON, "-c", code]), **more)


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
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Runner]:
    monkeypatch.setattr(stage_runner, "LEAST", 0.5)
    monkeypatch.setattr(stage_runner, "RESERVE", 0.0)
    return lambda budget: Runner(tmp_path / "out", budget)


def _summary(runner: Runner) -> dict[str, Any]:
    return json.loads((runner.out / "summary.json").read_text())


def test_a_failure_does_not_stop_the_next(runner: Callable[[float], Runner]) -> None:
    def broken(seconds: float) -> Task:
        raise KeyError("prepared badly")

    def refused(seconds: float) -> Task:
        raise SkipStage("not in the mood")

    run = runner(60)
    assert not run.run([
        _stage("failing", "import sys; print('why'); sys.exit(3)"),
        Stage("absent", 0.5, lambda seconds: Task(["/no/such/program"])),
        Stage("broken", 0.5, broken),
        Stage("refused", 0.5, refused),
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


def test_no_failure_is_success(runner: Callable[[float], Runner]) -> None:
    assert runner(60).run([_stage("fine", "")])


_STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def test_what_hangs_is_killed_with_its_children(
    runner: Callable[[float], Runner],
) -> None:
    run = runner(10)
    begin = time.monotonic()
    assert not run.run([_stage("stubborn", _STUBBORN, share=0.2), _stage("next", "", share=0.8)])
    assert time.monotonic() - begin < 8
    first, second = _summary(run)["stages"]
    assert (first["status"], second["status"]) == ("timeout", "ok")
    assert "stopped at its limit of 2 s" in first["detail"]
    pids = [int(word) for word in (run.out / "stubborn.log").read_text().split()]
    assert len(pids) == 2
    assert all(map(_is_gone, pids))


def test_children_left_behind_are_killed(runner: Callable[[float], Runner]) -> None:
    code = "import subprocess as s, sys; print(s.Popen([sys.executable, '-c', '{}']).pid)"
    run = runner(30)
    assert run.run([_stage("careless", code.format("import time; time.sleep(600)"))])
    assert _is_gone(int((run.out / "careless.log").read_text()))


def test_interrupted_before_killed(runner: Callable[[float], Runner]) -> None:
    code = """
import sys, time
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit("half of it")
"""
    run = runner(12)  # long enough for Python to start on a busy machine
    run.run([_stage("long", code, finds_fault=lambda log: True)])
    (stage,) = _summary(run)["stages"]
    assert stage["status"] == "timeout"
    assert stage["detail"].endswith("half of it")


def test_the_budget_is_for_all(runner: Callable[[float], Runner]) -> None:
    run = runner(3)
    begin = time.monotonic()
    assert not run.run([_stage(name, "import time; time.sleep(600)", 1.0) for name in "abc"])
    assert time.monotonic() - begin < 4.5
    stages = _summary(run)["stages"]
    assert {stage["status"] for stage in stages[:2]} <= {"timeout", "skipped"}
    assert stages[2]["status"] == "skipped"
    assert "no time left" in stages[2]["detail"]


def test_a_few_stages_share_the_whole_budget(runner: Callable[[float], Runner]) -> None:
    run = runner(80)
    run.run([_stage("known", "", share=0.5)])
    again = Runner(run.out, 80, earlier=stage_runner.take_up(run.out, fresh=False))
    stages = [
        _stage("known", "", share=0.5),
        _stage("a", "", share=0.1),
        _stage("b", "", share=0.3),
    ]
    again.run([*stages, _stage("report", "", share=0.5, reserved=20.0)])
    limits = {s["stage"]: s["limit_s"] for s in _summary(again)["stages"]}
    assert limits["a"] == pytest.approx(60 / 4, abs=2)
    assert limits["b"] == pytest.approx(60, abs=4)  # what a left over, too


def test_the_summary_is_true_at_any_moment(runner: Callable[[float], Runner]) -> None:
    run = runner(60)
    seen: list[list[str]] = []

    def look(seconds: float) -> Task:
        seen.append([s["status"] for s in _summary(run)["stages"]])
        return Task([PYTHON, "-c", f"print(open({str(run.out / 'summary.json')!r}).read())"])

    run.run([_stage("first", ""), Stage("second", 0.5, look)])
    assert seen == [["ok"]]
    during = json.loads((run.out / "second.log").read_text())
    assert [s["status"] for s in during["stages"]] == ["ok", "running"]


@pytest.mark.parametrize("argument", [(), ("--batch", "1")])
def test_stages_without_a_gpu(tmp_path: Path, argument: tuple[str, ...]) -> None:
    (tmp_path / "environment.json").write_text('{"device": "cpu", "torch": "2.11.0"}')
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, argument)}
    for name in stages.keys() - {"environment", "build", "targets", "report"}:
        with pytest.raises(SkipStage, match=r"no CUDA device that torch 2\.11\.0 can use"):
            stages[name].prepare(60)
    for name in ("targets", "report"):
        with pytest.raises(SkipStage, match="no record"):
            stages[name].prepare(60)
    assert "build_ext" in stages["build"].prepare(60).command[-1]


def _values(command: list[str], option: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == option]


def test_stages_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"device": "A card", "torch": "2.11.0", "capability": "9.0"}
    (tmp_path / "environment.json").write_text(json.dumps(found))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, ("--batch", "1"))}
    assert stages["build"].prepare(60).environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "gpu and not slow" in stages["gpu-tests"].prepare(60).command
    layers = stages["layers"].prepare(100).command
    assert layers[-2:] == ["--batch", "1"]
    assert "--network" not in layers  # another selection replaces the usual one
    assert _values(layers, "--mode") == ["forward", "backward", "forward+backward"]
    for words in (("--mode", "forward"), ("--mode=forward",)):
        (named,) = (s for s in gpu.stages(tmp_path, words) if s.name == "layers")
        command = named.prepare(100).command
        assert command[-len(words) :] == [*words]
        assert sum(word.startswith("--mode") for word in command) == 1
    usual = stages["types"].prepare(100).command
    assert _values(usual, "--dtype") == ["fp16", "fp32"]
    for stage in ("layers", "types", "batch-1", "neighbours", "host"):
        assert f"{tmp_path}/{stage}.json" in stages[stage].prepare(100).command
    assert float(layers[layers.index("--budget") + 1]) <= 0.8 * 100
    assert "interpret" not in str(stages["kernels-triton"].prepare(60).environment).lower()
    monkeypatch.setattr(gpu, "_why_no_cuda_kernels", lambda: None)
    assert stages["kernels-native"].prepare(60).command[-2:] == ["native", "cuda"]
    # Without what they need.
    monkeypatch.setattr(gpu, "_why_no_cuda_kernels", lambda: "nvcc not found")
    for name in ("kernels-native", "memcheck-native"):
        with pytest.raises(SkipStage, match="has no CUDA kernels: nvcc not found"):
            stages[name].prepare(60)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SkipStage, match="compute-sanitizer is not on PATH"):
        stages["memcheck-triton"].prepare(60)
    there = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda n: None if n == "hypothesis" else there(n))
    task = stages["suite"].prepare(60)
    assert "--ignore=tests/test_properties.py" in task.command
    assert "hypothesis is not installed" in task.note
    monkeypatch.setattr(gpu, "find_spec", lambda n: None if n == "pytest" else there(n))
    with pytest.raises(SkipStage, match="not installed: pytest"):
        stages["gpu-tests"].prepare(60)


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
    (stage,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == "memcheck-native")
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
    (stage,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == "gpu-tests")
    assert stage.conclude(log) == "3 failed, 1 passed, 2 skipped in 9.12s"
    assert not stage.finds_fault(log)
    assert stage.finds_fault("=== 83 skipped, 1069 deselected in 3.82s ===\n")
    assert stage.finds_fault("")


def test_groups() -> None:
    known = gpu.stages(Path(os.devnull))
    assert not {stage.name for stage in known} & {*gpu.GROUPS}  # --only has one meaning
    ends = ["targets", "report"]
    for group in gpu.GROUPS:
        names = [stage.name for stage in gpu.picked(known, [group])]
        assert names[:2] == ["environment", "build"]
        assert names[-2:] == ends
        assert len(names) > 4, group
    assert {
        stage.group for stage in known if stage.name not in ("environment", "build", *ends)
    } == {*gpu.GROUPS}
    names = [stage.name for stage in gpu.picked(known, ["layers"], dry=True)]
    assert names == ["environment", "layers", *ends]
    names = [stage.name for stage in gpu.picked(known, ["gpu-tests"], dry=True)]
    assert names == ["environment", "gpu-tests", *ends]


@pytest.mark.parametrize("stage", sorted(gpu.LAYER_RECORDS))
def test_options_of_the_layers(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark knows them; every layer of every network is among the cases."""
    monkeypatch.setattr(gpu, "no_gpu", lambda out: None)
    (found,) = (s for s in gpu.stages(Path(os.devnull)) if s.name == stage)
    words = found.prepare(100).command[4:]
    words[words.index("cuda")] = "cpu"
    parsed = options.parse("layers", words)
    assert isinstance(parsed, options.LayerOptions)
    layers = {layer for network in parsed.networks for layer, _ in network.layers}
    every = workloads.load_networks(neighbours=stage == "neighbours").values()
    assert layers == {layer for network in every for layer, _ in network.layers}
    assert parsed.modes == ["forward", "backward", "forward+backward"]
    assert parsed.compile_last
    assert not parsed.small


def test_unknown_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out"), "--only", "dreams"])
    assert "unknown dreams; known: tests, sanitizers, figures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- going on from an earlier run ------------------------------------------------------------------


def test_what_was_ok_is_kept(runner: Callable[[float], Runner], tmp_path: Path) -> None:
    stages = [_stage("fine", "print(1)"), _stage("broken", "import sys; sys.exit(2)")]
    first = runner(60)
    assert not first.run(stages)
    found = stage_runner.take_up(first.out, fresh=False)
    assert found["stages"][0]["status"] == "ok"
    (first.out / "fine.log").unlink()
    again = Runner(first.out, 60, earlier=found)
    assert again.run([stages[0], _stage("broken", "print('mended')")])
    fine, broken = _summary(again)["stages"]
    assert (fine["earlier"], fine["detail"]) == (True, "1")
    assert (broken["earlier"], broken["detail"]) == (False, "mended")
    assert not (first.out / "fine.log").exists()  # it did not run
    assert "(earlier) 1" in (first.out / "summary.txt").read_text()


def test_what_is_partial_goes_on(runner: Callable[[float], Runner]) -> None:
    first = runner(60)
    log = "12 results in 9 s, 0 s of them torch.compile; 3 cases not measured: the time was up"
    (layers,) = (s for s in gpu.stages(first.out) if s.name == "layers")
    assert layers.is_partial(log)
    assert not layers.is_partial(log.partition(";")[0])
    assert layers.conclude(f"{log}\nwritten: layers.json\n") == log
    again = _stage("layers", f"print({log!r})", is_partial=layers.is_partial)
    assert first.run([again])
    run = Runner(first.out, 60, earlier=stage_runner.take_up(first.out, fresh=False))
    assert run.run([again])
    assert not _summary(run)["stages"][0]["earlier"]


def test_a_stage_left_out_keeps_what_is_known(
    runner: Callable[[float], Runner],
) -> None:
    first = runner(60)
    first.run([_stage("a", ""), _stage("b", "")])
    again = Runner(first.out, 60, earlier=stage_runner.take_up(first.out, False))
    again.run([_stage("c", "")])
    assert [s["stage"] for s in _summary(again)["stages"]] == ["c", "a", "b"]


@pytest.mark.parametrize("why", ["fresh", "other sources"])
def test_a_new_start(
    runner: Callable[[float], Runner], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    first = runner(60)
    first.run([_stage("fine", "")])
    (first.out / "tests.passed").write_text("tests/test_x.py::test_y\n")
    (first.out / "layers.json").write_text("{}")
    if why == "other sources":
        monkeypatch.setattr(stage_runner, "fingerprint", lambda: "0")
    assert stage_runner.take_up(first.out, why == "fresh") == {}
    assert not (first.out / "tests.passed").exists()
    assert not (first.out / "layers.json").exists()
    assert (first.out / "layers.before.json").exists()


def test_another_device_begins_anew(runner: Callable[[float], Runner]) -> None:
    def environment(device: str) -> Stage:
        path = str(first.out / "environment.json")
        code = f"import json; json.dump({{'device': {device!r}}}, open({path!r}, 'w'))"
        return _stage("environment", code, always=True)

    first = runner(60)
    assert first.run([environment("A"), _stage("fine", "print(1)")])
    for device, kept in (("A", True), ("B", False)):
        found = stage_runner.take_up(first.out, fresh=False)
        again = Runner(first.out, 60, earlier=found)
        assert again.run([environment(device), _stage("fine", "print(1)")])
        assert [s["earlier"] for s in _summary(again)["stages"]] == [False, kept]


def test_the_last_stage_has_time(runner: Callable[[float], Runner]) -> None:
    run = runner(4)
    last = _stage("report", "print('here')", always=True, reserved=3.0)
    run.run([_stage("greedy", "import time; time.sleep(600)", 1.0), last])
    greedy, report = _summary(run)["stages"]
    assert greedy["limit_s"] <= 1.0
    assert (report["status"], report["detail"]) == ("ok", "here")


def test_passed_tests_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_one(i):\n"
        "    assert i < 2 or pathlib.Path('mended').exists()\n"
    )
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.resume_tests"]
    # Without what pytest-xdist tells its workers, of which this may be one.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_XDIST")}
    environment |= {
        "PYTHONPATH": str(gpu.ROOT), "SENET_KERNELS_PASSED": str(tmp_path / "some.passed"),
    }  # fmt: skip

    def run() -> str:
        done = subprocess.run([*command, "test_some.py"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        return done.stdout

    assert "1 failed, 2 passed" in run()
    (tmp_path / "mended").touch()
    assert "1 passed, 2 deselected" in run()
    assert "3 passed" in run()  # nothing is left: all once more, rather than none


# -- the dry run -----------------------------------------------------------------------------------


_FAKE_SANITIZER = """#!/bin/sh
while [ "$1" != "--target-processes" ]; do shift; done
shift 2
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
_FAKE_NCU = """#!/bin/sh
while [ "$1" != "application-only" ]; do shift; done
shift
"$@" || exit
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","k","dram__bytes_read.sum","byte","1,024"'
echo '"0","k","dram__bytes_write.sum","byte","512"'
"""


@pytest.fixture
def fake_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU machine has, in name: they run the command and say that all is well."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("compute-sanitizer", _FAKE_SANITIZER), ("ncu", _FAKE_NCU)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _dry_run(out: Path, budget: int, *stages: str) -> dict[str, dict[str, Any]]:
    words = ["--out", str(out), "--budget", str(budget), "--device", "cpu"]
    for name in stages:
        words += ["--only", name]
    command = [PYTHON, "-m", "tools.gpu", *words]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run" in (out / "summary.txt").read_text()
    lines = json.loads((out / "summary.json").read_text())["stages"]
    return {line["stage"]: line for line in lines}


def test_dry_run_of_a_few_stages(tmp_path: Path, fake_tools: None) -> None:
    out = tmp_path / "out"
    stages = _dry_run(out, 240, "sweep", "host")
    assert list(stages) == ["environment", "host", "sweep", "targets", "report"]
    assert {line["status"] for line in stages.values()} == {"ok"}
    assert stages["targets"]["detail"].startswith("0 of 27 targets met")
    assert "a CPU has no CUDA graph" in (out / "targets.md").read_text()
    assert records.read(out / "sweep.json")["status"] == "complete"
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "sweep.csv").exists()


@pytest.mark.slow
def test_dry_run_of_every_stage(tmp_path: Path, fake_tools: None) -> None:
    """But the build: it would change the library under the other tests."""
    names = [stage.name for stage in gpu.stages(tmp_path) if stage.name != "build"]
    out = tmp_path / "out"
    stages = _dry_run(out, 2400, *names)
    assert list(stages) == names
    expected = dict.fromkeys(names, "ok") | {"slow": "skipped"}  # those are for a GPU
    assert {name: line["status"] for name, line in stages.items()} == expected
    for kind in (*gpu.LAYER_RECORDS, "models", "sweep"):
        assert records.read(out / f"{kind}.json")["results"]
    assert records.read(out / "host.json")["small_call"]
    layers = records.read(out / "layers.json")
    measured = [p.get("dram_bytes") for e in layers["results"] for p in e["providers"].values()]
    assert 1536 in measured
    again = _dry_run(out, 2400, *names)
    assert {n for n in names if not again[n]["earlier"]} == {
        "environment", "slow", "targets", "report",
    }  # fmt: skip
