"""``make gpu``: what this repository can find out on a machine with a GPU, within a budget.

``python -m tools.gpu --out FOLDER --budget SECONDS [--only GROUP] [-- ARGUMENTS OF THE LAYERS]``

Stages run one after another, the most valuable first, each in processes of its own with a time
limit and a log in the folder; one that fails or hangs does not stop the next. What a stage needs
and does not find makes it *skipped*, with the reason. ``summary.json`` and ``summary.txt`` are
renewed after every stage, so that they are true whenever the run is cut off.

Run again with the same folder, it goes on: stages that were ok are kept, and within a stage the
tests that passed and the cases that were measured. So several calls of ten minutes answer what one
cannot, and ``--only``, with a group (tests, sanitizers, figures, networks) or a stage, says what
the next is for: the budget is then theirs. ``--fresh``, or any change of the sources, the device or
torch, begins anew. ``targets.md`` has the figures that are wanted, and which are missing.
``--device cpu`` is a dry run: every stage, with a small task for the CPU in place of the GPU's. It
proves the stages, not the kernels.

Needs nothing but Python here, torch in the stages, no network, and installs nothing. Exit code 0:
no stage failed (some may have been skipped); 1: one failed or ran out of time; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from tools.stage_runner import (
    GRACE,
    RECORDS,
    ROOT,
    Runner,
    SkipStage,
    Stage,
    Task,
    no_gpu,
    read_environment,
    take_up,
)

# Those with kernels for a GPU, and compute-sanitizer's tools, in the order of their value.
BACKENDS = ("triton", "native")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# Kept back for the targets and for the report at the end.
TARGETS = 10.0
REPORT = 30.0

TESTS, SANITIZING, FIGURES, NETWORKS = "tests", "sanitizers", "figures", "networks"
GROUPS = (TESTS, SANITIZING, FIGURES, NETWORKS)
BUILD_RECORD = ROOT / "senet_kernels" / "_build.json"

# Records of layers: every layer of every network in both layouts, first without torch.compile,
# which takes seconds per case.
_PROVIDERS = ("eager-conv", "eager-linear", "compile-max", *BACKENDS)
_EVERY_LAYER = ("--network", "all", "--rounds", "10", "--compile-last",
                *(word for name in _PROVIDERS for word in ("--provider", name)))  # fmt: skip
_MODES = ("--mode", "forward", "--mode", "backward", "--mode", "forward+backward")
LAYER_RECORDS = {
    "layers": (*_EVERY_LAYER, "--dtype", "bf16", "--batch", "256"),
    "batch-1": (*_EVERY_LAYER, "--dtype", "bf16", "--dtype", "fp16", "--dtype", "fp32",
                "--batch", "1"),
    "types": (*_EVERY_LAYER, "--dtype", "fp16", "--dtype", "fp32", "--batch", "256"),
    "neighbours": (*_EVERY_LAYER, "--dtype", "bf16", "--batch", "256", "--neighbours"),
}  # fmt: skip
_SMALL_LAYERS = ("--network", "lc0_10x128", "--batch", "1", "--layout", "contiguous",
                 "--provider", "eager-linear", "--provider", "native")  # fmt: skip
DRY_NOTE = "dry run: small tasks on the CPU in place of the GPU's"


def _need(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise SkipStage(f"not installed: {', '.join(missing)}")


def _tool(name: str) -> str:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(name) or (shutil.which(f"{home}/bin/{name}") if home else None)
    if found is None:
        raise SkipStage(f"{name} is not on PATH")
    return found


def _why_no_cuda_kernels() -> str | None:
    """What the record of the build says; None where they were built, or it is not known."""
    try:
        record = json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return "it was never built here"
    if "cuda" in record:
        return None
    return str(record.get("cuda_reason") or record.get("reason"))


def _build_conclusion(log: str) -> str:
    """What was built and what was not, from the record at the end of the log."""
    found = re.search(r"^\{$.*^\}$", log, re.MULTILINE | re.DOTALL)
    if not found:
        return ""
    record = json.loads(found[0])
    cpu = " ".join(record["isas"]) if "isas" in record else f"not built: {record['reason']}"
    cuda = record.get("cuda") or f"not built: {record['cuda_reason']}"
    return f"cpu: {cpu}; cuda: {cuda}"


def _pytest_conclusion(log: str) -> str:
    found = re.findall(r"^=+ (.*\b(?:passed|failed|skipped|errors?|deselected|ran)\b.*?) =+$", log,
                       re.MULTILINE)  # fmt: skip
    return found[-1] if found else ""


def _no_test_passed(log: str) -> bool:
    """Whether all were skipped, say, because Triton is not installed."""
    return not re.search(r"\b\d+ passed\b", _pytest_conclusion(log))


def _benchmark_conclusion(log: str) -> str:
    found = re.findall(r"^\d+ (?:results in|calls measured).*$", log, re.MULTILINE)
    return found[-1] if found else ""


def _time_was_up(log: str) -> bool:
    return bool(re.search(r"time (?:is|was) up", _benchmark_conclusion(log)))


def _targets_conclusion(log: str) -> str:
    found = re.findall(r"^\d+ of \d+ targets met.*$", log, re.MULTILINE)
    return found[-1] if found else ""


def _sanitizer_conclusion(log: str) -> str:
    found = re.findall(r"^=+ (.*SUMMARY:.*)$", log, re.MULTILINE)
    return found[-1] if found else ""


def _sanitizer_fault(log: str) -> bool:
    """Whether it found something, or did not come to a conclusion (a device it does not support,
    say, which leaves the exit code 0)."""
    return not re.search(r"SUMMARY: 0 (errors|hazards)", log)


class Stages:
    """The stages of this repository, on a GPU or, ``dry``, with small tasks on the CPU."""

    def __init__(self, out: Path, arguments: Sequence[str] = (), *, dry: bool = False) -> None:
        self.out, self.arguments, self.dry = out, list(arguments), dry
        self.python = sys.executable
        inherited = os.environ.get("PYTHONPATH")
        self.path = {
            "PYTHONPATH": str(ROOT) + (os.pathsep + inherited if inherited else ""),
            # Stages try the kernels themselves, and measure those that are wrong or slow too.
            "SENET_KERNELS_GPU": "trust",
        }
        # Kernels on CPU tensors run in Triton's interpreter.
        self.of_kernels = {**self.path, **({"TRITON_INTERPRET": "1"} if dry else {})}
        self.device = "cpu" if dry else "cuda"

    def _need_device(self, *modules: str) -> None:
        if not self.dry and (reason := no_gpu(self.out)):
            raise SkipStage(f"{reason} (DEVICE=cpu makes a dry run)")
        _need("torch", *modules)

    # -- build and correctness ---------------------------------------------------------------------

    def environment(self, seconds: float) -> Task:
        target = str(self.out / "environment.json")
        return Task([self.python, "tools/gpu_environment.py", target], self.path)

    def build(self, seconds: float) -> Task:
        _need("torch", "setuptools")
        variables = dict(self.path)
        capability = read_environment(self.out).get("capability")
        if capability and "TORCH_CUDA_ARCH_LIST" not in os.environ:
            variables["TORCH_CUDA_ARCH_LIST"] = capability
        # In place: what pip would install stays out of somebody's environment.
        command = f"{shlex.quote(self.python)} setup.py build_ext --inplace"
        return Task(["sh", "-c", f"{command} && cat senet_kernels/_build.json"], variables)

    def _of_backend(self, backend: str) -> list[str]:
        """The command that runs each of its kernels."""
        self._need_device(*(["triton"] if backend == "triton" else []))
        if backend == "native" and not self.dry and (reason := _why_no_cuda_kernels()):
            raise SkipStage(f"the compiled library has no CUDA kernels: {reason}")
        return [self.python, "tools/gpu_kernels.py", backend, self.device]

    def kernels(self, backend: str) -> Callable[[float], Task]:
        return lambda seconds: Task(self._of_backend(backend), self.of_kernels)

    def _pytest(self, name: str, *arguments: str, slow: bool = False) -> Task:
        self._need_device("pytest")
        which = f"{'not gpu' if self.dry else 'gpu'} and {'slow' if slow else 'not slow'}"
        command = [self.python, "-m", "pytest", "-m", which, "-p", "no:cacheprovider"]
        command += ["-p", "tools.resume_tests", "-v", "--durations=10", *arguments]
        note = []
        if find_spec("xdist"):
            # Compiling is what takes the time, and that is the processors' work.
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
        if not find_spec("hypothesis"):
            command.append("--ignore=tests/test_properties.py")
            note.append("hypothesis is not installed: test_properties.py left out")
        passed = {"SENET_KERNELS_PASSED": str(self.out / f"{name}.passed")}
        return Task(command, {**self.of_kernels, **passed}, "; ".join(note))

    def gpu_tests(self, seconds: float) -> Task:
        return self._pytest("gpu-tests", "tests/test_gpu.py")

    def suite(self, seconds: float) -> Task:
        if self.dry:  # the gate runs the suite on a CPU anyway
            return self._pytest("suite", "tests/test_pointwise.py")
        return self._pytest("suite", "tests", "--ignore=tests/test_gpu.py")

    def slow(self, seconds: float) -> Task:
        if self.dry:
            raise SkipStage("slow tests, and those of a CPU belong to make test-all")
        # Tensors of more than 2^31 elements, the layers that the stage gpu-tests has left out.
        return self._pytest("slow", "tests/test_gpu.py", slow=True)

    def sanitizer(self, tool: str, backend: str) -> Callable[[float], Task]:
        def prepare(seconds: float) -> Task:
            run_kernels = self._of_backend(backend)
            command = [_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"]
            command += ["--target-processes", "application-only"]
            # Every tensor an allocation of its own: or reading past one's end reads its neighbour.
            variables = {**self.of_kernels, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            return Task([*command, *run_kernels], variables)

        return prepare

    # -- measurements ------------------------------------------------------------------------------

    def launches(self, seconds: float) -> Task:
        self._need_device()
        return Task([self.python, "-m", "benchmarks.launches", self.device], self.path)

    def _benchmark(self, kind: str, seconds: float, *options: str, record: str = "") -> Task:
        self._need_device("numpy")
        # It overruns its budget by up to a sixth; interrupted, it reports what it has.
        aim = max(5, int(0.8 * (seconds - min(GRACE, seconds / 4))))
        command = [self.python, "-m", "benchmarks", kind, "--device", self.device]
        command += ["--budget", str(aim), "--record", str(self.out / f"{record or kind}.json")]
        missing = [name for name in ("rich", "tqdm", "matplotlib") if find_spec(name) is None]
        note = f"not installed: {', '.join(missing)}: plainer output" if missing else ""
        return Task([*command, *options], self.path, note)

    def layers(self, name: str) -> Callable[[float], Task]:
        options = LAYER_RECORDS[name]
        if self.dry:
            options = (*_SMALL_LAYERS, *(("--neighbours",) if name == "neighbours" else ()))
        if self.arguments and name == "layers":
            options = (*_SMALL_LAYERS, *self.arguments) if self.dry else tuple(self.arguments)
        if not any(word.partition("=")[0] == "--mode" for word in options):
            options = (*_MODES, *options)
        return lambda seconds: self._benchmark("layers", seconds, *options, record=name)

    def host(self, seconds: float) -> Task:
        names = [name for name in _PROVIDERS if name != "compile-max"]
        if self.dry:
            names = ["eager-linear", "native"]
        options = [word for name in names for word in ("--provider", name)]
        return self._benchmark("layers", seconds, "--small", *options, record="host")

    def models(self, seconds: float) -> Task:
        small = ("--network", "lc0_10x128", "--batch", "1", "--provider", "original",
                 "--provider", "neighbours", "--provider", "no-se")  # fmt: skip
        return self._benchmark("models", seconds, *(small if self.dry else ()))

    def sweep(self, seconds: float) -> Task:
        small = ("--axis", "batch", "--points", "2", "--channels", "16", "--side", "4",
                 "--batch", "2", "--layout", "contiguous")  # fmt: skip
        return self._benchmark("sweep", seconds, *(small if self.dry else ()))

    def bytes(self, seconds: float) -> Task:
        self._need_device()
        ncu, record = _tool("ncu"), self.out / "layers.json"
        if not record.exists():
            raise SkipStage("there is no record of the layers to measure again")
        aim = max(3, int(seconds - min(GRACE, seconds / 4) - 2))
        command = [self.python, "-m", "benchmarks.dram", str(record), "--device", self.device]
        found = {**self.path, "PATH": f"{Path(ncu).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        return Task([*command, "--budget", str(aim)], found)

    def _records(self, names: Sequence[str]) -> list[str]:
        found = [self.out / f"{name}.json" for name in names]
        if there := [str(path) for path in found if path.exists()]:
            return there
        raise SkipStage("there is no record to report on")

    def targets(self, seconds: float) -> Task:
        found = self._records([*LAYER_RECORDS, "host"])
        _need("torch", "numpy")
        command = [self.python, "-m", "benchmarks", "targets", *found]
        return Task([*command, "--out", str(self.out / "targets.md")], self.path)

    def report(self, seconds: float) -> Task:
        found = self._records(RECORDS)
        _need("torch", "numpy", "jinja2")
        command = [self.python, "-m", "benchmarks", "report", *found, "--quiet"]
        return Task([*command, "--out", str(self.out)], self.path)

    def all(self) -> list[Stage]:
        """In the order of their value: whether it is right, how fast, whether it is clean, then
        what takes the time that is left."""
        checks = {"conclude": _sanitizer_conclusion, "finds_fault": _sanitizer_fault,
                  "group": SANITIZING}  # fmt: skip
        tested = {"conclude": _pytest_conclusion, "finds_fault": _no_test_passed, "group": TESTS}
        sanitizers = [
            Stage(f"{tool}-{backend}", 0.08, self.sanitizer(tool, backend), **checks)
            for tool in SANITIZERS
            for backend in BACKENDS
        ]
        timed = {"conclude": _benchmark_conclusion, "is_partial": _time_was_up}
        figures, networks = {**timed, "group": FIGURES}, {**timed, "group": NETWORKS}
        return [
            Stage("environment", 0.1, self.environment, always=True),
            Stage("build", 0.3, self.build, _build_conclusion),
            # The quickest answers of all; what Triton compiles the sanitizer finds compiled.
            *(Stage(f"kernels-{b}", 0.1, self.kernels(b), group=TESTS) for b in BACKENDS),
            Stage("gpu-tests", 0.2, self.gpu_tests, **tested),
            Stage("launches", 0.1, self.launches, group=FIGURES),
            Stage("host", 0.05, self.host, **figures),
            Stage("layers", 0.3, self.layers("layers"), **figures),
            Stage("batch-1", 0.15, self.layers("batch-1"), **figures),
            *sanitizers[:2],
            Stage("types", 0.2, self.layers("types"), **figures),
            Stage("neighbours", 0.15, self.layers("neighbours"), **figures),
            Stage("models", 0.3, self.models, **networks),
            *sanitizers[2:],
            Stage("suite", 0.3, self.suite, **tested),
            Stage("bytes", 0.2, self.bytes, **networks),
            Stage("slow", 0.3, self.slow, **tested),
            Stage("sweep", 0.4, self.sweep, **networks),
            Stage("targets", 0.1, self.targets, _targets_conclusion, reserved=TARGETS, always=True),
            Stage("report", 0.2, self.report, reserved=REPORT, always=True),
        ]


def stages(out: Path, arguments: Sequence[str] = (), *, dry: bool = False) -> list[Stage]:
    """The stages in their order."""
    return Stages(out, arguments, dry=dry).all()


def picked(known: Sequence[Stage], only: Sequence[str], *, dry: bool = False) -> list[Stage]:
    """The stages of these names and groups, with what they need and what sums them up. A dry run
    takes the library that is there."""
    always = ("environment", "targets", "report", *(() if dry else ("build",)))
    return [stage for stage in known if {stage.name, stage.group} & {*only, *always}]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Build, test, check and time on this machine's GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for logs, records and the summary")
    add("--budget", type=float, default=540.0, help="seconds for everything (default: 540)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--fresh", action="store_true", help="do not go on from an earlier run in the folder")
    add("--only", action="append", metavar="NAME", help="this stage, or group of them "
        f"({', '.join(GROUPS)}), and no other (repeatable); environment, targets, report, and on a "
        "GPU build come with it")  # fmt: skip
    add("arguments", nargs="*", metavar="ARG", help="for the stage named layers, after --")
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"budget: expected more than 0 seconds, got {args.budget}")
    out = args.out.resolve()
    # SIGINT may be ignored in what a script started in the background; the stages inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    dry = args.device == "cpu"
    chosen = stages(out, args.arguments, dry=dry)
    if args.only:
        known = [*GROUPS, *(stage.name for stage in chosen)]
        if unknown := set(args.only) - {*known}:
            parser.error(f"only: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        chosen = picked(chosen, args.only, dry=dry)
    earlier = take_up(out, args.fresh)
    if earlier.get("note") != (DRY_NOTE if dry else ""):
        earlier = take_up(out, fresh=True)
    if not BUILD_RECORD.exists():  # another machine, or a copy of the sources alone
        earlier["stages"] = [s for s in earlier.get("stages", []) if s["stage"] != "build"]
    (out / "environment.json").unlink(missing_ok=True)  # of an earlier run
    runner = Runner(
        out, args.budget, lambda text: print(text, flush=True), earlier, DRY_NOTE if dry else ""
    )
    try:
        right = runner.run(chosen)
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"\n{runner.text()}\nwritten: {args.out}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
