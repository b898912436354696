"""Trying a kernel in a process of its own, so that a crash or a hang costs the caller nothing.

The process is started once and takes one kind after another, by lines on its standard input and
output; it ends after some idle seconds, with its parent, and after a kernel that failed, which may
have left the device's context unusable.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from .kinds import Kind, from_json
from .process import MARK, Worker
from .proof import Found, NoVerdictError, Wrong, describe, prove

#: Seconds for a process to start (it imports torch), and between two steps of a proof: a kernel is
#: compiled, or runs.
START_SECONDS, JOB_SECONDS = 120.0, 120.0
_IDLE_SECONDS = 20.0
_MAIN = "from senet_kernels.trust.worker import main; main()"

#: Modules that a worker imports first: those that define backends.
IMPORTS: list[str] = []

# By the hand of someone else: of these nothing follows.
_FOREIGN = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM))


_worker: Worker | None = None


def try_kind(kind: Kind, *, compiled: bool = False) -> Found:
    """:func:`senet_kernels.trust.proof.prove` in the other process.

    Raises:
        NoVerdictError: the process could not be started, or has no memory; nothing is known.
    """
    message = {"kind": kind.as_json(), "compiled": compiled, "imports": IMPORTS}
    try:
        begun = _begin(message)
    except (OSError, ValueError, queue.Empty) as error:
        stop()
        text = f"{type(error).__name__} {error}".strip()
        raise NoVerdictError(f"no process for trying kernels could be started: {text}") from error
    except BaseException:  # Ctrl-C while waiting
        stop()
        raise
    return _outcome(begun)


def _begin(message: dict[str, Any]) -> Worker:
    """The worker, which has begun with a kind."""
    global _worker
    for is_new in (False, True):
        if is_new or _worker is None or _worker.process.poll() is not None:
            stop()
            _worker = Worker(_MAIN)
        begun = _worker
        try:
            begun.send(message)
            if begun.receive(START_SECONDS) is not None:
                return begun
        except BrokenPipeError:
            pass
        stop()  # it had been idle for too long
    raise NoVerdictError("the process for trying kernels ended before it tried one")


def _outcome(worker: Worker) -> Found:
    """What becomes of a kind that the worker has begun with."""
    step = "its start"
    try:
        while (answer := worker.receive(JOB_SECONDS)) is not None and "step" in answer:
            step = answer["step"]
    except queue.Empty:
        stop()
        return Found(Wrong("hangs", f"no word for {JOB_SECONDS:g} seconds after {step}"))
    except BaseException:
        stop()
        raise
    if answer is None:
        try:
            code = worker.process.wait(5)
        except subprocess.TimeoutExpired:  # the driver holds it
            stop()
            return Found(Wrong("hangs", "the process said no more, and did not end"))
        stop()
        if code < 0 and -code not in _FOREIGN:
            return Found(Wrong("crashes", f"the process died by {signal.Signals(-code).name}"))
        if code < 0 or code == 0:
            raise NoVerdictError(f"the process for trying kernels was ended ({code})")
        return Found(Wrong("crashes", f"the process ended with status {code}"))
    if "no_verdict" in answer:
        raise NoVerdictError(answer["no_verdict"])
    wrong = answer.pop("wrong")
    found = Found(Wrong(*wrong) if wrong else None, **answer)
    if found.wrong is not None:
        stop()
    return found


def stop() -> None:
    """End the process, if there is one."""
    global _worker
    ended, _worker = _worker, None
    if ended is not None:
        ended.stop()


def after_fork() -> None:
    """In a forked child: the process is the parent's."""
    global _worker
    _worker = None


# -- the other process


def main(answer: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Take kinds from standard input until there are no more; or other messages, for ``answer``."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the parent is gone, whatever runs here

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            os._exit(0)
        (answer or _answer)(json.loads(line))


def say(**message: Any) -> None:
    """Answer the parent."""
    sys.stdout.write(f"{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


def tell_steps() -> None:
    """The watch begins anew with each step of a proof, and with each kernel that Triton has
    compiled: it is for the one that does not end."""
    from senet_kernels.backends import triton

    from . import problem, proof

    def told(of: Any, name: str) -> None:
        do = getattr(of, name)

        def step(*args: Any, **options: Any) -> Any:
            say(step=name.strip("_"))
            return do(*args, **options)

        setattr(of, name, step)

    told(proof, "_run")
    told(proof, "_compare")
    told(problem.Problem, "kernel_plainly")
    if triton.UNAVAILABLE is None:
        from senet_kernels.backends.triton import launcher

        launcher.listeners.append(lambda: say(step="compile"))


_steps_are_told = False


def _answer(message: dict[str, Any]) -> None:
    global _steps_are_told
    try:
        for name in message["imports"]:
            importlib.import_module(name)
        kind = from_json(message["kind"])
        import torch

        torch.empty(1, device=kind.device)  # the context, before the clock runs
    except Exception as error:
        say(started=False)
        say(no_verdict=f"{type(error).__name__}: {error}")
        return
    say(started=describe(kind))
    if not _steps_are_told:
        tell_steps()
        _steps_are_told = True
    try:
        found = prove(kind, compiled=message["compiled"])
    except NoVerdictError as error:
        say(no_verdict=str(error))
    except Exception as error:
        say(no_verdict=f"{type(error).__name__}: {error}")
    else:
        say(**found._asdict())
