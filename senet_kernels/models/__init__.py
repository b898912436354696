"""The SENet family: ResNets with fused squeeze-and-excitation, and their plain twins.

``create_model("se_resnet50")`` builds one, ``list_models()`` names them all. They need nothing but
torch.
"""

from __future__ import annotations

from .add_se import AdditionReport, add_se_blocks
from .factory import ARCHITECTURES, SENet, create_model, list_models, timm_twin
from .parameters import parameter_groups, se_parameters
from .resnet import Architecture, BasicBlock, Bottleneck, ResNet
from .timm_keys import LEGACY_DEEP_STEM_KEYS, LEGACY_KEYS, TIMM_TWINS, from_legacy

__all__ = [
    "ARCHITECTURES",
    "LEGACY_DEEP_STEM_KEYS",
    "LEGACY_KEYS",
    "TIMM_TWINS",
    "AdditionReport",
    "Architecture",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "SENet",
    "add_se_blocks",
    "create_model",
    "from_legacy",
    "list_models",
    "parameter_groups",
    "se_parameters",
    "timm_twin",
]
