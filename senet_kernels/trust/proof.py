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
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .bands import same_bits
from .errors import IMAGES, compare
from .kinds import Kind
from .problem import (
    MOST_BYTES,
    OF_IMAGES,
    Problem,
    Results,
    accumulates_in,
    batch_for,
    exact_products,
    plan_with,
    undisturbed,
)
from .variations import (
    INFINITE,
    MINUS_INFINITE,
    NAN,
    PLAIN,
    Variation,
    of_numbers,
    special,
)

#: A kernel is kept where it takes at most 1 / 0.95 of the time of eager PyTorch.
LEAST_SPEED = 0.95

_RUNS = 3
_T = TypeVar("_T")
#: Times the limits: what is no further beyond them may be by chance.
_NEAR = 4.0
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


def prove(kind: Kind, *, speed: bool = True, compiled: bool = False, forced: bool = False) -> Found:
    """Try a kernel; ``compiled``: measure it against what torch.compile makes of PyTorch's
    operators too, which takes seconds; ``forced``: see :func:`.variations.of_numbers`.

    Raises:
        NoVerdictError: it could not be tried.
    """
    start = time.perf_counter()
    with undisturbed(kind.device):
        wrong = _guarded(lambda: correct(kind, forced) or _is_right_at_full_size(kind))
        times: dict[str, float | None] = {"speed": None, "compiled_speed": None}
        if wrong is None and speed:
            times["speed"] = _measured(kind, Problem.eager)
            if compiled:
                with torch.compiler.set_stance("default"):
                    times["compiled_speed"] = _measured(kind, compiled_of)
    return Found(wrong, seconds=time.perf_counter() - start, **times)


def _guarded(do: Callable[[], _T]) -> _T:
    """What is no fault of the kernel, whose own are returned, leaves it without a verdict."""
    try:
        return do()
    except torch.OutOfMemoryError as error:
        raise NoVerdictError(f"out of memory: {error}") from error
    except (RuntimeError, OSError, MemoryError, Warning) as error:
        raise NoVerdictError(f"{type(error).__name__}: {error}") from error


