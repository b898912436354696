"""What the three kinds of run share: the record, the budget, resuming, statistics."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any, ClassVar

import torch
from torch import nn

from senet_kernels import use_backend
from senet_kernels.timing import OtherLoad

from . import stats
from .compiling import CompileAccount, graphs_so_far
from .environment import clocks, stamp
from .options import Options, without_option
from .providers import Call, backend_to_ask_for, one_line, unavailable
from .timing import CpuTimer, CudaTimer, GraphTimer, Rounds, Timer, measure

SCHEMA = "senet_kernels.benchmark/2"
OVERRUN = 1.15  # of the budget; past it only what is always measured goes on
Entry = dict[str, Any]
Status = dict[str, Any]


def memory_available(device: torch.device) -> float:
    """Bytes that may be allocated, infinite where that is not known."""
    if device.type == "cuda":  # what torch keeps for later is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")


def ignore(*arguments: Any) -> None:
    """Default of the hooks."""


@dataclass
class Bench(ABC):
    """State of one run. ``record`` is valid JSON content at any moment.

    ``tell`` shows what is going on, ``save`` is called with the record after every case.
    """

    options: Options
    tell: Callable[[str], None] = ignore
    save: Callable[[dict[str, Any]], None] = ignore
    compile: CompileAccount = field(init=False)
    record: dict[str, Any] = field(init=False)
    done: set[tuple[Any, ...]] = field(init=False, default_factory=set)

    kind: ClassVar[str]
    key_fields: ClassVar[tuple[str, ...]]  # of an entry; what identifies a case
    rival: ClassVar[str]  # the provider whose compilation is accounted for

    def __post_init__(self) -> None:
        options = self.options
        self.start = time.perf_counter()
        torch.set_num_threads(options.threads)
        self.random = Random(options.seed)
        self.compile = CompileAccount(options.budget)
        self.record = {
            "schema": SCHEMA,
            "kind": self.kind,
            "command": options.command,
            "status": "running",
            "environment": stamp(options.device)
            | {"backend": backend_to_ask_for(options.device, self.why_not)},
            "clocks": {"start": clocks(options.device)},
            "cache_state": self.cache_state(),
            "seed": options.seed,
            "unavailable": {},
            "providers": [],
            "contenders": [],
            "not_measured": [],
            "results": [],
        }

    def run(self, progress: Callable[[list[Any]], Any]) -> None:
        """Measure everything; ``progress`` wraps the list of cases (a progress bar)."""
        with use_backend(self.record["environment"]["backend"]):
            self._run(progress)

    @abstractmethod
    def _run(self, progress: Callable[[list[Any]], Any]) -> None: ...

    def cache_state(self) -> str:
        return CpuTimer.state if self.options.device.type == "cpu" else CudaTimer.state

    def timers(self, copies: int) -> dict[str, Timer]:
        """Wall time, and on CUDA device time."""
        if self.options.device.type == "cpu":
            return {"wall": CpuTimer()}
        return {"wall": CudaTimer(copies), "device": GraphTimer(copies)}

    def why_not(self, name: str) -> str | None:
        """Why a provider cannot run here; None where it can."""
        return unavailable(name, self.options.device)

    # -- resuming ----------------------------------------------------------------------------------

    def key(self, entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in self.key_fields)

    def resume(self, old: dict[str, Any]) -> list[str]:
        """Take over the results of an earlier record of the same command, code and device; of
        another, take nothing and name what differs."""

        def identity(record: dict[str, Any]) -> dict[str, Any]:
            env = record.get("environment", {})
            same = ("commit", "uncommitted_changes", "torch", "device", "cpu", "threads")
            return {
                **{name: record.get(name) for name in ("schema", "kind", "seed")},
                "command": without_option(record.get("command", ""), "--budget"),
                **{name: env.get(name) for name in same},
            }

        before, now = identity(old), identity(self.record)
        if before != now:
            return [name for name in now if before[name] != now[name]]
        self.record["results"] = old["results"]
        if "small_call" in self.record:
            self.record["small_call"] = old.get("small_call", [])
        self.record["resumed"] = [*old.get("resumed", []), old["environment"]["date"]]
        self.done = {self.key(entry) for entry in old["results"]}
        return []

    # -- budget ------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Part of the budget that is gone."""
        budget = self.options.budget
        return (time.perf_counter() - self.start) / budget if budget else 0.0

    def finish(self, status: str) -> dict[str, Any]:
        """Close the record: complete, or interrupted."""
        self.record["status"] = status
        self.record["elapsed_s"] = time.perf_counter() - self.start
        self.record["compile"] = {"seconds": self.compile.seconds, "cases": self.compile.cases}
        self.record["clocks"]["end"] = clocks(self.options.device)
        return self.record

    @property
    def wrong(self) -> bool:
        """Whether a check failed."""
        return any(
            status["status"] == "wrong"
            for entry in [*self.record["results"], *self.record.get("small_call", [])]
            for status in entry["providers"].values()
        )

    def unfinished(self) -> list[str]:
        """What the time was too short for."""
        missed = len(self.record["not_measured"])
        return [f"{missed} cases not measured"] if missed else []

    # -- timing ------------------------------------------------------------------------------------

    def time_calls(
        self,
        calls: Mapping[str, Call],
        timers: Mapping[str, Timer],
        rounds: Rounds,
        out: dict[str, Status],
        over: Iterable[str],
        contenders: Iterable[str],
        limit: tuple[str, float] | None = None,
    ) -> dict[str, Any]:
        """Time ``calls`` interleaved; statistics go to ``out``, the rest is returned.

        ``limit`` is a provider and how many times its time is the least possible.
        """
        begin, load = time.perf_counter(), OtherLoad()
        graphs = graphs_so_far()
        speedups: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        for metric, timer in timers.items():
            done = measure(timer, calls, rounds, self.random)
            for name, error in done.failed.items():
                out[name][metric] = {"reason": one_line(error)}
            by_name = done.seconds
            least = median(by_name[limit[0]]) * limit[1] if limit and limit[0] in by_name else None
            speedups[metric] = {}
            for name, seconds in by_name.items():
                out[name][metric] = stats.summarise(seconds)
                if least:
                    out[name][metric]["over_limit"] = median(seconds) / least
                if name in contenders:
                    speedups[metric][name] = {
                        other: stats.speedup(by_name[other], seconds, self.options.seed)
                        for other in over
                        if other in by_name and other != name
                    }
        recompiles = graphs_so_far() - graphs
        for name in calls:
            if name == self.rival or name.startswith(self.rival + "-"):
                out[name].setdefault("compile", {})["recompiles"] = recompiles
        return {
            "cores_busy_elsewhere": load.read(),
            "timed_s": time.perf_counter() - begin,
            "speedup": speedups,
        }


def drop_compiled(modules: Iterable[nn.Module | None]) -> None:
    """Forget compiled code where there is some: the next case compiles its own."""
    if any(hasattr(module, "_orig_mod") for module in modules):
        torch.compiler.reset()
