"""Any legal call: drawn at random, kept as a line of JSON, built again, held to the oracle.

``test_properties.py`` runs a few hundred in the gate, and those of ``tests/corpus`` again;
``fuzz.py`` runs them for as long as it is told.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import cuda_on_cpu
import oracle
from backend_cases import BACKENDS, BackendCase
from policies import PLAN, POLICIES
from problems import LAYOUTS, Problem, Spec, build, lay_out, magnitudes, off_the_kinks
from senet_kernels import squeeze_excite
from special import (
    by_rule,
    in_float32,
    kinds,
    limits,
    nan_derivative,
    scalar,
    uncancelled,
    vectorised,
)  # fmt: skip

#: Names of backends to draw calls for.
BY_NAME: dict[str, BackendCase] = {str(backend): backend for backend in BACKENDS}
# Elements of x at most: what takes a few milliseconds.
_LARGEST = {"simulated-cuda": 6000, "triton": 3000}


@dataclass(frozen=True)
class RandomCall:
    """A call, and all that its result could depend on."""

    backend: str
    spec: Spec = field(default_factory=Spec)
    asked: tuple[str, ...] = ()  # inputs whose gradients are asked for
    without: tuple[str, ...] = ()  # tensors of the spec that are left out
    layouts: tuple[tuple[str, str], ...] = ()  # of parameters, u and lengths
    float32: tuple[str, ...] = ()  # parameters in float32, under autocast
    special: tuple[tuple[str, str], ...] = ()  # (tensor, what is done to its values)
    no_length: bool = False  # some lengths are 0
    inplace: bool = False
    threads: int = 1
    plan: str = ""  # of simulated CUDA
    order: int = 0  # in which simulated threads run; it chooses the device too

    def to_json(self) -> str:
        """One line, of what is not as usual."""
        record: dict[str, Any] = {"backend": self.backend}
        for part in (self.spec, self):
            for f in fields(part):
                value = getattr(part, f.name)
                usual = part is self and f.name in ("backend", "spec")
                if not usual and value != f.default:
                    record[f.name] = str(value)[6:] if f.name == "dtype" else value
        return json.dumps(record)

    @classmethod
    def from_json(cls, line: str) -> RandomCall:
        def tuples(value: Any) -> Any:
            return tuple(map(tuples, value)) if isinstance(value, list) else value

        record = {name: tuples(value) for name, value in json.loads(line).items()}
        record.pop("note", None)  # of the corpus, for people
        if "dtype" in record:
            record["dtype"] = getattr(torch, record["dtype"])
        of_spec = {f.name for f in fields(Spec)}
        spec = Spec(**{n: v for n, v in record.items() if n in of_spec})
        return cls(spec=spec, **{n: v for n, v in record.items() if n not in of_spec})


def plans_of(backend: BackendCase) -> tuple[str, ...]:
    """The plans worth drawing from; what does not suit a call runs with the automatic one."""
    return tuple(POLICIES) if backend.simulated else ("",)


# ---- drawing ----

_EXTENT = st.one_of(
    st.integers(1, 9), st.sampled_from((13, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 97, 128, 130))
)
_SPACE = st.one_of(
    st.tuples(_EXTENT),
    st.tuples(st.integers(1, 33), st.integers(1, 33)),
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
    st.tuples(*[st.integers(1, 4)] * 4),
)
_PARAMETERS = ("b1", "b2", "alpha", "beta", "affine_scale", "affine_shift")
_SPECIAL = ("nan", "inf", "-inf", "subnormal", "large", "zero")


def _seldom(draw: st.DrawFn, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


@st.composite
def _placements(draw: st.DrawFn, dims: int, repeat: bool = True) -> str:
    """Any strides, in the words of ``lay_out``."""
    order = draw(st.permutations(range(dims)))
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in range(dims)]
    axes = range(dims) if repeat else ()
    repeated = [axis for axis in axes if _seldom(draw, 4)]
    parts = {"order": order, "steps": steps, "offset": [draw(st.integers(0, 9))]}
    parts["repeat"] = repeated
    return ",".join(f"{n}={''.join(map(str, v))}" for n, v in parts.items())


def _layout(draw: st.DrawFn, dims: int, *, owned: bool = False, windows: bool = True) -> str:
    """``owned``: no two elements in one place."""
    names = [n for n in LAYOUTS if not (owned and n.startswith("expanded"))]
    names += [] if owned or not windows else ["windows"]
    return draw(st.one_of(st.sampled_from(names), _placements(dims, repeat=not owned)))


def _shape(draw: st.DrawFn, largest: int) -> tuple[int, ...]:
    batch = draw(st.integers(1, 6))
    channels, space = draw(_EXTENT), list(draw(_SPACE))
    while batch * channels * math.prod(space) > largest:
        if batch > 1:
            batch -= 1
        else:
            longest = space.index(max(space))
            space[longest] = max(1, space[longest] // 2)
            if max(space) == 1:
                channels = min(channels, largest)
    shape = [batch, channels, *space]
    if _seldom(draw, 40):
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


_VECTORS = st.one_of(st.sampled_from(("strided", "misaligned")), _placements(1))


@st.composite
def _specs(draw: st.DrawFn, backend: BackendCase, owned: bool) -> Spec:
    shape = _shape(draw, _LARGEST.get(str(backend), 100_000))
    part = draw(st.sampled_from(("whole", "whole", "whole", "squeeze", "channel_scale")))
    if part != "whole" and not backend.takes(f"{part} alone"):
        part = "whole"
    single = backend.takes("single layer (w1=None)") and _seldom(draw, 6)
    hidden = (
        None if single else draw(st.one_of(_EXTENT, st.just(0)) if shape[1] % 7 == 6 else _EXTENT)
    )
    options: dict[str, Any] = {
        "shift": "scale-and-shift (w2 with 2C rows)",
        "weighted": "alpha, beta",
        "affine": "before_affine",
        "lengths": "lengths",
    }
    extras = {name: draw(st.booleans()) for name, row in options.items() if backend.takes(row)}
    names = {
        argument: draw(st.sampled_from(backend.names(argument)))
        for argument in ("activation", "gate", "before", "after")
    }
    # torch's own gelu refuses gradients whose elements overlap.
    windows = backend.name != "reference"
    dy_layout = _layout(draw, 2 if part == "squeeze" else len(shape), windows=windows)
    residual = None
    if backend.takes("residual") and draw(st.booleans()):
        residual = _layout(draw, len(shape))
    return Spec(
        shape=shape,
        hidden=hidden,
        dtype=draw(st.sampled_from(backend.dtypes)),
        layout=_layout(draw, len(shape), owned=owned),
        residual=residual,
        dy_layout=dy_layout,
        bias=draw(st.booleans()),
        weights=draw(st.sampled_from(("matrix", "conv", "transposed", "nhwc"))),
        part=part,
        device=backend.device,
        seed=draw(st.integers(0, 1 << 20)),
        **names,
        **extras,
    )


def _some(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[str, ...]:
    chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    return tuple(n for n in names if n in chosen)


@st.composite
def calls(draw: st.DrawFn, name: str, plans: tuple[str, ...] = ("",)) -> RandomCall:
    """A legal call of the backend of that name; ``plans`` are for simulated CUDA."""
    backend = BY_NAME[name]
    inplace = backend.takes("inplace") and _seldom(draw, 8)
    spec = draw(_specs(backend, inplace))
    inplace = inplace and spec.part == "whole"
    given = build(
        replace(spec, shape=(1, 1, *[1] * (len(spec.shape) - 2)), hidden=spec.hidden and 1)
    ).given
    optional = tuple(n for n in ("b1", "b2", "alpha", "beta") if n in given)
    without = _some(draw, optional) if _seldom(draw, 3) else ()
    given = tuple(n for n in given if n not in without)
    vectors = (*(n for n in _PARAMETERS if n in given), "lengths")
    layouts = []
    if _seldom(draw, 3):
        layouts = [(n, draw(_VECTORS)) for n in _some(draw, vectors)]
    if spec.part == "channel_scale" and draw(st.booleans()):
        layouts.append(("u", _layout(draw, 2)))
    float32: tuple[str, ...] = ()
    halves = (torch.bfloat16, torch.float16)
    if spec.part == "whole" and spec.dtype in halves and _seldom(draw, 4):
        parameters = tuple(n for n in given if n not in ("x", "residual"))
        float32 = parameters if draw(st.booleans()) else _some(draw, parameters)
    asked = () if inplace else given if draw(st.booleans()) else _some(draw, given)
    special = []
    if _seldom(draw, 4):
        where = _some(draw, (*given, "dy")) or ("x",)
        special = [(n, draw(st.sampled_from(_SPECIAL))) for n in where[:3]]
    return RandomCall(
        backend=name,
        spec=spec,
        asked=asked,
        without=without,
        layouts=tuple(layouts),
        float32=float32,
        special=tuple(special),
        no_length=spec.lengths and _seldom(draw, 6),
        inplace=inplace,
        threads=draw(st.integers(1, 4)),
        plan=draw(st.sampled_from(plans)),
        order=draw(st.integers(0, 999)) if backend.simulated else 0,
    )


# ---- building ----


def _plant(t: Tensor, what: str, rng: random.Random) -> None:
    """In place. Values are planted into one element, the rest is done to all of them."""
    largest = torch.finfo(t.dtype).max
    if not t.numel():
        return
    if what == "subnormal":
        t.copy_(t * (torch.finfo(t.dtype).smallest_normal / 8))
    elif what == "large":
        t.copy_(
            (t.double() * (8192 if t.dtype == torch.float16 else 1e15)).clamp(-largest, largest)
        )
    elif what == "zero":
        t.zero_()
    else:
        t[tuple(rng.randrange(n) for n in t.shape)] = float(what)


def _tensors(call: RandomCall, seed: int) -> Problem:
    problem = build(replace(call.spec, seed=seed))
    rng = random.Random(seed)
    tensors = problem.tensors
    for name in call.without:
        tensors[name] = None
    for name in call.float32:
        t = tensors[name]
        tensors[name] = None if t is None else t.float()
    if call.no_length and problem.lengths is not None:
        problem.lengths[:: rng.choice((1, 2))] = 0
    for name, layout in call.layouts:
        t = problem.lengths if name == "lengths" else tensors.get(name)
        if t is None:
            continue
        if name == "lengths":
            problem.lengths = lay_out(t, layout)
        else:
            tensors[name] = lay_out(t, layout)
    x = tensors["x"]
    assert x is not None
    if call.special:
        # hardswish' is exactly 0 there, and eager's 0 * NaN is no one's aim.
        x.masked_fill_(x == -1.5, -1.25) if not _repeats(x) else None
    for name, what in call.special:
        t = problem.dy if name == "dy" else tensors.get(name)
        if t is None:
            continue
        if what in ("subnormal", "large", "zero") and _repeats(t):
            what = "nan"
        _plant(t, what, rng)
    if call.special:
        problem.dy = lay_out(off_the_kinks(problem), call.spec.dy_layout)
    return problem


def _repeats(t: Tensor) -> bool:
    return any(stride == 0 and n > 1 for stride, n in zip(t.stride(), t.shape, strict=True)) or (
        t.dim() > 1 and t.stride()[-2:] == (1, 1)
    )


def _near_a_kink(problem: Problem) -> bool:
    """Whether rounding could decide on which side of a kink an argument is, and so a gradient."""
    exact = problem.double()
    t = exact.tensors
    eps = oracle.ulp(torch.float64 if problem.dtype == torch.float64 else torch.float32)

    def near(name: str, v: Tensor, steps: float) -> bool:
        return any(((v - kink).abs() < steps * eps).any() for kink in oracle.KINKS.get(name, ()))

    x, u = t["x"], t.get("u")
    assert x is not None
    options = {"activation": "identity", "gate": "identity", "after": "identity"} | problem.options
    affine = None
    if t["affine_scale"] is not None:
        affine = (t["affine_scale"], t["affine_shift"])
        q = oracle.prologue(x, "identity", affine)
        if near(options["before"], q, 16):
            return True
    if problem.part == "squeeze":
        return False
    if u is None:
        w1, w2 = t["w1"], t["w2"]
        assert w2 is not None
        z = oracle.squeeze(
            x, before=options["before"], before_affine=affine, lengths=problem.lengths
        )
        if w1 is not None:
            z = oracle.matmul_linear(z, w1, t["b1"])
            if near(options["activation"], z, 400):
                return True
            z = oracle.FUNCTIONS[options["activation"]](z)
        u = oracle.matmul_linear(z, w2, t["b2"])
    if near(options["gate"], u, 400):
        return True
    if options["after"] in oracle.KINKS:
        plain = replace(exact, options={**problem.options, "after": "identity"})
        pre = plain.call(oracle.block)
        return near(options["after"], pre[problem.dy.double() != 0], 100)
    return False


def build_call(call: RandomCall) -> Problem | None:
    """Its tensors; None where no seed nearby keeps off the kinks, so that nothing can be said."""
    for attempt in range(4):
        problem = _tensors(call, call.spec.seed + attempt * (1 << 21))
        if not call.asked or not _near_a_kink(problem):
            return problem
    return None


# ---- checking ----


def _bytes(t: Tensor) -> Tensor:
    """A copy of its whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()


