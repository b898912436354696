"""What was checked when a module was fused is checked when it is called: its layers' extents and
settings, its children, its own flags, and what autocast makes of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor, nn

from models import library
from senet_kernels import FusedSEBlock, fuse_se_blocks, unfuse_se_blocks


class SE(nn.Module):
    """Layers, activation, gate and pool as children; a flag and a function of its own."""

    def __init__(self, channels: int = 16, hidden: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act: nn.Module = nn.LeakyReLU(0.01)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.gate = torch.sigmoid
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))
        y: Tensor = x * g.mean((2, 3), keepdim=True)
        return y + y if self.twice else y


def _pair(make: Callable[[], nn.Module] = SE) -> tuple[nn.Module, nn.Module]:
    """The plain module and the fused one."""
    torch.manual_seed(0)
    plain = make()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    return plain, fused


def _same(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Outputs and gradients, or the same error."""
    outcomes: list[Any] = []
    for module in (plain, fused):
        leaf = x.clone().requires_grad_()
        try:
            y = module(leaf)
        except Exception as error:
            outcomes.append((type(error), str(error)))
        else:
            parameters = [p for p in module.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(
                y.square().sum(), [leaf, *parameters], materialize_grads=True
            )
            outcomes.append((y, *gradients))
    if isinstance(outcomes[0][0], type):
        assert outcomes[1] == outcomes[0]
    else:
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "groups": lambda m: (
        setattr(m.fc1, "groups", 2),
        setattr(m.fc1, "weight", nn.Parameter(m.fc1.weight[:, :8].clone())),
    ),
    "padding": lambda m: setattr(m.fc2, "padding", (1, 1)),
    "padding mode": lambda m: (
        setattr(m.fc1, "padding", (1, 1)),
        setattr(m.fc1, "padding_mode", "circular"),
        setattr(m.fc1, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "kernel of another size": lambda m: setattr(m, "fc1", nn.Conv2d(16, 4, 3, padding=1)),
    "grouped child": lambda m: setattr(m, "fc2", nn.Conv2d(4, 16, 1, groups=2)),
    "strided pool": lambda m: setattr(m, "pool", nn.AdaptiveAvgPool2d(2)),
    "pool's size": lambda m: setattr(m.pool, "output_size", 3),
    "other hidden width": lambda m: (
        setattr(m, "fc1", nn.Conv2d(16, 7, 1)), setattr(m, "fc2", nn.Conv2d(7, 16, 1)),
    ),
    "without bias": lambda m: setattr(m, "fc1", nn.Conv2d(16, 4, 1, bias=False)),
    "other weights": lambda m: nn.init.normal_(m.fc1.weight),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.5),
    "activation of another slope": lambda m: setattr(m, "act", nn.LeakyReLU(0.7)),
    "activation of another class": lambda m: setattr(m, "act", nn.SiLU()),
    "gate": lambda m: setattr(m, "gate", torch.tanh),
    "flag of its own": lambda m: setattr(m, "twice", True),
    "layer frozen": lambda m: m.fc1.requires_grad_(False),
    "in place": lambda m: setattr(m.act, "inplace", True),
    "pruned": lambda m: nn.utils.prune.l1_unstructured(m.fc1, "weight", 0.5),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.fc1.eval()),
    "child removed": lambda m: setattr(m, "act", None),
}  # fmt: skip


@pytest.mark.parametrize("when", ["changed", "changed and copied", "pickled and changed"])
@pytest.mark.parametrize("name", _CHANGES)
def test_changes_after_fusing(name: str, when: str) -> None:
    """Computed as the plain module with the same change computes."""
    import torch.nn.utils.prune

    plain, fused = _pair()
    if when == "pickled and changed":
        fused = pickle.loads(pickle.dumps(fused))
    for module in (plain, fused):
        torch.manual_seed(1)
        _CHANGES[name](module)
    if when == "changed and copied" and name != "pruned":  # torch cannot copy its weight
        fused = copy.deepcopy(fused)
    _same(plain, fused, torch.randn(2, 16, 5, 5))


