"""``TimmSE`` and ``TorchvisionSE`` in models that those libraries build themselves."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import library, randomise
from senet_kernels import FusedSEBlock, TimmSE, TorchvisionSE


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return dict(zip(["output", "input", *names], [y.detach(), *gradients], strict=True))


def _assert_equal(ours: nn.Module, theirs: nn.Module, *renamed: tuple[str, str]) -> None:
    """Same output and gradients from the same weights, whose names may differ."""

    def rename(name: str) -> str:
        for old, new in renamed:
            name = name.replace(old, new)
        return name

    ours, theirs = ours.double().eval(), theirs.double().eval()
    torch.manual_seed(0)
    randomise(theirs)
    ours.load_state_dict({rename(n): t for n, t in theirs.state_dict().items()})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    right = {rename(n): t for n, t in _step(theirs, x).items()}

    def largest_difference() -> float:
        got = _step(ours, x)
        assert got.keys() == right.keys()
        return max(float((got[n] - t).abs().max() / t.abs().max()) for n, t in right.items())

    assert largest_difference() < 1e-6  # torch's hardsigmoid: a float32 constant in its derivative
    # It can fail: a thousandth on one block is seen.
    block = next(m for m in ours.modules() if isinstance(m, FusedSEBlock))
    block.register_forward_hook(lambda module, args, y: 1.001 * y)
    assert largest_difference() > 1e-5


def test_timm_resnet() -> None:
    timm = library("timm")
    ours, theirs = (
        timm.create_model("resnet10t", block_args={"attn_layer": layer}) for layer in (TimmSE, "se")
    )
    assert sum(isinstance(m, TimmSE) for m in ours.modules()) == 4
    _assert_equal(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rd_round_fn": round},  # timm's default
        {"gate_layer": "hard_sigmoid", "force_act_layer": nn.ReLU, "rd_round_fn": lambda r: 8},
    ],
)
def test_timm_efficientnet(kwargs: dict[str, Any]) -> None:
    timm = library("timm")
    layer = timm.models._efficientnet_blocks.SqueezeExcite
    ours, theirs = (
        timm.create_model("mnasnet_small", act_layer=nn.SiLU, se_layer=partial(cls, **kwargs))
        for cls in (TimmSE, layer)
    )
    assert sum(isinstance(m, TimmSE) for m in ours.modules()) > 3
    _assert_equal(ours, theirs, ("conv_reduce", "fc1"), ("conv_expand", "fc2"))


class _Blocks(nn.Module):
    """Blocks of a torchvision network, whose builders take no ``se_layer``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))  # type: ignore[no-any-return]


def test_torchvision_efficientnet() -> None:
    efficientnet = library("torchvision.models.efficientnet")
    config = efficientnet.MBConvConfig(4, 3, 1, 16, 16, 1)

    def make(**kwargs: Any) -> nn.Module:
        return _Blocks(efficientnet.MBConv(config, 0.0, nn.BatchNorm2d, **kwargs))

    ours = make(se_layer=TorchvisionSE)
    assert isinstance(ours.blocks[0].block[2], TorchvisionSE)  # type: ignore[index, union-attr]
    assert "activation='silu'" in repr(ours)
    _assert_equal(ours, make())


def test_torchvision_mobilenet() -> None:
    mobilenet = library("torchvision.models.mobilenetv3")
    config = mobilenet.InvertedResidualConfig(16, 3, 64, 16, True, "HS", 1, 1, 1)

    def make(**kwargs: Any) -> nn.Module:
        return _Blocks(mobilenet.InvertedResidual(config, nn.BatchNorm2d, **kwargs))

    ours = make(se_layer=partial(TorchvisionSE, scale_activation=nn.Hardsigmoid))
    _assert_equal(ours, make())


