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

Needs Python, torch and Triton, no network, and installs nothing. A compiled library may be carried
along (``SENET_KERNELS_PREBUILT``); only where none loads it is built. Exit code 0: no stage failed
(some may have been skipped); 1: one failed or ran out of time; 130: interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.records import read_json
from benchmarks.strategies import POLICIES
from tools import gpu_report
from tools.stage_runner import GRACE, ROOT, Runner, Stage, Task, no_gpu, read_environment

DRY_NOTE = "dry run: pretended devices and small tasks, in place of a GPU"
PREBUILT = "SENET_KERNELS_PREBUILT"

_WATCHED = "python -m benchmarks.watched {out}/%s.json --budget {seconds} "
_LAYERS = _WATCHED + "-- --device {device} --no-profile"
_TWO = " --network seresnet50 --network efficientnet_b0"
_FAST = " --device-time --mode forward --mode backward --rounds 10 {left_out}"
_OURS = " --provider native --provider triton"
_SIX = "".join(f" --layer {shape}" for shape in ("256x56x56", "512x28x28", "1024x14x14", "2048x7x7",
                                                  "96x56x56", "672x14x14"))  # fmt: skip
_DRY_LAYERS = (
    _WATCHED + "--program tests/pretended_benchmarks.py -- layers --device cpu --no-profile "
    "--layer 240x14x14 --batch 2 --dtype bf16 --rounds 5 --mode forward --provider eager-linear"
    + _TWO
    + _OURS
    + " {left_out}"
)
_MODELS = "python -m benchmarks models --device {device} --budget {seconds} --record {out}/%s.json"
_THREE = " --network lc0_10x128" + _TWO
_DRY_MODEL = " --network lc0_10x128 --batch 1"
_PYTEST = "python -m pytest -p no:cacheprovider -p tools.resume_tests -q -m "
_CLEAN = "SUMMARY: 0"


def _sanitizer(tool: str, backend: str, seconds: float) -> Stage:
    command = (
        f"compute-sanitizer --tool {tool} --error-exitcode 9 --target-processes "
        f"application-only {{python}} -m tools.gpu_kernels {backend} {{device}}"
    )
    return Stage(f"{tool}-{backend}", command, seconds, (backend, "compute-sanitizer"),
                 proof=_CLEAN)  # fmt: skip


# In the order of their value. The first ones, down to gpu-tests, take the 455 seconds of one call;
# what comes after is for the time that is left, and for a second call.
STAGES = (
    Stage("environment", "python tools/gpu_environment.py {out}/environment.json", 10, always=True),
    Stage("build", "python setup.py build_ext --inplace", 400, ("device", "no library"),
          beside="native"),
    *(Stage(f"verdicts-{backend}", f"python -m tools.gpu_verdicts {backend} verdicts "
            f"{{out}}/verdicts-{backend}.json --device {{device}}", seconds, (backend,),
            proof=" cases: ")
      for backend, seconds in (("triton", 18), ("native", 12))),
    *(Stage(f"situations-{backend}", f"python -m tools.gpu_verdicts {backend} situations "
            f"{{out}}/situations-{backend}.json --device {{device}}", 15, (backend,),
            proof=" cases: ")
      for backend in ("triton", "native")),
    Stage("layers", _LAYERS % "layers" + _TWO + _FAST + _OURS + " --provider eager-linear", 140,
          ("device",), _DRY_LAYERS % "layers", " results"),
    Stage("plans", _LAYERS % "plans" + _TWO + _SIX + _FAST + " {strategies}", 60,
          ("device", "native"), _DRY_LAYERS % "plans", " results"),
    Stage("counters", "python -m benchmarks.dram {out}/layers.json --device {device} --budget "
          "{seconds} --most 8", 80, ("device", "ncu", "layers.json"), proof=" measured"),
    _sanitizer("memcheck", "native", 25),
    _sanitizer("memcheck", "triton", 25),
    Stage("launches", "python -m benchmarks.launches {device}", 12, ("device",),
          "python tests/pretended_benchmarks.py launches", ": forward "),
    Stage("host", _LAYERS % "host" + " --small --provider eager-linear" + _OURS, 13, ("device",),
          _DRY_LAYERS % "host" + " --small", " results"),
    Stage("gpu-tests", _PYTEST + "'gpu and not slow' tests/test_gpu.py", 30,
          ("device", "pytest"), _PYTEST + "'not gpu and not slow' tests/test_cost.py",
          " passed"),
    # -- the time that is left, and a second call
    Stage("layers-native", _LAYERS % "layers-native" + _TWO + _FAST + " --provider native "
          "--provider eager-linear", 90, ("device", "native", "no native in layers.json"),
          _DRY_LAYERS % "layers-native", " results"),
    Stage("compiled", (_LAYERS % "compiled").replace("--budget", "--stall 90 --budget")
          + _TWO + _FAST + _OURS + " --provider compile-max", 150,
          ("device",), _DRY_LAYERS % "compiled" + " --provider compile", " results"),
    Stage("networks", _MODELS % "networks" + _THREE + " --provider original --provider neighbours",
          120, ("device",), _MODELS % "networks" + _DRY_MODEL + " --provider original "
          "--provider neighbours", " results in"),
    Stage("price-of-se", _MODELS % "price-of-se" + _THREE + " --provider original --provider no-se "
          "--provider neighbours", 90, ("device",), _MODELS % "price-of-se" + _DRY_MODEL
          + " --provider original --provider no-se", " results in"),
    *(_sanitizer(tool, backend, 60) for tool in ("racecheck", "initcheck", "synccheck")
      for backend in ("native", "triton")),
    Stage("all-layers", _LAYERS % "all-layers" + " --network all" + _FAST + _OURS
          + " --provider eager-linear", 300, ("device",), _DRY_LAYERS % "all-layers", " results"),
    Stage("slow-tests", _PYTEST + "gpu tests", 300, ("device", "pytest"),
          _PYTEST + "'not gpu and not slow' tests/test_cost.py", " passed"),
)  # fmt: skip


