"""``make gpu``: stages fail, hang, crash and are skipped without harm to the others, and what was
found comes home in one file, whenever the run is killed.

No GPU is needed; what the stages find out on one is not tested here.
"""

from __future__ import annotations

import json
import os
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
from tools import gpu, gpu_environment, gpu_kernels, gpu_report, gpu_verdicts, stage_runner
from tools.stage_runner import Runner, Stage, Task

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


def _prepare(stage: Stage, seconds: float) -> Task:
    """Commands are Python; needs are reasons."""
    return Task([PYTHON, "-c", stage.command], {}, "; ".join(stage.needs))


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
    def prepare(stage: Stage, seconds: float) -> Task:
        if stage.name == "broken":
            raise KeyError("prepared badly")
        command = ["/no/such/program"] if stage.name == "absent" else _prepare(stage, 0).command
        return Task(command, {}, "; ".join(stage.needs))

    ran = run(60, prepare=prepare)
    lines = ran(
        Stage("failing", "import sys; print('why'); sys.exit(3)", 5),
        Stage("absent", "", 5),
        Stage("broken", "", 5),
        Stage("refused", "", 5, ("not in the mood",)),
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

    def prepare(stage: Stage, seconds: float) -> Task:
        made.append(stage.name)
        return Task([PYTHON, "-c", stage.command], {})

    lines = run(30, prepare=prepare)(
        Stage("build", "import time; time.sleep(1); raise SystemExit('no compiler')", 90,
              beside="library"),
        Stage("with it", "", 5, ("library",)),
        Stage("without", "", 5),
    )  # fmt: skip
    assert made == ["build", "without", "with it"]
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
    build = Stage("build", "", 1, beside="library")  # what it made is not brought home
    assert [run(30)(build)["build"]["earlier"] for _ in range(2)] == [False, False]
    assert "(earlier) 1" in brought_home.home(again.path)["summary.txt"]


@pytest.mark.parametrize("why", ["fresh", "other sources"])
def test_a_new_start(run: Callable[..., _Ran], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    ran = run(30)
    (ran.out / "layers.json").write_text("{}")
    ran(Stage("fine", "", 1))
    if why == "other sources":
        monkeypatch.setattr(stage_runner, "fingerprint", lambda: "others")
    again = run(30)
    lines = again(Stage("fine", "", 1), fresh=why == "fresh")
    assert not lines["fine"]["earlier"]
    home = brought_home.home(again.path)
    assert "layers.json" not in home
    assert "layers.before.json" in home


def test_sources_torch_and_device_are_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_runner.fingerprint()
    assert stage_runner.fingerprint() == before
    monkeypatch.setattr(stage_runner, "_gpus", lambda: "GPU 0: another card")
    assert stage_runner.fingerprint() != before


# -- the table -------------------------------------------------------------------------------------


def _table(out: Path, *, dry: bool = False, **environment: Any) -> gpu.Table:
    known = {"device": "A card", "torch": "2.11.0", "capability": "9.0",
             "library": {"in place": ""}, **environment}  # fmt: skip
    (out / "environment.json").write_text(json.dumps(known))
    return gpu.Table(out, dry=dry)


def _stage(name: str) -> Stage:
    return next(stage for stage in gpu.STAGES if stage.name == name)


def test_the_first_call_takes_455_seconds() -> None:
    """Verdicts, then what captures and streams do, layers, plans, counters, memcheck."""
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    ends, end = {}, 0.0
    for stage in gpu.STAGES:
        end += 0 if stage.beside else stage.seconds
        ends[stage.name] = end
    wanted = {"verdicts-native": 40, "situations-native": 70, "layers": 210, "plans": 270,
              "counters": 350, "memcheck-triton": 400, "gpu-tests": 455}  # fmt: skip
    assert {name: ends[name] for name in wanted} == wanted
    assert stage_runner.WHOLE == 455
    late = names[names.index("gpu-tests") :]
    assert {"compiled", "networks", "price-of-se"} < set(late)


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
    assert reason("verdicts-triton") == "not installed: triton"
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


def test_what_crashed_is_left_out_of_later_stages(tmp_path: Path) -> None:
    """A layer then runs by other plans; an exchange that hung is not among these."""
    case = "256x56x56-r16-relu-sigmoid bf16 b256 contiguous"
    verdicts = {
        "a layer": {"outcome": "hang", "layer": case},
        "5x136x7x7 exchange=cluster,blocks=2,resident=0": {"outcome": "crash", "layer": ""},
        "5x136x7x7 exchange=grid,blocks=2": {"outcome": "error", "layer": ""},
    }
    (tmp_path / "verdicts-native.json").write_text(json.dumps(verdicts))
    table = _table(tmp_path)
    layers = table.prepare(_stage("layers"), 100).command
    assert _values(layers, "--leave-out") == [f"{case}/native"]
    assert {"native-block", "native-grid8"} < set(_values(layers, "--provider"))
    tried = [*_values(table.prepare(_stage("plans"), 100).command, "--provider"),
             *_values(layers, "--provider")]  # fmt: skip
    assert not any("cluster" in name for name in tried)
    verdicts["a layer"]["outcome"] = "error"  # wrong figures are figures
    (tmp_path / "verdicts-native.json").write_text(json.dumps(verdicts))
    layers = table.prepare(_stage("layers"), 100).command
    assert "--leave-out" not in layers
    assert "native-block" not in layers


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
    monkeypatch.setenv(gpu.PREBUILT, str(tmp_path))
    found = gpu_environment.library(cuda=False)
    assert f"the compiled library {broken.name} does not load" in found["carried along"]
    table = _table(tmp_path, library=found, device="cpu", dry=True)
    if not found["in place"]:  # then that one is taken
        assert table.environment()[gpu.PREBUILT] == ""
        assert not table.why_not("native")


def test_the_library_that_is_carried_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from senet_kernels.backends import native

    (tmp_path / "_native.abi3.so").write_bytes(b"")
    (tmp_path / "_build.json").write_text('{"cuda": "9.0a"}')
    for given in (tmp_path, tmp_path / "_native.abi3.so"):
        monkeypatch.setenv(gpu.PREBUILT, str(given))
        assert native.kernel_files() == [tmp_path / "_native.abi3.so"]
        assert native.build_record() == {"cuda": "9.0a"}
    monkeypatch.setenv(gpu.PREBUILT, str(tmp_path / "other.so"))
    assert native.kernel_files() == []


# -- verdicts --------------------------------------------------------------------------------------

_FAULTY = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
def say(**message): print("senet_kernels.trust: " + json.dumps(message), flush=True)
for line in sys.stdin:
    number = json.loads(line)["case"]
    say(started=True)
    say(compiled="a kernel")
    if number == 1: say(outcome="error", text="wrong: y[3]"); continue
    if number == 2: say(outcome="launch error", text="CUDA error"); continue
    if number == 3: os.kill(os.getpid(), 11)
    if number == 4: time.sleep(600)
    if number == 5: os._exit(7)
    say(outcome="ok", text=str(os.getpid()))
"""


def test_each_case_has_its_verdict_whatever_it_does(tmp_path: Path) -> None:
    """Processes that failed are replaced; a second call goes on with what was not run."""
    case = gpu_kernels.TRITON_CASES[0]
    wanted = {n: case._replace(policy=f"case {n}") for n in range(8)}
    path = tmp_path / "verdicts.json"
    names = [case.name for case in wanted.values()]
    path.write_text(json.dumps({names[7]: {"outcome": "ok", "layer": "", "text": "earlier"}}))
    pool = gpu_verdicts.Pool(_FAULTY.format(root=str(gpu.ROOT)), path, wanted, watch=1.0)
    pool.run(2)
    found = json.loads(path.read_text())
    assert [found[name]["outcome"] for name in names] == [
        "ok", "error", "launch error", "crash", "hang", "crash", "ok", "ok",
    ]  # fmt: skip
    assert found[names[3]]["text"] == "the process died by SIGSEGV"
    assert found[names[4]]["text"] == "no answer within 1 s"
    assert found[names[5]]["text"] == "the process ended with status 7"
    assert found[names[7]]["text"] == "earlier"
    lines = gpu_report.lines(tmp_path)
    assert lines == []  # of another name
    path.rename(tmp_path / "verdicts-triton.json")
    lines = gpu_report.lines(tmp_path)
    assert lines[0] == "verdicts-triton: 3 ok, 1 error, 1 launch error, 2 crash, 1 hang"
    assert f"  crash: {names[3]}: the process died by SIGSEGV" in lines


@brought_home.needs_card
def test_planted_faults_are_told_by_name(tmp_path: Path) -> None:
    """On the pretended card: two of the cases, each with a fault."""
    path = tmp_path / "verdicts.json"
    planted = {"1x3x70x33": "wrong", "2x20x70x33": "dies"}
    faults = "; ".join(f"{fault} on {shape}" for shape, fault in planted.items())
    command = [PYTHON, "-m", "tools.gpu_verdicts", "triton", "verdicts", str(path), "--device",
               "cpu"]  # fmt: skip
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
                names = [case.name for case in gpu_kernels.cases(backend, group, dry)]
                assert len(set(names)) == len(names) > 5
    layers = [c.layer for c in gpu_kernels.cases("native", "verdicts", False) if c.layer]
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
