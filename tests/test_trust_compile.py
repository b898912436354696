"""Verdicts in compiled code: read where it is traced, and guarded on. On a pretended card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pretended
import senet_kernels
from senet_kernels import FusedSEBlock, fuse_se_blocks, squeeze_excite, trust
from senet_kernels.backends import triton
from senet_kernels.trust import proof, verdicts
from senet_kernels.trust.problem import Problem


class SqueezeExcite(nn.Module):
    """As anyone writes it."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


class Counting:
    """A compiler that keeps the graphs that it is given, and runs them."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self.fused = False  # whether the last one has an op of the backend

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        lines = [f"{n.op} {n.target}" for n in module.graph.nodes if n.op != "placeholder"]
        self.graphs.append(lines)
        self.fused = "triton" in module.print_readable(print_output=False).lower()
        return module.forward


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are measured against eager PyTorch in the place of compiled code: in no time."""
    monkeypatch.setattr(proof, "compiled_of", Problem.eager)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), SqueezeExcite(16, 4), nn.ReLU())


def _compile(model: Any, **options: Any) -> tuple[Any, Counting]:
    counting = Counting()
    return torch.compile(model, backend=counting, **options), counting


@pytest.mark.parametrize("neighbours", [False, True])
def test_without_a_verdict_the_graph_is_the_originals(
    card: Path,
    neighbours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the kernel is trusted in eager mode, and where it is refused."""
    x = torch.randn(2, 3, 9, 8)
    model, counting = _compile(_model())
    y = model(x)
    (expected,) = counting.graphs
    converted = fuse_se_blocks(_model(), neighbours=neighbours)
    assert converted.replaced
    for _ in ("unproven", "trusted in eager mode"):
        torch._dynamo.reset()
        other, counting = _compile(_model())
        report = fuse_se_blocks(other._orig_mod, neighbours=neighbours)
        assert report.replaced
        torch.testing.assert_close(other(x), y)
        assert counting.graphs == [expected]
        assert senet_kernels.verify(other, x)
        assert {v.state for v in trust.status()} == {trust.TRUSTED}


def _kernels(model: nn.Module, *inputs: Tensor) -> list[str]:
    """The code that Inductor generates for a training step, without its comments, names of files
    and constants that tell where a line came from."""
    from torch._inductor.utils import run_and_get_code

    def step(*inputs: Tensor) -> Tensor:
        y: Tensor = torch.compile(model)(*inputs)
        y.square().mean().backward()
        return y

    torch._dynamo.reset()
    _, sources = run_and_get_code(step, *inputs)
    assert len(sources) == 2  # forward, backward
    kept = []
    for source in sources:
        lines = (line.partition(" # ")[0] for line in source.splitlines())
        kept.append("\n".join(line for line in lines if not line.lstrip().startswith(("#", "//"))))
    return kept


def test_without_a_verdict_the_kernels_are_the_originals(card: Path) -> None:
    """What Inductor generates for a converted model is what it generates for the original."""
    x = torch.randn(2, 3, 9, 8)
    expected = _kernels(_model(), x)
    assert "cpp_fused" in expected[0]
    converted = _model()
    assert fuse_se_blocks(converted).replaced
    assert _kernels(converted, x) == expected


def test_a_later_verdict_recompiles_once(card: Path, quick: None) -> None:
    model = FusedSEBlock(16)
    x = torch.randn(2, 16, 5, 5)
    compiled, counting = _compile(model)
    with torch.no_grad():
        y = compiled(x)
        assert not counting.fused
        senet_kernels.verify(compiled, x, compiled=True)
        torch.testing.assert_close(compiled(x), y)
        assert (counting.fused, len(counting.graphs)) == (True, 2)
        senet_kernels.verify(FusedSEBlock(24), torch.randn(2, 24, 5, 5), compiled=True)
        compiled(x)
        assert len(counting.graphs) == 2  # another kernel's verdict is no matter
        trust.forget()
        torch.testing.assert_close(compiled(x), y)
    # With gradients it is another kernel, which has had its verdict: verify() has asked for both.


def test_verdicts_of_earlier_processes_are_read(
    card: Path,
    quick: None,
) -> None:
    model, x = FusedSEBlock(16), torch.randn(2, 16, 5, 5)
    senet_kernels.verify(model, x, compiled=True)
    pretended.as_new_process()
    compiled, counting = _compile(model, fullgraph=True)
    compiled(x).sum().backward()
    assert counting.fused


def test_directions_have_verdicts_of_their_own(card: Path, quick: None) -> None:
    """What is trusted without gradients is not with them."""
    model, x = FusedSEBlock(16), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        squeeze_excite(x, model.fc1.weight, model.fc1.bias, model.fc2.weight, model.fc2.bias)
    for p in model.parameters():
        p.requires_grad_(False)
    senet_kernels.verify(model, x, compiled=True)
    assert [v.name.split()[-3] for v in trust.status()] == ["inference"]
    compiled, counting = _compile(model)
    compiled(x)
    assert counting.fused
    compiled(x.requires_grad_())
    assert not counting.fused


def test_slower_than_compiled_code_does_not_enter_a_graph(
    card: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proof, "compiled_of", lambda problem: None)
    monkeypatch.setattr(verdicts, "LEAST_SPEED", 0.05)
    model, x = FusedSEBlock(16), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        (found,) = [v for v in senet_kernels.verify(model, x, compiled=True)
                    if " inference " in v.name]  # fmt: skip
        assert found.state == trust.TRUSTED
        assert found.compiled_speed is not None
        assert found.compiled_speed < 0.05
        compiled, counting = _compile(model)
        compiled(x)
    assert not counting.fused


def test_dynamic_batches_go_by_buckets(card: Path, quick: None) -> None:
    """A batch that is a symbol is guarded to its bucket, and only where there are verdicts."""
    model = FusedSEBlock(16)
    compiled, counting = _compile(model, dynamic=True)
    with torch.no_grad():
        for batch in (3, 4, 7, 9):
            compiled(torch.randn(batch, 16, 5, 5))
        assert (counting.fused, len(counting.graphs)) == (False, 1)
        senet_kernels.verify(model, torch.randn(4, 16, 5, 5), compiled=True)
        for batch, fused in ((3, True), (4, True), (7, False), (6, False)):
            y = compiled(torch.randn(batch, 16, 5, 5))
            assert len(y) == batch
            assert counting.fused == fused
        assert len(counting.graphs) == 3


@pytest.mark.parametrize("what", ["batches", "sizes"])
def test_a_verdict_on_other_layers_compiles_nothing_anew(
    card: Path, quick: None, what: str
) -> None:
    """No guard is on extents of a layer of which nothing is known."""

    def graphs() -> int:
        torch._dynamo.reset()
        model = _model().requires_grad_(False)
        fuse_se_blocks(model)
        compiled, counting = _compile(model, dynamic=True)
        for n in (2, 3, 5, 9, 17, 33, 65):
            compiled(torch.randn(*((n, 3, 6, 6) if what == "batches" else (2, 3, n + 4, n + 4))))
        return len(counting.graphs)

    before = graphs()
    other = FusedSEBlock(32).requires_grad_(False)
    senet_kernels.verify(other, torch.randn(2, 32, 6, 6), compiled=True)
    assert verdicts.any_compiled
    assert graphs() == before


def test_each_kind_is_compiled_to_be_measured(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and whatever the stance of the caller."""
    import torch._dynamo
    from torch._inductor import compile_fx

    graphs: list[Any] = []
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    limit = torch._dynamo.config.patch(recompile_limit=1)
    with limit, torch.compiler.set_stance("force_eager"):
        for channels in (4, 8, 12):
            block = FusedSEBlock(channels).requires_grad_(False)
            (verdict,) = senet_kernels.verify(block, torch.randn(2, channels, 6, 6), compiled=True)
            assert verdict.compiled_speed is not None
    assert len(graphs) == 3
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    block = FusedSEBlock(16).requires_grad_(False)
    (verdict,) = senet_kernels.verify(block, torch.randn(2, 16, 6, 6), compiled=True)
    assert verdict.state == trust.TRUSTED
    assert verdict.compiled_speed is None


def _by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images and more are launched in another way, by kernels that wait."""

    def launches(x: Tensor, *args: Any) -> tuple[str, ...]:
        return ("one block" if len(x) < 6 else "cluster of 8 blocks",)

    monkeypatch.setattr(triton, "launches", launches)
    monkeypatch.setattr(triton, "waits", lambda plan: "cluster" in plan, raising=False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_another_plan_of_a_class_does_not_enter_a_graph(
    card: Path, quick: None, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of the same bucket may be launched in a way that was never proven."""
    _by_batch(monkeypatch)
    monkeypatch.setenv(pretended.FAULT, "wrong on 8x16x5x5; wrong on 6x16x5x5; wrong on 16x16x5x5")
    model = FusedSEBlock(16)
    with torch.no_grad():
        senet_kernels.verify(model, torch.randn(5, 16, 5, 5), compiled=True)
        compiled, counting = _compile(model, dynamic=dynamic, fullgraph=True)
        compiled(torch.randn(5, 16, 5, 5))
        assert counting.fused
        for batch in (6, 8):
            x = torch.randn(batch, 16, 5, 5)
            y = squeeze_excite(x, *_parameters(model), backend="reference")
            torch.testing.assert_close(compiled(x), y)
            assert not counting.fused
        assert len(counting.graphs) == (2 if dynamic else 3)


def _parameters(model: FusedSEBlock) -> tuple[Any, ...]:
    return model.fc1.weight, model.fc1.bias, model.fc2.weight, model.fc2.bias


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_tiles_divide_is_guarded_on(card: Path, quick: None, dynamic: bool) -> None:
    model = FusedSEBlock(16)
    with torch.no_grad():
        senet_kernels.verify(model, torch.randn(32, 16, 5, 5), compiled=True)
        compiled, counting = _compile(model, dynamic=dynamic, fullgraph=True)
        for batch, fused in ((32, True), (20, False), (32, True), (31, False)):
            compiled(torch.randn(batch, 16, 5, 5))
            if batch != 32 or len(counting.graphs) == 1:
                assert counting.fused == fused
        strided = torch.randn(32, 20, 5, 5)[:, :16]
        compiled(strided)
        assert not counting.fused


def test_a_class_that_has_one_refused_kernel_runs_the_others(
    card: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pretended.FAULT, "wrong on 20x16x5x5")
    model = FusedSEBlock(16)
    with torch.no_grad():
        with pytest.warns(senet_kernels.KernelMistrustWarning):
            senet_kernels.verify(model, torch.randn(20, 16, 5, 5), compiled=True)
        senet_kernels.verify(model, torch.randn(32, 16, 5, 5), compiled=True)
        compiled, counting = _compile(model)
        compiled(torch.randn(32, 16, 5, 5))
        assert counting.fused


@pytest.mark.parametrize("dynamic", [False, True])
def test_by_name_a_refused_kernel_raises_in_compiled_code(
    card: Path, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of which nothing is known runs."""
    model, x = FusedSEBlock(16), torch.randn(3, 16, 5, 5)

    def call(x: Tensor) -> Tensor:
        y: Tensor = squeeze_excite(x, *_parameters(model), backend="triton")
        return y

    compiled, counting = _compile(call, dynamic=dynamic)
    with torch.no_grad():
        compiled(x)
        assert counting.fused
        monkeypatch.setenv(pretended.FAULT, "wrong on 3x16x5x5")
        with (
            pytest.warns(senet_kernels.KernelMistrustWarning),
            pytest.raises(senet_kernels.KernelMistrustError),
        ):
            call(x)
        with pytest.raises(senet_kernels.KernelMistrustError):
            compiled(x)
        compiled, counting = _compile(call, dynamic=dynamic)
        torch._dynamo.reset()
        compiled(torch.randn(32, 16, 5, 5))
        assert counting.fused


def test_the_graph_door_asks_too(card: Path, quick: None) -> None:
    model, x = _model(), torch.randn(2, 3, 9, 8)
    report = senet_kernels.compile_report(model, x)
    assert not report.fused
    assert "no verdict lets it run in compiled code" in report.refused[0].note
    key = next(iter(senet_kernels.inductor_options().values())).uuid()
    converted = _model()
    fuse_se_blocks(converted, neighbours=True)
    senet_kernels.verify(converted, x, compiled=True)
    torch._dynamo.reset()
    assert senet_kernels.compile_report(model, x).fused
    assert next(iter(senet_kernels.inductor_options().values())).uuid() != key


def test_exported_graphs_hold_the_public_op(card: Path) -> None:
    model, x = FusedSEBlock(16).eval(), torch.randn(2, 16, 5, 5)
    program = torch.export.export(model, (x,))
    assert "senet_kernels.squeeze_excite" in program.graph_module.code
    assert not trust.status()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
    assert {v.state for v in trust.status()} == {trust.TRUSTED}


def test_transforms_prove_nothing(card: Path) -> None:
    """torch.func runs what is trusted."""
    x, w1, w2 = torch.randn(3, 16, 5, 5), torch.randn(4, 16), torch.randn(16, 4)

    def loss(x: Tensor) -> Tensor:
        return squeeze_excite(x, w1, None, w2, None).square().sum()

    dx = torch.func.grad(loss)(x)
    assert not trust.status()
    loss(x.clone().requires_grad_())
    assert len(trust.status()) == 1
    torch.testing.assert_close(torch.func.grad(loss)(x), dx)
