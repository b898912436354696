"""What the command lines share: how they end, and checks of what was given."""

from __future__ import annotations

import argparse
import math
import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path


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
