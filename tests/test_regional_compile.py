"""Equal converted modules that are compiled one by one share a graph, and one that is unlike the
others does not get theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from senet_kernels import fuse_se_blocks


class SE(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(16, 4, 1), act()
        self.fc2, self.gate = nn.Conv2d(4, 16, 1), nn.Sigmoid()
        nn.init.constant_(
            self.fc1.bias, 0.5
        )  # so that some of what the activation gets is positive
        self.extra: nn.Module | None = None
        self.flag = False

    def forward(self, x: Tensor) -> Any:
        z = self.fc1(x.mean((2, 3), keepdim=True))
        z = z if self.extra is None else self.extra(z)
        y = x * self.gate(self.fc2(self.act(z)))
        return y * 2 if self.flag else y


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        return x * self.gates(x)


def _compile(modules: list[Any]) -> CompileCounter:
    counter = CompileCounter()
    for module in modules:
        module.compile(backend=counter, fullgraph=True)
    return counter


@pytest.mark.parametrize("kind", [SE, Sequence])
def test_equal_modules_share_a_graph(kind: type[nn.Module]) -> None:
    modules: list[Any] = [kind() for _ in range(12)]
    expected = [copy.deepcopy(module) for module in modules]
    for module in modules:
        assert fuse_se_blocks(module).replaced
    torch.compiler.reset()
    counter = _compile(modules)
    x = torch.randn(2, 16, 5, 5)
    for module, plain in zip(modules, expected, strict=True):
        torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


_CHANGES: dict[str, tuple[type[nn.Module], Callable[[Any], object]]] = {
    "an activation": (SE, lambda m: setattr(m, "act", nn.SiLU())),
    "a flag": (SE, lambda m: setattr(m, "flag", True)),
    "what was None": (SE, lambda m: setattr(m, "extra", nn.Tanh())),
    "a hook of a child": (SE, lambda m: m.fc1.register_forward_hook(lambda *a: 2 * a[2])),
    "a forward of its own": (SE, lambda m: setattr(m.act, "forward", torch.tanh)),
    "a child more": (Sequence, lambda m: m.gates.append(nn.Tanh())),
    "a child less": (Sequence, lambda m: m.gates.__delitem__(4)),
    "children in another order": (
        Sequence,
        lambda m: [m.gates._modules.__setitem__(n, m.gates._modules.pop(n)) for n in "24"],
    ),
    "groups": (SE, lambda m: setattr(m, "fc1", nn.Conv2d(16, 4, 1, groups=4))),
    "a bias less": (SE, lambda m: setattr(m.fc1, "bias", None)),
}  # fmt: skip


@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _CHANGES)
def test_one_that_is_unlike_the_others(name: str, before: bool) -> None:
    kind, change = _CHANGES[name]
    if "hook" in name and not before:
        pytest.skip("is refused, so that Dynamo sees another class, and the hook")
    modules: list[Any] = [kind(), kind()]
    expected = copy.deepcopy(modules)
    change(expected[1])
    if not before:
        change(modules[1])
    for module in modules:
        fuse_se_blocks(module)
    if before:
        change(modules[1])
    for module, state in zip(expected, modules, strict=True):
        module.load_state_dict(state.state_dict())
    torch.compiler.reset()
    counter, of_plain = _compile(modules), _compile(expected)
    x = torch.randn(2, 16, 5, 5)
    for i in (0, 1, 0, 1):
        torch.testing.assert_close(modules[i](x), expected[i](x), rtol=1e-4, atol=1e-5)
    # By default Dynamo does not guard hooks: those of the first module are all that it sees.
    assert counter.frame_count == of_plain.frame_count == (1 if "hook" in name else 2)
