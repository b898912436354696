"""The public ops in graphs: what make_fx records, autocast around a graph, compiled programs, the C
functions of AOTInductor. Workflows of capture are in test_capture.py."""

from __future__ import annotations

import ctypes
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import senet_kernels
from senet_kernels import FusedSEBlock, channel_scale, public_ops, squeeze, squeeze_excite
from senet_kernels.backends import native

_PACKAGE = Path(senet_kernels.__file__).parent
_OPS = torch.ops.senet_kernels
_NAMES = ("squeeze_excite", "squeeze", "channel_scale")

needs_library = pytest.mark.skipif(
    native.UNAVAILABLE is not None, reason="the compiled library is not there"
)


class _Attention(nn.Module):
    """An excitation between the halves."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        u = nn.functional.conv1d(squeeze(x, before="silu")[:, None], self.kernel, padding=1)
        return channel_scale(x, u[:, 0], gate="sigmoid", after="relu", residual=x)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.se = FusedSEBlock(8, hidden=4, after="silu", before="silu")
        self.attention = _Attention()
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.out(self.attention(self.se(x, residual=x)))
        return y


def _ops_in(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if "senet_kernels" in str(n.target)]


_ALL = [f"senet_kernels.{name}.default" for name in _NAMES]


def _gradients(call: Callable[[Tensor], Tensor], parameters: Iterable[Tensor]) -> list[Tensor]:
    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)
    return list(torch.autograd.grad(call(x).square().sum(), list(parameters)))


def _net() -> tuple[_Net, list[Tensor]]:
    net = _Net().double()
    return net, _gradients(net, net.parameters())


def _check_gradients(got: list[Tensor], right: list[Tensor]) -> None:
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_graphs_train(mode: str, pre_dispatch: bool, grad: bool) -> None:
    net, right = _net()
    parameters = dict(net.named_parameters())

    def fn(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(net, parameters, (x,))
        return y

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        graph = make_fx(fn, tracing_mode=mode, pre_dispatch=pre_dispatch)(parameters, x)
    assert _ops_in(graph.graph) == _ALL
    _check_gradients(_gradients(lambda x: graph(parameters, x), parameters.values()), right)


def test_make_fx_of_a_transform() -> None:
    """Gradients within the graph are PyTorch's operators, with gradients of their own."""
    net, right = _net()
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(net, parameters, (x,))
        return y.square().sum()

    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8)
    graph = make_fx(torch.func.grad(loss))(parameters, x)
    assert not [name for name in _ops_in(graph.graph) if name not in _ALL]
    _check_gradients(list(graph(parameters, x).values()), right)


def test_captured_in_place_is_functional() -> None:
    """The op is, and a copy over x follows: as in eager, differentiated it is an error."""
    x, w = torch.randn(2, 8, 3, 5), torch.randn(8, 8)

    def fn(x: Tensor) -> Tensor:
        return squeeze_excite(2 * x, w, None, w, None, inplace=True)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fn(x)

    with torch.no_grad():
        program = torch.export.export(Net(), (x,))
    assert _ops_in(program.graph) == _ALL[:1]
    module, right = program.module(), squeeze_excite(2 * x, w, None, w, None)
    torch.testing.assert_close(module(x), right)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(x.clone().requires_grad_()).sum().backward()
    functional = program.run_decompositions()
    assert "copy_." not in functional.graph_module.code
    torch.testing.assert_close(functional.module()(x), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_at_run_time_promotes_as_eager(dtype: torch.dtype) -> None:
    """A graph that was captured without autocast, and run under it."""
    net = _Net()
    x = torch.randn(2, 3, 8, 8)
    module = torch.export.export(net, (x,)).module()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), net(x), rtol=0.02, atol=0.02)
        h, w = torch.randn(2, 8, 3, 5, dtype=dtype), torch.randn(8, 8)
        right = squeeze_excite(h, w, None, w, None)
        got = _OPS.squeeze_excite(h, w, None, w, None)
        assert got.dtype == right.dtype
        torch.testing.assert_close(got, right)
        assert _OPS.squeeze(h).dtype == squeeze(h).dtype
        u = torch.randn(2, 8)
        assert _OPS.channel_scale(h, u).dtype == channel_scale(h, u).dtype


@needs_library
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_programs(grad: bool) -> None:
    """torch.compile of a captured graph: the private ops where it is differentiated, one op where
    it is not; no copies for the sake of a layout."""
    from torch._inductor.utils import run_and_get_code

    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_(grad)
    block = FusedSEBlock(8, hidden=4)
    module = torch.export.export(block, (x.detach(),)).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)

    def step() -> Tensor:
        with torch.set_grad_enabled(grad):
            y: Tensor = compiled(x)
            if grad:
                y.sum().backward()
            return y

    y, sources = run_and_get_code(step)
    torch._dynamo.reset()
    torch.testing.assert_close(y, block(x))
    code = "\n".join(sources)
    wanted = ("native_forward", "native_backward") if grad else ("squeeze_excite",)
    assert all(f"senet_kernels.{name}.default(" in code for name in wanted), code
    for kernel in ("async_compile.cpp", "aten.clone", ".copy_("):
        assert kernel not in code, code


@needs_library
@pytest.mark.slow
def test_ahead_of_time_by_the_c_shims(tmp_path: Path) -> None:
    """AOTInductor's code calls the library's C functions, with every argument of the ops."""
    net, x = _Net().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        options = {"aot_inductor.custom_ops_to_c_shims": public_ops.c_shims()}
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "net.pt2"), inductor_configs=options
        )
        with zipfile.ZipFile(package) as files:
            sources = [
                files.read(n).decode() for n in files.namelist() if n.endswith("wrapper.cpp")
            ]
        for name in _NAMES:
            assert any(f"CHECK(aoti_torch_cpu_{name}(" in source for source in sources)
        ctypes.CDLL(str(next(_PACKAGE.glob("_native*.so"))), mode=ctypes.RTLD_GLOBAL)
        loaded = torch._inductor.aoti_load_package(package)
        for batch in (2, 5):
            images = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(loaded(images), net(images), rtol=1e-5, atol=1e-6)


def test_shims_are_for_devices_with_kernels() -> None:
    assert [len(public_ops.c_shims(device)) for device in ("cpu", "cuda")] == [3, 3]
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'xpu'"):
        public_ops.c_shims("xpu")


def test_multiply_adds_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    net = FusedSEBlock(8, hidden=4)
    x = torch.randn(2, 8, 3, 5)
    module = torch.export.export(net, (x,)).module()
    for grad in (False, True):
        counts = []
        for model in (net, module):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                y = model(x)
                if grad:
                    y.sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
