"""Whole networks with squeeze-and-excitation, and the variants of each that are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from senet_kernels import FusedSEBlock, fuse_se_blocks
from senet_kernels._libraries import load

ORIGINAL, FUSED, NEIGHBOURS, WITHOUT = "original", "fused", "neighbours", "no-se"
COMPILE, COMPILE_FUSED, COMPILE_WITHOUT = "compile", "compile-fused", "compile-no-se"
VARIANTS = (ORIGINAL, FUSED, NEIGHBOURS, WITHOUT, COMPILE, COMPILE_FUSED, COMPILE_WITHOUT)
# What each is built from; a compiled variant is its base, compiled.
BASE = {COMPILE: ORIGINAL, COMPILE_FUSED: NEIGHBOURS, COMPILE_WITHOUT: WITHOUT}


# -- Leela Chess Zero's tower ----------------------------------------------------------------------


class ScaleAndShiftSE(nn.Module):
    """lc0's form in plain PyTorch: the excitation gives a gate and a shift per channel."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        scale, shift = u.chunk(2, dim=1)
        return x * torch.sigmoid(scale) + shift


class TowerBlock(nn.Module):
    """Two 3x3 convolutions with norms, SE, the sum with the input, ReLU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se: nn.Module = ScaleAndShiftSE(channels, hidden)
        self.joined = False  # sum and ReLU are in the SE module

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.joined:
            out: Tensor = self.se(y, residual=x)
            return out
        return torch.relu(self.se(y) + x)


class Tower(nn.Module):
    """A residual tower on 112 planes of 8x8 with lc0's policy and value heads, simplified.

    ``fuse_se_blocks`` does not take scale-and-shift modules of foreign make, so :meth:`fuse` puts
    ``FusedSEBlock(scale_and_shift=True)`` in their place, on the same parameters.
    """

    def __init__(self, blocks: int, channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(112, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(TowerBlock(channels, hidden) for _ in range(blocks))
        self.policy = nn.Conv2d(channels, 73, 1)
        self.value = nn.Sequential(
            nn.Conv2d(channels, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 128), nn.ReLU(),
            nn.Linear(128, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.policy(x).flatten(1), self.value(x)], dim=1)

    def fuse(self, neighbours: bool) -> int:
        """Swap every SE module; returns how many."""
        for block in self.blocks:
            old = block.se
            new = FusedSEBlock(
                old.fc1.in_channels, hidden=old.fc1.out_channels, scale_and_shift=True,
                after="relu" if neighbours else None,
            )  # fmt: skip
            new.fc1, new.fc2 = old.fc1, old.fc2
            block.se, block.joined = new.train(old.training), neighbours
        return len(self.blocks)


# -- the networks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSpec:
    """A network by name: how it is made, what it reads, and the batch it is timed at."""

    name: str
    make: Callable[[], nn.Module]
    source: str
    channels: int = 3
    size: int = 224
    cpu_batch: int = 4
    cuda_batch: int = 256
    compiled_on_cpu: bool = False  # by default; Inductor's C++ takes minutes for the others

    def input(self, batch: int, size: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, self.channels, size, size, generator=generator)


def _timm(name: str, **more: Any) -> NetworkSpec:
    return NetworkSpec(name, lambda: load("timm").create_model(name), "timm", **more)


def _tower(blocks: int, channels: int) -> NetworkSpec:
    return NetworkSpec(
        f"lc0_{blocks}x{channels}", lambda: Tower(blocks, channels), "benchmarks/networks.py",
        112, 8, 16, 1024, compiled_on_cpu=True,
    )  # fmt: skip


# In the order of what a short run should answer first.
NETWORKS = {
    spec.name: spec
    for spec in (
        _timm("seresnet50"),
        _timm("efficientnet_b0"),
        _tower(10, 128),
        _timm("mobilenetv3_large_100", compiled_on_cpu=True),
        _timm("regnety_032"),
        _timm("seresnext50_32x4d"),
        _timm("efficientnet_b4", size=320, cuda_batch=64),
        _tower(20, 256),
    )
}
FULL_ONLY = ("lc0_20x256",)


def build(spec: NetworkSpec, seed: int = 0) -> nn.Module:
    """The network with random weights that let every block matter. Raises ImportError."""
    torch.manual_seed(seed)
    model = spec.make()
    randomise(model)
    return model


def se_modules(model: nn.Module) -> list[str]:
    """Names of the squeeze-and-excitation modules of a model, as ``fuse_se_blocks`` finds them."""
    if isinstance(model, Tower):
        return [f"blocks.{i}.se" for i in range(len(model.blocks))]
    report = fuse_se_blocks(copy.deepcopy(model))
    return [entry.name for entry in report.replaced]


def variant(model: nn.Module, name: str) -> nn.Module:
    """A variant of ``model`` on the very same parameters, with buffers of its own.

    Compiled variants come as their bases; who times them compiles them.

    Raises:
        RuntimeError: nothing was fused, which would time the original under another name.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    out = copy.deepcopy(model, shared)
    base = BASE.get(name, name)
    if base == WITHOUT:
        for module in se_modules(model):
            out.set_submodule(module, nn.Identity())
    elif base != ORIGINAL:
        neighbours = base == NEIGHBOURS
        if isinstance(out, Tower):
            fused = out.fuse(neighbours)
        else:
            fused = len(fuse_se_blocks(out, neighbours=neighbours).replaced)
        if not fused:
            raise RuntimeError("fuse_se_blocks replaced nothing in this network")
    return out


def randomise(model: nn.Module) -> None:
    """Break initialisations that hide a block: zeros, and norms that pass everything on."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, 1.0 / fan_in**0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.3)
