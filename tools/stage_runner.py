"""Stages that run one after another within a budget, and go on where an earlier run stopped.

All that they find is in one file, which is renewed while they run.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import read_json

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "senet_kernels.gpu/3"
SUMMARY = ("summary.txt", "summary.json")

# A stage past its limit is interrupted, so that it can report what it has, and killed after this.
GRACE = 8.0
# A first import from a cold disk takes its time.
ALWAYS = 90.0
# Less than this is not worth starting a stage for.
LEAST = 2.0
# Kept back for the summary.
RESERVE = 2.0
# Between two renewals of the file.
RENEWED = 15.0
# What the stages that matter most take together: a shorter budget shortens each.
WHOLE = 455.0

OK, FAILED, TIMEOUT, SKIPPED, RUNNING = "ok", "failed", "timeout", "skipped", "running"
_PARTIAL = re.compile(r"time (is|was) up|\bnot run\b")


class Stage(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the stage, and of its log.
        command: where ``{out}`` is the folder for what it finds, ``{seconds}`` its time and
            ``{device}`` the device.
        seconds: its part of :data:`WHOLE`; what earlier stages leave is its, too.
        needs: what must be there, else it is skipped.
        dry: the command of a dry run, where that is another.
        proof: what its log must have, besides an exit code of 0.
        beside: what it makes, where it runs beside stages that do not need that.
        always: whether it runs each time, whatever came of it before; others need what it finds,
            and it may take :data:`ALWAYS`.
    """

    name: str
    command: str
    seconds: float
    needs: tuple[str, ...] = ()
    dry: str = ""
    proof: str = ""
    beside: str = ""
    always: bool = False


class Task(NamedTuple):
    """What a stage runs, or why it cannot."""

    command: list[str]
    environment: dict[str, str]
    why_not: str = ""


@dataclass
class Result:
    """A line of the summary."""

    stage: str
    status: str
    seconds: float = 0.0
    limit_s: float | None = None
    detail: str = ""
    partial: bool = False  # there is more to find out
    earlier: bool = False  # kept from a run before


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all gone
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """In the child: a runner that is killed leaves nothing behind."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def start(task: Task, log: Path) -> subprocess.Popen[bytes]:
    """Begin a command, in a process group of its own. Raises OSError where it cannot be."""
    with log.open("wb") as file:
        return subprocess.Popen(
            task.command, cwd=ROOT, env={**os.environ, **task.environment},
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Wait for a command; its exit code, or None where it took longer than ``limit`` seconds.
    Nothing of its group is left."""
    grace = min(GRACE, limit / 4)
    try:
        return process.wait(limit - grace)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        _signal_group(process, signal.SIGKILL)  # children that outlived it, too
        # Else it is stuck in the driver, and there is nothing more to be done about it.
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)


class Home:
    """The one file that what is in a folder comes home as."""

    def __init__(self, path: Path, folder: Path, before: Callable[[], None]) -> None:
        """``before`` is called before each renewal, to write what is to be true then."""
        self.path, self.folder, self._before = path, folder, before
        self._lock = threading.Lock()

    def unpack(self) -> None:
        """What an earlier run brought home, into the folder."""
        with suppress(OSError, tarfile.TarError, EOFError), tarfile.open(self.path) as tar:
            for member in tar:
                file = tar.extractfile(member) if "/" not in member.name else None
                if file is not None:
                    (self.folder / member.name).write_bytes(file.read())

    def renew(self) -> None:
        """Replace the file by one of all that there is now."""
        with self._lock:
            self._before()
            part = self.path.with_suffix(".part")
            names = [p.name for p in sorted(self.folder.iterdir()) if p.suffix != ".part"]
            with tarfile.open(part, "w:gz", compresslevel=4) as tar:
                for name in [*SUMMARY, *(n for n in names if n not in SUMMARY)]:
                    with suppress(FileNotFoundError):
                        content = (self.folder / name).read_bytes()  # while a stage writes it
                        member = tarfile.TarInfo(name)
                        member.size, member.mtime = len(content), int(time.time())
                        tar.addfile(member, io.BytesIO(content))
            os.replace(part, self.path)

    def keep_renewing(self) -> None:
        """From now on, beside everything else."""

        def again() -> None:
            while True:
                time.sleep(RENEWED)
                with suppress(OSError):  # a full disk, say: the next time
                    self.renew()

        threading.Thread(target=again, daemon=True).start()