def _function(call: RandomCall) -> Any:
    """``squeeze_excite``, its forward pass alone under autocast where that is due."""

    def under_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(call.spec.device, dtype=call.spec.dtype):
            return squeeze_excite(*args, **kwargs)

    return under_autocast if call.float32 else squeeze_excite


def _in_place(problem: Problem, call: RandomCall) -> dict[str, Tensor]:
    x = problem.tensors["x"]
    assert x is not None
    before = _bytes(x)
    result = problem.call(_function(call), inplace=True, backend=BY_NAME[call.backend].name)
    assert result is x, "in place, the result is not x"
    y = x.clone()
    # As it was, apart from the elements of x.
    right = before.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    right.copy_(y)
    assert torch.equal(_bytes(x), before), "in place, something beside x was written"
    return {"y": y}


def _results(problem: Problem, call: RandomCall) -> dict[str, Tensor]:
    """What the call gives; it must leave its inputs as they were."""
    if call.inplace:
        return _in_place(problem, call)
    inputs = {n: t for n, t in problem.tensors.items() if t is not None} | {"dy": problem.dy}
    if problem.lengths is not None:
        inputs["lengths"] = problem.lengths
    before = {n: _bytes(t) for n, t in inputs.items()}
    results = problem.run(_function(call), call.asked, backend=BY_NAME[call.backend].name)
    for name, t in inputs.items():
        assert torch.equal(_bytes(t), before[name]), f"{name} was written to"
    return results


