"""Whether a kernel is right on this card, and whether it is worth its while.

Right: on synthetic data, run three times into NaN between guard bands, the results agree bit for
bit with one another, and with float64 within four times the promise of docs/reliability.md; NaN and
infinities come out where the reference has them; nothing outside the results is written, and the
inputs stay as they were. Worth its while: at the call's own size not slower than eager PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bands import same_bits
from .kinds import Kind
from .problem import Problem, Results, accumulates_in, batch_for, undisturbed

#: A kernel is kept where it takes at most 1 / 0.95 of the time of eager PyTorch.
LEAST_SPEED = 0.95

_RUNS = 3
# Times the promise: mean error, that of gradients of parameters, and largest error beside those of
# eager PyTorch, per dtype.
_TIMES = 4
_PROMISED = {torch.float32: (1.25, 2.0, 4.0), None: (1.02, 1.02, 2.0)}
_FLOAT64 = 1e-12
_MANY = 256
_BY_NUMBERS = "wrong"  # the fault of results that are too far from float64
_SECONDS = 0.004  # of each side of a comparison of times


class NoVerdictError(Exception):
    """The kernel could not be tried: no memory, say. Nothing is known of it."""


class Wrong(NamedTuple):
    """What a kernel did wrong: in a word, and where."""

    fault: str
    text: str


class Found(NamedTuple):
    """The outcome of a proof. ``speed``: how many times as fast as eager PyTorch."""

    wrong: Wrong | None
    speed: float | None = None
    seconds: float = 0.0
    compiled_speed: float | None = None


def prove(kind: Kind, *, speed: bool = True, compiled: bool = False) -> Found:
    """Try a kernel; ``compiled``: measure it against what torch.compile makes of PyTorch's
    operators too, which takes seconds.

    Raises:
        NoVerdictError: it could not be tried.
    """
    start = time.perf_counter()
    with undisturbed(kind.device):
        wrong = _guarded(lambda: correct(kind))
        times: dict[str, float | None] = {"speed": None, "compiled_speed": None}
        if wrong is None and speed:
            times["speed"] = _measured(kind, Problem.eager)
            if compiled:
                times["compiled_speed"] = _measured(kind, compiled_of)
    return Found(wrong, seconds=time.perf_counter() - start, **times)


def _guarded(do: Callable[[], Wrong | None]) -> Wrong | None:
    try:
        return do()
    except torch.OutOfMemoryError as error:
        raise NoVerdictError(f"out of memory: {error}") from error


def correct(kind: Kind) -> Wrong | None:
    """What the kernel does wrong; None where it does nothing wrong.

    Raises:
        NoVerdictError: PyTorch's own operators cannot compute the call.
    """
    batch = batch_for(kind)
    wrong = _is_right(Problem(kind, batch))
    if wrong is not None and wrong.fault == _BY_NUMBERS:
        # Where sums cancel out, a right kernel may be beyond the limits once in thousands of
        # problems: a wrong one is so in others too.
        others = [_is_right(Problem(kind, batch, seed=seed)) for seed in (1, 2)]
        wrong = others[0] or others[1]
    if wrong is None and 0 not in kind.shape:
        wrong = _keeps_special_values(Problem(kind, batch, special=True))
    return wrong


def _run(problem: Problem) -> Results | Wrong:
    """One call by the kernels, looked after."""
    given = {name: t.clone() for name, t in problem.tensors.items() if t is not None}
    x = None
    if problem.kind.call.inplace:
        original = problem.tensors["x"]
        assert original is not None
        x = problem.bands.tensor(
            original.shape, original.stride(), original.dtype, original.device,
            0 if problem.kind.aligned else 1,
        ).copy_(original)  # fmt: skip
    try:
        results = problem.kernel(x)
        if problem.kind.device.startswith("cuda"):
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a launch or a driver raises
        if "out of memory" in str(error):
            raise NoVerdictError(str(error)) from error
        return Wrong("failed", f"{type(error).__name__}: {error}")
    broken = problem.bands.broken()
    if broken is not None:
        return Wrong("wrote outside", broken)
    for name, before in given.items():
        after = problem.tensors[name]
        if after is not None and not same_bits(before, after):
            return Wrong("wrote outside", f"its input {name} was overwritten")
    return results


def _is_right(problem: Problem) -> Wrong | None:
    first: Results | None = None
    for _ in range(_RUNS):
        results = _run(problem)
        if isinstance(results, Wrong):
            return results
        if first is None:
            first = results.clone()
            continue
        for name, value in results.values.items():
            if not same_bits(first.values[name], value):
                place = _place(first.values[name], value)
                return Wrong("races", f"{name}: two runs differ {place}")
    assert first is not None
    if 0 in problem.kind.shape:  # a mean of nothing is NaN, and what follows from it
        return None
    for name, value in first.values.items():
        unwritten = value.isnan()
        if unwritten.any():
            where = tuple(unwritten.nonzero()[0].tolist())
            return Wrong("unwritten", f"{name}{list(where)} is NaN, of numbers that are none")
    return _compare(problem, first)


def _place(a: Tensor, b: Tensor) -> str:
    differs = (a != b) | (a.isnan() != b.isnan())
    places = differs.nonzero()
    if not len(places):
        return "in the bits of zeros or NaN"
    return f"in {len(places)} elements, the first at {places[0].tolist()}"


class _Errors:
    """The errors of one result, by way of parts of the batch."""

    def __init__(self) -> None:
        self.largest, self.total, self.size, self.count = 0.0, 0.0, 0.0, 0
        self.place = [0]

    def add(self, value: Tensor, right: Tensor, start: int = 0) -> None:
        if not right.numel():
            return
        apart = (value.double() - right).abs()
        apart = apart.nan_to_num(torch.inf, torch.inf)
        largest = apart.max().item()
        if largest >= self.largest:
            self.largest = largest
            at = int(apart.argmax())
            self.place = [int(i) for i in torch.unravel_index(torch.tensor(at), right.shape)]
            if start:
                self.place[0] += start
        self.total += apart.sum().item()
        self.count += right.numel()
        self.size = max(self.size, right.abs().max().item())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


def _compare(problem: Problem, results: Results) -> Wrong | None:
    """The results against float64, by the measure of what eager PyTorch makes of them."""
    dtype = problem.kind.call.dtype
    try:
        eager = problem.eager().values
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoVerdictError(f"PyTorch's own operators fail: {error}") from error
    ours: dict[str, _Errors] = {}
    theirs: dict[str, _Errors] = {}
    for part, right in problem.oracle():
        for name, expected in right.values.items():
            if name not in results.values:
                continue
            of_part = name in ("y", "d x", "d u", "d residual")
            for errors, values in ((ours, results.values), (theirs, eager)):
                value = values[name][part] if of_part else values[name]
                start = part.start if of_part else 0
                errors.setdefault(name, _Errors()).add(value, expected, start)
    for name, found in ours.items():
        of_image = name in ("y", "d x", "d residual")
        limits = _limits(dtype, results.values[name].dtype, of_image, found.size, theirs[name])
        for what, apart, limit in (
            ("largest", found.largest, limits[0]), ("mean", found.mean, limits[1]),
        ):  # fmt: skip
            if not apart <= limit:
                return Wrong(
                    _BY_NUMBERS,
                    f"{name}{found.place}: {what} error {apart:.3g}, expected at most "
                    f"{limit:.3g} (eager PyTorch has {theirs[name].largest:.3g}, "
                    f"{theirs[name].mean:.3g} in the mean)",
                )
    return None


def _limits(
    dtype: torch.dtype, stored: torch.dtype, of_image: bool, size: float, eager: _Errors
) -> tuple[float, float]:
    """The largest and the mean error allowed of a result whose largest value is ``size``."""
    if dtype == torch.float64:
        return _TIMES * _FLOAT64 * size, _TIMES * _FLOAT64 * size
    means = _PROMISED.get(dtype, _PROMISED[None])
    mean, largest = means[0 if of_image else 1], means[2]
    ulp = torch.finfo(stored).eps * size
    # The mean of a few errors may be anything that one of them may be.
    few = ulp / (16 if eager.count >= _MANY else 1)
    return _TIMES * (largest * eager.largest + ulp), _TIMES * (mean * eager.mean + few)


def _keeps_special_values(problem: Problem) -> Wrong | None:
    results = _run(problem)
    if isinstance(results, Wrong):
        return results
    nan, inf = problem.masks()
    y = results.values["y"]
    # Of an infinity eager's functions make NaN, as of Inf * 0, where kernels may have the limit.
    either = torch.zeros_like(nan)
    either[problem.infinite] = nan[problem.infinite]
    for what, expected, found in (("NaN", nan, y.isnan()), ("infinities", inf, y.isinf())):
        places = ((expected != found) & ~either).nonzero()
        if len(places):
            verb = "lost" if bool(expected[tuple(places[0])]) else "made"
            return Wrong(
                "special values",
                f"y: {what} are {verb} in {len(places)} elements, the first at "
                f"{places[0].tolist()}",
            )
    # The gradients of the other images know nothing of these.
    clean = [i for i in range(problem.batch) if i not in problem.marked]
    for name in ("d x", "d residual", "d u"):
        value = results.values.get(name)
        if value is not None and clean and not bool(value[clean].isfinite().all()):
            return Wrong("special values", f"{name}: NaN or infinities of another image")
    return None


# -- speed


def compiled_of(problem: Problem) -> Results:
    """The call as torch.compile computes it; compiled at the first call of a problem."""
    forward: Callable[..., Tensor] | None = getattr(problem, "_compiled", None)
    if forward is None:
        forward = torch.compile(problem.plain_forward, dynamic=False)
        problem._compiled = forward  # type: ignore[attr-defined]
    return problem._differentiated(forward, problem.tensors, problem.dy)


def _measured(kind: Kind, other: Callable[[Problem], Any]) -> float | None:
    """How many times as fast as another way the kernel is at the call's own size; None where there
    is no memory for that."""
    try:
        problem = Problem(kind, kind.shape[0])
        return _ratio(kind.device, problem.kernel_plainly, lambda: other(problem))
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "out of memory" in str(error):
            return None
        raise NoVerdictError(f"its time cannot be measured: {error}") from error


def _ratio(device: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """The time of ``theirs`` over that of ``ours``, in turns; host and device together, as a loop
    of calls takes them."""
    is_gpu = device.startswith("cuda")

    def seconds(do: Callable[[], Any], times: int) -> float:
        if is_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            do()
        if is_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    seconds(theirs, 1), seconds(ours, 1)
    once = max(1e-7, min(seconds(theirs, 1), seconds(ours, 1)))
    times = max(1, min(50, int(_SECONDS / 5 / once)))
    ratios: list[float] = []
    for most in (5, 15):  # a close call is looked at longer
        while len(ratios) < most:
            ratios.append(seconds(theirs, times) / max(1e-9, seconds(ours, times)))
        if not 0.8 < statistics.median(ratios) < 1.2:
            break
    return statistics.median(ratios)


def describe(kind: Kind) -> str:
    """A kind in words, for reports."""
    call, options = kind.call, kind.call.options
    shape, strides = "x".join(map(str, kind.shape)), list(kind.strides)
    return (
        f"{kind.backend} on {kind.device}, {call.form}, x {shape} {call.dtype}, strides {strides}, "
        f"{kind.hidden} hidden, {', '.join(options)}, {kind.direction}, computed in "
        f"{accumulates_in(kind)}; plan: {kind.plan or 'one'}"
    )
