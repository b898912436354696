"""A model converted with ``fuse_se_blocks`` is as good a citizen of torch as it was before.

``test_compile.py``, ``test_transforms.py`` and ``test_distributed.py`` ask the same of the
operation and of ``FusedSEBlock``; here classes are made at run time and the modules are others'.
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint_sequential

from backend_cases import FUSED_BACKENDS, BackendCase
from models import library, randomise
from senet_kernels import backends, fuse_se_blocks, use_backend
from senet_kernels.converted import Fused


class HomeMade(nn.Module):
    """Recognised by its graph."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.SiLU(),
            nn.Linear(channels // 2, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.fc(x.mean((2, 3)))
        return x * scale[:, :, None, None]


def _known(channels: int) -> nn.Module:
    """Recognised by its class; the names and forward of timm's, whether timm is there or not."""
    module: nn.Module = library("timm").layers.SEModule(channels, rd_channels=4)
    return module


def _net(dtype: torch.dtype = torch.float32, *, fused: bool = True) -> nn.Sequential:
    """A small network with one module of either kind."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        _known(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        HomeMade(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).to(dtype)
    randomise(net)
    if fused:
        assert len(fuse_se_blocks(net).replaced) == 2
    return net


def _images(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(batch)).to(dtype)


def _step(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one step, and what the step left in the buffers."""
    net.zero_grad()
    y = run(x)
    y.float().square().mean().backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads, **dict(net.named_buffers())}


