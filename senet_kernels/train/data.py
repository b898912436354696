"""Which images there are: scikit-learn's digits, or a folder of images by class.

A folder has one folder per class, in ``train`` and ``val`` (or ``valid``, ``validation``,
``test``)::

    flowers/train/rose/1.jpg    flowers/val/rose/7.jpg

or directly, and then a fixed share of each class is kept for testing::

    flowers/rose/1.jpg
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from . import extras
from .errors import TrainError
from .options import Options

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)
# The first that is there: the best epoch is chosen by it, so rather a validation than a test set.
TEST_FOLDERS = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Picture:
    """One image: a file, or the digit's 8x8 grey values; and its class's number."""

    source: str | bytes
    label: int


#: Mean and standard deviation of pixels between 0 and 1, one per channel or one for all.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
DIGITS_STATISTICS: Statistics = ((0.305,), (0.376,))
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS: Statistics = ((0.449,), (0.226,))


@dataclass
class Data:
    """Training and test images, and what is to be said about them.

    ``channels`` and ``size`` are what the images have, or what they are given by default.
    """

    name: str
    classes: list[str]
    channels: int
    size: int
    train: list[Picture]
    test: list[Picture]
    skipped: list[str] = field(default_factory=list)

    def statistics(self, channels: int) -> Statistics:
        """What images are normalised by: the digits' own figures, or ImageNet's."""
        if self.name == "digits":
            return DIGITS_STATISTICS
        return IMAGENET_STATISTICS if channels == 3 else GREY_STATISTICS

    @property
    def fingerprint(self) -> str:
        """Changes with the images (files: their names and sizes), their classes and the split."""
        digest = hashlib.sha256(ascii(self.classes).encode())
        for part in (self.train, self.test):
            for picture in part:
                source = picture.source
                if isinstance(source, str):
                    path = Path(source)
                    # Not the whole path: a folder may have moved.
                    name = os.fsencode(f"{path.parent.name}/{path.name}")
                    source = name + b" %d" % path.stat().st_size
                digest.update(source + b" %d\n" % picture.label)
            digest.update(b"--")
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        skipped = f", {len(self.skipped)} unreadable files skipped" if self.skipped else ""
        return (
            f"{self.name}: {len(self.train)} training and {len(self.test)} test images, "
            f"{len(self.classes)} classes{skipped}"
        )


def load(options: Options) -> Data:
    """The data that the options name, checked.

    Raises:
        TrainError: nothing to train on; the message says what was found and what is needed.
    """
    extras.check_images(options)
    chosen = [name.strip() for name in options.classes.split(",") if name.strip()]
    data = _digits(chosen, options) if options.data == "digits" else _folder(chosen, options)
    _check(data)
    return data


def _check(data: Data) -> None:
    if len(data.classes) < 2:
        raise TrainError(
            f"{data.name}: expected at least two classes, got {', '.join(data.classes) or 'none'}"
        )
    for title, part in (("training", data.train), ("test", data.test)):
        count = Counter(picture.label for picture in part)
        missing = [name for i, name in enumerate(data.classes) if not count[i]]
        if not part or (missing and title == "training"):
            reason = f"; {len(data.skipped)} files could not be read" if data.skipped else ""
            of = f" of class {', '.join(missing)}" if part else ""
            raise TrainError(f"{data.name}: no {title} images{of}{reason}")


def _choose(found: Iterable[str], chosen: list[str]) -> list[str]:
    names = list(found)
    unknown = [name for name in chosen if name not in names]
    if unknown or len(set(chosen)) < len(chosen):
        raise TrainError(
            f"--classes: expected different ones of {', '.join(names)}, got {', '.join(chosen)}"
        )
    return chosen or names


def _split(pictures: list[Picture], fraction: float) -> tuple[list[Picture], list[Picture]]:
    """Training and test images of a list that never changes, class by class; whatever the seed."""
    train: list[Picture] = []
    test: list[Picture] = []
    for label in sorted({picture.label for picture in pictures}):
        members = [picture for picture in pictures if picture.label == label]
        Random(f"split {label}").shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        test += members[:count]
        train += members[count:]
    return train, test


def _split_files(
    root: Path, files: dict[str, list[Path]], fraction: float
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Training and test files by class. Each file's own name decides, so that a file that comes,
    goes or breaks moves no other one (but for a class's only test or training image)."""

    def place(path: Path) -> float:
        name = os.fsencode(path.relative_to(root).as_posix())
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64

    train: dict[str, list[Path]] = {}
    test: dict[str, list[Path]] = {}
    for name, paths in files.items():
        ordered = sorted(paths, key=place)
        count = sum(place(path) < fraction for path in paths)
        count = min(max(1, count), max(0, len(paths) - 1))
        test[name], train[name] = sorted(ordered[:count]), sorted(ordered[count:])
    return train, test


