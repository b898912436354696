"""Values that are no plain tensors: proxies of torch.fx, weights of other classes, functorch's
tensors while compiling, fake tensors. Results are those of the plain module."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import library
from senet_kernels import (
    FusedSEBlock,
    TimmSE,
    TorchvisionSE,
    add_se_blocks,
    channel_scale,
    fuse_se_blocks,
    squeeze,
    squeeze_excite,
    use_backend,
)
from senet_kernels.models import create_model


class SE(nn.Module):
    """The block as people write it, of linear or convolutional layers."""

    def __init__(self, channels: int = 16, layer: str = "linear") -> None:
        super().__init__()
        make: Any = nn.Linear if layer == "linear" else partial(nn.Conv2d, kernel_size=1)
        self.fc1, self.fc2, self.layer = make(channels, 4), make(4, channels), layer

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=self.layer == "conv")
        u = self.fc2(torch.relu(self.fc1(z)))
        return x * torch.sigmoid(u if self.layer == "conv" else u[:, :, None, None])


# ---- torch.fx ----

_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: FusedSEBlock(16),
    "steps": lambda: FusedSEBlock(16, before="silu", after="relu", gate="hardsigmoid_02"),
    "shift": lambda: FusedSEBlock(16, scale_and_shift=True),
    "weighted": lambda: FusedSEBlock(16, weighted_sum=True),
    "single": lambda: FusedSEBlock(16, excitation="single"),
    "tied": lambda: FusedSEBlock(16, excitation="tied"),
    "constant": lambda: FusedSEBlock(16, excitation="constant"),
    "timm": lambda: TimmSE(16),
    "torchvision": lambda: TorchvisionSE(16, 4),
    "fused": lambda: _converted(SE()),
}


def _converted(block: nn.Module) -> nn.Module:
    assert fuse_se_blocks(block).replaced
    return block


@pytest.mark.parametrize("shape", [(2, 16, 5, 4), (3, 16, 7), (1, 16, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("name", _BLOCKS)
def test_fx_traces_every_block(name: str, shape: tuple[int, ...]) -> None:
    block = _BLOCKS[name]()
    if name in ("torchvision", "fused") and len(shape) != 4:
        pytest.skip("its layers are for images")
    traced = fx.symbolic_trace(block)
    x = torch.randn(shape)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [fn(leaf) for fn, leaf in zip((traced, block), leaves, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(*(leaf.grad for leaf in leaves))
    if name != "fused":  # torch.fx cannot pickle the postponed annotations of this file
        again = torch.load(_saved(traced), weights_only=False)
        torch.testing.assert_close(again(x), block(x))


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_fx_keeps_optional_arguments() -> None:
    block = FusedSEBlock(16, after="relu")
    traced = fx.symbolic_trace(block)
    x, residual, lengths = torch.randn(2, 16, 9), torch.randn(2, 16, 9), torch.tensor([3, 9])
    torch.testing.assert_close(traced(x, residual, lengths), block(x, residual, lengths))
    constant = fx.symbolic_trace(FusedSEBlock(16, excitation="constant"))
    with pytest.raises(ValueError, match="lengths: expected None"):
        constant(x, None, lengths)


def test_fx_of_one_image_alone() -> None:
    block = TorchvisionSE(16, 4)
    traced = fx.symbolic_trace(block)
    for shape in ((16, 5, 4), (2, 16, 5, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), block(x))
        torch.testing.assert_close(traced(x, x), block(x, x))


class _Functional(nn.Module):
    """Calls of the functional API among a model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = squeeze_excite(x, self.w, None, self.w, None, residual=x, after="relu")
        return channel_scale(y, squeeze(y, before="silu"), gate="tanh")


def test_fx_records_the_functional_api() -> None:
    model, x = _Functional(), torch.randn(2, 8, 5)
    traced = fx.symbolic_trace(model)
    calls = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert calls == [squeeze_excite, squeeze, channel_scale]
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name", ["se_resnet8", "se_resnet18"])
def test_fx_of_whole_networks(name: str) -> None:
    model = create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_feature_extractors_of_torchvision() -> None:
    models = library("torchvision.models")
    extraction = library("torchvision.models.feature_extraction")
    model, x = models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    add_se_blocks(model)
    names = extraction.get_graph_node_names(model)[1]
    assert any(name.endswith("se.fc1") for name in names)
    features = extraction.create_feature_extractor(model, {"layer2": "out"})(x)["out"]
    seen: list[Tensor] = []
    model.layer2.register_forward_hook(lambda *a: seen.append(a[2]))
    model(x)
    torch.testing.assert_close(features, seen[0])


