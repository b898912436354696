"""Optional model libraries: importing them beside any build of torch, and weights that tell."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import nn

_NEED_TORCHVISION = ("timm", "torchvision", "segmentation_models_pytorch", "transformers")
_schemas: list[torch.library.Library] = []


def load(name: str) -> ModuleType:
    """An optional library, imported. Raises ImportError where it is not installed."""
    if name.split(".")[0] in _NEED_TORCHVISION:
        _make_torchvision_importable()
    return importlib.import_module(name)


def _make_torchvision_importable() -> None:
    # torchvision built for CUDA beside a torch without it: its library does not load, and its
    # Python part then misses the schemas of two ops, which no model here calls.
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        _schemas.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _schemas[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


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
