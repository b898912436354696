"""``make sanitize``: the native CPU code under sanitizers and valgrind.

``address``   the library built for AddressSanitizer and UndefinedBehaviorSanitizer, and those tests
              that reach all of it, the fuzzer's calls included
``thread``    the kernels' team code under ThreadSanitizer, with std::thread instead of OpenMP,
              whose libgomp it does not understand (``tests/team/team.cpp``)
``valgrind``  the same program under memcheck

Each is left out, with the reason, where the machine has no means for it. The CUDA kernels' turn
comes in ``tests/test_cuda_on_cpu.py``. ``--record`` writes what was said to docs/sanitizers.json,
and docs/reliability.md from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tools import reliability

ROOT = reliability.ROOT
OUT = ROOT / "build" / "sanitize"
TEAM = ROOT / "tests" / "team" / "team.cpp"
KERNELS = ROOT / "csrc" / "cpu" / "kernels.cpp"
# Sanitizers take five to twenty times as long, so no large tensors; without processes of its own,
# forks and memory limits, all of which the sanitizers' own memory disturbs.
TESTS = ["test_accuracy.py", "test_errors.py", "test_layouts.py", "test_memory.py", "test_ops.py",
         "test_pointwise.py", "test_properties.py", "test_special_values.py"]  # fmt: skip
CHOSEN = "native and not cuda and not simulated"
NOT_CHOSEN = "out_of_memory or absurd or fakes or opcheck or thread_counts or same_bits or planted"


class Failure(Exception):
    """A sanitizer complained, or a test failed."""


@dataclass(frozen=True)
class Outcome:
    """What a sanitizer ran over, and what it said of it."""

    over: str
    result: str


def compiler() -> list[str]:
    candidates = [shlex.split(os.environ.get("CXX", "")), ["g++"], ["c++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), [])


def fixed_addresses() -> list[str]:
    """Sanitizers may fail to begin where addresses are drawn from a large range."""
    command = ["setarch", "-R"]
    usable = shutil.which("setarch") and not subprocess.run([*command, "true"]).returncode
    return command if usable else []


def run(command: list[str], **environment: str) -> None:
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        raise Failure(f"{shlex.join(command)} ended with {done.returncode}")


def counted(report: Path) -> str:
    """The tests that passed, and how many of the fuzzer's calls they made."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    passed = sum(
        all(child.tag not in ("skipped", "failure", "error") for child in c) for c in cases
    )
    calls = sum(
        int(p.get("value", 0))
        for case in cases
        for p in case.iter("property")
        if p.get("name") == "calls"
    )
    return f"{passed:,} tests, {calls:,} of the fuzzer's calls among them"


