"""The parent's side of a process that tries kernels, by lines on its standard input and output.

Needs the standard library alone: ``make gpu`` loads this file by its path, and starts its processes
without a torch of its own.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

MARK = "senet_kernels.trust: "  # lines without it are not ours
_ENDED = "ended"


class Worker:
    """A Python process that runs ``main``, some statements.

    ``stderr`` is a file for its standard error; ``apart``: in a session of its own, where no Ctrl-C
    reaches it, else among the processes of its parent, with which it is then killed.
    """

    def __init__(self, main: str, *, stderr: Any = subprocess.DEVNULL, apart: bool = True) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        self._apart = apart
        self.process = subprocess.Popen(
            [sys.executable, "-c", main], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr, text=True, errors="replace", env=environment, start_new_session=apart,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        # Closed here: whoever else closes it waits for this thread, and this thread for all that
        # have inherited the pipe.
        assert self.process.stdout is not None
        try:
            with self.process.stdout as lines:
                for line in lines:
                    # Behind what C code has left of a line of its own, it may be.
                    _, mark, message = line.partition(MARK)
                    if mark:
                        self._lines.put(message)
        finally:
            self._lines.put(_ENDED)

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None if the process has ended.

        Raises:
            queue.Empty: there is none in time.
        """
        line = self._lines.get(timeout=seconds)
        return None if line == _ENDED else json.loads(line)

    def stop(self) -> None:
        """Kill it; and what it has started, where it is apart. Takes at most some seconds."""
        with suppress(OSError):
            # Of one that has been waited for the number may be another's by now.
            if self._apart and hasattr(os, "killpg") and self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            return  # the driver holds it: its pipe may be full, and closing would wait
        if self.process.stdin is not None:
            with suppress(OSError, ValueError):
                self.process.stdin.close()
