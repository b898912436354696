"""Empty extents, unusual gradients, and the strides of results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from backend_cases import EXACT_BACKENDS, BackendCase
from problems import LAYOUTS, Spec, build, check, lay_out
from senet_kernels import squeeze_excite

pytestmark = pytest.mark.usefixtures("poisoned_empty")

each_backend = pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)

_EMPTY = {
    "B=0": Spec((0, 6, 4, 5), 3),
    "C=0": Spec((2, 0, 4, 5), 3),
    "S=0": Spec((2, 6, 0, 5), 3),
    "S=0, 1-D": Spec((2, 6, 0), 3),
    "R=0": Spec((2, 6, 4, 5), 0),
    "B=S=0": Spec((0, 6, 0, 0), 3),
    "all": Spec((0, 0, 0), 0),
}
_EMPTY_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False, "activation": "silu"},
    {"residual": "contiguous", "after": "relu"},
    {"before": "silu", "gate": "hardsigmoid"},
    {"hidden": None, "shift": True},
    {"part": "squeeze", "before": "relu"},
    {"part": "channel_scale", "residual": "contiguous", "after": "relu", "weighted": True},
)


@pytest.mark.parametrize("options", _EMPTY_OPTIONS, ids=str)
@pytest.mark.parametrize("spec", _EMPTY.values(), ids=_EMPTY)
@each_backend
def test_empty_extents(backend: BackendCase, spec: Spec, options: dict[str, Any]) -> None:
    """As eager, gradients included: NaN where the mean over nothing is NaN, zeros elsewhere."""
    spec = replace(spec, device=backend.device, **options)
    if not spec.fits(backend):
        pytest.skip("the feature table leaves this to the reference")
    problem = build(spec)
    actual = problem.run(squeeze_excite, backend=backend.name)
    for name, right in problem.expected().items():
        torch.testing.assert_close(actual[name], right.float(), equal_nan=True)
    # And the next call is healthy.
    check(build(Spec(device=backend.device)), squeeze_excite, backend=backend.name)


def _leaves_after_backward(
    fn: Callable[..., Tensor], spec: Spec, reduce: Callable[[Tensor], Tensor], **extra: Any
) -> dict[str, Tensor]:
    problem = build(spec)
    leaves = problem.leaves()
    y = problem.call(fn, leaves, **extra)
    reduce(y).backward()
    grads = {n: leaf.grad for n in problem.given if (leaf := leaves[n]) is not None}
    return {"y": y.detach()} | {n: g for n, g in grads.items() if g is not None}


_CONSUMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),  # every stride of dy is 0
    "mean over space": lambda y: y.flatten(2).mean(2).square().sum(),
    "split": lambda y: y.split(y.shape[1] // 2, 1)[1].square().sum(),
    "cat": lambda y: torch.cat([y, y], 1).square().sum(),
    "transposed": lambda y: (y.transpose(1, -1) * torch.arange(y.shape[1]).to(y.device)).sum(),
    "sliced": lambda y: y[..., 1::2].square().sum(),
}


@pytest.mark.parametrize("consumer", _CONSUMERS.values(), ids=_CONSUMERS)
@pytest.mark.parametrize("options", [{}, {"before": "relu"}, _EMPTY_OPTIONS[2]], ids=str)
@each_backend
def test_gradients_of_usual_consumers(
    backend: BackendCase, options: dict[str, Any], consumer: Callable[[Tensor], Tensor]
) -> None:
    for layout in ("contiguous", "channels_last"):
        # Offset so that the quadratic consumers meet no kink of relu.
        spec = Spec(shape=(2, 8, 5, 6), layout=layout, seed=3, device=backend.device, **options)
        ours = _leaves_after_backward(squeeze_excite, spec, consumer, backend=backend.name)
        eager = _leaves_after_backward(oracle.eager_block, spec, consumer)
        for name, right in eager.items():
            torch.testing.assert_close(ours[name], right, rtol=1e-4, atol=1e-5)


_WEIGHTS = ("matrix", "conv", "transposed", "nhwc")


@pytest.mark.parametrize("weights", _WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_strides_equal_eager(backend: BackendCase, layout: str, weights: str) -> None:
    """y and ``.grad`` have eager's strides; for parameters, which DDP compares, all of them."""
    for shape in ((2, 8, 3, 5), (2, 8, 15), (2, 8, 1, 1), (1, 8, 3, 5), (2, 1, 3, 5)):
        spec = Spec(shape, 4, layout=layout, weights=weights, device=backend.device)
        ours = _leaves_after_backward(squeeze_excite, spec, torch.sum, backend=backend.name)
        eager = _leaves_after_backward(_timm_like(weights), spec, torch.sum)
        for name, right in eager.items():
            where = f"{name} of {tuple(right.shape)}"
            if name in ("x", "y"):
                assert _dense_strides(ours[name]) == _dense_strides(right), where
            else:
                assert ours[name].stride() == right.stride(), where


