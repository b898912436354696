"""The compile door: backend and options, caches, dynamic shapes, what is left as it was."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import senet_kernels
from checkout import ROOT
from graph_compare import compare, rewritten
from models import library
from senet_kernels import (
    GraphReport,
    __version__,
    compile_report,
    dispatch,
    inductor_options,
    use_backend,
)
from senet_kernels.fuse.rewrite import rewrite_module

C = 8


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A block with an excitation of its own words, and all the neighbours."""

    def __init__(self, rank: int = 2, track: bool = True) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.conv, self.bn = conv(C, C, 1, bias=False), norm(C, track_running_stats=track)
        self.a, self.b = nn.Linear(C, 4), nn.Linear(4, C)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn(self.conv(x)))
        g = F.relu6(self.b(F.relu(self.a(y.flatten(2).mean(2)))) + 3) / 6
        return F.relu(g.view(*y.shape[:2], *(1,) * (y.dim() - 2)) * y + x)


def _equal(model: nn.Module, x: Tensor, **how: Any) -> None:
    """Outputs, gradients and statistics of the compiled model are eager's."""
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(other, **how)
    for m in (plain, compiled):
        m(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-9)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9)
    for p, q in zip(plain.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_all_neighbours_join(rank: int, training: bool) -> None:
    torch.manual_seed(0)
    model = Block(rank).double().train(training)
    x = torch.randn((3, C, 5, 4, 2)[: rank + 2], dtype=torch.float64)
    report = compare(model, x, tolerance=1e-9)
    joined = "squeeze_excite: two layers, relu, gate hardsigmoid, residual, after relu, "
    joined += "before hardswish" if training else "before hardswish, BatchNorm"
    assert [f.note for f in report.fused] == [joined]
    assert report.fused[0].where.startswith("test_graph_compile.py:")


@pytest.mark.parametrize(
    ("door", "training"),
    [
        ("backend", False), ("options", False),
        # A fifth of a minute of C++ each.
        pytest.param("backend", True, marks=pytest.mark.slow),
        pytest.param("options", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_under_inductor(door: str, training: bool) -> None:
    torch.manual_seed(0)
    reports: list[GraphReport] = []
    how: dict[str, Any] = {"options": inductor_options(report=reports.append)}
    if door == "backend":
        how = {"backend": "senet_kernels", "options": {"report": reports.append}}
    model = Block().double().train(training)
    with torch._inductor.config.patch(force_disable_caches=True):
        _equal(model, torch.randn(3, C, 5, 4, dtype=torch.float64), **how)
    (report,) = {str(r): r for r in reports if r.fused}.values()
    # A BatchNorm in training joins here, too.
    assert report.fused[0].note.endswith("before hardswish, BatchNorm")


@pytest.mark.parametrize(
    "model", [Block(), Block(track=False)], ids=["statistics", "no-statistics"]
)
def test_norm_in_training_is_that_of_pytorch(model: Block) -> None:
    from senet_kernels.fuse.rewrite import norm_affine

    bn = copy.deepcopy(model.bn).double()
    x = 3 + torch.randn(3, C, 5, 4, dtype=torch.float64)
    other = copy.deepcopy(bn)
    a, b = norm_affine(
        x, other.running_mean, other.running_var, other.weight, other.bias, True, 0.1, bn.eps
    )
    y = bn(x)
    torch.testing.assert_close(a[:, None, None] * x + b[:, None, None], y)
    for p, q in zip(bn.buffers(), other.buffers(), strict=True):
        if p.is_floating_point():
            torch.testing.assert_close(q, p)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_affine(x[:1, :, :1, :1], None, None, None, None, True, 0.1, bn.eps)


def test_dynamic_shapes_make_one_graph() -> None:
    torch.manual_seed(0)
    model = Block().double().eval()
    reports: list[GraphReport] = []
    compiled = rewritten(model, reports, dynamic=True)
    for batch, height in ((2, 6), (3, 9), (5, 12)):
        x = torch.randn(batch, C, height, 7, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert [len(r.fused) for r in reports] == [1]


def test_autocast_around_the_call() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(3, C, 5, 4)
    reports: list[GraphReport] = []
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), rewritten(model, reports)(x)
    assert got.dtype == expected.dtype
    assert [len(r.fused) for r in reports] == [1]
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_where_no_kernel_takes_it_the_graph_stays() -> None:
    graphs: list[tuple[str, str]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        before = module.code
        with use_backend("fallback"):
            report = rewrite_module(module, norm_in_training=True)
        module.recompile()
        graphs.append((before, module.code))
        assert not report.fused
        assert "no kernel takes it here" in report.refused[0].note
        return module.forward

    model, x = Block(), torch.randn(2, C, 5, 4)
    torch.compile(model, backend=backend)(x)
    ((before, after),) = graphs
    assert before == after


def test_in_place_operators_are_given_back() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y.relu_()
        y += x
        return y * y.mean((2, 3), keepdim=True)

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        before = module.code
        assert not rewrite_module(module, norm_in_training=True).fused
        module.recompile()
        assert module.code == before
        return module.forward

    torch.compile(fn, backend=backend)(torch.randn(2, 3, 4, 4))


def test_a_backend_that_cannot_run_it_raises() -> None:
    model, x = Block(), torch.randn(2, C, 5, 4)
    with use_backend("triton"), pytest.raises(Exception, match="'triton' was asked for"):
        compile_report(model, x)


def test_reasons_come_from_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "AUTOMATIC", {})
    report = compile_report(Block(), torch.randn(2, C, 5, 4))
    assert "no kernel takes it here (native: " in report.refused[0].note


def test_own_options_are_refused_beside_those_of_inductor() -> None:
    compiled = torch.compile(
        Block(), backend="senet_kernels", options={"inductor": False, "epilogue_fusion": True}
    )
    with pytest.raises(Exception, match=r"none of Inductor's beside .*epilogue_fusion"):
        compiled(torch.randn(2, C, 5, 4))


def test_options_of_inductor_pass_through() -> None:
    seen: list[Any] = []

    def other(graph: torch.fx.Graph) -> None:
        seen.append(torch._inductor.config.max_autotune)

    options = {"max_autotune": True, "pre_grad_custom_pass": other}
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda x: x + 1, backend="senet_kernels", options=options)(torch.ones(3))
    assert seen == [True]


def test_the_pass_is_the_same_for_the_same_options() -> None:
    assert inductor_options() == inductor_options()
    assert inductor_options() != inductor_options(report=print)
    one, other = (next(iter(inductor_options().values())) for _ in range(2))
    assert one.uuid() == other.uuid()
    with use_backend("fallback"):
        changed = one.uuid()
    assert changed != one.uuid()
    assert next(iter(inductor_options(then=print).values())).uuid() is None


def test_the_pass_is_pickled_with_what_caches_ask_for() -> None:
    (one,) = inductor_options(report=print).values()
    assert pickle.loads(pickle.dumps(one)) == one
    assert __version__.encode() in pickle.dumps(one)
    (unnamed,) = inductor_options(then=print).values()
    with pytest.raises(TypeError, match="expected a uuid"):
        pickle.dumps(unnamed)


def test_importing_takes_nothing_of_dynamo() -> None:
    listing = "[m for m in sys.modules if m.startswith('torch._dynamo')]"
    code = f"import sys, senet_kernels; print({listing})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_the_entry_point_is_the_backend() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'senet_kernels = "senet_kernels.fuse:compile_backend"' in text
    assert senet_kernels.fuse.compile_backend.__name__ == "compile_backend"
    assert "senet_kernels" in torch.compiler.list_backends()


def _partitioned(patches: dict[str, Any]) -> Callable[..., Any]:
    """A backend as Inductor: AOTAutograd's graphs, which run without Inductor's code."""
    from torch._inductor.compile_fx import compile_fx

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(
            module, inputs, inner_compile=lambda graph, *_, **__: graph,
            config_patches={"force_disable_caches": True, **patches},
        )  # fmt: skip

    return backend


def _kept(model: nn.Module, x: Tensor, patches: dict[str, Any]) -> list[Tensor]:
    """What a compiled forward keeps for backward besides parameters, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = torch.compile(model, backend=_partitioned(patches))(x)
    del y
    return list(kept.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _masks(tensors: list[Tensor]) -> list[int]:
    """The sizes of what was kept of ReLUs: a byte of each element, or of eight."""
    return [t.numel() for t in tensors if t.dtype in (torch.bool, torch.uint8) and t.numel()]


def _network(name: str) -> nn.Module:
    return library("timm").create_model(name)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name",
    ["block", *(pytest.param(n, marks=pytest.mark.slow)
                for n in ("mobilenetv3_large_100", "efficientnet_b0", "seresnet50"))],
)  # fmt: skip
def test_no_more_is_kept_for_backward_than_by_inductor_alone(name: str) -> None:
    torch.manual_seed(0)
    model = (Block() if name == "block" else _network(name)).train()
    x = torch.randn((3, C, 5, 4) if name == "block" else (2, 3, 64, 64))
    reports: list[GraphReport] = []
    plain = _kept(copy.deepcopy(model), x, {})
    kept = _kept(copy.deepcopy(model), x, inductor_options(report=reports.append))
    assert reports[0].fused
    assert _bytes(kept) <= _bytes(plain)
    # A bit mask of a ReLU that no layer follows: of the last one.
    assert _masks(kept) == {"block": [3 * C * 3], "seresnet50": [2 * 2048]}.get(name, [])
    if name == "block":  # a BatchNorm's statistics, not the scale and shift made of them
        assert sum(t.shape == (C,) for t in kept) == 2


class Followed(nn.Module):
    """A block whose ReLU a layer reads."""

    def __init__(self, *, frozen: bool, cast: bool) -> None:
        super().__init__()
        self.block, self.conv = Block(), nn.Conv2d(C, 4, 1)
        self.conv.requires_grad_(not frozen)
        self.double()
        self.cast = cast
        if cast:
            self.conv.float()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        z: Tensor = self.conv(y.float() if self.cast else y)
        return z.double()


@pytest.mark.parametrize("kind", ["trained", "frozen", "cast", "dynamic", "channels-last"])
def test_no_mask_is_kept_beside_what_a_layer_keeps(kind: str) -> None:
    torch.manual_seed(0)
    model = Followed(frozen=kind == "frozen", cast=kind == "cast")
    x = torch.randn(3, C, 5, 4, dtype=torch.float64)
    if kind == "channels-last":
        x = x.to(memory_format=torch.channels_last)
    _equal(model, x, backend=_partitioned(inductor_options()), dynamic=kind == "dynamic" or None)
    kept = _kept(model, x, inductor_options())
    assert _masks(kept) == ([3 * C * 3] if kind in ("frozen", "cast") else [])


def test_the_kernel_is_the_one_that_trust_is_in() -> None:
    """Where no mask is kept: backward's options are those of forward, of which the verdict is."""
    seen: list[int] = []

    def compiler(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        for node in graph.graph.nodes:
            if str(node.target).startswith("senet_kernels.native_"):
                seen.extend(a for a in node.args[-2:-1] if type(a) is int)
        return graph

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        patches = {"force_disable_caches": True, **inductor_options()}
        return compile_fx(module, inputs, inner_compile=compiler, config_patches=patches)

    model = Followed(frozen=False, cast=False)
    x = torch.randn(3, C, 5, 4, dtype=torch.float64)
    torch.compile(model, backend=backend)(x).sum().backward()
    forward, backward = seen
    assert forward == backward


def test_nan_of_the_residual_passes_backward_as_in_eager() -> None:
    torch.manual_seed(0)
    conv, weight = nn.Conv2d(C, 4, 1).double(), torch.randn(C, C, dtype=torch.float64)

    def fn(x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = conv(F.relu(x * F.linear(x.mean((2, 3)), weight).sigmoid()[..., None, None]
                                + residual))  # fmt: skip
        return y

    x, residual = torch.randn(2, 2, C, 5, 4, dtype=torch.float64)
    residual[0, 1, 2, 3] = float("nan")
    found = []
    for f in (fn, torch.compile(fn, backend=_partitioned(inductor_options()))):
        leaf = residual.clone().requires_grad_()
        f(x, leaf).sum().backward()
        found.append(leaf.grad)
    assert found[0] is not None
    assert found[0][0, 1, 2, 3] != 0
    torch.testing.assert_close(*found)


_PROGRAM = """
import torch, test_graph_compile as t
from torch._dynamo.utils import counters
torch.manual_seed(0)
torch.compile(t.Block(), backend="senet_kernels")(torch.ones(2, 8, 5, 4)).sum().backward()
print(counters["inductor"]["fxgraph_cache_hit"] > 0)
"""


@pytest.mark.slow
def test_a_second_process_hits_the_caches(tmp_path: Path) -> None:
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    hits = [
        subprocess.run(
            [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True,
            env=environment,
        ).stdout.split()[-1]
        for _ in range(2)
    ]  # fmt: skip
    assert hits == ["False", "True"]


def test_a_second_compilation_hits_the_cache(tmp_path: Path) -> None:
    counters.clear()
    with torch._inductor.utils.fresh_cache(dir=str(tmp_path)):
        for _ in range(2):
            torch._dynamo.reset()
            with torch.no_grad():
                torch.compile(Block(), backend="senet_kernels")(torch.ones(2, C, 5, 4))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
