"""``python -m benchmarks models``: whole networks, step by step."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import launches
from .bench import OVERRUN, Bench, Status, drop_compiled
from .compiling import COMPILE_SHARE, graphs_so_far
from .memory import peak_bytes, saved_bytes
from .networks import (
    BASE,
    COMPILE,
    COMPILE_WITHOUT,
    ORIGINAL,
    WITHOUT,
    NetworkSpec,
    build,
    se_modules,
    variant,
)
from .options import AMP, ModelOptions
from .problem import DTYPES, FORWARD, LAYOUTS, TRAINING
from .providers import Call, one_line
from .timing import CpuTimer, CudaTimer, GraphTimer, Rounds, Timer

# A variant's distance from the original in fp64, in that of the original in the dtype timed.
ERROR_FACTOR = 4.0
ERROR_FLOOR = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-3, AMP: 1e-2}
CHECK_SIZE, CHECK_BATCH = 64, 2
COMPARED_OVER = (ORIGINAL, COMPILE, WITHOUT, COMPILE_WITHOUT)


@dataclass(frozen=True)
class ModelCase:
    """One network at one batch, size, dtype and layout; the modes come with it."""

    spec: NetworkSpec
    dtype: str
    layout: str
    batch: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.dtype} b{self.batch} {self.size} {self.layout}"


class Steps:
    """A training step (gradients, loss, SGD with momentum) and inference of one module.

    The learning rate is zero: the optimiser does its work, the weights stay what they are, and all
    variants may share them.
    """

    def __init__(self, module: nn.Module, x: Tensor, target: Tensor, dtype: str) -> None:
        self.module, self.x, self.target, self.dtype = module, x, target, dtype
        self.parameters = list(module.parameters())
        self.optimiser = torch.optim.SGD(self.parameters, lr=0.0, momentum=0.9)

    def output(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.dtype == AMP):
            y: Tensor = self.module(self.x)
        return y

    def loss(self) -> Tensor:
        return F.cross_entropy(self.output().float(), self.target)

    def train(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def call(self, mode: str) -> Call:
        if mode == TRAINING:
            return lambda index: self.train()
        return lambda index: self.output()


@contextmanager
def in_mode(modules: list[nn.Module], mode: str) -> Iterator[None]:
    """Modules and gradients as ``mode`` wants them."""
    for module in modules:
        module.train(mode == TRAINING)
    with torch.set_grad_enabled(mode == TRAINING):
        yield


def check_results(module: nn.Module, x: Tensor, dtype: str) -> dict[str, Tensor]:
    """What is compared: the output, every parameter's gradient in one vector, and the output with
    the norms in training.

    Gradients are those with the norms' running statistics: those of a small batch would multiply
    rounding errors until they hide others.
    """

    def output() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == AMP):
            y: Tensor = module(x)
        return y

    with in_mode([module], FORWARD), torch.enable_grad():
        y = output()
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        parameters = list(module.parameters())
        # one that is not reached has a gradient of zero, which is then found wrong
        grads = torch.autograd.grad(y, parameters, dy, materialize_grads=True)
    found = {"output": y.detach(), "gradients": torch.cat([g.flatten().double() for g in grads])}
    with in_mode([module], TRAINING):
        found["output in training"] = output().detach()
    return {name: tensor.double() for name, tensor in found.items()}


def distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in fp64; NaN counts as infinite."""
    got, want = got.double(), want.double()
    value = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
    return value if math.isfinite(value) else math.inf


def _verdict(
    errors: dict[str, float] | str, noise: dict[str, float] | str, floor: float, mode: str
) -> Status:
    """Whether a variant's errors are about those of the original; a text says why it has none."""
    if isinstance(errors, str) or isinstance(noise, str):
        return {"status": "n/a", "reason": errors if isinstance(errors, str) else str(noise)}
    chosen = ["output"] if mode == FORWARD else list(errors)
    worst = max(errors[what] for what in chosen)
    for what in chosen:
        bound = ERROR_FACTOR * noise[what] + floor
        if not errors[what] <= bound:
            reason = f"{what}: error {errors[what]:.2g}, over {bound:.2g}"
            return {"status": "wrong", "error": worst, "reason": reason}
    return {"status": "ok", "error": worst}


