"""What the recipe reaches on handwritten digits, and that fused and reference train alike."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import senet_kernels
from senet_kernels.models import se_parameters
from senet_kernels.train import train
from senet_kernels.train.options import Options
from training import checkpoint_of, losses, needs_images

pytestmark = needs_images

MODEL = "se_resnet20"
FUSED = "native" if senet_kernels.backends()["native"] else "reference"
needs_fused = pytest.mark.skipif(FUSED == "reference", reason="no fused backend runs here")
QUIET = {"progress": False, "tensorboard": False}


def _losses(out: Path, backend: str, precision: str, steps: int, model: str) -> list[float]:
    train({
        "model": model, "out": str(out / backend), "backend": backend, "precision": precision,
        "log_every": 1, "stop_after": steps, **QUIET,
    })  # fmt: skip
    found = losses(out / backend)
    assert len(found) == steps
    return found


def _differences(out: Path, precision: str, steps: int, model: str = MODEL) -> list[float]:
    """Relative differences of the losses of every step, fused against reference."""
    fused = _losses(out, FUSED, precision, steps, model)
    reference = _losses(out, "reference", precision, steps, model)
    return [abs(a - b) / abs(b) for a, b in zip(fused, reference, strict=True)]


@needs_fused
def test_fused_trains_as_the_reference_float32(tmp_path: Path) -> None:
    differences = _differences(tmp_path, "fp32", 20)
    assert 0 < max(differences) <= 1e-4  # not the same kernels


@needs_fused
def test_fused_trains_as_the_reference_float64_briefly(tmp_path: Path) -> None:
    assert max(_differences(tmp_path, "fp64", 30, "se_resnet8")) <= 1e-7


@needs_fused
@pytest.mark.slow
def test_fused_trains_as_the_reference_float64(tmp_path: Path) -> None:
    differences = _differences(tmp_path, "fp64", 200)
    print(f"largest relative difference of 200 losses: {max(differences):.2e}")
    assert max(differences) <= 1e-7


@pytest.mark.slow
def test_digits_over_five_seeds(tmp_path: Path) -> None:
    """The defaults of the recipe. Less than three minutes of computing each, of both cores
    together: what else the machine does is not the recipe's business."""
    accuracies = []
    for seed in range(5):
        start = time.process_time()
        run = train({"seed": seed, "out": tmp_path / str(seed), "measure_train": True, **QUIET})
        computing = time.process_time() - start
        accuracies.append(run["test_accuracy"])
        print(f"test {run['test_accuracy']:.4f} train {run['train_accuracy']:.4f} "
              f"{run['seconds']:.0f} s, {computing:.0f} s of computing")  # fmt: skip
        assert computing < 180
    assert statistics.median(accuracies) >= 0.985


# Few epochs: with many, random weights get there too.
_TRANSFER: dict[str, Any] = {
    "model": MODEL, "model_args": "formula=weighted", "classes": "5,6,7,8,9",
    "stages": "backbone:5,se:5:0.05", **QUIET,
}  # fmt: skip
_LAST_STEP_OF_STAGE_1 = 5 * 11


@pytest.mark.slow
def test_transfer_from_other_digits(tmp_path: Path) -> None:
    """Weights of 0 to 4 are a better start for 5 to 9 than random ones, and stay where frozen."""
    source = tmp_path / "source"
    train({**_TRANSFER, "classes": "0,1,2,3,4", "stages": "", "out": str(source)})
    start = checkpoint_of(source)["weights"]
    for seed in range(3):
        settings = {**_TRANSFER, "seed": seed}
        out, scratch = tmp_path / f"transfer{seed}", tmp_path / f"scratch{seed}"
        warm = {**settings, "init_from": str(source), "out": str(out)}
        train({**warm, "stop_after": _LAST_STEP_OF_STAGE_1})
        state = checkpoint_of(out)
        assert state["progress"]["stage"] == 1
        middle = state["weights"]
        for name, value in start.items():  # parameters and BatchNorm statistics
            assert name.startswith("fc.") or torch.equal(middle[name], value), name
        transferred = train({"out": str(out)}, str(out))
        end = checkpoint_of(out)["weights"]
        frozen = set(se_parameters(_model()))
        assert len(frozen) == 4 * 9
        for name, value in middle.items():
            assert torch.equal(end[name], value) == (name in frozen), name
        scales = [name for name in end if name.rpartition(".")[2] in ("alpha", "beta")]
        assert len(scales) == 2 * 9
        assert not any(torch.equal(end[name], start[name]) for name in scales)

        cold = train({**settings, "out": str(scratch)})
        print(f"seed {seed}: {transferred['test_accuracy']:.4f} from digits 0 to 4, "
              f"{cold['test_accuracy']:.4f} from random weights")  # fmt: skip
        assert transferred["test_accuracy"] > cold["test_accuracy"]


def _model() -> torch.nn.Module:
    from senet_kernels.models import create_model

    return create_model(MODEL, 5, 1, **Options(model_args="formula=weighted").model_arguments())
