"""The raw ops: schemas and fakes without a library, opcheck with one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import oracle
from backend_cases import FUSED_BACKENDS, BackendCase, require
from problems import HALVES, LAYOUTS, TENSORS, Problem, Spec, build, magnitudes
from senet_kernels import ops, pack_options, squeeze_excite
from senet_kernels.autograd import inplace_op

each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)

ALL_NEEDS = (1 << ops.GRADIENTS) - 1

# opcheck compares results of several calls, padding of the mask included, which nobody writes.
reproducible_padding = pytest.mark.usefixtures("poisoned_empty")


def _ops(backend: str) -> tuple[Any, Any]:
    namespace = torch.ops.senet_kernels
    return (
        getattr(namespace, f"{backend}_forward").default,
        getattr(namespace, f"{backend}_backward").default,
    )


def _forward_args(problem: Problem, save: bool) -> tuple[Any, ...]:
    code = pack_options(**problem.options)  # type: ignore[arg-type]
    return (*(problem.tensors[n] for n in TENSORS), problem.lengths, code, save)


def _backward_args(problem: Problem, forward: Any, needs: int) -> tuple[Any, ...]:
    *inputs, code, _ = _forward_args(problem, True)
    _, saved, mask = forward(*inputs, code, True)
    return (problem.dy, *inputs, saved, mask, code, needs)


def _needs(problem: Problem) -> int:
    return sum(1 << TENSORS.index(n) for n in problem.given)


_SPECS = (
    Spec((2, 6, 3, 5), 3),
    Spec((2, 6, 3, 5), 3, layout="channels_last", weights="conv"),
    Spec((2, 6, 3, 5), 3, layout="sliced_space", bias=False),
    Spec((2, 6, 3, 5), 3, layout="permuted", before="silu", dtype=torch.bfloat16),
    Spec((2, 6, 3, 5), 3, residual="contiguous", after="relu", layout="channels_last"),
    Spec((2, 6, 15), 3, residual="sliced_space", after="silu", weights="transposed"),
    Spec((2, 6, 3, 5), 3, layout="expanded_batch", dy_layout="expanded_space", weights="nhwc"),
)


@each_fused
@reproducible_padding
@pytest.mark.parametrize("spec", _SPECS, ids=str)
def test_opcheck(backend: BackendCase, spec: Spec) -> None:
    """Schema, registration, fake and AOT dispatch with dynamic shapes."""
    problem = build(replace(spec, device=backend.device))
    forward, backward = _ops(backend.name)
    for save in (False, True):
        torch.library.opcheck(forward, _forward_args(problem, save))
    some = ops.Needs.X | ops.Needs.W2
    for needs in (_needs(problem), some):
        torch.library.opcheck(backward, _backward_args(problem, forward, int(needs)))


each_inplace = pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if b.takes("inplace")], indirect=True, ids=str
)


@each_inplace
@pytest.mark.parametrize("spec", _SPECS[:-1], ids=str)
def test_opcheck_inplace(backend: BackendCase, spec: Spec) -> None:
    problem = build(replace(spec, device=backend.device))
    op = inplace_op(backend.name)
    torch.library.opcheck(op, _forward_args(problem, False)[:-1])
    assert torch.Tag.flexible_layout in op.tags


@each_inplace
def test_inplace_refuses_images_on_top_of_each_other(backend: BackendCase) -> None:
    problem = build(Spec(layout="expanded_batch", device=backend.device))
    with pytest.raises(RuntimeError, match="overlap"):
        inplace_op(backend.name)(*_forward_args(problem, False)[:-1])


_HALF_SPECS = (
    Spec((2, 6, 3, 5), part="squeeze", lengths=True),
    Spec((2, 6, 3, 5), part="squeeze", layout="channels_last", dtype=torch.bfloat16),
    Spec((2, 6, 15), part="squeeze", layout="sliced_space", before="relu", dy_layout="permuted"),
    Spec((2, 6, 3, 5), part="channel_scale", after="relu", residual="contiguous", weighted=True),
    Spec((2, 6, 3, 5), part="channel_scale", layout="channels_last", shift=True, seed=1),
    Spec((2, 6, 3, 5), part="channel_scale", layout="permuted", after="silu", before="silu",
         dtype=torch.bfloat16, seed=1),
)  # fmt: skip


def _half_calls(problem: Problem, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """A half's raw ops with their arguments: forward, and backward for all that is there."""
    names = {
        "squeeze": ("x", "affine_scale", "affine_shift"),
        "channel_scale": ("x", "u", "residual", "alpha", "beta", "affine_scale", "affine_shift"),
    }[problem.part]
    inputs = [problem.tensors[n] for n in names]
    code = pack_options(**{"activation": None, "gate": None, **problem.options})
    needs = sum(1 << i for i, t in enumerate(inputs) if t is not None)
    forward, backward = (
        getattr(torch.ops.senet_kernels, f"{backend}_{problem.part}{end}").default
        for end in ("", "_backward")
    )
    if problem.part == "squeeze":
        inputs.append(problem.lengths)
        last: tuple[Any, ...] = (code, needs)
        calls = [(forward, (*inputs, code))]
    else:
        last = (forward(*inputs, code, True)[1], code, needs)
        calls = [(forward, (*inputs, code, save)) for save in (False, True)]
    return [*calls, (backward, (problem.dy, *inputs, *last))]


