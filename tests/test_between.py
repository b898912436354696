"""Converted modules whose own excitation runs between the kernels for the two halves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import library
from senet_kernels import backends, between, fuse_se_blocks

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def native() -> None:
    if not backends()["native"]:
        pytest.skip("no compiled library")


def _eca() -> nn.Module:
    module: nn.Module = library("timm.layers").EcaModule(8)
    return module


def _with_norm() -> nn.Module:
    layers = library("timm.layers")
    module: nn.Module = layers.SEModule(8, rd_channels=4, norm_layer=nn.BatchNorm2d)
    return module


def _pair(make: Callable[[], nn.Module], backend: str | None = "native") -> list[nn.Module]:
    torch.manual_seed(0)
    plain = make().double()
    fused = copy.deepcopy(plain)
    assert fuse_se_blocks(fused, backend=backend).replaced
    return [plain, fused]


def _image(layout: str, shape: tuple[int, ...] = (3, 8, 7, 5)) -> Tensor:
    if layout == "expanded":
        return torch.randn((), dtype=torch.float64).expand(shape)
    if layout == "strided":
        wide = (shape[0], 2 * shape[1], shape[2], 2 * shape[3])
        return torch.randn(wide, dtype=torch.float64)[:, ::2, :, 1::2]
    x = torch.randn(shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels-last" else x


def _gradients(module: nn.Module, x: Tensor, dy: Tensor, twice: bool) -> list[Tensor | None]:
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *module.parameters()]
    y = module(leaf)
    first = torch.autograd.grad(y, wanted, dy, create_graph=twice)
    if not twice:
        return [y, *first]
    loss = torch.stack([g.square().sum() for g in first]).sum()
    return [y, *first, *torch.autograd.grad(loss, wanted, allow_unused=True)]


@pytest.mark.parametrize("make", [_eca, _with_norm])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided"])
@pytest.mark.parametrize("of_dy", ["contiguous", "channels-last", "strided", "expanded"])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_the_originals(
    make: Callable[[], nn.Module], layout: str, of_dy: str, twice: bool
) -> None:
    modules = _pair(make)
    x, dy = _image(layout), _image(of_dy)
    expected, got = (_gradients(m, x, dy, twice) for m in modules)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    if not twice:
        assert [g.stride() for g in got[:2] if g is not None] == [
            g.stride() for g in expected[:2] if g is not None
        ]


@pytest.mark.parametrize("make", [_eca, _with_norm])
def test_gradient_penalty(make: Callable[[], nn.Module]) -> None:
    """The gradient of y depends on x here, so that a second pass goes through both again."""
    image, results = _image("contiguous"), []
    for module in _pair(make):
        x = image.clone().requires_grad_()
        wanted = [x, *module.parameters()]
        y = module(x).square().mean()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum() + y, wanted, allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_gradients_of_what_lies_between() -> None:
    """A hook sees z and u; their gradients are asked for, with and without that of x."""
    modules = _pair(_eca)
    image, dy = _image("contiguous"), _image("contiguous")
    results = []
    for module in modules:
        seen: list[Tensor] = []
        module.conv.register_forward_hook(lambda m, i, o, seen=seen: seen.extend((i[0], o)))
        x = image.clone().requires_grad_()
        y = module(x)
        alone = torch.autograd.grad(y, seen, dy, retain_graph=True)
        through = torch.autograd.grad(seen[1].square().sum(), x, retain_graph=True)
        both = torch.autograd.grad((y * dy).sum() + seen[0].square().sum(), [x, *seen])
        results.append([*alone, *through, *both])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.view_as(a), a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["x", "excitation"])
def test_frozen(frozen: str) -> None:
    x, dy = _image("contiguous"), _image("channels-last")
    got = []
    for module in _pair(_with_norm):
        leaf = x.clone().requires_grad_(frozen != "x")
        module.requires_grad_(frozen == "x")
        module(leaf).backward(dy)
        got.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*got, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "differentiated", "large", "kernels"),
    [
        (torch.float32, True, True, True),
        (torch.float32, False, True, False),
        (torch.float32, True, False, False),
        (torch.bfloat16, False, True, True),
        (torch.bfloat16, False, False, False),
    ],
)
def test_the_original_runs_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, differentiated: bool, large: bool,
    kernels: bool,
) -> None:  # fmt: skip
    x = torch.randn(3, 8, 7, 5, dtype=dtype, requires_grad=differentiated)
    monkeypatch.setattr(between, "WORTH", x.numel() + (not large))
    called: list[Any] = []
    run = between.run
    monkeypatch.setattr(between, "run", lambda *a: called.append(a) or run(*a))
    for backend in (None, "native"):
        _, fused = _pair(_eca, backend)
        fused.to(dtype)
        called.clear()
        fused(x)
        assert bool(called) == (kernels or backend == "native")
    report = str(fuse_se_blocks(_eca()))
    assert "its own forward below 262144 elements" in report


def test_compiled_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(between, "WORTH", 0)
    _, fused = _pair(_eca, None)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(
        fused, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True
    )
    compiled(_image("contiguous").requires_grad_())
    assert graphs
    assert "senet" not in graphs[0].code


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(between, "WORTH", 0)
    for dtype in (torch.float32, torch.bfloat16):
        modules = [m.float() for m in _pair(_with_norm, None)]
        x = _image("contiguous").to(dtype)
        results = []
        for module in modules:
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = module(leaf)
            y.sum().backward()
            results.append((y, leaf.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)


def test_the_backward_pass_writes_one_image() -> None:
    """dx alone: neither half writes a part of it that is added up."""
    _, fused = _pair(_eca)
    x = torch.randn(4, 8, 64, 64, dtype=torch.float64, requires_grad=True)
    y = fused(x)
    dy = torch.randn_like(y)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.autograd.grad(y, x, dy)
    allocated = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    image = x.numel() * x.element_size()
    assert image <= sum(allocated) < 1.5 * image
