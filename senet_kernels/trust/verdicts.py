"""Verdicts: what is known of a kernel variant on this card, and how it comes to be known."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from senet_kernels.backends import native

from . import worker
from .kinds import MODULES, Kind, environment, kernel_hash, layer_in
from .proof import LEAST_SPEED, Found, NoVerdictError, describe, prove
from .store import IN_PROCESS, IN_SUBPROCESS, Folder, Mark, Owner, wait_for

log = logging.getLogger("senet_kernels.trust")

#: States of a variant.
UNPROVEN, TRUSTED, SLOWER, REFUSED = "unproven", "trusted", "slower", "refused"

#: Seconds that a process waits, once, for the verdict that another one is about to reach.
WAIT_SECONDS = 30.0
_AGAIN_SECONDS = 10.0  # between looks for it after that


class KernelMistrustWarning(RuntimeWarning):
    """A kernel was found wrong on this machine and is not run; the text is a report of it."""


class Verdict(NamedTuple):
    """What is known of a variant.

    Attributes:
        state: ``"unproven"``, ``"trusted"``, ``"slower"`` or ``"refused"``.
        reason: why it does not run, or how it was proven.
        speed: how many times as fast as eager PyTorch it was; None where that was not measured.
        compiled_speed: the same beside what ``torch.compile`` makes of PyTorch's operators.
        key: the variant.
        name: its class.
        final: whether asking again in this process gives the same, unless :func:`forget` or
            :func:`freeze` is called.
    """

    state: str
    reason: str
    speed: float | None = None
    compiled_speed: float | None = None
    key: str = ""
    name: str = ""
    final: bool = True

    def __str__(self) -> str:
        speed = "" if self.speed is None else f", {self.speed:.2f}x eager PyTorch"
        if self.compiled_speed is not None:
            speed += f", {self.compiled_speed:.2f}x compiled PyTorch"
        return f"{self.state}{speed}: {self.reason}"


class Question:
    """What stands in a resolved call whose kernels are to be proven: the answers so far."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        with _questions_lock:
            _questions.add(self)


_questions: weakref.WeakSet[Question] = weakref.WeakSet()
_questions_lock = threading.Lock()

_lock = threading.RLock()
_memory: dict[tuple[Any, str], Verdict] = {}
_later: dict[tuple[Any, str], float] = {}
_waited: set[tuple[Any, str]] = set()  # for whose verdict this process has waited
_ran: set[tuple[str, Any, str]] = set()  # whose kernels were let run in this process, and where
_said: set[str] = set()
_frozen = False
_forked = False

#: "device layer", "device class" and "device key" of variants that run in compiled code: trusted,
#: and measured against it. The same of variants that were found wrong. torch.compile guards on
#: whether a name is in there: of a class only where its layer is, of a key only where its class is.
COMPILED: dict[str, bool] = {}
MISTRUSTED: dict[str, bool] = {}
#: Whether there are any: a guard on this is none on how many.
any_compiled = any_mistrusted = False
_devices: dict[Any, set[str]] = {}  # of an environment


def _after_fork() -> None:
    global _forked, _lock, _questions_lock
    _forked, _lock, _questions_lock = True, threading.RLock(), threading.Lock()
    worker.after_fork()
    native.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def once(text: str) -> None:
    """Log a line, the first time."""
    if text not in _said:
        _said.add(text)
        log.info(text)


def complain(text: str) -> None:
    """Log a warning, the first time."""
    if text not in _said:
        _said.add(text)
        log.warning(text)


# -- remembering


def _place(kind: Kind) -> tuple[Any, str]:
    return environment(kind.device), kind.key


def _remember(where: tuple[Any, str], verdict: Verdict) -> Verdict:
    _memory[where] = verdict
    _later.pop(where, None)
    for device in _devices.get(where[0], ()):
        _publish(device, verdict)
    return verdict


def _publish(device: str, verdict: Verdict) -> None:
    """Tell calls that are traced of a verdict. A class and a layer stay where they once were: they
    are no more than a reason to look for keys."""
    fast = verdict.compiled_speed is not None and verdict.compiled_speed >= LEAST_SPEED
    global any_compiled, any_mistrusted
    for table, there in (
        (COMPILED, verdict.state == TRUSTED and fast), (MISTRUSTED, verdict.state == REFUSED),
    ):  # fmt: skip
        if there:
            for name in (verdict.key, verdict.name, layer_in(verdict.name)):
                table.setdefault(f"{device} {name}", True)
        else:
            table.pop(f"{device} {verdict.key}", None)
    any_compiled, any_mistrusted = bool(COMPILED), bool(MISTRUSTED)


