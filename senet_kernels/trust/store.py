"""Verdicts on disk: a JSON file for each, put in place by renaming, and marks of what is being
tried. No locks: two processes that both try a kernel both write the same kind of file.

Nothing here raises: what cannot be written is kept in memory by the caller, what cannot be read, or
is not whole, is not there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .kinds import digest, kernel_hash

log = logging.getLogger("senet_kernels.trust")

ENVIRONMENT_VARIABLE = "SENET_KERNELS_CACHE"

#: How a kernel is tried: in the process that calls, or in one made for it.
IN_PROCESS, IN_SUBPROCESS = "process", "subprocess"


def root() -> Path | None:
    """The folder of all verdicts; None where there is no home."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    try:
        if named:
            return Path(named, "trust")
        cache = os.environ.get("XDG_CACHE_HOME")
        return Path(cache or Path.home() / ".cache", "senet_kernels", "trust")
    except RuntimeError:  # no home
        return None


_complained: set[str] = set()


def _complain(text: str, error: OSError) -> None:
    if text not in _complained:
        _complained.add(text)
        log.warning("%s: %s; verdicts are kept in memory, for this process alone", text, error)


@functools.cache
def _name_of(environment: tuple[tuple[str, str], ...]) -> str:
    return digest(json.dumps(environment))


class Folder(NamedTuple):
    """The verdicts on one card with one set of software, see :func:`kinds.environment`."""

    environment: tuple[tuple[str, str], ...]

    @property
    def path(self) -> Path | None:
        """Where it is; it need not exist."""
        folder = root()
        return folder and folder / _name_of(self.environment)

    def read(self, key: str) -> dict[str, Any] | None:
        """The record of a kind, where there is a whole one."""
        path = self._file(key, "json")
        return None if path is None else _read(path, key)

    def write(self, key: str, record: dict[str, Any]) -> bool:
        """Keep a record; whether that was possible."""
        path = self._file(key, "json")
        if path is None:
            return False
        record = {"key": key, "environment": dict(self.environment), **record}
        text = json.dumps({**record, "sum": _sum(record)}, indent=1)
        try:
            _replace(path, text)
        except OSError as error:
            _complain(f"no verdict can be written to {path.parent}", error)
            return False
        return True

    def records(self) -> list[dict[str, Any]]:
        """All that are whole."""
        folder = self.path
        try:
            paths = sorted(folder.glob("*.json")) if folder else []
        except OSError:
            return []
        return [record for path in paths if (record := _read(path)) is not None]

    def has_right(self, backend: str) -> bool:
        """Whether a kernel of a backend, as its kernels are now, was found right here."""
        begin, end = f"{backend} ", f" {kernel_hash(backend)}"
        return any(
            record["key"].startswith(begin)
            and record["key"].endswith(end)
            and record.get("state") in ("trusted", "slower")
            for record in self.records()
        )

    def clear(self) -> None:
        """Drop all records, and all marks."""
        folder = self.path
        if folder is None:
            return
        with suppress(OSError):
            for path in list(folder.iterdir()):
                if path.suffix in (".json", ".pending"):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)

    def _file(self, key: str, end: str) -> Path | None:
        folder = self.path
        return folder and folder / f"{digest(key)}.{end}"

    # -- marks

    def claim(self, key: str, how: str) -> Mark | Owner | None:
        """Say that this process is about to try a kernel.

        Returns:
            The mark, to be released; the owner of the mark that is there already; None where no
            mark can be made.
        """
        path = self._file(key, f"{_place()}.pending")
        if path is None:
            return None
        mine = Owner(*_this_process(), how)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _create(path, json.dumps(mine._asdict())):
                return Mark(path, mine)
        except OSError as error:
            _complain(f"no mark can be made in {path.parent}", error)
            return None
        return _owner_of(path) or UNREADABLE._replace(how=how)

    def leave_mark(self, key: str, owner: Owner) -> None:
        """Put back the mark of a process that has ended."""
        path = self._file(key, f"{_place()}.pending")
        if path is not None:
            with suppress(OSError):
                _create(path, json.dumps(owner._asdict()))

    def drop_mark(self, key: str, owner: Owner) -> None:
        """Remove the mark of a process that has ended."""
        path = self._file(key, f"{_place()}.pending")
        if path is not None and _owner_of(path) == (owner if owner.boot else None):
            with suppress(OSError):
                path.unlink(missing_ok=True)


class Owner(NamedTuple):
    """Who tries a kernel: the process, by what cannot be another's after it has ended."""

    boot: str
    pid: int
    start: str
    how: str

    def is_alive(self) -> bool:
        """Whether the process runs; where that is not known, it does."""
        if self.boot != _boot():
            return not self.boot
        start = _start_of(self.pid)
        return start is None or start == self.start


#: Whose mark is not whole: it is being written, or was damaged.
UNREADABLE = Owner("", 0, "", IN_PROCESS)


class Mark(NamedTuple):
    """A mark of this process."""

    path: Path
    owner: Owner

    def release(self) -> None:
        """The kernel has been tried."""
        if _owner_of(self.path) == self.owner:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def _owner_of(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, key: str | None = None) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
        whole = record.pop("sum") == _sum(record) and isinstance(record["key"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and key in (None, record["key"]) else None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: others see the old one, or this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Write a file as a whole where there is none; whether there was none."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except (OSError, AttributeError):  # a file system, or Python, without hard links
            try:
                with open(path, "x") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


# -- this machine, this process


def _boot() -> str:
    """What tells this start of the machine from others; no clock, which may jump."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _place() -> str:
    """The host, and the names that its processes have here: those of a container are its own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return digest(f"{platform.node()} {namespace}")[:12]


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; "" if there is none, None where that
    cannot be found out."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
        return _start_without_proc(pid)
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _start_without_proc(pid: int) -> str | None:
    if os.name != "posix":
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return None
    return None


def _this_process() -> tuple[str, int, str]:
    pid = os.getpid()
    return _boot(), pid, _start_of(pid) or ""


def wait_for(folder: Folder, key: str, owner: Owner, seconds: float) -> dict[str, Any] | None:
    """The record that another process is about to write; None where it does not in time."""
    end = time.monotonic() + seconds
    while True:
        alive = owner.is_alive()
        record = folder.read(key)
        if record is not None or not alive or time.monotonic() >= end:
            return record
        time.sleep(0.02)
