"""The SENet family: the networks of the papers and of timm, their forms, and what is put into
other ResNets by ``add_se_blocks``."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oracle
from models import library, randomise
from operations import CountOperations
from senet_kernels import FusedSEBlock, backends, fuse_se_blocks, squeeze_excite, use_backend
from senet_kernels.flops import multiply_adds
from senet_kernels.models import (
    TIMM_TWINS,
    Bottleneck,
    ResNet,
    SENet,
    add_se_blocks,
    create_model,
    from_legacy,
    list_models,
    parameter_groups,
    se_parameters,
    timm_twin,
)
from senet_kernels.models.timm_keys import is_legacy

needs_native = pytest.mark.skipif(not backends()["native"], reason="no native backend")


def _close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Equal relative to the largest value; and there is something to compare."""
    assert a.shape == b.shape
    scale = b.abs().max()
    assert 0 < scale < float("inf")
    assert (a - b).abs().max() <= tolerance * scale


def _random(model: nn.Module) -> Any:
    """In eval mode, every parameter and statistic random, alpha and beta too."""
    randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FusedSEBlock):
                if module.alpha is not None:
                    module.alpha.uniform_(-1, 1)
                    module.beta.uniform_(0.5, 1.5)
                if module.fc1 is not None:
                    module.fc1.bias += 1  # few hidden units: some must be alive
    return model.eval()


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}


# ---- the networks ----

#: Millions of parameters: the paper's tables 1 and 2 give 28.1 for SE-ResNet-50, and so on.
PARAMETERS = {
    "resnet50": 25_557_032, "se_resnet50": 28_088_024, "se_resnet101": 49_326_872,
    "se_resnet152": 66_821_848, "se_resnext50_32x4d": 27_559_896, "senet154": 115_088_984,
}  # fmt: skip


def test_parameters_and_multiply_adds() -> None:
    with torch.device("meta"):
        for name, expected in PARAMETERS.items():
            assert sum(p.numel() for p in create_model(name).parameters()) == expected, name
        paper = create_model("se_resnet50", stride_in_1x1=True)
    assert round(sum(p.numel() for p in paper.parameters()) / 1e6, 2) == 28.09
    assert 3.86e9 <= multiply_adds(paper, (1, 3, 224, 224)) <= 3.87e9
    assert multiply_adds(paper, (2, 3, 224, 224)) == 2 * multiply_adds(paper, (1, 3, 224, 224))


@needs_native
@pytest.mark.parametrize(("layers", "needs"), [
    (2, (1, 1, 1, 1, 1)), (2, (1, 0, 0, 0, 0)), (2, (0, 0, 0, 1, 1)), (2, (0, 1, 1, 0, 0)),
    (1, (1, 0, 0, 1, 1)), (1, (1, 0, 0, 0, 0)), (1, (0, 0, 0, 1, 0)),
], ids=str)  # fmt: skip
def test_flops_of_the_operation_are_those_of_eager(layers: int, needs: tuple[int, ...]) -> None:
    x, w1, b1 = torch.randn(3, 8, 4, 5), torch.randn(4, 8), torch.randn(4)
    w2, b2 = torch.randn(8, 4 if layers == 2 else 8), torch.randn(8)
    tensors = [t.requires_grad_(bool(n)) for t, n in zip((x, w1, b1, w2, b2), needs, strict=True)]
    if layers == 1:
        tensors[1:3] = [None, None]
    counts = []
    for backend in ("native", "reference"):
        with FlopCounterMode(display=False) as counter:
            squeeze_excite(*tensors, backend=backend).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


_DEEP = ("101", "152", "154")


def _slow_where_deep(name: str) -> Any:
    deep = any(d in name for d in _DEEP) and name != "legacy_senet154"
    return pytest.param(name, marks=[pytest.mark.slow] if deep else [])


