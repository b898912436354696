"""Short runs of the training recipe for the tests."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from senet_kernels.train import train
from senet_kernels.train.record import Row, read_rows

needs_images = pytest.mark.skipif(
    not find_spec("sklearn") or not find_spec("PIL"), reason="needs scikit-learn and Pillow"
)

#: A small network, a few steps an epoch, nothing shown.
SHORT: dict[str, Any] = {
    "model": "se_resnet8", "classes": "0,1,2,3", "batch_size": 96, "epochs": 2, "log_every": 1,
    "progress": False, "tensorboard": False,
}  # fmt: skip


def short_run(out: Path, resume: str | None = None, **options: Any) -> Row:
    """The summary of a short run; ``options`` replace those of ``SHORT``."""
    if resume is not None:
        return train({"out": str(out), **options}, resume)
    return train({**SHORT, "out": str(out), **options})


def checkpoint_of(out: Path, name: str = "last.pt") -> dict[str, Any]:
    """What a run's checkpoint holds."""
    content: dict[str, Any] = torch.load(out / name, weights_only=True)
    return content


def losses(out: Path) -> list[float]:
    """Of every logged step."""
    return [row["loss"] for row in read_rows(out) if row["kind"] == "step"]


def assert_same_bits(got: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert got.keys() == right.keys()
    different = [name for name in right if not torch.equal(got[name], right[name])]
    assert not different, different
