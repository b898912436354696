"""Verdicts on all kernels, case by case, whatever a case does to its process.

``python -m tools.gpu_verdicts FOLDER [--backend triton] [--group verdicts] [--device cpu]``.
Processes take the cases of ``tools/gpu_cases.py`` one after another, under a watch for silence; one
that crashed, hung or failed to launch, and may have left the device in error, is replaced. The
files ``GROUP-BACKEND.json`` in FOLDER are true at any moment, and have for each case ``ok``,
``error``, ``launch error``, ``crash``, ``hang``, ``not here`` (the device lacks what a policy
needs), ``no verdict`` (no memory, say), or ``not run``; called again, it goes on with those that
were not run, and with ``--again`` with all that were neither ``ok`` nor ``not here``. Exit code 1:
something is wrong, or no process started.

This process has no torch of its own: those that have start at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.records import read_json, replace
from tools.gpu_cases import BACKENDS, FRESH, GROUPS, Job, jobs

NOT_RUN = "not run"
FINE = ("ok", "not here", NOT_RUN)
UNSAID = "unsaid"  # of a process that ended before it was heard of: of its case nothing is known
# What of a case nothing else is to run, and a process that is not to take another one.
LEFT_OUT = ("crash", "hang", "launch error")
KEPT = ("ok", "not here")  # by a second call

# Seconds: for a process until it can take a case, and of silence while it has one.
START, WATCH = 90.0, 15.0
MOST_PROCESSES = 8
# Processes that do not start, one after another: then others will not either.
MOST_FAILED_STARTS = 2
_MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "from tools.gpu_kernels import serve; serve({!r}, {!r})"
)


def _worker_class() -> Any:
    """Of the package, but without importing that, and torch with it."""
    path = Path(__file__).resolve().parent.parent / "senet_kernels" / "trust" / "process.py"
    spec = importlib.util.spec_from_file_location("_process_for_verdicts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Worker


Worker = _worker_class()


def counted(found: dict[str, dict[str, Any]]) -> str:
    """How many verdicts of each kind, in words."""
    outcomes = [verdict["outcome"] for verdict in found.values()]
    return ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes))


class Trying:
    """A process that takes cases."""

    def __init__(self, main: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (stop() closes it)
        self._worker = Worker(main, stderr=self._errors, apart=False)
        self.took = 0  # cases
        self._before = 0  # bytes of its standard error before this one

    def why_not(self, seconds: float) -> str:
        """Waits until it can take a case; why it cannot."""
        try:
            answer = self._worker.receive(seconds)
        except queue.Empty:
            return f"a process did not start within {seconds:g} s{self._said()}"
        return "" if answer else f"a process did not start: it {self._end()}"

    def judge(self, job: Job, watch: float, tell: Callable[[str], None]) -> dict[str, Any]:
        """What becomes of a case; each step of it is told."""
        self.took += 1
        self._before = os.fstat(self._errors.fileno()).st_size
        step, plan = "it was sent", ""
        tell(step)
        try:
            self._worker.send({"job": [job.backend, job.group, job.number]})
            while (answer := self._worker.receive(watch)) is not None:
                if "outcome" in answer:
                    return answer  # type: ignore[no-any-return]
                plan = answer.get("plan", plan)
                step = answer.get("step", "its start")
                tell(step)
        except queue.Empty:
            text = f"no word for {watch:g} s after {step}{self._said()}"
            return {"outcome": "hang", "text": text, "plan": plan}
        except OSError:
            pass
        # Nothing of this case was begun, if it was not heard of: it may have ended by one before.
        outcome = "crash" if step != "it was sent" else UNSAID if self.took > 1 else "crash"
        text, code = f"the process {self._end()}", self._worker.process.returncode
        if code is not None and -code in (signal.SIGTERM, signal.SIGKILL):  # by someone else
            outcome = UNSAID
        return {"outcome": outcome, "text": text, "plan": plan}

    def _end(self) -> str:
        """How it ended."""
        try:
            code = self._worker.process.wait(5)
        except subprocess.TimeoutExpired:  # the driver holds it
            return f"said no more, and did not end{self._said()}"
        ended = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return ended + self._said()

    def _said(self) -> str:
        """The last line of its standard error, since it has its case."""
        begin = max(self._before, os.fstat(self._errors.fileno()).st_size - 4096)
        text = os.pread(self._errors.fileno(), 4096, begin).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""

    def stop(self) -> None:
        self._worker.stop()
        self._errors.close()

    def kill(self) -> None:
        self._worker.process.kill()


class Pool:
    """Processes that share jobs; ``found`` is what is known of each case, by file and name."""

    def __init__(
        self, main: str, out: Path, wanted: Sequence[Job], watch: float = WATCH,
        kept: Callable[[str], bool] = lambda outcome: outcome != NOT_RUN,
    ) -> None:  # fmt: skip
        self.main, self.out, self.watch = main, out, watch
        self.found: dict[str, dict[str, dict[str, Any]]] = {}
        for job in wanted:
            of_file = self.found.setdefault(job.file, {})
            of_file[job.case.name] = {
                "outcome": NOT_RUN, "layer": job.case.layer, "policy": job.case.policy, "text": "",
            }  # fmt: skip
        for name, of_file in self.found.items():
            earlier = read_json(out / name)
            of_file |= {n: v for n, v in earlier.items() if n not in of_file or kept(v["outcome"])}
        self.todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in wanted:
            if self._verdict(job)["outcome"] == NOT_RUN:
                self.todo.put(job)
        self.no_start = ""  # why processes did not
        self._under_way: dict[tuple[str, str], tuple[float, str]] = {}  # since when; the last word
        self._alive: set[Trying] = set()
        self._again: set[tuple[str, str]] = set()  # tried once more
        self._lock = threading.RLock()
        self._over = False
        for name in self.found:
            self._write(name)

    def _verdict(self, job: Job) -> dict[str, Any]:
        return self.found[job.file][job.case.name]

    def run(self, processes: int, seconds: float = 3600.0) -> None:
        """Until every case has its verdict, the time is up, or no process starts."""
        over = time.monotonic() + seconds
        count = min(processes, self.todo.qsize())
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join(max(0.0, over - time.monotonic()))
        finally:
            self._end()

    def _end(self) -> None:
        """No more verdicts; what is under way was not run."""
        with self._lock:
            self._over = True
            for (name, case), (begun, last) in self._under_way.items():
                seconds = time.monotonic() - begun
                text = f"under way for {seconds:.0f} s when the time was up, after {last}"
                self.found[name][case]["text"] = text
            for name, of_file in self.found.items():
                for verdict in of_file.values():
                    if verdict["outcome"] == NOT_RUN and not verdict["text"]:
                        verdict["text"] = self.no_start
                self._write(name)
            for process in self._alive:
                process.kill()

    def _work(self) -> None:
        process: Trying | None = None
        failed = 0
        while failed < MOST_FAILED_STARTS and not self._over:
            try:
                job = self.todo.get_nowait()
            except queue.Empty:
                break
            if process is not None and process.took and job.case.what == FRESH:
                process = self._replace(process)
            if process is None:
                reason = ""
                try:
                    process = self._replace(None, Trying(self.main))
                except OSError as error:  # no memory for a process, no disk for its words
                    reason = f"a process did not start: {error}"
                if reason or (process and (reason := process.why_not(START))):
                    self.todo.put(job)
                    failed += 1
                    self._say_no_start(reason)
                    process = self._replace(process)
                    continue
                failed = 0
            verdict = process.judge(job, self.watch, partial(self._tell, job))
            if verdict["outcome"] == UNSAID:
                process = self._replace(process)
                key = job.file, job.case.name
                if key not in self._again:
                    self._again.add(key)
                    self.todo.put(job)
                    continue
                verdict["outcome"] = "no verdict"
            self._conclude(job, verdict)  # before anything that may take its time
            if verdict["outcome"] in LEFT_OUT:
                process = self._replace(process)
        self._replace(process)

    def _replace(self, process: Trying | None, by: Trying | None = None) -> Trying | None:
        with self._lock:
            if by is not None:
                self._alive.add(by)
        if process is not None:
            process.stop()
            with self._lock:
                self._alive.discard(process)
        return by

    def _say_no_start(self, reason: str) -> None:
        with self._lock:
            if not self._over:
                self.no_start = reason
                print(reason, flush=True)

    def _tell(self, job: Job, step: str) -> None:
        with self._lock:
            key = job.file, job.case.name
            begun, _ = self._under_way.get(key, (time.monotonic(), step))
            self._under_way[key] = begun, step

    def _conclude(self, job: Job, verdict: dict[str, Any]) -> None:
        with self._lock:
            self._under_way.pop((job.file, job.case.name), None)
            if self._over:
                return
            self._verdict(job).update(verdict)
            self._write(job.file)
            said = f"{job.backend} {job.case.name}: {verdict['outcome']} {verdict['text']}"
            print(said.rstrip(), flush=True)

    def _write(self, name: str) -> None:
        replace(self.out / name, json.dumps(self.found[name], indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_verdicts", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path)
    add("--backend", action="append", choices=BACKENDS, help="default: both")
    add("--group", action="append", choices=GROUPS, help="default: both")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--until", type=float, default=float("inf"), help="Unix time: its start is counted, too")
    add("--watch", type=float, default=WATCH, help="seconds of silence in a case")
    add("--case", default="", help="only those that have this in their names")
    add("--again", action="store_true", help="what is neither ok nor not here, too")
    given = parser.parse_args()
    backends = given.backend or list(BACKENDS)
    every = jobs(backends, given.group or GROUPS, given.device == "cpu")
    wanted = [job for job in every if given.case in job.case.name]
    kept = (lambda word: word in KEPT) if given.again else (lambda word: word != NOT_RUN)
    pool = Pool(_MAIN.format(given.device, backends), given.folder, wanted, given.watch, kept)
    try:
        pool.run(min(MOST_PROCESSES, os.cpu_count() or 1), min(3600.0, given.until - time.time()))
    except KeyboardInterrupt:
        return 130
    finally:
        found = {str((job.file, job.case.name)): pool._verdict(job) for job in wanted}
        why = f"; {pool.no_start}" if pool.no_start else ""
        print(f"{len(wanted)} cases: {counted(found)}{why}", flush=True)
    outcomes = [v["outcome"] for found in pool.found.values() for v in found.values()]
    return (bool(pool.no_start) and NOT_RUN in outcomes) or any(
        v["outcome"] not in FINE for v in found.values()
    )


if __name__ == "__main__":
    sys.exit(main())
