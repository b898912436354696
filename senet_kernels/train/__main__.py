"""``python -m senet_kernels.train``: see ``--help``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from senet_kernels._command_line import command

from .api import evaluate, train
from .errors import TrainError
from .options import parse
from .parallel import under_torchrun


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 2 for what the user can put right."""
    try:
        arguments = parse(argv)
        if arguments.evaluate:
            evaluate(arguments.given)
        else:
            train(arguments.given, arguments.resume)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


def _leave(status: int) -> NoReturn:
    """End one of torchrun's processes without the interpreter's finalisation: a thread of gloo that
    still drops a tensor then would abort a process that has done all its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_status = main()
    if under_torchrun():
        _leave(exit_status)
    sys.exit(exit_status)
