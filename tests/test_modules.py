"""``FusedSEBlock``: the same block as timm's and torchvision's, and a well-behaved module."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from backend_cases import BACKENDS, FUSED_BACKENDS, BackendCase
from problems import channels_last
from senet_kernels import BackendUnavailableError, FusedSEBlock, use_backend

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)

_SPACES = ((7,), (3, 5), (2, 3, 2))


def _optional(name: str) -> Any:
    """A package the suite can do without, absent or (torchvision for another torch) broken."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


class _HandWritten(nn.Module):
    """The block as people write it."""

    def __init__(self, channels: int, hidden: int, activation: str = "relu",
                 gate: str = "sigmoid", bias: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.activation, self.gate = oracle.FUNCTIONS[activation], oracle.FUNCTIONS[gate]

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(2).mean(2)[:, :, None, None]
        g = self.gate(self.fc2(self.activation(self.fc1(z))))
        return x * g.reshape(*g.shape[:2], *[1] * (x.dim() - 2))


def _results(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    block.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = block(leaf)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in block.named_parameters()}
    found = {"y": y.detach(), "x": leaf.grad, **grads}
    return {n: t for n, t in found.items() if t is not None}


def _same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    got, right = _results(ours, x), _results(theirs, x)
    assert set(got) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
        if name not in ("y", "x"):
            assert got[name].stride() == value.stride(), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "gate"), [("relu", "sigmoid"), ("silu", "hardsigmoid"), ("gelu", "tanh")]
)
@each_backend
def test_equals_the_hand_written_block(
    backend: BackendCase, activation: str, gate: str, bias: bool
) -> None:
    theirs = _HandWritten(12, 5, activation, gate, bias).to(backend.device)
    ours = FusedSEBlock(12, hidden=5, activation=activation, gate=gate, bias=bias,
                        backend=backend.name, device=backend.device)  # fmt: skip
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for space, last in itertools.product(_SPACES, (False, True)):
        x = torch.randn(2, 12, *space, device=backend.device)
        _same(ours, theirs, channels_last(x) if last else x)


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@each_backend
def test_equals_timm(backend: BackendCase, gate: str) -> None:
    timm = _optional("timm")
    layer = gate.replace("hard", "hard_")
    theirs = timm.layers.SEModule(32, rd_ratio=1 / 4, rd_divisor=1, gate_layer=layer)
    theirs.to(backend.device)
    ours = FusedSEBlock(32, 4, gate=gate, backend=backend.name, device=backend.device)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    _same(ours, theirs, torch.randn(3, 32, 6, 5, device=backend.device))
    last = {"memory_format": torch.channels_last}
    _same(ours.to(**last), theirs.to(**last),
          torch.randn(3, 32, 6, 5, device=backend.device).to(**last))  # fmt: skip


@each_backend
def test_equals_torchvision(backend: BackendCase) -> None:
    ops = _optional("torchvision.ops")
    theirs = ops.SqueezeExcitation(24, 6, activation=nn.SiLU).to(backend.device)
    ours = FusedSEBlock(24, hidden=6, activation="silu", backend=backend.name,
                        device=backend.device)  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    _same(ours, theirs, torch.randn(3, 24, 6, 5, device=backend.device))


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_loads_weights_of_any_rank(dimensions: int) -> None:
    block = FusedSEBlock(8, hidden=4)
    state = {
        n: t + 1 if t.dim() == 1 else (t + 1).reshape(*t.shape[:2], *[1] * (dimensions - 2))
        for n, t in block.state_dict().items()
    }
    given = {n: t.shape for n, t in state.items()}
    expected = {n: t + 1 for n, t in block.state_dict().items()}
    block.load_state_dict(state)
    assert {n: t.shape for n, t in state.items()} == given  # the caller's stay as they are
    for name, value in block.state_dict().items():
        assert torch.equal(value, expected[name])
    nested = nn.Sequential(nn.Identity(), block)
    nested.load_state_dict({f"1.{n}": t for n, t in state.items()})