def _dense_strides(t: Tensor) -> list[int]:
    """Strides of the extents that have more than one element."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def _timm_like(weights: str) -> Callable[..., Tensor]:
    """Eager with the layer that keeps such weights: a convolution, or for matrices a linear."""
    linear = oracle.conv_linear if weights in ("conv", "nhwc") else nn.functional.linear

    def fn(*args: Any, **kwargs: Any) -> Tensor:
        if weights == "nhwc":
            kwargs["linear"] = lambda v, w, b: nn.functional.conv2d(
                v[:, :, None, None], w, b
            ).flatten(1)
        else:
            kwargs["linear"] = linear
        return oracle.block(*args, **kwargs)

    return fn


@each_backend
def test_parameter_gradients_have_the_parameters_strides(backend: BackendCase) -> None:
    """Before autograd's own layout contract: a mismatch costs DDP a copy and a warning."""
    for weights, channels in itertools.product(_WEIGHTS, (1, 8)):
        problem = build(Spec((2, channels, 3, 5), 4, weights=weights, device=backend.device))
        gradients = problem.run(squeeze_excite, backend=backend.name)
        for name in ("w1", "b1", "w2", "b2"):
            parameter = problem.tensors[name]
            assert parameter is not None
            assert gradients[f"d{name}"].shape == parameter.shape
            assert gradients[f"d{name}"].stride() == parameter.stride(), (name, weights, channels)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_results_own_their_memory(backend: BackendCase, layout: str) -> None:
    """No result aliases an input or another result (d_residual through identity may be dy)."""
    spec = Spec(layout=layout, residual="contiguous", after="relu", device=backend.device)
    problem = build(spec)
    before = {n: t.clone() for n, t in problem.tensors.items() if t is not None}
    results = problem.run(squeeze_excite, backend=backend.name)
    storages = [
        t.untyped_storage().data_ptr()
        for t in (*problem.tensors.values(), problem.dy)
        if t is not None
    ]
    storages += [t.untyped_storage().data_ptr() for t in results.values()]
    assert len(set(storages)) == len(storages)
    for name, value in before.items():
        given = problem.tensors[name]
        assert given is not None
        assert torch.equal(given, value), f"{name} was written to"


@pytest.mark.parametrize("layout", LAYOUTS)
@each_backend
def test_layout_does_not_change_the_result(backend: BackendCase, layout: str) -> None:
    """dy and the residual in any layout next to an x in any other."""
    spec = Spec(residual="contiguous", after="relu", layout="channels_last", device=backend.device)
    problem = build(spec)
    straight = problem.run(squeeze_excite, backend=backend.name)
    if not layout.startswith("expanded"):
        residual = problem.tensors["residual"]
        assert residual is not None
        problem.tensors["residual"] = lay_out(residual, layout)
        problem.dy = lay_out(problem.dy, layout)
        turned = problem.run(squeeze_excite, backend=backend.name)
        for name, right in straight.items():
            assert torch.equal(turned[name], right), name


_INPLACE_SPECS = (
    Spec(),
    Spec(dtype=torch.bfloat16, before="silu", residual="channels_last", after="relu"),
    Spec(dtype=torch.float16, gate="hardsigmoid", after="silu", shift=True),
    Spec(dtype=torch.float64, weighted=True, residual="contiguous"),
    Spec((1, 64, 61, 67), 4, residual="contiguous", after="relu"),  # split over threads
    Spec((5, 9, 70), 2, before="hardswish"),
    Spec((2, 128, 2, 2), 64),  # weights larger than the image
    *(replace(spec, dtype=torch.bfloat16) for spec in _EMPTY.values()),
)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
@pytest.mark.parametrize("spec", _INPLACE_SPECS, ids=str)
@each_backend
def test_inplace_gives_the_same_bits(backend: BackendCase, spec: Spec, layout: str) -> None:
    """x becomes what y would be, where it lies; what lies around it stays."""
    if not (backend.takes("inplace") and spec.fits(backend)):
        pytest.skip("the feature table leaves this to the reference")
    problem = build(replace(spec, layout=layout, device=backend.device))
    y = problem.call(squeeze_excite, backend=backend.name)
    x = problem.tensors["x"]
    assert x is not None
    address, strides = x.data_ptr(), x.stride()
    everything = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    right = everything.clone()
    right.as_strided(x.shape, strides, x.storage_offset()).copy_(y)
    assert problem.call(squeeze_excite, backend=backend.name, inplace=True) is x
    assert (x.data_ptr(), x.stride()) == (address, strides)
    torch.testing.assert_close(everything, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["misaligned", "misaligned_channels_last"])
@each_backend
def test_everything_misaligned(backend: BackendCase, layout: str) -> None:
    """Contiguous views one element into their storage: x, dy, the residual and every parameter."""
    for dtype in backend.dtypes:
        spec = Spec((3, 24, 4, 6), 8, dtype, layout, residual=layout, after="relu", weighted=True,
                    affine=True, shift=True, dy_layout=layout, device=backend.device)  # fmt: skip
        problem = build(spec)
        for name, t in problem.tensors.items():
            if t is not None and t.dim() <= 2:
                problem.tensors[name] = t = lay_out(t, "misaligned")
                assert t.is_contiguous()
            assert t is None or t.data_ptr() % 16
        check(problem, squeeze_excite, backend=backend.name)


# Channels that are a half, a quarter, an odd part of a cache line beyond whole ones; positions that
# leave over up to three; images whole and cut into slices for a team.
@pytest.mark.parametrize(
    "shape",
    [(3, 24, 5, 7), (2, 12, 3, 5), (2, 4, 3, 3), (2, 8, 1, 2), (3, 40, 9, 9), (2, 30, 4, 5),
     (1, 24, 37, 39), (3, 72, 23, 23), (1, 4, 101, 83)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "options",
    [{}, {"before": "silu"}, {"residual": "channels_last", "after": "gelu"}, {"weighted": True},
     {"lengths": True}, {"part": "squeeze"}, {"part": "channel_scale"}],
    ids=str,
)  # fmt: skip
@each_backend
def test_positions_that_share_a_cache_line(
    backend: BackendCase, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    for dtype in backend.dtypes:
        spec = Spec(shape, 4, dtype, "channels_last", device=backend.device, **options)
        if spec.fits(backend):
            check(build(spec), squeeze_excite, backend=backend.name)