def _clean(problem: Problem) -> Problem:
    """With zeros in place of what is not finite, so that magnitudes are."""
    tensors = {
        n: None if t is None else t.double().nan_to_num(0, 0, 0) for n, t in problem.tensors.items()
    }
    dy = problem.dy.double().nan_to_num(0, 0, 0)
    lengths = None if problem.lengths is None else problem.lengths.clamp(min=1)
    return replace(problem, tensors=tensors, dy=dy, lengths=lengths)


def _in_kind(problem: Problem, call: RandomCall) -> list[dict[str, Tensor]]:
    """Results that may be non-finite where the oracle's need not be, and finite where those are
    not: of float32 by each rule (float64 for float64)."""
    in_kind = problem.double() if problem.dtype == torch.float64 else in_float32(problem)
    found = []
    for rule in (vectorised, scalar, uncancelled, nan_derivative, limits):
        with by_rule(rule):
            found.append(in_kind.run(oracle.block, call.asked))
    return found


def _dtype(problem: Problem, result: str) -> torch.dtype:
    t = problem.tensors["x" if result == "y" else result[1:]]
    assert t is not None
    return t.dtype


def check_call(call: RandomCall) -> bool:
    """Run it and hold it to the oracle; False where there is nothing to hold it to.

    Raises:
        AssertionError: a result is wrong, differs from one run to the next, or an input was
            written to.
    """
    problem = build_call(call)
    if problem is None:
        return False
    try:
        return _check(call, problem)
    except RuntimeError as error:
        if not call.plan or f"{PLAN}: " not in str(error):
            raise
    return _check(replace(call, plan=""), problem)  # that plan is not for calls like this


