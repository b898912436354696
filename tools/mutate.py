"""``make mutants``: does the suite notice when a kernel is wrong?

``python -m tools.mutate [--seed 1] [--count 14] [--backend triton cuda cpu] [--only ID ...]``

Draws small changes of the kernels from :mod:`tools.mutation_sites`, evenly over kinds of change and
files. Each is made in a copy of the tree, built as cheaply as can be, and met by the suite, the
part that is about this backend first, up to the first failure. The same seed draws the same mutants
of the same text; ``--only ID`` runs those named, ``--list`` shows what would be drawn.

Not counted, but replaced by the next in line: what the compiler refuses, and what it makes the very
same machine code of (Papadakis et al., "Trivial Compiler Equivalence", ICSE 2015).

Triton's kernels run in its interpreter, CUDA's on the simulation in ``tests/simt``, C++ as one
instruction set at -O1. A mutant is killed when a test fails or the process dies or takes more than
three times the processor time of the unchanged tree.

Results so far are kept in the record, and killed mutants of unchanged kernels are not run again;
``--fresh`` forgets them. Exit code 0: at least ``--least`` of the mutants were killed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.mutation_sites import FILES, ROOT, Mutant, sites, text_hash

RECORD = ROOT / "docs" / "mutants.json"
LEAST = 0.95
WALL_LIMIT = 3600  # for what waits for ever; what works for ever is limited by processor time

_KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in ("accuracy", "pointwise", "layouts", "special_values", "autocast", "guard_pages")
]
_MORE_TESTS = [f"tests/test_{name}.py" for name in ("ops", "gradcheck", "budgets")]
_GATE = ["-m", "not slow and not gpu"]
_SLOW = ["-m", "slow and not gpu"]
_OF_CPU = ["-k", "native and not simulated"]
_OF_CUDA = ["-k", "simulated"]
# It knows the kernels by their text, and would notice any change, right or wrong.
_NOT_THE_PAGE = ["--ignore=tests/test_reliability.py"]


@dataclass(frozen=True)
class Stage:
    """A part of the suite, in the order in which a mutant meets them."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


_SIMULATED = ("tests/test_cuda_on_cpu.py", "tests/test_cuda_on_cpu_lean.py")
_INTERPRETED = {"TRITON_INTERPRET": "1"}
#: What each backend's mutants meet. The slow tests, where asked for, are for those that the gate
#: lets live.
STAGES = {
    "triton": [
        Stage("gate", [*_GATE, *_KERNEL_TESTS, *_MORE_TESTS, "tests/test_triton.py"], _INTERPRETED),
        Stage("gate", [*_GATE, "tests/test_triton_compile.py"], {}),
        Stage("slow", [*_SLOW, "tests/test_triton.py", *_KERNEL_TESTS], _INTERPRETED),
    ],
    "cuda": [
        Stage("gate", [*_GATE, *_OF_CUDA, *_KERNEL_TESTS, *_MORE_TESTS], {}),
        Stage("gate", [*_GATE, "-k", "not sanit", *_SIMULATED], {}),
        Stage("gate", [*_GATE, "-k", "clean_under_sanit", "tests/test_cuda_on_cpu.py"], {}),
        Stage("slow", [*_SLOW, *_OF_CUDA, *_KERNEL_TESTS], {}),
    ],
    "cpu": [
        Stage("gate", [*_GATE, *_OF_CPU, *_KERNEL_TESTS, *_MORE_TESTS], {}),
        # torch.compile would take the flag for a part of the compiler's name, see Tree.run.
        Stage(
            "gate",
            [*_GATE, *_NOT_THE_PAGE, *_OF_CPU, "tests"],
            {"CXX": os.environ.get("CXX") or "g++"},
        ),
        Stage("slow", [*_SLOW, *_OF_CPU, *_KERNEL_TESTS], {}),
    ],
}

# Compiles the simulation; objects that the kernels are not part of come from the unchanged tree.
_BUILD_SIMULATION = """
import pathlib, shutil, sys
import build, cuda_on_cpu
make, kept = build._make, pathlib.Path("build/unchanged")
def reuse(target, command):
    source = target.name.rsplit("-", 1)[0]
    if target.suffix == ".o" and not source.endswith(".cu") and (kept / source).exists():
        shutil.copy(kept / source, target)
    else:
        make(target, command)
build._make = reuse
cuda_on_cpu.compile_library()
"""


class DoesNotCompile(Exception):
    pass


