"""Each pointwise function in each place it may stand, at dense points, against torch's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import EXACT_BACKENDS, BackendCase, dtype_cases
from senet_kernels import ACTIVATIONS, GATES, pack_options, squeeze_excite
from senet_kernels.pointwise import POINTWISE, Options, pack, unpack
from special import limits, scalar, vectorised

#: Points to an image.
_ABREAST = 64
_EDGES = (0.0, -0.0, 6.0, -6.0, 3.0, -3.0, 2.5, -2.5, 1e-8, -1e-8, 20.0, -20.0, 1e-30, -1e-30)


def _grid(dtype: torch.dtype) -> Tensor:
    """Points everywhere a function bends, the kinks and their neighbours, and far out."""
    kinks = torch.tensor(_EDGES, dtype=dtype)
    towards = [torch.nextafter(kinks, torch.full_like(kinks, v)) for v in (-100.0, 100.0)]
    far = torch.logspace(0, 4, 100, dtype=torch.float64)
    points = [torch.linspace(-12, 12, 2401, dtype=torch.float64), far, -far]
    return torch.cat([kinks, *towards, *(p.to(dtype) for p in points)])


def _value_and_derivative(fn: object, points: Tensor) -> tuple[Tensor, Tensor]:
    leaf = points.clone().requires_grad_()
    y = fn(leaf)  # type: ignore[operator]
    return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def _through(backend: BackendCase, argument: str, name: str, points: Tensor) -> tuple[Tensor, ...]:
    """Value and derivative of the function at ``points``, read off a call of the operation.

    ``before`` and ``after``: the scale is 1, so y is the function of x. ``activation`` and
    ``gate``: the first channels of an image carry points, as many others are 1 and get scaled by
    the function, each of one point.
    """
    like = {"dtype": points.dtype, "device": backend.device}
    names = {"activation": "identity", "gate": "identity", "before": None, "after": None}
    names[argument] = name
    if argument in ("before", "after"):
        x = points.to(**like)[None, None, :]
        w = torch.zeros(1, 1, **like)
        u = torch.ones(1, **like)
        pick = torch.ones_like(x)
        w2 = w
    else:
        rows = torch.nn.functional.pad(points, (0, -len(points) % _ABREAST)).view(-1, _ABREAST)
        x = torch.cat([rows, torch.ones_like(rows)], 1)[:, :, None].to(**like)
        one = torch.eye(_ABREAST, **like)
        w = torch.cat([one, torch.zeros_like(one)], 1)
        w2 = torch.cat([torch.zeros_like(one), one])
        u = None
        pick = torch.zeros_like(x)
        pick[:, _ABREAST:] = 1
    leaf = x.requires_grad_()
    y = squeeze_excite(leaf, w, None, w2, u, **names, backend=backend.name)  # type: ignore[arg-type]
    (dx,) = torch.autograd.grad(y, leaf, pick)
    if u is not None:
        return y.detach().reshape(-1).cpu(), dx.reshape(-1).cpu()
    taken = y.detach()[:, _ABREAST:].reshape(-1)[: len(points)]
    return taken.cpu(), dx[:, :_ABREAST].reshape(-1)[: len(points)].cpu()


_PLACES = [
    pytest.param(backend, dtype, argument, name, id=f"{backend}-{str(dtype)[6:]}-{argument}-{name}")
    for backend in EXACT_BACKENDS
    for dtype in backend.dtypes
    for argument in ("activation", "gate", "before", "after")
    for name in backend.names(argument)
]


@pytest.mark.parametrize(("backend", "dtype", "argument", "name"), _PLACES, indirect=["backend"])
def test_against_torch(backend: BackendCase, dtype: torch.dtype, argument: str, name: str) -> None:
    points = _grid(dtype)
    exact = _value_and_derivative(oracle.FUNCTIONS[name], points.double())
    ours = _through(backend, argument, name, points)
    computed = torch.promote_types(dtype, torch.float32)
    # 1 ulp of the result where it is rounded to half; a few of the values summed on the way.
    own = oracle.ulp(dtype) if dtype != computed else 0.0
    for what, got, right in zip(("value", "derivative"), ours, exact, strict=True):
        # gelu_tanh' multiplies what cancels in 1 - tanh by up to 40, in eager too.
        ulps = 64 if name == "gelu_tanh" and what == "derivative" else 8
        allowed = own * right.abs() + ulps * oracle.ulp(computed) * (1 + right.abs())
        if dtype == torch.float16:
            allowed += 2**-24  # half of a subnormal
        off = (got.double() - right).abs()
        # A point rounded onto a kink may take either side's derivative there, eager's included.
        if what == "derivative":
            off = off.masked_fill(_at_a_kink(name, points), 0)
        worst = int((off - allowed).argmax())
        assert (off <= allowed).all(), (
            f"{what} at {points[worst].item()!r}: got {got[worst].item()!r}, "
            f"expected {right[worst].item()!r}"
        )


def _at_a_kink(name: str, points: Tensor) -> Tensor:
    near = [(points.double() - kink).abs() <= 1e-6 for kink in oracle.KINKS.get(name, ())]
    return torch.stack(near).any(0) if near else torch.zeros_like(points, dtype=torch.bool)


@pytest.mark.parametrize(("backend", "dtype"), dtype_cases(), indirect=["backend"])
def test_derivatives_at_kinks_are_eagers(backend: BackendCase, dtype: torch.dtype) -> None:
    """Exactly at a kink eager picks one side, and so must we, in the dtype we compute in; and the
    sides, of each function everywhere, where a backend's other cases are but a sample.

    (clamp has changed its mind at its ends, from 1 to 0 in torch 2.15; here it stays 1.)
    """
    computed = torch.promote_types(dtype, torch.float32)
    for argument in ("activation", "gate", "before", "after"):
        for name in backend.names(argument):
            kinks = oracle.KINKS.get(name, (0.0,))
            points = torch.tensor([k + d for k in kinks for d in (-0.5, 0.0, 0.5)], dtype=dtype)
            _, right = _value_and_derivative(oracle.FUNCTIONS[name], points.to(computed))
            _, got = _through(backend, argument, name, points)
            where = f"{argument} {name} at {points.tolist()}: {got.tolist()}, {right.tolist()}"
            error = 8 * oracle.ulp(dtype)
            assert torch.allclose(got, right.to(dtype), rtol=error, atol=error), where


@pytest.mark.parametrize(("backend", "dtype"), dtype_cases(), indirect=["backend"])
def test_gates_at_nan(backend: BackendCase, dtype: torch.dtype) -> None:
    """A gate's derivative at NaN is not finite, or the one that eager has there."""
    like = {"dtype": dtype, "device": backend.device}
    x, w2 = torch.ones(2, 2, 4, **like), torch.tensor([[math.nan, 0.0], [0.0, 1.0]], **like)
    for gate in backend.names("gate"):
        b2 = torch.zeros(2, **like, requires_grad=True)
        y = squeeze_excite(x, None, None, w2, b2, gate=gate, backend=backend.name)
        assert y[:, 0].isnan().all()
        (got,) = torch.autograd.grad(y.sum(), b2)
        at_nan = torch.full((16,), math.nan, dtype=torch.promote_types(dtype, torch.float32))
        allowed = [
            _value_and_derivative(rule(gate, oracle.FUNCTIONS[gate]), at_nan)[1][0].item()
            for rule in (vectorised, scalar, limits)
        ]
        due = [8 * derivative for derivative in allowed]  # 2 images of 4 positions
        assert not got[0].isfinite() or any(
            math.isclose(got[0].item(), d, rel_tol=1e-6 + 2 * oracle.ulp(dtype)) for d in due
        ), f"{gate}: {got[0].item()}, eager {due}"


