"""``python -m benchmarks``: measure, report, write the record and the plot.

Exit code 0: done; 1: some provider gave a wrong result; 130: interrupted, with what there was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from .options import parse
from .plot import draw
from .problem import Case
from .run import Run


def _report(record: dict[str, Any]) -> None:
    """The tables, where there is something to draw them with."""
    if not find_spec("rich"):
        print("no tables: rich is not installed; the record has the figures", file=sys.stderr)
        return
    from rich.console import Console

    from .report import print_report

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console.width = 132  # a log has no width of its own
    print_report(record, console)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    bars: list[Any] = []

    def progress(cases: list[Case]) -> Any:
        if not find_spec("tqdm"):
            return cases
        from tqdm import tqdm

        bars.append(tqdm(cases, unit="case", dynamic_ncols=True, smoothing=0))
        return bars[-1]

    def tell(text: str) -> None:
        if bars:
            bars[-1].set_postfix_str(text)
        else:
            print(text, file=sys.stderr)

    run = Run(options, tell)
    status = "complete"
    try:
        run.run(progress)
    except KeyboardInterrupt:
        status = "interrupted"
    for bar in bars:
        bar.close()
    record = run.finish(status)

    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{options.device.type}"
    path = options.out / f"{stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    _report(record)
    plotted = draw(record, path.with_suffix(".png"))
    print(
        f"{record['elapsed_s']:.0f} s, of which torch.compile {record['compile']['seconds']:.0f} s"
    )
    print(f"written: {path}{' and .png' if plotted else ''}")
    if status == "interrupted":
        return 130
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
