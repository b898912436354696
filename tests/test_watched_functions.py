"""Functions, flags and tensors that a forward reaches by another way than by its name: what
changes there after fusing is seen, or the module was refused."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import is_grad_enabled as may_differentiate

from models import SE
from senet_kernels import fuse_se_blocks
from senet_kernels.converted import Fused, stale_reason

FACTOR = 1.0
ASKED = "requires_grad"
TABLE: dict[str, float] = {"factor": 1.0}


def scaled(x: Tensor) -> Any:
    return x * FACTOR


def of_table(x: Tensor) -> Any:
    return x * TABLE["factor"]


def by_default(x: Tensor, function: Callable[[Tensor], Any] = scaled) -> Any:
    return function(x)


def _closed_over(space: Any) -> Callable[[Tensor], Any]:
    def use(x: Tensor) -> Any:
        return x * space.factor

    return use


class HoldingSE(SE):
    """Its last step is a function that it holds."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Any:
        return self.step(x * self.gates(x))


def _check(plain: nn.Module, fused: nn.Module, x: Tensor | None = None) -> None:
    x = torch.randn(2, 16, 5, 5) if x is None else x
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    globals().update(FACTOR=1.0, ASKED="requires_grad")
    TABLE["factor"] = 1.0


def _set_global(_: Any) -> None:
    globals()["FACTOR"] = 3.0


def _set_table(_: Any) -> None:
    TABLE["factor"] = 3.0


SPACE = types.SimpleNamespace(factor=1.0)

_STEPS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "a function": (lambda: scaled, _set_global),
    "a partial": (lambda: functools.partial(scaled), _set_global),
    "a default": (lambda: by_default, _set_global),
    "a table": (lambda: of_table, _set_table),
    "a closure": (
        lambda: _closed_over(SPACE.__class__(factor=1.0)),
        lambda m: setattr(m.step.__closure__[0].cell_contents, "factor", 3.0),
    ),
    "its code": (
        lambda: types.FunctionType(scaled.__code__, globals(), "step"),
        lambda m: setattr(m.step, "__code__", (lambda x: x * 3).__code__),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _STEPS)
@pytest.mark.usefixtures("restored")
def test_function_held_by_an_attribute(name: str) -> None:
    make, change = _STEPS[name]
    fused = HoldingSE(make())
    plain = copy.deepcopy(fused)
    report = fuse_se_blocks(fused)
    assert report.replaced or report.refused
    _check(plain, fused)
    for module in {id(m.step): m for m in (plain, fused)}.values():
        change(module)
    x = torch.randn(2, 16, 5, 5)
    expected = 3 * x * plain.gates(x)
    torch.testing.assert_close(plain(x), expected)
    _check(plain, fused, x)


def _twice(x: Tensor) -> Any:
    return x * 1.0


def test_function_held_by_an_attribute_is_fused_and_pickled() -> None:
    fused = HoldingSE(_twice)
    assert fuse_se_blocks(fused).replaced
    assert stale_reason(fused, fused._senet_form) is None
    for again in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert isinstance(again, Fused)
        assert stale_reason(again, again._senet_form) is None
        _check(fused, again)
        again.step = scaled
        assert stale_reason(again, again._senet_form) is not None


class OfGlobals(SE):
    def forward(self, x: Tensor) -> Any:
        return scaled(x * self.gates(x)) if FACTOR < 2 else x


def _set_function(_: Any) -> None:
    globals()["scaled"] = lambda x: x * 3.0