def address(arguments: list[str]) -> Outcome:
    """Build, preload, test."""
    kinds = "address,undefined"
    run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(OUT)],
        SENET_KERNELS_SANITIZE=kinds, SENET_KERNELS_BUILD="cpu",
    )  # fmt: skip

    def library(name: str) -> str:
        command = [*compiler(), f"-print-file-name={name}"]
        return subprocess.check_output(command, text=True).strip()

    environment = {
        # The C++ library too: what throws is intercepted at the start or not at all.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # The interpreter leaves memory to the system. An allocation that fails is a test.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "SENET_KERNELS_REQUIRE_NATIVE": "1",
    }
    python = [*fixed_addresses(), sys.executable]
    # That it is the library built here that is tested, and that the sanitizer sees its tensors.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ctypes, torch, senet_kernels as s; "
        "assert s.__file__.startswith(sys.argv[1]), s.__file__; assert s.backends()['native']; "
        "sys.argv[2:] and ctypes.memset(torch.empty(24).data_ptr() + 96, 0, 4)"
    )
    run([*python, "-c", code, str(OUT)], **environment)
    planted = subprocess.run(
        [*python, "-c", code, str(OUT), "fault"], env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if "heap-buffer-overflow" not in planted.stderr:
        raise Failure("AddressSanitizer did not see a planted fault")
    tests = arguments or [
        *(f"tests/{name}" for name in TESTS), "-m", "not slow and not gpu",
        "-k", f"({CHOSEN}) and not ({NOT_CHOSEN})",
    ]  # fmt: skip
    command = [*python, "-m", "pytest", "-q", "-x", "-o", f"pythonpath={OUT} ."]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        run([*command, *tests], **environment)
        over = counted(report)
    return Outcome(over, "clean; a planted fault is found")


def team_program(*flags: str) -> Path:
    program = OUT / f"team{''.join(flags)}".replace("=", "-")
    OUT.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++20", "-O1", "-g1", "-DSENET_ISA=baseline", "-DSENET_FEW_CASES=1"]
    common += ["-fno-math-errno", "-fno-trapping-math", "-pthread", f"-I{ROOT / 'csrc'}"]
    run([*compiler(), *common, *flags, str(KERNELS), str(TEAM), "-o", str(program)])
    return program


def calls_of(command: list[str]) -> str:
    """Run the team program to its end; what it did, in its words."""
    print("+", shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise Failure(f"{shlex.join(command)} ended with {done.returncode}")
    return f"`{TEAM.relative_to(ROOT)}`: {done.stdout.strip().splitlines()[-1]}"


def thread(_: list[str]) -> Outcome:
    program = team_program("-fsanitize=thread")
    over = calls_of([*fixed_addresses(), str(program)])
    planted = subprocess.run(
        [*fixed_addresses(), str(program), "fault"], capture_output=True, text=True
    )
    if "data race" not in planted.stderr:
        raise Failure("ThreadSanitizer did not see a planted race")
    return Outcome(over, "no data race; a planted one is found")


def valgrind(_: list[str]) -> Outcome:
    if not shutil.which("valgrind"):
        return Outcome("nothing", "left out: valgrind is not installed")
    program = team_program()
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", str(program)]
    over = calls_of([*command, "memory"])
    planted = subprocess.run([*command, "unwritten"], capture_output=True, text=True)
    if planted.returncode != 9 or "uninitialised" not in planted.stderr:
        raise Failure("valgrind did not see a planted read of what nobody wrote")
    found = "no invalid access, no use of what nobody wrote, no leak; a planted use is found"
    return Outcome(over, found)


KINDS = {"address": address, "thread": thread, "valgrind": valgrind}


def tools_of(kind: str) -> str:
    """The compiler, and valgrind, by their versions."""
    commands = [[*compiler(), "--version"], *([["valgrind", "--version"]] * (kind == "valgrind"))]
    lines = [
        subprocess.check_output(command, text=True).partition("\n")[0]
        for command in commands
        if shutil.which(command[0])
    ]
    return ", ".join(lines)


def write_down(kind: str, outcome: Outcome, commit: str, arguments: str) -> None:
    """In the record, in the place of what was there of this kind; and the page made of it."""
    path = reliability.SANITIZERS
    record = json.loads(path.read_text()) if path.exists() else {}
    # Nothing of this machine's folders.
    result = outcome.result.replace(f"{ROOT}/", "").replace(sys.executable, "python")
    tests = f" --pytest={shlex.quote(arguments)}" if arguments else ""
    record[kind] = {
        "over": outcome.over,
        "result": " ".join(result.split())[:200],
        "command": f"make sanitize ARGS='{kind}{tests}'",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "tools": tools_of(kind),
        "kernels": reliability.kernels(),
    }
    path.write_text(json.dumps({k: record[k] for k in KINDS if k in record}, indent=1) + "\n")
    reliability.PAGE.write_text(reliability.page())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--pytest", default="", help="arguments instead of the usual tests")
    parser.add_argument("--record", action="store_true", help="write the results down")
    chosen = parser.parse_args()
    unknown = set(chosen.kinds) - set(KINDS)
    if unknown:
        parser.error(f"expected {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    if chosen.record:
        reliability.refuse_uncommitted()
    commit = reliability.commit()  # of what the first kind runs, should it change meanwhile
    status = 0
    for name in chosen.kinds or KINDS:
        start = time.monotonic()
        try:
            if compiler():
                outcome = KINDS[name](shlex.split(chosen.pytest))
            else:
                outcome = Outcome("nothing", "left out: no C++ compiler")
        except Failure as error:
            outcome, status = Outcome("", f"FAILED: {error}"), 1
        seconds = time.monotonic() - start
        print(f"{name}: {outcome.result} ({outcome.over}; {seconds:.0f} s)", flush=True)
        if chosen.record:
            write_down(name, outcome, commit, chosen.pytest)
    return status


if __name__ == "__main__":
    sys.exit(main())
