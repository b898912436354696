"""From pictures to batches, in an order and with augmentation that depend on nothing but the seed.

Random numbers come from (seed, epoch, picture) alone: whatever the number of worker processes, and
wherever a run was interrupted, a picture of an epoch looks the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import Data, Picture, Statistics, open_image
from .options import Options
from .parallel import Processes

if TYPE_CHECKING:
    from PIL.Image import Image

#: The label that cross_entropy ignores: of a file that cannot be read, and of padding.
IGNORED = -100
# Test images of crops: resized a little larger, then cut, as in training a part is seen.
_CROP_RATIO = 0.875


class Pictures(Dataset[tuple[Tensor, int]]):
    """Items ``(epoch, index) -> (uint8 [channels, size, size], label)``.

    Args:
        pictures: what to load.
        channels: 1 (grey) or 3.
        size: pixels of the square result.
        augment: ``"shift"``, ``"crop"`` (with flips), ``"none"`` (resized), ``"centre"`` (the
            test images of crops).
        seed: of the augmentation.
        scale: zoom about the centre, after the resizing.
    """

    def __init__(
        self,
        pictures: list[Picture],
        channels: int,
        size: int,
        augment: str,
        seed: int = 0,
        scale: float = 1.0,
    ) -> None:
        self.pictures = pictures
        self.channels = channels
        self.size = size
        self.augment = augment
        self.seed = seed
        self.scale = scale

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        shape = (self.channels, self.size, self.size)
        if index < 0:
            return torch.zeros(shape, dtype=torch.uint8), IGNORED
        picture = self.pictures[index]
        random = Random(f"{self.seed} {epoch} {index}")
        try:
            image = self._transform(_open(picture.source, self.channels), random)
        except Exception:  # whatever a decoder makes of a broken file
            return torch.zeros(shape, dtype=torch.uint8), IGNORED
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return values.view(self.size, self.size, self.channels).permute(2, 0, 1), picture.label

    def _transform(self, image: Image, random: Random) -> Image:
        size = (self.size, self.size)
        width, height = image.size
        if self.augment == "crop":
            image = image.resize(size, _BILINEAR, box=_random_box(width, height, random))
            if random.random() < 0.5:
                image = image.transpose(_FLIP)
        elif self.augment == "centre":
            side = min(width, height) * _CROP_RATIO
            image = image.resize(size, _BILINEAR, box=_centre_box(width, height, side, side))
        elif image.size != size:
            image = image.resize(size, _BILINEAR)
        if self.augment == "shift":
            reach = max(1, self.size // 8)
            image = _moved(image, random.randint(-reach, reach), random.randint(-reach, reach))
        return _zoomed(image, self.scale) if self.scale != 1 else image


# Pillow's Resampling.BILINEAR and Transpose.FLIP_LEFT_RIGHT, without importing it.
_BILINEAR: Any = 2
_FLIP: Any = 0


def _open(source: str | bytes, channels: int) -> Image:
    mode = "L" if channels == 1 else "RGB"
    if isinstance(source, str):
        return open_image(source, mode)
    from PIL import Image

    side = math.isqrt(len(source))
    return Image.frombytes("L", (side, side), source).convert(mode)


def _centre_box(width: int, height: int, w: float, h: float) -> tuple[float, float, float, float]:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _random_box(width: int, height: int, random: Random) -> tuple[float, float, float, float]:
    """8 to 100 % of the area at an aspect ratio of 3/4 to 4/3, where that fits."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    return _centre_box(width, height, side, side)


def _moved(image: Image, right: int, down: int) -> Image:
    """Shifted by whole pixels; black comes in."""
    width, height = image.size
    # Cropping beyond the border gives black there.
    return image.crop((-right, -down, width - right, height - down))


def _zoomed(image: Image, scale: float) -> Image:
    """Everything larger or smaller by ``scale`` on a canvas of the same size, black around."""
    width, height = image.size
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (w - width) // 2, (h - height) // 2
    return image.resize((w, h), _BILINEAR).crop((left, top, left + width, top + height))


class TrainBatches:
    """Batch sampler of one process: its share of each batch of an epoch, from batch ``start`` on.

    Every process sees a part of the same shuffled order. What does not fill a batch is left out of
    this epoch.
    """

    def __init__(self, images: int, batch: int, seed: int, rank: int, world: int) -> None:
        self.images = images
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.share = batch // world
        self.epoch = 0
        self.start = 0

    @property
    def per_epoch(self) -> int:
        """Batches in a whole epoch."""
        return self.images // self.batch

    def __len__(self) -> int:
        return self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self.images))
        Random(f"order {self.seed} {self.epoch}").shuffle(order)
        for number in range(self.start, self.per_epoch):
            first = number * self.batch + self.rank * self.share
            yield [(self.epoch, i) for i in order[first : first + self.share]]


def padded_shares(images: int, share: int, rank: int, world: int) -> list[list[tuple[int, int]]]:
    """Each process's part of the test images, as many batches for each: padded with index -1."""
    mine = list(range(rank, images, world))
    mine += [-1] * (-(-images // world) - len(mine))
    return [[(0, i) for i in mine[at : at + share]] for at in range(0, len(mine), share)]


def _loader(pictures: Pictures, batches: Any, workers: int, device: torch.device) -> Any:
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # torch's global random numbers are left alone
    )


def _workers(options: Options, data: Data) -> int:
    if options.workers >= 0:
        return options.workers
    return 0 if data.name == "digits" else min(4, os.cpu_count() or 1)


def training_loader(
    data: Data, options: Options, channels: int, batches: TrainBatches, processes: Processes
) -> Any:
    """Augmented training images, in the order of ``batches``."""
    augment = options.augment
    if augment == "auto":
        augment = "shift" if data.name == "digits" else "crop"
    size = options.image_size or data.size
    pictures = Pictures(data.train, channels, size, augment, options.seed)
    return _loader(pictures, batches, _workers(options, data), processes.device)


def evaluation_loader(
    data: Data, options: Options, channels: int, processes: Processes, *, of_train: bool = False
) -> Any:
    """Test images (``of_train``: the training images as if they were), without augmentation."""
    size = options.test_size or options.image_size or data.size
    cut = options.augment == "crop" or (options.augment == "auto" and data.name != "digits")
    pictures = Pictures(
        data.train if of_train else data.test, channels, size, "centre" if cut else "none",
        scale=options.test_scale,
    )  # fmt: skip
    share = -(-options.batch_size // processes.world)
    batches = padded_shares(len(pictures), share, processes.rank, processes.world)
    return _loader(pictures, batches, _workers(options, data), processes.device)


def normalise(images: Tensor, statistics: Statistics, dtype: torch.dtype) -> Tensor:
    """uint8 to mean 0 and deviation 1, roughly."""
    mean, std = (torch.tensor(v, dtype=dtype, device=images.device) for v in statistics)
    return (images.to(dtype) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
