"""Autocast: eager's dtypes, and float32 parameters beside x in half precision in every kernel.

Every call names its backend, which then runs it or raises: on CUDA the automatic choice is the
reference.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import BACKENDS, BackendCase, dtype_cases
from problems import Spec, build, magnitudes, off_the_kinks
from senet_kernels import FusedSEBlock, channel_scale, squeeze, squeeze_excite

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@each_backend
def test_autocast_gives_eagers_dtype(
    backend: BackendCase, autocast: torch.dtype, residual: bool
) -> None:
    for x_dtype, parameters in itertools.product(_DTYPES, _DTYPES):
        added = "contiguous" if residual else None
        problem = build(Spec((2, 8, 3, 5), 4, residual=added, device=backend.device))
        tensors: dict[str, Tensor | None] = {
            n: None if t is None else t.to(x_dtype if n in ("x", "residual") else parameters)
            for n, t in problem.tensors.items()
        }
        leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
        with torch.autocast(backend.device, autocast):
            eager = problem.call(oracle.eager_block, leaves)
            ours = problem.call(squeeze_excite, leaves, backend=backend.name)
        where = f"{x_dtype} x, {parameters} parameters"
        assert ours.dtype == eager.dtype, where
        # Parameters are not rounded to half, so ours is nearer the truth than eager.
        torch.testing.assert_close(ours.float(), eager.float(), rtol=0.05, atol=0.05, msg=where)
        ours.float().square().sum().backward()
        for name, leaf in leaves.items():
            if leaf is not None:
                assert leaf.grad is not None, f"{where}: {name}"
                assert leaf.grad.dtype == leaf.dtype, f"{where}: {name}"
                assert leaf.grad.isfinite().all(), f"{where}: {name}"


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@each_backend
def test_autocast_of_a_weighted_sum_keeps_the_dtype_of_x(
    backend: BackendCase, autocast: torch.dtype
) -> None:
    """alpha and beta in float32 are used so, and do not make a float32 model of the rest."""
    for x_dtype, parameters in itertools.product(_DTYPES, _DTYPES):
        block = FusedSEBlock(
            8, 4, weighted_sum=True, device=backend.device, dtype=parameters, backend=backend.name
        )
        x = torch.randn(2, 8, 3, 5, device=backend.device, dtype=x_dtype)
        with torch.autocast(backend.device, autocast):
            g = block.fc2(block.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
            eager = block.alpha[:, None, None] * x + block.beta[:, None, None] * (g * x)
            ours = block(x)
        expected = torch.promote_types(x_dtype, autocast)
        assert ours.dtype == expected, f"{x_dtype} x, {parameters} parameters"
        torch.testing.assert_close(ours.float(), eager.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@each_backend
def test_autocast_of_halves_gives_eagers_dtype(backend: BackendCase, autocast: torch.dtype) -> None:
    """No half has a layer: what it is given decides."""
    for x_dtype, other in itertools.product(_DTYPES, _DTYPES):
        x = torch.randn(2, 8, 3, 5, device=backend.device, dtype=x_dtype)
        u, alpha = (torch.randn(s, device=backend.device, dtype=other) for s in ((2, 8), (8,)))
        with torch.autocast(backend.device, autocast):
            assert squeeze(x, backend=backend.name).dtype == x_dtype
            scaled = channel_scale(x, u, gate="sigmoid", backend=backend.name)
            weighted = channel_scale(x, u.to(x_dtype), alpha=alpha, backend=backend.name)
            eager = x * u.sigmoid()[:, :, None, None]
        assert scaled.dtype == eager.dtype, f"{x_dtype} x, {other} u"
        assert weighted.dtype == x_dtype, f"{x_dtype} x, {other} alpha"
        torch.testing.assert_close(scaled.float(), eager.float(), rtol=0.05, atol=0.05)


@each_backend
def test_autocast_of_float64_is_eagers(backend: BackendCase) -> None:
    """autocast leaves float64 alone: with float64 parameters right, with others a clear error."""
    problem = build(Spec((2, 8, 3, 5), 4, torch.float64, device=backend.device))
    right = problem.call(oracle.block)
    with torch.autocast(backend.device, torch.bfloat16):
        y = problem.call(squeeze_excite, backend=backend.name)
        torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
        mixed = {
            n: None if t is None else t if n == "x" else t.float()
            for n, t in problem.tensors.items()
        }
        with pytest.raises(TypeError, match=r"w1.*float64.*float32"):
            problem.call(squeeze_excite, mixed, backend=backend.name)


@each_backend
def test_disabled_autocast_changes_nothing(backend: BackendCase) -> None:
    problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))
    plain = problem.call(squeeze_excite, backend=backend.name)
    with torch.autocast(backend.device, torch.bfloat16):
        with torch.autocast(backend.device, enabled=False):
            assert torch.equal(problem.call(squeeze_excite, backend=backend.name), plain)
        inside = problem.call(squeeze_excite, backend=backend.name)
    assert inside.dtype == torch.float32


_FORMS: tuple[dict[str, Any], ...] = (
    {"residual": "contiguous", "after": "relu"},
    {"weighted": True, "affine": True, "before": "silu", "layout": "channels_last"},
    {"hidden": None, "shift": True, "after": "silu"},
    {"part": "channel_scale", "weighted": True, "after": "relu", "layout": "channels_last"},
)


@pytest.mark.parametrize(
    ("backend", "dtype"), dtype_cases((torch.bfloat16, torch.float16)), indirect=["backend"]
)
@pytest.mark.parametrize("form", _FORMS, ids=lambda form: str(Spec(**form)))
def test_float32_parameters_are_used_as_they_are(
    backend: BackendCase, dtype: torch.dtype, form: dict[str, Any]
) -> None:
    """Beside x in half precision. Their gradients are the oracle's to float32's accuracy: one
    rounded to bfloat16 on the way would be seen."""
    spec = replace(Spec((3, 24, 5, 7), 6, device=backend.device), **form)
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    problem = build(spec)
    for name in ("x", "residual", "u"):
        t = problem.tensors.get(name)
        if t is not None:
            problem.tensors[name] = t.to(dtype)
    problem.dy = off_the_kinks(problem).to(dtype)
    leaves = problem.leaves()
    with torch.autocast(backend.device, dtype):
        y = problem.call(squeeze_excite, leaves, backend=backend.name)
    inputs = [leaves[name] for name in problem.given]
    gradients = torch.autograd.grad(y, inputs, problem.dy)
    results = {f"d{n}": g for n, g in zip(problem.given, gradients, strict=True)} | {"y": y}
    right, sizes = problem.expected(), magnitudes(problem)
    for name, result in results.items():
        of = problem.tensors["x" if name == "y" else name[1:]]
        assert of is not None
        oracle.assert_like_oracle({name: result}, {name: right[name]}, sizes, of.dtype)