@each_fused
@reproducible_padding
@pytest.mark.parametrize("spec", _HALF_SPECS, ids=str)
def test_opcheck_halves(backend: BackendCase, spec: Spec) -> None:
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    for op, args in _half_calls(build(replace(spec, device=backend.device)), backend.name):
        torch.library.opcheck(op, args)
        assert torch.Tag.flexible_layout in op.tags


def _same_meta(fake: Tensor, real: Tensor, what: str) -> None:
    assert fake.dtype == real.dtype, what
    assert tuple(fake.shape) == tuple(real.shape), what
    if real.numel():
        strides = zip(real.shape, fake.stride(), real.stride(), strict=True)
        assert all(f == r for size, f, r in strides if size != 1), what
    assert fake.device == real.device, what


_SHAPES = ((2, 8, 3, 5), (1, 8, 3, 5), (2, 1, 3, 5), (2, 8, 1, 1), (2, 8, 15), (2, 3, 2, 2, 2),
           (0, 8, 3, 5), (2, 9, 1, 7))  # fmt: skip


@each_fused
@pytest.mark.parametrize("weights", ["matrix", "conv", "transposed", "nhwc"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_have_the_real_strides(backend: BackendCase, layout: str, weights: str) -> None:
    forward, backward = _ops(backend.name)
    for shape, (residual, after) in itertools.product(
        _SHAPES, ((None, "identity"), ("contiguous", "relu"), ("channels_last", "silu"))
    ):
        spec = Spec(shape, 4, layout=layout, weights=weights, residual=residual, after=after,
                    device=backend.device)  # fmt: skip
        problem = build(spec)
        calls = [
            (forward, _forward_args(problem, False)),
            (forward, _forward_args(problem, True)),
            (backward, _backward_args(problem, forward, _needs(problem))),
            (backward, _backward_args(problem, forward, int(ops.Needs.W1 | ops.Needs.X))),
            (backward, _backward_args(problem, forward, 0)),
        ]
        for op, args in calls:
            _check_fake(op, args, str(spec))


def _check_fake(op: Any, args: tuple[Any, ...], where: str) -> None:
    real = op(*args)
    with FakeTensorMode() as mode:
        converted = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = op(*converted)
    if isinstance(real, Tensor):
        real, fake = [real], [fake]
    for i, (f, r) in enumerate(zip(fake, real, strict=True)):
        _same_meta(f, r, f"output {i} of {op} on {where}")


@each_fused
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_of_halves_have_the_real_strides(backend: BackendCase, layout: str) -> None:
    for part, shape in itertools.product(HALVES, _SHAPES):
        spec = Spec(shape, part=part, layout=layout, weighted=True, shift=True, after="relu",
                    residual="channels_last", device=backend.device, seed=1)  # fmt: skip
        if not spec.fits(backend):
            pytest.skip("the feature table leaves this to the reference")
        for op, args in _half_calls(build(spec), backend.name):
            _check_fake(op, args, str(spec))
            if op.name().endswith("_backward"):
                _check_fake(op, (*args[:-1], 0), str(spec))


@each_fused
def test_gradients_not_asked_for_are_empty(backend: BackendCase) -> None:
    problem = build(Spec(residual="contiguous", after="relu", device=backend.device))
    forward, backward = _ops(backend.name)
    for bit in ops.Needs:
        given = problem.tensors[TENSORS[int(bit).bit_length() - 1]]
        if given is None:
            continue
        grads = backward(*_backward_args(problem, forward, int(bit)))
        position = int(bit).bit_length() - 1
        assert [i for i, g in enumerate(grads) if g.numel()] == [position]
        assert grads[position].shape == given.shape


@each_fused
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_space"])
def test_mask_has_a_bit_per_element(backend: BackendCase, layout: str) -> None:
    """The saved mask is not(pre <= 0), whatever the layout, padding bits aside."""
    forward, _ = _ops(backend.name)
    for shape in ((2, 8, 3, 5), (2, 9, 8), (3, 1, 7), (2, 17, 1), (1, 3, 4, 4)):
        problem = build(Spec(shape, 4, layout=layout, residual="contiguous", after="relu",
                             device=backend.device))  # fmt: skip
        y, saved, mask = forward(*_forward_args(problem, True))
        x = problem.tensors["x"]
        assert x is not None
        assert torch.equal(ops.unpack_mask(mask, x), y > 0)
        batch, channels = shape[:2]
        assert saved.numel() == batch * (2 * channels + 4)
        assert mask.numel() <= batch * channels * (y[0, 0].numel() + 7) // 8 * 8 + 64 * batch


def _others(backend: BackendCase) -> list[BackendCase]:
    """The backends that are here beside one, for tensors on its device."""
    found = []
    for other in FUSED_BACKENDS:
        if other.device == backend.device and other != backend:
            try:
                require(other)
            except pytest.skip.Exception:
                continue
            found.append(other)
    return found


@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if not b.simulated], indirect=True, ids=str
)
@pytest.mark.parametrize("after", ["relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_another_backends_forward(
    backend: BackendCase, layout: str, after: str
) -> None:
    """What forward keeps is laid out the same by all of them, the mask's bits too."""
    others = _others(backend)
    if not others:
        pytest.skip("no other backend for this device is here")
    for shape in ((2, 9, 3, 5), (2, 8, 7), (3, 17, 1), (1, 3, 4, 4)):
        spec = Spec(shape, 3, layout=layout, residual="contiguous", after=after, weighted=True,
                    device=backend.device)  # fmt: skip
        problem = build(spec)
        right, scale = problem.expected(), magnitudes(problem)
        for other in others:
            for first, second in ((backend, other), (other, backend)):
                with first.running():
                    args = _backward_args(problem, _ops(first.name)[0], _needs(problem))
                with second.running():
                    gradients = _ops(second.name)[1](*args)
                results = {f"d{n}": gradients[TENSORS.index(n)] for n in problem.given}
                expected = {n: right[n] for n in results}
                oracle.assert_like_oracle(results, expected, scale, problem.dtype)


@pytest.mark.parametrize("name", ops.BACKENDS_WITH_OPS)
def test_schemas_and_fakes_need_no_library(name: str) -> None:
    forward, backward = _ops(name)
    for op, schema in ((forward, ops.FORWARD_SCHEMA), (backward, ops.BACKWARD_SCHEMA)):
        assert torch.Tag.flexible_layout in op.tags
        assert torch.Tag.pt2_compliant_tag in op.tags
        assert not op._schema.is_mutable
        arguments = schema.split("->")[0]
        assert [a.name for a in op._schema.arguments] == [
            part.split()[-1] for part in arguments.strip(" ()").split(",")
        ]
    with FakeTensorMode():
        x, w = torch.empty(2, 8, 3, 5), torch.empty(4, 8)
        args = (x, w, None, w.t(), None, *[None] * 6, pack_options(after="relu"), True)
        y, saved, mask = forward(*args)
        assert y.shape == x.shape
        assert saved.shape == (2 * (8 + 4 + 8),)
        assert mask.dtype == torch.uint8
        grads = backward(x, *args[:-2], saved, mask, args[-2], ALL_NEEDS)
        assert len(grads) == ops.GRADIENTS


def test_lengths_are_not_read_where_there_are_none() -> None:
    """Under fake tensors and tracers lengths have no values to check."""
    x, w, lengths = torch.randn(2, 8, 3, 5), torch.randn(8, 8), torch.tensor([3, 15])

    def call(x: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
        return squeeze_excite(x, None, None, w, None, lengths=lengths)

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w, lengths)]
        assert call(*fakes).shape == x.shape
    for way in ("real", "fake", "symbolic"):
        traced = make_fx(call, tracing_mode=way)(x, w, lengths)
        torch.testing.assert_close(traced(x, w, lengths), call(x, w, lengths))