@pytest.mark.parametrize("change", [_set_global, _set_function])
@pytest.mark.parametrize("compiled", [False, True])
def test_globals_that_change_after_compiling(
    change: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FACTOR", "scaled"):
        monkeypatch.setitem(globals(), name, globals()[name])  # put back afterwards
    plain = OfGlobals()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    torch.compiler.reset()
    run = torch.compile(fused, backend="eager") if compiled else fused
    _check(plain, run)
    change(None)
    _check(plain, run)


class AliasedSE(SE):
    def forward(self, x: Tensor) -> Any:
        y = x * self.gates(x)
        return y if may_differentiate() else y * 2


class AskedByVariableSE(SE):
    def forward(self, x: Tensor) -> Any:
        y = x * self.gates(x)
        return y * 2 if getattr(x, ASKED) else y


class AskedByAttributeSE(SE):
    flag = "requires_grad"

    def forward(self, x: Tensor) -> Any:
        y = x * self.gates(x)
        return y * 2 if getattr(x, self.flag) else y


@pytest.mark.parametrize("kind", [AliasedSE, AskedByVariableSE, AskedByAttributeSE])
@pytest.mark.usefixtures("restored")
def test_flag_by_another_name(kind: type[nn.Module]) -> None:
    plain = kind()
    fused = copy.deepcopy(plain)
    report = fuse_se_blocks(fused)
    assert report.replaced or report.refused
    for needs in (False, True):
        x = torch.randn(2, 16, 5, 5, requires_grad=needs)
        _check(plain, fused, x)
        with torch.no_grad():
            _check(plain, fused, x)


class Listed(SE):
    """Its layer's weight, by the list that it is also in."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.fc1.weight]

    def gates(self, x: Tensor) -> Any:
        z = F.conv2d(x.mean((2, 3), keepdim=True), self.weights[0], self.fc1.bias)
        return self.gate(self.fc2(self.act(z)))


class Both(Listed):
    def gates(self, x: Tensor) -> Any:
        return super().gates(x + 0 * self.fc1.weight.sum())


class Tied(SE):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.fc2.weight = self.fc1.weight


@pytest.mark.parametrize("kind", [Listed, Both, Tied])
def test_another_weight_in_the_place_of_one_of_two_names(kind: type[nn.Module]) -> None:
    plain: Any = kind()
    fused: Any = copy.deepcopy(plain)
    fuse_se_blocks(fused)
    for module in (plain, fused):
        module.fc1.weight = nn.Parameter(torch.full_like(module.fc1.weight, 0.2))
    _check(plain, fused)


class OutChannels(SE):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if self.fc1.out_channels == 4 else y * 2


class BiasOrNot(SE):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y * 2 if self.fc1.bias is None else y


class FunctionalWeight(SE):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(16, 4, 1, bias=False)

    def gates(self, x: Tensor) -> Any:
        z = F.conv2d(x.mean((2, 3), keepdim=True), self.fc1.weight)
        return self.gate(self.fc2(self.act(z)))


class NormEps(SE):
    """Its excitation has a norm, which is called, and it reads a setting of that."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.GroupNorm(1, 4)

    def gates(self, x: Tensor) -> Any:
        z = self.n(self.fc1(x.mean((2, 3), keepdim=True)))
        return self.gate(self.fc2(self.act(z)))

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2 if self.n.eps > 0.1 else 1)


class ByClass(NormEps):
    def forward(self, x: Tensor) -> Any:
        return SE.forward(self, x) * (1 if isinstance(self.n, nn.GroupNorm) else 2)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (OutChannels, lambda m: setattr(m.fc1, "out_channels", 5)),
        (BiasOrNot, lambda m: setattr(m.fc1, "bias", None)),
        (FunctionalWeight, lambda m: setattr(m.fc1, "bias", nn.Parameter(torch.ones(4)))),
        (NormEps, lambda m: setattr(m.n, "eps", 1.0)),
        (ByClass, lambda m: setattr(m, "n", nn.LayerNorm([4, 1, 1]))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_forward_asks_of_its_children(kind: Any, change: Any, compiled: bool) -> None:
    plain: Any = kind()
    fused: Any = copy.deepcopy(plain)
    fuse_se_blocks(fused)
    torch.compiler.reset()
    run = torch.compile(fused, backend="eager") if compiled else fused
    _check(plain, run)
    for module in (plain, fused):
        change(module)
    _check(plain, run)


@pytest.mark.parametrize("name", ["__mul__", "__rmul__"])
def test_operators_of_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SE()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused).replaced
    seen = []
    operator = getattr(Tensor, name)

    def counted(a: Tensor, b: Any) -> Any:
        seen.append(name)
        return operator(a, b)

    monkeypatch.setattr(Tensor, name, counted)
    x = torch.randn(2, 16, 5, 5)
    plain(x)
    expected = len(seen)
    fused(x)
    assert len(seen) == 2 * expected


def test_fusing_again_what_has_changed() -> None:
    """It is looked at anew: said to be fused where it is, refused where it is not."""
    fused: Any = SE()
    fuse_se_blocks(fused)
    fused.act = nn.SiLU()
    assert stale_reason(fused, fused._senet_form) is not None
    report = fuse_se_blocks(fused)
    assert "silu" in report.replaced[0].note
    assert stale_reason(fused, fused._senet_form) is None
    plain: Any = SE()
    plain.load_state_dict(fused.state_dict())
    plain.act = nn.SiLU()
    _check(plain, fused)
    plain.act = fused.act = nn.Dropout(0.5)
    report = fuse_se_blocks(fused)
    assert not report.replaced
    assert report.refused
    _check(plain.eval(), fused.eval())
