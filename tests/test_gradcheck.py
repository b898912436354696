"""First and second derivatives by finite differences, and which gradients are computed at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from backend_cases import BACKENDS, FUSED_BACKENDS, BackendCase
from problems import TENSORS, Problem, Spec, build, magnitudes
from senet_kernels import NativeSEFunction, TritonSEFunction, pack_options, squeeze_excite
from senet_kernels.ops import Needs

_FUNCTIONS = {"native": NativeSEFunction, "triton": TritonSEFunction}
_SMALL = Spec((2, 3, 2, 3), 2, torch.float64, activation="silu")

# Smooth functions, or (residual + relu, relu6) values that finite differences keep off the kinks.
_SPECS = (
    _SMALL,
    replace(_SMALL, layout="channels_last", bias=False),
    replace(_SMALL, before="silu", gate="tanh"),
    replace(_SMALL, residual="contiguous", after="relu"),
    replace(_SMALL, residual="channels_last", after="relu", layout="channels_last"),
    replace(_SMALL, residual="contiguous"),
    replace(_SMALL, residual="contiguous", after="silu", before="hardswish"),
    replace(_SMALL, activation="gelu", after="mish"),
    replace(_SMALL, activation="gelu_tanh", before="relu", after="relu", weights="conv"),
    replace(_SMALL, activation="identity", gate="identity", layout="permuted"),
    replace(_SMALL, hidden=None),
    replace(_SMALL, shift=True, weighted=True),
    replace(_SMALL, affine=True, before="silu"),
    replace(_SMALL, lengths=True),
    replace(_SMALL, hidden=None, shift=True, layout="channels_last", lengths=True),
    replace(_SMALL, part="squeeze", before="silu", lengths=True),
    replace(_SMALL, part="squeeze", layout="channels_last", affine=True, before="mish"),
    replace(_SMALL, part="channel_scale", gate="tanh", before="silu", after="relu",
            residual="contiguous", shift=True, weighted=True),
    replace(_SMALL, part="channel_scale", layout="channels_last", residual="contiguous"),
    replace(_SMALL, part="channel_scale", affine=True, after="silu", residual="channels_last"),
    replace(_SMALL, affine=True, lengths=True, shift=True, weighted=True, after="relu",
            residual="contiguous"),
)  # fmt: skip


def _differentiable(
    problem: Problem, call: Callable[[dict[str, Any]], Tensor], names: Iterable[str]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """``call`` as a function of the tensors in ``names``, and those as leaves."""
    wanted = tuple(names)
    leaves = problem.leaves(wanted)

    def fn(*values: Tensor) -> Tensor:
        return call({**leaves, **dict(zip(wanted, values, strict=True))})

    return fn, [t for n in wanted if (t := leaves[n]) is not None]


def _entry_points(problem: Problem, backend: BackendCase) -> list[Callable[..., Tensor]]:
    """The public function and, for the fused backends, the exported Function."""
    entries = [lambda t: problem.call(squeeze_excite, t, backend=backend.name)]
    function = _FUNCTIONS.get(backend.name)
    if function and problem.part == "whole":
        options = pack_options(**problem.options)  # type: ignore[arg-type]
        entries.append(lambda t: function.apply(*problem.positional(options, t)))
    return entries


_CASES = [
    pytest.param(backend, spec, id=f"{backend}-{spec}")
    for backend in BACKENDS
    for spec in _SPECS
    if spec.fits(backend)
]


@pytest.mark.parametrize(("backend", "spec"), _CASES, indirect=["backend"])
def test_first_and_second_derivatives(backend: BackendCase, spec: Spec) -> None:
    problem = build(replace(spec, device=backend.device, seed=1))
    for entry in _entry_points(problem, backend):
        fn, leaves = _differentiable(problem, entry, problem.given)
        assert torch.autograd.gradcheck(fn, leaves)
        assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_second_derivative_with_some_inputs_frozen(backend: BackendCase) -> None:
    spec = replace(_SMALL, residual="contiguous", after="relu", device=backend.device, seed=1)
    problem = build(spec)
    for entry in _entry_points(problem, backend):
        for names in (("x",), ("w2",), ("residual",), ("x", "b1"), ("w1", "residual")):
            fn, leaves = _differentiable(problem, entry, names)
            assert torch.autograd.gradgradcheck(fn, leaves)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_gradient_penalty_in_float32(backend: BackendCase) -> None:
    """The usual use of double backward, against the oracle."""
    problem = build(Spec(activation="silu", before="silu", device=backend.device))

    def penalty(p: Problem, fn: Callable[..., Tensor], **extra: Any) -> list[Tensor]:
        leaves = p.leaves()
        (dx,) = torch.autograd.grad(p.call(fn, leaves, **extra), leaves["x"], p.dy,
                                    create_graph=True)  # fmt: skip
        return list(torch.autograd.grad(dx.square().sum(), [leaves[n] for n in p.given]))

    ours = penalty(problem, squeeze_excite, backend=backend.name)
    for got, right in zip(ours, penalty(problem.double(), oracle.block), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


class _RecordNeeds(TorchDispatchMode):
    """Collects the ``needs`` argument of every raw backward op."""

    only_observes = True

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name().startswith("senet_kernels::") and func.name().endswith("_backward"):
            self.needs.append(args[-1])
        return func(*args, **(kwargs or {}))


# The differentiable inputs in the order of `needs`, as far as subsets are tried.
_ORDER = {
    "whole": TENSORS[:6],
    "squeeze": ("x",),
    "channel_scale": ("x", "u", "residual", "alpha", "beta"),
}


@pytest.mark.parametrize("after", ["identity", "relu"])
@pytest.mark.parametrize("part", _ORDER)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_every_subset_of_gradients(backend: BackendCase, part: str, after: str) -> None:
    """What is asked for is right, and what is not is not computed."""
    spec = Spec((2, 6, 3, 4), 3, residual="contiguous", after=after, device=backend.device,
                part=part, weighted=part == "channel_scale")  # fmt: skip
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    problem = build(spec)
    right, scale = problem.expected(), magnitudes(problem)
    order = _ORDER[part]
    for names in (s for n in range(len(order) + 1) for s in itertools.combinations(order, n)):
        leaves = problem.leaves(names)
        with _RecordNeeds() as recorded:
            y = problem.call(squeeze_excite, leaves, backend=backend.name)
            assert y.requires_grad == bool(names)
            if names:
                y.backward(problem.dy)
        grads = {f"d{n}": t.grad for n, t in leaves.items() if t is not None}
        asked = {f"d{n}" for n in names}
        assert {n for n, g in grads.items() if g is not None} == asked
        oracle.assert_like_oracle(
            {n: g for n, g in grads.items() if g is not None},
            {n: right[n] for n in asked},
            scale,
            problem.dtype,
        )
        if backend in FUSED_BACKENDS:
            computed = [n for n in names if after != "identity" or n != "residual"]
            bits = sum(1 << order.index(n) for n in computed)
            assert recorded.needs == ([bits] if computed else [])


def test_needs_names_the_inputs_in_order() -> None:
    assert [bit.name for bit in Needs] == [name.upper() for name in TENSORS]
    assert [bit.value for bit in Needs] == [1 << i for i in range(len(TENSORS))]


@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if b.name == "native"], indirect=True, ids=str
)
def test_trailing_arguments_of_the_function_may_be_left_out(backend: BackendCase) -> None:
    """The defaults are the plain block; each number of arguments gets as many gradients."""
    problem = build(Spec(residual="contiguous", after="relu", weighted=True))
    code = pack_options(**problem.options)
    whole = problem.positional(code)
    for count in range(5, len(whole) + 1):
        leaves = [
            t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in whole[:count]
        ]
        y = NativeSEFunction.apply(*leaves)
        y.backward(problem.dy)
        tensors = dict.fromkeys(TENSORS)
        names = (*TENSORS[:5], "", *TENSORS[5:])
        tensors |= {n: t for n, t in zip(names, whole[:count], strict=False) if n}
        options = problem.options if count > 5 else {}
        right = replace(problem, tensors=tensors, options=options).expected()
        for name, leaf in zip(names, leaves, strict=False):
            if isinstance(leaf, Tensor):
                assert leaf.grad is not None
                torch.testing.assert_close(
                    leaf.grad.double(), right[f"d{name}"], rtol=1e-4, atol=1e-4
                )
        torch.testing.assert_close(y.double(), right["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_backward_twice(backend: BackendCase) -> None:
    """``retain_graph`` gives the same gradients again; without it torch's own error comes."""
    problem = build(Spec(residual="contiguous", after="relu", device=backend.device))
    leaves = problem.leaves()
    y = problem.call(squeeze_excite, leaves, backend=backend.name)
    inputs = [leaves[n] for n in problem.given]
    first = torch.autograd.grad(y, inputs, problem.dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, problem.dy)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_inputs_changed_before_backward_are_noticed(backend: BackendCase) -> None:
    problem = build(Spec(device=backend.device))
    leaves = problem.leaves(("w1",))
    y = problem.call(squeeze_excite, leaves, backend=backend.name)
    x = leaves["x"]
    assert x is not None
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(problem.dy)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
def test_overwriting_what_another_op_saved_is_noticed(backend: BackendCase) -> None:
    if not backend.takes("inplace"):
        pytest.skip("the feature table leaves in place to the reference")
    problem = build(Spec(device=backend.device))
    x = problem.tensors["x"]
    assert x is not None
    factor = torch.ones((), device=backend.device, requires_grad=True)
    product = x * factor  # keeps x for the gradient of factor
    problem.call(squeeze_excite, inplace=True, backend=backend.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