def _assert_same(got: dict[str, Tensor], right: dict[str, Tensor], **tolerances: Any) -> None:
    assert got.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(
            got[name], value, **tolerances, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


# ---- torch.compile and torch.export ----


# In eval mode with symbolic extents: test_recompiles.
@pytest.mark.parametrize(("training", "dynamic"), [(False, False), (True, False), (True, True)])
def test_compiled_in_one_graph(fresh_dynamo: None, training: bool, dynamic: bool) -> None:
    net, eager = _net().train(training), _net(fused=False).train(training)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5):
        right = _step(eager, eager, _images(batch))
        _assert_same(_step(net, compiled, _images(batch)), right, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(_images()), eager(_images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_real_model_compiled(fresh_dynamo: None, compiler: str) -> None:
    model = library("timm").create_model("lcnet_035").eval()
    torch.manual_seed(0)
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert len(fuse_se_blocks(model).replaced) == 2
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_recompiles(fresh_dynamo: None, training: bool) -> None:
    """The blocks alone: torch's convolutions are compiled anew for batches above 15."""
    blocks = nn.Sequential(_known(8), HomeMade(8)).train(training)
    eager = copy.deepcopy(blocks)
    assert len(fuse_se_blocks(blocks).replaced) == 2

    def count(dynamic: bool | None) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(blocks, fullgraph=True, backend=counter, dynamic=dynamic)
        for batch in (2, 3, 16, 17, 2):
            x = torch.randn(batch, 8, 5, 4)
            got, right = _step(blocks, compiled, x), _step(eager, eager, x)
            _assert_same(got, right, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    assert count(dynamic=True) == 1
    assert count(dynamic=None) == 2  # a static graph, then one that takes any batch


def test_halves_compiled_for_any_extents(fresh_dynamo: None) -> None:
    """A norm inside the excitation: its u and x meet with symbolic extents."""
    block = library("timm").layers.SEModule(8, norm_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 8, 5, 4)
    with torch.no_grad():
        expected = block(x)
        assert len(fuse_se_blocks(block).replaced) == 1
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "backend", [b for b in FUSED_BACKENDS if b.device == "cuda"], indirect=True, ids=str
)
def test_reduce_overhead(backend: BackendCase, fresh_dynamo: None, training: bool) -> None:
    """In CUDA graphs, replayed with other numbers and other weights."""
    with use_backend(backend.name):
        _replay(training)


def _replay(training: bool) -> None:
    net, eager = _net().cuda().train(training), _net(fused=False).cuda().train(training)
    compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for i in range(4):
        x = (_images() + i).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        got, right = _step(net, compiled, x), _step(eager, eager, x)
        _assert_same(got, right, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for p in (*net.parameters(), *eager.parameters()):
                p.mul_(0.9)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(fresh_dynamo: None, strict: bool, dynamic: bool) -> None:
    net = _net().eval()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(net, (_images(),), dynamic_shapes=shapes, strict=strict)
    if backends()["native"]:
        graph = program.graph_module.print_readable(print_output=False)
        assert graph.count("senet_kernels.squeeze_excite") == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (4, 7) if dynamic else (4,):
        torch.testing.assert_close(loaded(_images(batch)), net(_images(batch)))


def test_symbolic_trace_of_a_real_model() -> None:
    """The original operations are traced, as of a model never converted."""
    model = library("timm").create_model("lcnet_035").eval()
    fuse_se_blocks(model)
    x = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


# ---- autocast ----

_HALVES = (torch.bfloat16, torch.float16)


def test_autocast_grid() -> None:
    """The dtypes of a block's output and of its gradients are the original's."""
    pairs = {}
    for kind, parameters in itertools.product((_known, HomeMade), (torch.float32, *_HALVES)):
        torch.manual_seed(0)
        original = kind(8).to(parameters)
        fused = copy.deepcopy(original)
        assert fuse_se_blocks(fused).replaced
        pairs[kind, parameters] = original, fused
    for (kind, parameters), x_dtype, autocast in itertools.product(
        pairs, (torch.float32, *_HALVES), _HALVES
    ):
        results = []
        for block in pairs[kind, parameters]:
            block.zero_grad()
            x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(1)).to(x_dtype)
            x.requires_grad_()
            with torch.autocast("cpu", autocast):
                y = block(x)
            y.float().square().sum().backward()
            results.append([y, x.grad, *[p.grad for p in block.parameters()]])
        where = f"{kind.__name__}, {x_dtype} x, {parameters} parameters, {autocast} autocast"
        for right, got in zip(*results, strict=True):
            assert got.dtype == right.dtype, where
            torch.testing.assert_close(got.float(), right.float(), rtol=0.1, atol=0.1, msg=where)


@pytest.mark.parametrize("overflow", [False, True])
def test_gradient_scaler(overflow: bool) -> None:
    """fp16 autocast with a GradScaler trains; a step that overflows is skipped."""
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    start = 2.0**30 if overflow else 2.0**8
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    before = copy.deepcopy(net.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = net(_images().half() if overflow else _images()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert bool(moved) != overflow
    assert (scaler.get_scale() < start) == overflow


# ---- torch.func and derivatives of derivatives ----


def _functional(net: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    state = {n: p.detach() for n, p in net.named_parameters()}

    def call(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, values, (x,))

    return call, state


def test_functional_transforms() -> None:
    x = _images(dtype=torch.float64)
    results = []
    for fused in (False, True):
        call, state = _functional(_net(torch.float64, fused=fused).eval())

        def loss(values: dict[str, Tensor], image: Tensor, call: Any = call) -> Tensor:
            return call(values, image[None]).square().sum()

        per_sample = vmap(grad(loss), (None, 0))(state, x)
        value, tangent = jvp(lambda t, c=call, s=state: c(s, t), (x,), (torch.ones_like(x),))
        assert tangent.abs().max() > 0
        results.append({**per_sample, "value": value, "tangent": tangent})
    _assert_same(results[1], results[0], rtol=1e-8, atol=1e-8)


def test_double_backward() -> None:
    """A gradient penalty: the gradient of the norm of the input's gradient."""
    penalties = []
    for fused in (False, True):
        net = _net(torch.float64, fused=fused).eval()
        x = _images(dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        assert x.grad is not None
        penalties.append({**gradients, "x": x.grad})
    _assert_same(penalties[1], penalties[0], rtol=1e-8, atol=1e-8)


# ---- training ----


def test_activation_checkpointing() -> None:
    plain = _net(torch.float64).eval()
    x = _images(dtype=torch.float64).requires_grad_()
    right = _step(plain, plain, x)
    got = _step(plain, lambda t: checkpoint_sequential(plain, 3, t, use_reentrant=False), x)
    _assert_same(got, right, rtol=0, atol=0)


def test_moving_average() -> None:
    """``AveragedModel`` copies the fused model and follows it."""
    net = _net()
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    assert sum(isinstance(m, Fused) for m in average.modules()) == 2
    average.update_parameters(net)
    start = net[2].fc1.weight.detach().clone()
    with torch.no_grad():
        net[2].fc1.weight.add_(1)
    average.update_parameters(net)
    torch.testing.assert_close(average.module[2].fc1.weight, start + 0.5)
    x = _images()
    assert not torch.allclose(average.eval()(x), net.eval()(x))
    net.load_state_dict(average.module.state_dict())
    assert torch.equal(average(x), net(x))


def test_channels_last() -> None:
    steps = []
    for fused in (False, True):
        net = _net(fused=fused).to(memory_format=torch.channels_last)
        assert net[2].fc1.weight.is_contiguous(memory_format=torch.channels_last)
        layouts = []
        for block in (net[2], net[5]):
            block.register_forward_hook(lambda m, args, y, kept=layouts: kept.append(y.stride()))
        x = _images().to(memory_format=torch.channels_last)
        steps.append((_step(net, net, x), layouts))
    (right, their_layouts), (got, our_layouts) = steps
    assert our_layouts == their_layouts
    _assert_same(got, right, rtol=1e-4, atol=1e-5)
    for name in right:
        if name.endswith("weight"):
            assert got[name].stride() == right[name].stride(), name


def _frozen_norms(net: nn.Module) -> nn.Module:
    for module in net.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def _rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = {}
    for kind in ("ddp", "fsdp2"):
        net: Any = _frozen_norms(_net(torch.float64))
        if kind == "ddp":
            net = nn.parallel.DistributedDataParallel(net.to(memory_format=torch.channels_last))
        else:  # FSDP takes contiguous parameters only
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for module in (net[2], net[5], net):
                fully_shard(module, mesh=mesh)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*strides.*")  # unlike the bucket's
            _step(net, net, _images(dtype=torch.float64)[2 * rank : 2 * rank + 2])
        whole[kind] = {
            n.removeprefix("module."): getattr(p.grad, "full_tensor", lambda g=p.grad: g)()
            for n, p in net.named_parameters()
        }
    if rank == 0:
        torch.save(whole, results)
    dist.barrier()
    os._exit(0)  # gloo's teardown now and then aborts; see test_distributed.py


@needs_gloo
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """DDP and FSDP2, equal shards, norms frozen: the gradients of one process unfused."""
    library("timm")  # here: a rank cannot skip
    arguments = (str(tmp_path / "store"), str(tmp_path / "results.pt"))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
    net = _frozen_norms(_net(torch.float64, fused=False))
    _step(net, net, _images(dtype=torch.float64))
    alone = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    for gradients in torch.load(tmp_path / "results.pt").values():
        _assert_same(gradients, alone, rtol=1e-9, atol=1e-12)
