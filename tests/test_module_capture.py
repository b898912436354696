"""``fuse_se_blocks`` on modules of unknown classes: what a captured graph shows to be
squeeze-and-excitation and nothing else is fused, all else refused with the true reason."""

from __future__ import annotations

import copy
import io
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graph_cases
import module_cases
from models import library
from senet_kernels import FusedSEBlock, fuse_se_blocks, recognise
from senet_kernels.captured import read_captured
from senet_kernels.forms import Halves, Mlp
from senet_kernels.parts import Refusal
from senet_kernels.validation import DTYPES
from senet_kernels.words_asked import Words


def _outside() -> list[Any]:
    """What the modules of the cases may change outside themselves, and random numbers."""
    state = [module_cases.LOG, module_cases.TABLE, module_cases.CALLS]
    state += [{k: v for k, v in vars(c).items() if isinstance(v, (int, float))}
              for c in (module_cases.Registry, *module_cases.CASES)]  # fmt: skip
    numbers = [random.getstate(), torch.get_rng_state().tolist()]
    return [*copy.deepcopy(state), *numbers, torch.get_default_dtype()]


def _state(module: nn.Module) -> dict[str, Any]:
    own = {k: repr(v) for k, v in vars(module).items() if not k.startswith("_")}
    return own | {k: v.tolist() for k, v in module.state_dict().items()}


def _results(module: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [leaf, *module.parameters()])]


@pytest.mark.parametrize("kind", module_cases.CASES, ids=lambda kind: kind.__name__)
def test_adversaries(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: list[str] = []

    def reading(module: nn.Module, words: Words | None = None) -> Mlp | Halves:
        try:
            return read_captured(module, words)
        except Refusal as refusal:
            refusals.append(str(refusal))
            raise

    monkeypatch.setattr(recognise, "read_captured", reading)
    torch.manual_seed(0)
    plain = kind().double()
    fused = copy.deepcopy(plain)
    outside, state, classes = _outside(), _state(fused), [type(m) for m in fused.modules()]
    report = fuse_se_blocks(nn.ModuleDict({"SE": fused}))
    if kind.cause is not None and not report.refused:  # its name does not say what it is
        if not refusals:  # nor does it look like one
            with pytest.raises(Refusal):
                reading(fused)
        note = refusals[-1]
    else:
        note = "".join(entry.note for entry in report.refused)
    assert _outside() == outside, "looking at a module changed something"
    assert _state(fused) == state
    if kind.cause is not None:
        assert not report.replaced
        assert re.search(kind.cause, note), note
        assert [type(m) for m in fused.modules()] == classes
        return
    assert len(report.replaced) == 1, report
    x = torch.randn(3, module_cases.C, 5, 7, dtype=torch.float64)
    inputs = (x, x[:1], x[..., :1, :1], 1e4 * x, x.to(memory_format=torch.channels_last))
    for training in (True, False):
        for given in inputs:
            expected, got = (_results(m.train(training), given) for m in (plain, fused))
            assert got[0].stride() == expected[0].stride()
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert _state(fused) == _state(plain)


_CAST = [k for k in module_cases.CASES if getattr(k, "dtypes", DTYPES) != DTYPES]


@pytest.mark.parametrize("kind", _CAST, ids=lambda kind: kind.__name__)
def test_casts_to_float32_are_the_kernels_own(kind: Any) -> None:
    """In half precision, where the kernels round less often; else the original forward runs."""
    torch.manual_seed(0)
    plain = kind()
    fused: Any = copy.deepcopy(plain)
    assert fuse_se_blocks(nn.ModuleDict({"SE": fused})).replaced
    assert set(fused._senet_form.dtypes) == set(kind.dtypes)
    for dtype in DTYPES:
        x = _X.to(dtype)
        own, ours = (copy.deepcopy(m).to(dtype) for m in (plain, fused))
        expected, got = (_results(m, x) for m in (own, ours))
        for a, b, c in zip(got, expected, _results(own.double(), x.double()), strict=True):
            assert a.dtype == b.dtype
            if dtype not in kind.dtypes:
                assert torch.equal(a, b)
            else:
                close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
                worst = (a.double() - c.double()).abs().max() / c.abs().max()
                assert worst.item() < close
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(_X), plain(_X))