class Tree:
    """A copy of the sources, to be changed and built."""

    def __init__(self, root: Path, isa: str) -> None:
        self.root = root
        self.isa = isa  # of the C++ mutants

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        # Warnings are not what is tested here.
        compiler = {"CXX": f"{os.environ.get('CXX') or 'g++'} -w"}
        return subprocess.run(
            command, cwd=self.root, text=True, capture_output=True,
            env={**os.environ, **compiler, **environment},
        )  # fmt: skip

    def build(self, backend: str) -> str:
        """Build what the backend's kernels are in; a hash of their code.

        Raises:
            DoesNotCompile: with the compiler's words.
        """
        if backend == "cuda":
            shutil.rmtree(self.root / "build" / "simt", ignore_errors=True)
            command = [sys.executable, "-c", _BUILD_SIMULATION]
            self._must(self.run(command, PYTHONPATH=f"tests:tests/simt:{self.root}"))
            objects = sorted((self.root / "build" / "simt").glob("*.cu-*.o"))
        elif backend == "cpu":
            ninja = [sys.executable, "-m", "ninja", "-f", "build/native/build.ninja", "-t"]
            kernels = f"build/native/cpu_{self.isa}.o"
            for target in (kernels, "build/native/_native.so"):
                # The last command alone: the other instruction sets stay as they are.
                listed = self.run([*ninja, "commands", target]).stdout.splitlines()
                self._must(self.run(shlex.split(listed[-1])))
            library = next((self.root / "senet_kernels").glob("_native*.so"))
            library.unlink()
            shutil.copy(self.root / "build/native/_native.so", library)
            objects = [self.root / kernels]
        else:
            objects = [self.root / path for path in FILES[backend]]
        return hashlib.sha256(b"".join(path.read_bytes() for path in objects)).hexdigest()

    @staticmethod
    def _must(done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode:
            raise DoesNotCompile(done.stderr[-2000:])

    def test(self, stage: Stage, cpu_limit: float | None = None) -> tuple[str | None, float]:
        """What failed first, None where nothing did; and the processor time taken."""
        environment = {
            "OMP_NUM_THREADS": "1", "SENET_KERNELS_ISA": self.isa, "PYTHONPATH": str(self.root),
            "TORCHINDUCTOR_CACHE_DIR": str(self.root / "build" / "inductor"),
            **stage.environment,
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if cpu_limit is not None:
            command = ["prlimit", f"--cpu={int(cpu_limit)}", *command]
        # `timeout` and not Python's: it ends what pytest has started, too.
        command = ["timeout", "--foreground", "-s", "KILL", str(WALL_LIMIT), *command]
        done = self.run([*command, *stage.arguments], **environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if done.returncode == 0:
            return None, spent
        found = re.search(r"^(?:FAILED|ERROR) (\S+?::\S+(?:\[[^\n]*?\])?)(?: - |$)", done.stdout,
                          re.MULTILINE)  # fmt: skip
        if found:
            return found[1], spent
        if done.returncode < 0 or done.returncode >= 128:
            number = -done.returncode if done.returncode < 0 else done.returncode - 128
            what = {9: "out of time", 24: "out of time", 11: "segmentation fault", 6: "abort"}
            return what.get(number, f"signal {number}"), spent
        return (
            f"pytest ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}",
            spent,
        )


#: The instruction set that C++ mutants are compiled for: this one takes a third of the time that
#: AVX2 takes, of the same text but for vec.h.
ISA = "baseline"


def draw(backend: str, seed: int) -> Iterator[Mutant]:
    """All mutants of a backend in random order, kinds and, within a kind, files taking turns."""
    generator = random.Random(f"{seed}:{backend}")
    kinds: dict[str, dict[str, list[Mutant]]] = {}
    for mutant in sites(backend):
        kinds.setdefault(mutant.kind, {}).setdefault(mutant.path, []).append(mutant)
    queues = []
    for files in kinds.values():
        turns = list(files.values())
        generator.shuffle(turns)
        for mutants in turns:
            generator.shuffle(mutants)
        longest = max(map(len, turns))
        queues.append([turn[i] for i in range(longest) for turn in turns if i < len(turn)])
    generator.shuffle(queues)
    for i in range(max(map(len, queues))):
        yield from (queue[i] for queue in queues if i < len(queue))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


class Run:
    """One run: trees, what the unchanged tree does, and the record."""

    def __init__(
        self, out: Path, jobs: int, record: Path, fresh: bool, slow: bool, isa: str
    ) -> None:
        self.out = out
        self.isa = isa
        self.slow = slow
        self.record = record
        self.lock = threading.Lock()
        self.baseline_lock = threading.Lock()
        self.baselines: dict[tuple[str, int], float] = {}
        old = json.loads(record.read_text()) if record.exists() and not fresh else {}
        self.results: dict[str, dict[str, Any]] = {r["id"]: r for r in old.get("mutants", ())}
        self.discarded: dict[str, dict[str, Any]] = {r["id"]: r for r in old.get("discarded", ())}
        self.trees = [Tree(out / f"tree{i}", isa) for i in range(jobs)]
        self.free = list(self.trees)
        self.unchanged = Tree(out / "unchanged", isa)
        self.codes: dict[str, str] = {}
        self.known = {mutant.id: mutant for backend in FILES for mutant in sites(backend)}

    def prepare(self, backends: list[str]) -> None:
        """A copy of the tree with what is built of it, and a copy of that for each job; of an
        earlier run's, the builds are kept while the sources are the same."""
        stamp = self.out / "built.json"
        built = json.loads(stamp.read_text()) if stamp.exists() else {}
        sources = sorted([*ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/simt/**/*.*")])
        sources += [ROOT / "setup.py", *(ROOT / path for paths in FILES.values() for path in paths)]
        key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        if built.get("key") != key or not set(backends) <= set(built["codes"]):
            shutil.rmtree(self.out, ignore_errors=True)
            built = {}
        listed = _git("ls-files", "-co", "--exclude-standard").splitlines()
        trees = [self.unchanged, *self.trees] if built else [self.unchanged]
        for tree, name in ((tree, name) for tree in trees for name in listed):
            if (ROOT / name).is_file():
                target = tree.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        if built:
            self.codes = built["codes"]
            if built["isa"] != self.isa and "cpu" in backends:
                self.codes["cpu"] = self.unchanged.build("cpu")
                stamp.write_text(json.dumps(built | {"isa": self.isa}))
            return
        print("building the unchanged tree", flush=True)
        done = self.unchanged.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            SENET_KERNELS_BUILD="cpu", SENET_KERNELS_CXXFLAGS="-O1",
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        if "cuda" in backends:
            self.unchanged.build("cuda")
            kept = self.unchanged.root / "build" / "unchanged"
            kept.mkdir()
            for path in (self.unchanged.root / "build" / "simt").glob("*.o"):
                shutil.copy(path, kept / path.name.rsplit("-", 1)[0])
        for backend in backends:
            self.codes[backend] = self.unchanged.build(backend)
        for tree in self.trees:
            shutil.copytree(self.unchanged.root, tree.root)
        stamp.write_text(json.dumps({"key": key, "isa": self.isa, "codes": self.codes}))

    def limit(self, backend: str, number: int) -> float:
        """The processor time a stage may take: a multiple of what the unchanged tree takes, which
        must pass."""
        with self.baseline_lock:
            if (backend, number) not in self.baselines:
                failed, spent = self.unchanged.test(STAGES[backend][number])
                if failed:
                    raise SystemExit(
                        f"the unchanged tree fails {STAGES[backend][number]}: {failed}"
                    )
                print(f"unchanged, {backend}, stage {number + 1}: {spent:.0f} s", flush=True)
                self.baselines[backend, number] = spent
            return 60 + 3 * self.baselines[backend, number]

    def meet(self, mutant: Mutant) -> bool:
        """Build and test a mutant; whether it counts."""
        known = self.results.get(mutant.id)
        text = text_hash(mutant.backend)
        if known and known["killed"] and known["text"] == text:
            return True
        if self.discarded.get(mutant.id, {}).get("text") == text:
            return False
        with self.lock:
            tree = self.free.pop()
        path = tree.root / mutant.path
        original = path.read_text()
        entry: dict[str, Any] = {
            "id": mutant.id, "backend": mutant.backend, "kind": mutant.kind, "text": text,
            "source": original.splitlines()[mutant.line - 1].strip(),
        }  # fmt: skip
        try:
            path.write_text(mutant.applied(original))
            entry |= self._fate(mutant.backend, tree)
        finally:
            path.write_text(original)
            with self.lock:
                self.free.append(tree)
        if known and known.get("explanation"):
            entry["explanation"] = known["explanation"]
        with self.lock:
            (self.discarded if "why" in entry else self.results)[mutant.id] = entry
            self.write()
        fate = entry.get("why") or entry.get("by") or "SURVIVED"
        print(f"{mutant.id}  {mutant.kind}: {fate}", flush=True)
        return "why" not in entry

    def _fate(self, backend: str, tree: Tree) -> dict[str, Any]:
        began = time.monotonic()
        try:
            code = tree.build(backend)
        except DoesNotCompile as error:
            first = re.search(r"error: .*", str(error))
            return {"why": "does not compile", "message": first[0][:160] if first else ""}
        if code == self.codes[backend]:
            return {"why": "same machine code"}
        for number, stage in enumerate(STAGES[backend]):
            if stage.name == "slow" and not self.slow:
                continue
            failed, _ = tree.test(stage, self.limit(backend, number))
            if failed:
                seconds = round(time.monotonic() - began)
                return {"killed": True, "stage": stage.name, "by": failed, "seconds": seconds}
        return {"killed": False, "seconds": round(time.monotonic() - began)}

    def take(self, candidates: Iterator[Mutant], count: int) -> None:
        """Of the candidates in order, until ``count`` of them count."""
        lock, open_or_counted = threading.Lock(), 0

        def work() -> None:
            nonlocal open_or_counted
            while True:
                with lock:
                    if open_or_counted >= count:
                        return
                    mutant = next(candidates, None)
                    if mutant is None:
                        return
                    open_or_counted += 1
                if not self.meet(mutant):
                    with lock:
                        open_or_counted -= 1

        with ThreadPoolExecutor(len(self.trees)) as pool:
            for job in as_completed([pool.submit(work) for _ in self.trees]):
                if job.exception():  # the others finish what they have begun
                    candidates = iter(())
                    print(job.exception(), flush=True)
                job.result()

    def write(self) -> None:
        """The record; only mutants of the kernels as they are now."""
        now = {backend: text_hash(backend) for backend in FILES}

        def current(entries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
            kept = [e for e in entries.values() if e["text"] == now[e["backend"]]]
            for e in kept:
                mutant = self.known[e["id"]]
                e |= {"before": _one_line(mutant.before), "after": _one_line(mutant.after)}
            return sorted(kept, key=lambda e: (list(FILES).index(e["backend"]), e["id"]))

        record = {
            "command": f"python -m tools.mutate {shlex.join(sys.argv[1:])}".strip(),
            "date": datetime.date.today().isoformat(),
            "commit": _git("rev-parse", "--short=12", "HEAD"),
            "python": sys.version.split()[0],
            "compiler": subprocess.check_output(["g++", "--version"], text=True).partition("\n")[0],
            "mutants": current(self.results),
            "discarded": current(self.discarded),
        }
        new = self.record.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1) + "\n")
        new.replace(self.record)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=14, help="mutants per backend")
    parser.add_argument("--backend", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--only", nargs="+", metavar="ID", help="these mutants alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--least", type=float, default=LEAST, help="share that must be killed")
    parser.add_argument("--isa", choices=("baseline", "avx2", "avx512"), default=ISA)
    parser.add_argument("--slow", action="store_true", help="the suite's slow tests, too")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--list", action="store_true", help="show what is drawn first, run nothing")
    options = parser.parse_args()

    if options.list:
        for backend in options.backend:
            drawn = draw(backend, options.seed)
            for _ in range(options.count):
                mutant = next(drawn)
                print(f"{mutant.id}  {mutant.kind}: {mutant.before} -> {mutant.after or 'nothing'}")
        return 0
    chosen: dict[str, list[Mutant]] = {}
    if options.only:
        for mutant in (m for backend in FILES for m in sites(backend)):
            if mutant.id in options.only:
                chosen.setdefault(mutant.backend, []).append(mutant)
        unknown = set(options.only) - {m.id for ms in chosen.values() for m in ms}
        if unknown:
            raise SystemExit(f"no such mutants, of these kernels: {', '.join(sorted(unknown))}")
    backends = list(chosen) or options.backend
    run = Run(
        options.out.resolve(),
        options.jobs,
        options.record,
        options.fresh,
        options.slow,
        options.isa,
    )
    run.prepare(backends)
    for backend in backends:
        if options.only:
            for mutant in chosen[backend]:
                run.results.pop(mutant.id, None)
            run.take(iter(chosen[backend]), len(chosen[backend]))
        else:
            run.take(draw(backend, options.seed), options.count)
    run.write()
    entries = json.loads(options.record.read_text())["mutants"]
    killed = sum(e["killed"] for e in entries)
    print(f"{killed} of {len(entries)} killed")
    return 0 if killed >= options.least * len(entries) else 1


if __name__ == "__main__":
    sys.exit(main())
