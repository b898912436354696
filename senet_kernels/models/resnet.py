"""ResNets whose residual blocks may end in squeeze-and-excitation: He et al., *Deep Residual
Learning* (arXiv:1512.03385), and Hu et al., *Squeeze-and-Excitation Networks* (arXiv:1709.01507).

Parameters have the names of timm's and torchvision's ResNets. The end of a block, the excitation
with the residual and the ReLU, is one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from senet_kernels.modules import FusedSEBlock

from .timm_keys import convert_legacy

#: Makes the excitation of a block with that many output channels; None: there is none.
MakeSE = Callable[[int], FusedSEBlock | None]

STEMS = ("imagenet", "deep", "small")
POOLS = ("pad", "ceil")


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one network of the family from another; options go on top of it."""

    block: str  # "basic" or "bottleneck"
    layers: tuple[int, ...]  # blocks in each stage
    planes: tuple[int, ...] = (64, 128, 256, 512)  # channels of a stage before the expansion
    se: bool = False
    groups: int = 1
    width_per_group: int = 64
    first_width_ratio: int = 1  # of the 3x3 convolution's width over the first 1x1's
    stem: str = "imagenet"
    stem_channels: int = 64
    pool: str = "pad"  # after the stem; see ResNet
    downsample_kernel: int = 1  # from the second stage on
    reduction: int = 16
    drop_rate: float = 0.0


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class _ResidualBlock(nn.Module):
    """What the two kinds of blocks share: how they end."""

    downsample: nn.Module | None
    se: FusedSEBlock | None

    def _end(self, x: Tensor, shortcut: Tensor) -> Tensor:
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        if self.se is None:
            return F.relu(x + shortcut, inplace=True)
        y: Tensor = self.se(x, shortcut)  # FusedSEBlock(after="relu"): all three in one
        return y


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions, and the shortcut around them.

    Args:
        inputs: channels of the input ``[B, inputs, H, W]``.
        planes: channels of the output ``[B, planes, H / stride, W / stride]``.
        stride: of the first convolution.
        downsample: makes the shortcut fit; None: it does already.
        make_se: called with the number of output channels.
    """

    expansion = 1

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        make_se: MakeSE,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.se = make_se(planes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return self._end(y, x)


class Bottleneck(_ResidualBlock):
    """A 1x1, a 3x3 and a 1x1 convolution, and the shortcut around them.

    Args:
        inputs: channels of the input ``[B, inputs, H, W]``.
        planes: a quarter of the channels of the output.
        stride: of the 3x3 convolution, or of the first 1x1 where ``stride_in_1x1``.
        downsample: makes the shortcut fit; None: it does already.
        make_se: called with the number of output channels.
        groups, width_per_group: of the 3x3 convolution, as in ResNeXt (arXiv:1611.05431).
        first_width_ratio: width of the 3x3 convolution over that of the first 1x1.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Module | None,
        make_se: MakeSE,
        *,
        groups: int = 1,
        width_per_group: int = 64,
        first_width_ratio: int = 1,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = planes * width_per_group // 64 * groups
        first, outputs = width // first_width_ratio, planes * self.expansion
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(inputs, first, 1, strides[0])
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = _conv(first, width, 3, strides[1], groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = downsample
        self.se = make_se(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return self._end(y, x)


def _deep_stem(inputs: int, outputs: int) -> nn.Sequential:
    """Three 3x3 convolutions; the BatchNorm and ReLU of the last are the network's own."""
    return nn.Sequential(
        _conv(inputs, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        _conv(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        _conv(64, outputs, 3),
    )  # fmt: skip


class ResNet(nn.Module):
    """A network of the family, for images of any size. Use :func:`create_model` to build one.

    Args:
        architecture: which one.
        num_classes: outputs of the classifier ``fc``; 0: pooled features come out instead.
        in_chans: channels of the images.
        make_se: makes the excitation of each block.
        stride_in_1x1: bottlenecks stride in their first 1x1 convolution, as in the papers, not in
            the 3x3, as in timm and torchvision.
        stem: ``"imagenet"``: 7x7 convolution of stride 2 and max pooling; ``"deep"``: three 3x3
            convolutions instead of the 7x7; ``"small"``: one 3x3 of stride 1 and no pooling, for
            small images.
        pool: the max pooling's edges: ``"pad"`` (timm, torchvision) or ``"ceil"`` (the papers'
            Caffe): where the windows lie differs, at every image size. Neither this nor
            ``stride_in_1x1`` shows in a state dict: weights fit both ways, and are wrong in one.
        drop_rate: dropout before the classifier.
        zero_init_last: the last BatchNorm of each block starts at 0, so that each block starts as
            its shortcut (arXiv:1706.02677).
        config: what :func:`create_model` was called with.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int,
        in_chans: int,
        make_se: MakeSE,
        *,
        stride_in_1x1: bool,
        stem: str,
        pool: str,
        drop_rate: float,
        zero_init_last: bool,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.stride_in_1x1 = stride_in_1x1
        self.stem = stem
        self.pool = pool
        self.drop_rate = drop_rate
        self.config = config

        channels = architecture.stem_channels
        self.conv1: nn.Module
        self.maxpool: nn.Module
        if stem == "imagenet":
            self.conv1 = _conv(in_chans, channels, 7, 2)
        elif stem == "deep":
            self.conv1 = _deep_stem(in_chans, channels)
        else:
            self.conv1 = _conv(in_chans, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        if stem == "small":
            self.maxpool = nn.Identity()
        elif pool == "ceil":
            self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        else:
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)

        self.stages = tuple(f"layer{i + 1}" for i in range(len(architecture.layers)))
        for i, name in enumerate(self.stages):
            stage, channels = self._stage(i, channels, make_se)
            self.add_module(name, stage)
        self.num_features = channels
        self.fc = _classifier(channels, num_classes)
        self._initialise(zero_init_last)

    def _stage(self, index: int, inputs: int, make_se: MakeSE) -> tuple[nn.Sequential, int]:
        a = self.architecture
        planes = a.planes[index]
        expansion = (BasicBlock if a.block == "basic" else Bottleneck).expansion
        outputs = planes * expansion
        blocks = []
        for i in range(a.layers[index]):
            stride = 2 if i == 0 and index > 0 else 1
            downsample = None
            if stride != 1 or inputs != outputs:
                kernel = a.downsample_kernel if index > 0 else 1
                downsample = nn.Sequential(
                    _conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs)
                )
            block: nn.Module
            if a.block == "basic":
                block = BasicBlock(inputs, planes, stride, downsample, make_se)
            else:
                block = Bottleneck(
                    inputs, planes, stride, downsample, make_se,
                    groups=a.groups, width_per_group=a.width_per_group,
                    first_width_ratio=a.first_width_ratio, stride_in_1x1=self.stride_in_1x1,
                )  # fmt: skip
            blocks.append(block)
            inputs = outputs
        return nn.Sequential(*blocks), outputs

    def _initialise(self, zero_init_last: bool) -> None:
        # He's for convolutions with BatchNorm behind them; excitations keep torch's own.
        excitations = {
            child
            for module in self.modules()
            if isinstance(module, FusedSEBlock)
            for child in module.modules()
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in excitations:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, num_features, H', W']``, the last stage's output."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, num_classes]``: logits."""
        x = self.forward_features(x)
        # flatten, not squeeze: a batch of one keeps its dimension.
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        logits: Tensor = self.fc(x)
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, random classifier in the place of the last layer.

        Raises:
            ValueError: ``num_classes`` is not an integer of at least 0.
        """
        check_count("num_classes", num_classes, 0)
        like = self.bn1.weight
        new = _classifier(self.num_features, num_classes).to(like.device, like.dtype)
        self.fc = new.train(self.training)
        self.num_classes = num_classes
        self.config = {**self.config, "num_classes": num_classes}

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # timm's legacy_ models have other names for the same tensors.
        problem = convert_legacy(state_dict, prefix, self)
        if problem is not None:
            error_messages: list[str] = args[4]
            error_messages.append(problem)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _classifier(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def check_count(name: str, value: Any, least: int) -> None:
    """``value`` must be an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
