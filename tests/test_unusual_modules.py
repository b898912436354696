"""Modules of known classes that their users changed before fusing, and what users do beside calling
them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import senet_kernels
from models import SE, library
from senet_kernels import FusedSEBlock, fuse_se_blocks, unfuse_se_blocks, use_backend


def _outcome(module: Any, x: Tensor) -> Any:
    try:
        return module(x)
    except (RuntimeError, IndexError, TypeError) as error:
        return type(error)


def _check(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    expected, got = _outcome(plain, x), _outcome(fused, x)
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert expected is got


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x.clamp(1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3)


def _torchvisions() -> Any:
    library("torchvision")
    from torchvision.ops import SqueezeExcitation

    return SqueezeExcitation(16, 4)


def _timms(**options: Any) -> Any:
    library("timm")
    from timm.layers import SEModule

    return SEModule(16, rd_channels=4, **options)


def _monais() -> Any:
    pytest.importorskip("monai")
    from monai.networks.blocks import ChannelSELayer

    return ChannelSELayer(2, 16)


def _transformers() -> Any:
    pytest.importorskip("transformers")
    from transformers.models.regnet.modeling_regnet import RegNetSELayer

    return RegNetSELayer(16, 4)


def _scaled(function: Any) -> Callable[..., Any]:
    return lambda *args: 2 * function(*args)


#: What is made, and what its user does to it.
_UNUSUAL: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "maximum": (_torchvisions, lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1))),
    "GeM": (_torchvisions, lambda m: setattr(m, "avgpool", GeM())),
    "no pool": (_torchvisions, lambda m: setattr(m, "avgpool", nn.Identity())),
    "larger pool": (_torchvisions, lambda m: setattr(m.avgpool, "output_size", 6)),
    "pool of 2": (_torchvisions, lambda m: setattr(m.avgpool, "output_size", 2)),
    "pool of transformers": (
        _transformers, lambda m: setattr(m, "pooler", nn.AdaptiveMaxPool2d(1)),
    ),
    "a step more": (_transformers, lambda m: m.attention.append(nn.Hardtanh(0, 0.1))),
    "a step more of MONAI's": (_monais, lambda m: m.fc.append(nn.Hardtanh(0, 0.1))),
    "Linear": (_timms, lambda m: setattr(m, "fc1", nn.Linear(16, 4))),
    "Conv1d": (_timms, lambda m: setattr(m, "fc1", nn.Conv1d(16, 4, 1))),
    "a norm": (_timms, lambda m: setattr(m, "bn", nn.Tanh())),
    "ReLU6 of 0.1": (
        lambda: _timms(act_layer=nn.ReLU6), lambda m: setattr(m.act, "max_val", 0.1),
    ),
    "its own convolution": (
        _timms, lambda m: setattr(m.fc1, "_conv_forward", _scaled(m.fc1._conv_forward)),
    ),
    "its own call": (_timms, lambda m: setattr(m.gate, "_call_impl", _scaled(m.gate._call_impl))),
    "nested": (_timms, lambda m: setattr(m, "act", nn.Sequential(m.act))),
}  # fmt: skip


@pytest.mark.parametrize("name", _UNUSUAL)
def test_changed_before_fusing(name: str) -> None:
    make, change = _UNUSUAL[name]
    fused = make()
    change(fused)
    plain = copy.deepcopy(fused)
    if name.startswith("its own"):  # functions of an instance are of the one that was copied
        plain = make()
        plain.load_state_dict(fused.state_dict())
        change(plain)
    report = fuse_se_blocks(fused)
    assert bool(report.replaced) == (name in ("a norm", "nested"))
    assert report.replaced or report.refused
    _check(plain, fused, torch.rand(2, 16, 6, 6) + 0.1)


def test_library_functions_replaced_before_fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _torchvisions()
    kind = type(module)
    monkeypatch.setattr(kind, "_scale", _scaled(kind._scale))
    report = fuse_se_blocks(module)
    assert "_scale, which it calls, has been replaced" in report.refused[0].note


@pytest.mark.parametrize("kind", ["converted", "block", "squeeze", "channel_scale", "between"])
def test_tangents_through_a_backward_pass_of_before(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector-Jacobian product is linear: its tangent is that of another vector."""
    monkeypatch.setattr("senet_kernels.between.WORTH", 0)
    gates = torch.randn(2, 16, dtype=torch.float64)
    run: Any
    if kind in ("converted", "between"):
        run = SE().double()
        if kind == "between":
            run.act = nn.Softmax(1)
        assert fuse_se_blocks(run).replaced
    else:
        run = {
            "block": FusedSEBlock(16).double(),
            "squeeze": senet_kernels.squeeze,
            "channel_scale": lambda x: senet_kernels.channel_scale(x, gates),
        }[kind]
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    y = run(x)
    v, t = torch.randn_like(y), torch.randn_like(y)
    _, tangent = torch.func.jvp(
        lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0], (v,), (t,)
    )
    torch.testing.assert_close(tangent, torch.autograd.grad(y, x, t)[0])
    assert tangent.abs().sum() > 0


def test_forward_kept_since_before_unfusing() -> None:
    module: Any = SE()
    plain = copy.deepcopy(module)
    fuse_se_blocks(module)
    kept = module.forward
    module.forward = lambda x: kept(x)
    x = torch.randn(2, 16, 5, 5)
    _check(plain, module, x)
    assert unfuse_se_blocks(module) == 1
    _check(plain, module, x)


class EnablesGradients(SE):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return super().forward(x)


class SetsGradients(SE):
    def forward(self, x: Tensor) -> Any:
        torch.set_grad_enabled(True)
        return super().forward(x)


