"""Which parameters are which: for weight decay and for freezing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from senet_kernels.modules import FusedSEBlock
from senet_kernels.validation import check_positive_number


def _se_blocks(model: nn.Module) -> Iterator[tuple[str, FusedSEBlock]]:
    for name, module in model.named_modules():
        if isinstance(module, FusedSEBlock):
            yield f"{name}." if name else "", module


def se_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of the excitations' layers (w1, b1, w2, b2) by name; not alpha and beta.

    Args:
        model: any module with :class:`~senet_kernels.FusedSEBlock` in it.
    """
    found = {}
    for prefix, block in _se_blocks(model):
        for name, parameter in block.named_parameters():
            if name not in ("alpha", "beta"):
                found[prefix + name] = parameter
    return found


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_norm_and_bias: bool = True
) -> list[dict[str, Any]]:
    """Groups for an optimizer, such that alpha and beta are never decayed.

    Weight decay would pull alpha and beta towards 0, where a block of the weighted form forgets
    its input.

    Args:
        model: any module; parameters that require no gradient are left out.
        weight_decay: of the others.
        decay_norm_and_bias: whether parameters of one dimension, norms' and biases, are decayed.

    Returns:
        One or two dicts with ``params`` and ``weight_decay``; none for no parameters.

    Raises:
        TypeError: model is no module.
        ValueError: weight_decay is not a number of at least 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_positive_number("weight_decay", weight_decay, or_zero=True)
    weights = {id(p) for _, block in _se_blocks(model) for p in (block.alpha, block.beta)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            small = parameter.dim() <= 1 and not decay_norm_and_bias
            (others if small or id(parameter) in weights else decayed).append(parameter)
    groups = ((decayed, weight_decay), (others, 0.0))
    return [{"params": list(p), "weight_decay": decay} for p, decay in groups if p]