@pytest.mark.parametrize("shape", [(4, 9), (4, 8, 3), (5, 8, 1, 1), (4, 8, 1, 1, 2)])
def test_refuses_weights_of_another_block(shape: tuple[int, ...]) -> None:
    block = FusedSEBlock(8, hidden=4)
    state = {**block.state_dict(), "fc1.weight": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=r"fc1\.weight"):
        block.load_state_dict(state)


def test_hidden_width() -> None:
    widths = [FusedSEBlock(c, r).hidden for c, r in ((64, 16), (8, 16), (100, 3))]
    assert widths == [4, 1, 33]
    assert FusedSEBlock(64, 16, hidden=7).hidden == 7
    assert FusedSEBlock(64, 16, hidden=7).fc1.weight.shape == (7, 64, 1, 1)
    assert FusedSEBlock(64, scale_and_shift=True).fc2.weight.shape == (128, 4, 1, 1)


def test_backend_is_one_there_is() -> None:
    with pytest.raises(ValueError, match=r"^backend: expected one of auto, .*'cudnn'"):
        FusedSEBlock(8, backend="cudnn")


def test_dtype_is_one_that_kernels_take() -> None:
    with pytest.raises(ValueError, match=r"^dtype: expected one of torch.float32, .*torch.int32"):
        FusedSEBlock(8, dtype=torch.int32)


@pytest.mark.parametrize("how", ["plain", "constant", "hooked"])
def test_wrong_inputs_are_named(how: str) -> None:
    block = FusedSEBlock(8, excitation="constant" if how == "constant" else "two")
    if how == "hooked":
        block.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got str"):
        block("x")
    with pytest.raises(ValueError, match=r"^x: expected .*8"):
        block(torch.randn(2, 7, 3, 3))


def test_alpha_and_beta_only_when_enabled() -> None:
    assert list(FusedSEBlock(8).state_dict()) == [
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    ]
    block = FusedSEBlock(8, weighted_sum=True)
    assert list(block.state_dict())[:2] == ["alpha", "beta"]
    plain = FusedSEBlock(8)
    block.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(block(x), plain(x))  # alpha 0, beta 1