_X = torch.randn(3, module_cases.C, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", graph_cases.CASES, ids=lambda kind: kind.__name__)
def test_adversaries_of_the_compile_door(kind: Any) -> None:
    """A module that is fused computes what it did."""
    torch.manual_seed(0)
    plain = kind().to(kind.dtype)
    fused = copy.deepcopy(plain)
    if not fuse_se_blocks(fused).replaced:
        return
    x = torch.randn(graph_cases.SHAPE, dtype=kind.dtype)
    for training in (True, False):
        expected = _results(plain.train(training), x)
        for a, b in zip(_results(fused.train(training), x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=kind.tolerance, atol=kind.tolerance)


class Layer(nn.Module):
    """Many a home-made model's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(True), nn.Linear(channels // 4, channels),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        g: Tensor = self.fc(self.pool(x).flatten(1))
        return x * g[:, :, None, None]


def test_equal_modules_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[nn.Module] = []

    def counted(module: nn.Module, words: Words) -> Mlp | Halves:
        captured.append(module)
        return read_captured(module, words)

    monkeypatch.setattr(recognise, "read_captured", counted)
    model = nn.ModuleList([Layer(c) for c in (8, 16, 8, 16, 8)])
    model[4].fc[1] = nn.SiLU()  # type: ignore[index]
    report = fuse_se_blocks(model)
    assert captured == [model[0], model[1], model[4]]
    assert [e.note.split(", ")[1] for e in report.replaced] == ["relu"] * 4 + ["silu"]
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(model[4](x), Layer.forward(model[4], x))


def test_names_that_say_so_are_never_passed_over() -> None:
    class SeModule(nn.Module):
        """Many layers."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(20)])

    class FSDPSEBlock(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class SENetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.SELayer = Layer(8)

    class MSELoss(nn.Module):
        pass

    class SelfAttention(nn.Module):
        pass

    model = nn.ModuleList([SeModule(), FSDPSEBlock(), SENetwork(), MSELoss(), SelfAttention()])
    report = fuse_se_blocks(model)
    assert [(e.name, e.note) for e in report.refused] == [
        ("0", "it holds more modules than an excitation does"),
        ("1", "it has not the layers of an excitation"),
    ]
    assert [e.name for e in report.replaced] == ["2.SELayer"]


def test_a_module_that_could_not_excite_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers without a mean: the MLP of a transformer, say."""

    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.act = nn.Linear(8, 32), nn.Linear(32, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc2(self.act(self.fc1(x)))
            return y

    monkeypatch.setattr(recognise, "read_captured", None)
    assert str(fuse_se_blocks(nn.ModuleList([Feed(), FusedSEBlock(8)]))) == "no SE block found"


# ---- the table ----


def _instances() -> dict[str, nn.Module]:
    """A module of each class of the table that is installed."""
    from functools import partial

    layers = library("timm.layers")
    made: dict[str, nn.Module] = {}
    blocks = library("timm.models._efficientnet_blocks")
    for module in (
        layers.SEModule(16, rd_channels=4),
        layers.SEModule(16, rd_channels=4, norm_layer=nn.BatchNorm2d),
        layers.SEModule(16, rd_channels=4, gate_layer="hard_sigmoid", act_layer=nn.SiLU),
        layers.EffectiveSEModule(16),
        layers.EcaModule(16),
        layers.EcaModule(16, kernel_size=5, gate_layer="hard_sigmoid"),
        blocks.SqueezeExcite(16, rd_channels=4, act_layer=nn.SiLU),
        blocks.SqueezeExcite(16, rd_channels=4, gate_layer=nn.Hardsigmoid),
        library("timm.models.hgnet").EseModule(16),
        library("timm.models.senet").SEModule(16, 4),
        library("torchvision").ops.SqueezeExcitation(16, 4),
        library("torchvision").ops.SqueezeExcitation(
            16, 4, nn.SiLU, scale_activation=partial(nn.Hardsigmoid, inplace=True)
        ),
    ):
        made[f"{recognise.class_name(module)} {len(made)}"] = module
    return made


@pytest.mark.parametrize("number", range(12))
def test_the_table_says_what_capture_says(number: int) -> None:
    name, module = list(_instances().items())[number]
    known = recognise.KNOWN[name.partition(" ")[0]]
    assert recognise.source_hash(type(module)) in known.hashes
    by_table, by_capture = known.read(module), read_captured(module)
    assert type(by_table) is type(by_capture)
    names = ["gate", *(("fc1", "fc2", "activation") if isinstance(by_table, Mlp) else ())]
    for field in names:
        assert getattr(by_table, field) == getattr(by_capture, field), field
    assert set(by_capture.ranks) == {4}


# ---- graphs ----


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.SiLU(), module_cases.InItsOwnWords(), nn.ReLU(), Layer(16)
    ).eval()  # fmt: skip


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs(decomposed: bool) -> None:
    model, x = _network(), torch.randn(2, 3, 9, 8)
    expected = model(x)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    if decomposed:
        program = program.run_decompositions()
    report = fuse_se_blocks(program, neighbours=True)
    assert [e.note.partition(": ")[2] for e in report.replaced] == [
        "two layers, relu, gate sigmoid, after relu, before silu",
        "two layers, relu, gate sigmoid",
    ]
    assert not report.refused
    calls = [n for n in program.graph.nodes if str(n.target).startswith("senet_kernels.")]
    assert len(calls) == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for made in (program, torch.export.load(file)):
        for given in (x, x[:1]):
            torch.testing.assert_close(made.module()(given), expected[: len(given)])
    assert str(fuse_se_blocks(program)) == "no SE block found"


def test_graph_modules() -> None:
    model, x = _network(), torch.randn(2, 3, 9, 8)
    graph = torch.export.export(model, (x,)).module()
    assert len(fuse_se_blocks(graph).replaced) == 2
    torch.testing.assert_close(graph(x), model(x))


def test_graphs_that_are_refused() -> None:
    program = torch.export.export(
        nn.Sequential(module_cases.Detached()), (torch.ones(2, 16, 3, 3),)
    )
    before = program.graph_module.code
    with pytest.raises(ValueError, match=r"strict: .*detach"):
        fuse_se_blocks(program, strict=True)
    assert "detach" in fuse_se_blocks(program).refused[0].note
    assert program.graph_module.code == before
    with pytest.raises(ValueError, match="backend: expected None for a graph"):
        fuse_se_blocks(program, backend="native")


# ---- networks of timm ----

#: One of each family whose squeeze-and-excitation modules differ.
_FAMILIES = (
    "seresnet18", "mobilenetv3_small_050", "rexnet_100", "ese_vovnet19b_dw", "ecaresnet26t",
    "legacy_seresnet18", "hgnet_tiny", "regnety_002", "ghostnet_050", "mixnet_s",
    "eca_nfnet_l0", "seresnext26t_32x4d", "tinynet_e", "lcnet_050", "cspnext_tiny",
)  # fmt: skip
_CLASSES = ("SEModule", "SqueezeExcite", "EffectiveSEModule", "EseModule", "EcaModule")


def _said(read: Any, module: nn.Module) -> Any:
    """What is computed, or why it is refused."""
    try:
        form = read(module)
    except Refusal as refusal:
        return str(refusal)
    return (type(form), *(form[:4] if isinstance(form, Mlp) else (form.gate,)))


def _compare_with_the_table(
    name: str, recogniser: recognise.Recogniser
) -> tuple[int, list[str]]:  # fmt: skip
    """Instances in a network of timm, and those that capture and the table do not agree on, or that
    neither takes."""
    timm = library("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in _CLASSES]
    wrong = []
    for path, module in found:
        row = recognise.KNOWN[recognise.class_name(module)]
        forms = [_said(read, module) for read in (row.read, recogniser._capture)]
        if isinstance(forms[0], str) or forms[0] != forms[1]:
            wrong.append(f"{name}.{path}: {forms}")
    return len(found), wrong


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if i > 4 else n for i, n in enumerate(_FAMILIES)],
)
def test_networks_of_timm_without_the_table(name: str) -> None:
    count, wrong = _compare_with_the_table(name, recognise.Recogniser())
    assert count
    assert not wrong, wrong


@pytest.mark.slow
def test_all_networks_of_timm_without_the_table() -> None:
    """At least 99 % of all squeeze-and-excitation instances, and none but what the table takes."""
    timm = library("timm")
    recogniser = recognise.Recogniser()
    total, wrong = 0, []
    for name in timm.list_models():
        count, differing = _compare_with_the_table(name, recogniser)
        total += count
        wrong += differing
    assert total > 5000
    assert len(wrong) < total / 100, wrong
