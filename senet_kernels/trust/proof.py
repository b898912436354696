"""Whether a kernel is right on this card, and whether it is worth its while.

Right: on synthetic data, run three times into NaN between guard bands, the results agree bit for
bit with one another, and with float64 within four times the promise of docs/reliability.md (the
mean error in half precision within twice); NaN and infinities come out where the reference has
them; nothing outside the results is written, and the inputs stay as they were. Worth its while: at
the call's own size not slower than eager PyTorch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bands import same_bits
from .kinds import TRAINING, Kind
from .problem import (
    Problem,
    Results,
    accumulates_in,
    batch_for,
    exact_products,
    undisturbed,
)

#: A kernel is kept where it takes at most 1 / 0.95 of the time of eager PyTorch.
LEAST_SPEED = 0.95

_RUNS = 3


class _Promise(NamedTuple):
    """Errors beside those of eager PyTorch; ``times``: how many times the mean may be as large."""

    mean: float
    mean_of_parameters: float  # of their gradients
    largest: float
    times: int


_TIMES = 4
#: Times the limits: what is no further beyond them may be by chance.
_NEAR = 4.0
_FLOAT32 = _Promise(1.25, 2.0, 4.0, times=_TIMES)
# Most of their error is the last rounding, which leaves little to chance.
_HALF = _Promise(1.02, 1.02, 2.0, times=2)
_FLOAT64 = 1e-12
_MANY = 256
_ROW = 16  # columns that a matrix has to be judged by rows: chance favours no row then
_IMAGES = ("y", "d x", "d residual")
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


def prove(kind: Kind, *, speed: bool = True, compiled: bool = False, images: bool = True) -> Found:
    """Try a kernel; ``compiled``: measure it against what torch.compile makes of PyTorch's
    operators too, which takes seconds; ``images``: try it without gradients of images, too, which a
    plan that is forced may not be for.

    Raises:
        NoVerdictError: it could not be tried.
    """
    start = time.perf_counter()
    with undisturbed(kind.device):
        wrong = _guarded(lambda: correct(kind, images))
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


def correct(kind: Kind, images: bool = True) -> Wrong | None:
    """What the kernel does wrong; None where it does nothing wrong.

    Raises:
        NoVerdictError: PyTorch's own operators cannot compute the call.
    """
    batch = batch_for(kind)
    problem = Problem(kind, batch)
    if batch < kind.shape[0] and problem.plan() != kind.plan:
        batch = kind.shape[0]  # fewer images are launched in another way: that would say nothing
    variants = [v for v in _variants(kind) if images or "d x" not in v]
    with exact_products(kind.device):
        for without in variants:
            wrong = _is_right_by_and_large(kind, batch, without)
            if wrong is not None:
                return wrong
    if 0 in kind.shape:
        return None
    return _keeps_special_values(Problem(kind, batch, special=True, without=variants[1]))


def _variants(kind: Kind) -> tuple[tuple[str, ...], ...]:
    """What calls of a kind leave out: nothing; biases, and the gradients of frozen parameters; the
    gradients of images, where nothing before is trained. One of alpha and beta, where there are
    any."""
    parameters = ("w1", "b1", "w2", "b2", "alpha", "beta", "a", "b")
    frozen = ("b1", "b2", "beta", *(f"d {name}" for name in parameters))
    has_more = kind.call.affine if kind.call.form == "squeeze alone" else True
    if kind.direction == TRAINING and has_more:
        return (), frozen, ("alpha", "d x", "d residual")
    return ((), frozen, ("alpha",)) if kind.call.weighted else ((), frozen)


def _is_right_by_and_large(kind: Kind, batch: int, without: tuple[str, ...]) -> Wrong | None:
    """What is wrong, and not by chance."""
    problem = Problem(kind, batch, without=without)
    wrong = _is_right(problem)
    if wrong is not None and wrong.fault == _BY_NUMBERS and _is_right(problem, _NEAR) is None:
        # Where sums cancel out, a right kernel may be a little beyond the limits once in thousands
        # of problems: a wrong one is so in others too.
        others = (Problem(kind, batch, without=without, seed=seed) for seed in (1, 2))
        wrong = next(filter(None, map(_is_right, others)), None)
    return wrong


def _ready(problem: Problem) -> None:
    """What was launched before has ended, so that its errors are not taken for the kernel's."""
    if problem.kind.device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
        except Exception as error:  # a stream is captured by another thread, or a launch failed
            raise NoVerdictError(f"the device is not ready: {error}") from error


