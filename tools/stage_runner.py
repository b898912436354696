"""Stages that run one after another within a budget, and go on where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "senet_kernels.gpu/2"
RECORDS = ("layers", "host", "batch-1", "types", "neighbours", "models", "sweep")

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
    """One stage. ``share`` is the part of the whole budget it may take; or more, so that those
    after it still have as much in proportion."""

    name: str
    share: float
    prepare: Callable[[float], Task]  # from the seconds it has; raises SkipStage
    conclude: Callable[[str], str] = lambda log: ""  # one line out of its log
    # Whether the log tells of a failure that the exit code does not.
    finds_fault: Callable[[str], bool] = lambda log: False
    # Whether the log tells that it was right but not all there is: the next run goes on with it.
    is_partial: Callable[[str], bool] = lambda log: False
    # Seconds no earlier stage may take from this one.
    reserved: float = 0.0
    # Whether it must run each time, whatever came of it before.
    always: bool = False
    group: str = ""  # that it can be asked for by


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
    partial: bool = False  # there is more to find out
    earlier: bool = False  # kept from a run before


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
        self,
        out: Path,
        budget: float,
        say: Callable[[str], None] = lambda text: None,
        earlier: dict[str, Any] | None = None,
        note: str = "",
    ) -> None:
        self.out = out
        self.budget = budget
        self.note = note
        self.fingerprint = fingerprint()
        self.results: list[Result] = []
        self._machine = (earlier or {}).get("machine")
        self._earlier = {
            line["stage"]: Result(**{**line, "earlier": True})
            for line in (earlier or {}).get("stages", [])
            if line["status"] == OK and not line["partial"]
        }
        self._say = say
        self._begin = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run all stages; whether none failed."""
        try:
            for index, stage in enumerate(stages):
                if self._is_kept(stage):
                    self.results.append(self._earlier[stage.name])
                    self._say(f"==> {stage.name}\n    ok in an earlier run")
                    continue
                self._run(stage, [s for s in stages[index + 1 :] if not self._is_kept(s)])
                if self._earlier and machine(read_environment(self.out)) != self._machine:
                    self._earlier = {}
                    put_aside(self.out)
                last = self.results[-1]
                self._say(f"    {last.status}, {last.seconds:.0f} s. {last.detail}")
        finally:
            self._write()
        return not any(result.status in (FAILED, TIMEOUT) for result in self.results)

    def _is_kept(self, stage: Stage) -> bool:
        return stage.name in self._earlier and not stage.always

    def _run(self, stage: Stage, later: Sequence[Stage]) -> None:
        self._say(f"==> {stage.name}")
        result = Result(stage.name, RUNNING)
        self.results.append(result)
        reserved = sum(s.reserved for s in later)
        left = self.budget - self.elapsed - RESERVE - reserved
        # A few stages alone share the whole budget.
        part = stage.share / (stage.share + sum(s.share for s in later if not s.reserved))
        limit = min(max(stage.share * self.budget, part * left), left)
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
        result.partial = stage.is_partial(text)
        lines = [stage.conclude(text) or last_line(text), task.note]
        if result.status == TIMEOUT:
            lines.insert(0, f"stopped at its limit of {limit:.0f} s")
        result.detail = "; ".join(line for line in lines if line)
        if result.status != OK:
            self._say("\n".join(f"    | {line}" for line in text.splitlines()[-15:]))

    def _kept(self) -> list[Result]:
        """What an earlier run found and this one has not come to, or was not asked for."""
        seen = {result.stage for result in self.results}
        return [result for name, result in self._earlier.items() if name not in seen]

    def _write(self) -> None:
        environment = read_environment(self.out)
        summary: dict[str, Any] = {
            "schema": SCHEMA,
            "commit": environment.get("commit"),
            "device": environment.get("device"),
            "note": self.note,
            "fingerprint": self.fingerprint,
            "machine": machine(environment),
            "budget_s": self.budget,
            "elapsed_s": round(self.elapsed, 1),
            "stages": [asdict(result) for result in [*self.results, *self._kept()]],
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
            *([self.note] if self.note else []),
            "",
        ]
        width = max((len(result.stage) for result in self.results), default=0)
        rows += [
            f"{r.stage:{width}}  {r.status:7}  {r.seconds:6.1f} s  "
            f"{'(earlier) ' if r.earlier else ''}{r.detail}".rstrip()
            for r in self.results
        ]
        return "\n".join(rows) + "\n"


def fingerprint() -> str:
    """Of all sources a stage depends on: with others, what was found before is no more true."""
    digest = hashlib.sha256()
    folders = ("senet_kernels", "csrc", "benchmarks", "tests", "tools")
    kinds = {".py", ".h", ".cuh", ".cpp", ".cu", ".json", ".j2"}
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    for path in sorted([*paths, ROOT / "setup.py", ROOT / "pyproject.toml"]):
        if "results" not in path.parts and path.name != "_build.json":
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def take_up(out: Path, fresh: bool) -> dict[str, Any]:
    """The summary of an earlier run to go on from; empty, and its traces put aside, where that run
    was of other sources or another device, or is not wanted."""
    try:
        found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    except (OSError, ValueError):
        found = {}
    if not fresh and found.get("schema") == SCHEMA and found.get("fingerprint") == fingerprint():
        return found
    put_aside(out)
    return {}


def put_aside(out: Path) -> None:
    """What stages go on from is not gone on from."""
    for path in out.glob("*.passed"):
        path.unlink()
    for name in RECORDS:
        path = out / f"{name}.json"
        if path.exists():
            os.replace(path, out / f"{name}.before.json")


def machine(environment: dict[str, Any]) -> list[Any]:
    return [environment.get(key) for key in ("device", "torch", "python", "cpu")]


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
