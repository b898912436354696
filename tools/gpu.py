"""``make gpu``: what this repository can find out on a machine with a GPU, within a budget.

``python tools/gpu.py --out FOLDER --budget SECONDS [-- ARGUMENTS OF THE BENCHMARKS]``

Stages run one after another, each in processes of its own with a time limit and a log in the
folder; one that fails or hangs does not stop the next. What a stage needs and does not find makes
it *skipped*, with the reason. ``summary.json`` and ``summary.txt`` are renewed after every stage,
so that they are true whenever the run is cut off.

Needs nothing but Python here, torch in the stages, no network, and installs nothing. Exit code 0:
no stage failed (some may have been skipped); 1: one failed or ran out of time; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "senet_kernels.gpu/1"

# A stage past its limit is interrupted, so that it can report what it has, and killed after this.
GRACE = 15.0
# Less than this is not worth starting a stage for.
LEAST = 3.0
# Kept back for the summary.
RESERVE = 2.0

OK, FAILED, TIMEOUT, SKIPPED, RUNNING = "ok", "failed", "timeout", "skipped", "running"


class SkipStage(Exception):
    """A stage cannot run here; the message says why."""


@dataclass
class Task:
    """What a stage runs."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""  # what was left out


@dataclass
class Stage:
    """One stage. ``share`` is the part of the whole budget it may take."""

    name: str
    share: float
    prepare: Callable[[float], Task]  # from the seconds it has; raises SkipStage
    conclude: Callable[[str], str] = lambda log: ""  # one line out of its log
    # Whether the log tells of a failure that the exit code does not.
    finds_fault: Callable[[str], bool] = lambda log: False


@dataclass
class Result:
    """A line of the summary."""

    stage: str
    status: str
    seconds: float = 0.0
    limit_s: float | None = None
    returncode: int | None = None
    detail: str = ""
    log: str | None = None


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all gone
        os.killpg(process.pid, number)


def execute(command: Sequence[str], log: Path, limit: float, environment: dict[str, str]) -> int:
    """Run a command in a process group of its own; returns its exit code.

    Raises:
        TimeoutError: it took longer than ``limit`` seconds. Nothing of its group is left.
        OSError: it could not be started.
    """
    grace = min(GRACE, limit / 4)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit - grace)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            raise TimeoutError from None
        finally:
            _signal_group(process, signal.SIGKILL)  # children that outlived it, too
            # Else it is stuck in the driver, and there is nothing more to be done about it.
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)


