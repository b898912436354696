"""torch.func transforms, forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.func import vmap as torch_vmap

import oracle
from backend_cases import BACKENDS, FUSED_BACKENDS, BackendCase
from problems import HALVES, Problem, Spec, build
from senet_kernels import FusedSEBlock, NativeSEFunction, pack_options, squeeze_excite

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)

# What can be mapped at all: silu keeps every case off the kinks, relu takes the bit mask along.
_SPECS = (
    Spec((3, 4, 2, 5), 3, torch.float64, activation="silu"),
    Spec((3, 4, 2, 5), 3, torch.float64, residual="contiguous", after="relu", before="silu"),
    Spec((3, 4, 2, 5), 3, torch.float64, residual="contiguous", after="silu", bias=False),
)
each_spec = pytest.mark.parametrize("spec", _SPECS, ids=str)


def _as_function(
    problem: Problem, fn: Callable[..., Tensor], **extra: Any
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[str, ...]]:
    """``fn`` of the tensors the problem has, those tensors, and their names."""
    names = problem.given

    def call(*values: Tensor) -> Tensor:
        tensors = {**problem.tensors, **dict(zip(names, values, strict=True))}
        return problem.call(fn, tensors, **extra)

    return call, tuple(t for n in names if (t := problem.tensors[n]) is not None), names


def _both(
    spec: Spec, backend: BackendCase
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], tuple[str, ...]]:
    problem = build(replace(spec, device=backend.device))
    ours, values, names = _as_function(problem, squeeze_excite, backend=backend.name)
    right, _, _ = _as_function(problem, oracle.block)
    return ours, right, values, names


def _close(got: Any, right: Any) -> None:
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@each_spec
@each_backend
def test_grad_vjp_and_jacobians(backend: BackendCase, spec: Spec) -> None:
    ours, right, values, names = _both(spec, backend)
    every = tuple(range(len(names)))
    dy = torch.randn_like(values[0])

    def scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *v: (fn(*v) * dy).sum()

    _close(grad(scalar(ours), every)(*values), grad(scalar(right), every)(*values))
    _close(vjp(ours, *values)[1](dy), vjp(right, *values)[1](dy))
    _close(jacrev(ours, every)(*values), jacrev(right, every)(*values))
    _close(jacfwd(ours, every)(*values), jacfwd(right, every)(*values))
    some = (0, 1)
    _close(hessian(scalar(ours), some)(*values), hessian(scalar(right), some)(*values))
    twice = grad(lambda *v: grad(scalar(ours))(*v).square().sum(), every)
    _close(twice(*values), grad(lambda *v: grad(scalar(right))(*v).square().sum(), every)(*values))


def _loop(fn: Callable[..., Any], in_dims: tuple[int | None, ...], values: Any) -> Any:
    """What ``vmap`` means."""
    size = next(v.shape[d] for v, d in zip(values, in_dims, strict=True) if d is not None)
    results = [
        fn(*(v if d is None else v.select(d, i) for v, d in zip(values, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


@pytest.mark.parametrize("mapped", ["images", "weights", "everything", "x last", "bias"])
@each_spec
@each_backend
def test_vmap(backend: BackendCase, spec: Spec, mapped: str) -> None:
    ours, right, values, names = _both(spec, backend)
    dims: list[int | None] = []
    for name in names:
        image, first = name in ("x", "residual"), name == "x"
        chosen = {
            "images": image, "weights": not image, "everything": True, "x last": first,
            "bias": name in ("b1", "b2") or (first and not spec.bias),
        }[mapped]  # fmt: skip
        dims.append((-1 if mapped == "x last" else 0) if chosen else None)
    in_dims = tuple(dims)
    stacked = tuple(
        v if d is None else torch.stack([v, v * 0.5, v + 0.25], d)
        for v, d in zip(values, in_dims, strict=True)
    )
    _close(torch_vmap(ours, in_dims)(*stacked), _loop(right, in_dims, stacked))

    every = tuple(range(len(names)))

    def gradients(fn: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return grad(lambda *v: fn(*v).square().sum(), every)  # type: ignore[no-any-return]

    got = torch_vmap(gradients(ours), in_dims)(*stacked)
    _close(got, _loop(gradients(right), in_dims, stacked))

    # And the other way round: the gradient of a mapped call.
    def total(fn: Callable[..., Tensor], *v: Tensor) -> Tensor:
        return fn(*v).square().sum()

    got = grad(lambda *v: total(torch_vmap(ours, in_dims), *v), every)(*stacked)
    expected = grad(lambda *v: total(lambda *w: _loop(right, in_dims, w), *v), every)(*stacked)
    _close(got, expected)
    nested = (None, *in_dims[1:]) if in_dims[0] is None else in_dims
    twice = torch_vmap(torch_vmap(ours, nested), (0, *[None] * (len(names) - 1)))
    if in_dims[0] == 0:
        deeper = torch.stack([stacked[0], stacked[0] * 2])
        one = [torch_vmap(ours, nested)(x, *stacked[1:]) for x in deeper]
        _close(twice(deeper, *stacked[1:]), torch.stack(one))


@pytest.mark.parametrize("part", HALVES)
@each_backend
def test_transforms_of_halves(backend: BackendCase, part: str) -> None:
    """By the reference, whatever was asked for: right, never zeros."""
    spec = Spec((3, 4, 2, 5), dtype=torch.float64, part=part, before="silu", device=backend.device)
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    ours, right, values, _ = _both(spec, backend)
    every = tuple(range(len(values)))

    def scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *v: fn(*v).square().sum()

    _close(grad(scalar(ours), every)(*values), grad(scalar(right), every)(*values))
    tangents = tuple(torch.randn_like(v) for v in values)
    _close(jvp(ours, values, tangents), jvp(right, values, tangents))
    stacked = tuple(torch.stack([v, 2 * v]) for v in values)
    mapped = (0,) * len(values)
    _close(torch_vmap(ours)(*stacked), _loop(right, mapped, stacked))
    with fwAD.dual_level():
        dual = fwAD.make_dual(values[0], tangents[0])
        got = fwAD.unpack_dual(ours(dual, *values[1:])).tangent
        _close(got, fwAD.unpack_dual(right(dual, *values[1:])).tangent)


@each_backend
def test_vmap_in_place(backend: BackendCase) -> None:
    if not backend.takes("inplace"):
        pytest.skip("the feature table leaves in place to the reference")
    ours, _, values, _ = _both(_SPECS[0], backend)
    stacked = torch.stack([values[0], values[0] / 2, values[0] + 1])
    right = torch.stack([ours(x, *values[1:]) for x in stacked])
    problem = build(_SPECS[0])
    overwrite, _, _ = _as_function(problem, squeeze_excite, backend=backend.name, inplace=True)
    y = torch_vmap(lambda x: overwrite(x, *values[1:]))(stacked)
    _close(y, right)
    _close(stacked, right)


@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_vmap_over_images_stays_fused(
    backend: BackendCase, record_ops: Callable[[], set[str]]
) -> None:
    ours, _, values, _ = _both(_SPECS[0], backend)
    x = torch.stack([values[0], values[0]])
    torch_vmap(ours, (0, *[None] * (len(values) - 1)))(x, *values[1:])
    assert record_ops() == {f"senet_kernels::{backend.name}_forward"}


@each_backend
def test_per_sample_gradients_of_a_module(backend: BackendCase) -> None:
    like: dict[str, Any] = {"dtype": torch.float64, "device": backend.device}
    block = FusedSEBlock(6, hidden=3, backend=backend.name, **like)
    x = torch.randn(4, 6, 3, 5, **like)
    parameters = {n: p.detach() for n, p in block.named_parameters()}

    def loss(p: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(block, p, (image[None],)).square().sum()

    per_sample = torch_vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        block.zero_grad()
        block(image[None]).square().sum().backward()
        for name, p in block.named_parameters():
            _close(per_sample[name][i], p.grad)


@each_backend
def test_ensemble_of_modules(backend: BackendCase) -> None:
    named: dict[str, Any] = {"backend": backend.name, "device": backend.device}
    blocks = [FusedSEBlock(6, hidden=3, **named) for _ in range(3)]
    parameters, buffers = stack_module_state(blocks)
    x = torch.randn(4, 6, 3, 5, device=backend.device)

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(blocks[0], (p, b), (x,))

    together = torch_vmap(one)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([block(x) for block in blocks]))


@each_spec
@each_backend
def test_forward_mode(backend: BackendCase, spec: Spec) -> None:
    """Right tangents; never zeros."""
    ours, right, values, names = _both(spec, backend)
    tangents = tuple(torch.randn_like(v) for v in values)
    _close(jvp(ours, values, tangents), jvp(right, values, tangents))
    for i in range(len(names)):
        with fwAD.dual_level():
            duals = [
                fwAD.make_dual(v, t) if i == j else v
                for j, (v, t) in enumerate(zip(values, tangents, strict=True))
            ]
            got = fwAD.unpack_dual(ours(*duals)).tangent
            expected = fwAD.unpack_dual(right(*duals)).tangent
        assert got is not None
        _close(got, expected)
        assert got.abs().max() > 0
    # Reverse over forward.
    _close(
        grad(lambda x: jvp(lambda t: ours(t, *values[1:]), (x,), (x,))[1].sum())(values[0]),
        grad(lambda x: jvp(lambda t: right(t, *values[1:]), (x,), (x,))[1].sum())(values[0]),
    )


@pytest.mark.parametrize("backend", [b for b in FUSED_BACKENDS if b.name == "native"],
                         indirect=True, ids=str)  # fmt: skip
def test_forward_mode_through_the_function_raises(backend: BackendCase) -> None:
    problem = build(_SPECS[0])
    x = problem.tensors["x"]
    assert x is not None
    with fwAD.dual_level():
        tensors = {**problem.tensors, "x": fwAD.make_dual(x, torch.ones_like(x))}
        arguments = problem.positional(pack_options(activation="silu"), tensors)
        with pytest.raises((RuntimeError, NotImplementedError)):
            NativeSEFunction.apply(*arguments)
