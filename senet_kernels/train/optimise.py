"""SGD, its parameter groups and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from senet_kernels.models import parameter_groups

from .options import Options, Stage


def optimiser(model: nn.Module, options: Options) -> torch.optim.SGD:
    """SGD over what is not frozen. Biases, BatchNorm, alpha and beta get no weight decay: decay
    would pull a scale towards 0, which regularises nothing that the next layer cannot undo."""
    groups = parameter_groups(model, options.weight_decay, decay_norm_and_bias=False)
    return torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov
    )


def learning_rate(options: Options, stage: Stage, step: int, per_epoch: int) -> float:
    """Of the step with this number within its stage: a function, so there is no state to save.

    Warm-up (arXiv:1706.02677) rises linearly to the peak; then half a cosine (arXiv:1608.03983)
    falls to ``min_lr``, or a staircase falls by ``step_factor`` every ``step_epochs`` epochs.
    """
    total = stage.epochs * per_epoch
    warmup = round(min(options.warmup_epochs * per_epoch, total - 1))
    if step < warmup:
        return stage.lr * (step + 1) / (warmup + 1)
    if options.schedule == "step":
        falls = math.floor(step / (options.step_epochs * per_epoch))
        return stage.lr * math.pow(options.step_factor, falls)
    low = min(options.min_lr, stage.lr)
    progress = (step - warmup) / max(1, total - warmup)
    return low + (stage.lr - low) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
