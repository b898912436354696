"""Stages that run one after another within a budget, and go on where an earlier run stopped.

All that they find is in one file, which is renewed while they run.
"""

from __future__ import annotations

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
SCHEMA = "senet_kernels.gpu/4"
SUMMARY = ("summary.txt", "summary.json")
#: As senet_kernels.backends.native has it, which cannot be imported without torch.
PREBUILT = "SENET_KERNELS_PREBUILT"
#: For tools/resume_tests.py.
PASSED, LEFT_OUT_TESTS = "SENET_KERNELS_PASSED", "SENET_KERNELS_LEFT_OUT"

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
_PARTIAL = re.compile(r"time (is|was) up|\bnot run\b|\bno verdict\b")

# Why something that a stage needs is not there, by what is known; empty where it is.
Need = Callable[[Any], str]


class Stage(NamedTuple):
    """A row of the table.

    Attributes:
        name: of the stage, and of its log.
        command: where ``{out}`` is the folder for what it finds, ``{seconds}`` its time for
            measuring, ``{until}`` the Unix time of its end and ``{device}`` the device.
        seconds: its part of :data:`WHOLE`; what earlier stages that ran leave is its, too.
        needs: what must be there, else it is skipped.
        dry: the command of a dry run, where that is another.
        proof: a pattern that its log must have, besides an exit code of 0.
        beside: what it makes, where it runs beside stages that do not need that.
        late: whether it waits for what runs beside, and for the stages that need that.
        grace: seconds for it to say what it has, at its end.
        always: whether it runs each time, whatever came of it before; others need what it finds,
            and it may take :data:`ALWAYS`.
    """

    name: str
    command: str
    seconds: float
    needs: tuple[Need, ...] = ()
    dry: str = ""
    proof: str = ""
    beside: Need | None = None
    late: bool = False
    grace: float = GRACE
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


# Runs the command given, and kills all of the group as soon as its standard input ends: a runner
# that is killed leaves nothing behind. The command's exit code is its own.
_WATCHDOG = """
import os, signal, subprocess, sys, threading
signal.signal(signal.SIGINT, lambda *_: None)
def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
try:
    code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
except OSError as error:
    sys.exit(str(error))
sys.stdout.flush()
os._exit(code if code >= 0 else 128 - code)
"""


def start(task: Task, log: Path) -> subprocess.Popen[bytes]:
    """Begin a command, in a process group of its own, below a watchdog."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG, *task.command], cwd=ROOT,
            env={**os.environ, **task.environment}, stdin=subprocess.PIPE, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes], limit: float, grace: float = GRACE) -> int | None:
    """Wait for a command; its exit code, or None where it took longer than ``limit`` seconds, of
    which so many are for saying what it has. Nothing of its group is left."""
    grace = min(grace, limit / 4)
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
        self.fault = ""  # of the last renewal but this
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

    def try_to_renew(self) -> None:
        """Or say in the next one why not: a full disk, say."""
        try:
            self.renew()
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"

    def keep_renewing(self) -> None:
        """From now on, beside everything else."""

        def again() -> None:
            while True:
                time.sleep(RENEWED)
                self.try_to_renew()

        threading.Thread(target=again, daemon=True).start()


class Runner:
    """Runs stages within ``budget`` seconds; what they find is in the folder ``out``.

    ``prepare`` makes the task of a stage from its seconds and the results of those before;
    ``tell`` the lines of the summary that say what was found, and files beside it.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        prepare: Callable[[Stage, float, Sequence[Result]], Task],
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
        self._fingerprint = self._library = self._anew = ""
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
            self._fingerprint, self._library = fingerprint(), library()
            return
        self.home.unpack()
        self._fingerprint, self._library = fingerprint(), library()
        found = read_json(self.out / "summary.json")
        # Where there is no library it is built of the same sources.
        libraries = {found.get("library", ""), self._library} - {""}
        reasons = {
            "--fresh": fresh,
            "it is of another release of these tools, or cut off": found.get("schema") != SCHEMA,
            "sources, GPU, Python, torch or Triton are others":
                found.get("fingerprint") != self._fingerprint,
            "one of the two is a dry run": found.get("note") != self.note,
            "the compiled library is another": len(libraries) > 1,
        }  # fmt: skip
        why = next((reason for reason, holds in reasons.items() if holds), "")
        if why:
            put_aside(self.out)
            self._anew = f"begun anew, what gpu.tgz had is in it as *.before.*: {why}"
            self._say(self._anew)
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
        self.home.try_to_renew()
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
        if any(making.beside in stage.needs for making, *_ in self._beside.values()):
            return True
        return stage.late and any(self._waits(s) for s in self._todo if not s.late)

    def _run(self, stage: Stage, scale: float) -> None:
        self._say(f"==> {stage.name}")
        result = Result(stage.name, RUNNING)
        self.results.append(result)
        begin = self.elapsed
        left = self.budget - begin - RESERVE
        own = ALWAYS if stage.always else stage.seconds * scale
        granted = self._granted
        if not stage.beside:
            granted = max(granted, begin) + stage.seconds * scale
        limit = left if stage.beside else min(left, max(own, granted - begin))
        try:
            if limit < min(LEAST, own):
                result.status, result.detail = SKIPPED, f"no time left of {self.budget:.0f} s"
                return
            task = self._prepare(stage, limit, self.results)
            if task.why_not:
                result.status, result.detail = SKIPPED, task.why_not
                return
            self._granted = granted
            result.limit_s = round(limit, 1)
            self.home.try_to_renew()
            process = start(task, self._log(stage))
            if stage.beside:
                self._beside[stage.name] = stage, result, process, begin
                return
            self._conclude(stage, result, end(process, limit, stage.grace))
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
                self._library = library()
                del self._beside[name]

    def _log(self, stage: Stage) -> Path:
        return self.out / f"{stage.name}.log"

    def _conclude(self, stage: Stage, result: Result, code: int | None) -> None:
        text = self._log(stage).read_text(errors="replace")
        lines = text.splitlines() if stage.proof else []
        proof = [line for line in lines if re.search(stage.proof, line)]
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
            "library": self._library,
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
            *filter(None, (self.note, self._anew)),
            *([f"an earlier renewal failed: {self.home.fault}"] if self.home.fault else []),
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
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def library() -> str:
    """A hash of the compiled library that is there; empty where there is none."""
    given = os.environ.get(PREBUILT, "")
    places = [Path(given)] * bool(given) + [ROOT / "senet_kernels"]
    files = [sorted(p.glob("_native*.so")) if p.is_dir() else [p] * p.exists() for p in places]
    digest = hashlib.sha256()
    for path in (path for of_place in files for path in of_place):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if any(files) else ""


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
    for path in [*out.glob("*.json"), *out.glob("*.passed"), *out.glob("*.log")]:
        if ".before." not in path.name:
            os.replace(path, path.with_suffix(f".before{path.suffix}"))


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
