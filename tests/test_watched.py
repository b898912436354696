"""What a module's forward asks for and is changed in place after fusing; and who redefines the
functions that its layers call."""

from __future__ import annotations

import array
import collections
import copy
import functools
import pickle
import sys
import threading
import time
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
from senet_kernels.converted import stale_reason
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
        assert stale_reason(fused, fused._senet_form) is None
        again = copy.deepcopy(fused)
        assert stale_reason(again, again._senet_form) is None
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
    assert stale_reason(again, again._senet_form) is None
    _set_key(again.config)
    assert stale_reason(again, again._senet_form) is not None


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


# ---- code, and what it finds elsewhere, changed after fusing ----

FACTOR = 1.0


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _highest(x: Tensor) -> Tensor:
    return x.amax((2, 3), keepdim=True)


class Leaky(nn.Module):
    slope = 0.0

    def apply_to(self, x: Tensor) -> Any:
        return F.relu(x)

    def forward(self, x: Tensor) -> Any:
        return self.apply_to(x) if self.slope == 0 else F.leaky_relu(x, self.slope)


class OfGlobal(SE):
    def forward(self, x: Tensor) -> Any:
        return x * (self.gate(self.fc2(self.act(self.fc1(_pooled(x))))) * FACTOR)


class OfDefault(SE):
    def forward(self, x: Tensor, k: float = 1.0, *, more: float = 1.0) -> Any:
        return x * (self.gate(self.fc2(self.act(self.fc1(_pooled(x))))) * k * more)


class OfClass(SE):
    config = {"factor": 1.0}  # noqa: RUF012

    def forward(self, x: Tensor) -> Any:
        return x * (self.gate(self.fc2(self.act(self.fc1(_pooled(x))))) * self.config["factor"])


class OfAnyName(SE):
    kind = "mean"

    def squeeze_mean(self, x: Tensor) -> Tensor:
        return _pooled(x)

    def forward(self, x: Tensor) -> Any:
        z = getattr(self, f"squeeze_{self.kind}")(x)
        return x * self.gate(self.fc2(self.act(self.fc1(z))))


class Tried(SE):
    def forward(self, x: Tensor) -> Any:
        try:
            k = self.factor
        except AttributeError:
            k = 1.0
        return x * (self.gate(self.fc2(self.act(self.fc1(_pooled(x))))) * k)


class OfChild(SE):
    def __init__(self) -> None:
        super().__init__()
        self.act = Leaky()  # type: ignore[assignment]


class Inherits(OfDefault):
    pass


class Mixed:
    def pooled(self, x: Tensor) -> Tensor:
        return _pooled(x)


class AfterModule(nn.Module, Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Any:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(self.pooled(x)))))


def _enclosed() -> tuple[type[SE], Callable[[Any], None]]:
    factor = 1.0

    class OfClosure(SE):
        def forward(self, x: Tensor) -> Any:
            return x * (self.gate(self.fc2(self.act(self.fc1(_pooled(x))))) * factor)

    def change(_: Any) -> None:
        nonlocal factor
        factor = 3.0

    return OfClosure, change


def _doubling(was: Any) -> Any:
    return lambda *args, **kwargs: 2 * was(*args, **kwargs)


def _other(self: Any, x: Tensor) -> Tensor:
    return x * self.gate(self.fc2(self.act(self.fc1(_highest(x)))))


#: A class, and what monkeypatch does after fusing: an owner, a name, another value.
_CHANGES: dict[str, tuple[type[nn.Module], Any, str, Any]] = {
    "code": (SE, SE.forward, "__code__", _other.__code__),
    "code of a helper": (OfGlobal, _pooled, "__code__", _highest.__code__),
    "defaults": (OfDefault, OfDefault.forward, "__defaults__", (3.0,)),
    "keyword defaults": (OfDefault, OfDefault.forward, "__kwdefaults__", {"more": 3.0}),
    "defaults of a base": (Inherits, OfDefault.forward, "__defaults__", (3.0,)),
    "a forward of its own": (Inherits, Inherits, "forward", _other),
    "global number": (OfGlobal, "FACTOR", "", 3.0),
    "global function": (OfGlobal, "_pooled", "", _highest),
    "dict of the class": (OfClass, OfClass.config, "factor", 3.0),
    "a name made at run time": (OfAnyName, OfAnyName, "squeeze_mean",
                                lambda self, x: _highest(x)),
    "setting of a child's class": (OfChild, Leaky, "slope", 0.5),
    "method of a child's class": (OfChild, Leaky, "apply_to", lambda self, x: F.gelu(x)),
    "a base after Module": (AfterModule, Mixed, "pooled", lambda self, x: _highest(x)),
    "function of torch": (AfterModule, torch, "sigmoid", torch.tanh),
    "function of a layer": (SE, F, "relu", lambda x, inplace=False: F.gelu(x)),
    "function of a function of a layer": (SE, torch, "relu", F.gelu),
    "method of tensors": (AfterModule, Tensor, "mean",
                          lambda x, *args, **kwargs: x.amax((2, 3), keepdim=True)),
    "call of every module": (SE, nn.Module, "__call__", _doubling(nn.Module.__call__)),
    "call of a class of layers": (SE, nn.Conv2d, "__call__", _doubling(nn.Conv2d.__call__)),
}  # fmt: skip


