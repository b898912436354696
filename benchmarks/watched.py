"""``python -m benchmarks.watched FILE [--stall SECONDS] -- OPTIONS``: layers, past what crashes.

Runs ``python -m benchmarks layers OPTIONS --record FILE`` in a process of its own. Where that
crashes, loses its device, or begins nothing new for some seconds, it is started again, goes on from
its record, and leaves out what was under way: a provider of a case, or a provider that does not
come through its first call. The last line says how many results there are.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.records import read_json
from senet_kernels._command_line import Parser

STALL = 20.0
START = 60.0  # seconds for Python, torch and the device, before anything is begun
BENCHMARKS = ("-m", "benchmarks", "layers")


def _age(*paths: Path) -> float:
    """Seconds since the last of the files was written."""
    return time.time() - max((p.stat().st_mtime for p in paths if p.exists()), default=0.0)


def attempt(command: Sequence[str], record: Path, under_way: Path, stall: float) -> tuple[str, int]:
    """One process: what went wrong with it, nothing where it came to its end; and its exit code."""
    under_way.write_text("")
    process = subprocess.Popen(command)
    stalled, limit = False, max(stall, START)
    try:
        while process.poll() is None and not stalled:
            time.sleep(0.1)
            limit = stall if under_way.stat().st_size else limit
            stalled = _age(record, under_way) > limit
    except KeyboardInterrupt:  # it has its own, and saves what it has
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        raise
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # one that waits for the driver may not end
            process.wait(5)
    code = -signal.SIGKILL if process.returncode is None else process.returncode
    if stalled:
        return f"nothing new for {limit:.0f} s", code
    if code < 0:
        return f"died by {signal.Signals(-code).name}", code
    ended = read_json(record).get("status") in ("complete", "interrupted") or code == 2
    return "" if ended else f"ended with status {code}", code


def _said(record: Path, left_out: dict[str, str]) -> str:
    found = read_json(record)
    missed = [n for n in found.get("not_measured", []) if f"{n}/" not in left_out]
    count = len([*found.get("results", []), *found.get("small_call", [])])
    text = f"{count} results"
    text += f"; {len(missed)} cases not measured: the time was up" if missed else ""
    return text + "".join(f"; left out {name}: {why}" for name, why in left_out.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.watched", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--stall", type=float, default=STALL, help="seconds")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds, of all processes")
    parser.add_argument("--program", help=argparse.SUPPRESS)  # in place of the benchmarks
    own = list(sys.argv[1:] if argv is None else argv)
    at = own.index("--") if "--" in own else len(own)
    given, options = parser.parse_args(own[:at]), own[at + 1 :]
    record: Path = given.record
    under_way = record.with_suffix(".part")
    begin, code = time.monotonic(), 0
    left_out: dict[str, str] = {}
    words = [sys.executable, *([given.program] if given.program else BENCHMARKS), *options]
    words += ["--record", str(record), "--under-way", str(under_way)]
    try:
        while (left := given.budget - (time.monotonic() - begin)) > 1:
            more = [word for name in left_out for word in ("--leave-out", name)]
            more += ["--budget", f"{left:.0f}"]
            wrong, last = attempt([*words, *more], record, under_way, given.stall)
            at = under_way.read_text()
            code = max(code, 1 if wrong else last)
            if not wrong:
                break
            if not at or at in left_out:  # it does not come so far, or is not to be stopped
                left_out["all that was not yet measured"] = wrong
                break
            left_out[at] = wrong
            record.with_suffix(".left-out.json").write_text(json.dumps(list(left_out)))
    finally:
        under_way.unlink(missing_ok=True)
        print(_said(record, left_out), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