def _check(call: RandomCall, problem: Problem) -> bool:
    with _running(call):
        originals = problem
        if call.inplace:
            originals = replace(problem, tensors=dict(problem.tensors))
            problem.tensors["x"] = _twin(problem.tensors["x"])
        actual = _results(problem, call)
        if call.inplace:
            problem.tensors["x"] = _twin(originals.tensors["x"])
        again = _results(problem, call)
    for name, value in actual.items():
        same = torch.equal(again[name].nan_to_num(), value.nan_to_num())
        assert same, f"{name} differs on the second run"
    _assert_right(originals, call, actual)
    return True


def _twin(t: Tensor | None) -> Tensor:
    """A copy with a storage of its own, of the same layout."""
    assert t is not None
    return _bytes(t).view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def _assert_right(problem: Problem, call: RandomCall, actual: dict[str, Tensor]) -> None:
    x = problem.tensors["x"]
    assert x is not None
    special = bool(call.special) or call.no_length or not x.numel()
    small = any(what == "subnormal" for _, what in call.special)
    exact = problem.expected(call.asked)
    in_kind = _in_kind(problem, call) if special else []
    sizes = magnitudes(_clean(problem))
    for name, right in exact.items():
        got, dtype = actual[name], _dtype(problem, name)
        assert got.dtype == dtype, f"{name}: dtype {got.dtype}, expected {dtype}"
        assert got.shape == right.shape, f"{name}: shape {tuple(got.shape)}"
        if not right.numel():
            continue
        rounded = right.to(dtype)
        others = [results[name].to(dtype) for results in in_kind]
        size = sizes[name] if math.isfinite(sizes[name]) else 0.0
        if size > 1e37 and problem.dtype != torch.float64:
            continue  # float32 sums may have overflowed on the way
        steps = 256 if small else 1
        allowed = oracle.allowed_error(right, size, dtype, problem.dtype, steps)
        wrong = ~((got.double() - right).abs() <= allowed)
        if special:
            wrong &= _same_kinds(name, got, rounded, others)
            # The derivative at NaN may be finite, and another one by the other rule.
            for other in (*others[:3], others[4]):
                there = other.double()
                near = 2 * oracle.allowed_error(there, size, dtype, problem.dtype, steps)
                wrong &= ~((got.double() - there).abs() <= near)
        oracle.raise_where(wrong, name, got, right, allowed)


