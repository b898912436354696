"""``python -m benchmarks.dram RECORD.json``: what a card's counters say of calls.

Runs calls of a record of ``layers`` once more under NVIDIA's ``ncu``, some in a process, and writes
into the record the bytes that really came from and went to memory, as ``dram_bytes``, beside the
least traffic by formula; and, as ``counters``, what each kernel did: instructions, the share of
cycles in which one was issued, what warps waited for, bytes of L2, bank conflicts. Goes on where it
stopped; stops when ``--budget`` seconds are over, or after ``--most`` calls. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from senet_kernels._command_line import Parser

from . import records
from .problem import FORWARD, Case, Problem
from .providers import make_call, make_provider, one_line
from .summary import Entry, Record
from .workloads import Layer

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_WAITS = ("long_scoreboard", "short_scoreboard", "barrier", "membar", "lg_throttle", "mio_throttle",
          "math_pipe_throttle", "wait", "not_selected")  # fmt: skip
COUNTERS = (
    "gpu__time_duration.sum", "lts__t_bytes.sum", "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    *(f"smsp__average_warps_issue_stalled_{what}_per_issue_active.ratio" for what in _WAITS),
)  # fmt: skip
# Caches are left as the call itself leaves them: kernels of one call may find each other's data.
NCU = (
    "ncu", "--csv", "--print-units", "base", "--profile-from-start", "off", "--cache-control",
    "none", "--clock-control", "none", "--target-processes", "application-only", "--metrics",
)  # fmt: skip
CALLS = 8  # of a process: torch is imported, and ncu started, once for them
# Stands before each call; no provider launches it.
MARK = "spin_kernel"
_NO_PERMISSION = "ERR_NVGPUCTRPERM"


class NoCounters(RuntimeError):
    """``ncu`` did not measure; the message says why."""


Counted = dict[str, Any]  # of a kernel: its name, and values by the name of their metric


def parse(text: str) -> list[list[Counted]]:
    """For each call the kernels of it, from ncu's CSV, which stands among other lines.

    Raises:
        NoCounters: there is no table in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [re.search(rf"^=={kind}==\s*(.+)$", text, re.MULTILINE) for kind in _SAID]
        raise NoCounters(next((found[1] for found in said if found), "ncu printed no table"))
    kernels: dict[str, Counted] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = row.get("Metric Name")
        if name not in (*METRICS, *COUNTERS):
            continue
        of = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a", of what the card does not count
            continue
        if name in METRICS and row["Metric Unit"] not in ("byte", "bytes"):
            raise NoCounters(f"expected bytes, got {row['Metric Unit']!r}")
        of[name] = value
    if not kernels:
        raise NoCounters("no kernel was seen")
    calls: list[list[Counted]] = []
    for kernel in kernels.values():
        if MARK in kernel["kernel"]:
            calls.append([])
        elif not calls:
            raise NoCounters(f"{kernel['kernel']} ran before the first call")
        else:
            calls[-1].append(kernel)
    return calls


_SAID = ("ERROR", "WARNING")  # of what ncu says the most telling first


def _case(entry: dict[str, Any]) -> Case:
    fields = Layer.__dataclass_fields__
    layer = Layer(**{name: entry[name] for name in fields if name in entry})
    return Case(layer, entry["dtype"], entry["layout"], entry["batch"])


Asked = tuple[Entry, str]  # an entry of the record, and a provider


def run_calls(asked: Sequence[Asked], device: str, until: float) -> None:
    """In the child: one profiled call of each, caches cold, everything compiled before. After
    ``until``, a Unix time, none is begun: what ncu has seen it prints at the end."""
    for entry, name in asked:
        if time.time() > until:
            return
        marked = False
        try:
            problem = Problem.create(_case(entry), torch.device(device))
            call = make_call(make_provider(name).build(problem), problem, entry["mode"])
            with torch.set_grad_enabled(entry["mode"] != FORWARD):
                for _ in range(3):
                    call(0)
                if device != "cpu":
                    _cool(device)
                    marked = True
                    with _profiled():
                        call(0)
        except Exception as error:
            print(f"{entry['layer']} {name}: {one_line(error)}", file=sys.stderr)
            if device != "cpu" and not marked:  # its place among the others is kept
                with _profiled():
                    pass


def _die_with_parent() -> None:
    """On Linux: ncu may be killed, and what it runs would disturb whatever is measured next."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _cool(device: str) -> None:
    """Leave nothing of a call in L2, nor lines there that are yet to be written."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.ones(3 * size, dtype=torch.uint8, device=device)
    torch.ones_like(other)
    other.max()  # reads it: what was written last is in memory then


