"""What the command lines share: how they end, and checks of what was given."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import select
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """``main`` that Ctrl-C and an output closed by its reader end without a traceback."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()  # a closed output shows here, and not in the interpreter's end
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            if not _stdout_is_closed():
                raise  # of another pipe: to a worker, say
            # Or the interpreter would flush once more: the note on SIGPIPE in Python's docs.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return run


def _stdout_is_closed() -> bool:
    """Whether its reader is gone."""
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
    except BrokenPipeError:
        return True
    except OSError:  # in memory
        return False
    if sys.platform == "win32":
        return False
    # What failed to be written may not be kept for the flush: a long text, or without a buffer.
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line with the nearest name, and whose options have
    one spelling: without abbreviations, which a new option would make ambiguous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; an unknown one ends the process with its nearest name."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self._used(found)
            names = [name for action in parser._actions for name in action.option_strings]
            known = {name.strip("-"): name for name in names}
            given = unknown[0].partition("=")[0].strip("-")
            self.error(f"{unknown[0]}: no such option{near(given, known)}")
        return found

    def _used(self, found: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that was given, or this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = getattr(found, action.dest, None)
                return action.choices.get(chosen, self) if chosen else self
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            hint = near(str(value), names) or f", expected one of {', '.join(names)}"
            raise argparse.ArgumentError(action, f"{value!r} is no choice{hint}")

    def error(self, message: str) -> NoReturn:
        """End the process with a line."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def near(name: str, known: Iterable[str] | Mapping[str, str]) -> str:
    """``", did you mean ...?"`` with the nearest of the known names; empty without one.

    Args:
        known: names, or the names compared with, each with what to show for it.
    """
    shown = known if isinstance(known, Mapping) else {each: each for each in known}
    found = [shown[each] for each in difflib.get_close_matches(name, list(shown), n=3)]
    return f", did you mean {' or '.join(found)}?" if found else ""


def count(text: str) -> int:
    """An option's value: a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An option's value: a finite number of seconds, 0 included."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def make_writable(folder: Path) -> None:
    """Make a folder, and be sure that files can be written there.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
