"""The isolated layers: plan, check, time, record, within a budget of seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from senet_kernels.backends import triton

from . import launches
from .bench import OVERRUN, Bench, Entry, Status, drop_compiled, memory_available
from .compiling import COMPILE_SHARE_LAST, NO_TIME, buffers_kept, graphs_so_far
from .memory import peak_bytes, saved_bytes
from .options import LayerOptions
from .problem import (
    BACKWARD,
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
    COMPOSED,
    LIMIT,
    Call,
    Provider,
    chosen_backend,
    make_call,
    make_provider,
    one_line,
    plan_of,
    results,
)
from .strategies import STRATEGIES
from .timing import CudaTimer, HostTimer, Rounds, cold_copies, keep_freed_memory
from .workloads import Layer

SMALL = Case(Layer(64, 4, 4, 4, "relu", "sigmoid"), "fp32", "contiguous", 2)
ALWAYS_COMPLETE = 2  # networks
LEFT_OUT = "left out: it crashed or hung"
LEAST_SECONDS = 0.5  # for the rounds of a case while the budget lasts: enough for a small layer
# How a case's seconds are shared among its modes.
WEIGHTS = {FORWARD: 3, FORWARD_GRAPH: 3, BACKWARD: 4, TRAINING: 7}


def _identity(case: Case) -> Entry:
    """What an entry says of its case."""
    return {
        **asdict(case.layer),
        "layer": case.layer.name,
        "dtype": case.dtype,
        "layout": case.layout,
        "batch": case.batch,
    }


def _passes(modes: list[str]) -> list[list[str]]:
    """Backward alone comes apart: torch.compile makes other code for it."""
    others = [mode for mode in modes if mode != BACKWARD]
    return [group for group in (others, [BACKWARD] if BACKWARD in modes else []) if group]


def _compiled_for(modes: list[str]) -> AbstractContextManager[None]:
    return buffers_kept() if BACKWARD in modes else nullcontext()


@dataclass
class LayerBench(Bench):
    """Cases that are one squeeze-excite layer each."""

    providers: list[Provider] = field(init=False)
    _reasons: dict[str, str | None] = field(init=False, default_factory=dict)

    # Layers of one name may differ in their neighbours.
    key_fields: ClassVar[tuple[str, ...]] = (
        "layer", "before", "after", "add", "dtype", "layout", "batch",
    )  # fmt: skip
    rival: ClassVar[str] = "compile"
    options: LayerOptions

    def __post_init__(self) -> None:
        # The same arithmetic for all: cuDNN may round the factors of a product to TF32, which makes
        # 1x1 convolutions in float32 a thousand times less accurate than what they compete with.
        torch.backends.cudnn.allow_tf32 = False
        options = self.options
        if options.device.type == "cpu" and not options.fresh_pages:
            keep_freed_memory()
        super().__post_init__()
        missing = self.record["unavailable"]
        names = []
        for name in options.providers:
            reason = self.why_not(name)
            if reason is None:
                names.append(name)
            else:
                missing[name] = reason
        self.providers = [make_provider(name) for name in [*names, LIMIT]]
        # whose speed-ups are reported: the fused backends, or else what there is beside eager
        fused = [name for name in names if name not in (*BASELINES, *COMPOSED, *STRATEGIES)]
        self.record |= {
            "neighbours": options.neighbours,
            "providers": names,
            "contenders": fused or names[-1:],
        }

    def why_not(self, name: str) -> str | None:
        if f"/{name}" in self.options.left_out:
            return f"{LEFT_OUT} in its first call"
        if name not in self._reasons:
            self._now(f"/{name}")
            self._reasons[name] = super().why_not(name)
            self._now()  # what it did to the device is told before another begins
        return self._reasons[name]

    def cache_state(self) -> str:
        if self.options.device.type != "cpu":
            return super().cache_state()
        pages = "given back" if self.options.fresh_pages else "kept"
        return f"{super().cache_state()}; freed memory is {pages}"

    def key_of(self, case: Case) -> tuple[Any, ...]:
        return self.key(_identity(case))

    def _without_compile(self) -> set[tuple[Any, ...]]:
        """Cases that were measured when no time was left for torch.compile."""
        return {
            self.key(entry)
            for entry in self.record["results"]
            if any(p.get("reason", "").startswith(NO_TIME) for p in entry["providers"].values())
        }

    def unfinished(self) -> list[str]:
        without = len(self._without_compile())
        return super().unfinished() + ([f"{without} without torch.compile"] if without else [])

    def measure_all(
        self,
        cases: list[Case],
        keep: Callable[[Case], bool],
        progress: Callable[[list[Case]], Any],
    ) -> None:
        """Measure the cases in order; past the budget only those to ``keep``.

        What an earlier run measured without torch.compile is measured again with it, after all
        else; so are all cases with ``compile_last``.
        """
        again = self._without_compile()
        if self.options.compile_last:
            self.compile.share = 0.0
        self._measure(
            [case for case in cases if self.key_of(case) not in self.done], keep, progress
        )
        if self.options.compile_last:
            again = self._without_compile()
        if again:
            self.compile.share = COMPILE_SHARE_LAST
            late = [case for case in cases if self.key_of(case) in again]
            self._measure(late, lambda case: False, progress)

    def _measure(
        self,
        cases: list[Case],
        keep: Callable[[Case], bool],
        progress: Callable[[list[Case]], Any],
    ) -> None:
        known = {self.key(entry) for entry in self.record["results"]}
        weights = [case.bytes + 2**22 for case in cases]
        setups: list[float] = []
        try:
            for index, case in enumerate(progress(cases)):
                self._measure_one(case, weights[index:], setups, known, keep)
        except KeyboardInterrupt:
            measured = {self.key(entry) for entry in self.record["results"]}
            missed = [case.name for case in cases if self.key_of(case) not in measured]
            told = self.record["not_measured"]
            self.record["not_measured"] = list(dict.fromkeys([*told, *missed]))
            raise

    def _measure_one(
        self,
        case: Case,
        weights: list[int],
        setups: list[float],
        known: set[tuple[Any, ...]],
        keep: Callable[[Case], bool],
    ) -> None:
        """One case, unless the time is up; ``weights`` are of this case and those behind it."""
        key = self.key_of(case)
        if key in known and (self.compile.refuse() or self.spent() > 1):
            return  # what there is stays
        late = not keep(case) and self.spent() > OVERRUN
        if late or f"{case.name}/" in self.options.left_out:
            self.record["not_measured"].append(case.name)
            return
        self.tell(f"b{case.batch} {case.layer.shape} {case.layout}")
        begin = time.perf_counter()
        before = self.compile.seconds
        entries = self._case(case, self.options.modes, self._share(weights, setups))
        kept = [entry for entry in self.record["results"] if self.key(entry) != key]
        self.record["results"] = kept + entries
        timed = sum(entry["timed_s"] for entry in entries)
        compiled = self.compile.seconds - before
        setups.append(time.perf_counter() - begin - timed - compiled)
        self.save(self.record)

    def _share(self, weights: list[int], setups: list[float]) -> float:
        """Seconds to spend on the rounds of the next case: its part of what is left."""
        budget = self.options.budget
        if not budget:
            return float("inf")
        left = len(weights)
        setup = left * (sum(setups) / len(setups) if setups else 0.3)
        account = self.compile
        compiling = 0.0
        if account.refuse() is None and any(p.name.startswith(self.rival) for p in self.providers):
            each = account.seconds / account.cases if account.cases else 3.0
            rest = account.share * budget - account.seconds
            compiling = min(rest, left * len(self.options.modes) * each)
        free = budget - (time.perf_counter() - self.start) - setup - compiling
        return max(0.0, free) * weights[0] / sum(weights)

    def _case(
        self, case: Case, modes: list[str], seconds: float, *, small: bool = False
    ) -> list[dict[str, Any]]:
        """Check every provider on one case, then time those that are right."""
        device = self.options.device
        self._now(f"{case.name}/")
        torch.manual_seed(self.options.seed)
        shared = {**_identity(case), "bytes": case.bytes}
        needed = 64 * case.bytes / (4 if case.dtype == "fp32" else 2)  # fp64 oracle included
        if BACKWARD in modes:  # of x, dy and the graph of each provider two copies at least
            needed = max(needed, 2 * (len(self.providers) + 3) * case.bytes)
        if needed > memory_available(device):
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
        entries = []
        passes = _passes(modes)
        for group in passes:
            with _compiled_for(group):
                checked = {p.name: self._check(p, problem, want, group) for p in self.providers}
                if group is passes[-1]:
                    want.clear()
                self._now(f"{case.name}/")
                for mode in group:
                    part = seconds * WEIGHTS[mode] / sum(WEIGHTS[m] for m in modes)
                    late = self.spent() > 1
                    part = part if late else max(part, LEAST_SECONDS)
                    most = 300 if small else self.options.rounds
                    rounds = Rounds(least=min(3 if late else 5, most), most=most, seconds=part)
                    entry = {**shared, "mode": mode}
                    entry |= self._time(problem, mode, checked, rounds, host=small)
                    entries.append(entry)
                drop_compiled(module for module, _ in checked.values())
        self._now(f"{case.name}/")
        return entries

    def _now(self, begins: str | None = None) -> None:
        """Say what begins. What was before is over: a fault of the device shows here, and ends the
        process, since nothing runs on that device any more.

        Raises:
            RuntimeError: the device is in error.
        """
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)
        if self.options.under_way is not None and begins is not None:
            self.options.under_way.write_text(begins)

    @contextmanager
    def _told_of_compiling(self) -> Iterator[None]:
        """Whoever watches sees each kernel that Triton compiles: some of them take as long as it
        waits for what hangs."""
        under_way = self.options.under_way
        if under_way is None or triton.UNAVAILABLE is not None:
            yield
            return
        from senet_kernels.backends.triton import launcher

        def told() -> None:
            os.utime(under_way)

        launcher.listeners.append(told)
        try:
            yield
        finally:
            launcher.listeners.remove(told)

    def _check(
        self, provider: Provider, problem: Problem, want: dict[str, Tensor], modes: list[str]
    ) -> tuple[nn.Module | None, dict[str, Status]]:
        """Build a provider and hold output and gradients against the oracle.

        Returns the module and, per mode, a status: ok (with the error), wrong, or n/a.
        """
        if f"{problem.case.name}/{provider.name}" in self.options.left_out:
            reason = LEFT_OUT
            return None, {mode: {"status": "n/a", "reason": reason} for mode in modes}
        self._now(f"{problem.case.name}/{provider.name}")
        compiles = provider.name.startswith(self.rival)
        if compiles and (reason := self.compile.refuse(provider.name)):
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
                        got = results(module, problem, BACKWARD if mode == BACKWARD else TRAINING)
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
            if compiles and not isinstance(error, torch.OutOfMemoryError):
                self.compile.broken[provider.name] = reason
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
        *,
        host: bool,
    ) -> dict[str, Any]:
        """Statistics of every provider that passed, and speed-ups of the fused over the others."""
        out = {name: dict(statuses[mode]) for name, (_, statuses) in checked.items()}
        modules = {
            name: module
            for name, (module, _) in checked.items()
            if module is not None and out[name]["status"] == "ok"
        }
        factor = limit_in_clones(problem.case.layer, mode)
        timers = self.timers(len(problem.x))
        if self.options.device_time and "device" in timers:
            timers = {"device": timers["device"]}
        if host and self.options.device.type == "cuda":  # on a CPU it is the wall time
            timers["host"] = HostTimer()
        with torch.set_grad_enabled(mode != FORWARD):
            calls = {name: make_call(module, problem, mode) for name, module in modules.items()}
            timed = self.time_calls(
                calls,
                timers,
                rounds,
                out,
                BASELINES,
                self.record["contenders"],
                (LIMIT, factor),
            )
            if self.options.device_time:
                timed["timed_s"] += self._wall_of_those_without(calls, out, rounds, len(problem.x))
            for name, call in calls.items():
                if name != LIMIT:
                    out[name] |= self._account(name, call, modules[name], problem, mode)
        return {"limit_in_clones": factor, **timed, "providers": out}

    def _wall_of_those_without(
        self, calls: dict[str, Call], out: dict[str, Status], rounds: Rounds, copies: int
    ) -> float:
        """Wall times of calls that have no time of the device, since no graph could hold them."""
        without = {n: call for n, call in calls.items() if "reason" in out[n].get("device", {})}
        if not without:
            return 0.0
        timers = {"wall": CudaTimer(copies)}
        seconds: float = self.time_calls(without, timers, rounds, out, (), ())["timed_s"]
        return seconds

    def _account(
        self, name: str, call: Call, module: nn.Module, problem: Problem, mode: str
    ) -> dict[str, Any]:
        """What a call costs besides time: launches, peak memory, bytes saved for backward; and by
        which plan it runs."""
        device = self.options.device
        found: dict[str, Any] = {}
        try:
            call(0)  # on this stream, to which a graph for backward may have to be built anew
            if (plan := plan_of(name, problem, mode)) is not None:
                found["plan"] = plan
            counted = device.type == "cuda" or not hasattr(module, "_orig_mod")
            if counted and self.options.profile:
                found["launches"] = launches.count(lambda: call(0), device)
            if (peak := peak_bytes(lambda: call(0), device)) is not None:
                found["peak_bytes"] = peak
            if mode not in (FORWARD, BACKWARD):
                forward = make_call(module, problem, FORWARD_GRAPH)
                # x and the residual are the network's in any case, saved or not
                inputs = [problem.x[0], *problem.weights.values(), *module.parameters()]
                inputs += [r for r in problem.residual[:1] if r is not None]
                found["saved_bytes"] = saved_bytes(lambda: forward(0), inputs)
        except Exception as error:  # a profiler may be forbidden; the times stand without it
            found["account_failed"] = one_line(error)
        return found


@dataclass
class LayerRun(LayerBench):
    """``python -m benchmarks layers``: the layers of real networks."""

    kind: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.record |= {
            "networks": [
                {
                    "network": network.name,
                    "source": network.source,
                    "layers": [{"layer": layer.name, "count": n} for layer, n in network.layers],
                }
                for network in self.options.networks
            ],
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

    def _run(self, progress: Callable[[list[Any]], Any]) -> None:
        if self.options.small and not self.record["small_call"]:
            self.tell("small call")
            modes = [FORWARD, FORWARD_GRAPH, TRAINING]
            self.record["small_call"] += self._case(SMALL, modes, seconds=4.0, small=True)
            self.save(self.record)
        if not self.options.layers:
            return
        # Whoever watches ends what runs past the budget.
        complete = 0 if self.options.under_way is not None else ALWAYS_COMPLETE
        first = self.options.networks[:complete]
        kept = {layer for network in first for layer, _ in network.layers}
        with self._told_of_compiling():
            self.measure_all(self.cases(), lambda case: case.layer in kept, progress)
