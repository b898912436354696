"""What a module's forward asks for and is changed in place after fusing; and who redefines the
functions that its layers call."""

from __future__ import annotations

import array
import collections
import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from senet_kernels import fuse_se_blocks
from senet_kernels.converted import _stale_reason
from senet_kernels.watched import as_it_is


class SE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(16, 4, 1), nn.ReLU()
        self.fc2, self.gate = nn.Conv2d(4, 16, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(z))))


class ConfiguredSE(SE):
    """Scaled by what ``use`` finds in its configuration, 1 when it is fused."""

    def __init__(self, config: Any, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.config, self.use = config, use

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.use(self.config)


class Slots:
    __slots__ = ("v",)

    def __init__(self) -> None:
        self.v = 1.0


class Config:
    def __init__(self) -> None:
        self.v, self.inner = 1.0, types.SimpleNamespace(v=1.0)


def _of_key(config: Any) -> Any:
    return config["v"]


def _of_name(config: Any) -> Any:
    return config.v


def _first(config: Any) -> Any:
    return config[0]


def _itself(config: Any) -> Any:
    return config


def _set_name(config: Any) -> None:
    config.v = 3.0


def _set_key(config: Any) -> None:
    config["v"] = 3.0


def _set_first(config: Any) -> None:
    config[0] = 3.0


#: How it is made, what of it is used, how it is changed.
_CONFIGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "object": (Config, _of_name, _set_name),
    "inner object": (Config, lambda c: c.inner.v, lambda c: _set_name(c.inner)),
    "slots": (Slots, _of_name, _set_name),
    "class": (lambda: type("Namespace", (), {"v": 1.0}), _of_name, _set_name),
    "namespace": (lambda: types.SimpleNamespace(v=1.0), _of_name, _set_name),
    "ordered dict": (lambda: collections.OrderedDict(v=1.0), _of_key, _set_key),
    "default dict": (lambda: collections.defaultdict(float, v=1.0), _of_key, _set_key),
    "user dict": (lambda: collections.UserDict(v=1.0), _of_key, _set_key),
    "deque": (lambda: collections.deque([1.0]), _first, _set_first),
    "array": (lambda: array.array("d", [1.0]), _first, _set_first),
    "nested": (lambda: [{"a": (Config(),)}], lambda c: c[0]["a"][0].v,
               lambda c: _set_name(c[0]["a"][0])),
    "partial": (lambda: functools.partial(_of_key, {"v": 1.0}), lambda c: c(),
                lambda c: _set_key(c.args[0])),
    "tensor": (lambda: torch.ones(()), _itself, lambda c: c.fill_(3)),
    "tensor.data": (lambda: torch.ones(()), _itself, lambda c: c.data.fill_(3)),
    "module that is no child": (lambda: [nn.LeakyReLU(1.0)], lambda c: -c[0](-torch.ones(())),
                                lambda c: setattr(c[0], "negative_slope", 3.0)),
}  # fmt: skip


#: Watched at each call; a forward that asks for another is refused.
_FUSED = ("ordered dict", "default dict", "deque")


def _numpy() -> Any:
    return pytest.importorskip("numpy").ones(())


_CONFIGS["numpy"] = (_numpy, float, lambda c: c.__setitem__((), 3.0))


def _same(plain: nn.Module, fused: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in _CONFIGS), ("inner object", True), ("tensor", True),
     ("ordered dict", True)],
)  # fmt: skip
def test_changed_in_place(name: str, compiled: bool) -> None:
    torch.compiler.reset()
    make, use, change = _CONFIGS[name]
    torch.manual_seed(0)
    fused = ConfiguredSE(make(), use)
    plain = SE()
    plain.load_state_dict(fused.state_dict())
    report = fuse_se_blocks(fused)
    assert bool(report.replaced) == (name in _FUSED)
    if report.replaced:
        assert _stale_reason(fused) is None
        assert _stale_reason(copy.deepcopy(fused)) is None
    else:
        assert report.refused
    x = torch.randn(2, 16, 5, 5)
    call = torch.compile(fused, backend="eager") if compiled else fused
    _same(plain, call, x)
    change(fused.config)
    torch.testing.assert_close(call(x), 3 * plain(x), rtol=1e-4, atol=1e-5)


def test_pickled_with_its_configuration() -> None:
    fused = ConfiguredSE(collections.OrderedDict(v=1.0), _of_key)
    assert fuse_se_blocks(fused).replaced
    again = pickle.loads(pickle.dumps(fused))
    assert _stale_reason(again) is None
    _set_key(again.config)
    assert _stale_reason(again) is not None


def test_what_is_too_large_is_refused() -> None:
    report = fuse_se_blocks(ConfiguredSE([Config() for _ in range(100)], lambda c: c[0].v))
    assert not report.replaced
    loop: list[Any] = []
    loop.append(loop)
    for config in (loop, torch.ones(10_000)):
        assert not fuse_se_blocks(ConfiguredSE(config, lambda c: 1.0)).replaced


def test_a_class_that_is_asked_for_is_left_alone() -> None:
    class Registered(SE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * {Registered: 1.0}[type(self)]

    assert not fuse_se_blocks(Registered()).replaced


def test_equal_values_are_equal() -> None:
    for make, _, change in _CONFIGS.values():
        value = make()
        kept = as_it_is(value)
        assert kept == as_it_is(value)
        assert bool(kept == value)
        change(value)
        assert not bool(kept == value)


def _is_convolution(function: Any) -> bool:
    return function in (F.conv2d, torch.ops.aten.convolution.default)


def _doubled(function: Any, args: Any, kwargs: Any) -> Any:
    y = function(*args, **(kwargs or {}))
    return 2 * y if _is_convolution(function) else y


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _doubled(f, args, kwargs)


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _doubled(f, args, kwargs)


class Doubling(Tensor):
    @classmethod
    def __torch_function__(cls, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(f, t, args, kwargs or {})
        return 2 * y if _is_convolution(f) else y


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = SE()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    return plain, fused


@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_modes_that_redefine_convolution(mode: Any) -> None:
    plain, fused = _pair()
    with mode():
        _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_a_subclass_that_redefines_convolution() -> None:
    plain, fused = _pair()
    _same(plain, fused, torch.randn(2, 16, 5, 5).as_subclass(Doubling))


@pytest.mark.parametrize("what", ["_conv_forward", "conv2d"])
def test_patched_layers(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    plain, fused = _pair()
    owner: Any = nn.Conv2d if what == "_conv_forward" else F
    was = getattr(owner, what)
    monkeypatch.setattr(owner, what, functools.wraps(was)(lambda *args: 2 * was(*args)))
    _same(plain, fused, torch.randn(2, 16, 5, 5))
    report = fuse_se_blocks(SE())
    assert not report.replaced
    monkeypatch.undo()
    assert fuse_se_blocks(SE()).replaced


class Observing(TorchFunctionMode):
    def __torch_function__(self, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
        return f(*args, **(kwargs or {}))


def test_no_argument_is_a_proxy_because_a_mode_is_on() -> None:
    from senet_kernels.tensors import proxies

    with Observing():
        assert proxies(torch.ones(1), None, [3], (torch.ones(1), None)) == ()
