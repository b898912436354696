"""``python -m benchmarks.dram RECORD.json``: bytes that really came from and went to memory.

Runs calls of a record of ``layers`` once more, each in a process of its own under NVIDIA's
``ncu``, and writes what its counters say into the record as ``dram_bytes``, beside the least
traffic by formula. Goes on where it stopped; stops when ``--budget`` seconds are over. Not yet run
on a GPU.
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
# Caches are left as the call itself leaves them: kernels of one call may find each other's data.
NCU = (
    "ncu", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS),
    "--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none",
    "--target-processes", "application-only",
)  # fmt: skip
ONE_CALL = 90.0  # seconds at most


class NoCounters(RuntimeError):
    """``ncu`` did not measure; the message says why."""


def parse(text: str) -> tuple[int, int]:
    """(bytes, kernels) from ncu's CSV, which stands among other lines.

    Raises:
        NoCounters: there is no table in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        found = re.search(r"^==(?:ERROR|WARNING)==\s*(.+)$", text, re.MULTILINE)
        raise NoCounters(found[1] if found else "ncu printed no table")
    total, kernels = 0.0, set()
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") in METRICS:
            if row["Metric Unit"] not in ("byte", "bytes"):
                raise NoCounters(f"expected bytes, got {row['Metric Unit']!r}")
            total += float(row["Metric Value"].replace(",", ""))
            kernels.add(row["ID"])
    if not kernels:
        raise NoCounters("no kernel was seen")
    return round(total), len(kernels)


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


def measure(entry: Entry, name: str, device: str, limit: float) -> int:
    """Bytes of one call. Raises NoCounters."""
    what = json.dumps({k: v for k, v in entry.items() if k not in ("providers", "speedup")})
    child = [sys.executable, "-m", "benchmarks.dram", "--call", what, "--provider", name]
    try:
        done = subprocess.run(
            [*NCU, *child, "--device", device],
            capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NoCounters(f"took longer than {limit:.0f} s") from None
    return parse(done.stdout + done.stderr)[0]


def fill(path: Path, device: str, budget: float) -> tuple[int, str]:
    """Measure what the record lacks; how many calls, and why it ended early, if it did."""
    record, begin, count = records.read(path), time.monotonic(), 0
    for entry, name in list(_todo(record)):
        left = budget - (time.monotonic() - begin)
        if left < 5:
            return count, "time is up"
        try:
            entry["providers"][name]["dram_bytes"] = measure(
                entry, name, device, min(left, ONE_CALL)
            )
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
    count, reason = fill(args.record, args.device, args.budget)
    print(f"{count} calls measured" + (f"; {reason}" if reason else ""))
    return 0 if count or not reason else 1


if __name__ == "__main__":
    sys.exit(main())
