"""What a stage of fine-tuning trains, and what it keeps bit for bit."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from senet_kernels.models import ResNet, se_parameters

from .errors import TrainError


def freeze(model: ResNet, what: str, batch_norms: bool = False) -> list[_BatchNorm]:
    """Set ``requires_grad`` of every parameter, and name the BatchNorms whose statistics stay.

    Args:
        model: one of :mod:`senet_kernels.models`.
        what: ``"none"``; ``"backbone"``: everything but the classifier; ``"se"``: w1, b1, w2 and
            b2 of the squeeze-and-excitation blocks, not alpha and beta.
        batch_norms: freeze every BatchNorm besides.

    Returns:
        The frozen BatchNorms: keep them in eval mode, see :func:`train_mode`.

    Raises:
        TrainError: there is nothing of the kind to freeze.
    """
    model.requires_grad_(what != "backbone")
    norms = batch_norms_of(model)
    if what == "backbone":
        model.get_classifier().requires_grad_(True)
        return norms
    if what == "se":
        frozen = se_parameters(model)
        if not frozen:
            raise TrainError("--freeze se: the model has no squeeze-and-excitation weights")
        for parameter in frozen.values():
            parameter.requires_grad_(False)
    if not batch_norms:
        return []
    for norm in norms:
        norm.requires_grad_(False)
    return norms


def batch_norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm in it."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def train_mode(model: nn.Module, frozen_norms: list[_BatchNorm]) -> None:
    """Training mode, except for frozen BatchNorms: they normalise by their statistics and keep
    them."""
    model.train()
    for norm in frozen_norms:
        norm.eval()