def _run(problem: Problem) -> Results | Wrong:
    """One call by the kernels, looked after."""
    inputs = {**problem.tensors, "dy": problem.dy}
    given = {name: t.clone() for name, t in inputs.items() if t is not None}
    _ready(problem)
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
    if problem.overwritten:
        return Wrong("wrote outside", "backward overwrote what forward keeps for it")
    for name, before in given.items():
        after = inputs[name]
        if after is not None and not same_bits(before, after):
            return Wrong("wrote outside", f"its input {name} was overwritten")
    return results


def _is_right(problem: Problem, slack: float = 1.0) -> Wrong | None:
    """What is wrong; ``slack``: times the limits of numbers."""
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
    return _compare(problem, first, slack)


def _place(a: Tensor, b: Tensor) -> str:
    differs = (a != b) | (a.isnan() != b.isnan())
    places = differs.nonzero()
    if not len(places):
        return "in the bits of zeros or NaN"
    return f"in {len(places)} elements, the first at {places[0].tolist()}"


class _Rows(NamedTuple):
    """Of each row of a result: the largest error, its place in the whole, the largest number, the
    mean error and the mean number."""

    errors: Tensor
    places: Tensor
    sizes: Tensor
    mean_errors: Tensor
    mean_sizes: Tensor


class _Errors:
    """The errors of one result, by way of parts of the batch, and by rows: an image's channel, a
    row of a matrix of parameters, or all of what is neither."""

    def __init__(self, name: str) -> None:
        self.count, self.total, self.size = 0, 0.0, 0.0  # numbers, their errors, their magnitudes
        self.of_image = name in _IMAGES
        self.positions = 1  # numbers in a row, of an image
        self._is_matrix = name in ("d w1", "d w2")
        self._rows: list[_Rows] = []

    def add(self, value: Tensor, right: Tensor) -> None:
        if not right.numel():
            return
        apart = (value.double() - right).abs().nan_to_num(torch.inf, torch.inf)
        size = right.abs()
        if self.of_image and right.dim() > 2:
            apart, size = apart.flatten(2).flatten(0, 1), size.flatten(2).flatten(0, 1)
            self.positions = apart.shape[1]
        elif self._is_matrix and right[0].numel() >= _ROW:
            apart, size = apart.flatten(1), size.flatten(1)
        else:
            apart, size = apart.reshape(1, -1), size.reshape(1, -1)
        largest, places = apart.max(1)
        starts = torch.arange(len(apart), device=apart.device) * apart.shape[1]
        places = places + starts + self.count
        self._rows.append(_Rows(largest, places, size.amax(1), apart.mean(1), size.mean(1)))
        self.count += right.numel()
        self.total += apart.sum().item()
        self.size += size.sum().item()

    def rows(self) -> _Rows:
        """All rows."""
        if not self._rows:
            nothing = torch.zeros(0, dtype=torch.float64)
            return _Rows(nothing, nothing.long(), nothing, nothing, nothing)
        return _Rows(*(torch.cat(parts) for parts in zip(*self._rows, strict=True)))

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def finite_mean(self) -> float:
        """The mean; 0 where it overflows, which is no measure for anything."""
        return self.mean if self.mean < float("inf") else 0.0


