"""Random calls for as long as one likes: ``make fuzz``, or ``python tests/fuzz.py --help``.

Each backend runs in a process of its own, with outputs and scratch memory that start as NaN. What
is wrong is made as small as it goes, printed as a command that shows it again, and written to a
corpus, whose calls the tests run on every backend.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).resolve()
CORPUS = HERE / "corpus"
ISA = "SENET_KERNELS_ISA"
# Processes by name: their backend, and what their environment has.
WORKERS: dict[str, tuple[str, dict[str, str]]] = {
    "native": ("native", {}),
    "native-avx2": ("native", {ISA: "avx2"}),
    "native-baseline": ("native", {ISA: "baseline"}),
    "simulated-cuda": ("simulated-cuda", {}),
    "triton": ("triton", {"TRITON_INTERPRET": "1"}),
    "reference": ("reference", {}),
    "native-cuda": ("native-cuda", {}),
    "triton-cuda": ("triton-cuda", {}),
}
USUAL = tuple(name for name in WORKERS if not name.endswith("-cuda") or name == "simulated-cuda")
# Drawn together: the longer, the more hypothesis remembers.
BATCH = 250
# A call may take so long (the first: with compiling) before its process is stopped.
PATIENCE = 600.0
# A process stops after so many defects.
ENOUGH = 5


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz.py", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="in all, shared evenly (default: 60)")
    add("--backends", default=",".join(USUAL), help=f"among {', '.join(WORKERS)}")
    add("--seed", type=int, help="of the first batch of calls (default: of the clock)")
    add("--corpus", type=Path, default=CORPUS / "found.jsonl", help="where what is found goes")
    add("--json", type=Path, help="a file for the summary")
    add("--reproduce", metavar="CALL", help="run one call, as printed, and nothing else")
    add("--worker", help=argparse.SUPPRESS)
    add("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def prepare() -> None:
    """As tests/conftest.py does it, before torch is there."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("SENET_KERNELS_POISON", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.install()


def reproducer(call: str, environment: dict[str, str]) -> str:
    """The command that shows it again, from the root of the repository."""
    settings = "".join(f"{name}={value} " for name, value in environment.items())
    return f"{settings}python tests/fuzz.py --reproduce {shlex.quote(call)}"


def reproduce(line: str) -> int:
    prepare()
    from random_calls import RandomCall, check_call

    try:
        checked = check_call(RandomCall.from_json(line))
    except AssertionError as error:
        print(f"wrong: {error}")
        return 1
    print("right" if checked else "nothing to compare: too near a kink")
    return 0


# ---- one process ----


class Log:
    """What a process is at, for whoever finds it dead: the call, and its numbers so far."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.state: dict[str, Any] = {"cases": 0, "discarded": 0, "found": [], "call": ""}

    def write(self) -> None:
        record = json.dumps(self.state).encode()
        os.pwrite(self.file, record + b"\n", 0)
        os.ftruncate(self.file, len(record) + 1)


def work(name: str, seconds: float, first: int, log: Log, enough: int = ENOUGH) -> None:
    """Random calls of one backend until the time is up, or enough was found."""
    prepare()
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from random_calls import BY_NAME, RandomCall, calls, check_call, plans_of

    backend, environment = WORKERS[name]
    state = log.state
    deadline = time.monotonic() + seconds
    failing: list[tuple[RandomCall, BaseException]] = []

    def check(call: RandomCall) -> None:
        if time.monotonic() > deadline and not failing:
            return
        state["call"] = call.to_json()
        log.write()
        try:
            checked = check_call(call)
        except BaseException as error:
            failing.append((call, error))
            raise
        state["cases" if checked else "discarded"] += 1

    if backend not in BY_NAME:
        sys.exit(f"{name}: no such backend here, of {', '.join(BY_NAME)}")
    strategy = calls(backend, plans_of(BY_NAME[backend]))
    for batch in itertools.count(first):
        if time.monotonic() > deadline or len(state["found"]) >= enough:
            break
        failing.clear()
        run = settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )(given(strategy)(check))
        try:
            seed(batch)(run)()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # The last that failed is the smallest.
            call, cause = failing[-1] if failing else (None, error)
            line = call.to_json() if call else ""
            message = str(cause).partition("\n")[0][:300] or type(cause).__name__
            state["found"].append({"call": line, "error": message, "batch": batch})
            print(f"{name}: {message}\n  {reproducer(line, environment)}", flush=True)
    state["call"] = ""
    log.write()


# ---- all of them ----


def supervise(name: str, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Run one process; what it did, and how it ended."""
    log = folder / f"{name}.json"
    environment = WORKERS[name][1]
    command = [sys.executable, str(SCRIPT), "--worker", name, "--log", str(log)]
    command += ["--seconds", str(seconds), "--seed", str(seed)]
    start = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | environment)
    ended = ""
    try:
        code = process.wait(seconds + PATIENCE)
        ended = "" if code == 0 else f"the process ended with {code}"
    except subprocess.TimeoutExpired:
        ended = f"no answer for {PATIENCE:.0f} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    try:
        state: dict[str, Any] = json.loads(log.read_text())
    except (OSError, ValueError):
        state = {"cases": 0, "discarded": 0, "found": [], "call": ""}
    call = state.pop("call")
    if ended:
        state["found"].append({"call": call, "error": ended})
        print(f"{name}: {ended}\n  {reproducer(call, environment)}", flush=True)
    return state | {"worker": name, "seconds": round(time.monotonic() - start), "seed": seed}


def remember(found: list[dict[str, Any]], corpus: Path) -> None:
    corpus.parent.mkdir(parents=True, exist_ok=True)
    known = (
        [json.loads(line) for line in corpus.read_text().splitlines()] if corpus.exists() else []
    )
    calls = [{n: v for n, v in case.items() if n != "note"} for case in known]
    with corpus.open("a") as file:
        for case in found:
            call = json.loads(case["call"] or "{}")
            if call and call not in calls:
                calls.append(call)
                note = f"{date.today().isoformat()}: {case['error']}"
                file.write(json.dumps(call | {"note": note}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    if chosen.reproduce:
        return reproduce(chosen.reproduce)
    if chosen.worker:
        work(chosen.worker, chosen.seconds, chosen.seed, Log(chosen.log))
        return 0
    names = chosen.backends.split(",")
    unknown = set(names) - set(WORKERS)
    if unknown:
        sys.exit(f"--backends: expected {', '.join(WORKERS)}, got {', '.join(sorted(unknown))}")
    seed = int(time.time()) % 10**6 * 1000 if chosen.seed is None else chosen.seed
    done = []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            share = chosen.seconds / len(names)
            # Other calls for each.
            done.append(supervise(name, share, seed + 1_000_000 * i, Path(folder)))
            row = done[-1]
            print(
                f"{name:16} {row['cases']:7} calls {row['discarded']:5} discarded "
                f"{row['seconds']:5} s  {len(row['found'])} wrong  (seed {row['seed']})",
                flush=True,
            )
    found = [case for row in done for case in row["found"]]
    remember(found, chosen.corpus)
    if chosen.json:
        chosen.json.write_text(json.dumps(done, indent=1) + "\n")
    print(f"{sum(row['cases'] for row in done)} calls, {len(found)} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