@pytest.mark.parametrize("name", [_slow_where_deep(n) for n in TIMM_TWINS])
def test_keys_and_shapes_are_timms(name: str) -> None:
    timm = library("timm")
    with torch.device("meta"):
        theirs = timm.create_model(name)
        ours = timm_twin(name)
    state = theirs.state_dict()
    assert is_legacy(state) == name.startswith("legacy_")
    if is_legacy(state):
        state = from_legacy(state)
    # Legacy models put the downsample's keys in front of, timm's ResNet behind the excitation's.
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }


def _same_as_timm(
    name: str, size: tuple[int, int], batch: int, tolerance: float, dtype: torch.dtype
) -> None:
    theirs = library("timm").create_model(name, num_classes=11)
    randomise(theirs.eval())
    ours = timm_twin(name, num_classes=11).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, 3, *size, dtype=dtype)
    with torch.no_grad():
        right = theirs.to(dtype)(x)
        _close(ours.to(dtype)(x), right, tolerance)
        # The comparison can fail: the excitations matter.
        with torch.no_grad():
            for block in ours.modules():
                if isinstance(block, FusedSEBlock):
                    block.fc2.bias += 1
        assert (ours(x) - right).abs().max() > 1e3 * tolerance * right.abs().max()


@pytest.mark.parametrize(("name", "size", "batch"), [
    ("seresnet18", 65, 3), ("seresnet50", 64, 1), ("legacy_seresnet50", 65, 3),
    ("seresnext50_32x4d", 33, 1), ("legacy_seresnext50_32x4d", 33, 3),
])  # fmt: skip
def test_outputs_are_timms(name: str, size: int, batch: int) -> None:
    _same_as_timm(name, (size, size + 7), batch, 1e-12, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [160, 224, 225, 320])
@pytest.mark.parametrize("name", ["seresnet50", "legacy_seresnet50", "legacy_senet154",
                                  "seresnext101_32x4d"])  # fmt: skip
def test_outputs_are_timms_at_full_size(name: str, size: int, batch: int) -> None:
    _same_as_timm(name, (size, size), batch, 1e-5, torch.float32)


def test_weights_of_another_network_are_refused() -> None:
    """Legacy weights fit networks that stride or pool elsewhere: there they would be wrong."""
    timm = library("timm")
    with torch.device("meta"):
        state = timm.create_model("legacy_seresnet50").state_dict()
        for options, said in (
            ({}, 'pool="ceil"'),
            ({"pool": "ceil"}, "stride_in_1x1=True"),
            ({"stride_in_1x1": True, "pool": "pad"}, 'pool="ceil"'),
        ):
            with pytest.raises(RuntimeError, match=said):
                create_model("se_resnet50", **options).load_state_dict(state)
        nested = nn.Sequential(nn.Identity(), create_model("se_resnet50", pool="ceil"))
        with pytest.raises(RuntimeError, match="stride"):
            nested.load_state_dict({f"1.{k}": v for k, v in state.items()})
        basic = timm.create_model("legacy_seresnet18").state_dict()
        with pytest.raises(RuntimeError, match="ReLU before the excitation"):
            create_model("se_resnet18").load_state_dict(basic)


def test_where_a_network_strides_and_pools_does_not_show_in_its_weights() -> None:
    """What the documentation warns of."""
    theirs = library("timm").create_model("seresnet50", num_classes=3).eval()
    randomise(theirs)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        right = theirs(x)
        for options in ({"stride_in_1x1": True, "pool": "pad"}, {"pool": "ceil"}):
            ours = create_model("se_resnet50", num_classes=3, **options).eval()
            ours.load_state_dict(theirs.state_dict())
            assert (ours(x) - right).abs().max() > 1e-3 * right.abs().max()


