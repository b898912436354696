"""The main job: plan, check, time, record, within a budget of seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import stats
from .compiling import COMPILE_SHARE, CompileAccount, graphs_so_far
from .environment import stamp
from .options import Options
from .problem import (
    FORWARD,
    FORWARD_GRAPH,
    TOLERANCE,
    TRAINING,
    Case,
    Problem,
    largest_error,
    limit_in_clones,
    oracle,
)
from .providers import (
    BASELINES,
    LIMIT,
    Provider,
    chosen_backend,
    make_call,
    make_provider,
    one_line,
    results,
    unavailable,
)
from .timing import (
    CpuTimer,
    CudaTimer,
    GraphTimer,
    OtherLoad,
    Rounds,
    Timer,
    cold_copies,
    measure,
)
from .workloads import Layer

SCHEMA = "senet_kernels.benchmark/1"
SMALL = Case(Layer(64, 4, 4, 4, "relu", "sigmoid"), "fp32", "contiguous", 2)
OVERRUN = 1.15  # of the budget; past it only the first networks, always complete, go on
ALWAYS_COMPLETE = 2  # networks
LEAST_SECONDS = 0.5  # for the rounds of a case while the budget lasts: enough for a small layer
Status = dict[str, Any]


def _memory_available(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")


@dataclass
class Run:
    """State of one run. ``record`` is valid JSON content at any moment."""

    options: Options
    tell: Callable[[str], None] = lambda text: None
    compile: CompileAccount = field(init=False)
    record: dict[str, Any] = field(init=False)
    providers: list[Provider] = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.start = time.perf_counter()
        torch.set_num_threads(options.threads)
        self.random = Random(options.seed)
        self.compile = CompileAccount(options.budget)
        missing = {}
        names = []
        for name in options.providers:
            reason = None if name in BASELINES else unavailable(name, options.device)
            if reason is None:
                names.append(name)
            else:
                missing[name] = reason
        self.providers = [make_provider(name) for name in [*names, LIMIT]]
        self.record = {
            "schema": SCHEMA,
            "command": options.command,
            "status": "running",
            "environment": stamp(options.device),
            "cache_state": CpuTimer.state if options.device.type == "cpu" else CudaTimer.state,
            "neighbours": options.neighbours,
            "seed": options.seed,
            "unavailable": missing,
            "providers": names,
            # whose speed-ups are reported: the fused backends, or else what there is beside eager
            "contenders": [name for name in names if name not in BASELINES] or names[-1:],
            "networks": [
                {
                    "network": network.name,
                    "source": network.source,
                    "layers": [{"layer": layer.name, "count": n} for layer, n in network.layers],
                }
                for network in options.networks
            ],
            "not_measured": [],
            "results": [],
            "small_call": [],
        }

    def cases(self) -> list[Case]:
        """Distinct cases, the networks' order kept, so that what runs first is what counts most."""
        options = self.options
        found = {
            Case(layer, dtype, layout, batch): None
            for batch in options.batches
            for dtype in options.dtypes
            for network in options.networks
            for layer, _ in network.layers
            for layout in options.layouts
        }
        return list(found)

    def run(self, progress: Callable[[list[Case]], Any]) -> None:
        """Measure everything; ``progress`` wraps the list of cases (a progress bar)."""
        if self.options.small:
            self.tell("small call")
            modes = [FORWARD, FORWARD_GRAPH, TRAINING]
            self.record["small_call"] += self._case(SMALL, modes, seconds=4.0, most=300)
        if not self.options.layers:
            return
        cases = self.cases()
        weights = [case.bytes + 2**22 for case in cases]
        first = self.options.networks[:ALWAYS_COMPLETE]
        kept = {layer for network in first for layer, _ in network.layers}
        setups: list[float] = []
        for index, case in enumerate(progress(cases)):
            if case.layer not in kept and self._spent() > OVERRUN:
                self.record["not_measured"].append(case.name)
                continue
            self.tell(f"{case.layer.shape} {case.layout}")
            begin = time.perf_counter()
            seconds = self._share(weights[index:], setups)
            before = self.compile.seconds
            entries = self._case(case, self.options.modes, seconds)
            self.record["results"] += entries
            timed = sum(entry["timed_s"] for entry in entries)
            compiled = self.compile.seconds - before
            setups.append(time.perf_counter() - begin - timed - compiled)

    def _spent(self) -> float:
        """Part of the budget that is gone."""
        budget = self.options.budget
        return (time.perf_counter() - self.start) / budget if budget else 0.0

    def _share(self, weights: list[int], setups: list[float]) -> float:
        """Seconds to spend on the rounds of the next case: its part of what is left."""
        budget = self.options.budget
        if not budget:
            return float("inf")
        left = len(weights)
        setup = left * (sum(setups) / len(setups) if setups else 0.3)
        account = self.compile
        compiling = 0.0
        if account.refuse() is None and any(p.name == "compile" for p in self.providers):
            each = account.seconds / account.cases if account.cases else 3.0
            rest = COMPILE_SHARE * budget - account.seconds
            compiling = min(rest, left * len(self.options.modes) * each)
        free = budget - (time.perf_counter() - self.start) - setup - compiling
        return max(0.0, free) * weights[0] / sum(weights)

    def _case(
        self, case: Case, modes: list[str], seconds: float, most: int = 30
    ) -> list[dict[str, Any]]:
        """Check every provider on one case, then time those that are right."""
        device = self.options.device
        torch.manual_seed(self.options.seed)
        shared = {
            **asdict(case.layer),
            "layer": case.layer.name,
            "dtype": case.dtype,
            "layout": case.layout,
            "batch": case.batch,
            "bytes": case.bytes,
        }
        needed = 64 * case.bytes / (4 if case.dtype == "fp32" else 2)  # fp64 oracle included
        if needed > _memory_available(device):
            reason = {"status": "n/a", "reason": "not enough memory"}
            names = [p.name for p in self.providers]
            return [
                {**shared, "mode": mode, "timed_s": 0.0, "providers": dict.fromkeys(names, reason)}
                for mode in modes
            ]
        # x and dy each have their copies; one of both is touched per call
        copies = cold_copies(device, case.bytes)
        problem = Problem.create(case, device, copies=copies, seed=self.options.seed)
        shared["chosen_backend"] = chosen_backend(problem)
        want = oracle(problem)
        checked = {p.name: self._check(p, problem, want, modes) for p in self.providers}
        del want
        entries = []
        for mode in modes:
            part = seconds * (0.3 if mode != TRAINING and len(modes) > 1 else 0.7)
            late = self._spent() > 1
            part = part if late else max(part, LEAST_SECONDS)
            rounds = Rounds(least=3 if late else 5, most=most, seconds=part)
            entry = {**shared, "mode": mode}
            entry |= self._time(problem, mode, checked, rounds)
            entries.append(entry)
        if checked.get("compile", (None,))[0] is not None:
            torch.compiler.reset()
        return entries

    def _check(
        self, provider: Provider, problem: Problem, want: dict[str, Tensor], modes: list[str]
    ) -> tuple[nn.Module | None, dict[str, Status]]:
        """Build a provider and hold output and gradients against the oracle.

        Returns the module and, per mode, a status: ok (with the error), wrong, or n/a.
        """
        compiles = provider.name == "compile"
        if compiles and (reason := self.compile.refuse()):
            return None, {mode: {"status": "n/a", "reason": reason} for mode in modes}
        case = problem.case
        tolerance = TOLERANCE[case.dtype]
        module: nn.Module | None = None
        statuses: dict[str, Status] = {}
        try:
            module = provider.build(problem)
            if provider.name == LIMIT:
                return module, {mode: {"status": "ok"} for mode in modes}
            for mode in modes:
                graphs, begin = graphs_so_far() if compiles else 0, time.perf_counter()
                with torch.set_grad_enabled(mode != FORWARD):
                    if mode == FORWARD:
                        got = {"y": make_call(module, problem, FORWARD)(0)}
                    else:
                        got = results(module, problem)
                status: Status = {}
                if compiles:
                    spent = time.perf_counter() - begin
                    self.compile.spend(spent)
                    status["compile"] = {"graphs": graphs_so_far() - graphs, "seconds": spent}
                error = largest_error(got, want, got)
                right = error <= tolerance
                status |= {"status": "ok" if right else "wrong", "error": error}
                if not right:
                    status["reason"] = f"error {error:.2g} of the largest value, over {tolerance}"
                statuses[mode] = status
        except Exception as error:  # a backend may refuse a case, a compiler may be missing
            reason = one_line(error)
            if compiles:
                self.compile.broken = reason
                torch.compiler.reset()
            for mode in modes:
                statuses.setdefault(mode, {"status": "n/a", "reason": reason})
        return module, statuses

    def _time(
        self,
        problem: Problem,
        mode: str,
        checked: dict[str, tuple[nn.Module | None, dict[str, Status]]],
        rounds: Rounds,
    ) -> dict[str, Any]:
        """Statistics of every provider that passed, and speed-ups of the fused over the others."""
        begin, load = time.perf_counter(), OtherLoad()
        out = {name: dict(statuses[mode]) for name, (_, statuses) in checked.items()}
        device = self.options.device
        timers: dict[str, Timer] = {"wall": CpuTimer()}
        if device.type == "cuda":
            timers = {"wall": CudaTimer(len(problem.x)), "device": GraphTimer(len(problem.x))}
        modules = {name: module for name, (module, _) in checked.items() if module is not None}
        samples: dict[str, dict[str, list[float]]] = {}
        graphs = graphs_so_far() if "compile" in modules else 0
        with torch.set_grad_enabled(mode != FORWARD):
            calls = {
                name: make_call(module, problem, mode)
                for name, module in modules.items()
                if out[name]["status"] == "ok"
            }
            for metric, timer in timers.items():
                done = measure(timer, calls, rounds, self.random)
                samples[metric] = done.seconds
                for name, error in done.failed.items():
                    out[name][metric] = {"reason": one_line(error)}
        busy = load.read()
        if "compile" in modules:
            out["compile"].setdefault("compile", {})["recompiles"] = graphs_so_far() - graphs
        factor = limit_in_clones(problem.case.layer, mode)
        speedups: dict[str, Any] = {metric: {} for metric in samples}
        for metric, by_name in samples.items():
            limit = median(by_name[LIMIT]) * factor if LIMIT in by_name else None
            for name, seconds in by_name.items():
                out[name][metric] = stats.summarise(seconds)
                if limit:
                    out[name][metric]["over_limit"] = median(seconds) / limit
                if name in self.record["contenders"]:
                    speedups[metric][name] = {
                        other: stats.speedup(by_name[other], seconds, self.options.seed)
                        for other in BASELINES
                        if other in by_name and other != name
                    }
        return {
            "limit_in_clones": factor,
            "cores_busy_elsewhere": busy,
            "timed_s": time.perf_counter() - begin,
            "providers": out,
            "speedup": speedups,
        }

    def finish(self, status: str) -> dict[str, Any]:
        """Close the record: complete, or interrupted."""
        self.record["status"] = status
        self.record["elapsed_s"] = time.perf_counter() - self.start
        self.record["compile"] = {"seconds": self.compile.seconds, "cases": self.compile.cases}
        return self.record

    @property
    def wrong(self) -> list[tuple[str, str, str]]:
        """(provider, case, mode) of every failed check."""
        return [
            (name, f"{entry['layer']} {entry['dtype']} {entry['layout']}", entry["mode"])
            for entry in [*self.record["results"], *self.record["small_call"]]
            for name, status in entry["providers"].items()
            if status["status"] == "wrong"
        ]