def _digits(chosen: list[str], options: Options) -> Data:
    """1797 handwritten digits of 8x8 pixels, part of scikit-learn: nothing is downloaded."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The split is that of all ten classes, so that a choice of classes keeps their test images.
    grey = (digits.images * (255 / 16)).round().astype("uint8")
    every = [Picture(i.tobytes(), int(y)) for i, y in zip(grey, digits.target, strict=True)]
    classes = _choose((str(name) for name in digits.target_names), chosen)
    number = {int(name): i for i, name in enumerate(classes)}
    train, test = (
        [Picture(p.source, number[p.label]) for p in part if p.label in number]
        for part in _split(every, options.test_fraction)
    )
    return Data("digits", classes, 1, 8, train, test)


def _folder(chosen: list[str], options: Options) -> Data:
    root = Path(options.data)
    if not root.is_dir():
        raise TrainError(f"--data: expected 'digits' or a folder, got {options.data!r}")
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    is_split = (root / "train").is_dir()
    if is_split and test_root is None:
        raise TrainError(f"{root}: has train but none of {', '.join(TEST_FOLDERS)} beside it")
    if test_root is not None and not is_split:
        raise TrainError(f"{root}: has {test_root.name} but no train beside it")
    train_root = root / "train" if is_split else root
    classes = _choose((path.name for path in _class_folders(train_root)), chosen)
    _no_files_instead(train_root, classes)
    name = f"{root} (tested on {test_root.name})" if test_root is not None else str(root)
    data = Data(name, classes, 3, 224, [], [])
    files = {name: _images(train_root / name) for name in classes}
    if is_split and test_root is not None:
        extra = {path.name for path in _class_folders(test_root)} - set(classes)
        if extra and not chosen:
            raise TrainError(f"{test_root}: classes without training images: {', '.join(extra)}")
        train, test = files, {name: _images(test_root / name) for name in classes}
    else:
        train, test = _split_files(train_root, files, options.test_fraction)
    check = _CHECKS[options.check]
    data.train = _readable(train, check, data.skipped)
    data.test = _readable(test, check, data.skipped)
    return data


def _class_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def _no_files_instead(root: Path, classes: list[str]) -> None:
    if not classes:
        loose = sum(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        found = f"{loose} images that are in no class's folder" if loose else "an empty folder"
        raise TrainError(f"{root}: expected a folder of images for each class, found {found}")


def _readable(
    files: dict[str, list[Path]], check: Callable[[Path], None], skipped: list[str]
) -> list[Picture]:
    """The images by class that can be read; adds the others and why to ``skipped``."""

    def reason(path: Path) -> str | None:
        try:
            check(path)
        except Exception as error:  # whatever a decoder makes of a broken file
            return f"{path}: {type(error).__name__}: {error}"
        return None

    pictures = []
    with ThreadPoolExecutor() as pool:
        for label, paths in enumerate(files.values()):
            for path, why in zip(paths, pool.map(reason, paths), strict=True):
                if why is None:
                    pictures.append(Picture(str(path), label))
                else:
                    skipped.append(why)
    return pictures


def open_image(path: str | Path, mode: str) -> Image:
    """The decoded image in Pillow's mode ``"L"`` or ``"RGB"``.

    Raises:
        Exception: it cannot be read, or its values have no known range.
    """
    from PIL import Image

    with Image.open(path) as image:
        _check_mode(image)
        if image.mode.startswith("I"):
            # 16 bits per pixel: convert alone would make everything above 255 white.
            return (
                image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert(mode)
            )
        return image.convert(mode)


def _check_mode(image: Image) -> None:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of no known range")


def _decode(path: Path) -> None:
    open_image(path, "RGB")


def _read_header(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        _check_mode(image)


_CHECKS: dict[str, Callable[[Path], None]] = {
    "full": _decode,
    "header": _read_header,
    "none": lambda path: None,
}
