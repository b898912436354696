"""``make gpu``: stages fail, hang, crash and are skipped without harm to the others, and what was
found comes home in one file, whenever the run is killed.

No GPU is needed; what the stages find out on one is not tested here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import brought_home
import pretended
from benchmarks import options, watched
from tools import gpu, gpu_cases, gpu_environment, gpu_report, gpu_verdicts, stage_runner
from tools.gpu_cases import Job
from tools.stage_runner import Result, Runner, Stage, Task

PYTHON = sys.executable


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


# -- the runner ------------------------------------------------------------------------------------


def _prepare(stage: Stage, seconds: float, results: Sequence[Result] = ()) -> Task:
    """Commands are Python."""
    return Task([PYTHON, "-c", stage.command], {}, "; ".join(need(None) for need in stage.needs))


def _not_in_the_mood(known: Any) -> str:
    return "not in the mood"


def _library(known: Any) -> str:
    return ""


class _Ran:
    """A run of stages, and what came home."""

    def __init__(self, folder: Path, budget: float, prepare: Any = _prepare, **more: Any) -> None:
        self.out, self.path = folder / "work", folder / "gpu.tgz"
        self.out.mkdir(exist_ok=True)
        self.runner = Runner(self.out, budget, prepare, home=self.path, **more)

    def __call__(self, *stages: Stage, fresh: bool = False) -> dict[str, dict[str, Any]]:
        self.runner.take_up(fresh)
        self.right = self.runner.run(stages)
        return brought_home.lines(self.path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Ran]:
    monkeypatch.setattr(stage_runner, "RESERVE", 0.0)
    monkeypatch.setattr(stage_runner, "LEAST", 0.3)
    monkeypatch.setattr(stage_runner, "fingerprint", lambda: "these sources")
    return lambda budget, **more: _Ran(tmp_path, budget, **more)


def test_a_failure_does_not_stop_the_next(run: Callable[..., _Ran]) -> None:
    def prepare(stage: Stage, seconds: float, results: Sequence[Result]) -> Task:
        if stage.name == "broken":
            raise KeyError("prepared badly")
        task = _prepare(stage, 0)
        return task._replace(command=["/no/such/program"]) if stage.name == "absent" else task

    ran = run(60, prepare=prepare)
    lines = ran(
        Stage("failing", "import sys; print('why'); sys.exit(3)", 5),
        Stage("absent", "", 5),
        Stage("broken", "", 5),
        Stage("refused", "", 5, (_not_in_the_mood,)),
        Stage("suspicious", "print('Device not supported')", 5, proof="SUMMARY: 0"),
        Stage("fine", "print('=== 42 passed ==='); print('more')", 5, proof=" passed"),
    )
    assert not ran.right
    assert {name: line["status"] for name, line in lines.items()} == {
        "failing": "failed", "absent": "failed", "broken": "failed", "refused": "skipped",
        "suspicious": "failed", "fine": "ok",
    }  # fmt: skip
    details = [line["detail"] for line in lines.values()]
    wanted = ("why", "/no/such/program", "prepared badly", "not in the mood",
              "no 'SUMMARY: 0' in its log; Device not supported", "42 passed")  # fmt: skip
    assert all(want in detail for want, detail in zip(wanted, details, strict=True)), details
    home = brought_home.home(ran.path)
    assert home["failing.log"] == "why\n"
    assert all(name in home["summary.txt"] for name in lines)


_STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def test_what_hangs_is_killed_with_its_children(run: Callable[..., _Ran]) -> None:
    begin = time.monotonic()
    ran = run(6)
    lines = ran(Stage("stubborn", _STUBBORN, 2), Stage("next", "print(1)", 4))
    assert time.monotonic() - begin < 5
    assert (lines["stubborn"]["status"], lines["next"]["status"]) == ("timeout", "ok")
    assert lines["stubborn"]["detail"].startswith("stopped at its limit of 2 s")
    pids = [int(word) for word in brought_home.home(ran.path)["stubborn.log"].split()]
    assert len(pids) == 2
    assert all(map(_is_gone, pids))


_PARENT = """
import sys
from pathlib import Path
from tools.stage_runner import Runner, Stage, Task
out = Path(sys.argv[1])
prepare = lambda stage, seconds, results: Task([sys.executable, "-c", stage.command], {})
Runner(out, 60, prepare, home=out / "gpu.tgz").run([Stage("stubborn", sys.argv[2], 50)])
"""


def test_nothing_survives_the_runner(tmp_path: Path) -> None:
    """Killed, it can end nothing itself: a stage's children go too, and what ignores signals."""
    command = [PYTHON, "-c", _PARENT, str(tmp_path), _STUBBORN]
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as runner:
        log = tmp_path / "stubborn.log"
        pids: list[int] = []
        while len(pids) < 2:
            time.sleep(0.1)
            pids = [int(word) for word in log.read_text().split()] if log.exists() else []
        begin = time.monotonic()
        runner.kill()
    assert all(map(_is_gone, pids))
    assert time.monotonic() - begin < 2


