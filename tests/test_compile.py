"""torch.compile and torch.export: one graph, the same numbers, no needless recompiles or copies."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import oracle
import senet_kernels
from backend_cases import BACKENDS, EXACT_BACKENDS, FUSED_BACKENDS, BackendCase
from problems import Problem, Spec, build, magnitudes
from senet_kernels import (
    FusedSEBlock,
    channel_scale,
    dispatch,
    squeeze,
    squeeze_excite,
    use_backend,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
# With eager's strides of gradients, where those of x and dy differ, and its rounding.
each_exact = pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)

_SPECS = (
    Spec((2, 8, 3, 5), 4),
    Spec((2, 8, 3, 5), 4, layout="channels_last", residual="channels_last", after="relu"),
    Spec((2, 8, 3, 5), 4, layout="channels_last", residual="contiguous", after="silu"),
    Spec((2, 8, 15), 4, torch.bfloat16, before="silu", weights="transposed", bias=False),
    Spec((2, 8, 3, 5), 4, layout="sliced_space", weights="conv", dy_layout="channels_last"),
)
each_spec = pytest.mark.parametrize("spec", _SPECS, ids=str)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(name: str, **how: Any) -> Callable[..., Tensor]:
    def fn(*args: Any, **kwargs: Any) -> Tensor:
        return squeeze_excite(*args, **kwargs, backend=name)

    return torch.compile(fn, fullgraph=True, **how)


def _check(problem: Problem, fn: Callable[..., Tensor], backend: str) -> None:
    """Forward without gradients, and forward and backward, against the oracle; of the fallback,
    whose accuracy is eager PyTorch's, against that."""
    results = problem.run(fn)
    with torch.no_grad():
        y = problem.call(fn)
    eager = problem.run(squeeze_excite, backend=backend)
    if backend == "fallback":
        assert torch.equal(y, results["y"])
        for name, value in results.items():
            close = 4 * oracle.ulp(problem.dtype) * oracle.largest(eager[name])
            assert oracle.max_error(value, eager[name]) <= close, name
    else:
        right, scale = problem.expected(), magnitudes(problem)
        oracle.assert_like_oracle(results, right, scale, problem.dtype)
        oracle.assert_like_oracle({"y": y}, {"y": right["y"]}, scale, problem.dtype)
    assert results["y"].stride() == eager["y"].stride()
    if backend in dispatch.KERNELS:  # an opaque op: the same bits
        for name, value in results.items():
            assert value.stride() == eager[name].stride(), name
            assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("dynamic", [False, True])
@each_spec
@each_exact
def test_one_graph_with_gradients(backend: BackendCase, spec: Spec, dynamic: bool) -> None:
    problem = build(replace(spec, device=backend.device))
    _check(problem, _compiled(backend.name, backend="aot_eager", dynamic=dynamic), backend.name)


def _inductor(spec: Spec, backend: BackendCase, dynamic: bool) -> None:
    problem = build(replace(spec, device=backend.device))
    _check(problem, _compiled(backend.name, dynamic=dynamic), backend.name)


@each_spec
@each_fused
def test_inductor(backend: BackendCase, spec: Spec) -> None:
    _inductor(spec, backend, dynamic=False)


