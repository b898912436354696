"""timm's names: which of its models are which of ours, and how their state dicts' keys map.

Models of the family have the keys of timm's and torchvision's ResNets, so those state dicts load
as they are. timm's ``legacy_`` models (the authors' Caffe networks) have other keys; loading one
into :class:`~senet_kernels.models.ResNet` renames them by ``LEGACY_KEYS``.

Where a network strides and how it pools leaves no trace in a state dict. ``legacy_`` keys tell, and
are refused where they would be wrong. Others cannot be: the weights of timm's ``seresnet50`` load
into ``create_model("se_resnet50", stride_in_1x1=True)`` without an error, and outputs are wrong.
``TIMM_TWINS`` and :func:`~senet_kernels.models.timm_twin` say which network is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

#: timm's name -> our name and the options that make it the same network.
TIMM_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {}),
    "resnet34": ("resnet34", {}),
    "resnet50": ("resnet50", {}),
    "resnet101": ("resnet101", {}),
    "resnet152": ("resnet152", {}),
    "resnext50_32x4d": ("resnext50_32x4d", {}),
    "resnext101_32x4d": ("resnext101_32x4d", {}),
    # timm rounds hidden widths to multiples of 8, which shows where channels are few.
    "seresnet18": ("se_resnet18", {"rd_divisor": 8}),
    "seresnet34": ("se_resnet34", {"rd_divisor": 8}),
    "seresnet50": ("se_resnet50", {}),
    "seresnet101": ("se_resnet101", {}),
    "seresnet152": ("se_resnet152", {}),
    "seresnext50_32x4d": ("se_resnext50_32x4d", {}),
    "seresnext101_32x4d": ("se_resnext101_32x4d", {}),
    "senet154": ("senet154", {"pool": "pad"}),
    "legacy_seresnet50": ("se_resnet50", {"stride_in_1x1": True}),
    "legacy_seresnet101": ("se_resnet101", {"stride_in_1x1": True}),
    "legacy_seresnet152": ("se_resnet152", {"stride_in_1x1": True}),
    "legacy_seresnext50_32x4d": ("se_resnext50_32x4d", {"pool": "ceil"}),
    "legacy_seresnext101_32x4d": ("se_resnext101_32x4d", {"pool": "ceil"}),
    "legacy_senet154": ("senet154", {}),
}

#: Parts of a ``legacy_`` key -> ours. The stem's are those of a single convolution.
LEGACY_KEYS: dict[str, str] = {
    "layer0.conv1.": "conv1.",
    "layer0.bn1.": "bn1.",
    "se_module.": "se.",
    "last_linear.": "fc.",
}
#: The stem of three convolutions (senet154).
LEGACY_DEEP_STEM_KEYS: dict[str, str] = {
    "layer0.conv1.": "conv1.0.",
    "layer0.bn1.": "conv1.1.",
    "layer0.conv2.": "conv1.3.",
    "layer0.bn2.": "conv1.4.",
    "layer0.conv3.": "conv1.6.",
    "layer0.bn3.": "bn1.",
}

_V = TypeVar("_V")


def is_legacy(state_dict: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether the keys are those of one of timm's ``legacy_`` models."""
    return any(key.startswith(f"{prefix}layer0.") for key in state_dict)


def from_legacy(state_dict: Mapping[str, _V], prefix: str = "") -> dict[str, _V]:
    """The same state dict under our keys, in its order; what does not start with ``prefix`` stays.

    Args:
        state_dict: of one of timm's ``legacy_`` models.
        prefix: of the model's keys, where it is a part of another.
    """
    deep = f"{prefix}layer0.conv3.weight" in state_dict
    table = {**LEGACY_KEYS, **LEGACY_DEEP_STEM_KEYS} if deep else LEGACY_KEYS
    pattern = re.compile("|".join(rf"(?:^|(?<=\.)){re.escape(old)}" for old in table))

    def rename(key: str) -> str:
        if not key.startswith(prefix):
            return key
        return prefix + pattern.sub(lambda m: table[m.group()], key.removeprefix(prefix))

    return {rename(key): value for key, value in state_dict.items()}


def convert_legacy(state_dict: dict[str, Tensor], prefix: str, model: nn.Module) -> str | None:
    """Rename in place where the keys are ``legacy_`` ones; else leave ``state_dict`` alone.

    Returns:
        Why the weights belong to another network than ``model``, although they may fit; or None.
    """
    if not is_legacy(state_dict, prefix):
        return None
    renamed = from_legacy(state_dict, prefix)
    state_dict.clear()
    state_dict.update(renamed)
    return _legacy_mismatch(model)


def _legacy_mismatch(model: Any) -> str | None:
    start = "expected weights of this network, got those of one of timm's legacy_ models, which"
    if model.architecture.block == "basic":
        return f"{start} have a ReLU before the excitation in blocks of two convolutions"
    if model.stem == "small":
        return f"{start} have no small stem"
    if model.pool != "ceil":
        return f'{start} pool at the edges as pool="ceil" does: build the model with it'
    strided = model.architecture.groups == 1
    if model.stride_in_1x1 != strided:
        where = "first 1x1" if strided else "3x3"
        return f"{start} stride in the {where} convolution: build with stride_in_1x1={strided}"
    return None