_COMPILED_CHANGES: dict[str, Callable[[Any], Any]] = {
    **{n: _CHANGES[n] for n in ("padding", "slope", "gate", "flag of its own", "pool's size")},
    "forward of a child": lambda m: setattr(m.act, "forward", torch.tanh),
    "forward of a layer": lambda m: setattr(m.fc1, "forward", lambda z: 2 * z[:, :4]),
}  # fmt: skip


@pytest.mark.parametrize("name", _COMPILED_CHANGES)
def test_a_change_is_seen_by_compiled_code(name: str) -> None:
    plain, fused = _pair()
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager")
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(compiled(x), plain(x))
    for module in (plain, fused):
        _COMPILED_CHANGES[name](module)
    torch.testing.assert_close(compiled(x), plain(x))


def test_what_changes_nothing_keeps_the_kernels(
    record_ops: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruners correct the extents, frameworks add attributes."""
    _, fused = _pair()
    block: Any = fused
    with torch.no_grad():
        block.fc1.weight = nn.Parameter(block.fc1.weight[:2, :8].clone())
        block.fc1.bias = nn.Parameter(block.fc1.bias[:2].clone())
        block.fc2.weight = nn.Parameter(block.fc2.weight[:8, :2].clone())
        block.fc2.bias = nn.Parameter(block.fc2.bias[:8].clone())
    block.fc1.in_channels, block.fc1.out_channels = 8, 2
    block.fc2.in_channels, block.fc2.out_channels = 2, 8
    block.act.inplace = True
    block.fc1.macs = 0
    block.name = "of a framework"
    block.eval()
    with torch.no_grad():
        y = block(torch.randn(2, 8, 5, 5))
    assert y.shape == (2, 8, 5, 5)
    assert record_ops() == {"senet_kernels::native_forward"}


@pytest.mark.parametrize("channels", [16, 12, 8, 4, 17])
@pytest.mark.parametrize("autocast", [False, True])
def test_elastic_widths(channels: int, autocast: bool) -> None:
    """As many channels as x has (once-for-all, slimmable networks)."""

    class Elastic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            c, r = x.shape[1], x.shape[1] // 4
            z = x.mean((2, 3), keepdim=True)
            h = torch.relu(F.conv2d(z, self.squeeze.weight[:r, :c], self.squeeze.bias[:r]))
            u = F.conv2d(h, self.expand.weight[:c, :r], self.expand.bias[:c])
            return x * torch.sigmoid(u)

    plain, fused = _pair(Elastic)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if channels == 17:
            with pytest.raises(RuntimeError) as theirs:
                plain(torch.randn(2, 17, 5, 5))
            with pytest.raises(RuntimeError) as ours:
                fused(torch.randn(2, 17, 5, 5))
            assert str(ours.value) == str(theirs.value)
        else:
            x = torch.randn(2, channels, 5, 5)
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-2, atol=1e-2)


def test_elastic_widths_compiled() -> None:
    class Elastic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            c = x.shape[1]
            h = torch.relu(F.linear(x.mean((2, 3)), self.fc1.weight[:, :c], self.fc1.bias))
            u = F.linear(h, self.fc2.weight[:c], self.fc2.bias[:c])
            return x * torch.sigmoid(u)[:, :, None, None]

    plain, fused = _pair(Elastic)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for c in (16, 12, 5):
        x = torch.randn(2, c, 5, 5)
        torch.testing.assert_close(compiled(x), plain(x))


# ---- FusedSEBlock trusts its layers ----


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"weighted_sum": True}, {"excitation": "constant"}, {"excitation": "single"},
     {"excitation": "tied"}, {"before": "silu", "after": "relu"}],
    ids=str,
)  # fmt: skip
def test_a_pruned_block(options: dict[str, Any], hooked: bool) -> None:
    block = FusedSEBlock(16, reduction=4, **options).eval()
    small = FusedSEBlock(8, hidden=2 if "excitation" not in options else None, **options).eval()
    if options.get("excitation") == "tied":
        small = FusedSEBlock(8, hidden=2, **options).eval()
    for (name, p), q in zip(block.named_parameters(), small.parameters(), strict=True):
        owner, _, last = name.rpartition(".")
        sliced = p.detach()[tuple(slice(n) for n in q.shape)].clone()
        setattr(block.get_submodule(owner), last, nn.Parameter(sliced))
        with torch.no_grad():
            q.copy_(sliced)
    if hooked:
        for child in block.children():
            child.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), small(x))
    assert "channels=8" in repr(block)
    if small.hidden is not None:
        assert "hidden=2" in repr(block)
    with pytest.raises(ValueError, match=r"expected .*8"):
        block(torch.randn(2, 16, 4, 4))


# ---- autocast ----


def _excite(m: Any, x: Tensor) -> Tensor:
    u: Tensor = m.fc2(torch.relu(m.fc1(x.mean((2, 3)))))
    return torch.sigmoid(u)[:, :, None, None]


def _island(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        x = x.to(m.fc1.weight.dtype)
        return x * _excite(m, x)


def _island_by_device(m: Any, x: Tensor) -> Tensor:
    with torch.amp.autocast(device_type=x.device.type, enabled=False):
        x = x.to(m.fc1.weight.dtype)
        return x * _excite(m, x)


def _island_of_the_excitation(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        g = _excite(m, x.to(m.fc1.weight.dtype))
    return x * g.to(x.dtype)


def _casts_without_an_island(m: Any, x: Tensor) -> Tensor:
    return x.to(m.fc1.weight.dtype) * _excite(m, x.to(m.fc1.weight.dtype))


def _returns_the_dtype_of_x(m: Any, x: Tensor) -> Tensor:
    y: Tensor = (x.to(m.fc1.weight.dtype) * _excite(m, x.to(m.fc1.weight.dtype))).to(x.dtype)
    return y


def _ordinary(m: Any, x: Tensor) -> Tensor:
    return x * _excite(m, x)


_ISLANDS = (_island, _island_by_device, _island_of_the_excitation, _casts_without_an_island,
            _returns_the_dtype_of_x, _ordinary)  # fmt: skip


class Island(nn.Module):
    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", _ISLANDS)
def test_modules_that_leave_autocast(
    compute: Callable[[Any, Tensor], Tensor],
    dtype: torch.dtype,
    record_ops: Callable[[], set[str]],
) -> None:
    plain, fused = Island(compute), Island(compute)
    fused.load_state_dict(plain.state_dict())
    # One that asks for the device is left alone, and so equal.
    replaced = bool(fuse_se_blocks(fused).replaced)
    assert replaced == (compute is not _island_by_device)
    x = torch.randn(2, 16, 5, 5)
    record_ops()
    torch.testing.assert_close(fused(x), plain(x))
    assert bool(record_ops()) == replaced
    with torch.autocast("cpu", torch.bfloat16):
        got, right = fused(x.to(dtype)), plain(x.to(dtype))
    assert got.dtype == right.dtype
    exact = dtype == torch.float32 and compute is not _ordinary
    torch.testing.assert_close(got, right, **({} if exact else {"rtol": 2e-2, "atol": 2e-2}))
    assert bool(record_ops()) == (compute is _ordinary)


def test_of_nemo_like_modules_in_half_precision() -> None:
    """Weights in float32, x in bfloat16, no autocast: the plain module casts by itself."""
    plain, fused = _pair(partial(Island, _casts_without_an_island))
    x = torch.randn(2, 16, 5, 5).bfloat16()
    assert fused(x).dtype == plain(x).dtype == torch.float32
    torch.testing.assert_close(fused(x), plain(x))


# ---- blocks around a module ----


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "drop_path", nn.Dropout(0.0)),
        lambda m: setattr(m.se.fc1, "padding", (1, 1)),
        lambda m: setattr(m, "act2", nn.SiLU()),
        lambda m: setattr(m.se, "fc2", nn.Conv2d(8, 16, 1, groups=2)),
        lambda m: m.se.fc1.register_forward_hook(lambda *_: None),
        lambda m: unfuse_se_blocks(m.se),
    ],
)
def test_a_block_whose_module_changed(change: Callable[[Any], Any]) -> None:
    resnet = library("timm.models.resnet")
    layers = library("timm.layers")
    plain = resnet.BasicBlock(16, 16, attn_layer=partial(layers.SEModule, rd_channels=8)).eval()
    fused = copy.deepcopy(plain)
    assert len(fuse_se_blocks(fused, neighbours=True).replaced) == 2
    for module in (plain, fused):
        torch.manual_seed(1)
        change(module)
    _same(plain, fused, torch.randn(2, 16, 7, 7))


# ---- what hides or replaces a part of a class ----


class Flagged(SE):
    """Flags and functions of the class, and of other kinds than numbers."""

    residual = False
    squash = staticmethod(torch.sigmoid)

    def __init__(self) -> None:
        super().__init__()
        self._half = False
        self.table = {"power": 1}
        self.sizes = [1, 1]

    def scaled(self, x: Tensor, g: Tensor) -> Tensor:
        return x * g

    def forward(self, x: Tensor) -> Tensor:
        z = F.adaptive_avg_pool2d(x, self.sizes).mean((2, 3), keepdim=True)
        if self.sizes != [1, 1]:
            z = z + 1
        g = self.squash(self.fc2(self.act(self.fc1(z))))
        y = self.scaled(x, g ** self.table["power"] if self.table["power"] != 1 else g)
        y = y / 2 if self._half else y
        y = y * getattr(self, "temperature", 1.0)
        return y + x if self.residual else y


def _other_scale(self: Any, x: Tensor, g: Tensor) -> Tensor:
    return x * g * 3


_HIDDEN: dict[str, Callable[[Any], Any]] = {
    "flag of the class": lambda m: setattr(m, "residual", True),
    "function of the class": lambda m: setattr(m, "squash", torch.tanh),
    "private flag": lambda m: setattr(m, "_half", True),
    "dictionary": lambda m: m.table.update(power=2),
    "list": lambda m: m.sizes.__setitem__(0, 2),
    "other list": lambda m: setattr(m, "sizes", [2, 2]),
    "method": lambda m: setattr(m, "scaled", _other_scale.__get__(m)),
    "what need not be there": lambda m: setattr(m, "temperature", 3.0),
    "parameter that need not be there": lambda m: setattr(
        m, "temperature", nn.Parameter(torch.ones(()) * 2)
    ),
    "convolution of a layer": lambda m: setattr(
        m.fc1, "_conv_forward", lambda z, w, b: F.conv2d(z, w * 2, b)
    ),
    "tensor in the place of a number": lambda m: setattr(m, "_half", torch.ones(())),
    "two rows for a channel": lambda m: setattr(m, "fc2", nn.Conv2d(4, 32, 1)),
}


@pytest.mark.parametrize(
    "when",
    ["eager", "copied", "compiled before", "exported",
     # What is compiled before the change is compiled after it, too.
     pytest.param("compiled", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("name", _HIDDEN)
def test_attributes_that_hide_or_change(name: str, when: str) -> None:
    plain, fused = _pair(Flagged)
    x = torch.randn(2, 16, 5, 5)
    modules: list[Any] = [plain, fused]
    if when.startswith("compiled"):
        if name == "two rows for a channel":
            pytest.skip("an error, in other words")
        torch._dynamo.reset()
        modules = [torch.compile(m, backend="eager") for m in modules]
    if when == "compiled before":
        _same(*modules, x)
    for module in (plain, fused):
        torch.manual_seed(1)
        _HIDDEN[name](module)
    if when == "copied":
        modules[1] = copy.deepcopy(fused)
    if when == "exported":
        if name in ("two rows for a channel", "tensor in the place of a number"):
            pytest.skip("an error")
        modules = [torch.export.export(m, (x,), strict=True).module() for m in modules]
        torch.testing.assert_close(modules[1](x), modules[0](x), rtol=1e-4, atol=1e-5)
    else:
        _same(*modules, x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*is not the class that was fused")
@pytest.mark.parametrize("name", ["scaled", "forward", "residual"])
def test_a_class_that_is_patched_after_fusing(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = _pair(Flagged)
    new = {
        "scaled": _other_scale,
        "forward": lambda self, x: sum(p.sum() for p in self.parameters()) * x,
        "residual": True,
    }
    monkeypatch.setattr(Flagged, name, new[name])
    for module in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        modules: list[Any] = [plain, module]
        if compiled:
            torch._dynamo.reset()
            modules = [torch.compile(m, backend="eager") for m in modules]
        _same(*modules, torch.randn(2, 16, 5, 5))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.LeakyReLU, nn.AdaptiveAvgPool2d])
def test_a_class_of_a_child_that_is_patched_after_fusing(
    kind: Any, copied: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = _pair()
    original = kind.forward
    if copied:
        fused = pickle.loads(pickle.dumps(fused))
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.5 * original(self, x))
    if compiled:
        torch._dynamo.reset()
        plain, fused = (torch.compile(m, backend="aot_eager") for m in (plain, fused))
    _same(plain, fused, torch.randn(2, 16, 5, 5))
    assert not fuse_se_blocks(SE()).replaced


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_known_class_that_is_patched_before_fusing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    se = library("timm.layers").SEModule
    block = se(16, rd_channels=4)
    monkeypatch.setattr(se if where == "class" else block, "forward", lambda *a: a[-1] * 3)
    report = fuse_se_blocks(block)
    assert not report.replaced
    assert "forward" in report.refused[0].note


def test_a_child_runs_once_where_no_kernel_does() -> None:
    """SCSE's spatial half is computed for the kernels and by the original, not by both."""
    import torch.autograd.forward_ad as fwAD

    scse = library("segmentation_models_pytorch.base.modules").SCSEModule(16, 4)
    assert fuse_se_blocks(scse).replaced
    runs: list[int] = []
    scse.sSE.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(2, 16, 5, 5)
    with fwAD.dual_level():
        scse(fwAD.make_dual(x, x))
    assert len(runs) == 1


def test_an_error_of_a_hook_is_raised_once() -> None:
    _, fused = _pair()
    times: list[int] = []

    def pack(t: Tensor) -> Tensor:
        times.append(1)
        raise ValueError("of the hook")

    fused(torch.randn(2, 16, 5, 5))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, pytest.raises(ValueError, match="of the hook"):
        fused(torch.randn(2, 16, 5, 5))
    assert len(times) == 1


def test_a_conversion_is_all_or_nothing() -> None:
    class Frozen(SE):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__" or name.startswith("_senet"):
                raise AttributeError(f"{name} is frozen")
            super().__setattr__(name, value)

    model = nn.Sequential(SE(), Frozen(), SE())
    with pytest.raises(TypeError, match="Frozen"):
        fuse_se_blocks(model)
    assert [type(m).__name__ for m in model] == ["SE", "Frozen", "SE"]
    assert "_senet_form" not in vars(model[0])


@pytest.mark.parametrize("backend", ["native", None])
@pytest.mark.parametrize("what", ["trace", "forward mode"])
def test_what_is_without_kernels_is_so_for_every_choice(what: str, backend: str | None) -> None:
    import torch.autograd.forward_ad as fwAD

    plain, fused = _pair()
    fuse_se_blocks(fused, backend=backend)
    block = FusedSEBlock(16, hidden=4, activation="leaky_relu", backend=backend)
    block.load_state_dict(fused.state_dict())
    x = torch.randn(2, 16, 5, 5)
    for module in (fused, block):
        if what == "trace":
            torch.testing.assert_close(torch.jit.trace(module, x)(x), plain(x))
        else:
            with fwAD.dual_level():
                tangent = fwAD.unpack_dual(module(fwAD.make_dual(x, x))).tangent
            assert tangent is not None


# ---- what others do to classes ----


def test_scripting_a_fused_module() -> None:
    plain, fused = _pair()
    x = torch.randn(2, 16, 5, 5)
    for parent in (fused, nn.Sequential(fused)):
        torch.testing.assert_close(torch.jit.script(parent)(x), plain(x))


class _OwnCopies(SE):
    def __reduce__(self) -> Any:
        return (_OwnCopies, (), self.__dict__)


def test_a_class_that_is_copied_in_its_own_way_is_refused() -> None:
    report = fuse_se_blocks(_OwnCopies())
    assert not report.replaced
    assert "__reduce__" in report.refused[0].note


def test_unfusing_keeps_what_others_made_of_a_class() -> None:
    _, fused = _pair()
    fused.register_parameter("scale", nn.Parameter(torch.ones(3)))
    nn.utils.parametrize.register_parametrization(fused, "scale", nn.Identity())
    with pytest.raises(TypeError, match="undo first"):
        unfuse_se_blocks(fused)
    nn.utils.parametrize.remove_parametrizations(fused, "scale")
    assert unfuse_se_blocks(fused) == 1
    assert type(fused) is SE


def test_a_class_attribute_that_is_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SE, "table", torch.ones(2), raising=False)
    plain, fused = _pair()
    monkeypatch.setattr(SE, "table", torch.ones(2))
    _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_an_eca_convolution_of_more_outputs() -> None:
    plain, fused = _pair(lambda: library("timm.layers").EcaModule(16))
    for module in (plain, fused):
        module.conv = nn.Conv1d(1, 2, 3, padding=1, bias=False)
        with pytest.raises(RuntimeError):
            module(torch.randn(2, 16, 5, 5))