@contextmanager
def _profiled() -> Iterator[None]:
    """What ncu sees, behind a mark."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda._sleep(1)
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.cudart().cudaProfilerStop()


def _todo(record: Record) -> Iterator[tuple[Entry, str]]:
    """(entry, provider) without measured bytes, the contenders of every layer first."""
    late = [name for name in record["providers"] if name not in record["contenders"]]
    for names in (record["contenders"], late):
        for entry in record["results"]:
            for name in names:
                found = entry["providers"].get(name, {})
                if found.get("status") == "ok" and "dram_bytes" not in found:
                    yield entry, name


def _under_ncu(
    asked: Sequence[Asked], device: str, seconds: float, metrics: Sequence[str]
) -> list[list[Counted]]:
    begin = time.monotonic()
    words = json.dumps([
        [{k: v for k, v in entry.items() if k not in ("providers", "speedup")}, name]
        for entry, name in asked
    ])  # fmt: skip
    until = time.time() + seconds - min(10.0, seconds / 3)
    child = [sys.executable, "-m", "benchmarks.dram", "--calls", words, "--until", f"{until:.1f}",
             "--device", device]  # fmt: skip
    try:
        done = subprocess.run(
            [*NCU, ",".join(metrics), *child], capture_output=True, text=True, timeout=seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoCounters(f"took longer than {seconds:.0f} s") from None
    text = done.stdout + done.stderr
    unknown = [name for name in metrics if re.search(rf"ERROR.*\b{re.escape(name)}", text)]
    left = seconds - (time.monotonic() - begin)
    if unknown and len(unknown) < len(metrics) and left > 5:  # this card does not have them
        known = [name for name in metrics if name not in unknown]
        return _under_ncu(asked, device, left, known)
    return parse(text)


def measure(asked: Sequence[Asked], device: str, seconds: float) -> list[tuple[int, list[Counted]]]:
    """Of each call, as far as it came: bytes of memory, and what is known of each kernel.

    Twice: with more counters than the card has at once ncu repeats each kernel, and finds caches
    warm from the second time on. Raises NoCounters.
    """
    begin = time.monotonic()
    by_bytes = _under_ncu(asked, device, max(0.6 * seconds, seconds - 60.0), METRICS)
    rest = seconds - (time.monotonic() - begin)
    try:
        by_counters = _under_ncu(asked, device, rest, COUNTERS)
    except NoCounters as error:
        print(f"bytes alone: {error}", file=sys.stderr)
        by_counters = []
    found = []
    for i, kernels in enumerate(by_bytes):
        total = round(sum(k.get(name, 0.0) for k in kernels for name in METRICS))
        more = by_counters[i] if i < len(by_counters) else []
        if [k["kernel"] for k in more] == [k["kernel"] for k in kernels]:
            kernels = [a | b for a, b in zip(kernels, more, strict=True)]
        else:
            kernels = more or kernels
        found.append((total, kernels))
    return found


def fill(path: Path, device: str, budget: float, most: int = 0) -> tuple[int, str]:
    """Measure what the record lacks; how many calls, and why it ended early, if it did."""
    record, begin, count = records.read(path), time.monotonic(), 0
    todo = list(_todo(record))
    # A few are of all kinds: an odd step meets both passes and all providers.
    step = max(1, (len(todo) // most - 1) | 1) if most else 1
    todo = todo[::step][: most or None]
    failures, reason = 0, ""
    for at in range(0, len(todo), CALLS):
        asked = todo[at : at + CALLS]
        left = budget - (time.monotonic() - begin)
        if left < 5:
            return count, "time is up"
        try:
            found = measure(asked, device, left)
        except NoCounters as error:
            failures += 1
            if failures == 2 or _NO_PERMISSION in str(error):
                return count, str(error)  # it will not be otherwise for the next
            print(error, file=sys.stderr)
            reason = str(error)
            continue
        failures, reason = 0, ""
        for (entry, name), (total, kernels) in zip(asked, found, strict=False):
            if kernels:
                entry["providers"][name] |= {"dram_bytes": total, "counters": kernels}
                count += 1
        records.write(record, path)
    return count, reason if failures else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.dram", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path)
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--most", type=int, default=0, help="calls (default: all)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--calls", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.calls:
        _die_with_parent()
        run_calls(json.loads(args.calls), args.device, args.until)
        return 0
    if args.record is None:
        parser.error("a record of python -m benchmarks layers is needed")
    if shutil.which(NCU[0]) is None:
        print("dram: ncu is not on PATH", file=sys.stderr)
        return 2
    count, reason = fill(args.record, args.device, args.budget, args.most)
    print(f"{count} calls measured" + (f"; {reason}" if reason else ""))
    return 0 if count or not reason else 1


if __name__ == "__main__":
    sys.exit(main())
