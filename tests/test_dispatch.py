"""Choosing a backend: argument, context manager, environment, automatic; never a silent change."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from backend_cases import FUSED_BACKENDS, BackendCase
from problems import HALVES, Spec, build
from senet_kernels import (
    BackendUnavailableError,
    backends,
    explain,
    resolve,
    squeeze_excite,
    use_backend,
)
from senet_kernels.backends import native
from senet_kernels.dispatch import ENVIRONMENT_VARIABLE, NAMES, ORDER
from senet_kernels.features import COLUMNS, FALLS_BACK, FEATURES, FUSED

each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)


def _chosen(device: str = "cpu", **extra: Any) -> str:
    name: str = build(Spec(device=device)).call(explain, **extra).backend
    return name


@pytest.mark.usefixtures("automatic")
@each_fused
def test_precedence(backend: BackendCase) -> None:
    chosen = partial(_chosen, backend.device)
    assert chosen() == backend.name
    with use_backend("reference"):
        assert chosen() == "reference"
        assert chosen(backend=backend.name) == backend.name
        assert chosen(backend="auto") == backend.name
        with use_backend(backend.name):
            assert chosen() == backend.name
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == backend.name
        with use_backend("auto"):
            assert chosen() == backend.name
        assert chosen() == "reference"
    assert chosen() == backend.name
    assert chosen(backend="reference") == "reference"


def test_context_manager_restores_after_an_error() -> None:
    before = _chosen()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _chosen() == before


@pytest.mark.usefixtures("automatic")
@pytest.mark.parametrize("part", HALVES)
@each_fused
def test_halves_choose_as_the_whole_does(
    backend: BackendCase, part: str, record_ops: Callable[[], set[str]]
) -> None:
    problem = build(Spec(part=part, device=backend.device))
    right = problem.run(squeeze_excite, backend="reference")
    assert not record_ops()
    taken = backend.takes(f"{part} alone")
    name = f"senet_kernels::{backend.name}_{part}"
    ours = {name, f"{name}_backward"}
    with use_backend(backend.name):
        if taken:
            problem.run(squeeze_excite)
            assert record_ops() == ours
        else:
            with pytest.raises(BackendUnavailableError, match=f"{part} alone"):
                problem.run(squeeze_excite)
        assert problem.run(squeeze_excite, backend="reference").keys() == right.keys()
        assert not record_ops()
    problem.run(squeeze_excite)
    assert record_ops() == (ours if taken else set())


def test_halves_without_the_library_fall_back(no_native: str) -> None:
    for part in HALVES:
        problem = build(Spec(part=part))
        results = [problem.run(squeeze_excite, backend=b) for b in (None, "fallback")]
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name])
        with pytest.raises(BackendUnavailableError, match=no_native):
            problem.call(squeeze_excite, backend="native")


_SCRIPT = (
    "import torch, senet_kernels as sk\n"
    "x, w = torch.randn(2, 8, 3), torch.randn(4, 8)\n"
    "def chosen(**k): return sk.explain(x, w, None, w.T, None, **k).backend\n"
    "print(chosen(), chosen(backend='reference'))\n"
    "with sk.use_backend('reference'): print(chosen())\n"
)


def _with_environment(value: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != ENVIRONMENT_VARIABLE}
    if value is not None:
        env[ENVIRONMENT_VARIABLE] = value
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize(
    "value",
    ["reference", "", *(pytest.param(v, marks=pytest.mark.slow) for v in ("auto", None))],
)
def test_environment_variable(value: str | None) -> None:
    done = _with_environment(value)
    assert done.returncode == 0, done.stderr
    automatic = next(name for name in ORDER if backends()[name])
    expected = "reference" if value == "reference" else automatic
    assert done.stdout.split() == [expected, "reference", "reference"]


def test_backends_are_a_mapping() -> None:
    there = dict(backends())
    assert list(there) == list(NAMES)
    assert len(backends()) == len(NAMES)
    assert there["reference"] is there["fallback"] is True


def test_environment_variable_is_checked() -> None:
    done = _with_environment("gpu")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {ENVIRONMENT_VARIABLE}: expected one of auto, native")
    assert "'gpu'" in last


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> str:
    """As on an installation without the compiled library."""
    reason = "the compiled library is not installed: no compiler was found"
    monkeypatch.setattr(native, "UNAVAILABLE", reason)
    monkeypatch.setattr("senet_kernels.resolve._RESOLVED", {})
    return reason


def test_unavailable_backend_is_refused_with_the_reason(no_native: str) -> None:
    problem = build(Spec())
    with pytest.raises(BackendUnavailableError, match=no_native):
        problem.call(squeeze_excite, backend="native")
    with use_backend("native"), pytest.raises(BackendUnavailableError, match=no_native):
        problem.call(squeeze_excite)
    answer = problem.call(explain)
    assert answer.backend == "fallback"
    assert dict(answer.passed_over)["native"] == no_native
    assert not backends()["native"]
    assert backends().reasons["native"] == no_native
    assert f"native: not available: {no_native}" in repr(backends())


def test_automatic_falls_back_to_the_same_result(no_native: str) -> None:
    problem = build(Spec(residual="contiguous", after="relu"))
    results = [problem.run(squeeze_excite, backend=b) for b in (None, "auto", "fallback")]
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, result[name])


@pytest.fixture
def native_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not backends()["native"]:
        pytest.skip("the compiled library is not there")
    monkeypatch.setattr(resolve, "_RESOLVED", {})


@pytest.mark.usefixtures("native_on_cpu")
@pytest.mark.parametrize("gradients", [False, True])
def test_usual_calls_are_not_checked_twice(
    gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second one on; all others are, and messages are those of the checks."""
    tensors = build(Spec()).leaves()
    layers = {name: tensors[name] for name in ("x", "w1", "b1", "w2", "b2")}
    x = tensors["x"]
    assert x is not None

    def call(**extra: Any) -> Tensor:
        with torch.set_grad_enabled(gradients):
            y = squeeze_excite(**{**layers, **extra})
        assert y.requires_grad == gradients
        return y

    expected = call()

    def checked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr(resolve, "prepare", checked)
    for backend in (None, "auto"):
        assert torch.equal(call(backend=backend), expected)
    with use_backend("auto"):
        assert torch.equal(call(), expected)
    for extra in (
        {"backend": "native"},  # not yet asked for
        {"backend": ""},
        {"gate": "tanh"},
        {"gate": []},
        {"alpha": x[0, :, 0, 0]},
        {"lengths": torch.ones(len(x), dtype=torch.int64)},
        {"b1": torch.zeros(1)},  # refused by the op
        {"b2": torch.zeros(x.shape[1], 1)},
        {"w2": None},
    ):
        with pytest.raises(AssertionError, match="checked"):
            call(**extra)
    for context in (torch.autocast("cpu"), FlopCounterMode(display=False), BaseTorchFunctionMode()):
        with context, pytest.raises(AssertionError, match="checked"):
            call()