def test_legacy_weights_load_into_a_part_of_a_model() -> None:
    theirs = library("timm").create_model("legacy_seresnet50", num_classes=3)
    nested = nn.ModuleDict({"backbone": timm_twin("legacy_seresnet50", num_classes=3)})
    state = {f"backbone.{k}": v for k, v in theirs.state_dict().items()}
    nested.load_state_dict(state)
    assert torch.equal(nested["backbone"].fc.weight, theirs.last_linear.weight)
    last = theirs.layer4[2].se_module.fc2.weight
    assert torch.equal(nested["backbone"].layer4[2].se.fc2.weight, last)
    assert "backbone.last_linear.weight" in state  # the caller's dict is as it was


def test_plain_twins_are_torchvisions() -> None:
    models = library("torchvision.models")
    for name in ("resnet18", "resnet50"):
        theirs = models.get_model(name, weights=None, num_classes=5).eval()
        randomise(theirs)
        ours = create_model(name, num_classes=5).eval()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 65, 40)
        with torch.no_grad():
            _close(ours(x), theirs(x), 1e-5)


@pytest.mark.parametrize("name", [_slow_where_deep(n) for n in list_models()])
def test_every_model_trains_on_small_images(name: str) -> None:
    """One channel, one image in evaluation, odd sizes; gradients reach every parameter."""
    heavy = name not in ("se_resnet8", "se_resnet20", "resnet8", "resnet18", "se_resnet18")
    with torch.device("meta" if heavy else "cpu"):  # shapes alone for those
        model = create_model(name, num_classes=10, in_chans=1, stem="small")
        assert model(torch.randn(2, 1, 9, 8)).shape == (2, 10)
        assert model.eval()(torch.randn(1, 1, 5, 7)).shape == (1, 10)
        assert create_model(name, num_classes=0).fc.__class__ is nn.Identity
    assert model.config["name"] == name
    if not heavy:
        _random(model).train()
        for parameter, gradient in _gradients(model, torch.randn(4, 1, 8, 8)).items():
            assert gradient.abs().max() > 0, parameter


def test_config_builds_the_same_network() -> None:
    options = {"num_classes": 7, "in_chans": 2, "reduction": 8, "excitation": "tied",
               "formula": "weighted", "drop_rate": 0.1}  # fmt: skip
    first = create_model("se_resnet8", **options)
    first.reset_classifier(3)
    second = create_model(**first.config)
    assert str(second) == str(first)
    second.load_state_dict(first.state_dict())
    assert first.config.items() >= {**options, "num_classes": 3}.items()
    assert first(torch.randn(2, 2, 8, 8)).shape == (2, 3)
    assert first.get_classifier() is first.fc


def test_dropout_before_the_classifier() -> None:
    model = create_model("resnet8", num_classes=50, in_chans=1, drop_rate=0.5)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    with torch.device("meta"):
        assert create_model("senet154").drop_rate == 0.2


