"""The optional libraries of a run: whether each can be used, asked before any file is written."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from senet_kernels._libraries import Unusable, why_not

from .errors import TrainError
from .options import Options

#: Modules and the names used of them, in the order in which they are imported.
_TENSORBOARD = (("tensorboard", "__version__"), ("torch.utils.tensorboard", "SummaryWriter"))
_TQDM = (("tqdm", "tqdm"),)
# A figure is saved by a backend that is imported only then.
_MATPLOTLIB = (("matplotlib.figure", "Figure"), ("matplotlib.backends.backend_agg",))
_PILLOW = (("PIL.Image", "open", "frombytes"),)
_SKLEARN = (("sklearn.datasets", "load_digits"),)

_INSTALL = "pip install 'senet-kernels[train]'"


class Extras(NamedTuple):
    """What a run has beside its weights and figures, and what is to be said of the rest."""

    tensorboard: bool
    progress: bool
    curves: bool
    notes: tuple[str, ...]


def choose(options: Options, asked: Collection[str] = ()) -> Extras:
    """Which optional outputs a run has.

    Args:
        options: of the run.
        asked: names of the options that were given, and are not defaults.

    Raises:
        TrainError: an option that was given needs a library that cannot be used.
    """
    notes: list[str] = []

    def usable(option: str, left_out: str, needed: tuple[tuple[str, ...], ...]) -> bool:
        reason = _reason(needed)
        if reason is not None and option in asked:
            raise TrainError(f"--{option}: {reason}: {_remedy(reason, option)}")
        # The options themselves say "where installed".
        if reason is not None and not (option and reason.absent):
            notes.append(f"{left_out}: {reason}")
        return reason is None

    return Extras(
        options.tensorboard and usable("tensorboard", "no TensorBoard files", _TENSORBOARD),
        options.progress and usable("progress", "no progress bar", _TQDM),
        usable("", "no curves", _MATPLOTLIB),
        tuple(notes),
    )


def check_images(options: Options) -> None:
    """Find out whether the images can be read.

    Raises:
        TrainError: a library for it cannot be used.
    """
    reason = _reason(_PILLOW)
    if reason is not None:
        raise TrainError(f"--data: Pillow is needed: {reason}: {_INSTALL}")
    reason = _reason(_SKLEARN) if options.data == "digits" else None
    if reason is not None:
        raise TrainError(f"--data digits: scikit-learn is needed: {reason}: {_INSTALL}")


def why_no_curves() -> Unusable | None:
    """Why matplotlib cannot be used; None where it can."""
    return _reason(_MATPLOTLIB)


def _reason(needed: tuple[tuple[str, ...], ...]) -> Unusable | None:
    return next(filter(None, (why_not(*module) for module in needed)), None)


def _remedy(reason: Unusable, option: str) -> str:
    if reason.absent:
        package = "tensorboard" if option == "tensorboard" else "tqdm"
        return f"pip install {package}, or leave --{option} out"
    return f"put that right, or leave --{option} out"