def test_fusing_another_model_does_not_recompile() -> None:
    _, fused = _pair()
    compiled = torch.compile(fused, backend="eager")
    x = torch.randn(2, 16, 5, 5)
    compiled(x)

    class OtherActivation(nn.LeakyReLU):
        pass

    other = SE()
    other.act = OtherActivation(0.01)
    assert fuse_se_blocks(other).replaced
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)


class ConstantGates(nn.Module):
    """Gates are constants where a weight needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Conv2d(16, 4, 1), nn.Dropout(), nn.Conv2d(4, 16, 1)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1.weight.requires_grad:
            return x * self.gate(x)
        with torch.no_grad():
            g = self.gate(x)
        return x * g


class Raising(ConstantGates):
    """Not to be run with gradients and frozen weights."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.fc1.weight.requires_grad:
            raise RuntimeError("frozen")
        return x * self.gate(x)


class OfAChildsMode(ConstantGates):
    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gate(x)
        return y if self.drop.training == self.training else 2 * y


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [ConstantGates, Raising, OfAChildsMode])
def test_flags_that_a_forward_asks_for(kind: Callable[[], nn.Module], compiled: bool) -> None:
    """Frozen in part or as a whole, children in another mode: proven, or the original."""
    plain, fused = _pair(kind)
    changes: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda m: m,
        "first layer": lambda m: m.fc1.requires_grad_(False),
        "all": lambda m: m.requires_grad_(False),
        "second layer": lambda m: m.requires_grad_(True).fc2.requires_grad_(False),
        "mode of a child": lambda m: m.drop.eval(),
    }
    calls: list[Any] = [plain, fused]
    if compiled:
        torch._dynamo.reset()
        calls = [torch.compile(m, backend="eager") for m in (plain, fused)]
    x = torch.randn(2, 16, 5, 5)
    for change in changes.values():
        for module in (plain, fused):
            change(module)
        _same(*calls, x)
        with torch.no_grad():
            outcomes = [call(x) for call in calls]
            torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


def test_the_layout_of_channels_outside_images() -> None:
    """A product is laid out as its first factor, which is the gates in torchvision's module."""
    plain = library("torchvision").ops.SqueezeExcitation(16, 4)
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    x = torch.randn(16, 3, 5, 5).transpose(0, 1)
    for given in (x, x[:1], x.to(memory_format=torch.channels_last), x.contiguous(), x[:, :, ::2]):
        expected, y = plain(given), fused(given)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
