"""Real models of other libraries, small, with squeeze-and-excitation that matters to the output.

Each library is optional: ``make test`` installs them all, elsewhere what is missing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks import randomise
from senet_kernels._libraries import load


def library(name: str) -> ModuleType:
    """An optional library, imported; the test is skipped where it is not installed."""
    try:
        return load(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


class SE(nn.Module):
    """A block of nobody's library, of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(16, 4, 1), nn.ReLU()
        self.fc2, self.gate = nn.Conv2d(4, 16, 1), nn.Sigmoid()

    def gates(self, x: Tensor) -> Any:
        return self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Any:
        return x * self.gates(x)


@dataclass(frozen=True)
class RealModel:
    """A model of another library, by name."""

    name: str
    library: str
    build: Callable[[ModuleType], nn.Module]
    shape: tuple[int, ...] = (2, 3, 64, 64)
    blocks: int = 1  # squeeze-and-excitation modules, at least

    def make(self) -> nn.Module:
        """The model in eval mode, all its parameters and statistics random."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        module = library(self.library)
        torch.manual_seed(0)
        model = self.build(module).eval()
        randomise(model)
        return model

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))

    def __str__(self) -> str:
        return self.name


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, or the first tensor in it."""
    y: Any = model(x)
    while not isinstance(y, Tensor):
        y = next(iter(y.values())) if isinstance(y, dict) else y[0]
    return y


def timm_model(name: str, blocks: int, size: int = 64, **kwargs: Any) -> RealModel:
    return RealModel(
        f"timm-{name}", "timm", lambda timm: timm.create_model(name, **kwargs),
        (2, 3, size, size), blocks,
    )  # fmt: skip


def _torchvision(name: str, blocks: int, size: int = 64) -> RealModel:
    return RealModel(
        f"torchvision-{name}", "torchvision.models",
        lambda models: models.get_model(name, weights=None), (2, 3, size, size), blocks,
    )  # fmt: skip


def _transformers(name: str, config: dict[str, Any], blocks: int, size: int = 64) -> RealModel:
    def build(transformers: ModuleType) -> nn.Module:
        cls = getattr(transformers, f"{name}Model")
        model: nn.Module = cls(getattr(transformers, f"{name}Config")(**config))
        return model

    return RealModel(f"transformers-{name}", "transformers", build, (2, 3, size, size), blocks)


_NETS = "monai.networks.nets"
_BLOCKS = "monai.networks.blocks"

REAL_MODELS = (
    timm_model("seresnet18", 8),
    timm_model("seresnext26d_32x4d", 8),
    timm_model("legacy_seresnet18", 8),
    timm_model("efficientnet_b0", 16),
    timm_model("semnasnet_075", 8),
    timm_model("mobilenetv3_small_100", 9),
    timm_model("fbnetv3_b", 18),
    timm_model("ghostnet_100", 7),
    timm_model("lcnet_050", 2),
    timm_model("regnety_002", 13),
    timm_model("rexnet_100", 13),  # a BatchNorm inside the excitation
    timm_model("ese_vovnet19b_dw", 4),  # a single layer
    timm_model("hgnet_tiny", 5),
    timm_model("sedarknet21", 7),
    timm_model("nf_regnet_b0", 10),
    timm_model("ecaresnet26t", 8),  # a convolution over channels
    _torchvision("efficientnet_b0", 16),
    _torchvision("mobilenet_v3_small", 9),
    _torchvision("regnet_y_400mf", 16),
    _transformers("RegNet", {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 96, 128],
                             "groups_width": 16, "embedding_size": 16}, 5),
    _transformers("EfficientNet", {"width_coefficient": 0.5, "depth_coefficient": 0.5,
                                   "hidden_dim": 640}, 7),
    RealModel("monai-SEResNet50", _NETS, lambda n: n.SENet(
        2, 3, "se_resnet_bottleneck", [1, 1, 1, 1], groups=1, reduction=16, dropout_prob=None,
        dropout_dim=2, num_classes=5, inplanes=64, input_3x3=False,
        downsample_kernel_size=1), (2, 3, 64, 64), 4),
    RealModel("monai-SENet3d", _NETS, lambda n: n.SENet(
        3, 1, "se_resnet_bottleneck", [1, 1, 1, 1], groups=1, reduction=16, dropout_prob=None,
        dropout_dim=3, num_classes=5, inplanes=64, input_3x3=False,
        downsample_kernel_size=1), (2, 1, 32, 32, 32), 4),
    RealModel("monai-ChannelSE1d", _BLOCKS, lambda b: b.ChannelSELayer(1, 24, 4), (2, 24, 50)),
    RealModel("monai-ResidualSE", _BLOCKS, lambda b: b.ResidualSELayer(2, 24), (2, 24, 9, 7)),
    RealModel("smp-Unet-scse", "segmentation_models_pytorch", lambda smp: smp.Unet(
        "resnet18", encoder_weights=None, decoder_attention_type="scse"), (2, 3, 64, 64), 4),
    RealModel("smp-mobileone", "segmentation_models_pytorch", lambda smp: smp.Unet(
        "mobileone_s4", encoder_weights=None, decoder_channels=(16, 16, 16, 8, 8)),
        (2, 3, 64, 64), 4),
    RealModel("smp-se_resnet50", "segmentation_models_pytorch", lambda smp: smp.Unet(
        "se_resnet50", encoder_weights=None, decoder_channels=(16, 16, 16, 8, 8)),
        (2, 3, 64, 64), 16),
)  # fmt: skip
