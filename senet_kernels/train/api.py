"""Training and evaluating from Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from senet_kernels import use_backend

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
    path = checkpoint.find(resume, given.get("out", "")) if resume else None
    if path is None:
        options = Options(**given)
        with _surroundings(options) as procs:
            return Run(options, procs).train()
    state, options = checkpoint.resumed(path, given)
    with _surroundings(options) as procs:
        return Run(options, procs, state, path).train()


def evaluate(given: dict[str, Any]) -> dict[str, Any]:
    """Loss and accuracy of ``init_from`` on the test images.

    Raises:
        TrainError: what the user can put right.
    """
    if not given.get("init_from"):
        raise TrainError("--evaluate: needs --init-from")
    state = network.read(given["init_from"])
    trained = {name: state.get("options", {}).get(name) for name in _OF_TRAINING}
    options = Options(**{**{n: v for n, v in trained.items() if v is not None}, **given})
    with _surroundings(options) as procs:
        images = procs.on_first(lambda: data.load(options))
        model = network.build(options, images)
        notes = network.initialise(model, options.init_from)
        if notes:
            raise TrainError(f"--evaluate: untrained weights: {'; '.join(notes)}")
        channels = model.config["in_chans"]
        statistics = images.statistics(channels)
        learner = Learner(model, Stage("none", 1, 0.0), options, procs, statistics)
        sums = learner.test(loader.evaluation_loader(images, options, channels, procs))
        return _report(images, options, sums.accuracy, sums.mean_loss, procs)


# What a checkpoint says of itself need not be given again.
_OF_TRAINING = (
    "model", "model_args", "data", "classes", "test_fraction", "image_size", "augment", "precision",
)  # fmt: skip


def _report(
    images: data.Data, options: Options, accuracy: float, loss: float, procs: Processes
) -> dict[str, Any]:
    report = {
        "weights": options.init_from,
        "data": str(images),
        "size": options.test_size or options.image_size or images.size,
        "scale": options.test_scale,
        "test_accuracy": accuracy,
        "test_loss": loss,
    }
    if procs.first:
        print(json.dumps(report))
    return report


@contextmanager
def _surroundings(options: Options) -> Iterator[Processes]:
    """Processes and process-wide settings; the settings are put back."""
    before = torch.are_deterministic_algorithms_enabled()
    with processes(options.parallel, options.device) as procs, use_backend(options.backend):
        torch.use_deterministic_algorithms(before or options.deterministic)
        try:
            yield procs
        finally:
            torch.use_deterministic_algorithms(before)
