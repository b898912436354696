"""``make gpu``: what this repository can find out on a machine with a GPU, within a budget.

``python -m tools.gpu --out FOLDER --budget SECONDS [--only STAGE] [--fresh] [--device cpu]``

Stages run one after another, the most valuable first, each in processes of its own with a time
limit; one that fails or hangs does not stop the next, and what crashed or hung in one is left out
of the next. What a stage needs and does not find makes it *skipped*, with the reason. All that was
found is in ``FOLDER/gpu.tgz``, ``summary.txt`` first, which is renewed every 15 seconds and after
every stage: it can be read whenever the run is cut off.

Run again with that file in the folder, it goes on: stages that were ok are kept, and within a stage
the verdicts and the cases that were measured. ``--fresh``, or any change of the sources, the device
or torch, begins anew. ``--device cpu`` is a dry run: every stage, with a pretended device and small
tasks. It proves the stages, not the kernels.

Needs Python, torch and Triton, no network and no make, and installs nothing. A compiled library may
be carried along (``SENET_KERNELS_PREBUILT``); only where none loads it is built. Exit code 0: no
stage failed (some may have been skipped); 1: one failed or ran out of time; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import read_json
from benchmarks.strategies import POLICIES
from tools import gpu_report
from tools.gpu_cases import BACKENDS, GROUPS
from tools.gpu_verdicts import LEFT_OUT, NOT_RUN
from tools.stage_runner import (
    GRACE,
    LEFT_OUT_TESTS,
    OK,
    PASSED,
    PREBUILT,
    ROOT,
    Need,
    Result,
    Runner,
    Stage,
    Task,
    no_gpu,
    read_environment,
)

DRY_NOTE = "dry run: pretended devices and small tasks, in place of a GPU"

# -- what stages need


def device(table: Table) -> str:
    missing = None if table.dry else no_gpu(table.out)
    return f"{missing} (DEVICE=cpu makes a dry run)" if missing else ""


def native(table: Table) -> str:
    if reason := device(table):
        return reason
    return "" if table.loads else f"no compiled library: {table.no_library}"


def triton(table: Table) -> str:
    if table.dry:  # the C++ kernels are pretended to be Triton's
        return native(table)
    return device(table) or ("" if find_spec("triton") else "not installed: triton")


_BACKENDS = dict(zip(BACKENDS, (triton, native), strict=True))


def a_backend(table: Table) -> str:
    return "" if table.backends else "; ".join(need(table) for need in _BACKENDS.values())


def no_library(table: Table) -> str:
    known = read_environment(table.out)
    return "one loads" if table.loads else "" if known else "nothing is known of the machine"


def pytest(table: Table) -> str:
    return "" if find_spec("pytest") else "not installed: pytest"


def nvidia(program: str) -> Need:
    return lambda table: "" if table.tool(program) else f"{program} is not on PATH"


def layers_record(table: Table) -> str:
    return "" if (table.out / "layers.json").exists() else "there is no layers.json"


def native_verdicts_to_do(table: Table) -> str:
    found = (table.out / "verdicts-native.json").exists()
    return "the stage verdicts has them" if found and not table.dry else ""


def verdicts_to_do(table: Table) -> str:
    for backend in table.backends:
        for group in GROUPS:
            found = read_json(table.out / f"{group}-{backend}.json")
            if not found or any(v["outcome"] == NOT_RUN for v in found.values()):
                return ""
    return "" if table.dry else "there is a verdict on each case"


def crashed_layers(table: Table) -> str:
    found = left_out(table.out).shapes
    return "" if found else "no layer crashed or hung by the CUDA kernels' own plan"


def native_to_measure(table: Table) -> str:
    found = read_json(table.out / "layers.json").get("providers", [])
    return "native is in layers.json" if "native" in found and not table.dry else ""


# -- the stages

_TWO = "--network seresnet50 --network efficientnet_b0"
_THREE = f"--network lc0_10x128 {_TWO}"
_FAST = "--device-time --mode forward --mode backward --rounds 10"
_OURS = "--provider native --provider triton"
_SIX = " ".join(f"--layer {shape}" for shape in ("256x56x56", "512x28x28", "1024x14x14",
                                                 "2048x7x7", "96x56x56", "672x14x14"))  # fmt: skip
_PLANS = " ".join(f"--provider {name}" for name in ("native", *POLICIES))
_DRY_LAYERS = (
    "--layer 240x14x14 --batch 2 --dtype bf16 --rounds 5 --mode forward --provider eager-linear "
    f"{_TWO} {_OURS}"
)


def _verdicts(name: str, options: str, seconds: float, *needs: Need, late: bool = False) -> Stage:
    command = (
        f"python -m tools.gpu_verdicts {{out}} --until {{until}} --device {{device}} {options}"
    )
    return Stage(name, command, seconds, needs, proof=r"[1-9]\d* cases: ", late=late, grace=2.0)


def _layers(
    name: str, options: str, seconds: float, *needs: Need, dry: str = "", stall: str = "",
    late: bool = False,
) -> Stage:  # fmt: skip
    watched = f"python -m benchmarks.watched {{out}}/{name}.json --budget {{seconds}} {stall}"
    common = "--no-profile {left_out}"
    return Stage(
        name, f"{watched} -- --device {{device}} {common} {options}", seconds, (device, *needs),
        f"{watched} --program tests/pretended_benchmarks.py -- layers --device cpu {common} "
        f"{_DRY_LAYERS} {dry}", r"[1-9]\d* results\b", late=late,
    )  # fmt: skip


def _models(name: str, providers: str, seconds: float) -> Stage:
    words = " ".join(f"--provider {provider}" for provider in providers.split())
    command = (
        "python -m benchmarks models --device {device} --budget {seconds} "
        f"--record {{out}}/{name}.json {words}"
    )
    return Stage(name, f"{command} {_THREE}", seconds, (device,),
                 f"{command} --network lc0_10x128 --batch 1", r"[1-9]\d* results in",
                 late=True)  # fmt: skip


def _sanitizer(tool: str, backend: str, seconds: float, late: bool = True) -> Stage:
    # The code asks CUDA what is expected to fail.
    options = " --report-api-errors no" if tool == "memcheck" else ""
    command = (
        f"compute-sanitizer --tool {tool}{options} --error-exitcode 9 --target-processes "
        f"application-only {{python}} -m tools.gpu_kernels {backend} {{device}} "
        f"--verdicts {{out}}/verdicts-{backend}.json --until {{until}}"
    )
    return Stage(f"{tool}-{backend}", command, seconds,
                 (_BACKENDS[backend], nvidia("compute-sanitizer")), proof=r"SUMMARY: 0\b",
                 late=late)  # fmt: skip


def _tests(name: str, which: str, seconds: float, late: bool = False) -> Stage:
    command = "python -m pytest -p no:cacheprovider -p tools.resume_tests -q -m"
    return Stage(name, f"{command} {which}", seconds, (device, pytest),
                 f"{command} 'not gpu and not slow' tests/test_cost.py", r"[1-9]\d* passed",
                 late=late)  # fmt: skip


# In the order of their value. The first ones, down to gpu-tests, take the 455 seconds of one call,
# but for two that are seldom needed; what comes after is for the time that is left, and for a
# second call.
STAGES = (
    Stage("environment", "python tools/gpu_environment.py {out}/environment.json", 10, always=True),
    Stage("build", "python setup.py build_ext --inplace", 400, (device, no_library), beside=native),
    _verdicts("verdicts", "{backends} --group verdicts --again", 30, a_backend),
    _verdicts("verdicts-native", "--backend native", 30, native, native_verdicts_to_do),
    _verdicts("situations", "{backends} --group situations --again", 30, a_backend),
    _layers("layers", f"{_TWO} {_FAST} {_OURS} --provider eager-linear", 140),
    _layers("layers-otherwise", f"{_TWO} {_FAST} {_PLANS} {{shapes}}", 30, native, crashed_layers),
    _layers("plans", f"{_TWO} {_SIX} {_FAST} {_PLANS}", 60, native),
    Stage("counters", "python -m benchmarks.dram {out}/layers.json --device {device} --budget "
          "{seconds} --most 8", 80, (device, nvidia("ncu"), layers_record),
          proof=r"[1-9]\d* calls measured"),
    _sanitizer("memcheck", "native", 25, late=False),
    _sanitizer("memcheck", "triton", 25, late=False),
    Stage("launches", "python -m benchmarks.launches {device}", 12, (device,),
          "python tests/pretended_benchmarks.py launches", ": forward "),
    _layers("host", f"--small --provider eager-linear {_OURS}", 13, dry="--small"),
    _tests("gpu-tests", "'gpu and not slow' tests/test_gpu.py", 30),
    # -- the time that is left, and a second call
    _verdicts("verdicts-rest", "{backends}", 60, a_backend, verdicts_to_do, late=True),
    _layers("layers-native", f"{_TWO} {_FAST} --provider native --provider eager-linear", 90,
            native, native_to_measure, late=True),
    _layers("compiled", f"{_TWO} {_FAST} {_OURS} --provider compile-max", 150,
            dry="--provider compile", stall="--stall 90", late=True),
    _models("networks", "original neighbours", 120),
    _models("price-of-se", "original no-se neighbours", 90),
    *(_sanitizer(tool, backend, 60) for tool in ("racecheck", "initcheck", "synccheck")
      for backend in ("native", "triton")),
    _layers("all-layers", f"--network all {_FAST} {_OURS} --provider eager-linear", 300, late=True),
    _tests("slow-tests", "gpu tests", 300, late=True),
)  # fmt: skip


# -- what is left out


class LeftOut(NamedTuple):
    """What crashed, hung or could not be launched when it was tried, in the words of others.

    Attributes:
        cases: of the benchmarks, with the provider.
        shapes: of layers whose own plan of the CUDA kernels did.
        tests: the parameters of the tests of these.
    """

    cases: list[str]
    shapes: list[str]
    tests: list[str]


def _exchanges(plan: str) -> set[str]:
    """Between the blocks of an image, by the words of a plan (csrc/cuda/plan.cpp)."""
    words = {"cluster": "cluster of ", "grid": "exchange through", "none": "one block per image"}
    return {exchange for exchange, words in words.items() if words in plan}


def _meets(policy: str, exchanges: set[str]) -> bool:
    """Whether a policy is one of these exchanges between blocks, or leaves that to the plan."""
    named = policy.partition("exchange=")[2].partition(",")[0]
    return not named or named in exchanges


def left_out(out: Path) -> LeftOut:
    """By the verdicts in a folder. A policy that did it takes those of its exchange with it."""
    found = LeftOut([], [], [])
    forced: set[str] = set()
    layers: dict[str, None] = {}
    for backend in BACKENDS:
        for verdict in read_json(out / f"verdicts-{backend}.json").values():
            layer, policy = verdict["layer"], verdict.get("policy", "")
            layers |= {layer: None} if layer else {}
            if verdict["outcome"] not in LEFT_OUT:
                continue
            if policy:
                found.tests.append(policy)
                forced.add(policy.partition("exchange=")[2].partition(",")[0])
            if layer:
                found.cases.append(f"{layer}/{backend}")
                found.tests.append(f"{backend}-cuda-{layer}")
            if layer and backend == "native":
                found.shapes.append(layer.partition("-")[0])
                own = _exchanges(verdict.get("plan", ""))
                found.cases.extend(f"{layer}/{n}" for n, p in POLICIES.items() if _meets(p, own))
    for path in sorted(out.glob("*.left-out.json")):  # by stages that were watched
        found.cases.extend(json.loads(path.read_text()))
    found.cases.extend(
        f"{layer}/{name}"
        for layer in layers
        for name, policy in POLICIES.items()
        if "exchange=" in policy and _meets(policy, forced)
    )
    return LeftOut(*(list(dict.fromkeys(words)) for words in found))


class Table:
    """Makes tasks of the rows: for a GPU or, ``dry``, for the CPU."""

    def __init__(self, out: Path, *, dry: bool = False) -> None:
        self.out, self.dry = out, dry
        self._is_built = False

    @property
    def no_library(self) -> str:
        """Why no library loads, as the first stage found it."""
        library = read_environment(self.out).get("library", {})
        return "; ".join(f"{name}: {why}" for name, why in library.items())

    @property
    def loads(self) -> bool:
        """Whether a library does, or was built since."""
        return "" in read_environment(self.out).get("library", {}).values() or self._is_built

    @property
    def backends(self) -> list[str]:
        """Whose kernels can be tried."""
        return [backend for backend, need in _BACKENDS.items() if not need(self)]

    def tool(self, name: str) -> str | None:
        """A program of the CUDA toolkit."""
        return shutil.which(name, path=self.environment()["PATH"])

    def environment(self) -> dict[str, str]:
        inherited = os.environ.get("PYTHONPATH")
        # Shells that are no login shells have seldom the toolkit on their PATH: it is looked for
        # where NVIDIA's packages put it.
        folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
        folders += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)[:1]
        path = [os.environ.get("PATH", ""), *(f for f in folders if Path(f).is_dir())]
        found = {
            "PYTHONPATH": str(ROOT) + (os.pathsep + inherited if inherited else ""),
            "PATH": os.pathsep.join(path),
            # Stages try the kernels themselves: none is tried before it is called, and refused.
            "SENET_KERNELS_GPU": "trust",
            "SENET_KERNELS_BUILD": "cuda",
            "SENET_KERNELS_REQUIRE_NATIVE": "0",  # where it does not load its tests are skipped
        }
        known = read_environment(self.out)
        if known.get("library", {}).get("carried along"):  # it does not load
            found[PREBUILT] = ""
        if known.get("capability") and "TORCH_CUDA_ARCH_LIST" not in os.environ:
            found["TORCH_CUDA_ARCH_LIST"] = known["capability"]
        return found

    def prepare(self, stage: Stage, seconds: float, results: Sequence[Result] = ()) -> Task:
        """What a stage runs within so many seconds, after others, or why it does not."""
        self._is_built = any((r.stage, r.status) == ("build", OK) for r in results)
        for need in stage.needs:
            if reason := need(self):
                return Task([], {}, reason)
        found = left_out(self.out)
        values = {
            "out": shlex.quote(str(self.out)), "device": "cpu" if self.dry else "cuda",
            "python": shlex.quote(sys.executable),
            # A benchmark overruns by up to a sixth; interrupted, it reports what it has.
            "seconds": f"{max(1.0, 0.85 * (seconds - min(GRACE, seconds / 4))):.0f}",
            "until": f"{time.time() + seconds - min(stage.grace, seconds / 4) - 1.0:.1f}",
            "left_out": " ".join(f"--leave-out {shlex.quote(case)}" for case in found.cases),
            "shapes": " ".join(f"--layer {shape}" for shape in found.shapes),
            "backends": " ".join(f"--backend {backend}" for backend in self.backends),
        }  # fmt: skip
        line = (stage.dry if self.dry and stage.dry else stage.command).format(**values)
        program, *words = shlex.split(line)
        environment = self.environment()
        environment[PASSED] = str(self.out / f"{stage.name}.passed")
        environment[LEFT_OUT_TESTS] = ";".join(found.tests)
        if found.cases and "{left_out}" not in stage.command and stage.late:
            # What cannot leave out single calls has each kernel prove itself.
            environment["SENET_KERNELS_GPU"] = "verify"
            environment["SENET_KERNELS_CACHE"] = str(self.out / "cache")
        if program != "python":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a bad access meets a neighbour
        program = sys.executable if program == "python" else self.tool(program) or program
        return Task([program, *words], environment)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Try, time and check the kernels on this machine's GPU."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for gpu.tgz")
    add("--budget", type=float, default=455.0, help="seconds for everything (default: 455)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--fresh", action="store_true", help="do not go on from the gpu.tgz in the folder")
    add("--only", action="append", choices=[stage.name for stage in STAGES], metavar="STAGE",
        help="this stage and no other (repeatable); environment comes with it")  # fmt: skip
    args = parser.parse_args(argv)
    if args.budget <= 0:
        parser.error(f"budget: expected more than 0 seconds, got {args.budget}")
    if carried := os.environ.get(PREBUILT):
        os.environ[PREBUILT] = str(Path(carried).resolve())  # stages run in another folder
    # SIGINT may be ignored in what a script started in the background; the stages inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    dry = args.device == "cpu"
    with tempfile.TemporaryDirectory(prefix="senet-gpu-") as folder:
        out = Path(folder)
        table = Table(out, dry=dry)
        runner = Runner(
            out, args.budget, table.prepare, say=lambda text: print(text, flush=True),
            tell=gpu_report.lines, note=DRY_NOTE if dry else "",
            home=args.out.resolve() / "gpu.tgz",
        )  # fmt: skip
        runner.take_up(args.fresh)
        wanted = args.only and {"environment", *args.only}
        try:
            right = runner.run([s for s in STAGES if not wanted or s.name in wanted])
        except KeyboardInterrupt:
            return 130
        finally:
            print(f"\n{runner.text()}\nwritten: {args.out / 'gpu.tgz'}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