@pytest.mark.parametrize("kind", [EnablesGradients, SetsGradients])
def test_forward_that_switches_gradients(kind: type[nn.Module]) -> None:
    module = kind()
    fuse_se_blocks(module)
    with torch.no_grad():
        assert module(torch.randn(2, 16, 5, 5)).requires_grad


class NotOfNothing(SE):
    def forward(self, x: Tensor) -> Any:
        if x.numel() == 0:
            raise IndexError
        return super().forward(x)


class NoImages(SE):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.shape[0] else x


@pytest.mark.parametrize("kind", [NotOfNothing, NoImages])
def test_forward_that_asks_whether_there_is_anything(kind: type[nn.Module]) -> None:
    module = kind()
    plain = copy.deepcopy(module)
    fuse_se_blocks(module)
    for batch in (0, 2):
        x = torch.randn(batch, 16, 5, 5)
        _check(plain, module, x)
        assert (_outcome(module, x) is x) == (_outcome(plain, x) is x)


class Listed(nn.Module):
    known: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Listed.known["last"] = cls


class ListedSE(SE, Listed):
    pass


class _Meta(type):
    pass


class MetaSE(SE, metaclass=_Meta):
    pass


def test_lists_of_classes_are_left_alone() -> None:
    assert fuse_se_blocks(ListedSE()).replaced
    assert Listed.known["last"] is ListedSE
    assert "_Meta" in fuse_se_blocks(MetaSE()).refused[0].note


def test_made_of_the_class_of_a_fused_one() -> None:
    model = nn.Sequential(SE())
    fuse_se_blocks(model)
    model.append(type(model[0])())
    plain = SE()
    plain.load_state_dict(model[1].state_dict())
    assert len(fuse_se_blocks(model).replaced) == 2
    _check(plain, model[1], torch.randn(2, 16, 5, 5))


class Named(SE):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * len(self._get_name())


class OfItsDevice(SE):
    def forward(self, x: Tensor) -> Any:
        assert x.type() == "torch.FloatTensor"
        return super().forward(x)


def test_its_class_by_other_words() -> None:
    module = Named()
    plain = copy.deepcopy(module)
    fuse_se_blocks(module)
    _check(plain, module, torch.randn(2, 16, 5, 5))


@pytest.mark.parametrize("hooked", [(), ("0",), ("0", "1"), ("se",)])
def test_hooks_beside_an_activation_in_place(hooked: tuple[str, ...]) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    plain = nn.Sequential(inner, SE())
    fused = copy.deepcopy(plain)
    assert any(e.is_around for e in fuse_se_blocks(fused, neighbours=True).replaced)
    x = torch.randn(2, 3, 5, 5)
    for mode in (True, False):
        seen: list[list[Tensor]] = [[], []]
        handles: list[Any] = []
        for kept, model in zip(seen, (plain, fused), strict=True):
            for name in hooked:
                child = model[1] if name == "se" else model[0].get_submodule(name)
                keep = lambda _, __, y, kept=kept: kept.append(y)  # noqa: E731
                handles.append(child.register_forward_hook(keep))
            model.train(mode)
        _check(plain, fused, x)
        assert len(seen[0]) == len(seen[1]) == len(hooked)
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        for handle in handles:
            handle.remove()


class Doubled:
    """A mixin that its user puts on top of what was fused."""

    def forward(self, x: Tensor) -> Any:
        return 2 * super().forward(x)  # type: ignore[misc]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_class_on_top_of_a_fused_one_is_copied(copied: Any) -> None:
    module: Any = SE()
    fuse_se_blocks(module)
    x = torch.randn(2, 16, 5, 5)
    expected = 2 * module(x)
    module.__class__ = type("DoubledSE", (Doubled, type(module)), {})
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(copied(module)(x), expected)


class OfWeight(SE):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.to(self.fc1.weight.dtype))


@pytest.mark.parametrize("compiled", [False, True])
def test_weight_that_is_no_parameter_any_more(compiled: bool) -> None:
    plain: Any = OfWeight()
    fused: Any = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    for module in (plain, fused):
        weight = module.fc1.weight.detach() * 2
        del module.fc1.weight
        module.fc1.weight = weight
    torch.compiler.reset()
    run = torch.compile(fused, backend="eager") if compiled else fused
    x = torch.randn(2, 16, 5, 5)
    _check(plain, run, x)
    with use_backend("native"), pytest.raises(RuntimeError, match="its child fc1"):
        fused(x)


@pytest.mark.parametrize("path", ["0", "0.1"])
@pytest.mark.parametrize("before", [True, False])
def test_sequential_with_none_in_a_place(path: str, before: bool) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
    fused = nn.Sequential(inner, SE(), nn.ReLU())
    plain = copy.deepcopy(fused)
    *parent, name = path.split(".")
    if before:
        fused.get_submodule(".".join(parent))._modules[name] = None
    fuse_se_blocks(fused, neighbours=True)
    for model in (fused, plain):
        model.get_submodule(".".join(parent))._modules[name] = None
    _check(plain, fused, torch.randn(2, 3, 5, 5))


def test_default_device_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = FusedSEBlock(16), torch.randn(2, 16, 5, 5)
    expected = block(x)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the long way")

    monkeypatch.setattr("senet_kernels.resolve.prepare", refuse)
    with torch.device("cpu"):
        torch.testing.assert_close(block(x), expected)
    long = pytest.raises(AssertionError, match="the long way")
    with torch.device("cpu"), BaseTorchFunctionMode(), long:
        block(x)


def test_a_change_is_put_into_words_where_somebody_asks() -> None:
    module: Any = SE()
    fuse_se_blocks(module)
    module.act.register_forward_hook(lambda *_: None)
    with use_backend("native"), pytest.raises(Exception, match="its child act has hooks"):
        module(torch.randn(2, 16, 5, 5))