@pytest.mark.slow
@each_spec
@each_backend
def test_inductor_dynamic(backend: BackendCase, spec: Spec) -> None:
    _inductor(spec, backend, dynamic=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_fused
def test_no_layout_copies_in_generated_code(backend: BackendCase, layout: str, grad: bool) -> None:
    """Kernels read every layout themselves: generated code calls the op and computes nothing."""
    spec = Spec((2, 16, 6, 6), 4, layout=layout, residual=layout, after="relu",
                dy_layout=layout, weights="conv", device=backend.device)  # fmt: skip
    problem = build(spec)
    fn = _compiled(backend.name)

    def step() -> None:
        if grad:
            problem.run(fn)
        else:
            with torch.no_grad():
                problem.call(fn)

    _, sources = run_and_get_code(step)
    code = "\n".join(sources)
    calls = code.count(f"torch.ops.senet_kernels.{backend.name}_")
    assert calls >= (2 if grad else 1), code
    for kernel in ("async_compile.cpp", "async_compile.triton", "aten.clone", ".copy_("):
        assert kernel not in code, code


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_space"])
@each_backend
def test_inplace(backend: BackendCase, layout: str, how: str) -> None:
    """On an input of the graph and on a tensor made inside: both functionalised and put back."""
    if not backend.takes("inplace"):
        pytest.skip("the feature table leaves in place to the reference")
    problem = build(Spec((2, 8, 3, 5), 4, layout=layout, device=backend.device))
    right = problem.call(squeeze_excite, backend=backend.name)
    x = problem.tensors["x"]
    assert x is not None

    @torch.compile(fullgraph=True, backend=how)
    def on_input(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = squeeze_excite(x, *args, **kwargs, inplace=True, backend=backend.name)
        return y + 1

    @torch.compile(fullgraph=True, backend=how)
    def on_intermediate(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        doubled = (2 * x) / 2
        squeeze_excite(doubled, *args, **kwargs, inplace=True, backend=backend.name)
        return doubled, x + 1

    before = x.clone()
    y, after = problem.call(on_intermediate)
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(after, before + 1)
    assert torch.equal(x, before)
    torch.testing.assert_close(problem.call(on_input), right + 1)
    torch.testing.assert_close(x, right)


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_backend
def test_halves_with_code_between(backend: BackendCase, layout: str, how: str) -> None:
    """Efficient channel attention: one graph, the same numbers, gradients too."""
    if not backend.takes("squeeze alone", "channel_scale alone"):
        pytest.skip("the feature table leaves the halves to the reference")
    problem = build(Spec((2, 8, 3, 5), layout=layout, residual=layout, device=backend.device))
    given = [problem.tensors["x"], problem.tensors["residual"], torch.randn(1, 1, 3)]
    leaves = [t.detach().to(backend.device).requires_grad_() for t in given if t is not None]

    def attend(x: Tensor, residual: Tensor, kernel: Tensor) -> Tensor:
        z = squeeze(x, before="silu", backend=backend.name)
        u = nn.functional.conv1d(z[:, None], kernel, padding=1)[:, 0]
        return channel_scale(x, u, gate="sigmoid", before="silu", after="relu", residual=residual,
                             backend=backend.name)  # fmt: skip

    def run(fn: Callable[..., Tensor]) -> list[Tensor]:
        y = fn(*leaves)
        with torch.no_grad():
            torch.testing.assert_close(fn(*leaves), y)
        return [y, *torch.autograd.grad(y, leaves, problem.dy)]

    eager = run(attend)
    compiled = run(torch.compile(attend, fullgraph=True, backend=how))
    assert compiled[0].stride() == eager[0].stride()
    for ours, right in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, right)


def _count(
    fn: Callable[..., Tensor], device: str, batches: tuple[int, ...], dynamic: bool | None
) -> int:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in batches:
        problem = build(Spec((batch, 8, 3, 5), 4, seed=batch, device=device))
        results = problem.run(compiled)
        oracle.assert_like_oracle(results, problem.expected(), magnitudes(problem), problem.dtype)
    return counter.frame_count


@pytest.mark.parametrize(
    "backend",
    [b if b in FUSED_BACKENDS else pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS],
    indirect=True, ids=str,
)  # fmt: skip
def test_recompiles(backend: BackendCase) -> None:
    def fn(*args: Any, **kwargs: Any) -> Tensor:
        return squeeze_excite(*args, **kwargs, backend=backend.name)

    assert _count(fn, backend.device, (2, 3, 16, 17, 2), dynamic=True) == 1
    torch._dynamo.reset()
    # A static graph, then one that takes any batch but 1, which torch always specialises.
    assert _count(fn, backend.device, (2, 3, 16, 17, 64), dynamic=None) == 2
    torch._dynamo.reset()
    assert _count(fn, backend.device, (1, 2, 16, 1, 17), dynamic=None) == 2
    torch._dynamo.reset()
    assert _count(fn, backend.device, (4, 4, 4), dynamic=None) == 1


@pytest.mark.usefixtures("automatic")
@each_fused
def test_changing_the_backend_recompiles(backend: BackendCase) -> None:
    graphs: list[str] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm.print_readable(print_output=False))
        return gm

    problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))
    compiled = torch.compile(squeeze_excite, fullgraph=True, backend=keep)

    def call() -> None:
        with torch.no_grad():
            problem.call(compiled)

    call()
    with use_backend("reference"):
        call()
        call()
    call()
    assert len(graphs) == 2
    op = f"senet_kernels.{backend.name}_forward"
    assert [op in graph for graph in graphs] == [True, False]