def test_names_are_those_of_their_places() -> None:
    assert {n for n, row in POINTWISE.items() if row.is_activation} == set(ACTIVATIONS)
    assert {n for n, row in POINTWISE.items() if row.is_gate} == set(GATES)
    assert set(oracle.KINKS) <= set(POINTWISE)


@pytest.mark.parametrize("name", POINTWISE)
def test_definitions(name: str) -> None:
    """The table's own definitions, which every fallback runs."""
    points = _grid(torch.float64)
    ours = _value_and_derivative(POINTWISE[name].fn, points)
    for got, right in zip(ours, _value_and_derivative(oracle.FUNCTIONS[name], points), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_codes_are_what_kernels_were_built_with() -> None:
    """Codes are stored in programs (exported, compiled): they never change."""
    codes = {name: row.code for name, row in POINTWISE.items()}
    released = {
        "identity": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5,
        "hardswish": 6, "leaky_relu": 7, "mish": 8, "sigmoid": 9, "hardsigmoid": 10,
        "hardsigmoid_02": 11, "tanh": 12,
    }  # fmt: skip
    assert released.items() <= codes.items()
    assert sorted(codes.values()) == list(range(len(codes)))
    assert len(codes) <= 16, "an option has four bits"


def test_cpp_has_the_same_codes() -> None:
    """The build writes them; an edited table wants a build."""
    header = Path(__file__).parent.parent / "csrc" / "pointwise_codes.h"
    found = re.findall(r"^  (\w+) = (\d+),$", header.read_text(), re.MULTILINE)
    assert [(name, int(code)) for name, code in found] == [
        (name, row.code) for name, row in POINTWISE.items()
    ]


def test_options_pack_into_one_integer_and_back() -> None:
    seen = set()
    for activation in ACTIVATIONS:
        for gate in GATES:
            for before, after in (("identity", "mish"), ("mish", "relu"), ("silu", "identity")):
                options = Options(activation, gate, before, after)
                code = pack_options(**options._asdict())
                assert code == pack(options)
                assert unpack(code) == options
                seen.add(code)
    assert len(seen) == len(ACTIVATIONS) * len(GATES) * 3
    assert pack_options() == pack(Options("relu", "sigmoid", "identity", "identity"))
    assert pack_options(activation=None, gate=None, before=None, after=None) == 0