def test_zero_init_last() -> None:
    """Each block starts as its shortcut."""
    model = create_model("se_resnet8", in_chans=1)
    x = torch.randn(2, 16, 8, 8).relu()
    assert torch.equal(model.layer1(x), x)
    assert not torch.equal(create_model("se_resnet8", in_chans=1, zero_init_last=False)
                           .layer1(x), x)  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), [
    ({"name": "se_resnet51"}, r"se_resnet51.*did you mean.*se_resnet50"),
    ({"name": "se_resnet8", "num_classes": -1}, "num_classes: expected an integer"),
    ({"name": "se_resnet8", "in_chans": 0}, "in_chans: expected an integer"),
    ({"name": "se_resnet8", "reduction": 2.5}, "reduction: expected an integer"),
    ({"name": "se_resnet8", "rd_divisor": 0}, "rd_divisor: expected an integer"),
    ({"name": "se_resnet8", "excitation": "three"}, "excitation: expected one of two"),
    ({"name": "se_resnet8", "excitation": "constant"}, "excitation: expected one of two"),
    ({"name": "se_resnet8", "formula": "other"}, "formula: expected one of plain"),
    ({"name": "se_resnet8", "formula": "literal", "excitation": "tied"}, "excitation: expected"),
    ({"name": "resnet8", "excitation": "tied"}, "se_resnet8"),
    ({"name": "resnet8", "reduction": 8}, "reduction, rd_divisor: expected the defaults"),
    ({"name": "se_resnet8", "excitation": "single", "rd_divisor": 8}, "no hidden layer"),
    ({"name": "se_resnet8", "pool": "ceil"}, "pool: expected None with stem='small'"),
    ({"name": "resnext152_64x4d", "formula": "weighted"}, "senet154"),
    ({"name": "se_resnet18", "stride_in_1x1": True}, "stride_in_1x1: expected False"),
    ({"name": "se_resnet50", "stride_in_1x1": "false"}, "stride_in_1x1: expected True or False"),
    ({"name": "se_resnet8", "zero_init_last": 0}, "zero_init_last: expected True or False"),
    ({"name": "se_resnet8", "stem": "large"}, "stem: expected one of"),
    ({"name": "se_resnet18", "pool": "max"}, "pool: expected one of"),
    ({"name": "se_resnet8", "drop_rate": 1.0}, "drop_rate: expected a number"),
], ids=str)  # fmt: skip
def test_wrong_options_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_model(**arguments)
    with pytest.raises(ValueError, match="legacy_seresnet50"):
        timm_twin("vgg16")
    with pytest.raises(ValueError, match="num_classes"):
        create_model("resnet8").reset_classifier(-3)


# ---- the forms of the block ----


def _block(**options: Any) -> FusedSEBlock:
    hidden = None if options["excitation"] in ("single", "constant") else 5
    block = FusedSEBlock(12, hidden=hidden, after="relu", **options).double()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_()
    return block


def _hand_written(block: FusedSEBlock, x: Tensor, residual: Tensor) -> Tensor:
    """The forms written out, from the definitions."""
    if block.excitation == "constant":
        alpha, beta = (t.reshape(-1, *[1] * (x.dim() - 2)) for t in (block.alpha, block.beta))
        return F.relu(alpha * x + beta + residual)
    w1, b1 = (None, None) if block.fc1 is None else (block.fc1.weight, block.fc1.bias)
    w2 = block.fc1.weight.flatten(1).T if block.excitation == "tied" else block.fc2.weight
    return oracle.block(x, w1, b1, w2, block.fc2.bias, after="relu", residual=residual,
                        alpha=block.alpha, beta=block.beta)  # fmt: skip


FORMS = [
    {"excitation": excitation, "weighted_sum": weighted}
    for excitation in ("two", "single", "tied")
    for weighted in (False, True)
] + [{"excitation": "constant"}]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_against_their_definitions(form: dict[str, Any], last: bool) -> None:
    block = _block(**form)
    x, residual = (torch.randn(3, 12, 5, 7, dtype=torch.float64) for _ in range(2))
    if last:
        x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    dy = torch.randn_like(x)
    results = []
    for compute in (block.__call__, lambda *args: _hand_written(block, *args)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = compute(*leaves)
        named = [*leaves, *block.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, named, dy)])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)
    assert results[0][0].stride() == x.stride()
    for shape in ((0, 12, 5, 7), (1, 12, 1, 1), (2, 12, 3)):
        some = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(block(some, some), _hand_written(block, some, some))


