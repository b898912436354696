"""NaN, infinities, overflow, large values: non-finite results where float32 arithmetic has them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import EXACT_BACKENDS, BackendCase, dtype_cases
from problems import Problem, Spec, build
from senet_kernels import channel_scale, squeeze, squeeze_excite
from special import by_rule, in_float32, kinds, nan_derivative, scalar, vectorised

pytestmark = pytest.mark.usefixtures("poisoned_empty")

_SPECS: tuple[dict[str, Any], ...] = (
    {},
    {"layout": "channels_last"},
    {"activation": "silu", "before": "silu", "layout": "channels_last"},
    {"activation": "relu6", "gate": "hardsigmoid", "before": "relu"},
    {"activation": "hardswish", "gate": "tanh", "before": "hardswish"},
    {"residual": "contiguous", "after": "relu"},
    {"residual": "channels_last", "after": "relu", "layout": "channels_last", "before": "relu"},
    {"residual": "contiguous", "after": "silu", "activation": "leaky_relu", "gate": "relu"},
    {"after": "relu6", "activation": "gelu", "gate": "hardsigmoid_02"},
    {"after": "mish", "activation": "mish", "gate": "identity"},
    {"hidden": None, "lengths": True, "before": "relu"},
    {"part": "squeeze", "before": "hardswish", "layout": "channels_last"},
    {"part": "squeeze", "before": "relu", "lengths": True},
    {"part": "channel_scale", "residual": "contiguous", "after": "relu", "shift": True},
    {"part": "channel_scale", "gate": "sigmoid", "before": "silu", "layout": "channels_last"},
)
_SPEC = Spec((3, 24, 5, 7), 6)
_VALUES = (math.nan, math.inf, -math.inf)


def _cases() -> list[Any]:
    return [
        pytest.param(backend, spec, id=f"{backend}-{spec}")
        for backend in EXACT_BACKENDS
        for dtype in backend.dtypes
        if dtype != torch.float64
        for options in _SPECS
        if (spec := replace(_SPEC, dtype=dtype, device=backend.device, **options)).fits(backend)
    ]


def _build(spec: Spec) -> Problem:
    """Without the point where hardswish' is exactly 0: eager's 0 * NaN there is no one's aim."""
    problem = build(spec)
    x = problem.tensors["x"]
    assert x is not None
    x[x == -1.5] = -1.25
    return problem


def _plant(t: Tensor, value: float) -> None:
    """``value`` into one element, off the vector boundaries."""
    t[tuple(min(1, n - 1) if i else 0 for i, n in enumerate(t.shape))] = value


@pytest.mark.parametrize(("backend", "spec"), _cases(), indirect=["backend"])
def test_forward_is_non_finite_where_float32_is(backend: BackendCase, spec: Spec) -> None:
    for name, value in itertools.product(build(spec).given, _VALUES):
        problem = _build(spec)
        planted = problem.tensors[name]
        assert planted is not None
        _plant(planted, value)
        right = []
        for rule in (vectorised, scalar):
            with by_rule(rule):
                right.append(kinds(in_float32(problem).call(oracle.block).to(spec.dtype)))
        y = kinds(problem.call(squeeze_excite, backend=backend.name))
        taught = kinds(problem.call(squeeze_excite, problem.leaves(), backend=backend.name))
        assert any(torch.equal(y, each) for each in right), f"{value} in {name}"
        assert torch.equal(taught, y), f"{value} in {name}, with gradients"


