"""Where no kernel takes a call: eager PyTorch's operators, bytes, accuracy and special values; a
converted model runs what it ran before."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from models import library
from problems import Spec, build
from senet_kernels import (
    FusedSEBlock,
    explain,
    fuse_se_blocks,
    squeeze,
    squeeze_excite,
    unfuse_se_blocks,
    use_backend,
)
from senet_kernels.backends import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nothing is fused."""
    monkeypatch.setattr(native, "UNAVAILABLE", "taken away for this test")
    monkeypatch.setattr("senet_kernels.resolve._RESOLVED", {})


# Operators that only look at the same memory in another way.
_VIEWS = frozenset((
    "view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
    "detach", "alias", "_unsafe_view", "as_strided", "_reshape_alias",
))  # fmt: skip


class Operators(TorchDispatchMode):
    """Operators that run, in order, and the bytes of the tensors that those read and write which
    are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []
        self.computing: list[str] = []
        self.bytes = 0
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.all.append(str(func))
        if func.overloadpacket.__name__ not in _VIEWS:
            self.computing.append(str(func))
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in (*given, *results))
            storages = {t.untyped_storage().data_ptr() for t in given}
            self.made += [t for t in results if t.untyped_storage().data_ptr() not in storages]
        return result


def _operators(
    fn: Callable[[Tensor], Any], x: Tensor, *, backward: bool = False, how: Any = nullcontext
) -> Operators:
    leaf = x.detach().clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward), Operators() as operators:
        with how():
            y = fn(leaf)
        if backward:
            y.backward(torch.ones_like(y))
    return operators


# ---- what it computes ----

_SPECS = [
    Spec((2, 8, 3, 5), 4),
    Spec((3, 17, 7), 5, layout="channels_last", after="relu", residual="contiguous"),
    Spec((2, 6, 2, 3, 4), 3, shift=True, residual="contiguous", after="silu", gate="tanh"),
    Spec((2, 8, 3, 5), None, bias=False, weighted=True, before="silu", gate="hardsigmoid_02"),
    Spec((2, 8, 3, 5), 4, affine=True, before="hardswish", gate="hardsigmoid"),
    Spec((4, 8, 9), 4, lengths=True, weighted=True, affine=True, activation="gelu_tanh"),
    Spec((2, 8, 3, 5), 4, shift=True, weighted=True, lengths=True, weights="conv"),
    Spec((2, 8, 3, 5), 4, weights="nhwc", layout="channels_last", after="leaky_relu"),
    Spec((2, 8, 3, 5), 4, part="squeeze", before="relu", affine=True, lengths=True),
    Spec((2, 8, 3, 5), 4, part="channel_scale", shift=True, residual="contiguous", after="mish"),
]
each_spec = pytest.mark.parametrize("spec", _SPECS, ids=str)


@each_spec
def test_outputs_and_gradients_in_float64(spec: Spec) -> None:
    problem = build(replace(spec, dtype=torch.float64))
    right, got = problem.expected(), problem.run(squeeze_excite, backend="fallback")
    assert got.keys() == right.keys()
    # torch's hardsigmoid has a float32 constant in its float64 derivative.
    rtol = 1e-6 if spec.gate == "hardsigmoid" else 1e-10
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@each_spec
def test_accuracy_is_eagers(spec: Spec, dtype: torch.dtype) -> None:
    """On average no worse than the same block written out with matrix products."""
    ours, eager = [], []
    for seed in range(6):
        problem = build(replace(spec, dtype=dtype, seed=seed))
        exact = problem.double().call(oracle.block)
        for errors, fn, extra in (
            (ours, squeeze_excite, {"backend": "fallback"}),
            (eager, oracle.block, {}),
        ):
            y = problem.call(fn, **extra)
            assert y.dtype == dtype
            assert y.stride() == problem.call(squeeze_excite, backend="reference").stride()
            errors.append((y.double() - exact).abs().mean().item())
    assert sum(ours) <= 1.05 * sum(eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "w1", "b2", "residual"])
def test_special_values_are_eagers(name: str, value: float, dtype: torch.dtype) -> None:
    problem = build(Spec((3, 8, 3, 5), 4, dtype, residual="contiguous", after="relu"))
    tensor = problem.tensors[name]
    assert tensor is not None
    tensor.view(-1)[1] = value
    got = problem.run(squeeze_excite, backend="fallback")
    right = problem.run(oracle.block)
    for key, expected in right.items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(got[key]), kind(expected)), (key, kind)


@pytest.mark.parametrize("value", [math.nan, math.inf, 6e4])
def test_what_lies_beyond_a_length_is_masked(value: float) -> None:
    """By ``where``, not by a product; and a sum of float16 numbers may exceed its range."""
    x = torch.full((2, 4, 400), 300.0, dtype=torch.float16)
    x[0, :, 300:] = value
    lengths = torch.tensor([300, 0])
    z = squeeze(x, lengths=lengths, backend="fallback")
    assert z[0].eq(300).all()
    assert z[1].isnan().all()


@each_spec
def test_second_derivatives(spec: Spec) -> None:
    problem = build(replace(spec, dtype=torch.float64, gate="sigmoid", shape=(2, 4, 3)))
    leaves = {n: t for n, t in problem.leaves().items() if t is not None}
    names = list(leaves)

    def fn(*tensors: Tensor) -> Tensor:
        problem.tensors.update(zip(names, tensors, strict=True))
        y: Tensor = problem.call(squeeze_excite, backend="fallback")
        return y

    assert torch.autograd.gradgradcheck(fn, tuple(leaves.values()), atol=1e-4)


# ---- what it costs ----


class Linear(nn.Module):
    """The block with linear layers, as a strong eager author writes it."""

    def __init__(self, channels: int, hidden: int, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.before, self.after = before, after

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        p = x if self.before is None else self.before(x)
        u = self.fc2(F.relu(self.fc1(p.mean(tuple(range(2, x.dim()))))))
        y = p * torch.sigmoid(u).reshape(*u.shape, *[1] * (x.dim() - 2))
        if residual is not None:
            y = y + residual
        return y if self.after is None else self.after(y)

    def functional(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        names = {None: None, F.silu: "silu", F.relu: "relu"}
        return squeeze_excite(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias,
            before=names[self.before], after=names[self.after], residual=residual,
        )  # fmt: skip

    def block(self) -> FusedSEBlock:
        names = {None: None, F.silu: "silu", F.relu: "relu"}
        block = FusedSEBlock(self.fc1.in_features, hidden=self.fc1.out_features,
                             before=names[self.before], after=names[self.after])  # fmt: skip
        block.load_state_dict(self.state_dict())
        return block.to(self.fc1.weight.dtype)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("how", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("before", [None, F.silu])
@pytest.mark.parametrize(("after", "added"), [(None, False), (F.relu, True), (F.silu, True)])
def test_no_more_operators_and_bytes_than_with_linear_layers(
    before: Any, after: Any, added: bool, how: torch.dtype | str, backward: bool
) -> None:
    dtype = how if isinstance(how, torch.dtype) else torch.float32
    surroundings: Callable[[], AbstractContextManager[Any]] = (
        partial(torch.autocast, "cpu", torch.bfloat16) if how == "autocast" else nullcontext
    )
    eager = Linear(32, 8, before, after).to(dtype)
    x = torch.randn(4, 32, 6, 5, dtype=dtype)
    residual = torch.randn_like(x) if added else None
    count = partial(_operators, x=x, backward=backward, how=surroundings)
    theirs = count(partial(eager, residual=residual))
    for ours in (partial(eager.functional, residual=residual),
                 partial(eager.block(), residual=residual)):  # fmt: skip
        eager.zero_grad()
        found = count(ours)
        assert len(found.computing) <= len(theirs.computing), found.computing
        assert found.bytes <= theirs.bytes
    eager.zero_grad()
    assert len(count(partial(eager.functional, residual=residual)).all) <= len(theirs.all)
    assert not [name for name in count(eager.functional).all if "senet_kernels" in name]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize(("after", "added"), [(None, False), ("relu", True), ("silu", True)])
def test_no_more_operators_and_bytes_with_constant_gates(
    after: str | None, added: bool, backward: bool
) -> None:
    block = FusedSEBlock(32, excitation="constant", after=after)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    alpha, beta = (p[:, None, None] for p in (block.alpha, block.beta) if p is not None)
    x = torch.randn(4, 32, 6, 5)
    residual = torch.randn_like(x) if added else None
    function: Any = {None: lambda y: y, "relu": F.relu, "silu": F.silu}[after]

    def eager(t: Tensor) -> Tensor:
        y = t * alpha + beta
        return function(y if residual is None else y + residual)  # type: ignore[no-any-return]

    torch.testing.assert_close(block(x, residual), eager(x))
    ours, theirs = (
        _operators(fn, x, backward=backward) for fn in (partial(block, residual=residual), eager)
    )
    assert len(ours.computing) <= len(theirs.computing), ours.computing
    assert ours.bytes <= theirs.bytes
    with pytest.raises(ValueError, match="residual: expected"):
        block(x, x[:1])
    with pytest.raises(TypeError, match="dtype"):
        block(x.double())


class _ScaleAndShift(nn.Module):
    """The block of Leela Chess Zero with linear layers."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        g, shift = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).chunk(2, 1)
        return x * torch.sigmoid(g)[:, :, None, None] + shift[:, :, None, None]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_operators_and_bytes_with_scale_and_shift(
    dtype: torch.dtype, backward: bool
) -> None:
    eager = _ScaleAndShift(32, 8).to(dtype)
    block = FusedSEBlock(32, hidden=8, scale_and_shift=True)
    block.load_state_dict(eager.state_dict())
    x = torch.randn(4, 32, 6, 5, dtype=dtype)
    theirs, ours = (
        _operators(m, x=x, backward=backward, how=nullcontext) for m in (eager, block.to(dtype))
    )
    assert len(ours.computing) <= len(theirs.computing), ours.computing
    assert ours.bytes <= theirs.bytes


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("before", [None, F.silu])
@pytest.mark.parametrize(("after", "added"), [(None, False), (F.relu, True), (F.silu, True)])
def test_no_more_is_kept_for_backward(before: Any, after: Any, added: bool) -> None:
    eager = Linear(32, 8, before, after)
    x = torch.randn(4, 32, 6, 5)
    residual = torch.randn_like(x) if added else None

    def kept(fn: Callable[..., Tensor]) -> int:
        """Bytes of the memory, x and parameters aside, that a graph holds."""
        leaf = x.clone().requires_grad_()
        others = {t.untyped_storage().data_ptr() for t in (leaf, *eager.parameters())}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in others:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = fn(leaf, residual=residual)
        y.sum().backward()
        return sum(sizes.values())

    assert kept(eager.functional) <= kept(eager)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"before": "silu"},
        {"after": "gelu", "residual": True},
        {"before_affine": True, "before": "hardswish", "after": "relu"},
        {"alpha": True, "beta": True, "after": "mish"},
        {"shift": True, "residual": True, "after": "relu"},
    ],
    ids=str,
)
def test_in_place_stays_in_place(extra: dict[str, Any]) -> None:
    extra = dict(extra)
    x, w = torch.randn(2, 8, 12, 12), torch.randn(8, 8)
    v = torch.randn(8)
    w2 = torch.randn(16, 8) if extra.pop("shift", False) else w
    b2 = torch.randn(len(w2))
    made = {"residual": torch.randn_like(x), "before_affine": (v, v), "alpha": v, "beta": v}
    extra = {n: made[n] if value is True else value for n, value in extra.items()}
    right = squeeze_excite(x, w, v, w2, b2, **extra, backend="reference")
    mine = x.clone()
    with torch.no_grad(), Operators() as operators:
        y = squeeze_excite(mine, w, v, w2, b2, **extra, inplace=True)
    assert y is mine
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    assert max(t.numel() for t in operators.made) < x.numel()