def test_keys_of_the_forms() -> None:
    layers = {
        "two": ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"],
        "single": ["fc2.weight", "fc2.bias"],
        "tied": ["fc1.weight", "fc1.bias", "fc2.bias"],
        "constant": [],
    }
    for form in FORMS:
        block = _block(**form)
        weighted = form.get("weighted_sum") or form["excitation"] == "constant"
        expected = [*(["alpha", "beta"] if weighted else []), *layers[form["excitation"]]]
        assert list(block.state_dict()) == expected
        other = _block(**form)
        other.load_state_dict(block.state_dict())
        x, residual = torch.randn(2, 2, 12, 3, 3, dtype=torch.float64)
        for clone in (other, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(clone(x, residual), block(x, residual))
        assert ("excitation" in repr(block)) == (form["excitation"] != "two")


def test_constant_form_starts_as_the_identity() -> None:
    block = FusedSEBlock(6, excitation="constant")
    x = torch.randn(2, 6, 3, 4)
    assert torch.equal(block(x), x)
    with pytest.raises(ValueError, match="lengths"):
        block(x, lengths=torch.tensor([1, 2]))


@pytest.mark.parametrize("excitation", ["single", "tied"])
def test_hooked_layers_of_the_forms_are_called(excitation: str) -> None:
    block = _block(excitation=excitation)
    x, residual = torch.randn(2, 2, 12, 3, 3, dtype=torch.float64)
    expected = block(x, residual)
    called: list[str] = []
    for name, child in block.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(block(x, residual), expected, rtol=1e-12, atol=1e-12)
    assert called == [name for name, _ in block.named_children()]
    for child in block.children():
        child.__class__ = type("Wrapped", (type(child),), {})  # as FSDP and parametrizations do
    torch.testing.assert_close(block(x, residual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [
    {"excitation": "none"}, {"excitation": "tied", "scale_and_shift": True},
    {"excitation": "constant", "scale_and_shift": True},
    {"excitation": "constant", "weighted_sum": True}, {"excitation": "single", "hidden": 4},
], ids=str)  # fmt: skip
def test_contradicting_forms_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        FusedSEBlock(8, **options)


MODEL_FORMS = [
    {"excitation": "two", "formula": "plain"}, {"excitation": "single", "formula": "weighted"},
    {"excitation": "tied", "formula": "weighted"}, {"formula": "literal"},
]  # fmt: skip


@pytest.mark.parametrize("form", MODEL_FORMS, ids=str)
def test_models_fused_against_reference(form: dict[str, Any]) -> None:
    """Output and every gradient in float64, in both layouts and in training mode too."""
    model = _random(create_model("se_resnet8", 10, 1, **form)).double()
    x = torch.randn(3, 1, 9, 8, dtype=torch.float64)
    for training in (False, True):
        model.train(training)
        statistics = copy.deepcopy(model.state_dict())
        with use_backend("reference"):
            right = _gradients(model, x)
        for fmt in (torch.contiguous_format, torch.channels_last):
            model.load_state_dict(statistics)
            got = _gradients(model.to(memory_format=fmt), x.to(memory_format=fmt))
            assert got.keys() == right.keys()
            for name, value in right.items():
                torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=name)


@needs_native
@pytest.mark.parametrize("name", ["se_resnet8", "se_resnet50"])
def test_end_of_a_block_is_one_operation(name: str) -> None:
    """Excitation, residual and ReLU: one op forward, one backward, and a bit mask kept of the ReLU.
    No sum, comparison or product over activations is left of them."""
    model = _random(create_model(name, 10, 1, stem="small"))
    for kind in (torch.float32, torch.bfloat16):
        blocks = sum(isinstance(m, FusedSEBlock) for m in model.modules())
        x = torch.randn(2, 1, 8, 8, dtype=kind)
        with CountOperations() as counted:
            calls = counted.calls
            y = model.to(kind)(x)
            assert calls.pop("senet_kernels::native_forward") == blocks
            assert not {c for c in calls if "add" in c or "mul" in c or "mean" in c} - {
                "aten::addmm", "aten::mean.dim"
            }, calls  # the classifier and its pooling  # fmt: skip
            relus = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
            relus -= blocks + sum(".downsample.1" in n for n, _ in model.named_modules())
            assert calls["aten::relu_"] == relus
            calls.clear()
            y.sum().backward()
        assert calls["senet_kernels::native_backward"] == blocks
        assert calls["aten::threshold_backward"] == relus


def test_tied_models_have_fewer_parameters() -> None:
    counts = {
        form: sum(p.numel() for p in create_model("se_resnet20", excitation=form).parameters())
        for form in ("two", "single", "tied")
    }
    model = create_model("se_resnet20")
    second = sum(m.fc2.weight.numel() for m in model.modules() if isinstance(m, FusedSEBlock))
    assert counts["two"] - counts["tied"] == second
    assert counts["single"] > counts["two"]  # C x C: more, for reduction > 2


def test_senet_is_the_articles_network() -> None:
    with torch.device("meta"):
        model = SENet(num_classes=7)
        blocks = [m for m in model.modules() if isinstance(m, FusedSEBlock)]
        assert len(blocks) == 16
        assert all(b.excitation == "tied" and b.alpha is not None for b in blocks)
        assert isinstance(model, ResNet)
        assert isinstance(model.layer1[0], Bottleneck)
        for shape in ((1, 3, 224, 224), (2, 3, 97, 161)):  # a batch of one, any size
            assert model.eval()(torch.empty(shape)).shape == (shape[0], 7)
        again = create_model(**model.config)
    assert list(again.state_dict()) == list(model.state_dict())
    small = SENet(3, in_chans=1, stem="small", reduction=4)
    assert small(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(ValueError, match="formula"):
        SENet(3, formula="none")
    assert not se_parameters(SENet(3, formula="literal", stem="small"))


# ---- citizenship ----


@pytest.mark.parametrize("form", [
    pytest.param(form, marks=[] if form.get("excitation") == "tied" else pytest.mark.slow)
    for form in MODEL_FORMS
], ids=str)  # fmt: skip
def test_compiles_without_graph_breaks(form: dict[str, Any]) -> None:
    model = _random(create_model("se_resnet8", 10, 1, **form)).train()
    x = torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    right = _gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.load_state_dict(before)
    got = _gradients(compiled, x)
    got = {n.removeprefix("_orig_mod."): t for n, t in got.items()}
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    model = _random(create_model("se_resnet50", 10, excitation="tied", formula="weighted"))
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        _close(torch.compile(model, fullgraph=True)(x), model(x), 1e-4)


@pytest.mark.parametrize("form", MODEL_FORMS, ids=str)
def test_copies_and_checkpoints(form: dict[str, Any]) -> None:
    model = _random(create_model("se_resnet8", 10, 1, **form))
    x = torch.randn(2, 1, 8, 8)
    model(x).sum().backward()
    expected = model(x)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = create_model(**model.config).eval()
    other.load_state_dict(torch.load(stream, weights_only=True))
    for clone in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), expected)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", MODEL_FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, form: dict[str, Any]) -> None:
    model = _random(create_model("se_resnet8", 10, 1, **form))
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    _close(y.float(), expected, 0.05)


