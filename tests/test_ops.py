"""The raw ops: schemas and fakes without a library, opcheck with one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from backend_cases import FUSED_BACKENDS, BackendCase
from problems import LAYOUTS, TENSORS, Problem, Spec, build
from senet_kernels import ops, pack_options

each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)

ALL_NEEDS = (1 << ops.GRADIENTS) - 1


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
            real = op(*args)
            with FakeTensorMode() as mode:
                converted = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = op(*converted)
            for i, (f, r) in enumerate(zip(fake, real, strict=True)):
                _same_meta(f, r, f"output {i} of {op} on {spec}")


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
