"""Verdicts on all kernels of a backend, case by case, whatever a case does to its process.

``python -m tools.gpu_verdicts triton|native verdicts|situations FILE [--device cpu]``. Processes
take the cases of ``tools/gpu_kernels.py`` one after another, under a watch; one that crashed, hung
or failed, and may have left the device in error, is replaced. FILE is true at any moment, and has
for each case ``ok``, ``error``, ``launch error``, ``crash``, ``hang``, ``not here`` (the device
lacks what a policy needs), or ``not run``; called again, it goes on with those that were not run.
Exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.records import replace
from senet_kernels.trust.worker import Worker
from tools.gpu_kernels import FRESH, Case, cases
from tools.gpu_report import FINE, NOT_RUN, counted

# Seconds: for a process until it can take a case, for a case, and what is long for one.
START, WATCH, LONG = 90.0, 15.0, 5.0
MOST_PROCESSES = 8
_MAIN = "from tools.gpu_kernels import serve; serve({!r}, {!r}, {!r})"


def judge(process: Worker, number: int, watch: float, begins: Callable[[], None]) -> dict[str, str]:
    """What becomes of a case; ``begins`` is called before it can hang."""
    try:
        process.send({"case": number})
        try:
            answer = process.receive(START)
        except queue.Empty:
            return {"outcome": "hang", "text": f"the process did not start within {START:g} s"}
        begins()
        while answer is not None and "outcome" not in answer:
            answer = process.receive(watch)
    except queue.Empty:
        return {"outcome": "hang", "text": f"no answer within {watch:g} s"}
    except OSError:
        answer = None
    if answer is not None:
        return answer
    try:
        code = process.process.wait(5)
    except subprocess.TimeoutExpired:  # the driver holds it
        return {"outcome": "crash", "text": "the process said no more, and did not end"}
    said = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return {"outcome": "crash", "text": f"the process {said}"}


class Pool:
    """Processes that share numbered cases; ``found`` is what is known of each, by name."""

    def __init__(
        self, main: str, path: Path, wanted: dict[int, Case], watch: float = WATCH
    ) -> None:
        self.main, self.path, self.watch = main, path, watch
        self.found: dict[str, dict[str, Any]] = {
            case.name: {"outcome": NOT_RUN, "layer": case.layer} for case in wanted.values()
        }
        if path.exists():
            earlier = json.loads(path.read_text())
            self.found |= {n: v for n, v in earlier.items() if v["outcome"] != NOT_RUN}
        self.todo: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
        for number, case in wanted.items():
            if self.found[case.name]["outcome"] == NOT_RUN:
                self.todo.put((number, case))
        self._begun: dict[str, float] = {}
        self._lock = threading.Lock()
        self._write()

    def run(self, processes: int) -> None:
        """Until every case has its verdict."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(processes)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self._stop_watching()
            raise

    def _stop_watching(self) -> None:
        """The time is up: what has been under way for long hangs, as far as one knows."""
        with self._lock:
            for name, begun in self._begun.items():
                if (seconds := time.monotonic() - begun) > LONG:
                    text = f"no answer within {seconds:.0f} s, when the time was up"
                    self.found[name] |= {"outcome": "hang", "text": text}
            self._write()

    def _work(self) -> None:
        process: Worker | None = None
        while True:
            try:
                number, case = self.todo.get_nowait()
            except queue.Empty:
                break
            if process is not None and case.what == FRESH:
                process.stop()
                process = None
            process = process or Worker(self.main)
            verdict = judge(process, number, self.watch, partial(self._begin, case))
            if verdict["outcome"] not in FINE:
                process.stop()
                process = None
            with self._lock:
                self._begun.pop(case.name, None)
                self.found[case.name] |= verdict
                self._write()
                print(f"{case.name}: {verdict['outcome']} {verdict['text']}".rstrip(), flush=True)
        if process is not None:
            process.stop()

    def _begin(self, case: Case) -> None:
        with self._lock:
            self._begun[case.name] = time.monotonic()

    def _write(self) -> None:
        replace(self.path, json.dumps(self.found, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_verdicts", description=__doc__)
    parser.add_argument("backend", choices=["triton", "native"])
    parser.add_argument("group", choices=["verdicts", "situations"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--watch", type=float, default=WATCH, help="seconds for a case")
    parser.add_argument("--case", default="", help="only those that have this in their names")
    given = parser.parse_args()
    every = cases(given.backend, given.group, given.device == "cpu")
    wanted = {n: case for n, case in enumerate(every) if given.case in case.name}
    main = _MAIN.format(given.backend, given.group, given.device)
    pool = Pool(main, given.file, wanted, given.watch)
    try:
        pool.run(min(MOST_PROCESSES, os.cpu_count() or 1))
    finally:
        print(f"{len(wanted)} cases: {counted(pool.found)}", flush=True)
    return any(v["outcome"] not in FINE for v in pool.found.values())


if __name__ == "__main__":
    sys.exit(main())