@pytest.mark.parametrize("unbatched", [False, True])
def test_torchvision_module(unbatched: bool) -> None:
    """Three dimensions are one image, even where the height is C."""
    ops = library("torchvision.ops")
    theirs = ops.SqueezeExcitation(6, 2, activation=nn.Mish)
    ours = TorchvisionSE(6, 2, activation=nn.Mish)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 6, 5) if unbatched else torch.randn(2, 6, 6, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_widths_are_timms() -> None:
    layers = library("timm.layers")
    for channels in (8, 24, 36, 100, 120, 1000):
        for kwargs in ({}, {"rd_ratio": 0.25}, {"rd_ratio": 0.3, "rd_divisor": 4},
                       {"rd_channels": 5}, {"rd_channels": 0}):  # fmt: skip
            theirs = layers.SEModule(channels, device="meta", **kwargs)
            ours = TimmSE(channels, device="meta", dtype=torch.bfloat16, **kwargs)
            assert ours.hidden == theirs.fc1.out_channels, (channels, kwargs)
            assert ours.fc1.weight.is_meta
            assert ours.fc1.weight.dtype == torch.bfloat16
    assert TimmSE(8, rd_ratio=1.0).hidden == 8  # what timm's builder calls to see what is taken
    assert TimmSE(10, rd_ratio=0.25, rd_round_fn=round).hidden == 2
    assert TimmSE(16, bias=False).fc2.bias is None


@pytest.mark.parametrize(
    ("act", "gate", "expected"),
    [
        ("relu", "sigmoid", ("relu", "sigmoid")),
        ("swish", "hard_sigmoid", ("silu", "hardsigmoid")),
        ("Hard_Swish", nn.Tanh, ("hardswish", "tanh")),
        (nn.GELU, nn.Hardsigmoid, ("gelu", "hardsigmoid")),
        (partial(nn.GELU, approximate="tanh"), nn.Identity, ("gelu_tanh", "identity")),
        (partial(nn.SiLU, inplace=True), "hardsigmoid_02", ("silu", "hardsigmoid_02")),
        (lambda inplace: nn.ReLU6(inplace), None, ("relu6", "identity")),
        (None, nn.ReLU, ("identity", "relu")),
    ],
)
def test_functions_by_name_class_and_factory(
    act: Any, gate: Any, expected: tuple[str, str]
) -> None:
    for block in (
        TimmSE(8, act_layer=act, gate_layer=gate),
        TorchvisionSE(8, 4, activation=act, scale_activation=gate),
    ):
        assert (block.activation, block.gate) == expected


def test_functions_of_timm() -> None:
    layers = library("timm.layers")
    for name in ("relu", "silu", "swish", "gelu", "gelu_tanh", "hard_swish", "leaky_relu", "mish",
                 "relu6", "identity"):  # fmt: skip
        by_name = TimmSE(8, act_layer=name).activation
        assert by_name == TimmSE(8, act_layer=layers.get_act_layer(name)).activation
    for name in ("sigmoid", "hard_sigmoid", "tanh"):
        by_name = TimmSE(8, gate_layer=name).gate
        assert by_name == TimmSE(8, gate_layer=layers.get_act_layer(name)).gate


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"act_layer: expected one of .*got Softplus"):
        TimmSE(8, act_layer=nn.Softplus)
    with pytest.raises(ValueError, match=r"act_layer: expected one of .*got LeakyReLU.*0\.2"):
        TimmSE(8, act_layer=partial(nn.LeakyReLU, 0.2))
    with pytest.raises(ValueError, match=r"gate_layer: expected one of .*got 'swish'"):
        TimmSE(8, gate_layer="swish")
    with pytest.raises(TypeError, match=r"activation: expected a name.*got ReLU"):
        TorchvisionSE(8, 4, activation=nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scale_activation: expected a name.*got int 3"):
        TorchvisionSE(8, 4, scale_activation=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="add_maxpool"):
        TimmSE(8, add_maxpool=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="hidden: expected a positive integer, got 0"):
        TimmSE(8, rd_ratio=0.01, rd_round_fn=round)
    for ratio in (-1, math.nan, "x"):
        with pytest.raises(ValueError, match="rd_ratio: expected a positive number"):
            TimmSE(8, rd_ratio=ratio)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rd_divisor: expected a positive integer, got 0"):
        TimmSE(8, rd_divisor=0)
    with pytest.raises(ValueError, match="channels: expected a positive integer, got '8'"):
        TimmSE("8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="squeeze_channels: expected a positive integer, got None"):
        TorchvisionSE(8, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"activation: .*Linear.* cannot be made: .*in_features"):
        TorchvisionSE(8, 2, activation=nn.Linear)