@dataclass
class ModelRun(Bench):
    """Cases that are whole networks."""

    options: ModelOptions

    kind: ClassVar[str] = "models"
    key_fields: ClassVar[tuple[str, ...]] = ("network", "dtype", "layout", "batch", "size")
    rival: ClassVar[str] = COMPILE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compile.most = math.inf  # a network costs what the one before did, or more
        names = self.options.providers
        self.record |= {
            "providers": names,
            "contenders": [name for name in names if name != ORIGINAL],
            "networks": [],
        }

    def cache_state(self) -> str:
        return "as a loop of steps leaves them"

    def timers(self, copies: int) -> dict[str, Timer]:
        if self.options.device.type == "cpu":
            return {"wall": CpuTimer(warm=False)}
        return {"wall": CudaTimer(copies), "device": GraphTimer(copies)}

    def cases(self) -> list[ModelCase]:
        """The networks in their order; of each, every dtype, layout and batch."""
        options, cuda = self.options, self.options.device.type == "cuda"
        return [
            ModelCase(spec, dtype, layout, batch, size)
            for spec in options.specs
            for size in [spec.size if options.size is None else min(spec.size, options.size)]
            for batch in options.batches or [spec.cuda_batch if cuda else spec.cpu_batch]
            for dtype in options.dtypes
            for layout in options.layouts
        ]

    def _run(self, progress: Callable[[list[Any]], Any]) -> None:
        cases = [c for c in self.cases()
                 if (c.spec.name, c.dtype, c.layout, c.batch, c.size) not in self.done]  # fmt: skip
        for index, case in enumerate(progress(cases)):
            if index and self.spent() > OVERRUN:
                self.record["not_measured"].append(case.name)
                continue
            self.tell(f"{case.spec.name} {case.layout}")
            try:
                entries = self._case(case, len(cases) - index)
            except ImportError as error:
                self.record["unavailable"][case.spec.name] = one_line(error)
                continue
            self.record["results"] += entries
            self.save(self.record)
            gc.collect()
            if self.options.device.type == "cuda":
                torch.cuda.empty_cache()

    # -- one network -------------------------------------------------------------------------------

    def _case(self, case: ModelCase, left: int) -> list[dict[str, Any]]:
        begin, compiled = time.perf_counter(), self.compile.seconds
        model = self._model(case)
        blocks = len(se_modules(model))
        modules: dict[str, nn.Module] = {}
        statuses: dict[str, dict[str, Status]] = {}
        # inference first: training changes the statistics of the norms, of each variant its own
        modes = sorted(self.options.modes, key=(FORWARD, TRAINING).index)
        for name in self.options.providers:
            made = self._variant(model, name, case)
            if isinstance(made, nn.Module):
                modules[name] = made
            else:
                statuses[name] = {mode: {"status": "n/a", "reason": made} for mode in modes}
        statuses |= self._check(model, modules, case, modes)
        for name in [name for name in modules if name in BASE]:
            modules[name] = torch.compile(modules[name], dynamic=False)
        x = self._place(case.spec.input(case.batch, case.size), case)
        target = torch.arange(case.batch, device=x.device)
        steps = {name: Steps(module, x, target, case.dtype) for name, module in modules.items()}
        entries = []
        for mode in modes:
            out = {name: dict(statuses[name][mode]) for name in self.options.providers}
            calls = self._ready(steps, modules, mode, out)
            spent = time.perf_counter() - begin - (self.compile.seconds - compiled)
            seconds = self._share(left, spent) / (2 if mode == FORWARD else 1)
            entries.append({
                "network": case.spec.name, "source": case.spec.source, "se_modules": blocks,
                "mode": mode, "dtype": case.dtype, "layout": case.layout, "batch": case.batch,
                "size": case.size,
                **self._time(steps, calls, mode, out, seconds),
                "providers": out,
            })  # fmt: skip
        drop_compiled(modules.values())
        return entries

    def _model(self, case: ModelCase) -> nn.Module:
        return self._place(build(case.spec, self.options.seed), case)

    def _variant(self, model: nn.Module, name: str, case: ModelCase) -> nn.Module | str:
        """A variant in its place, or why there is none."""
        if name in BASE and not (self.options.compile_all or case.spec.compiled_on_cpu):
            return "compiling it for a CPU takes minutes: only with --full or --provider"
        try:
            made: nn.Module = self._place(variant(model, name), case)
        except Exception as error:  # nothing to fuse, say
            return one_line(error)
        return made

    def _place(self, what: Any, case: ModelCase) -> Any:
        dtype = torch.float32 if case.dtype == AMP else DTYPES[case.dtype]
        return what.to(self.options.device, dtype, memory_format=LAYOUTS[case.layout])

    def _check(
        self, model: nn.Module, modules: dict[str, nn.Module], case: ModelCase, modes: list[str]
    ) -> dict[str, dict[str, Status]]:
        """Hold outputs and gradients of every variant against the original in fp64.

        On a small input, in the dtype that is timed. The bound is in errors of the original
        itself. ``no-se`` computes something else and is not checked; compiled variants are checked
        as what they are compiled from, and their outputs once more when they have been compiled.
        """
        x = self._place(case.spec.input(CHECK_BATCH, min(case.size, CHECK_SIZE)), case)
        want = check_results(copy.deepcopy(model).double(), x.double(), "fp64")

        def errors(name: str) -> dict[str, float] | str:
            try:
                fresh = self._place(variant(model, name), case)
                got = check_results(fresh, x, case.dtype)
            except Exception as error:  # a backend may refuse a case
                return one_line(error)
            return {what: distance(got[what], want[what]) for what in want}

        noise = errors(ORIGINAL)
        found = {ORIGINAL: noise}
        floor = ERROR_FLOOR[case.dtype]
        out: dict[str, dict[str, Status]] = {}
        for name in modules:
            base = BASE.get(name, name)
            if base == WITHOUT:
                out[name] = {mode: {"status": "ok"} for mode in modes}
                continue
            if base not in found:
                found[base] = errors(base)
            out[name] = {mode: _verdict(found[base], noise, floor, mode) for mode in modes}
        return out

    def _ready(
        self,
        steps: dict[str, Steps],
        modules: dict[str, nn.Module],
        mode: str,
        out: dict[str, Status],
    ) -> dict[str, Call]:
        """The calls of a mode, everything compiled that will be."""
        calls = {}
        for name in modules:
            if out[name]["status"] != "ok":
                continue
            if name in BASE:
                reason = self.compile.refuse(name) or self._compile(steps, name, mode, out)
                if reason is not None:
                    status = "n/a" if out[name]["status"] == "ok" else out[name]["status"]
                    out[name] |= {"status": status, "reason": reason}
                    continue
            calls[name] = steps[name].call(mode)
        return calls

    def _compile(
        self, steps: dict[str, Steps], name: str, mode: str, out: dict[str, Status]
    ) -> str | None:
        """Compile by a first call; why it has no figure, or None. Its output must be its base's."""
        graphs, begin = graphs_so_far(), time.perf_counter()
        step, base = steps[name], steps.get(BASE[name])
        try:
            with in_mode([step.module], mode):
                got = step.call(mode)(0)
        except Exception as error:
            self.compile.broken[name] = one_line(error)
            torch.compiler.reset()
            return self.compile.broken[name]
        spent = time.perf_counter() - begin
        self.compile.spend(spent)
        out[name]["compile"] = {"graphs": graphs_so_far() - graphs, "seconds": spent}
        if base is not None:
            with in_mode([base.module], mode):
                want = base.call(mode)(0)
            error = distance(got, want)
            if not error <= 10 * ERROR_FLOOR[step.dtype]:
                out[name]["status"] = "wrong"
                return f"its output differs from {BASE[name]}'s by {error:.2g}"
        return None

    def _time(
        self,
        steps: dict[str, Steps],
        calls: dict[str, Call],
        mode: str,
        out: dict[str, Status],
        seconds: float,
    ) -> dict[str, Any]:
        late = self.spent() > 1
        rounds = Rounds(least=3 if late else 5, most=30, seconds=seconds)
        modules = [steps[name].module for name in calls]
        with in_mode(modules, mode):
            timed = self.time_calls(calls, self.timers(1), rounds, out, COMPARED_OVER, calls)
            for name in calls:
                out[name] |= self._account(steps[name], name, mode)
        return timed

    def _account(self, step: Steps, name: str, mode: str) -> dict[str, Any]:
        """What a step costs besides time."""
        device, call = self.options.device, step.call(mode)
        found: dict[str, Any] = {}
        try:
            if device.type == "cuda" or name not in BASE:
                found["launches"] = launches.count(lambda: call(0), device)
            if (peak := peak_bytes(lambda: call(0), device)) is not None:
                found["peak_bytes"] = peak
            if mode == TRAINING:
                step.optimiser.zero_grad(set_to_none=True)
                there = [*step.parameters, *step.module.buffers(), step.x]
                found["saved_bytes"] = saved_bytes(step.loss, there)
        except Exception as error:  # a profiler may be forbidden; the times stand without it
            found["account_failed"] = one_line(error)
        return found

    def _share(self, left: int, spent: float) -> float:
        """Seconds for the rounds of a mode: a part of what is left, less what networks cost
        apart from them and what may still be compiled."""
        budget = self.options.budget
        if not budget:
            return math.inf
        rest = budget - (time.perf_counter() - self.start) - spent * (left - 1)
        if self.compile.cases and self.compile.refuse() is None:
            rest -= max(0.0, COMPILE_SHARE * budget - self.compile.seconds)
        return max(0.0, rest) / (left * 1.5)