def test_fuse_se_blocks_leaves_our_models_alone() -> None:
    model = _random(create_model("se_resnet8", 10, 1))
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    fuse_se_blocks(model, neighbours=True)
    torch.testing.assert_close(model(x), expected)


def test_parameter_groups_of_what_is_none() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got NoneType"):
        parameter_groups(None, 0.1)  # type: ignore[arg-type]
    for decay in (-1.0, math.nan, "x"):
        with pytest.raises(ValueError, match=r"^weight_decay: expected a number of at least 0"):
            parameter_groups(nn.Linear(2, 2), decay)  # type: ignore[arg-type]


def test_parameter_groups() -> None:
    model = create_model("se_resnet8", 10, 1, formula="weighted")
    weights = {n for n, _ in model.named_parameters() if n.endswith(("se.alpha", "se.beta"))}
    assert len(weights) == 6
    names = {p: n for n, p in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.1)
    assert {names[p] for p in free["params"]} == weights
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    decayed, free = parameter_groups(model, 0.1, decay_norm_and_bias=False)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert weights < {names[p] for p in free["params"]}
    torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
    assert len(parameter_groups(create_model("resnet8"), 0.1)) == 1
    for p in model.parameters():
        p.requires_grad_(False)
    assert parameter_groups(model, 0.1) == []