def left_out(out: Path) -> tuple[list[str], set[str]]:
    """What crashed or hung when it was tried: cases of the benchmarks with the backend, and the
    exchanges between blocks of the policies that did."""
    cases, exchanges = [], set()
    for backend in ("triton", "native"):
        for name, verdict in read_json(out / f"verdicts-{backend}.json").items():
            if verdict["outcome"] in ("crash", "hang"):
                if verdict["layer"]:
                    cases.append(f"{verdict['layer']}/{backend}")
                if "exchange=" in name:
                    exchanges.add(name.partition("exchange=")[2].partition(",")[0])
    return cases, exchanges


class Table:
    """Makes tasks of the rows: for a GPU or, ``dry``, for the CPU."""

    def __init__(self, out: Path, *, dry: bool = False) -> None:
        self.out, self.dry = out, dry

    def why_not(self, need: str) -> str:
        """Why something that a stage needs is not there; empty where it is."""
        library = read_environment(self.out).get("library", {})
        loads = "" in library.values() or self._is_built()
        reasons = "; ".join(f"{name}: {why}" for name, why in library.items())
        if need == "device":
            missing = None if self.dry else no_gpu(self.out)
            return f"{missing} (DEVICE=cpu makes a dry run)" if missing else ""
        if need == "no library":
            why = "a dry run builds nothing" if self.dry else ""
            return "one loads" if loads else why if library else "nothing is known of the machine"
        if need == "native" or (need == "triton" and self.dry):
            return self.why_not("device") or ("" if loads else f"no compiled library: {reasons}")
        if need == "no native in layers.json":
            found = read_json(self.out / "layers.json").get("providers", [])
            return "native is in layers.json" if "native" in found and not self.dry else ""
        if need.endswith(".json"):
            return "" if (self.out / need).exists() else f"there is no {need}"
        if need in ("pytest", "triton"):
            return self.why_not("device") or ("" if find_spec(need) else f"not installed: {need}")
        return "" if self.tool(need) else f"{need} is not on PATH"

    def _is_built(self) -> bool:
        lines: Any = read_json(self.out / "summary.json").get("stages", [])
        return any(
            (line["stage"], line["status"], line["earlier"]) == ("build", "ok", False)
            for line in lines
        )

    def tool(self, name: str) -> str | None:
        """A program of the CUDA toolkit."""
        return shutil.which(name, path=self.environment()["PATH"])

    def environment(self) -> dict[str, str]:
        inherited, path = os.environ.get("PYTHONPATH"), os.environ.get("PATH", "")
        home = os.environ.get("CUDA_HOME")
        found = {
            "PYTHONPATH": str(ROOT) + (os.pathsep + inherited if inherited else ""),
            "PATH": f"{path}{os.pathsep}{home}/bin" if home else path,
            # Stages try the kernels themselves, and measure those that are wrong or slow too.
            "SENET_KERNELS_GPU": "trust",
            "SENET_KERNELS_BUILD": "cuda",
        }
        known = read_environment(self.out)
        if known.get("library", {}).get("carried along"):  # it does not load
            found[PREBUILT] = ""
        if known.get("capability") and "TORCH_CUDA_ARCH_LIST" not in os.environ:
            found["TORCH_CUDA_ARCH_LIST"] = known["capability"]
        return found

    def prepare(self, stage: Stage, seconds: float) -> Task:
        """What a stage runs within so many seconds, or why it does not."""
        for need in stage.needs:
            if reason := self.why_not(need):
                return Task([], {}, reason)
        cases, exchanges = left_out(self.out)
        kept = [name for name, policy in POLICIES.items()
                if not any(f"exchange={exchange}" in policy for exchange in exchanges)]  # fmt: skip
        names = [f"--leave-out {shlex.quote(case)}" for case in cases]
        if any(case.endswith("/native") for case in cases):  # by other plans then
            names += [f"--provider {name}" for name in kept if "reread" not in name]
        values = {
            "out": shlex.quote(str(self.out)), "device": "cpu" if self.dry else "cuda",
            "python": shlex.quote(sys.executable),
            # A benchmark overruns by up to a sixth; interrupted, it reports what it has.
            "seconds": f"{max(1.0, 0.85 * (seconds - min(GRACE, seconds / 4))):.0f}",
            "left_out": " ".join(names),
            "strategies": " ".join(f"--provider {name}" for name in ("native", *kept)),
        }  # fmt: skip
        line = (stage.dry if self.dry and stage.dry else stage.command).format(**values)
        program, *words = shlex.split(line)
        environment = self.environment()
        environment["SENET_KERNELS_PASSED"] = str(self.out / f"{stage.name}.passed")
        if program != "python":
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a bad access meets a neighbour
        found = sys.executable if program == "python" else self.tool(program)
        return Task([str(found), *words], environment)


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
