"""A training step, and a test."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from senet_kernels.models import ResNet

from .data import Statistics
from .freeze import batch_norms_of, freeze, train_mode
from .loader import IGNORED, normalise
from .optimise import optimiser, set_learning_rate
from .options import Options, Stage
from .parallel import Processes

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A network on its device, wrapped for parallel training, with its optimiser.

    Args:
        model: the whole network; it is changed in place.
        stage: what is frozen.
        options: the recipe.
        processes: whose device to use, and how to wrap.
        statistics: what images are normalised by.
    """

    def __init__(
        self,
        model: ResNet,
        stage: Stage,
        options: Options,
        processes: Processes,
        statistics: Statistics,
    ) -> None:
        self.options = options
        self.processes = processes
        self.statistics = statistics
        self.dtype = torch.float64 if options.precision == "fp64" else torch.float32
        # FSDP shards contiguous parameters only; images are channels-last all the same.
        last = options.channels_last and processes.kind != "fsdp2"
        model.to(processes.device, self.dtype)
        if last:
            # Older releases' type stubs do not know this argument.
            layout: dict[str, Any] = {"memory_format": torch.channels_last}
            model.to(**layout)
        self.frozen_norms = freeze(model, stage.freeze, options.freeze_bn)
        #: Without DDP's wrapper, which in testing would only add communication.
        self.core = model
        self.model = processes.parallel(model)
        self.optimizer = optimiser(self.model, options)
        self.scaler = GradScaler(processes.device.type, enabled=options.precision == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where asked for."""
        dtype = _AUTOCAST.get(self.options.precision)
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None)

    def images(self, images: Tensor) -> Tensor:
        """uint8 images as the network takes them."""
        images = images.to(self.processes.device, non_blocking=True)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return normalise(images, self.statistics, self.dtype)

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward pass; gradients are averaged over processes.

        Args:
            images: uint8 ``[B, C, H, W]``.
            labels: int64 ``[B]``.

        Returns:
            The loss (of this process's images) and the logits, detached.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(self.images(images)).to(self.dtype)
        total = F.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum",
            label_smoothing=self.options.label_smoothing,
        )  # fmt: skip
        # Their mean, also where not one image could be read.
        loss = total / (labels != IGNORED).sum().clamp(min=1)
        self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()

    def update(self, lr: float) -> None:
        """One step of the optimiser with the gradients there are."""
        set_learning_rate(self.optimizer, lr)
        if self.options.clip:
            self.scaler.unscale_(self.optimizer)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(trained, self.options.clip)
        self.scaler.step(self.optimizer)  # without fp16: the optimiser's own step
        self.scaler.update()

    def step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, after which the weights have moved."""
        labels = labels.to(self.processes.device, non_blocking=True)
        loss, logits = self.gradients(images, labels)
        self.update(lr)
        return loss, logits

    def train_mode(self) -> None:
        """Frozen BatchNorms stay in eval mode."""
        train_mode(self.model, self.frozen_norms)

    @torch.no_grad()
    def test(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Sums:
        """Sums over the images of all processes, whose BatchNorm statistics become the mean."""
        frozen = set(self.frozen_norms)
        norms = (norm for norm in batch_norms_of(self.core) if norm not in frozen)
        self.processes.average_statistics(norms)
        self.model.eval()
        sums = Sums(self.processes.device)
        for images, labels in batches:
            labels = labels.to(self.processes.device, non_blocking=True)
            with self.autocast():
                logits = self.core(self.images(images)).to(self.dtype)
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            sums.add(loss, logits, labels)
        self.processes.sum(sums.values)
        return sums


class Sums:
    """Of losses, right answers, images and unreadable images: added up without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch; ``loss`` is the sum over its images."""
        valid = labels != IGNORED
        right = (logits.argmax(1) == labels).sum()
        self.values += torch.stack([loss.double(), right, valid.sum(), (~valid).sum()])

    @property
    def mean_loss(self) -> float:
        """Per readable image."""
        return float(self.values[0] / self.values[2])

    @property
    def accuracy(self) -> float:
        """Share of right answers among readable images."""
        return float(self.values[1] / self.values[2])

    @property
    def ignored(self) -> int:
        """Images that could not be read, and padding."""
        return int(self.values[3])
