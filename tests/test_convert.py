"""``fuse_se_blocks``: what it recognises, what it refuses, and that it changes nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import library, randomise
from operations import CountOperations
from senet_kernels import BackendUnavailableError, fuse_se_blocks, recognise, unfuse_se_blocks
from senet_kernels.converted import Fused
from senet_kernels.neighbours import source_hash


class SELayer(nn.Module):
    """The form most copied into home-made models."""

    def __init__(self, channels: int = 24, reduction: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=bias),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y: Tensor = self.fc(self.avg_pool(x).view(b, c))
        return x * y.view(b, c, 1, 1).expand_as(x)


class HSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + 3) / 6
        return y


class MobileSE(SELayer):
    """Custom gate; a subclass is a class of its own."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.fc[3] = HSigmoid()


class FunctionalSE(nn.Module):
    """Layers as children, everything else functional; any number of spatial dimensions."""

    def __init__(self, finish: Callable[[Tensor, Tensor], Tensor], act: Any = F.silu) -> None:
        super().__init__()
        self.squeeze = nn.Linear(24, 6)
        self.expand = nn.Linear(6, 24)
        self.finish, self.act = finish, act

    def forward(self, x: Tensor) -> Tensor:
        u = self.expand(self.act(self.squeeze(x.flatten(2).mean(2))))
        return self.finish(x, u.reshape(*u.shape, *[1] * (x.dim() - 2)))