@pytest.mark.parametrize(("backend", "spec"), _cases(), indirect=["backend"])
def test_gradients_do_not_hide_non_finite_values(backend: BackendCase, spec: Spec) -> None:
    """Where float32 eager has a non-finite gradient so have we; where it has none, we invent
    none."""
    for name, value in itertools.product((*build(spec).given, "dy"), _VALUES):
        problem = _build(spec)
        planted = problem.dy if name == "dy" else problem.tensors[name]
        assert planted is not None
        _plant(planted, value)
        finite: dict[str, list[Tensor]] = {}
        for rule in (vectorised, scalar, nan_derivative):
            with by_rule(rule):
                results = in_float32(problem).run(oracle.block)
            for result, expected in results.items():
                finite.setdefault(result, []).append(expected.to(spec.dtype).isfinite())
        actual = problem.run(squeeze_excite, backend=backend.name)
        for result, (first, second, strict) in finite.items():
            got = actual[result].isfinite()
            lost = got & ~first & ~second
            invented = ~got & first & second & strict
            at = f"{value} in {name}: {result}"
            assert not lost.any(), f"{at} is finite at {lost.nonzero()[0].tolist()}"
            assert not invented.any(), f"{at} is not finite at {invented.nonzero()[0].tolist()}"


@pytest.mark.parametrize(("backend", "dtype"), dtype_cases(), indirect=["backend"])
@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("value", [1.0, 1000.0, 4096.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_means_of_large_maps(
    backend: BackendCase, dtype: torch.dtype, size: int, value: float, layout: str
) -> None:
    """A sum kept in half precision would stall at 2048 or overflow at 65504."""
    channels = 3
    x = torch.full((1, channels, size, size), value, dtype=dtype, device=backend.device)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    mean = squeeze(x, backend=backend.name)
    assert torch.equal(mean, torch.full_like(x[:, :, 0, 0], value))
    # y = x * mean(x) / value, all powers of two but value itself.
    eye = torch.eye(channels, dtype=dtype, device=backend.device)
    down = 2.0**-10
    y = squeeze_excite(
        x, eye * down, None, eye, None, activation="identity", gate="identity",
        backend=backend.name,
    )  # fmt: skip
    expected = torch.tensor(value * (value * down), dtype=torch.float64).to(dtype)
    assert torch.equal(y, torch.full_like(x, expected.item()))


@pytest.mark.parametrize(("backend", "dtype"), dtype_cases(), indirect=["backend"])
def test_exact_sums(backend: BackendCase, dtype: torch.dtype) -> None:
    """Small integers and a power of two of positions: no rounding anywhere, so equal bits."""
    for shape in ((2, 8, 16, 16), (3, 5, 64), (1, 33, 4, 4, 2)):
        integers = torch.randint(-2, 3, shape, dtype=torch.float64)
        weight = torch.randint(-1, 2, (4, shape[1]), dtype=torch.float64)
        bias = torch.randint(-2, 3, (4,), dtype=torch.float64)
        args = (integers, weight, bias, weight.T.contiguous(), None)
        right = oracle.block(*args, gate="identity").to(dtype)
        ours = squeeze_excite(
            *(None if t is None else t.to(backend.device, dtype) for t in args),
            gate="identity", backend=backend.name,
        )  # fmt: skip
        assert torch.equal(ours, right.to(backend.device))


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize(("backend", "dtype"), dtype_cases(), indirect=["backend"])
def test_large_logits(backend: BackendCase, dtype: torch.dtype, size: float) -> None:
    """Saturated gates are exactly 0 or 1, and their gradients 0, never NaN."""
    if dtype == torch.float16 and size > torch.finfo(dtype).max:
        size = 6e4
    for gate, activation in itertools.product(
        ("sigmoid", "hardsigmoid", "tanh"), ("relu", "silu", "gelu", "gelu_tanh", "mish")
    ):
        if size > 1e10 and activation == "gelu_tanh":
            continue  # eager's own derivative, 0 * Inf, is NaN there
        problem = build(
            Spec((2, 4, 3, 3), 2, dtype, gate=gate, activation=activation, device=backend.device)
        )
        b1, b2 = problem.tensors["b1"], problem.tensors["b2"]
        x, w1 = problem.tensors["x"], problem.tensors["w1"]
        assert b1 is not None
        assert b2 is not None
        assert x is not None
        assert w1 is not None
        w1.fill_(0)
        b1.copy_(torch.tensor([-size, -1.0]))  # silu(-size) is 0, not NaN
        b2.copy_(torch.tensor([size, -size, size, -size]))
        results = problem.run(squeeze_excite, backend=backend.name)
        low = -1.0 if gate == "tanh" else 0.0
        scale = torch.tensor([1.0, low, 1.0, low], device=x.device).to(dtype)[:, None, None]
        assert torch.equal(results["y"], x * scale)
        for name in ("dw1", "db1", "dw2", "db2"):
            assert torch.equal(results[name], torch.zeros_like(results[name])), (gate, name)
        assert torch.equal(results["dx"], problem.dy * scale)


@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_half_overflows_only_when_stored(backend: BackendCase) -> None:
    """p * scale + residual may pass 65504 on the way; the result may not be infinite for it."""
    if torch.float16 not in backend.dtypes:
        pytest.skip("the feature table leaves float16 to the reference")
    x = torch.full((1, 2, 4, 4), 40000.0, dtype=torch.float16, device=backend.device)
    zero = torch.zeros(2, 2, dtype=torch.float16, device=backend.device)
    three = torch.full((2,), 3.0, dtype=torch.float16, device=backend.device)

    def run(residual: Tensor) -> Tensor:
        return squeeze_excite(
            x, zero, None, zero, three, gate="identity", residual=residual, backend=backend.name
        )

    assert torch.equal(run(torch.full_like(x, -60000.0)), torch.full_like(x, 60000.0))
    assert run(torch.full_like(x, 1.0)).isposinf().all()
    mean = squeeze(x, backend=backend.name)
    assert torch.equal(mean, torch.full_like(x[:, :, 0, 0], 40000.0))


@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_halves_of_the_block_pass_nan_on(backend: BackendCase) -> None:
    if not backend.takes("squeeze alone", "channel_scale alone"):
        pytest.skip("the feature table leaves the halves to the reference")
    x = torch.ones(2, 3, 4, device=backend.device)
    x[1, 2, 3] = math.nan
    assert kinds(squeeze(x, backend=backend.name)).tolist() == [[0, 0, 0], [0, 0, 1]]
    u = torch.zeros(2, 3, device=backend.device)
    u[0, 1] = math.inf
    saturated, infinite = (
        channel_scale(x, u, gate=gate, backend=backend.name) for gate in ("sigmoid", "identity")
    )
    assert saturated[0].isfinite().all()
    assert kinds(infinite)[0].tolist() == [[0] * 4, [2] * 4, [0] * 4]
    for y in (saturated, infinite):
        assert y[1].isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("value", [-3.0, -4.0])
@pytest.mark.parametrize("upstream", [math.nan, math.inf])
@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_hardswish_is_flat_up_to_minus_three(
    backend: BackendCase, upstream: float, value: float
) -> None:
    """Its kink included: the gradient is 0 there and not 0 * Inf, as PyTorch's is."""
    x = torch.full((1, 8, 16), value, device=backend.device, requires_grad=True)
    dy = torch.full_like(x, upstream)
    w = torch.eye(8, device=backend.device)
    y = squeeze_excite(
        x, None, None, w, None, gate="identity", before="hardswish", backend=backend.name
    )
    assert not torch.autograd.grad(y, x, dy)[0].any()


@pytest.mark.parametrize("part", ["whole", "squeeze"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
def test_lengths_of_none_and_of_all(backend: BackendCase, layout: str, part: str) -> None:
    """An empty mean is NaN, in its own image alone, and passes no gradient to any position; what
    lies beyond a length is not looked at."""
    spec = replace(_SPEC, layout=layout, lengths=True, part=part, device=backend.device)
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    problem = build(spec)
    x = problem.tensors["x"]
    assert x is not None
    positions = x.shape[2:].numel()
    problem.lengths = torch.tensor([positions, 0, 1], device=backend.device)
    if part == "squeeze":
        x[2, :, 1:] = math.nan
    actual, expected = problem.run(squeeze_excite, backend=backend.name), problem.expected()
    for name in ("y", "dx"):
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=1e-4, atol=1e-5, equal_nan=True
        )