class Runner:
    """Runs stages within ``budget`` seconds; what they find is in the folder ``out``.

    ``prepare`` makes the task of a stage from its seconds; ``tell`` the lines of the summary that
    say what was found, and files beside it.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        prepare: Callable[[Stage, float], Task],
        *,
        say: Callable[[str], None] = lambda text: None,
        tell: Callable[[Path], list[str]] = lambda out: [],
        note: str = "",
        home: Path,
    ) -> None:
        self.out, self.budget, self.note = out, budget, note
        self._prepare, self._say, self._tell = prepare, say, tell
        self.results: list[Result] = []
        self._todo: list[Stage] = []
        self._earlier: dict[str, Result] = {}
        self._fingerprint = ""
        self._beside: dict[str, tuple[Stage, Result, subprocess.Popen[bytes], float]] = {}
        self._granted = 0.0
        self._begin = time.monotonic()
        self.home = Home(home, out, self._write)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def take_up(self, fresh: bool = False) -> None:
        """Go on from what an earlier run brought home; not, and its traces are put aside, where
        that run was of other sources or another machine, or is not wanted."""
        if not self.home.path.exists():
            self.home.renew()  # a run that is killed at once has left something
            self._fingerprint = fingerprint()
            return
        self.home.unpack()
        self._fingerprint = fingerprint()
        found = read_json(self.out / "summary.json")
        same = (found.get("schema"), found.get("fingerprint"), found.get("note")) == (
            SCHEMA, self._fingerprint, self.note,
        )  # fmt: skip
        if fresh or not same:
            put_aside(self.out)
            return
        (self.out / "environment.json").unlink(missing_ok=True)
        lines = [Result(**{**line, "earlier": True}) for line in found["stages"]]
        self._earlier = {r.stage: r for r in lines if r.status == OK and not r.partial}

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run all stages; whether none failed."""
        self.results += [self._earlier[s.name] for s in stages if self._is_kept(s)]
        self._todo = [s for s in stages if not self._is_kept(s)]
        windows = sum(s.seconds for s in self._todo if not s.beside)
        scale = self.budget / max(1.0, min(windows, max(WHOLE, self.budget)))
        self.home.renew()
        self.home.keep_renewing()
        try:
            while self._todo:
                self._look_beside()
                stage = next((s for s in self._todo if not self._waits(s)), None)
                if stage is None:
                    time.sleep(0.2)
                    continue
                self._todo.remove(stage)
                self._run(stage, scale)
        finally:
            self._look_beside(last=True)
            self.home.renew()
        return not any(result.status in (FAILED, TIMEOUT) for result in self.results)

    def _is_kept(self, stage: Stage) -> bool:
        # What was built is not brought home.
        return stage.name in self._earlier and not (stage.always or stage.beside)

    def _waits(self, stage: Stage) -> bool:
        return any(making.beside in stage.needs for making, *_ in self._beside.values())

    def _run(self, stage: Stage, scale: float) -> None:
        self._say(f"==> {stage.name}")
        result = Result(stage.name, RUNNING)
        self.results.append(result)
        begin = self.elapsed
        left = self.budget - begin - RESERVE
        own = ALWAYS if stage.always else stage.seconds * scale
        if not stage.beside:
            self._granted = max(self._granted, begin) + stage.seconds * scale
        limit = left if stage.beside else min(left, max(own, self._granted - begin))
        try:
            if limit < min(LEAST, own):
                result.status, result.detail = SKIPPED, f"no time left of {self.budget:.0f} s"
                return
            task = self._prepare(stage, limit)
            if task.why_not:
                result.status, result.detail = SKIPPED, task.why_not
                return
            result.limit_s = round(limit, 1)
            self.home.renew()
            process = start(task, self._log(stage))
            if stage.beside:
                self._beside[stage.name] = stage, result, process, begin
                return
            self._conclude(stage, result, end(process, limit))
        except KeyboardInterrupt:
            result.status, result.detail = FAILED, "interrupted"
            raise
        except Exception as error:  # of the stage's own code: the other stages must go on
            result.status, result.detail = FAILED, f"{type(error).__name__}: {error}"
        finally:
            if result.status != RUNNING:
                result.seconds = round(self.elapsed - begin, 1)
                self._say(f"    {result.status}, {result.seconds:.0f} s. {result.detail}")

    def _look_beside(self, last: bool = False) -> None:
        """Conclude what ran beside and has ended, or has to."""
        for name, (stage, result, process, begin) in list(self._beside.items()):
            over = last or self.elapsed > self.budget - RESERVE
            if process.poll() is not None or over:
                self._conclude(stage, result, end(process, 0.1 if over else 60.0))
                result.seconds = round(self.elapsed - begin, 1)
                del self._beside[name]

    def _log(self, stage: Stage) -> Path:
        return self.out / f"{stage.name}.log"

    def _conclude(self, stage: Stage, result: Result, code: int | None) -> None:
        text = self._log(stage).read_text(errors="replace")
        proof = [line for line in text.splitlines() if stage.proof in line] if stage.proof else []
        result.detail = proof[-1].strip("= ") if proof else last_line(text)
        result.status = TIMEOUT if code is None else FAILED if code else OK
        if result.status == OK and stage.proof and not proof:
            result.status, result.detail = FAILED, f"no {stage.proof!r} in its log; {result.detail}"
        result.partial = result.status != OK or bool(_PARTIAL.search(result.detail))
        if code is None:
            result.detail = f"stopped at its limit of {result.limit_s:.0f} s; {result.detail}"
        if result.status != OK:
            self._say("\n".join(f"    | {line}" for line in text.splitlines()[-15:]))

    def _known(self) -> list[Result]:
        """Of this run, and what an earlier one found and this one was not asked for."""
        seen = {result.stage for result in self.results} | {stage.name for stage in self._todo}
        return [*self.results, *(r for name, r in self._earlier.items() if name not in seen)]

    def _write(self) -> None:
        environment = read_environment(self.out)
        summary: dict[str, Any] = {
            "schema": SCHEMA,
            "commit": environment.get("commit"),
            "device": environment.get("device"),
            "note": self.note,
            "fingerprint": self._fingerprint,
            "budget_s": self.budget,
            "elapsed_s": round(self.elapsed, 1),
            "stages": [asdict(result) for result in self._known()],
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (self.out / "summary.txt").write_text(self.text())

    def text(self) -> str:
        """The summary for a person."""
        environment = read_environment(self.out)
        missing = no_gpu(self.out)
        rows = [
            f"device: {environment.get('device', 'not yet known')}"
            + (f" (nothing ran on a GPU: {missing})" if missing else ""),
            f"commit: {environment.get('commit') or 'unknown'}"
            + (" with uncommitted changes" if environment.get("uncommitted_changes") else ""),
            f"{self.elapsed:.0f} of {self.budget:.0f} s",
            *([self.note] if self.note else []),
        ]
        try:
            rows += self._tell(self.out)
        except Exception as error:  # of what a stage has half written
            rows.append(f"what was found is in the other files: {type(error).__name__}: {error}")
        results = [*self._known(), *(Result(s.name, "to do") for s in self._todo)]
        width = max((len(result.stage) for result in results), default=0)
        rows += [""] + [
            f"{r.stage:{width}}  {r.status:7}  {r.seconds:6.1f} s  "
            f"{'(earlier) ' if r.earlier else ''}{r.detail}".rstrip()
            for r in results
        ]
        return "\n".join(rows) + "\n"


def _gpus() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return re.sub(r"\(UUID.*?\)", "", done.stdout.decode(errors="replace"))


def fingerprint() -> str:
    """Of all that a stage depends on: sources, torch, Triton, the GPU. With others, what was found
    before is no more true."""
    digest = hashlib.sha256(f"{sys.version} {platform.machine()} {_gpus()}".encode())
    for package in ("torch", "triton"):
        with suppress(PackageNotFoundError):
            digest.update(version(package).encode())
    folders = ("senet_kernels", "csrc", "benchmarks", "tests", "tools")
    kinds = {".py", ".h", ".cuh", ".cpp", ".cu", ".json", ".j2"}
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    for path in sorted([*paths, ROOT / "setup.py", ROOT / "pyproject.toml"]):
        if "results" not in path.parts and path.name != "_build.json":
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def put_aside(out: Path) -> None:
    """What stages go on from is not gone on from."""
    for path in [*out.glob("*.json"), *out.glob("*.passed")]:
        if not path.name.endswith(".before.json"):
            os.replace(path, path.with_suffix(".before.json"))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def read_environment(out: Path) -> dict[str, Any]:
    """What the first stage found; empty where it failed."""
    return read_json(out / "environment.json")


def no_gpu(out: Path) -> str | None:
    """Why nothing can run on a GPU; None where there is one, or where that is not known."""
    environment = read_environment(out)
    if environment.get("device") != "cpu":
        return None
    return f"no CUDA device that torch {environment.get('torch')} can use"
