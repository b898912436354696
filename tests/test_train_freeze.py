"""Fine-tuning: what is frozen keeps its bits, costs no gradient, and the rest learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backend_cases import FUSED_BACKENDS, BackendCase
from senet_kernels import FusedSEBlock
from senet_kernels.models import create_model, se_parameters
from senet_kernels.ops import Needs
from senet_kernels.train.freeze import freeze, train_mode
from training import assert_same_bits, checkpoint_of, needs_images, short_run

_FUSED = [backend for backend in FUSED_BACKENDS if backend.device == "cpu"]
each_fused = pytest.mark.parametrize("backend", _FUSED, indirect=True, ids=str)
WEIGHTS = Needs.W1 | Needs.B1 | Needs.W2 | Needs.B2


class _RecordNeeds(TorchDispatchMode):
    """Collects the ``needs`` of every backward op, and which operations ran."""

    only_observes = True

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[Needs] = []
        self.ran: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.ran.append(func.name())
        if func.name().endswith("_backward") and func.namespace == "senet_kernels":
            self.needs.append(Needs(args[-1]))
            outputs = func(*args, **(kwargs or {}))
            for bit, gradient in zip(Needs, outputs, strict=True):
                # What is not asked for is not even allocated.
                assert (gradient.numel() > 0) == bool(self.needs[-1] & bit), bit
            return outputs
        return func(*args, **(kwargs or {}))


def _step(what: str, backend: str, **options: Any) -> tuple[nn.Module, _RecordNeeds]:
    torch.manual_seed(0)
    model = create_model("se_resnet8", 4, 1, **options)
    for block in model.modules():
        if isinstance(block, FusedSEBlock):
            block.backend = backend
    train_mode(model, freeze(model, what))
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    with _RecordNeeds() as recorded:
        F.cross_entropy(model(x), labels).backward()
    return model, recorded


@each_fused
@pytest.mark.parametrize("formula", ["plain", "weighted"])
def test_a_frozen_se_skips_its_weight_gradients(backend: BackendCase, formula: str) -> None:
    model, recorded = _step("se", backend.name, formula=formula)
    assert len(recorded.needs) == 3
    scales = Needs.ALPHA | Needs.BETA if formula == "weighted" else Needs(0)
    for needs in recorded.needs:
        assert not needs & WEIGHTS
        assert needs & Needs.X
        assert needs & scales == scales
    for name, parameter in model.named_parameters():
        is_frozen = name in se_parameters(model)
        assert parameter.requires_grad != is_frozen
        assert (parameter.grad is None) == is_frozen, name

    _, recorded = _step("none", backend.name, formula=formula)
    assert all(needs & WEIGHTS == WEIGHTS for needs in recorded.needs)


@each_fused
def test_a_frozen_backbone_has_no_backward_pass(backend: BackendCase) -> None:
    model, recorded = _step("backbone", backend.name)
    assert not recorded.needs
    assert not [name for name in recorded.ran if "convolution_backward" in name]
    learned = [name for name, p in model.named_parameters() if p.grad is not None]
    assert learned == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("excitation", ["tied", "single"])
def test_other_forms_freeze_too(excitation: str) -> None:
    model, _ = _step("se", "reference", excitation=excitation)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(se_parameters(model))
    assert {name.split(".se.")[1] for name in frozen} == (
        {"fc1.weight", "fc1.bias", "fc2.bias"} if excitation == "tied" else
        {"fc2.weight", "fc2.bias"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "norms", "moves"),
    [("none", False, True), ("none", True, False), ("backbone", False, False), ("se", False, True),
     ("se", True, False)],
)  # fmt: skip
def test_frozen_batch_norms_keep_their_statistics(what: str, norms: bool, moves: bool) -> None:
    torch.manual_seed(0)
    model = create_model("se_resnet8", 4, 1)
    frozen = freeze(model, what, norms)
    before = {name: value.clone() for name, value in model.named_buffers()}
    train_mode(model, frozen)
    assert model.training
    model(torch.randn(8, 1, 8, 8))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]) != moves, name


def _parts(weights: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Every tensor's name and kind: classifier, se, scale (alpha, beta), statistics, others."""
    for name in weights:
        kind = "others"
        if name.startswith("fc."):
            kind = "classifier"
        elif name.rpartition(".")[2] in ("alpha", "beta"):
            kind = "scale"
        elif ".se." in name:
            kind = "se"
        elif "running" in name or "num_batches" in name:
            kind = "statistics"
        yield name, kind


@needs_images
def test_two_stages_in_one_run(tmp_path: Path) -> None:
    """The classifier first; then all but the squeeze-and-excitation weights."""
    before = tmp_path / "before"
    short_run(before, model_args="formula=weighted", epochs=1)
    weights = {"start": checkpoint_of(before)["weights"]}
    for name, stop in (("first", True), ("second", False)):
        out = tmp_path / name
        per_epoch = 6
        summary = short_run(
            out, model_args="formula=weighted", init_from=str(before), classes="4,5,6,7",
            stages="backbone:1,se:1", stop_after=per_epoch * stop,
        )  # fmt: skip
        assert summary["steps"] == per_epoch * (1 if stop else 2)
        weights[name] = checkpoint_of(out)["weights"]

    def moved(new: str, old: str) -> dict[str, set[bool]]:
        found: dict[str, set[bool]] = {}
        for name, kind in _parts(weights["start"]):
            if weights[new][name].shape == weights[old][name].shape:
                same = torch.equal(weights[new][name], weights[old][name])
                found.setdefault(kind, set()).add(not same)
        return found

    first = moved("first", "start")
    assert first.pop("classifier") == {True}
    assert set(first) == {"se", "scale", "statistics", "others"}
    assert all(kind == {False} for kind in first.values()), first
    second = moved("second", "first")
    assert second.pop("se") == {False}
    assert all(kind == {True} for kind in second.values()), second


@needs_images
@pytest.mark.slow
def test_frozen_batch_norms_in_a_run(tmp_path: Path) -> None:
    short_run(tmp_path / "start", epochs=1)
    start = {"init_from": str(tmp_path / "start")}
    short_run(tmp_path / "run", freeze="se", freeze_bn=True, epochs=1, **start)
    old, new = (checkpoint_of(tmp_path / name)["weights"] for name in ("start", "run"))
    kept = {name for name in old if torch.equal(old[name], new[name])}
    norms = {name for name in old if ".bn" in name or name.startswith("bn1")
             or "downsample.1" in name}  # fmt: skip
    assert kept == norms | {name for name in old if ".se." in name}
    assert_same_bits({n: old[n] for n in kept}, {n: new[n] for n in kept})