class Oddity(nn.Module):
    """Looks like squeeze-and-excitation in all but what it computes."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(24, 6, 1)
        self.fc2 = nn.Conv2d(6, 24, 1)
        self.drop = nn.Dropout(0.5)
        self.log: list[int] = []
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class SEOddity(Oddity):
    """The same under a name that says so: reported rather than passed over."""


def _excite(m: Any, z: Tensor) -> Tensor:
    u: Tensor = m.fc2(torch.relu(m.fc1(z)))
    return u


def _se(m: Any, x: Tensor) -> Tensor:
    y: Tensor = x * _excite(m, _mean(x)).sigmoid()
    return y


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _x(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 24, 9, 7), generator=torch.Generator().manual_seed(3))


def _assert_same(module: nn.Module, x: Tensor) -> None:
    """Fused and original: output, strides, and every gradient."""
    original = copy.deepcopy(module)
    unfuse_se_blocks(original)
    results = []
    for m in (module, original):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        gradients = torch.autograd.grad(y, [leaf, *m.parameters()], torch.ones_like(y))
        results.append((y.detach(), *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert results[0][0].stride() == results[1][0].stride()


def test_known_home_made_form() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), SELayer(), nn.ReLU(), MobileSE())
    randomise(model)
    report = fuse_se_blocks(model)
    assert [(e.name, e.note) for e in report.replaced] == [
        ("1", "squeeze_excite: two layers, relu, gate sigmoid"),
        ("3", "squeeze_excite: two layers, relu, gate hardsigmoid"),
    ]
    assert not report.refused
    assert "2 SE blocks fused\n" in str(report)
    assert "SELayer" in str(report)
    _assert_same(model, _x(2, 3, 11, 9))


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (lambda x, u: x * torch.sigmoid(u), "gate sigmoid"),
        (lambda x, u: F.hardsigmoid(u) * x, "gate hardsigmoid"),
        (lambda x, u: x * (0.2 * u + 0.5).clamp(0, 1), "gate hardsigmoid_02"),
        (lambda x, u: x * torch.tanh(u), "gate tanh"),
        (lambda x, u: x * u, "gate identity"),
        (lambda x, u: x * torch.relu(u) + x, "gate relu, plus a residual"),
    ],
)
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_captured_forms(
    finish: Callable[[Tensor, Tensor], Tensor], expected: str, rank: int
) -> None:
    module = FunctionalSE(finish)
    report = fuse_se_blocks(module)
    assert [e.note for e in report.replaced] == [f"squeeze_excite: two layers, silu, {expected}"]
    assert report.replaced[0].name == ""
    assert "(the model)" in str(report)
    _assert_same(module, _x(3, 24, *[4, 3, 5][: rank - 2]))


@pytest.mark.parametrize(
    "act", [F.relu, F.gelu, F.hardswish, F.mish, F.leaky_relu, F.relu6, lambda t: t]
)
def test_captured_activations(act: Callable[[Tensor], Tensor]) -> None:
    module = FunctionalSE(lambda x, u: x * torch.sigmoid(u), act)
    assert len(fuse_se_blocks(module).replaced) == 1
    _assert_same(module, _x())


@pytest.mark.parametrize("hidden", [1, 2, 3, 64])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.GELU])
def test_captured_at_every_width(hidden: int, act: type[nn.Module]) -> None:
    block = SELayer(8)
    block.fc = nn.Sequential(nn.Linear(8, hidden), act(), nn.Linear(hidden, 8), nn.Sigmoid())
    (entry,) = fuse_se_blocks(block).replaced
    assert f" {act.__name__.lower()}," in entry.note
    _assert_same(block, _x(3, 8, 5, 4))


_ODD: dict[str, Callable[[Any, Tensor], Any]] = {
    "max pool": lambda m, x: x * _excite(m, x.amax((2, 3), keepdim=True)).sigmoid(),
    "other slope": lambda m, x: x * (_excite(m, _mean(x)).sigmoid() * 0.2 + 0.5),
    "gate alone": lambda m, x: _excite(m, _mean(x)).sigmoid(),
    "no gradient through the gate": lambda m, x: x * _excite(m, _mean(x).detach()).sigmoid(),
    "random": lambda m, x: x * _excite(m, _mean(x)).sigmoid() * torch.rand(()),
    "dropout": lambda m, x: x * m.drop(_excite(m, _mean(x))).sigmoid(),
    "rows only": lambda m, x: x * _excite(m, x.mean(2, keepdim=True)).sigmoid(),
    "twice": lambda m, x: x * _excite(m, _mean(x)).sigmoid() ** 2,
    "in training only": lambda m, x: x * _excite(m, _mean(x)).sigmoid() if m.training else x,
    "a pair": lambda m, x: (x * _excite(m, _mean(x)).sigmoid(), None),
    "layers swapped": lambda m, x: x * m.fc1(m.fc2(_mean(x))).sigmoid(),
    # The operation on most inputs, and something else on some.
    "frozen weights": lambda m, x: (
        x * F.conv2d(torch.relu(m.fc1(_mean(x))), m.fc2.weight.detach(), m.fc2.bias).sigmoid()
    ),
    "no gradients": lambda m, x: _se(m, x) if torch.is_grad_enabled() else x,
    "in place": lambda m, x: _se(m, x) if torch.is_grad_enabled() else x.copy_(_se(m, x)),
    "masked mean": lambda m, x: (
        x * _excite(m, x.sum((2, 3), keepdim=True) / (x != 0).sum((2, 3), keepdim=True)).sigmoid()
    ),
    "clamped": lambda m, x: _se(m, x.clamp(-20, 20)),
    "clamped inside": lambda m, x: x * m.fc2(m.fc1(_mean(x)).clamp(0, 50)).sigmoid(),
    "without NaN": lambda m, x: _se(m, x.nan_to_num()),
    "vanishing": lambda m, x: _se(m, x) * (x.abs().amax() > 0.1),
    "one image": lambda m, x: _se(m, x) if len(x) > 1 else x,
    "one position": lambda m, x: _se(m, x) if x.shape[2:].numel() > 1 else x,
    "large maps": lambda m, x: _se(m, x) if x.shape[2] < 20 else x,
    "eps": lambda m, x: (
        x * _excite(m, x.sum((2, 3), keepdim=True) / (x.shape[2:].numel() + 1e-6)).sigmoid()
    ),
    "contiguous": lambda m, x: _se(m, x).contiguous(),
    "half only": lambda m, x: _se(m, x) * (2 if x.dtype == torch.bfloat16 else 1),
    "returns float32": lambda m, x: _se(m, x).float(),
    "float32 of half": lambda m, x: _se(m, x).to(torch.promote_types(x.dtype, torch.float32)),
    "counts calls": lambda m, x: setattr(m, "calls", len(vars(m))) or _se(m, x),
    "keeps its gates": lambda m, x: (
        setattr(m, "last", _excite(m, _mean(x)).sigmoid()) or x * m.last
    ),
    "keeps a log": lambda m, x: m.log.append(1) or _se(m, x),
}


@pytest.mark.parametrize("name", _ODD)
def test_what_computes_something_else_is_refused(name: str) -> None:
    model = nn.ModuleList([SEOddity(_ODD[name]), Oddity(_ODD[name])])
    types = [type(m) for m in model.modules()]
    report = fuse_se_blocks(model)
    assert not report.replaced
    assert [e.name for e in report.refused] == ["0"], "only what sounds like SE is reported"
    assert report.refused[0].note
    assert [type(m) for m in model.modules()] == types


def test_an_mlp_is_no_excitation() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    report = fuse_se_blocks(model)
    assert str(report) == "no SE block found"


def test_what_the_oddities_vary_is_accepted() -> None:
    assert len(fuse_se_blocks(Oddity(_se)).replaced) == 1


def test_dtypes_that_the_original_reconciles() -> None:
    """float32 layers in a half model: the fused operation mixes no dtypes, the original does."""
    block = Oddity(
        lambda m, x: x * _excite(m, _mean(x).to(m.fc1.weight.dtype)).sigmoid().to(x.dtype)
    )
    assert len(fuse_se_blocks(block).replaced) == 1
    assert block(_x().bfloat16()).dtype == torch.bfloat16
    plain = SELayer()
    fuse_se_blocks(plain)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own error, as before
        plain(_x().bfloat16())


def test_children_that_come_later() -> None:
    class Whole(nn.Sequential):
        """Its children, in turn, are the excitation."""

        def forward(self, x: Tensor) -> Tensor:
            return x * super().forward(x)

    block = SELayer()
    outer = nn.Sequential(SELayer())
    whole = Whole(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1))
    for model, sequential in ((block, block.fc), (outer, outer), (whole, whole)):
        assert len(fuse_se_blocks(model).replaced) == 1
        sequential.append(nn.Tanh())
        _assert_same(model, _x())


def test_signature_is_the_originals() -> None:
    class Named(SELayer):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features)

    block, x = Named(), _x()
    expected = block(x)
    fuse_se_blocks(block)
    assert str(inspect.signature(block.forward)) == "(features: 'Tensor') -> 'Tensor'"
    torch.testing.assert_close(block(features=x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected)
    shapes = {"features": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(block, (x,), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(x[:2]), expected[:2])


def test_class_that_notes_its_subclasses() -> None:
    """One that is told of them is not; of one whose metaclass is, no other class is made."""

    class Registered(SELayer):
        def __init_subclass__(cls, *, key: str) -> None:
            pass

    class Block(Registered, key="block"):
        pass

    class Meta(type):
        pass

    class Made(SELayer, metaclass=Meta):
        pass

    model = nn.ModuleList([Block(), Made()])
    report = fuse_se_blocks(model)
    assert [e.name for e in report.replaced] == ["0"]
    assert "its class is made by Meta" in report.refused[0].note
    assert type(model[1]) is Made


def test_complex_parameters_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of complex modules in general
        block = SELayer().to(torch.complex64)
    assert fuse_se_blocks(block).refused[0].note == "its child fc.0 has complex parameters"


def test_dropout_in_the_excitation() -> None:
    block = SELayer()
    block.fc.insert(2, nn.Dropout(0.3))
    assert fuse_se_blocks(block).refused[0].note == (
        "its child fc.2, Dropout(p=0.3, inplace=False), is random in training: for inference put "
        "nn.Identity() in its place, for training call squeeze and channel_scale around your own "
        "excitation"
    )
    x = _x()
    expected = block.eval()(x)
    block.fc[2] = nn.Identity()
    assert len(fuse_se_blocks(block).replaced) == 1
    torch.testing.assert_close(block(x), expected)


def test_dropout_that_drops_nothing_until_it_does() -> None:
    block = SELayer()
    block.fc.insert(2, nn.Dropout(0.0))
    assert len(fuse_se_blocks(block).replaced) == 1
    _assert_same(block, _x())
    block.fc[2].p = 1.0  # type: ignore[assignment]
    torch.testing.assert_close(block(_x()), 0.5 * _x())


def test_another_computation_in_training() -> None:
    """Whatever dropout is beside it."""
    block = SEOddity(lambda m, x: _se(m, x) * (1 + m.training))
    assert fuse_se_blocks(block).refused[0].note == (
        "it is squeeze-and-excitation in eval, and not in training: it is squeeze-and-excitation "
        "and more: mul"
    )


def test_strict_changes_nothing() -> None:
    model = nn.ModuleList([SELayer(), SEOddity(_ODD["twice"])])
    with pytest.raises(ValueError, match=r"strict: expected .* got 1 \(.*SEOddity\)"):
        fuse_se_blocks(model, strict=True)
    assert not any(isinstance(m, Fused) for m in model.modules())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        fuse_se_blocks(_mean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: expected one of"):
        fuse_se_blocks(model, backend="cudnn")


def test_filter_is_a_function() -> None:
    with pytest.raises(TypeError, match=r"^filter_fn: expected a function .*, got str"):
        fuse_se_blocks(SELayer(), filter_fn="x")  # type: ignore[arg-type]


def test_filter_and_twice() -> None:
    shared = SELayer()
    model = nn.ModuleDict({"a": SELayer(), "b": shared, "c": shared})
    seen = []

    def choose(name: str, module: nn.Module) -> bool:
        seen.append(name)
        return name != "a"

    assert [e.name for e in fuse_se_blocks(model, filter_fn=choose).replaced] == ["b"]
    assert "a" in seen
    report = fuse_se_blocks(model)  # what is fused stays fused
    assert [e.name for e in report.replaced] == ["a", "b"]
    assert all("SELayer" in e.kind and "Fused" not in e.kind for e in report.replaced)
    assert model["b"] is model["c"]
    assert unfuse_se_blocks(model) == 2
    assert type(model["a"]) is SELayer
    assert "_senet_form" not in vars(model["a"])


def test_hooks() -> None:
    """Those on the block fire as before; with one on a child its original forward runs."""
    block = SELayer()
    fired: list[str] = []
    block.register_forward_hook(lambda *_: fired.append("block"))
    assert len(fuse_se_blocks(block).replaced) == 1
    x = _x()
    expected = block(x)
    assert fired == ["block"]

    handle = block.fc[1].register_forward_hook(lambda *_: fired.append("child"))
    torch.testing.assert_close(block(x), expected)
    assert fired == ["block", "child", "block"]
    handle.remove()

    with nn.modules.module.register_module_forward_hook(lambda m, *_: fired.append("global")):
        block(x)
    assert fired.count("global") == 7, fired  # the block, its pool, the Sequential and its four


def test_hooked_children_are_refused() -> None:
    model = nn.ModuleList([SELayer(), SELayer(), SELayer(), SELayer()])
    model[0].fc[0].register_forward_pre_hook(lambda *_: None)
    model[1].fc[2].forward = model[1].fc[2].forward  # type: ignore[method-assign]
    parametrize.register_parametrization(model[2].fc[0], "weight", nn.Identity())
    model[3].forward = model[3].forward  # type: ignore[method-assign]
    report = fuse_se_blocks(model)
    assert not report.replaced
    assert [e.note for e in report.refused][:2] == [
        "its child fc.0 has hooks",
        "its child fc.2 has its own forward",
    ]
    assert report.refused[-1].note == "it has its own forward"


def test_changes_after_fusing() -> None:
    """A parametrization, a replaced child, more arguments: the original forward sees them."""
    block = SELayer()
    fuse_se_blocks(block)
    x = _x()

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(block.fc[0], "weight", Double())
    _assert_same(block, x)
    parametrize.remove_parametrizations(block.fc[0], "weight")
    block.fc[2] = nn.Sequential(block.fc[2], nn.Tanh())  # type: ignore[assignment]
    _assert_same(block, x)
    with pytest.raises(TypeError, match="forward"):
        block(x, None)


def test_changed_settings_are_seen() -> None:
    """The same class with another argument is another function."""
    block = SELayer()
    block.fc[1] = nn.LeakyReLU()
    assert "leaky_relu" in fuse_se_blocks(block).replaced[0].note
    block.fc[1].negative_slope = 0.3
    _assert_same(block, _x())
    block.fc[1] = nn.LeakyReLU(0.2)
    _assert_same(block, _x())
    block.fc[1] = nn.LeakyReLU()
    _assert_same(block, _x())


def test_named_backend_never_falls_back() -> None:
    block = SELayer()
    fuse_se_blocks(block, backend="triton")
    with pytest.raises(BackendUnavailableError):
        block(_x())
    fuse_se_blocks(block, backend="native")
    block.fc[0].register_forward_hook(lambda *_: None)
    with pytest.raises(BackendUnavailableError, match=r"SELayer: its child fc\.0 has hooks"):
        block(_x())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_layout(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    block = SELayer(bias=True)
    x = _x().to(dtype).to(memory_format=memory_format)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        eager = block(x)
        fuse_se_blocks(block)
        fused = block(x)
    assert fused.dtype == eager.dtype
    assert fused.stride() == eager.stride()
    torch.testing.assert_close(fused.float(), eager.float(), rtol=2e-2, atol=2e-2)


def test_compile_export_and_fx() -> None:
    model = nn.Sequential(nn.Conv2d(3, 24, 3), SELayer(bias=True), nn.ReLU()).eval()
    fuse_se_blocks(model)
    x = _x(2, 3, 11, 9)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    traced = torch.fx.symbolic_trace(model)  # of the original operations
    torch.testing.assert_close(traced(x), expected)


def test_traced_graphs_are_refused() -> None:
    """A GraphModule makes a class of its own whenever it is copied or pickled."""
    traced = torch.fx.symbolic_trace(SELayer(8, 4))
    report = fuse_se_blocks(traced)
    assert not report.replaced
    assert "fuse before tracing" in report.refused[0].note
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(copy.deepcopy(traced)(x), traced(x))


def test_refusals_of_known_classes() -> None:
    timm = library("timm")
    layers = timm.layers
    model = nn.ModuleList(
        [
            layers.SEModule(32, add_maxpool=True),
            layers.SEModule(32, act_layer=nn.Softplus),
            layers.EffectiveSEModule(32, add_maxpool=True),
            layers.EcaModule(32, use_mlp=True),
            layers.SEModule(32, act_layer=lambda inplace: nn.LeakyReLU(0.2, inplace=inplace)),
        ]
    )
    report = fuse_se_blocks(model)
    assert not report.replaced
    notes = [e.note for e in report.refused]
    assert notes[0] == notes[2] == "it adds a maximum to the mean (add_maxpool=True)"
    assert "Softplus" in notes[1]
    assert "use_mlp" in notes[3]
    assert "negative_slope=0.2" in notes[4]


def test_quantizable_subclass_is_not_taken_for_its_base() -> None:
    library("torchvision")
    mobilenet = library("torchvision.models.quantization.mobilenetv3")
    block = mobilenet.QuantizableSqueezeExcitation(32, 8)
    report = fuse_se_blocks(block)
    assert not report.replaced
    assert len(report.refused) == 1


def test_norm_in_the_excitation_trains() -> None:
    """The norm's statistics move as they do in the original."""
    timm = library("timm")
    block = timm.layers.SEModule(32, norm_layer=nn.BatchNorm2d).train()
    other = copy.deepcopy(block)
    fuse_se_blocks(block)
    x = _x(4, 32, 5, 6)
    torch.testing.assert_close(block(x), other(x))
    assert int(block.bn.num_batches_tracked) == 1
    torch.testing.assert_close(block.bn.running_mean, other.bn.running_mean)