# ---- converted models ----

_NETWORKS = ("seresnet50", "efficientnet_b0", "mobilenetv3_large_100")


def _network(name: str, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = library("timm").create_model(name, num_classes=10)
    return model.to(dtype)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("how", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("name", _NETWORKS)
def test_a_converted_network_runs_the_operators_it_ran(name: str, how: torch.dtype | str) -> None:
    dtype = how if isinstance(how, torch.dtype) else torch.float32
    surroundings: Callable[[], AbstractContextManager[Any]] = (
        partial(torch.autocast, "cpu", torch.bfloat16) if how == "autocast" else nullcontext
    )
    model = _network(name, dtype)
    x = torch.randn(2, 3, 33, 33, dtype=dtype)

    def count(backward: bool) -> list[str]:
        model.train(backward).zero_grad()
        torch.manual_seed(0)
        return _operators(model, x, backward=backward, how=surroundings).all

    before = [count(False), count(True)]
    for neighbours in (False, True):
        report = fuse_se_blocks(model, neighbours=neighbours)
        assert report.replaced
        assert [count(False), count(True)] == before


class SE(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))
        return x * torch.sigmoid(u)[:, :, None, None]


def _fused() -> SE:
    block = SE()
    assert len(fuse_se_blocks(block).replaced) == 1
    return block


def _forward_mode(block: nn.Module, x: Tensor) -> Tensor:
    with fwAD.dual_level():
        return fwAD.unpack_dual(block(fwAD.make_dual(x, torch.ones_like(x)))).tangent


def _in_complex(block: nn.Module, x: Tensor) -> Any:
    return _or_error(copy.deepcopy(block).to(torch.complex64), x.to(torch.complex64))


_CASES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "meta": lambda b, x: copy.deepcopy(b).to("meta")(x.to("meta")),
    "complex": _in_complex,
    "forward mode": _forward_mode,
    "fallback by name": lambda b, x: _by_name(b, x),
    "torch.jit.trace": lambda b, x: torch.jit.trace(b, x, check_trace=False)(x),
    "one channel fewer": lambda b, x: _or_error(b, x[:, :-1]),
    "another dtype": lambda b, x: _or_error(b, x.double()),
}


