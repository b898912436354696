"""``python -m benchmarks [layers|models|sweep|report|targets]``: measure, write records, report.

Without a word it is ``layers``. Exit code 0: done; 1: some provider gave a wrong result; 2: an
option cannot be what it is; 130: interrupted, with what there was.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from senet_kernels._command_line import command, make_writable

from . import extras, records
from .bench import Bench
from .layer_run import LayerRun
from .model_run import ModelRun
from .options import parse
from .plots import draw
from .sweep import SweepRun

RUNS: dict[str, Any] = {"layers": LayerRun, "models": ModelRun, "sweep": SweepRun}
USAGE = """usage: python -m benchmarks [layers|models|sweep|report|targets] [options]

  layers  isolated layers of real networks (the default)
  models  whole networks: training step and inference, and the price of SE
  sweep   one layer, its batch, channels, positions and hidden width growing
  report  tables, CSV, plots and one HTML page from records
  targets what the GPU kernels are to reach, and whether records say they do

python -m benchmarks COMMAND --help lists the options.
"""


def tables(record: dict[str, Any]) -> None:
    """The tables, where there is something to draw them with."""
    if extras.why_left_out("tables") is not None:
        return
    from rich.console import Console

    from .tables import print_report

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = 132  # a log has no width of its own
    print_report(record, console)


def _earlier(path: Path) -> dict[str, Any] | None:
    """The record that a new one is to go on from or replace, if it is there.

    Raises:
        InvalidRecord: something else is.
        OSError: no record can be written there.
    """
    make_writable(path.parent)
    if not path.exists():
        return None
    if not path.is_file():  # reading a pipe would wait
        raise records.InvalidRecord(f"{path}: not a regular file")
    return records.read(path)


def _resume(run: Bench, old: dict[str, Any], path: Path) -> None:
    if differs := run.resume(old):
        print(f"replaces {path}, which differs in {', '.join(differs)}", file=sys.stderr)
    else:
        print(f"goes on from {path}: {len(run.record['results'])} results", file=sys.stderr)


def measure(kind: str, argv: Sequence[str]) -> int:
    """One run of ``kind``; the exit code."""
    options = parse(kind, argv)
    extras.announce("progress bar", "tables", "plots")
    bars: list[Any] = []

    def progress(cases: list[Any]) -> Any:
        if extras.why_left_out("progress bar") is not None:
            return cases
        from tqdm import tqdm

        bars.append(tqdm(cases, unit="case", dynamic_ncols=True, smoothing=0))
        return bars[-1]

    def tell(text: str) -> None:
        if bars:
            bars[-1].set_postfix_str(text)
        else:
            print(text, file=sys.stderr)

    name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{options.device.type}-{kind}.json"
    path = options.record or options.out / name
    try:
        old = _earlier(path)
    except OSError as error:
        flag = "--record" if options.record else "--out"
        print(f"{flag}: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except records.InvalidRecord as error:
        print(f"--record: expected a record or a new file, got {error}", file=sys.stderr)
        return 2
    run: Bench = RUNS[kind](options, tell, lambda record: records.write(record, path))
    if old is not None:
        _resume(run, old, path)
    status = "complete"
    try:
        run.run(progress)
    except KeyboardInterrupt:
        status = "interrupted"
    for bar in bars:
        bar.close()
    record = run.finish(status)
    records.write(record, path)
    watched = getattr(options, "under_way", None) is not None
    if not watched:
        tables(record)
    plotted = [] if watched else draw(record, path)
    unfinished = ", ".join(run.unfinished())
    print(
        f"{len(record['results'])} results in {record['elapsed_s']:.0f} s, "
        f"{record['compile']['seconds']:.0f} s of them torch.compile"
        + (f"; {unfinished}: the time was up" if unfinished else "")
    )
    print(f"written: {', '.join(map(str, [path, *plotted]))}")
    if status == "interrupted":
        return 130
    return 1 if run.wrong else 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    kind = words.pop(0) if words and not words[0].startswith("-") else "layers"
    if kind == "report":
        from .page import main as report

        return report(words)
    if kind == "targets":
        from .targets import main as targets

        return targets(words)
    if kind not in RUNS:
        print(f"command: unknown {kind!r}\n{USAGE}", file=sys.stderr)
        return 2
    if words == ["--help"] and kind == "layers":
        print(USAGE)
    return measure(kind, words)


if __name__ == "__main__":
    sys.exit(main())