def _compare(problem: Problem, results: Results, slack: float) -> Wrong | None:
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
                errors.setdefault(name, _Errors(name)).add(value, expected)
    for name, found in ours.items():
        too_far = _too_far(dtype, results.values[name], found, theirs[name], slack)
        if too_far is not None:
            return Wrong(_BY_NUMBERS, f"{name}{too_far}")
    return None


def _too_far(
    dtype: torch.dtype, value: Tensor, ours: _Errors, eager: _Errors, slack: float
) -> str | None:
    """Where a result is too far from float64, and how far; None where it is near enough."""
    rows, of_eager = ours.rows(), eager.rows()
    if not len(rows.errors):
        return None
    limits = _limits(dtype, value.dtype, ours, eager)
    compared = [("largest", rows.errors, limits.of_rows, of_eager.errors)]
    if limits.of_means is not None:
        compared.append(("mean", rows.mean_errors, limits.of_means, of_eager.mean_errors))
    for what, errors, most, beside in compared:
        row = int((errors / most).argmax())
        if not errors[row] <= slack * most[row]:
            place = [int(i) for i in torch.unravel_index(rows.places[row].cpu(), value.shape)]
            where = str(place) if what == "largest" else f"{place[:2]}, all positions"
            return _distance(where, what, errors[row], slack * most[row], beside[row])
    if not ours.mean <= slack * limits.mean:
        return _distance("", "mean", ours.mean, slack * limits.mean, eager.mean)
    return None


def _distance(where: str, what: str, apart: Any, limit: Any, beside: Any) -> str:
    return (
        f"{where}: {what} error {float(apart):.3g}, expected at most {float(limit):.3g} "
        f"(eager PyTorch has {float(beside):.3g})"
    )


class _Limits(NamedTuple):
    """The errors allowed: the largest and the mean of each row, and the mean of all."""

    of_rows: Tensor
    of_means: Tensor | None
    mean: float


def _limits(dtype: torch.dtype, stored: torch.dtype, ours: _Errors, eager: _Errors) -> _Limits:
    rows, sizes = eager.rows(), ours.rows().sizes
    of_eager = rows.errors.nan_to_num(posinf=0.0)  # where eager PyTorch overflows it is no measure
    largest, size = of_eager.max(), float(sizes.max())
    info = torch.finfo(stored)
    eps, least = info.eps, info.smallest_normal * info.eps  # the step below normal numbers
    promise = _FLOAT32 if dtype == torch.float32 else _HALF
    of_image = promise.mean if ours.of_image else promise.mean_of_parameters
    mean = of_image * eager.finite_mean
    many = ours.count >= _MANY
    if dtype == torch.float64:
        limit = _TIMES * _FLOAT64 * size + least
        return _Limits(torch.full_like(sizes, limit), None, limit)
    if dtype == torch.float32:
        # One limit for all rows. The numbers of a row share the error of the sums before them (a
        # gate's, say), and in eager PyTorch that error may happen to be 0 for a row. The mean of a
        # few errors may be anything that one of them may be.
        largest_of_rows = (promise.largest * largest + eps * size).expand_as(sizes)
        few = eps * size / (16 if many else 1)
        return _Limits(_TIMES * largest_of_rows + least, None, promise.times * (mean + few) + least)
    # A limit for each row: its numbers are of one size, so that a large number elsewhere does not
    # excuse an error here. What is added is for approximated functions, whose error is absolute.
    of_all = ours.size / ours.count
    few = eps * of_all / (16 if many else 2)
    of_rows = _TIMES * (promise.largest * of_eager + eps * sizes)
    of_means = None
    if ours.positions >= _MANY:
        near = promise.mean * rows.mean_errors.nan_to_num(posinf=0.0) + eps * rows.mean_sizes / 4
        of_means = promise.times * near + torch.finfo(dtype).eps * of_all / 8 + least
    return _Limits(
        of_rows + torch.finfo(dtype).eps * size / 4 + least,
        of_means,
        promise.times * (mean + few) + least,
    )


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
