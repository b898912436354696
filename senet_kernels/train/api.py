"""Training and evaluating from Python."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from senet_kernels import BackendUnavailableError, FusedSEBlock, use_backend

from . import checkpoint, data, loader, network
from .errors import TrainError
from .loop import Learner
from .options import Options, Stage
from .parallel import Processes, processes
from .run import Run


def train(given: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """A run, from the options that differ from their defaults to its summary.

    Args:
        given: fields of :class:`Options` by name.
        resume: a run's folder or checkpoint to go on with; ``"auto"``: what is in ``out``, or a
            new run.

    Raises:
        TrainError: what the user can put right.
    """
    asked = {name for name, value in given.items() if value is True}
    path = checkpoint.find(resume, given) if resume else None
    if path is None:
        options = Options.of(given)
        with _surroundings(options) as procs:
            # A run that died before its first checkpoint has nothing to keep.
            return Run(options, procs, may_replace=resume == "auto", asked=asked).train()
    state, options = checkpoint.resumed(path, given)
    with _surroundings(options) as procs:
        return Run(options, procs, state, path, asked=asked).train()


def evaluate(given: dict[str, Any]) -> dict[str, Any]:
    """Loss and accuracy of ``init_from`` on the test images.

    Raises:
        TrainError: what the user can put right.
    """
    if not given.get("init_from"):
        raise TrainError("--evaluate: needs --init-from")
    state = network.read(given["init_from"])
    if state.get("format") != checkpoint.FORMAT:
        state = {}  # in a checkpoint of others the same names mean something else
    trained = {name: state.get("options", {}).get(name) for name in _OF_TRAINING}
    options = Options.of({**{n: v for n, v in trained.items() if v is not None}, **given})
    with _surroundings(options) as procs:
        images = procs.on_first(lambda: data.load(options))
        same_images = _same_images(images, state)
        model = network.build(options, images)
        notes = network.initialise(model, options.init_from)
        if notes:
            raise TrainError(f"--evaluate: untrained weights: {'; '.join(notes)}")
        channels = model.config["in_chans"]
        statistics = images.statistics(channels)
        learner = Learner(model, Stage("none", 1, 0.0), options, procs, statistics)
        sums = learner.test(loader.evaluation_loader(images, options, channels, procs))
        report = {
            "weights": options.init_from, "data": str(images), "same_images": same_images,
            "size": options.test_size or options.image_size or images.size,
            "scale": options.test_scale,
            "test_accuracy": sums.accuracy, "test_loss": sums.mean_loss,
        }  # fmt: skip
        if procs.first:
            print(json.dumps(report))
        return report


# What a checkpoint says of itself need not be given again.
_OF_TRAINING = (
    "model", "model_args", "data", "classes", "test_fraction", "check", "image_size", "augment",
    "precision",
)  # fmt: skip


def _same_images(images: data.Data, state: dict[str, Any]) -> bool | None:
    """Whether a checkpoint was trained and tested on these images; None: it does not say.

    Raises:
        TrainError: its classes are others, or in another order: every answer would be wrong.
    """
    classes, fingerprint = state.get("classes"), state.get("data")
    if classes is not None and classes != images.classes:
        raise TrainError(
            f"--evaluate: the weights tell {', '.join(classes)} apart, "
            f"the data have {', '.join(images.classes)}"
        )
    if fingerprint is None:
        return None
    if fingerprint != images.fingerprint:
        print("warning: these are not the images of the run; some may have been trained on",
              file=sys.stderr)  # fmt: skip
    return bool(fingerprint == images.fingerprint)


@contextmanager
def _surroundings(options: Options) -> Iterator[Processes]:
    """Processes and process-wide settings; the settings are put back."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with processes(options.parallel, options.device) as procs, use_backend(options.backend):
            _try_backend(procs.device)
            torch.use_deterministic_algorithms(before or options.deterministic)
            yield procs
    except ValueError as error:
        text = str(error)
        if "expected one of auto" in text:
            raise TrainError(f"--backend: {text.partition(': ')[2]}") from None
        if "more than 1 value per channel" in text:
            raise TrainError(
                "--batch-size: BatchNorm needs more than one value of each channel, and the last "
                "feature map has one per image: expected at least 2 images per process"
            ) from None
        raise
    except RuntimeError as error:
        text = str(error)
        if "out of memory" in text or "can't allocate memory" in text:
            raise TrainError(
                "out of memory: expected a smaller --batch-size, --image-size or --test-size"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)


def _try_backend(device: torch.device) -> None:
    """Fail now, and not at the first step."""
    try:
        FusedSEBlock(4, device=device)(torch.zeros(1, 4, 2, 2, device=device))
    except BackendUnavailableError as error:
        raise TrainError(f"--backend: {error}") from None