def _by_name(block: nn.Module, x: Tensor) -> Any:
    with use_backend("fallback"):
        return block(x)


def _or_error(block: nn.Module, x: Tensor) -> Any:
    try:
        return block(x)
    except RuntimeError as error:
        return str(error)


def _and_runs(call: Callable[[], Any]) -> tuple[Any, int]:
    """What ``call`` returns, and how often the forward of :class:`SE` ran."""
    ran = 0

    def count(frame: types.FrameType, event: str, _: Any) -> None:
        nonlocal ran
        ran += event == "call" and frame.f_code is SE.forward.__code__

    sys.setprofile(count)
    try:
        return call(), ran
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("name", _CASES)
def test_what_no_kernel_takes_the_original_computes(name: str) -> None:
    """Result, or error, of the module's own forward."""
    block, x = _fused(), torch.randn(2, 16, 3, 3)
    original = copy.deepcopy(block)
    unfuse_se_blocks(original)
    got, ran = _and_runs(lambda: _CASES[name](block, x))
    right, ran_unconverted = _and_runs(lambda: _CASES[name](original, x))
    assert ran == ran_unconverted > 0
    if isinstance(right, Tensor) and not right.is_meta:
        assert torch.equal(got, right)
    elif not isinstance(right, Tensor):
        assert got == right


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("neighbours", [False, True])
def test_dynamo_sees_what_it_saw(neighbours: bool) -> None:
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append([f"{n.op} {n.target}" for n in graph.graph.nodes if n.op.startswith("call")])
        return graph

    model = _network("mobilenetv3_small_050", torch.float32).eval()
    x = torch.randn(2, 3, 64, 64)
    right = model(x)
    for fuse in (False, True):
        if fuse:
            fuse_se_blocks(model, neighbours=neighbours)
        torch._dynamo.reset()
        y = torch.compile(model, backend=record, fullgraph=True)(x)
        torch.testing.assert_close(y, right)
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


def test_explain_names_what_is_going_on() -> None:
    x, w = torch.randn(2, 4, 3), torch.randn(4, 4)
    with fwAD.dual_level():
        answer = explain(x, w, None, w, None)
    assert answer.backend == "fallback"
    assert "tangents" in str(answer)
    with pytest.raises(ValueError, match="w1: expected 2 rows"):
        squeeze_excite(x, w, None, w[:, :2], None, backend="fallback")