def _is_on(device: str, facts: Any) -> None:
    """Publish the verdicts of an environment for a device, at its first call."""
    devices = _devices.setdefault(facts, set())
    if device not in devices:
        devices.add(device)
        for (of, _), verdict in list(_memory.items()):
            if of == facts:
                _publish(device, verdict)


def _from_record(record: dict[str, Any]) -> Verdict | None:
    """A verdict out of a file; None where it is no such record."""
    state, speeds = record.get("state"), (record.get("speed"), record.get("compiled_speed"))
    names = record.get("reason"), record.get("name")
    if state not in (TRUSTED, SLOWER, REFUSED) or not all(isinstance(n, str) for n in names):
        return None
    if any(s is not None and not isinstance(s, (int, float)) for s in speeds):
        return None
    return Verdict(state, names[0], *speeds, record["key"], names[1])  # type: ignore[arg-type]


def _keep(folder: Folder, verdict: Verdict, how: str, seconds: float, title: str) -> None:
    folder.write(
        verdict.key,
        {
            "state": verdict.state, "reason": verdict.reason, "speed": verdict.speed,
            "compiled_speed": verdict.compiled_speed, "name": verdict.name, "how": how,
            "seconds": round(seconds, 4), "title": title,
        },
    )  # fmt: skip


def load(device: str) -> None:
    """Read the verdicts on a device that are kept on disk, once."""
    if device in _loaded:
        return
    facts = environment(device)
    with _lock:
        _loaded.add(device)
        _is_on(device, facts)
        for record in [] if _frozen else Folder(facts).records():
            verdict, where = _from_record(record), (facts, record["key"])
            backend = record["key"].split(" ")[0]
            of_this = backend in MODULES and record["key"].endswith(kernel_hash(backend))
            if verdict is not None and of_this and where not in _memory:
                _remember(where, verdict)


_loaded: set[str] = set()
# Of which a kernel was found right, by this process.
_begun: set[tuple[Folder, str]] = set()

#: What is told of every verdict that an eager call asks for.
listeners: list[Callable[[Kind, Verdict], None]] = []


# -- deciding


def decide(kind: Kind, *, may_prove: bool = True) -> Verdict:
    """The verdict on a variant: the one that is remembered, here or on disk, else one that is
    reached now, unless ``may_prove`` is False."""
    where = _place(kind)
    verdict = _memory.get(where)
    if verdict is not None:
        return verdict
    unproven = Verdict(UNPROVEN, "", key=kind.key, name=kind.name, final=False)
    # Whoever holds it runs the autograd engine, which another thread that asks may be a part of.
    if not _lock.acquire(timeout=WAIT_SECONDS):
        return unproven._replace(reason=_UNDECIDED)
    try:
        return _decide(kind, where, unproven, may_prove)
    finally:
        _lock.release()


def lets_run(kind: Kind) -> None:
    """Note that the kernels of a variant are about to run."""
    _ran.add((kind.device, *_place(kind)))


def while_capturing(kind: Kind) -> Verdict | None:
    """The verdict on a variant while a graph is captured: one that needs nothing to be launched,
    compiled or allocated for good."""
    where = _place(kind)
    verdict = _memory.get(where)
    has_run = (kind.device, *where) in _ran  # each card loads a kernel for itself
    if verdict is not None and (verdict.state != TRUSTED or has_run):
        return verdict
    return None


def _decide(kind: Kind, where: Any, unproven: Verdict, may_prove: bool) -> Verdict:
    verdict = _memory.get(where)
    if verdict is not None:
        return verdict
    _is_on(kind.device, where[0])
    if _frozen:
        reason = "trust.freeze() pinned the verdicts before this call"
        return unproven._replace(reason=reason, final=True)
    if time.monotonic() < _later.get(where, 0):
        return unproven._replace(reason=_UNDECIDED)
    folder = Folder(where[0])
    record = folder.read(kind.key)
    if record is not None:
        verdict = _from_record(record)
        if verdict is not None:
            log.debug("remembered: %s: %s", kind.key, verdict)
            return _remember(where, verdict)
    if not may_prove:
        return unproven._replace(reason="not proven on this card; its first eager call does that")
    if _forked:
        reason = "not proven on this card, and a forked child proves nothing"
        return unproven._replace(reason=reason, final=True)
    return _decide_now(kind, where, folder, unproven)