def test_se_parameters() -> None:
    for form, per_block in zip(MODEL_FORMS, (4, 2, 3, 0), strict=True):
        model = create_model("se_resnet8", 10, 1, **form)
        found = se_parameters(model)
        assert len(found) == 3 * per_block
        assert found.items() <= dict(model.named_parameters()).items()
        assert not [n for n in found if n.endswith(("alpha", "beta"))]
    assert se_parameters(FusedSEBlock(8)).keys() == {
        "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    }  # fmt: skip


# ---- add_se_blocks ----


PLAIN_RESNETS = [
    ("ours", "resnet8", "two"),
    ("ours", "resnet8", "single"),
    ("ours", "resnet8", "tied"),
    pytest.param("ours", "resnet50", "two", marks=pytest.mark.slow),
    pytest.param("timm", "resnet18", "single", marks=pytest.mark.slow),
    ("timm", "resnet26", "two"),
    pytest.param("timm", "resnet50d", "two", marks=pytest.mark.slow),
    pytest.param("timm", "resnext50_32x4d", "two", marks=pytest.mark.slow),
    ("torchvision.models", "resnet18", "tied"),
    pytest.param("torchvision.models", "resnet50", "two", marks=pytest.mark.slow),
]


def _make(source: str, name: str) -> nn.Module:
    if source == "ours":
        return create_model(name, num_classes=10, stem="small")
    if source == "timm":
        made: nn.Module = library("timm").create_model(name, num_classes=10)
    else:
        made = library(source).get_model(name, weights=None, num_classes=10)
    return made


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad


@pytest.mark.parametrize(("source", "name", "excitation"), PLAIN_RESNETS)
def test_added_blocks_change_nothing_and_train(source: str, name: str, excitation: str) -> None:
    plain = _make(source, name)
    randomise(plain)
    model = copy.deepcopy(plain)
    keys, objects = list(model.state_dict()), dict(model.named_parameters())
    report = add_se_blocks(model, 8, excitation=excitation)
    blocks = [m for m in model.modules() if isinstance(m, FusedSEBlock)]
    with torch.no_grad():
        for block in blocks:
            if block.fc1 is not None:
                block.fc1.bias += 1  # few hidden units: some must be alive
    assert len(report.added) == len(blocks) > 0
    assert not report.refused
    assert f"added {len(blocks)}" in str(report)
    assert [k for k in model.state_dict() if ".se." not in k] == keys
    named = dict(model.named_parameters())
    assert all(named[n] is p for n, p in objects.items())
    assert all(b.after == "relu" for b in blocks)  # the ends of the blocks are fused
    if source == "ours":
        create_model(**model.config).load_state_dict(model.state_dict())

    x = torch.randn(3, 3, 40, 33)
    for training in (False, True):  # in training the running statistics move alike
        plain.train(training)
        model.train(training)
        assert torch.equal(model(x), plain(x))
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(model(last), plain(last))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), plain(x))
    plain.eval()
    model.eval()
    got, right = _gradients(model, x), _gradients(plain, x)
    for parameter, gradient in right.items():
        _close(got[parameter], gradient, 1e-3)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(clone(x), model(x))

    _step(model, x)
    assert all((b.beta != 0).any() for b in blocks)
    _step(model, x)  # beta is not 0 any more: the excitations learn too
    learning = [n for n, p in model.named_parameters() if ".se." in n and p.grad.any()]
    assert learning == [n for n in model.state_dict() if ".se." in n]
    assert not torch.equal(model(x), plain(x))


