"""Importing the model libraries people have, beside any build of torch; none is needed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

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
