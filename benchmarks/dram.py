"""``python -m benchmarks.dram RECORD.json``: what a card's counters say of calls.

Runs calls of a record of ``layers`` once more, each in a process of its own under NVIDIA's
``ncu``, and writes into the record the bytes that really came from and went to memory, as
``dram_bytes``, beside the least traffic by formula; and, as ``counters``, what each kernel did:
instructions, the share of cycles in which one was issued, what warps waited for, bytes of L2, bank
conflicts. Goes on where it stopped; stops when ``--budget`` seconds are over, or after ``--most``
calls. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from senet_kernels._command_line import Parser

from . import records
from .problem import FORWARD, Case, Problem
from .providers import make_call, make_provider
from .summary import Entry, Record
from .workloads import Layer

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_WAITS = ("long_scoreboard", "short_scoreboard", "barrier", "membar", "lg_throttle", "mio_throttle",
          "math_pipe_throttle", "wait", "not_selected")  # fmt: skip
COUNTERS = (
    *METRICS, "gpu__time_duration.sum", "lts__t_bytes.sum", "smsp__inst_executed.sum",
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
ONE_CALL = 90.0  # seconds at most


class NoCounters(RuntimeError):
    """``ncu`` did not measure; the message says why."""


def parse(text: str) -> tuple[int, list[dict[str, Any]]]:
    """Bytes, and what is known of each kernel, from ncu's CSV, which stands among other lines.

    Raises:
        NoCounters: there is no table in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        found = re.search(r"^==(?:ERROR|WARNING)==\s*(.+)$", text, re.MULTILINE)
        raise NoCounters(found[1] if found else "ncu printed no table")
    total = 0.0
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = row.get("Metric Name")
        if name not in COUNTERS:
            continue
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a", of what the card does not count
            continue
        if name in METRICS:
            if row["Metric Unit"] not in ("byte", "bytes"):
                raise NoCounters(f"expected bytes, got {row['Metric Unit']!r}")
            total += value
        kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})[name] = value
    if not kernels:
        raise NoCounters("no kernel was seen")
    return round(total), list(kernels.values())


def _case(entry: dict[str, Any]) -> Case:
    fields = Layer.__dataclass_fields__
    layer = Layer(**{name: entry[name] for name in fields if name in entry})
    return Case(layer, entry["dtype"], entry["layout"], entry["batch"])


def one_call(entry: dict[str, Any], name: str, device: str) -> None:
    """In the child: one profiled call of a provider, caches cold, everything compiled before."""
    problem = Problem.create(_case(entry), torch.device(device))
    call = make_call(make_provider(name).build(problem), problem, entry["mode"])
    with torch.set_grad_enabled(entry["mode"] != FORWARD):
        for _ in range(3):
            call(0)
        if device == "cpu":
            call(0)
            return
        size = torch.cuda.get_device_properties(device).L2_cache_size
        torch.empty(3 * size, dtype=torch.uint8, device=device).fill_(1)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call(0)
        torch.cuda.synchronize()
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


def measure(
    entry: Entry, name: str, device: str, limit: float, metrics: Sequence[str] = COUNTERS
) -> tuple[int, list[dict[str, Any]]]:
    """Of one call, see :func:`parse`. Raises NoCounters."""
    what = json.dumps({k: v for k, v in entry.items() if k not in ("providers", "speedup")})
    child = [sys.executable, "-m", "benchmarks.dram", "--call", what, "--provider", name]
    try:
        done = subprocess.run(
            [*NCU, ",".join(metrics), *child, "--device", device],
            capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoCounters(f"took longer than {limit:.0f} s") from None
    text = done.stdout + done.stderr
    if "find metric" in text and metrics != METRICS:  # one that this card does not have
        return measure(entry, name, device, limit, METRICS)
    return parse(text)


def fill(path: Path, device: str, budget: float, most: int = 0) -> tuple[int, str]:
    """Measure what the record lacks; how many calls, and why it ended early, if it did."""
    record, begin, count = records.read(path), time.monotonic(), 0
    todo = list(_todo(record))
    # A few are of all kinds: an odd step meets both passes and all providers.
    step = max(1, (len(todo) // most - 1) | 1) if most else 1
    for entry, name in todo[::step]:
        left = budget - (time.monotonic() - begin)
        if left < 5:
            return count, "time is up"
        if most and count == most:
            break
        try:
            found = measure(entry, name, device, min(left, ONE_CALL))
            entry["providers"][name] |= dict(zip(("dram_bytes", "counters"), found, strict=True))
        except NoCounters as error:
            if count == 0:
                return 0, str(error)  # it will not be otherwise for the next
            print(f"{entry['layer']} {name}: {error}", file=sys.stderr)
            continue
        count += 1
        records.write(record, path)
    return count, ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.dram", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path)
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--most", type=int, default=0, help="calls (default: all)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.call:
        one_call(json.loads(args.call), args.provider, args.device)
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