_UNDECIDED = "another process of this host has not decided yet"


def _decide_now(kind: Kind, where: Any, folder: Folder, unproven: Verdict) -> Verdict:
    is_first = (folder, kind.backend) not in _begun
    if is_first and folder.has_right(kind.backend):
        _begun.add((folder, kind.backend))
        is_first = False
    how = IN_SUBPROCESS if kind.waits or is_first else IN_PROCESS
    suspect: Owner | None = None  # who may have died of it
    for _ in range(3):
        mark = folder.claim(kind.key, how)
        if not isinstance(mark, Owner):
            return _prove(kind, where, folder, how, mark, unproven, suspect)
        if mark.is_alive():
            seconds = 0.0 if where in _waited and mark.boot else WAIT_SECONDS
            _waited.add(where)
            record = wait_for(folder, kind.key, mark, seconds)
            verdict = record and _from_record(record)
            if verdict:
                return _remember(where, verdict)
            if not mark.boot:  # no owner could be read for as long
                folder.drop_mark(kind.key, mark)
                continue
            if mark.is_alive():
                _later[where] = time.monotonic() + _AGAIN_SECONDS
                return unproven._replace(reason=_UNDECIDED)
        record = folder.read(kind.key)
        verdict = record and _from_record(record)
        if verdict:
            return _remember(where, verdict)
        # By a kernel, or by who ends processes: a process of its own shows it, at no risk.
        how, suspect = IN_SUBPROCESS, mark
        folder.drop_mark(kind.key, mark)
    _later[where] = time.monotonic() + _AGAIN_SECONDS
    return unproven._replace(reason=_UNDECIDED)


def _prove(
    kind: Kind, where: Any, folder: Folder, how: str, mark: Mark | None, unproven: Verdict,
    suspect: Owner | None = None,
) -> Verdict:  # fmt: skip
    left_by = suspect  # for the next process to know, unless there is a verdict
    try:
        found = _find(kind, how, alone=suspect is not None)
        verdict = _judged(kind, found)
        if verdict.state != REFUSED:
            _begun.add((folder, kind.backend))
        _keep(folder, verdict, how, found.seconds, describe(kind))
        left_by = None
        _remember(where, verdict)
    except NoVerdictError as error:
        reason = f"it could not be tried: {error}"
        if suspect is not None:
            reason += f"; process {suspect.pid} ended while it tried this"
        return _remember(where, unproven._replace(reason=reason, final=True))
    finally:
        if mark is not None:
            mark.release()
        if left_by is not None:
            folder.leave_mark(kind.key, left_by)
    log.info("%s (%s, %.0f ms): %s", kind.key, how, 1e3 * found.seconds, verdict)
    if verdict.state == REFUSED:
        _warn(kind, found)
    return verdict


def _find(kind: Kind, how: str, *, compiled: bool = False, alone: bool = False) -> Found:
    """``alone``: in a process of its own or not at all, as kernels that wait are."""
    if how == IN_SUBPROCESS:
        try:
            if not sys.executable:
                raise NoVerdictError("no process for trying kernels: sys.executable is not set")
            return worker.try_kind(kind, compiled=compiled)
        except NoVerdictError as error:
            if kind.waits or alone:
                raise
            once(f"{error}; {kind.name} is tried in this process")
    return prove(kind, compiled=compiled)


def _judged(kind: Kind, found: Found) -> Verdict:
    verdict = Verdict(
        TRUSTED, "right, and fast enough", found.speed, found.compiled_speed, kind.key, kind.name
    )
    if found.wrong is not None:
        return verdict._replace(state=REFUSED, reason=": ".join(found.wrong))
    if found.speed is None:
        return verdict._replace(reason="right; there was no memory to measure its time")
    if found.speed < LEAST_SPEED:
        return verdict._replace(state=SLOWER, reason="right, but slower than eager PyTorch")
    return verdict