@pytest.mark.usefixtures("native_on_cpu")
def test_errors_of_hooks_are_raised_once() -> None:
    tensors = build(Spec()).leaves()
    arguments = [tensors[name] for name in ("x", "w1", "b1", "w2", "b2")]
    squeeze_excite(*arguments)
    times = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal times
        times += 1
        raise RuntimeError("of the hook")

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, pytest.raises(RuntimeError, match="of the hook"):
        squeeze_excite(*arguments)
    assert times == 1


@pytest.mark.usefixtures("native_on_cpu")
def test_a_refused_call_keeps_nothing_alive() -> None:
    x, w, b = torch.randn(2, 4, 3, 3), torch.randn(4, 4), torch.randn(4)
    squeeze_excite(x, w, b, w, b)
    gc.collect()
    gc.disable()
    try:
        kept = weakref.ref(x)
        with pytest.raises(ValueError, match="b1: expected shape"):
            squeeze_excite(x, w, b[:3], w, b)
        del x
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("native_on_cpu")
def test_extents_after_those_of_an_empty_matrix_are_checked() -> None:
    x, b2 = torch.randn(2, 4, 3, 3), torch.randn(4)
    squeeze_excite(x, torch.randn(2, 4), None, torch.randn(4, 2), b2)
    for extra, w2 in ((7, torch.randn(4, 0)), (1, torch.randn(4, 0, 0, 5))):
        with pytest.raises(ValueError, match="trailing extents of 1"):
            squeeze_excite(x, torch.randn(0, 4, extra), None, w2, b2)


@pytest.mark.usefixtures("native_on_cpu")
@pytest.mark.parametrize(
    ("row", "spec"),
    [
        ("residual", Spec(residual="contiguous")),
        ("dtype bfloat16", Spec(dtype=torch.bfloat16)),
        ("scale-and-shift (w2 with 2C rows)", Spec(shift=True)),
        ("single layer (w1=None)", Spec(hidden=None)),
    ],
)
def test_what_the_table_excludes_is_not_run_after_other_calls(
    row: str, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = COLUMNS.index(("native", "cpu"))
    cells = [FALLS_BACK if i == column else FUSED for i in range(len(COLUMNS))]
    monkeypatch.setitem(FEATURES, row, tuple(cells))
    build(Spec()).call(squeeze_excite, backend="native")
    with pytest.raises(BackendUnavailableError, match="no fused kernel for"):
        build(spec).call(squeeze_excite, backend="native")


@each_fused
def test_context_manager_forces_what_runs(
    backend: BackendCase, record_ops: Callable[[], set[str]]
) -> None:
    problem = build(Spec(device=backend.device))
    with use_backend("reference"):
        problem.run(squeeze_excite)
    assert not record_ops()
    with use_backend(backend.name):
        problem.run(squeeze_excite)
    assert record_ops() == {
        f"senet_kernels::{backend.name}_{part}" for part in ("forward", "backward")
    }


def test_the_first_trace_of_a_process_passes_its_own_check() -> None:
    """``torch.jit.trace`` runs a module twice and compares: the first call of a kind, and a later
    one, which could go the short way, give one graph."""
    code = (
        "import torch; from senet_kernels import FusedSEBlock\n"
        "with torch.no_grad(): torch.jit.trace(FusedSEBlock(8), torch.randn(2, 8, 5, 5))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