class _Net(nn.Module):
    """A residual block with a BatchNorm, as SE blocks are used."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.se = FusedSEBlock(8, hidden=4, after="relu", backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.se(self.norm(x), residual=x)
        return out.mean((2, 3))


def _train(net: nn.Module, step: Callable[[Tensor], Tensor], x: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = step(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_backend
def test_training_a_module(backend: BackendCase) -> None:
    x = torch.randn(4, 3, 6, 6, device=backend.device)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = _Net(backend.name).to(backend.device)
        step = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        losses.append(_train(net, step, x))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


@each_backend
def test_autocast_inside(backend: BackendCase) -> None:
    problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))

    def fn(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(backend.device, torch.bfloat16):
            return squeeze_excite(*args, **kwargs, backend=backend.name)

    x = problem.tensors["x"]
    assert x is not None
    problem.tensors["x"], problem.dy = x.bfloat16(), problem.dy.bfloat16()
    eager = problem.run(fn)
    compiled = problem.run(torch.compile(fn, fullgraph=True, backend="aot_eager"))
    for name, value in eager.items():
        assert compiled[name].dtype == value.dtype
        torch.testing.assert_close(compiled[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@each_backend
def test_export(backend: BackendCase, strict: bool, dynamic: bool) -> None:
    torch.manual_seed(0)
    net = _Net(backend.name).to(backend.device).eval()
    x = torch.randn(2, 3, 6, 6, device=backend.device)
    shapes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=strict)
    graph = program.graph_module.print_readable(print_output=False)
    assert ("senet_kernels.squeeze_excite" in graph) == (backend in FUSED_BACKENDS)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (2, 5) if dynamic else (2,):
        images = torch.randn(batch, 3, 6, 6, device=backend.device)
        torch.testing.assert_close(loaded(images), net(images), rtol=1e-5, atol=1e-6)


_TWICE: dict[str, Callable[..., Tensor]] = {
    "residual": lambda x, w, a, u, **b: squeeze_excite(x, w, None, w, None, residual=x, **b),
    "vectors": lambda x, w, a, u, **b: squeeze_excite(
        x, w, a, w, a, alpha=a, beta=a, before_affine=(a, a), **b
    ),
    "squeeze": lambda x, w, a, u, **b: squeeze(x, before_affine=(a, a), **b),
    "channel_scale": lambda x, w, a, u, **b: channel_scale(
        x, u, residual=x, alpha=a, beta=a, after="silu", **b
    ),
}


@pytest.mark.parametrize("name", _TWICE)
@each_backend
def test_one_tensor_as_two_arguments(backend: BackendCase, name: str) -> None:
    """Dynamo refuses a Function that is given one tensor twice."""
    shapes = ((2, 8, 3, 5), (8, 8), (8,), (2, 8))
    leaves = [torch.randn(s, dtype=torch.float64, device=backend.device) for s in shapes]
    call = partial(_TWICE[name], backend=backend.name)

    def gradients(fn: Callable[..., Tensor]) -> list[Tensor | None]:
        fresh = [t.clone().requires_grad_() for t in leaves]
        fn(*fresh).sin().sum().backward()
        return [t.grad for t in fresh]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(call))


@each_backend
def test_bad_calls_raise_the_same_error_under_compile(backend: BackendCase) -> None:
    problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))
    problem.tensors["b1"] = torch.randn(5, device=backend.device)
    compiled = torch.compile(
        lambda *a, **k: squeeze_excite(*a, **k, backend=backend.name), backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"b1: expected shape \[4\].*got \[5\]"):
        problem.call(compiled)


@each_backend
def test_storage_offsets(backend: BackendCase) -> None:
    """Inputs that are views at an offset, changing between calls of one graph."""
    compiled = _compiled(backend.name, backend="aot_eager")
    buffer = torch.randn(1000, device=backend.device)
    for offset in (0, 1, 7):
        problem = build(Spec((2, 8, 3, 5), 4, device=backend.device))
        problem.tensors["x"] = buffer[offset : offset + 240].view(2, 8, 3, 5)
        right = problem.double().call(oracle.block)
        got = problem.call(compiled)
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


@each_fused
def test_exported_program_runs_in_a_fresh_process(backend: BackendCase, tmp_path: Path) -> None:
    """Importing the package is all that it takes."""
    x = torch.randn(2, 3, 6, 6, device=backend.device)
    net = _Net(backend.name).to(backend.device).eval()
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    torch.save((x, net(x)), tmp_path / "pair.pt")
    script = (
        "import torch, senet_kernels\n"
        "x, y = torch.load('pair.pt')\n"
        "net = torch.export.load('net.pt2').module()\n"
        "torch.testing.assert_close(net(x), y)\n"
    )
    path = str(Path(senet_kernels.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if not b.simulated], indirect=True, ids=str
)
def test_ahead_of_time_inductor(backend: BackendCase, tmp_path: Path) -> None:
    """A package of AOTInductor's, compiled, saved and loaded, calls the op for a batch it has not
    seen."""
    net = _Net(backend.name).to(backend.device).eval()
    x = torch.randn(2, 3, 6, 6, device=backend.device)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}}
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "net.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for batch in (2, 5):
            images = torch.randn(batch, 3, 6, 6, device=backend.device)
            torch.testing.assert_close(loaded(images), net(images), rtol=1e-5, atol=1e-6)