def test_a_renewal_that_fails_is_told_by_the_next(
    run: Callable[..., _Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_runner, "RENEWED", 0.1)
    ran, dump, wrong = run(30), json.dumps, [True]

    def sometimes(*args: Any, **options: Any) -> str:
        if ran.runner.elapsed > 0.5 and wrong:
            raise RuntimeError(f"changed during iteration {wrong.pop()}")
        return dump(*args, **options)

    monkeypatch.setattr(stage_runner.json, "dumps", sometimes)
    ran(Stage("slow", "import time; time.sleep(1.5)", 5))
    text = brought_home.home(ran.path)["summary.txt"]
    assert "an earlier renewal failed: RuntimeError: changed during iteration True" in text


def test_the_budget_is_for_all(run: Callable[..., _Ran]) -> None:
    """Windows shrink with it; who comes too late is told so."""
    begin = time.monotonic()
    lines = run(2)(*(Stage(name, "import time; time.sleep(600)", 150) for name in "abcd"))
    assert time.monotonic() - begin < 4
    assert lines["a"]["limit_s"] == pytest.approx(2 * 150 / stage_runner.WHOLE, abs=0.1)
    assert [line["status"] for line in lines.values()] == [*["timeout"] * 3, "skipped"]
    assert "no time left" in lines["d"]["detail"]


def test_a_few_stages_share_the_whole_budget(run: Callable[..., _Ran]) -> None:
    lines = run(80)(*(Stage(name, "", 10) for name in "ab"), Stage("c", "", 20))
    limits = [line["limit_s"] for line in lines.values()]
    assert limits == pytest.approx([20, 40, 80], abs=3)  # what is left over, too


def test_beside_until_it_is_needed(run: Callable[..., _Ran]) -> None:
    """What is built beside delays only who needs it, and its failure is told."""
    made: list[str] = []

    def prepare(stage: Stage, seconds: float, results: Sequence[Result]) -> Task:
        made.append(stage.name)
        return Task([PYTHON, "-c", stage.command], {})

    lines = run(30, prepare=prepare)(
        Stage("build", "import time; time.sleep(1); raise SystemExit('no compiler')", 90,
              beside=_library),
        Stage("with it", "", 5, (_library,)),
        Stage("without", "", 5),
        Stage("late", "", 5, late=True),  # which would delay what waits
    )  # fmt: skip
    assert made == ["build", "without", "with it", "late"]
    assert (lines["build"]["status"], lines["build"]["detail"]) == ("failed", "no compiler")
    assert lines["build"]["seconds"] >= 1


def test_a_second_call_goes_on(run: Callable[..., _Ran]) -> None:
    """With what is neither ok nor whole; what is not asked for is kept, what is unknown tried."""
    lacks = "print('3 results; 2 cases not measured: the time was up')"
    stages = [
        Stage("environment", "print('here')", 1, always=True), Stage("fine", "print(1)", 1),
        Stage("partial", lacks, 1), Stage("broken", "raise SystemExit(2)", 1),
    ]  # fmt: skip
    first = run(30)(*stages)
    assert first["partial"]["partial"]
    assert not first["fine"]["partial"]
    again = run(30)
    lines = again(*stages[:3], Stage("broken", "print('mended')", 1), Stage("new", "", 1))
    assert {name for name, line in lines.items() if line["earlier"]} == {"fine"}
    assert lines["broken"]["detail"] == "mended"
    assert "(earlier) 1" in brought_home.home(again.path)["summary.txt"]
    assert set(run(30)(stages[0])) == {"environment", "fine", "partial", "broken", "new"} - {
        "partial"
    }
    build = Stage("build", "", 1, beside=_library)  # what it made is not brought home
    assert [run(30)(build)["build"]["earlier"] for _ in range(2)] == [False, False]
    assert "(earlier) 1" in brought_home.home(again.path)["summary.txt"]


@pytest.mark.parametrize("why", ["fresh", "other sources"])
def test_a_new_start(run: Callable[..., _Ran], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    ran = run(30)
    (ran.out / "layers.json").write_text("{}")
    ran(Stage("fine", "", 1), Stage("older", "", 1))
    if why == "other sources":
        monkeypatch.setattr(stage_runner, "fingerprint", lambda: "others")
    said: list[str] = []
    again = run(30, say=said.append)
    lines = again(Stage("fine", "", 1), fresh=why == "fresh")
    assert not lines["fine"]["earlier"]
    home = brought_home.home(again.path)
    assert {"layers.before.json", "older.before.log", "fine.log"} <= set(home)
    assert not {"layers.json", "older.log"} & set(home)
    reason = {"fresh": ": --fresh", "other sources": ": sources, GPU, Python, torch"}[why]
    assert reason in said[0]
    assert said[0] in home["summary.txt"]
    run(30)(Stage("fine", "", 1))
    assert "begun anew" not in brought_home.home(again.path)["summary.txt"]


def test_sources_torch_and_device_are_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_runner.fingerprint()
    assert stage_runner.fingerprint() == before
    monkeypatch.setattr(stage_runner, "_gpus", lambda: "GPU 0: another card")
    assert stage_runner.fingerprint() != before


def test_another_library_makes_a_new_start(
    run: Callable[..., _Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is built, where there was none, does not."""
    carried = tmp_path / "_native.abi3.so"
    carried.write_bytes(b"one")
    monkeypatch.setenv(stage_runner.PREBUILT, str(carried))
    before = stage_runner.library()
    carried.write_bytes(b"another")
    assert stage_runner.library() != before
    libraries = iter(["", "one", "one", "another"])
    monkeypatch.setattr(stage_runner, "library", lambda: next(libraries))
    assert [run(30)(Stage("fine", "", 1))["fine"]["earlier"] for _ in range(4)] == [
        False, True, True, False,
    ]  # fmt: skip


# -- the table -------------------------------------------------------------------------------------


def _table(out: Path, *, dry: bool = False, **environment: Any) -> gpu.Table:
    known = {"device": "A card", "torch": "2.11.0", "capability": "9.0",
             "library": {"in place": ""}, **environment}  # fmt: skip
    (out / "environment.json").write_text(json.dumps(known))
    return gpu.Table(out, dry=dry)


def _stage(name: str) -> Stage:
    return next(stage for stage in gpu.STAGES if stage.name == name)


def test_the_first_call_takes_455_seconds() -> None:
    """Verdicts, then what captures and streams do, layers, plans, counters, memcheck; the time of
    what is seldom needed is not granted where it is skipped."""
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    ends, end = {}, 0.0
    for stage in gpu.STAGES:
        seldom = stage.name in ("verdicts-native", "layers-otherwise")
        end += 0 if stage.beside or seldom else stage.seconds
        ends[stage.name] = end
    wanted = {"verdicts": 40, "situations": 70, "layers": 210, "plans": 270,
              "counters": 350, "memcheck-triton": 400, "gpu-tests": 455}  # fmt: skip
    assert {name: ends[name] for name in wanted} == wanted
    assert stage_runner.WHOLE == 455
    late = {stage.name for stage in gpu.STAGES if stage.late}
    assert late == set(names[names.index("gpu-tests") + 1 :])
    assert {"verdicts-rest", "compiled", "networks", "price-of-se"} < late


def test_stages_without_a_gpu(tmp_path: Path) -> None:
    table = _table(tmp_path, device="cpu")
    for stage in gpu.STAGES[1:]:
        reason = table.prepare(stage, 60).why_not
        assert "no CUDA device that torch 2.11.0 can use (DEVICE=cpu makes a dry run)" in reason
    assert not table.prepare(gpu.STAGES[0], 60).why_not


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(tmp_path, library={"carried along": "does not load: bad ELF", "in place": "old"})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    (tmp_path / "layers.json").write_text("{}")

    def reason(name: str) -> str:
        return table.prepare(_stage(name), 60).why_not

    said = "no compiled library: carried along: does not load: bad ELF; in place: old"
    assert reason("verdicts-native") == reason("memcheck-native") == said
    assert reason("memcheck-triton") == "not installed: triton"
    assert reason("verdicts") == f"not installed: triton; {said}"
    assert reason("gpu-tests") == "not installed: pytest"
    assert reason("counters") == "ncu is not on PATH"
    assert reason("build") == reason("layers") == ""
    table = _table(tmp_path)
    assert reason("build") == "one loads"
    assert reason("memcheck-native") == "compute-sanitizer is not on PATH"
    (tmp_path / "layers.json").unlink()
    assert reason("counters") == "ncu is not on PATH"


def test_a_build_without_nvcc_says_so_and_changes_nothing(tmp_path: Path) -> None:
    library = sorted((gpu.ROOT / "senet_kernels").glob("_native*.so"))
    task = _table(tmp_path, library={"in place": "not there"}).prepare(_stage("build"), 60)
    assert task.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    done = subprocess.run(
        task.command, cwd=gpu.ROOT, env={**os.environ, **task.environment, "CUDA_HOME": "/none"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    assert "the cuda kernels cannot be built: nvcc not found" in done.stderr
    assert sorted((gpu.ROOT / "senet_kernels").glob("_native*.so")) == library


def _values(command: Sequence[str], option: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == option]


@pytest.mark.parametrize("name", ["layers", "plans", "host", "layers-native", "compiled",
                                  "all-layers"])  # fmt: skip
@pytest.mark.parametrize("dry", [False, True])
def test_options_of_the_layers(tmp_path: Path, name: str, dry: bool) -> None:
    """The benchmarks know them."""
    (tmp_path / "layers.json").write_text("{}")
    command = _table(tmp_path, dry=dry).prepare(_stage(name), 100).command
    at = command.index("--")
    assert 0 < float(_values(command[:at], "--budget")[0]) <= 85
    words = command[at + 1 :]
    assert (words[0] == "layers") == dry
    words = words[1:] if dry else words
    words[words.index("--device") + 1] = "cpu"
    parsed = options.parse("layers", words)
    assert isinstance(parsed, options.LayerOptions)
    assert not parsed.profile
    shapes = {layer.shape for network in parsed.networks for layer, _ in network.layers}
    if name == "layers" and not dry:
        assert set(parsed.providers) == {"native", "triton", "eager-linear"}
        assert parsed.modes == ["forward", "backward"]
        assert parsed.device_time
        assert len(shapes) == 14
    if name == "plans" and not dry:
        assert len(shapes) == 6
        assert {"native", "native-stages2", "native-reread", "native-grid8"} < set(parsed.providers)


def _cases_left_out(table: gpu.Table, name: str) -> set[str]:
    return set(_values(table.prepare(_stage(name), 100).command, "--leave-out"))


def test_what_crashed_is_left_out_of_later_stages(tmp_path: Path) -> None:
    """A layer that hung by an exchange between blocks then runs by plans without that, alone; the
    plans of a policy that crashed run on no layer."""
    case, other = (f"{shape}-r16-relu-sigmoid bf16 b256 contiguous"
                   for shape in ("256x56x56", "96x56x56"))  # fmt: skip
    policy = "exchange=cluster,blocks=2,resident=0"
    verdicts: dict[str, dict[str, str]] = {
        "a layer": {"outcome": "hang", "layer": case, "policy": "",
                    "plan": "8 blocks per image, exchange through global memory, two passes"},
        "another": {"outcome": "ok", "layer": other, "policy": "", "plan": "one block per image"},
        "a policy": {"outcome": "launch error", "layer": "", "policy": policy},
        "a wrong one": {"outcome": "error", "layer": "", "policy": "exchange=none"},
    }  # fmt: skip
    table = _table(tmp_path)

    def write() -> None:
        (tmp_path / "verdicts-native.json").write_text(json.dumps(verdicts))

    write()
    for name in ("layers", "plans", "layers-otherwise", "compiled"):
        cases = _cases_left_out(table, name)
        assert f"{case}/native" in cases
        assert {f"{case}/native-grid8", f"{case}/native-reread", f"{case}/native-stages2"} < cases
        assert {f"{case}/native-cluster4", f"{other}/native-cluster4"} < cases
        assert not cases & {f"{case}/native-block", f"{other}/native", f"{other}/native-block",
                            f"{other}/native-grid8"}  # fmt: skip
    otherwise = table.prepare(_stage("layers-otherwise"), 100).command
    assert _values(otherwise, "--layer") == ["256x56x56"]
    assert "native-block" in _values(otherwise, "--provider")
    # Which providers there are decides whether a record is gone on with.
    assert "native-block" not in _values(table.prepare(_stage("layers"), 100).command, "--provider")
    tests = table.prepare(_stage("gpu-tests"), 100).environment[stage_runner.LEFT_OUT_TESTS]
    assert tests.split(";") == [f"native-cuda-{case}", policy]
    memcheck = table.prepare(_stage("verdicts"), 100)._replace(command=[])
    assert memcheck.environment["SENET_KERNELS_REQUIRE_NATIVE"] == "0"
    verdicts["a layer"]["outcome"] = "error"  # wrong figures are figures
    verdicts["a policy"]["outcome"] = "not run"
    write()
    assert not _cases_left_out(table, "layers")
    assert "no layer crashed" in table.prepare(_stage("layers-otherwise"), 100).why_not


def test_tests_of_what_crashed_are_not_run(tmp_path: Path) -> None:
    """By the whole of a parameter."""
    (tmp_path / "test_them.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('policy', ['a=1', 'a=1,b=2', 'a=2'])\n"
        "@pytest.mark.parametrize('backend', ['native-cuda'])\n"
        "def test_it(backend, policy): pass\n"
    )
    done = subprocess.run(
        [PYTHON, "-m", "pytest", "-p", "tools.resume_tests", "-p", "no:cacheprovider", "-v",
         str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(gpu.ROOT), stage_runner.LEFT_OUT_TESTS: "a=3;a=1"},
    )  # fmt: skip
    assert "2 passed, 1 deselected" in done.stdout, done.stdout
    assert "[native-cuda-a=1,b=2]" in done.stdout


def test_what_may_have_ended_the_tests_comes_last(tmp_path: Path) -> None:
    """The others pass before, and are not run again."""
    (tmp_path / "test_them.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_it(i):\n"
        "    if i == 1: os._exit(9)\n"
        "    assert i != 3\n"
    )
    command = [PYTHON, "-m", "pytest", "-p", "tools.resume_tests", "-p", "no:cacheprovider", "-v",
               str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT),
                   stage_runner.PASSED: str(tmp_path / "them.passed")}  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)  # this one's
    ran = []
    for _ in range(3):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                              env=environment)  # fmt: skip
        assert done.returncode == 9
        ran.append(re.findall(r"test_it\[(\d)\]", done.stdout))
    assert ran[0] == ["0", "1"]
    assert [list(dict.fromkeys(of)) for of in ran[1:]] == [["2", "3", "1"], ["3", "1"]]


@pytest.mark.parametrize(("code", "status"), [(0, ""), (1, "no compiled library: in place: old")])
def test_a_library_built_meanwhile_is_taken(
    run: Callable[..., _Ran], code: int, status: str
) -> None:
    """Who waits for it runs as soon as it is there; and by its failure is skipped."""
    reasons: dict[str, str] = {}

    def prepare(stage: Stage, seconds: float, results: Sequence[Result]) -> Task:
        task = table.prepare(stage, seconds, results)
        reasons[stage.name] = task.why_not
        return task._replace(command=[PYTHON, "-c", stage.command])

    ran = run(30, prepare=prepare)
    table = _table(ran.out, library={"in place": "old"})
    build = _stage("build")._replace(
        command=f"import time; time.sleep(0.5); raise SystemExit({code})", seconds=20
    )
    lines = ran(build, *(Stage(name, "pass", 2, (gpu.native,)) for name in ("one", "other")))
    assert reasons == {"build": "", "one": status, "other": status}
    assert [line["status"] for line in lines.values()][1:] == 2 * ["skipped" if status else "ok"]


def test_backends_that_can_be_tried(tmp_path: Path) -> None:
    """In one stage; the CUDA kernels' own later, where their library was built meanwhile."""
    table = _table(tmp_path, library={"in place": "old"})
    assert _values(table.prepare(_stage("verdicts"), 30).command, "--backend") == ["triton"]
    built = [Result("build", "ok")]
    assert not table.prepare(_stage("verdicts-native"), 30, built).why_not
    both = table.prepare(_stage("situations"), 30, built)
    assert _values(both.command, "--backend") == ["triton", "native"]
    (tmp_path / "verdicts-native.json").write_text('{"a": {"outcome": "ok", "layer": ""}}')
    assert "has them" in table.prepare(_stage("verdicts-native"), 30, built).why_not
    assert not table.prepare(_stage("verdicts-rest"), 30, built).why_not
    for backend in gpu_cases.BACKENDS:
        for group in gpu_cases.GROUPS:
            path = tmp_path / f"{group}-{backend}.json"
            path.write_text('{"a": {"outcome": "ok", "layer": ""}}')
    assert "on each case" in table.prepare(_stage("verdicts-rest"), 30, built).why_not


@pytest.mark.parametrize(
    ("log", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", "ok"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        ("========= ERROR SUMMARY: 10 errors", "failed"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "failed"),
        ("========= Error: Device not supported", "failed"),
        ("", "failed"),
    ],
)
def test_what_a_sanitizer_says(run: Callable[..., _Ran], log: str, status: str) -> None:
    stage = _stage("memcheck-native")._replace(command=f"print({log!r})", needs=())
    line = run(20)(stage)["memcheck-native"]
    assert line["status"] == status
    assert log.strip("= ") in line["detail"]


# -- a library that is carried along ---------------------------------------------------------------


@pytest.mark.slow
def test_a_library_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_native.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv(stage_runner.PREBUILT, str(tmp_path))
    found = gpu_environment.library(cuda=False)
    assert f"the compiled library {broken.name} does not load" in found["carried along"]
    table = _table(tmp_path, library=found, device="cpu", dry=True)
    if not found["in place"]:  # then that one is taken
        assert table.environment()[stage_runner.PREBUILT] == ""
        assert not gpu.native(table)


def test_a_library_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_environment, "_LOADING", 0.2)
    monkeypatch.setattr(gpu_environment, "_ASK", "import time; time.sleep(60)")
    monkeypatch.setenv(stage_runner.PREBUILT, "somewhere")
    said = "a process that loads it was not ready within 0.2 s"
    assert gpu_environment.library(cuda=False) == {"carried along": said, "in place": said}


def test_a_python_that_is_given_is_used_as_it_is(tmp_path: Path) -> None:
    """Without a look whether it has torch, nor pip."""
    command = ["make", "-n", "gpu", "PYTHON=/no/such/python", f"OUT={tmp_path}"]
    # Of the make that runs the tests.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.startswith(f"/no/such/python -m tools.gpu --out '{tmp_path}' ")
    assert len(done.stdout.splitlines()) == 1


def test_the_library_that_is_carried_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends import native

    assert native.PREBUILT == stage_runner.PREBUILT
    (tmp_path / "_native.abi3.so").write_bytes(b"")
    (tmp_path / "_build.json").write_text('{"cuda": "9.0a"}')
    for given in (tmp_path, tmp_path / "_native.abi3.so"):
        monkeypatch.setenv(stage_runner.PREBUILT, str(given))
        assert native.kernel_files() == [tmp_path / "_native.abi3.so"]
        assert native.build_record() == {"cuda": "9.0a"}
    monkeypatch.setenv(stage_runner.PREBUILT, str(tmp_path / "other.so"))
    assert native.kernel_files() == []


# -- verdicts --------------------------------------------------------------------------------------

_FAULTY = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from pathlib import Path
def say(**message): print("senet_kernels.trust: " + json.dumps(message), flush=True)
say(ready=True)
for line in sys.stdin:
    number = json.loads(line)["job"][2]
    say(started=True, plan="cluster of 2")
    say(step="run")
    if number == 1: say(outcome="error", text="wrong: y[3]"); continue
    if number == 2: say(outcome="launch error", text="CUDA error"); continue
    if number == 3: os.kill(os.getpid(), 11)
    if number == 4: time.sleep(600)
    if number == 5: print("terminate called", file=sys.stderr); os._exit(7)
    if number == 8:
        for i in range(6): time.sleep(0.4); say(step="compile")
    say(outcome="ok", text=str(os.getpid()))
"""


def _pool(out: Path, main: str, numbers: Sequence[int], **options: Any) -> gpu_verdicts.Pool:
    case = gpu_cases.TRITON_CASES[0]
    wanted = [Job("triton", "verdicts", n, case._replace(policy=f"case {n}")) for n in numbers]
    return gpu_verdicts.Pool(main, out, wanted, **options)


def _found(out: Path) -> dict[str, dict[str, str]]:
    """The verdicts, by the last word of their case."""
    found = json.loads((out / "verdicts-triton.json").read_text())
    return {name.rpartition("case ")[2]: verdict for name, verdict in found.items()}


def test_each_case_has_its_verdict_whatever_it_does(tmp_path: Path) -> None:
    """Processes that failed are replaced, but not for wrong numbers; the watch is for silence; a
    second call goes on with what was not run."""
    pool = _pool(tmp_path, _FAULTY, range(9), watch=1.0)
    pool.run(2)
    found = _found(tmp_path)
    assert [verdict["outcome"] for verdict in found.values()] == [
        "ok", "error", "launch error", "crash", "hang", "crash", "ok", "ok", "ok",
    ]  # fmt: skip
    assert found["3"]["text"] == "the process died by SIGSEGV"
    assert found["4"]["text"] == "no word for 1 s after run"
    assert found["4"]["plan"] == "cluster of 2"
    assert found["5"]["text"] == "the process ended with status 7: terminate called"
    lines = gpu_report.lines(tmp_path)
    assert lines[0] == "verdicts-triton: 4 ok, 1 error, 1 launch error, 2 crash, 1 hang"
    assert any("crash: 3x24x7x16" in line and "died by SIGSEGV" in line for line in lines)
    _pool(tmp_path, "raise SystemExit('not needed')", range(9)).run(2)
    assert _found(tmp_path) == found
    again = _pool(tmp_path, _FAULTY, range(9), kept=lambda word: word in gpu_verdicts.KEPT)
    assert again.todo.qsize() == 5


def test_an_error_costs_no_process(tmp_path: Path) -> None:
    _pool(tmp_path, _FAULTY, (0, 1, 6, 2, 7)).run(1)
    pids = [_found(tmp_path)[name]["text"] for name in "067"]
    assert pids[0] == pids[1] != pids[2]


@pytest.mark.parametrize(
    ("main", "said"),
    [
        ("import no_such", "ended with status 1: ModuleNotFoundError: No module named 'no_such'"),
        ("import time; time.sleep(60)", "did not start within 0.5 s"),
    ],
)  # fmt: skip
def test_a_process_that_does_not_start_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: str, said: str
) -> None:
    """After two of them no other is started, and the reason is told."""
    monkeypatch.setattr(gpu_verdicts, "START", 0.5 if "sleep" in main else 30.0)
    started = []
    worker = gpu_verdicts.Worker

    def start(*args: Any, **options: Any) -> Any:
        started.append(args)
        return worker(*args, **options)

    monkeypatch.setattr(gpu_verdicts, "Worker", start)
    pool = _pool(tmp_path, main, range(5))
    pool.run(1)
    assert len(started) == 2
    for verdict in _found(tmp_path).values():
        assert verdict["outcome"] == "not run"
        assert said in verdict["text"]


def test_what_is_under_way_at_the_end_is_not_run(tmp_path: Path) -> None:
    """It may have been compiling."""
    program = tmp_path / "pool.py"
    program.write_text(
        "import signal; from pathlib import Path; import test_make_gpu\n"
        # A shell has its jobs in the background ignore it, and Python leaves that as it is.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"test_make_gpu._pool(Path({str(tmp_path)!r}), test_make_gpu._FAULTY, (0, 4)).run(2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{gpu.ROOT}:{gpu.ROOT / 'tests'}"}
    with subprocess.Popen([PYTHON, str(program)], env=environment, stderr=subprocess.DEVNULL,
                          start_new_session=True) as process:  # fmt: skip
        for _ in range(600):
            time.sleep(0.1)
            if (tmp_path / "verdicts-triton.json").exists() and _found(tmp_path)["0"]["text"]:
                break
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    found = _found(tmp_path)
    assert found["0"]["outcome"] == "ok"
    assert found["4"]["outcome"] == "not run"
    assert found["4"]["text"].startswith("under way for ")
    assert found["4"]["text"].endswith(" s when the time was up, after run")


def test_verdicts_end_in_their_time(tmp_path: Path) -> None:
    """That is no failure: a later stage goes on."""
    begin = time.monotonic()
    _pool(tmp_path, _FAULTY, (4, 0, 6)).run(1, seconds=1.0)
    assert time.monotonic() - begin < 4
    found = _found(tmp_path)
    assert {verdict["outcome"] for verdict in found.values()} == {"not run"}
    assert "when the time was up" in found["4"]["text"]


_HOLDER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(8)"], {session})
print("senet_kernels.trust: {{}}", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("apart", [True, False])
def test_stopping_does_not_wait_for_who_holds_the_pipe(apart: bool) -> None:
    """A grandchild in a session of its own has inherited it."""
    from senet_kernels.trust.worker import Worker

    process = Worker(_HOLDER.format(session="start_new_session=True"), apart=apart)
    assert process.receive(30) == {}
    begin = time.monotonic()
    process.stop()
    assert time.monotonic() - begin < 4
    assert process.process.returncode == -signal.SIGKILL


def test_what_a_launch_error_is() -> None:
    from tools.gpu_kernels import _LAUNCH

    for text in ("failed: AcceleratorError: CUDA error: unspecified launch failure",
                 "failed: OutOfResources: out of resource: shared memory",
                 "failed: RuntimeError: Triton Error [CUDA]: invalid argument",
                 "failed: RuntimeError: an illegal memory access was encountered"):  # fmt: skip
        assert _LAUNCH.search(text), text
    for text in ("failed: KeyError: 'launcher'", "wrong: y[0]: relaunch the launch"):
        assert not _LAUNCH.search(text), text


def test_what_the_cases_of_a_card_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is no verdict; what a device lacks is a reason for a policy that is forced."""
    from senet_kernels.trust import proof
    from tools import gpu_kernels

    case = gpu_cases.NATIVE_CASES[0]
    assert not case.policy

    def raises(error: Exception) -> Callable[..., Any]:
        def prove(*args: Any, **options: Any) -> Any:
            raise error

        return prove

    def of(error: Exception, policy: str = "") -> str:
        monkeypatch.setattr(gpu_kernels, "kind_of", raises(error))
        return gpu_kernels.outcome("native", "cpu", case._replace(policy=policy))["outcome"]  # type: ignore[no-any-return]

    monkeypatch.setenv(gpu_cases.PLAN, "")
    lacks = RuntimeError(f"{gpu_cases.NOT_HERE[0]} clusters")
    assert of(lacks, "exchange=cluster,blocks=2") == "not here"
    assert of(lacks) == "error"
    assert of(proof.NoVerdictError("out of memory")) == "no verdict"


@brought_home.needs_card
def test_planted_faults_are_told_by_name(tmp_path: Path) -> None:
    """On the pretended card: two of the cases, each with a fault."""
    path = tmp_path / "verdicts-triton.json"
    planted = {"1x3x70x33": "wrong", "2x20x70x33": "dies"}
    faults = "; ".join(f"{fault} on {shape}" for shape, fault in planted.items())
    command = [PYTHON, "-m", "tools.gpu_verdicts", str(tmp_path), "--backend", "triton", "--group",
               "verdicts", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, pretended.FAULT: faults, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([*command, "--case", "x70x33"], cwd=gpu.ROOT, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {
        name.partition(" ")[0]: v["outcome"] for name, v in json.loads(path.read_text()).items()
    }
    assert found == {"1x3x70x33": "error", "2x20x70x33": "crash"}


def test_cases_have_names_of_their_own() -> None:
    for backend in ("triton", "native"):
        for dry in (False, True):
            for group in ("verdicts", "situations"):
                names = [case.name for case in gpu_cases.cases(backend, group, dry)]
                assert len(set(names)) == len(names) > 5
    layers = [c.layer for c in gpu_cases.cases("native", "verdicts", False) if c.layer]
    assert len(layers) == 28
    assert "256x56x56-r16-relu-sigmoid bf16 b256 contiguous" in layers


# -- layers that crash -----------------------------------------------------------------------------

_LAYERS = """
import json, os, sys, time
words = sys.argv[1:]
value = lambda option: words[words.index(option) + 1]
left_out = {b for a, b in zip(words, words[1:]) if a == "--leave-out"}
record, results = value("--record"), []
if os.path.exists(record):
    results = json.load(open(record))["results"]
def save(status):
    json.dump({"status": status, "results": results, "not_measured": []}, open(record, "w"))
for case in "abcd":
    for provider in ("x", "y"):
        name = f"{case}/{provider}"
        if name in left_out or name in results:
            continue
        open(value("--under-way"), "w").write(name)
        if name == "b/y": os.kill(os.getpid(), 11)
        if name == "c/x": time.sleep(600)
        if name == "d/x": raise RuntimeError("CUDA error")
        results.append(name)
        save("running")
save("complete")
"""


def test_layers_that_crash_or_hang_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program, record = tmp_path / "layers.py", tmp_path / "layers.json"
    program.write_text(_LAYERS)
    words = [str(record), "--stall", "1", "--program", str(program), "--", "--dtype", "bf16"]
    assert watched.main(words) == 1
    assert json.loads(record.read_text())["results"] == ["a/x", "a/y", "b/x", "c/y", "d/y"]
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last == ("5 results; left out b/y: died by SIGSEGV; left out c/x: nothing new for 1 s; "
                    "left out d/x: ended with status 1")  # fmt: skip


def test_a_provider_that_dies_in_its_first_call_takes_no_other_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The probe of whether a backend runs at all is under watch, too."""
    program, record = tmp_path / "layers.py", tmp_path / "layers.json"
    program.write_text(_DIES_AT_ONCE)
    words = [str(record), "--program", str(program), "--", "layers", "--device", "cpu",
             "--no-profile", "--layer", "240x14x14", "--batch", "2", "--rounds", "3", "--mode",
             "forward", "--provider", "native", "--provider", "reference", "--provider",
             "eager-linear"]  # fmt: skip
    assert watched.main(words) == 1
    found = json.loads(record.read_text())
    assert found["unavailable"]["native"] == "left out: it crashed or hung in its first call"
    assert all(entry["providers"]["reference"]["status"] == "ok" for entry in found["results"])
    assert found["results"]
    assert "left out /native: died by SIGSEGV" in capfd.readouterr().out


_DIES_AT_ONCE = """
import os, sys
sys.path.insert(0, os.getcwd())
from benchmarks import providers
import senet_kernels
call = senet_kernels.squeeze_excite
def dying(*args, backend=None, **more):
    if backend == "native":
        os.kill(os.getpid(), 11)
    return call(*args, backend=backend, **more)
senet_kernels.squeeze_excite = dying
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_one_bad_record_takes_no_verdict_with_it(tmp_path: Path) -> None:
    good = {"1x3x70x33": {"outcome": "crash", "text": "the process died by SIGSEGV"}}
    (tmp_path / "verdicts-native.json").write_text(json.dumps(good))
    (tmp_path / "layers.json").write_text('{"results": [{}], "contenders": []}')
    found = gpu_report.lines(tmp_path)
    died = "  crash: 1x3x70x33: the process died by SIGSEGV"
    assert found[:2] == ["verdicts-native: 1 crash", died]
    assert found[2].startswith("layers: cannot be read: KeyError")


def test_a_process_that_ends_between_cases_is_none_of_the_next(tmp_path: Path) -> None:
    """The case is tried once more, in another process; the one that ends by itself is a crash."""
    path = tmp_path / "first"
    program = f"""
import os, pathlib
from senet_kernels.trust import worker
first = not pathlib.Path({str(path)!r}).exists()
pathlib.Path({str(path)!r}).touch()
worker.say(ready=True)
taken = []
def answer(message):
    if first and taken:
        os._exit(3)
    taken.append(message)
    worker.say(step="it")
    worker.say(outcome="ok", text="", plan="")
worker.main(answer)
"""
    pool = _pool(tmp_path, program, range(2), watch=5.0)
    pool.run(1, 60.0)
    assert {name: v["outcome"] for name, v in _found(tmp_path).items()} == {"0": "ok", "1": "ok"}
    assert pool._again