class Runner:
    """Runs stages within ``budget`` seconds and keeps the summary in ``out`` true."""

    def __init__(
        self, out: Path, budget: float, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.out = out
        self.budget = budget
        self.results: list[Result] = []
        self._say = say
        self._begin = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run all stages; whether none failed."""
        try:
            for stage in stages:
                self._run(stage)
                last = self.results[-1]
                self._say(f"    {last.status}, {last.seconds:.0f} s. {last.detail}")
        finally:
            self._write()
        return not any(result.status in (FAILED, TIMEOUT) for result in self.results)

    def _run(self, stage: Stage) -> None:
        self._say(f"==> {stage.name}")
        result = Result(stage.name, RUNNING)
        self.results.append(result)
        limit = min(stage.share * self.budget, self.budget - self.elapsed - RESERVE)
        start = time.monotonic()
        try:
            if limit < LEAST:
                raise SkipStage(f"no time left of {self.budget:.0f} s")
            task = stage.prepare(limit)
            log = self.out / f"{stage.name}.log"
            result.log, result.limit_s = log.name, round(limit, 1)
            self._write()
            self._execute(stage, task, log, limit, result)
        except SkipStage as reason:
            result.status, result.detail = SKIPPED, str(reason)
        except KeyboardInterrupt:
            result.status, result.detail = FAILED, "interrupted"
            raise
        except Exception as error:  # of the stage's own code: the other stages must go on
            result.status, result.detail = FAILED, f"{type(error).__name__}: {error}"
        finally:
            result.seconds = round(time.monotonic() - start, 1)
            self._write()

    def _execute(self, stage: Stage, task: Task, log: Path, limit: float, result: Result) -> None:
        try:
            result.returncode = execute(task.command, log, limit, task.environment)
            result.status = FAILED if result.returncode else OK
        except TimeoutError:
            result.status = TIMEOUT
        except OSError as error:
            result.status, result.detail = FAILED, f"could not be started: {error}"
            return
        text = log.read_text(errors="replace")
        if result.status == OK and stage.finds_fault(text):
            result.status = FAILED
        lines = [stage.conclude(text) or last_line(text), task.note]
        if result.status == TIMEOUT:
            lines.insert(0, f"stopped at its limit of {limit:.0f} s")
        result.detail = "; ".join(line for line in lines if line)
        if result.status != OK:
            self._say("\n".join(f"    | {line}" for line in text.splitlines()[-15:]))

    def _write(self) -> None:
        environment = read_environment(self.out)
        summary: dict[str, Any] = {
            "schema": SCHEMA,
            "commit": environment.get("commit"),
            "device": environment.get("device"),
            "budget_s": self.budget,
            "elapsed_s": round(self.elapsed, 1),
            "stages": [asdict(result) for result in self.results],
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (self.out / "summary.txt").write_text(self.text())

    def text(self) -> str:
        """The summary for a person."""
        environment = read_environment(self.out)
        missing = no_gpu(self.out)
        rows = [
            f"device: {environment.get('device', 'unknown')}"
            + (f" (nothing ran on a GPU: {missing})" if missing else ""),
            f"commit: {environment.get('commit') or 'unknown'}"
            + (" with uncommitted changes" if environment.get("uncommitted_changes") else ""),
            f"{self.elapsed:.0f} of {self.budget:.0f} s",
            "",
        ]
        width = max((len(result.stage) for result in self.results), default=0)
        rows += [
            f"{r.stage:{width}}  {r.status:7}  {r.seconds:6.1f} s  {r.detail}".rstrip()
            for r in self.results
        ]
        return "\n".join(rows) + "\n"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def read_environment(out: Path) -> dict[str, Any]:
    """What the first stage found; empty where it failed."""
    try:
        found: dict[str, Any] = json.loads((out / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def no_gpu(out: Path) -> str | None:
    """Why nothing can run on a GPU; None where there is one, or where that is not known."""
    environment = read_environment(out)
    if environment.get("device") != "cpu":
        return None
    return f"no CUDA device that torch {environment.get('torch')} can use"


# -- the stages of this repository -----------------------------------------------------------------


def _need(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SkipStage(f"not installed: {', '.join(missing)}")


def _tool(name: str) -> str:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(name) or (shutil.which(f"{home}/bin/{name}") if home else None)
    if found is None:
        raise SkipStage(f"{name} is not on PATH")
    return found


def _build_conclusion(log: str) -> str:
    """What was built and what was not, from the record at the end of the log."""
    found = re.search(r"^\{$.*^\}$", log, re.MULTILINE | re.DOTALL)
    if not found:
        return ""
    record = json.loads(found[0])
    cpu = " ".join(record["isas"]) if "isas" in record else f"not built: {record['reason']}"
    cuda = record.get("cuda") or f"not built: {record['cuda_reason']}"
    return f"cpu: {cpu}; cuda: {cuda}"


def _pytest_conclusion(log: str) -> str:
    found = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected|ran)\b.*?) =+$", log,
                       re.MULTILINE)  # fmt: skip
    return found[-1] if found else ""


def _no_test_passed(log: str) -> bool:
    """Whether all were skipped, say, because Triton is not installed."""
    return not re.search(r"\b\d+ passed\b", _pytest_conclusion(log))


def _sanitizer_conclusion(log: str) -> str:
    found = re.findall(r"^=+ (.*SUMMARY:.*)$", log, re.MULTILINE)
    return found[-1] if found else ""


def _sanitizer_fault(log: str) -> bool:
    """Whether it found something, or did not come to a conclusion (a device it does not support,
    say, which leaves the exit code 0)."""
    return not re.search(r"SUMMARY: 0 (errors|hazards)", log)


def stages(out: Path, benchmark_arguments: Sequence[str] = ()) -> list[Stage]:
    """The stages in their order. Correctness comes before speed, which takes what time is left."""
    python = sys.executable
    inherited = os.environ.get("PYTHONPATH")
    path = {"PYTHONPATH": str(ROOT) + (os.pathsep + inherited if inherited else "")}

    def environment(seconds: float) -> Task:
        return Task([python, "tools/gpu_environment.py", str(out / "environment.json")], path)

    def build(seconds: float) -> Task:
        _need("torch", "setuptools")
        variables = dict(path)
        capability = read_environment(out).get("capability")
        if capability and "TORCH_CUDA_ARCH_LIST" not in os.environ:
            variables["TORCH_CUDA_ARCH_LIST"] = capability
        # In place: what pip would install stays out of somebody's environment.
        command = f"{shlex.quote(python)} setup.py build_ext --inplace"
        return Task(["sh", "-c", f"{command} && cat senet_kernels/_build.json"], variables)

    def on_gpu(*modules: str) -> None:
        if reason := no_gpu(out):
            raise SkipStage(reason)
        _need("torch", *modules)

    def pytest(*arguments: str) -> Task:
        on_gpu("pytest")
        command = [python, "-m", "pytest", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
        command += ["-v", "--durations=10", *arguments]
        note = []
        if find_spec("xdist"):
            # Compiling is what takes the time, and that is the processors' work.
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
        if not find_spec("hypothesis"):
            command.append("--ignore=tests/test_properties.py")
            note.append("hypothesis is not installed: test_properties.py left out")
        return Task(command, path, "; ".join(note))

    def tests(seconds: float) -> Task:
        return pytest("tests/test_gpu.py")

    def suite(seconds: float) -> Task:
        return pytest("tests", "--ignore=tests/test_gpu.py")

    def kernels(seconds: float) -> Task:
        on_gpu("triton")
        return Task([python, "tools/gpu_kernels.py"], path)

    def sanitizer(tool: str) -> Callable[[float], Task]:
        def prepare(seconds: float) -> Task:
            on_gpu("triton")
            command = [_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"]
            command += ["--target-processes", "application-only"]
            # Every tensor an allocation of its own: or reading past one's end reads its neighbour.
            variables = {**path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            return Task([*command, python, "tools/gpu_kernels.py"], variables)

        return prepare

    def benchmark(seconds: float) -> Task:
        on_gpu("numpy")
        # It overruns its budget by up to a sixth; interrupted, it reports what it has.
        aim = max(5, int(0.8 * (seconds - GRACE)))
        command = [python, "-m", "benchmarks", "--device", "cuda", "--budget", str(aim)]
        missing = [name for name in ("rich", "tqdm", "matplotlib") if find_spec(name) is None]
        note = f"not installed: {', '.join(missing)}: plainer output" if missing else ""
        return Task([*command, "--out", str(out), *benchmark_arguments], path, note)

    checks = {"conclude": _sanitizer_conclusion, "finds_fault": _sanitizer_fault}
    tested = {"conclude": _pytest_conclusion, "finds_fault": _no_test_passed}
    return [
        Stage("environment", 0.1, environment),
        Stage("build", 0.3, build, _build_conclusion),
        # The quickest answer of all; what it compiles the sanitizer finds compiled.
        Stage("kernels", 0.1, kernels),
        Stage("tests", 0.25, tests, **tested),
        *(Stage(tool, 0.1, sanitizer(tool), **checks)
          for tool in ("memcheck", "racecheck", "synccheck")),
        Stage("suite", 0.2, suite, **tested),
        Stage("benchmark", 1.0, benchmark),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Build, test, check and time on this machine's GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for logs, records and the summary")
    add("--budget", type=float, default=540.0, help="seconds for everything (default: 540)")
    add("arguments", nargs="*", metavar="ARG", help="for the benchmarks, after --")
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"budget: expected more than 0 seconds, got {args.budget}")
    out = args.out.resolve()
    # SIGINT may be ignored in what a script started in the background; the stages inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    (out / "environment.json").unlink(missing_ok=True)  # of an earlier run
    runner = Runner(out, args.budget, lambda text: print(text, flush=True))
    try:
        right = runner.run(stages(out, args.arguments))
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"\n{runner.text()}\nwritten: {args.out}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