@pytest.mark.parametrize("options", [
    {}, {"before": "silu", "after": "relu"}, {"scale_and_shift": True}, {"weighted_sum": True},
    {"bias": False, "activation": None, "gate": None},
], ids=str)  # fmt: skip
def test_options_reach_the_operation(options: dict[str, Any]) -> None:
    block = FusedSEBlock(8, hidden=4, **options)
    if block.alpha is not None:
        nn.init.normal_(block.alpha)
    x, residual = torch.randn(2, 8, 3, 5), torch.randn(2, 8, 3, 5)
    lengths = torch.tensor([4, 15])
    names = ("activation", "gate", "before", "after")
    expected = oracle.block(
        x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias,
        **{n: options.get(n, {"activation": "relu", "gate": "sigmoid"}.get(n)) or "identity"
           for n in names},
        residual=residual, alpha=block.alpha, beta=block.beta, lengths=lengths,
    )  # fmt: skip
    torch.testing.assert_close(block(x, residual, lengths), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(x, residual=residual, lengths=lengths), expected,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def _wrapped(kind: str) -> Callable[[], Any]:
    return {
        "deepcopy": lambda: copy.deepcopy,
        "pickle": lambda: lambda m: pickle.loads(pickle.dumps(m)),
        "torch.save": lambda: _through_file,
    }[kind]()


def _through_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_copies(kind: str) -> None:
    block = FusedSEBlock(8, hidden=4, gate="tanh", before="silu", weighted_sum=True)
    x = torch.randn(2, 8, 3, 5)
    block(x).sum().backward()  # used before it is copied
    other = _wrapped(kind)(block)
    assert torch.equal(other(x), block(x))
    assert str(other) == str(block)
    with torch.no_grad():
        other.fc1.weight.zero_()
    assert block.fc1.weight.abs().sum() > 0


def test_dtype_and_device_of_parameters() -> None:
    block = FusedSEBlock(8, dtype=torch.bfloat16, device="meta", weighted_sum=True)
    assert all(p.dtype == torch.bfloat16 and p.is_meta for p in block.parameters())
    assert FusedSEBlock(8).double()(torch.randn(1, 8, 2).double()).dtype == torch.float64


def test_repr_says_what_it_does() -> None:
    text = repr(FusedSEBlock(8, hidden=4, before="silu", weighted_sum=True, backend="reference"))
    for part in ("channels=8", "hidden=4", "before='silu'", "weighted_sum=True", "'reference'"):
        assert part in text


_HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("child", ["fc1", "fc2"])
@pytest.mark.parametrize("kind", _HOOKS)
def test_hooks_on_children_fire(kind: str, child: str) -> None:
    block = FusedSEBlock(8, hidden=4, before="silu", after="relu")
    x, residual = torch.randn(2, 8, 3, 5, requires_grad=True), torch.randn(2, 8, 3, 5)
    fused = block(x, residual)
    fired: list[str] = []
    handle = _HOOKS[kind](getattr(block, child), lambda *_: fired.append(kind))
    y = block(x, residual)
    y.sum().backward()
    assert fired
    torch.testing.assert_close(y, fused, rtol=1e-5, atol=1e-5)
    handle.remove()
    fired.clear()
    assert torch.equal(block(x, residual), fused)  # fused again
    assert not fired


def test_global_hooks_on_children_fire() -> None:
    """What profilers and feature extractors register."""
    block, seen = FusedSEBlock(8), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(torch.randn(1, 8, 3))
    finally:
        handle.remove()
    assert block.fc1 in seen
    assert block.fc2 in seen


def test_changed_children_are_really_called() -> None:
    """Parametrised, wrapped or replaced children run as they are."""
    x = torch.randn(2, 8, 3, 5)
    block = FusedSEBlock(8, hidden=4)
    nn.utils.parametrizations.weight_norm(block.fc1)
    torch.testing.assert_close(block(x), oracle.block(
        x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias))  # fmt: skip
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())

    block = FusedSEBlock(8, hidden=4)
    block.fc1 = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    right = _HandWritten(8, 4)
    right.fc1, right.fc2 = block.fc1, block.fc2
    torch.testing.assert_close(block.eval()(x), right.eval()(x), rtol=1e-5, atol=1e-5)

    block = FusedSEBlock(8, hidden=4)
    block.fc1 = nn.Conv2d(8, 4, 1, groups=2)  # not the matrix the kernels take
    right.fc1, right.fc2 = block.fc1, block.fc2
    torch.testing.assert_close(block(x), right(x), rtol=1e-5, atol=1e-5)


def test_weights_that_are_no_parameters() -> None:
    """A weight made elsewhere, by a hypernetwork say, in the place of a parameter."""
    block, right = FusedSEBlock(8, hidden=4), _HandWritten(8, 4)
    x, weights = torch.randn(2, 8, 3, 5), {}
    for name in ("fc1", "fc2"):
        weights[name] = torch.randn_like(getattr(block, name).weight).requires_grad_()
        for layer in (getattr(block, name), getattr(right, name)):
            del layer.weight
            layer.weight = weights[name] * 2
        getattr(right, name).bias = getattr(block, name).bias
    y = block(x)
    torch.testing.assert_close(y, right(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in weights.values())


@pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)
def test_explicit_backend_of_a_hooked_block(backend: BackendCase) -> None:
    """A backend asked for by name runs or raises; it does not silently become layer by layer."""
    x = torch.randn(1, 8, 3)
    block = FusedSEBlock(8, backend=backend.name)
    block.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendUnavailableError, match="fc1"):
        block(x)
    block.backend = None
    assert block(x).shape == x.shape
    with use_backend(backend.name), pytest.raises(BackendUnavailableError, match="fc1"):
        block(x)