def correct(kind: Kind, forced: bool = False) -> Wrong | None:
    """What the kernel does wrong; None where it does nothing wrong.

    Raises:
        NoVerdictError: PyTorch's own operators cannot compute the call.
    """
    batch = _batch(kind, MOST_BYTES)
    plain, *others = of_numbers(kind, forced)
    with exact_products(kind.device):
        wrong = _is_right_by_and_large(kind, batch, plain)
        fewer = min(batch, _batch(kind, MOST_BYTES // 4))
        for variation in others:
            wrong = wrong or _is_right_by_and_large(kind, fewer, variation)
    if 0 not in kind.shape:
        for variation in special(kind, fewer):
            wrong = wrong or _keeps_special_values(Problem(kind, fewer, variation))
    return wrong


def _batch(kind: Kind, most: int) -> int:
    """How many images, of so many bytes at most: all, where fewer would be launched in another
    way, which would say nothing."""
    batch = batch_for(kind, most)
    if batch < kind.shape[0] and plan_with(kind, batch) != kind.plan:
        return kind.shape[0]
    return batch


def _is_right_by_and_large(kind: Kind, batch: int, variation: Variation) -> Wrong | None:
    """What is wrong, and not by chance."""
    if variation.fewer and plan_with(kind, max(1, batch - variation.fewer)) != kind.plan:
        variation = variation._replace(fewer=0)
    problem = Problem(kind, batch, variation)
    wrong = _is_right(problem)
    if wrong is not None and wrong.fault == _BY_NUMBERS and _is_right(problem, _NEAR) is None:
        # Where sums cancel out, a right kernel may be a little beyond the limits once in thousands
        # of problems: a wrong one is so in others too.
        others = (Problem(kind, batch, variation, seed=seed) for seed in (1, 2))
        wrong = next(filter(None, map(_is_right, others)), None)
    return wrong


def _is_right_at_full_size(kind: Kind) -> Wrong | None:
    """What is wrong with the last images of a call that is larger than what is compared in full:
    addresses beyond 32 bits, say. Nothing is said where there is no memory for it."""
    if _batch(kind, MOST_BYTES) >= kind.shape[0]:
        return None
    try:
        problem = Problem(kind, kind.shape[0])
        runs = [_run(problem, watched=False) for _ in range(2)]
        for run in runs:
            if isinstance(run, Wrong):
                return run
        one, two = (run for run in runs if not isinstance(run, Wrong))
        for name, value in one.values.items():
            if not same_bits(value, two.values[name]):
                return Wrong("races", f"{name}: two runs of the whole batch differ")
        first = kind.shape[0] - min(kind.shape[0], max(1, batch_for(kind, MOST_BYTES // 16)))
        with exact_products(kind.device):
            return _compare(problem, one, _NEAR, first)
    except (RuntimeError, OSError, MemoryError, Warning, NoVerdictError):
        return None  # memory, above all: of the kernel itself _run has told


def _ready(problem: Problem) -> None:
    """What was launched before has ended, so that its errors are not taken for the kernel's."""
    if problem.kind.device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
        except Exception as error:  # a stream is captured by another thread, or a launch failed
            raise NoVerdictError(f"the device is not ready: {error}") from error


def _run(problem: Problem, *, watched: bool = True) -> Results | Wrong:
    """One call by the kernels, looked after; ``watched``: whether it writes elsewhere, for which
    the inputs are copied."""
    inputs = {**problem.tensors, "dy": problem.dy}
    given = {name: t.clone() for name, t in inputs.items() if t is not None and watched}
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
        results = problem.kernel(x) if watched else problem._kernel(x)
        if problem.kind.device.startswith("cuda"):
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise
    except (OSError, MemoryError, Warning) as error:  # a full disk; where warnings are errors
        raise NoVerdictError(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # whatever a compiler, a launch or a driver raises
        if "out of memory" in str(error):
            raise NoVerdictError(str(error)) from error
        return Wrong("failed", f"{type(error).__name__}: {error}")
    broken = problem.bands.broken()
    if broken is not None:
        return Wrong("wrote outside", broken)
    for name, value in results.values.items():
        if (other := _is_otherwise(problem, name, value)) is not None:
            return Wrong("unlike its fake", f"{name} {other}")
    if problem.overwritten:
        return Wrong("wrote outside", "backward overwrote what forward keeps for it")
    for name, before in given.items():
        after = inputs[name]
        if after is not None and not same_bits(before, after):
            return Wrong("wrote outside", f"its input {name} was overwritten")
    return results


def _is_otherwise(problem: Problem, name: str, value: Tensor) -> str | None:
    """What of a result's dtype, shape or memory layout is not as promised; None where nothing."""
    x = problem.tensors["x"]
    assert x is not None
    if name == "y" and problem.form.op == "squeeze":
        expected = (x.dtype, x.shape[:2])
    else:
        like = x if name == "y" else problem.tensors[name[2:]]
        assert like is not None
        expected = (like.dtype, like.shape)
    if (value.dtype, value.shape) != expected:
        return f"is {value.dtype} {list(value.shape)}, not {expected[0]} {list(expected[1])}"
    of_x = name in IMAGES and value.dim() == x.dim() and not problem.kind.call.inplace
    if of_x and _has_no_gaps(x) and value.stride() != x.stride():
        return f"has strides {list(value.stride())}, and x {list(x.stride())}"
    return None


def _has_no_gaps(t: Tensor) -> bool:
    """Whether elements lie one behind the other, in whatever order of the axes."""
    expected = 1
    for stride, extent in sorted(zip(t.stride(), t.shape, strict=True)):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def _is_right(problem: Problem, slack: float = 1.0) -> Wrong | None:
    """What is wrong; ``slack``: times the limits of numbers."""
    first: Results | None = None
    for _ in range(_RUNS if problem.variation == PLAIN else 2):
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


def _compare(problem: Problem, results: Results, slack: float, first: int = 0) -> Wrong | None:
    """The results against float64, by the measure of what eager PyTorch makes of them; from an
    image on, where sums over the batch are not compared."""
    try:
        eager = problem.eager()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoVerdictError(f"PyTorch's own operators fail: {error}") from error
    too_far = compare(problem, results, eager, slack, first)
    return None if too_far is None else Wrong(_BY_NUMBERS, too_far)


def _keeps_special_values(problem: Problem) -> Wrong | None:
    """NaN, infinities and overflows come out where the reference has them."""
    results = _run(problem)
    if isinstance(results, Wrong):
        return results
    expected = problem.reference().values
    nan, inf = expected["y"].isnan(), expected["y"].isinf()
    y = results.values["y"]
    # Of an infinity eager's functions make NaN, as of Inf * 0, where kernels may have the limit.
    either = torch.zeros_like(nan)
    infinite = problem.are(INFINITE, MINUS_INFINITE)
    either[infinite] = nan[infinite]
    for what, right, found in (("NaN", nan, y.isnan()), ("infinities", inf, y.isinf())):
        wrong = _misplaced(f"y: {what}", right & ~either, found & ~either)
        if wrong is not None:
            return wrong
    # The gradients of an image know nothing of the others.
    is_first = bool(problem.variation.dy) or problem.variation.lengths == "none"
    touched = {*problem.marked, *([0] if is_first else [])}
    clean = [i for i in range(problem.batch) if i not in touched]
    for name, value in results.values.items():
        of_image = name in OF_IMAGES and name != "y"
        if of_image and clean and not bool(value[clean].isfinite().all()):
            return Wrong("special values", f"{name}: NaN or infinities of another image")
    # And what a GradScaler looks for is in every gradient that it concerns, as in eager PyTorch,
    # whose hardsigmoid, say, has a slope of 0 at NaN.
    if set(problem.marked.values()) <= {NAN}:
        eager = problem.eager().values
        for name, value in results.values.items():
            concerned = ~(expected[name].isfinite() | eager[name].isfinite())
            lost = concerned & value.isfinite()
            wrong = _misplaced(f"{name}: NaN and infinities", lost, torch.zeros_like(lost))
            if wrong is not None:
                return wrong
    return None


def _misplaced(what: str, expected: Tensor, found: Tensor) -> Wrong | None:
    places = (expected != found).nonzero()
    if not len(places):
        return None
    verb = "lost" if bool(expected[tuple(places[0])]) else "made"
    where = f"in {len(places)} elements, the first at {places[0].tolist()}"
    return Wrong("special values", f"{what} are {verb} {where}")


# -- speed


def compiled_of(problem: Problem) -> Results:
    """The call as torch.compile computes it; compiled at the first call of a problem.

    Raises:
        NoVerdictError: it was not compiled: torch.compile is switched off.
    """
    forward: Callable[..., Tensor] | None = getattr(problem, "_compiled", None)
    if forward is None:
        forward = _compile(problem)
        problem._compiled = forward  # type: ignore[attr-defined]
    return problem._differentiated(forward, problem.tensors, problem.dy)


def _compile(problem: Problem) -> Callable[..., Tensor]:
    from torch._inductor.compile_fx import compile_fx

    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made = compile_fx(graph, inputs)
        compiled.append(made)
        return made

    # Of its own code: Dynamo counts how often it compiles one, and gives up at the eighth.
    plain = Problem.plain_forward
    own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
    forward = torch.compile(MethodType(own, problem), backend=backend, dynamic=False,
                            fullgraph=True)  # fmt: skip
    problem._differentiated(forward, problem.tensors, problem.dy)
    if not compiled:
        raise NoVerdictError("torch.compile compiles nothing here")
    return forward


def _measured(kind: Kind, other: Callable[[Problem], Any]) -> float | None:
    """How many times as fast as another way the kernel is at the call's own size; None where there
    is no memory for that."""
    try:
        problem = Problem(kind, kind.shape[0])
        return _ratio(kind.device, problem.kernel_plainly, lambda: other(problem))
    except torch.OutOfMemoryError:
        return None
    except NoVerdictError:
        raise
    except Exception as error:  # of compilers, too
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
