"""``python -m senet_kernels.train``: see ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .api import evaluate, train
from .errors import TrainError
from .options import parse


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
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
