"""Any legal call, drawn at random, against the oracle."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from backend_cases import BACKENDS, BackendCase
from problems import LAYOUTS, TENSORS, Spec, build, magnitudes
from senet_kernels import squeeze_excite

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# Reproducible in the gate; SENET_KERNELS_FUZZ=1 draws anew each time.
_COMMON = settings(
    deadline=None,
    derandomize=os.environ.get("SENET_KERNELS_FUZZ") != "1",
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_GATE = settings(_COMMON, max_examples=150)
_LONG = settings(_COMMON, max_examples=3000)

_EXTENT = st.one_of(
    st.integers(1, 9), st.sampled_from((13, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 97, 128, 130))
)
_SPACE = st.one_of(
    st.tuples(_EXTENT),
    st.tuples(st.integers(1, 33), st.integers(1, 33)),
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
)


@st.composite
def _specs(draw: st.DrawFn, backend: BackendCase) -> Spec:
    batch = draw(st.integers(1, 6))
    channels, space = draw(_EXTENT), draw(_SPACE)
    # Keep an example within a hundred thousand elements.
    while batch * channels * math.prod(space) > 100_000 and batch > 1:
        batch -= 1
    single = backend.takes("single layer (w1=None)") and draw(st.integers(0, 5)) == 0
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
    return Spec(
        shape=(batch, channels, *space),
        hidden=None if single else draw(_EXTENT),
        dtype=draw(st.sampled_from(backend.dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        residual=draw(st.one_of(st.none(), st.sampled_from(LAYOUTS))),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        bias=draw(st.booleans()),
        weights=draw(st.sampled_from(("matrix", "conv", "transposed", "nhwc"))),
        device=backend.device,
        seed=draw(st.integers(0, 1 << 20)),
        **names,
        **extras,
    )


def _property(backend: BackendCase, data: st.DataObject) -> None:
    spec = data.draw(_specs(backend), label="spec")
    problem = build(spec)
    asked = data.draw(
        st.lists(st.sampled_from(problem.given), unique=True).map(
            lambda names: tuple(n for n in TENSORS if n in names)
        ),
        label="gradients asked for",
    )
    torch.set_num_threads(data.draw(st.integers(1, 3), label="threads"))
    actual = problem.run(squeeze_excite, asked, backend=backend.name)
    expected = problem.expected(asked)
    oracle.assert_like_oracle(actual, expected, magnitudes(problem), spec.dtype)
    again = problem.run(squeeze_excite, asked, backend=backend.name)
    for name, value in actual.items():
        assert torch.equal(again[name], value), f"{name} differs on the second run"


each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)


@each_backend
@_GATE
@given(data=st.data())
def test_any_call(backend: BackendCase, data: st.DataObject) -> None:
    _property(backend, data)


@pytest.mark.slow
@each_backend
@_LONG
@given(data=st.data())
def test_any_call_long(backend: BackendCase, data: st.DataObject) -> None:
    _property(backend, data)