def test_quantisation_by_fx() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    model = nn.Sequential(nn.Conv2d(3, 16, 3), FusedSEBlock(16, reduction=4)).eval()
    x = torch.randn(4, 3, 9, 8)
    right = model(x)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    torch.testing.assert_close(prepared(x), right)
    y = quantize_fx.convert_fx(prepared)(x)
    assert (y - right).abs().max() < 0.05 * right.abs().max()


def test_folding_of_norms_by_fx() -> None:
    from torch.fx.experimental.optimization import fuse

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), FusedSEBlock(16)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = torch.randn(2, 3, 9, 8)
    folded = fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


# ---- weights of other classes ----


class _Wrapper(Tensor):
    """A weight in eight bits, a scale for each row: knows its product and little else."""

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scale: Tensor) -> _Wrapper:
        self: _Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, q.shape, dtype=scale.dtype, device=q.device
        )
        self.q, self.scale = q, scale
        return self

    def __init__(self, q: Tensor, scale: Tensor) -> None: ...

    @classmethod
    def quantised(cls, weight: Tensor) -> _Wrapper:
        scale = weight.flatten(1).abs().amax(1) / 127
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        return cls((weight / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        return self.q.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (F.linear, F.conv2d, torch.conv2d):
            x, w, *rest = args
            return func(x, w.plain(), *rest, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(f"{cls.__name__}: {func} is not implemented")


class _Flattened(_Wrapper):
    """As torchao's: says what it is made of."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> _Flattened:
        return _Flattened(inner["q"], inner["scale"])


class _Doubled(Tensor):
    """Redefines a layer's product by ``__torch_function__`` alone."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        if func in (F.linear, F.conv2d, torch.conv2d):
            return 2 * y.as_subclass(Tensor)
        return y


def _doubled(weight: Tensor) -> Tensor:
    return weight.as_subclass(_Doubled)


def _quantise(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = make(module.weight.detach().as_subclass(Tensor))
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


_KINDS = {"wrapper": _Wrapper.quantised, "flattened": _Flattened.quantised, "doubled": _doubled}


@pytest.mark.parametrize("order", ["fuse first", "quantise first"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("kind", _KINDS)
def test_weights_of_another_class(kind: str, layer: str, order: str) -> None:
    torch.manual_seed(1)
    block, x = SE(layer=layer), torch.randn(2, 16, 5, 4)
    right = _quantise(copy.deepcopy(block), _KINDS[kind])(x)
    if order == "fuse first":
        assert fuse_se_blocks(block).replaced
        _quantise(block, _KINDS[kind])
    else:
        _quantise(block, _KINDS[kind])
        report = fuse_se_blocks(block)
        assert "weight of class" in report.refused[0].note
    with torch.no_grad():
        torch.testing.assert_close(block(x), right)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("excitation", ["two", "single", "tied"])
def test_a_block_with_weights_of_another_class(kind: str, excitation: str) -> None:
    block, x = FusedSEBlock(16, excitation=excitation), torch.randn(2, 16, 5, 4)
    if excitation == "tied" and kind != "doubled":
        pytest.skip("transposes its weight, which these do not know")
    _quantise(block, _KINDS[kind])
    z = x.mean((2, 3), keepdim=True)
    h = z if block.fc1 is None else torch.relu(block.fc1(z))
    u = block.fc2(h, *((block.fc1.weight,) if excitation == "tied" else ()))
    with torch.no_grad():
        torch.testing.assert_close(block(x), x * torch.sigmoid(u))


def test_the_functional_api_with_weights_of_another_class() -> None:
    x, w, b = torch.randn(2, 16, 5, 4), torch.randn(16, 16), torch.randn(16)
    quantised = _Flattened.quantised(w)
    right = squeeze_excite(x, quantised.plain(), b, quantised.plain(), b, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(squeeze_excite(x, quantised, b, quantised, b), right)


def test_weights_of_torchao() -> None:
    quantization = library("torchao.quantization")
    block, x = SE(64), torch.randn(2, 64, 5, 4)
    right = copy.deepcopy(block)
    quantization.quantize_(right, quantization.Int8WeightOnlyConfig())
    fuse_se_blocks(block)
    quantization.quantize_(block, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(block(x), right(x))


# ---- functorch's tensors while compiling ----


def _loss(model: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = torch.func.functional_call(model, p, (x,))
    return y.square().sum()


def _transforms(model: nn.Module) -> dict[str, Callable[..., Any]]:
    loss = partial(_loss, model)
    return {
        "grad": lambda p, x: torch.func.grad(loss)(p, x),
        "grad of x": lambda p, x: torch.func.grad(loss, argnums=1)(p, x),
        "vjp": lambda p, x: torch.func.vjp(lambda x: loss(p, x), x)[1](torch.ones(())),
        "jvp": lambda p, x: torch.func.jvp(lambda x: loss(p, x), (x,), (x,)),
        "jacrev": lambda p, x: torch.func.jacrev(lambda x: model(x).mean((2, 3)))(x),
        "per sample": torch.vmap(torch.func.grad(lambda p, x: loss(p, x[None])), in_dims=(None, 0)),
        "vmap": torch.vmap(lambda p, x: model(x[None])[0], in_dims=(None, 0)),
    }


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), _converted(SE())),
    "converted conv": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), _converted(SE(layer="conv"))),
    "block": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), FusedSEBlock(16, reduction=4)),
    "weighted": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), FusedSEBlock(16, before="silu", weighted_sum=True)
    ),
    "constant": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), FusedSEBlock(16, excitation="constant")),
}