def measure_compiled(kind: Kind) -> Verdict:
    """Measure a variant that is trusted in eager mode against compiled code too."""
    verdict = decide(kind)
    if verdict.state != TRUSTED or verdict.compiled_speed is not None or _frozen or _forked:
        return verdict
    with _lock:
        try:
            how = IN_SUBPROCESS if kind.waits else IN_PROCESS
            found = _find(kind, how, compiled=True)
        except NoVerdictError as error:
            once(f"{kind.name} could not be measured against compiled code: {error}")
            return verdict
        where = _place(kind)
        verdict = _judged(kind, found)
        _keep(Folder(where[0]), verdict, "verify", found.seconds, describe(kind))
        _remember(where, verdict)
        forget_answers()
        if verdict.state == REFUSED:
            _warn(kind, found)
        return verdict


def _warn(kind: Kind, found: Found) -> None:
    warnings.warn(report(kind, found), KernelMistrustWarning, stacklevel=2)


def report(kind: Kind, found: Found) -> str:
    """A text to report a kernel with."""
    facts = ", ".join(f"{name} {value}" for name, value in environment(kind.device))
    wrong = ": ".join(found.wrong or ("nothing is wrong",))
    return (
        f"a kernel of senet_kernels is not run on this machine, PyTorch's own operators are: "
        f"{wrong}. Please report it to the project with this text: [{describe(kind)}; kernels "
        f"{kernel_hash(kind.backend)}; {facts}]. senet_kernels.trust.forget() has it tried anew."
    )


# -- by hand


def forget_answers() -> None:
    """Have the next call of each kind ask anew."""
    with _questions_lock:
        questions = list(_questions)
    for question in questions:
        question.known = {}  # another one: answers that are being found go to the old one


def forget() -> int:
    """Drop every verdict on the cards of this process, in memory and on disk: kernels are proven
    anew at their next calls. Ends :func:`freeze`.

    Returns:
        How many there were.
    """
    global _frozen, any_compiled, any_mistrusted
    with _lock:
        _frozen = False
        count = 0
        for facts in _known_environments():
            keys = {key for of, key in list(_memory) if of == facts}
            keys |= {record["key"] for record in Folder(facts).records()}
            Folder(facts).clear()
            count += len(keys)
        for table in (_memory, _later, _devices, COMPILED, MISTRUSTED):
            table.clear()
        any_compiled = any_mistrusted = False
        for names in (_loaded, _said, _begun, _waited, _ran):
            names.clear()
        forget_answers()
        return count


def freeze() -> None:
    """Pin the verdicts: from now on nothing is proven or read from disk in this process, and what
    has no verdict runs on PyTorch's own operators. For runs that are to give the same bits."""
    global _frozen
    with _lock:
        _frozen = True
        forget_answers()


def _known_environments(may_start_cuda: bool = True) -> list[Any]:
    known = {facts: None for facts, _ in list(_memory)}
    if torch.cuda.is_initialized() or (may_start_cuda and torch.cuda.is_available()):
        for i in range(torch.cuda.device_count()):
            known[environment(f"cuda:{i}")] = None
    return list(known)


class Status(tuple[Verdict, ...]):
    """Verdicts; print it to read them."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no kernel has had a verdict yet"
        return "\n".join(f"{v.name}\n    {v}" for v in self)

    __repr__ = __str__


def status() -> Status:
    """The verdicts on the cards of this process, from memory and disk."""
    return _status()


def _status(may_start_cuda: bool = True) -> Status:
    found = dict(_memory)
    for facts in _known_environments(may_start_cuda):
        for record in Folder(facts).records():
            verdict = _from_record(record)
            if verdict is not None:
                found.setdefault((facts, record["key"]), verdict)
    return Status(found.values())


def as_lines() -> list[str]:
    """For ``backends()``: how many verdicts of each state, and those that refuse a kernel. CUDA is
    not started for it: after that, no process could be forked."""
    verdicts = _status(may_start_cuda=False)
    if not verdicts:
        return []
    counts = {s: sum(v.state == s for v in verdicts) for s in (TRUSTED, SLOWER, REFUSED, UNPROVEN)}
    lines = ["verdicts on this card: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)]
    return lines + [f"  {v.name}: {v}" for v in verdicts if v.state == REFUSED]