def test_added_blocks_where_the_end_cannot_be_fused() -> None:
    timm = library("timm")
    blur = timm.layers.BlurPool2d
    for options in ({"drop_path_rate": 0.2}, {"act_layer": "silu"}, {"aa_layer": blur}):
        plain = timm.create_model("resnet18", num_classes=10, **options).eval()
        randomise(plain)
        model = copy.deepcopy(plain)
        report = add_se_blocks(model)
        assert len(report.added) == 8
        alone = [e for e in report.added if "excitation alone" in e.note]
        assert alone
        assert len(alone) == sum(
            m.after == "identity" for m in model.modules() if isinstance(m, FusedSEBlock)
        )
        x = torch.randn(2, 3, 40, 33)
        assert torch.equal(model(x), plain(x))


def test_added_blocks_keep_hooks_and_devices() -> None:
    model = _make("torchvision.models", "resnet18").to(torch.float64)
    seen: list[str] = []
    model.layer1[0].register_forward_hook(lambda *_: seen.append("block"))
    model.layer1[1].relu.register_forward_hook(lambda *_: seen.append("relu"))
    report = add_se_blocks(model)
    assert [e.name for e in report.refused] == ["layer1.1"]
    assert "hooks" in report.refused[0].note
    model.eval()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert seen == ["block", "relu", "relu"]
    with torch.device("meta"):
        meta = create_model("resnet8")
    add_se_blocks(meta)
    assert all(p.is_meta for p in meta.parameters())


def test_models_that_cannot_get_blocks() -> None:
    for model in (nn.Linear(3, 3), create_model("se_resnet8")):
        with pytest.raises(ValueError, match="model: expected a ResNet"):
            add_se_blocks(model)
    with pytest.raises(ValueError, match="it has an excitation already"):
        add_se_blocks(create_model("se_resnet8"))
    with pytest.raises(TypeError, match="model: expected"):
        add_se_blocks("resnet50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="excitation"):
        add_se_blocks(create_model("resnet8"), excitation="constant")
    model = create_model("resnet8")
    with pytest.raises(ValueError, match="reduction"):
        add_se_blocks(model, reduction=0)
    assert not [m for m in model.modules() if isinstance(m, FusedSEBlock)]


def test_added_blocks_compile() -> None:
    model = create_model("resnet8", 10, 1)
    randomise(model)
    add_se_blocks(model, 4)
    x = torch.randn(2, 1, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


# ---- the documentation ----

_DOCS = Path(__file__).parents[1] / "docs"


def test_drawings_are_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(_DOCS))  # as for a script that is run
    names = runpy.run_path(str(_DOCS / "senet_drawing.py"))
    monkeypatch.setitem(names["main"].__globals__, "__file__", str(tmp_path / "senet_drawing.py"))
    names["main"]()
    for name in ("senet.svg", "senet.zh-CN.svg"):
        assert (tmp_path / name).read_text("utf-8") == (_DOCS / name).read_text("utf-8")
        page = (_DOCS / name).with_suffix(".md").read_text("utf-8")
        assert f"({name})" in page
        assert not re.search(r"@[A-Z]+@", page)  # a figure not filled in


def test_pages_in_both_languages_say_the_same() -> None:
    """The same figures, names and commands, as often; as many rows and sections."""
    found = []
    for name in ("senet.md", "senet.zh-CN.md"):
        text = (_DOCS / name).read_text("utf-8")
        text = re.sub(r"(\d+) 万", lambda m: f"{int(m[1]) / 100:.2f}", text)  # 10^4 as 10^6
        found.append({
            "figures": Counter(re.findall(r"\d+\.\d+", text)),
            "code": Counter(re.findall(r"`([^`\n]+)`", text)),
            "rows": text.count("\n|"), "sections": text.count("\n## "),
        })  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]["figures"]) > 100


@pytest.mark.slow
def test_table_of_sizes_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(_DOCS / "senet_claims.py"))["size"]()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.replace("| |", "|  |") for line in printed if line.startswith(("| r", "| s"))]
    assert len(rows) == 6
    for page in ("senet.md", "senet.zh-CN.md"):
        assert set(rows) <= set((_DOCS / page).read_text("utf-8").splitlines())