def test_as_an_argument_of_model_builders() -> None:
    """A block from a ResNet built by hand with timm's own SE in place of its layer."""
    torchvision = library("torchvision")
    block = torchvision.ops.SqueezeExcitation(24, 6)
    fuse_se_blocks(block)
    _assert_same(block, _x())
    x = _x(24, 9, 7)  # unbatched: torchvision takes it, so the original forward runs
    assert block(x).shape == x.shape


class _Wrapped(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Masked(nn.Module):
    """As speechbrain 1.1.2 writes its block, whose name it is given below: the package brings
    torchaudio and more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = _Wrapped(24, 6), nn.ReLU(inplace=True)
        self.conv2, self.sigmoid = _Wrapped(6, 24), nn.Sigmoid()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        longest = x.shape[-1]
        if lengths is not None:
            positions = torch.arange(longest, dtype=lengths.dtype).expand(len(lengths), longest)
            mask = (positions < (lengths * longest).unsqueeze(1)).to(lengths.dtype).unsqueeze(1)
            s = (x * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)
        else:
            s = x.mean(dim=2, keepdim=True)
        s = self.relu(self.conv1(s))
        s = self.sigmoid(self.conv2(s))
        return s * x


class Generic(nn.Module):
    """As fvcore 0.1.5.post20221221 writes its block, likewise."""

    def __init__(self, activation: nn.Module, is_3d: bool) -> None:
        super().__init__()
        conv = nn.Conv3d if is_3d else nn.Conv2d
        self.is_3d = is_3d
        self.block = nn.Sequential(conv(24, 12, 1), activation, conv(12, 24, 1), nn.Sigmoid())

    def forward(self, input_tensor: Tensor) -> Tensor:
        dims = [2, 3, 4] if self.is_3d else [2, 3]
        mean_tensor = input_tensor.mean(dim=dims, keepdim=True)
        return torch.mul(input_tensor, self.block(mean_tensor))


def _under_the_name(cls: type[nn.Module], name: str, *arguments: Any) -> nn.Module:
    """An instance of a subclass that calls itself so."""
    module, _, own = name.rpartition(".")
    names = {"__module__": module, "__qualname__": own}
    made: nn.Module = type(own, (cls,), names)(*arguments)
    return made


@pytest.mark.parametrize("rank", [4, 5])
def test_generic_block(rank: int) -> None:
    name = "fvcore.nn.squeeze_excitation.SqueezeExcitation"
    block = _under_the_name(Generic, name, nn.SiLU(), rank == 5)
    report = fuse_se_blocks(block)
    assert [(e.kind, e.note) for e in report.replaced] == [
        (name, "squeeze_excite: two layers, silu, gate sigmoid")
    ]
    _assert_same(block, _x(2, 24, 3, 5, 4)[:, :, 0] if rank == 4 else _x(2, 24, 3, 5, 4))
    other = _under_the_name(Generic, name, nn.SiLU(), rank == 5)
    other.block.append(nn.Dropout())
    assert "its child block.4, Dropout(p=0.5, inplace=False), is random in training" in (
        fuse_se_blocks(other).refused[0].note
    )


def test_masked_block(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "speechbrain.lobes.models.ECAPA_TDNN.SEBlock"
    row = recognise.KNOWN[name]
    hashes = (*row.hashes, str(source_hash(Masked)))
    monkeypatch.setitem(recognise.KNOWN, name, row._replace(hashes=hashes))
    original = _under_the_name(Masked, name)
    block = copy.deepcopy(original)
    assert [e.kind for e in fuse_se_blocks(block).replaced] == [name]
    x = _x(5, 24, 13)
    lengths = torch.tensor([1.0, 0.5, 0.31, 1 / 13, 0.99])
    for call in ((x,), (x, None), (x, lengths)):
        torch.testing.assert_close(block(*call), original(*call))
    torch.testing.assert_close(block(x, lengths=lengths), original(x, lengths=lengths))
    with pytest.raises(TypeError):
        block(x, length=lengths)


# ---- neighbours ----


def _block() -> nn.Sequential:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.SiLU(inplace=True)),
        SELayer(bias=True),
        nn.ReLU(),
        nn.Conv2d(24, 5, 1),
    )
    randomise(model)
    return model.eval()


def _operations(model: nn.Module, x: Tensor) -> set[str]:
    """Names of the ops that one call runs."""
    with CountOperations() as counted, torch.no_grad():
        model(x)
    return set(counted.calls)


def test_neighbours_in_a_sequential() -> None:
    model = _block()
    x = _x(2, 3, 11, 9)
    report = fuse_se_blocks(model, neighbours=True)
    assert [(e.name, e.note) for e in report.replaced] == [
        ("1", "squeeze_excite: two layers, relu, gate sigmoid"),
        ("", "neighbours: before silu, after relu"),
    ]
    _assert_same(model, x)
    assert not {"aten::silu", "aten::silu_", "aten::relu"} & _operations(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
    assert str(fuse_se_blocks(model, neighbours=True)) == str(report)  # once is enough
    _assert_same(model[:2], x)  # a slice is a Sequential of its own, fused blocks or not
    assert unfuse_se_blocks(model) == 2
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("place", ["act", "se", "se child", "container", "after"])
def test_neighbours_with_hooks(place: str) -> None:
    """A hook anywhere on what was joined: the original steps run and the hook sees its values."""
    model = _block()
    x = _x(2, 3, 11, 9)
    watch = {
        "act": model[0][2],
        "se": model[1],
        "se child": model[1].fc[0],
        "container": model[0],
        "after": model[2],
    }[place]
    seen: list[Tensor] = []
    watch.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    expected = model(x)
    first = seen.pop()
    handles = watch._forward_hooks.copy()
    watch._forward_hooks.clear()
    fuse_se_blocks(model, neighbours=True)
    watch._forward_hooks.update(handles)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], first, rtol=1e-4, atol=1e-4)


def test_neighbours_that_change() -> None:
    model = _block()
    x = _x(2, 3, 11, 9)
    fuse_se_blocks(model, neighbours=True)
    model[0].append(nn.Dropout2d(0.0))
    _assert_same(model, x)
    model[0][2] = nn.Hardswish()
    _assert_same(model, x)
    model.append(nn.Sigmoid())
    _assert_same(model, x)
    unfuse_se_blocks(model[1])
    assert "senet_kernels::native_forward" not in _operations(model, x)


@pytest.mark.parametrize("before", ["nothing", "identity", "nested", "convolution"])
def test_neighbours_that_overwrite_a_shortcut(before: str) -> None:
    """An activation in place changes what its caller holds, unless a layer has just made it."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.ReLU(inplace=True)
            first: dict[str, tuple[nn.Module, ...]] = {
                "nothing": (act,), "identity": (nn.Identity(), act),
                "nested": (nn.Sequential(nn.Dropout(0.5), act),),
                "convolution": (nn.Conv2d(24, 24, 1), act),
            }  # fmt: skip
            self.branch = nn.Sequential(*first[before], SELayer(), nn.Conv2d(24, 24, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            return x + self.branch(x)  # type: ignore[no-any-return]

    model = PreActivation().eval()
    original = copy.deepcopy(model)
    report = fuse_se_blocks(model, neighbours=True)
    x = _x(2, 24, 5, 7)
    torch.testing.assert_close(model(x), original(x))
    joined = [e for e in report.replaced if e.note == "neighbours: before relu"]
    assert bool(joined) == (before == "convolution")


def test_neighbours_of_a_block_whose_excitation_is_taken_out() -> None:
    timm = library("timm")
    model = timm.models.resnet.BasicBlock(32, 32, attn_layer="se").eval()
    fuse_se_blocks(model, neighbours=True)
    model.se = None
    original = copy.deepcopy(model)
    unfuse_se_blocks(original)
    x = _x(2, 32, 6, 6)
    assert torch.equal(model(x), original(x))


def test_functions_of_subclasses_are_unknown() -> None:
    class QuickGELU(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    timm = library("timm")
    model = timm.layers.SEModule(32, rd_channels=8, act_layer=QuickGELU).eval()
    with pytest.raises(ValueError, match="no kernel has the function of its child act"):
        fuse_se_blocks(model, strict=True)


def test_random_numbers_of_others_are_left_alone() -> None:
    model = SELayer()
    state = torch.get_rng_state()
    assert fuse_se_blocks(model).replaced
    assert torch.equal(torch.get_rng_state(), state)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


_UNDER: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "another default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("under", _UNDER.values(), ids=_UNDER)
def test_converted_under(under: Callable[[], AbstractContextManager[Any]]) -> None:
    """What is seen of a module does not depend on the mode that its model is converted in."""
    model = nn.Sequential(SELayer(), SELayer(bias=True))
    x = _x(2, 24, 5, 4)
    expected = model(x)
    with under():
        report = fuse_se_blocks(model)
    assert len(report.replaced) == 2
    torch.testing.assert_close(model(x), expected)


def test_names_that_only_sound_alike() -> None:
    class SqueezeBertPooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.dense(x))

    assert not fuse_se_blocks(SqueezeBertPooler(), strict=True).refused


def test_neighbours_refused() -> None:
    class Home(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.se = nn.ReLU(), SELayer()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.se(self.act(x))
            return y

    model = nn.ModuleDict({"home": Home(), "bare": nn.Sequential(SELayer(), nn.Conv2d(24, 3, 1))})
    report = fuse_se_blocks(model, neighbours=True)
    assert len(report.replaced) == 2
    assert [(e.name, e.note) for e in report.refused] == [
        ("home", "neighbours: a block of this class is not known"),
        ("bare", "neighbours: no activation that may join stands beside its one excitation"),
    ]
    _assert_same(model["home"], _x())


def test_neighbours_know_a_block_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = library("timm")
    model = timm.create_model("seresnet18")
    block = type(model.layer1[0])

    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.conv1(x)
        return y

    monkeypatch.setattr(block, "forward", forward)
    report = fuse_se_blocks(model, neighbours=True)
    assert len(report.replaced) == 8
    assert {e.note for e in report.refused} == {
        "neighbours: its forward is not the one that is known (another release?)"
    }


class _Half(nn.Module):
    """As stochastic depth was at first: a factor in eval, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


@pytest.mark.parametrize("name", ["seresnet18", "seresnet50"])
def test_stochastic_depth_of_any_kind(name: str) -> None:
    """None, timm's, another's, one that is watched, and one that is training by itself."""
    timm = library("timm")
    model = timm.create_model(name, drop_path_rate=0.3).eval()
    randomise(model)
    seen: list[Tensor] = []
    blocks = [model.layer1[1], model.layer2[0], model.layer2[1], model.layer3[0]]
    blocks[0].drop_path = nn.Identity()
    blocks[1].drop_path = _Half()
    blocks[2].drop_path.train()
    blocks[3].drop_path.register_forward_hook(lambda m, given, y: seen.append(y))
    fused = copy.deepcopy(model)
    report = fuse_se_blocks(fused, neighbours=True)
    assert sum("after relu" in entry.note for entry in report.replaced) >= 8
    results, calls = [], []
    for m in (model, fused):
        torch.manual_seed(3)
        seen.clear()
        with torch.no_grad():
            results.append(m(_x(4, 3, 64, 64)))
        calls.append(len(seen))
    assert calls == [1, 1]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["seresnet18", "efficientnet_b0"])
def test_neighbours_in_training(name: str) -> None:
    """Batch statistics, stochastic depth and autocast are the original's."""
    timm = library("timm")
    model = timm.create_model(name, drop_path_rate=0.3).train()
    randomise(model)
    other = copy.deepcopy(model)
    fuse_se_blocks(model, neighbours=True)
    x = _x(4, 3, 64, 64)
    for dtype in (None, torch.bfloat16):
        results = []
        for m in (model, other):
            torch.manual_seed(5)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                y = m(x)
            y.float().square().mean().backward()
            results.append(y)
        tolerance = 1e-3 if dtype is None else 0.1
        assert results[0].dtype == results[1].dtype
        error = (results[0] - results[1]).abs().max() / results[1].abs().max()
        assert error < tolerance, error
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