@pytest.mark.parametrize("transform", _transforms(nn.Identity()))
@pytest.mark.parametrize("name", _MODELS)
def test_transforms_while_compiling(name: str, transform: str) -> None:
    model = _MODELS[name]().double()
    p, x = dict(model.named_parameters()), torch.randn(2, 3, 7, 6, dtype=torch.float64)
    fn = _transforms(model)[transform]
    right = fn(p, x)
    torch._dynamo.reset()
    got = torch.compile(fn, backend="eager", fullgraph=True)(p, x)
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


# ---- shells around a conversion and a call ----


class _Counting(TorchDispatchMode):
    """Any mode: it may not like what a capture computes."""

    only_observes = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mean.dim:
            raise AssertionError("a capture is none of a mode's business")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_conversion_under_fake_tensors(layer: str) -> None:
    """What memory estimators do: the capture has tensors of its own."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 16, 3), SE(layer=layer))
        report = fuse_se_blocks(model)
        y = model(torch.randn(2, 3, 8, 8))
        y.sum().backward()
    assert len(report.replaced) == 1
    assert y.shape == (2, 16, 6, 6)
    assert all(p.grad is not None for p in model.parameters())


def test_conversion_of_a_real_model_under_fake_tensors() -> None:
    model = SE()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fuse_se_blocks(model).replaced
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(model(x), SE.forward(model, x))


def test_conversion_under_any_mode() -> None:
    with _Counting():
        assert fuse_se_blocks(SE()).replaced


# ---- torch.jit.trace ----


@pytest.mark.parametrize("name", [n for n in _BLOCKS if n != "torchvision"])
@pytest.mark.parametrize("how", ["defaults", "no_grad"])
def test_a_trace_can_be_saved_and_trained(name: str, how: str, recwarn: Any) -> None:
    """With its check, of another batch than it was made of, where the package is not imported."""
    block = _BLOCKS[name]().eval()
    x, other = torch.randn(2, 16, 5, 5), torch.randn(3, 16, 5, 5)
    with torch.set_grad_enabled(how == "defaults"):
        traced = torch.jit.trace(block, x)
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    assert "senet_kernels::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(other), block(other))
    loaded(other).square().sum().backward()
    block(other).square().sum().backward()
    for p, q in zip(loaded.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_trace_by_the_reference() -> None:
    block, x = FusedSEBlock(16).eval(), torch.randn(2, 16, 5, 5)
    with use_backend("reference"):
        traced = torch.jit.trace(block, x)
    torch.testing.assert_close(traced(x), block(x))


def test_a_trace_under_autocast() -> None:
    block, x = FusedSEBlock(16).eval(), torch.randn(2, 16, 5, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        traced = torch.jit.trace(block, x)
        assert traced(x).dtype == block(x).dtype == torch.bfloat16


def test_a_wrong_call_is_named_while_tracing() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, 16"):
        torch.jit.trace(FusedSEBlock(16), torch.randn(2, 7, 5, 5))


# ---- operators that are counted ----

_COUNT = """
import sys, torch
import senet_kernels as sk
{before}
x, w = torch.randn(2, 8, 3, 3), torch.randn(4, 8)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    y = sk.squeeze_excite(x, w.requires_grad_(), None, w.t().contiguous(), None, backend="native")
    forward = counter.get_total_flops()
    y.sum().backward()
print(forward, counter.get_total_flops())
"""


@pytest.mark.parametrize(
    "before",
    ["", "import torch.utils.flop_counter", pytest.param("import copy", marks=pytest.mark.slow)],
)
def test_flops_are_counted_without_another_import(before: str) -> None:
    code = _COUNT.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    forward, total = map(int, done.stdout.split())
    assert forward == 2 * 2 * (2 * 4 * 8)
    assert total > forward


def test_importing_leaves_the_counter_alone() -> None:
    code = "import sys, senet_kernels; print('torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr


def test_formulas_that_fail_leave_the_counter_usable() -> None:
    """Another torch may have moved what they are registered with."""
    code = """
import sys, senet_kernels
sys.modules["senet_kernels.flops"] = None
from torch.utils.flop_counter import FlopCounterMode
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["imported"], done.stderr
    assert "torch.utils.flop_counter was imported" in done.stderr