@pytest.mark.parametrize("change", _CHANGES)
def test_code_that_changes_after_fusing(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, owner, name, value = _CHANGES[change]
    torch.manual_seed(0)
    plain = kind()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    assert stale_reason(fused, fused._senet_form) is None
    x = torch.randn(2, 16, 5, 5)
    before = plain(x)
    if isinstance(owner, str):
        monkeypatch.setitem(globals(), owner, value)
    elif isinstance(owner, dict):
        monkeypatch.setitem(owner, name, value)
    else:
        monkeypatch.setattr(owner, name, value, raising=False)
    assert not torch.allclose(plain(x), before)
    _same(plain, fused, x)
    monkeypatch.undo()
    assert stale_reason(fused, fused._senet_form) is None


def test_a_closure_that_changes_after_fusing() -> None:
    kind, change = _enclosed()
    plain = kind()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    change(None)
    _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_an_attribute_that_is_tried() -> None:
    plain: Any = Tried()
    fused: Any = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    plain.factor = fused.factor = 3.0
    _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_the_order_of_a_sequential() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1),
                nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Any:
            y: Tensor = x * self.gates(x)
            return y

    plain = Gated()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    for module in (plain, fused):
        children: Any = module.gates._modules
        for name in "24":
            children[name] = children.pop(name)
    _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_what_python_notes_on_a_class_is_no_change() -> None:
    plain, fused = _pair()
    copy.deepcopy(plain)  # copyreg caches __slotnames__ there
    assert SE.__annotations__ is not None
    assert stale_reason(fused, fused._senet_form) is None


class Registered(SE):
    """With entries that are None, a layer of two names, and a setting that its class has."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", None)
        self.register_parameter("bias", None)
        self.drop: nn.Module | None = None
        self.layers = nn.ModuleList([self.fc1, self.fc2])

    def forward(self, x: Tensor) -> Any:
        for extra in (self.gain, self.bias):
            x = x if extra is None else x * extra
        z = self.layers[0](x.mean((2, 3), keepdim=True))
        z = z if self.drop is None else self.drop(z)
        return x * self.scale * torch.sigmoid(self.layers[1](torch.relu(z)))


class Deeper(Registered):
    spare = 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "gain", torch.full((1,), 3.0)),
        lambda m: setattr(m, "bias", nn.Parameter(torch.full((1,), 3.0))),
        lambda m: setattr(m, "drop", nn.Tanh()),
        lambda m: m.layers.__setitem__(0, copy.deepcopy(m.fc1)),
    ],
    ids=["a buffer", "a parameter", "a child", "another name of a layer"],
)
def test_what_was_registered_as_none(change: Any) -> None:
    plain: Any = Registered()
    fused: Any = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    x = torch.randn(2, 16, 5, 5)
    _same(plain, fused, x)
    for module in (plain, fused):
        change(module)
        nn.init.constant_(module.layers[0].weight, 0.1)
    assert stale_reason(fused, fused._senet_form) is not None
    _same(plain, fused, x)


def test_one_attribute_of_a_class_goes_as_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = Deeper()
    fused: Any = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    monkeypatch.delattr(Deeper, "spare")
    monkeypatch.setattr(Deeper, "scale", 2.0, raising=False)
    _same(plain, fused, torch.randn(2, 16, 5, 5))


class Uncomparable:
    """Equal to nothing, and loud about it."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not compared")

    __hash__ = None  # type: ignore[assignment]


def test_what_cannot_be_compared_has_changed() -> None:
    plain: Any = Tried()
    fused: Any = copy.deepcopy(plain)
    fused.note = plain.note = "a setting"
    assert fuse_se_blocks(fused).replaced
    fused.note = plain.note = Uncomparable()
    _same(plain, fused, torch.randn(2, 16, 5, 5))


def test_threads_count_alone() -> None:
    """How deep a value is gone through is a thread's own affair."""
    value: Any = 0
    for _ in range(6):
        value = [value]
    stop, failures = threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                as_it_is(value)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=run) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(0.3)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not failures