def _same_kinds(name: str, got: Tensor, exact: Tensor, in_kind: list[Tensor]) -> Tensor:
    """Non-finite where float32 (or, for large values, exact) arithmetic has it, and nowhere else.
    Returns where all are finite."""
    *rules, strict, generous = in_kind
    eager = (exact, *rules)
    if name == "y":
        wrong = torch.ones_like(got, dtype=torch.bool)
        for other in eager:
            wrong &= kinds(got) != kinds(other)
        lost = wrong
    else:
        possible = torch.stack([t.isfinite() for t in eager])
        lost = got.isfinite() & ~possible.any(0) & ~generous.isfinite()
        lost |= ~got.isfinite() & possible.all(0) & strict.isfinite()
    if lost.any():
        at = tuple(lost.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} at {at}: got {got[at].item()!r}, where exact arithmetic gives "
            f"{exact[at].item()!r} and eager {rules[0][at].item()!r} or {rules[1][at].item()!r}"
        )
    return torch.stack([t.isfinite() for t in (got, *eager)]).all(0)


@contextmanager
def _running(call: RandomCall) -> Iterator[None]:
    """The threads, the simulated device and its plan that a call says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(call.threads)
    before = os.environ.get(PLAN)
    if call.plan:
        os.environ[PLAN] = call.plan
    try:
        with (
            cuda_on_cpu.plugged_in(call.order) if BY_NAME[call.backend].simulated else nullcontext()
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        if call.plan:
            os.environ.pop(PLAN)
            if before is not None:
                os.environ[PLAN] = before
