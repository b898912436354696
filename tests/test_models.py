"""``fuse_se_blocks`` on the models people have: same outputs, same gradients, same checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from models import REAL_MODELS, RealModel, library, output
from operations import CountOperations
from senet_kernels import backends, fuse_se_blocks, unfuse_se_blocks
from senet_kernels.converted import Fused

TOLERANCE = 1e-6
each_model = pytest.mark.parametrize("real", REAL_MODELS, ids=str)


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one training step with all statistics frozen."""
    x = x.clone().requires_grad_()
    y = output(model, x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    named = {"input": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    gradients = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    results = {f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}
    return {"output": y.detach(), **{n: g for n, g in results.items() if g is not None}}


def _largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all tensors, relative to the largest value of each."""
    assert a.keys() == b.keys()
    return max(
        ((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-30)).item()
        for n in b
        if b[n].numel()
    )


_WITH_NEIGHBOURS = {
    "timm-seresnet18": (8, "residual, after relu"),
    "timm-seresnext26d_32x4d": (8, "residual, after relu"),
    "timm-efficientnet_b0": (16, "before silu"),
    "timm-semnasnet_075": (8, "before relu"),
    "timm-mobilenetv3_small_100": (9, "before hardswish"),
    "timm-lcnet_050": (2, "before hardswish"),
    "timm-regnety_002": (13, "before relu"),
    "torchvision-efficientnet_b0": (16, "before silu"),
    "torchvision-mobilenet_v3_small": (9, "before hardswish"),
    "torchvision-regnet_y_400mf": (16, "before relu"),
}


@each_model
def test_same_output_and_gradients(real: RealModel) -> None:
    """In float64: what is left is that torch's hardsigmoid has a float32 constant in its float64
    derivative. First the blocks alone, then with the steps around them."""
    model = real.make().double()
    types = [type(m) for m in model.modules()]
    x = real.input().double()
    expected = _step(model, x)
    report = fuse_se_blocks(model)
    assert len(report.replaced) >= real.blocks, report
    assert not report.refused, report
    assert _largest_difference(_step(model, x), expected) < TOLERANCE

    # The comparison can fail: one block's output off by a thousandth is far outside.
    block = next(m for m in model.modules() if isinstance(m, Fused))
    handle = block.register_forward_hook(lambda module, args, y: y * 1.001)
    assert _largest_difference(_step(model, x), expected) > 10 * TOLERANCE
    handle.remove()

    report = fuse_se_blocks(model, neighbours=True)
    notes = [e.note.removeprefix("neighbours: ") for e in report.replaced if "neigh" in e.note]
    if real.name in _WITH_NEIGHBOURS:
        count, note = _WITH_NEIGHBOURS[real.name]
        assert len(notes) == count, report
        assert note in notes, report
    assert all(e.note.startswith("neighbours: ") for e in report.refused), report
    if notes:
        assert _largest_difference(_step(model, x), expected) < TOLERANCE
    unfuse_se_blocks(model)
    assert [type(m) for m in model.modules()] == types


# The gate has one model of each library.
_FIRST = tuple({real.library: real for real in reversed(REAL_MODELS)}.values())


@pytest.mark.parametrize(
    "real",
    [
        pytest.param(real, id=str(real), marks=[] if real in _FIRST else [pytest.mark.slow])
        for real in REAL_MODELS
    ],
)
def test_float32_error(real: RealModel) -> None:
    """In float32 the fused model is as close to the float64 model as the original is."""
    model = real.make()
    x = real.input()
    with torch.no_grad():
        right = output(copy.deepcopy(model).double(), x.double())
        eager = output(model, x)
        fuse_se_blocks(model)
        fused = output(model, x)
    assert fused.dtype == eager.dtype
    assert fused.stride() == eager.stride()
    scale = right.abs().max()
    eager_error = ((eager - right).abs().mean() / scale).item()
    fused_error = ((fused - right).abs().mean() / scale).item()
    assert fused_error <= 2 * eager_error + 1e-7, (fused_error, eager_error)


@pytest.mark.parametrize(
    "real", [r for r in REAL_MODELS if r.library in ("timm", "torchvision.models")][::4], ids=str
)
def test_checkpoints_and_copies(real: RealModel) -> None:
    plain = real.make()
    x = real.input()
    before = plain.state_dict()
    types = [type(m) for m in plain.modules()]
    parameters = list(map(id, plain.parameters()))
    with torch.no_grad():
        expected = output(plain, x)
    fused = plain
    fuse_se_blocks(fused)
    assert list(map(id, fused.parameters())) == parameters
    assert list(fused.state_dict()) == list(before)

    stream = io.BytesIO()
    torch.save(fused.state_dict(), stream)
    stream.seek(0)
    other = real.make()  # a fused checkpoint into a plain model, and back
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(stream))
    with torch.no_grad():
        assert torch.equal(output(other, x), expected)
    fused.load_state_dict(other.state_dict())

    with torch.no_grad():
        result = output(fused, x)
        for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert [type(m) for m in clone.modules()] == [type(m) for m in fused.modules()]
            assert torch.equal(output(clone, x), result)
        assert unfuse_se_blocks(fused) >= real.blocks
        assert [type(m) for m in fused.modules()] == types
        assert torch.equal(output(fused, x), expected)


def test_the_kernels_do_run() -> None:
    """With a backend asked for by name nothing falls back, so the op itself must be there."""
    if not backends()["native"]:
        pytest.skip("no native backend")
    real = next(r for r in REAL_MODELS if r.name == "timm-efficientnet_b0")
    model, x = real.make(), real.input()
    fuse_se_blocks(model, backend="native")
    with CountOperations() as counted, torch.no_grad():
        model(x)
    assert counted.calls["senet_kernels::native_forward"] == 16


_SE_NAMES = ("SqueezeExcite", "SEModule", "EffectiveSEModule", "EseModule", "SqueezeExcitation")


@pytest.mark.slow
def test_every_timm_model() -> None:
    """All of timm's models that contain SE, on the meta device: replaced, or refused truly."""
    timm = library("timm")
    models = blocks = replaced = 0
    refusals: Counter[str] = Counter()
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        found = sum(type(m).__name__ in _SE_NAMES for m in model.modules())
        if not found:
            continue
        models += 1
        blocks += found
        report = fuse_se_blocks(model)
        replaced += sum(e.kind.rsplit(".", 1)[-1] in _SE_NAMES for e in report.replaced)
        refusals.update(f"{e.kind}: {e.note}" for e in report.refused)
    assert models >= 353
    assert replaced + refusals.total() >= blocks
    assert replaced >= 0.99 * blocks, refusals
