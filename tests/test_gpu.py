"""What needs a GPU to be known: the layers of real networks, CUDA graphs, streams, devices.

Not yet run on a GPU. Where it makes sense the same code also runs on the CPU, in Triton's
interpreter, on one tiny case: that proves the test, not the kernels.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from backend_cases import FUSED_BACKENDS, BackendCase
from benchmarks import problem as workload
from benchmarks.workloads import Layer, load_networks
from policies import PLAN, POLICIES
from problems import TENSORS, Problem, Spec, build, check, magnitudes
from senet_kernels import squeeze_excite
from tools.gpu_cases import NOT_HERE

_ON_GPU = [backend for backend in FUSED_BACKENDS if backend.device == "cuda"]
_INTERPRETED = [b for b in FUSED_BACKENDS if (b.name, b.device) == ("triton", "cpu")]
on_gpu = pytest.mark.parametrize("backend", _ON_GPU, indirect=True, ids=str)
on_gpu_or_interpreted = pytest.mark.parametrize(
    "backend", [*_ON_GPU, *_INTERPRETED], indirect=True, ids=str
)
triton_on_gpu = pytest.mark.parametrize(
    "backend", [b for b in _ON_GPU if b.name == "triton"], indirect=True, ids=str
)
native_on_gpu = pytest.mark.parametrize(
    "backend", [b for b in _ON_GPU if b.name == "native"], indirect=True, ids=str
)

# -- layers of real networks -----------------------------------------------------------------------

# The oracle takes so many elements of x at a time: float64 copies of some ten tensors that size.
_ORACLE_ELEMENTS = 1 << 24
# What a step needs at most, in bytes of x: x, dy, y, dx, residual and its gradient; then the
# oracle's share, and room for other processes on the same device.
_TENSORS_OF_A_STEP = 8


def _layer_cases() -> list[Any]:
    """Every distinct layer with its neighbours, at two batch sizes, in both layouts and every
    dtype; a sample that has all of these, and the rest marked slow."""
    found: dict[Layer, None] = {}
    for network in load_networks(neighbours=True).values():
        found |= dict.fromkeys(layer for layer, _ in network.layers)
    cases = [
        workload.Case(layer, dtype, layout, batch)
        for layer in found
        for dtype in ("bf16", "fp16", "fp32")
        for layout in ("contiguous", "channels_last")
        for batch in (1, 256)
    ]
    every = 23  # shares no factor with the twelve cases of a layer: the sample has all of them
    tiny = workload.Case(Layer(20, 5, 7, 6, "relu", "sigmoid", after="relu", add=True), "fp32",
                         "channels_last", 3)  # fmt: skip
    return [
        *(
            pytest.param(backend, case, id=f"{backend}-{case.name}",
                         marks=[] if i % every == 0 else [pytest.mark.slow])
            for backend in _ON_GPU
            for i, case in enumerate(cases)
        ),
        *(
            pytest.param(backend, tiny, id=f"{backend}-{tiny.name}")
            for backend in _INTERPRETED
        ),
    ]  # fmt: skip


def _problem(case: workload.Case, device: str) -> Problem:
    """A layer's inputs, clear of the kinks where rounding would decide."""
    made = workload.Problem.create(case, torch.device(device))
    tensors: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    tensors |= {"x": made.x[0], "residual": made.residual[0], **made.weights}
    layer = case.layer
    options = {
        "activation": layer.activation or "identity", "gate": layer.gate,
        "before": layer.before or "identity", "after": layer.after or "identity",
    }  # fmt: skip
    return Problem(tensors, None, options, made.dy[0], workload.DTYPES[case.dtype])


def _chunks(problem: Problem, elements: int) -> Iterator[tuple[slice, Problem]]:
    """The problem cut into runs of images of about so many elements."""
    x = problem.tensors["x"]
    assert x is not None
    step = max(1, elements // max(1, x[0].numel()))
    for begin in range(0, x.shape[0], step):
        part = slice(begin, begin + step)
        cut = {n: t[part] if n in ("x", "residual") and t is not None else t
               for n, t in problem.tensors.items()}  # fmt: skip
        yield part, replace(problem, tensors=cut, dy=problem.dy[part])


def _check_by_chunks(problem: Problem, results: dict[str, Tensor], elements: int) -> None:
    """Hold every result to the float64 oracle, which runs on the device, some images at a time."""
    totals: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for part, chunk in _chunks(problem, elements):
        expected, size = chunk.expected(), magnitudes(chunk)
        of_images = {n: t for n, t in expected.items() if n in ("y", "dx", "dresidual")}
        oracle.assert_like_oracle(
            {n: results[n][part] for n in of_images}, of_images, size, problem.dtype
        )
        for name in expected.keys() - of_images.keys():
            totals[name] = totals.get(name, 0) + expected[name]
            sizes[name] = sizes.get(name, 0.0) + size[name]
    oracle.assert_like_oracle({n: results[n] for n in totals}, totals, sizes, problem.dtype)


def _require_memory(case: workload.Case, device: str) -> None:
    if device != "cuda":
        return
    needed = _TENSORS_OF_A_STEP * case.bytes + 24 * 8 * _ORACLE_ELEMENTS
    # Others of the processes that share the device ask at the same time.
    others = min(4, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) if needed > 8e9 else 1
    free, _ = torch.cuda.mem_get_info()
    if needed * others > free:
        pytest.skip(f"needs {needed / 1e9:.1f} GB of device memory, {free / 1e9:.1f} GB are free, "
                    f"for {others}")  # fmt: skip


@pytest.mark.parametrize(("backend", "case"), _layer_cases(), indirect=["backend"])
def test_layers_of_real_networks(
    backend: BackendCase, case: workload.Case, request: pytest.FixtureRequest
) -> None:
    if backend.device == "cuda":
        torch.cuda.empty_cache()
        request.addfinalizer(torch.cuda.empty_cache)  # nothing kept from the other processes
    _require_memory(case, backend.device)
    problem = _problem(case, backend.device)
    results = problem.run(squeeze_excite, backend=backend.name)
    images = 2 if backend.device == "cpu" else 0  # on the CPU: more than one chunk
    _check_by_chunks(problem, results, images * case.layer.channels * case.layer.positions
                     or _ORACLE_ELEMENTS)  # fmt: skip


# -- CUDA graphs -----------------------------------------------------------------------------------

# One launch each way, and two; parameters' gradients summed over a batch; rows moved as runs; the
# halves of the operation.
_GRAPHED = (
    Spec((4, 32, 7, 7), 8, torch.bfloat16, residual="contiguous", after="relu"),
    Spec((4, 32, 7, 7), 8, torch.float32, "channels_last", before="silu", shift=True),
    Spec((8, 96, 28, 28), 24, torch.float16, "channels_last", residual="channels_last",
         after="relu"),
    Spec((2, 96, 56, 56), 24, torch.bfloat16, before="silu", activation="silu"),
    Spec((3, 48, 20, 20), None, torch.float32, lengths=True, affine=True),
    Spec((8, 256, 7, 7), 16, torch.bfloat16, residual="contiguous", after="relu"),
    Spec((2, 6, 70, 33), dtype=torch.float32, part="squeeze", lengths=True, affine=True),
    Spec((4, 48, 20, 20), dtype=torch.bfloat16, part="channel_scale", gate="sigmoid",
         residual="contiguous", after="relu", weighted=True),
)  # fmt: skip
each_graphed = pytest.mark.parametrize("spec", _GRAPHED, ids=str)


class _Static:
    """A step on tensors that stay where they are, as a graph needs them."""

    def __init__(self, spec: Spec, backend: BackendCase, gradients: bool) -> None:
        self.problem = build(replace(spec, device=backend.device))
        self.leaves = self.problem.leaves(None if gradients else ())
        self.names = self.problem.given if gradients else ()
        self.backend = backend.name

    def step(self) -> dict[str, Tensor]:
        y = self.problem.call(squeeze_excite, self.leaves, backend=self.backend)
        results = {"y": y.detach()}
        if self.names:
            leaves = [self.leaves[n] for n in self.names]
            gradients = torch.autograd.grad(y, leaves, self.problem.dy)
            results |= {f"d{n}": g for n, g in zip(self.names, gradients, strict=True)}
        return results

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.leaves.values(), self.problem.dy) if t is not None]

    def renew(self, seed: int) -> None:
        """Other values in the same places."""
        generator = torch.Generator(self.problem.dy.device).manual_seed(seed)
        with torch.no_grad():
            for t in self.tensors():
                t.copy_(torch.randn(t.shape, generator=generator, device=t.device))

    def warm_up(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        self.warm_up()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.step()
        return graph, results


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@each_graphed
@on_gpu
def test_graph_replays_give_the_bits_of_eager_calls(
    backend: BackendCase, spec: Spec, gradients: bool
) -> None:
    static = _Static(spec, backend, gradients)
    graph, results = static.capture()
    for seed in range(3):
        static.renew(seed)
        for t in results.values():
            t.fill_(float("nan"))  # what a replay does not write is found
        graph.replay()
        expected = static.step()
        for name, right in expected.items():
            assert torch.equal(results[name], right), f"{name}, seed {seed}"


@each_graphed
@on_gpu
def test_replays_allocate_nothing(backend: BackendCase, spec: Spec) -> None:
    graph, _ = _Static(spec, backend, True).capture()
    graph.replay()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for what in ("allocation.all.allocated", "segment.all.allocated"):
        assert after[what] == before[what], what


@triton_on_gpu
def test_an_unprepared_call_is_refused_during_capture(backend: BackendCase) -> None:
    """With a message that says what to do, and no harm to the process."""
    static = _Static(Spec((2, 19, 6, 11), 7), backend, False)  # nobody else has this shape
    refused = pytest.raises(RuntimeError, match="once before the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        static.step()
    torch.cuda.synchronize()
    graph, results = static.capture()
    graph.replay()
    assert torch.equal(results["y"], static.step()["y"])


_COLD_CAPTURE = """
import torch
import conftest
conftest.pytest_configure()
from backend_cases import BackendCase
from test_gpu import _GRAPHED, _Static
for spec in _GRAPHED:
    _Static(spec, BackendCase("reference", "cuda"), True).warm_up()  # what is PyTorch's, alone
    static = _Static(spec, BackendCase("native", "cuda"), True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = static.step()
    for seed in range(2):
        static.renew(seed)
        for t in results.values():
            t.fill_(float("nan"))
        graph.replay()
        for name, right in static.step().items():
            assert torch.equal(results[name], right), f"{spec}: {name}, seed {seed}"
"""


@native_on_gpu
def test_the_first_call_of_a_process_can_be_captured(backend: BackendCase) -> None:
    """Compiled ahead of time: what the first call asks of the device is legal in a capture."""
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parent), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _COLD_CAPTURE], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@on_gpu
def test_overwriting_x_in_a_graph(backend: BackendCase) -> None:
    for shape in ((4, 32, 7, 7), (4, 96, 28, 28)):  # one launch, and two
        problem = build(Spec(shape, 8, torch.bfloat16, before="silu", device=backend.device))
        x = problem.tensors["x"]
        assert x is not None
        given = x.clone()
        with torch.no_grad():
            right = problem.call(squeeze_excite, backend=backend.name)
            problem.call(squeeze_excite, backend=backend.name, inplace=True)  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                problem.call(squeeze_excite, backend=backend.name, inplace=True)
            for _ in range(2):
                x.copy_(given)
                graph.replay()
                assert torch.equal(x, right)


# -- streams, synchronisation, memory --------------------------------------------------------------


@each_graphed
@on_gpu
def test_work_goes_to_the_current_stream(backend: BackendCase, spec: Spec) -> None:
    """A producer that is slow, on a stream of its own: a launch on another one would not wait."""
    static = _Static(spec, backend, True)
    static.renew(1)
    expected = static.step()  # and compiled
    values = [t.detach().clone() for t in static.tensors()]
    static.renew(2)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        with torch.no_grad():
            for t, value in zip(static.tensors(), values, strict=True):
                t.copy_(value)
        results = static.step()
    side.synchronize()
    for name, right in expected.items():
        assert torch.equal(results[name], right), name


@each_graphed
@on_gpu
def test_no_synchronisation(backend: BackendCase, spec: Spec) -> None:
    static = _Static(spec, backend, True)
    static.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        static.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@on_gpu
def test_memory_of_a_step(backend: BackendCase, layout: str) -> None:
    """Beyond the results: a bit per element for relu, and vectors. No copy of an image."""
    spec = Spec((16, 64, 56, 56), 16, torch.bfloat16, layout, residual=layout, after="relu",
                dy_layout=layout)  # fmt: skip
    static = _Static(spec, backend, True)
    static.step()
    x = static.leaves["x"]
    assert x is not None
    size, small = x.numel() * x.element_size(), 1 << 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = static.step()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert len(results) == 1 + len(static.problem.given)
    assert kept <= 3 * size + small  # y, dx, dresidual
    assert peak <= 3 * size + x.numel() // 8 + 4 * small


# -- devices and processes -------------------------------------------------------------------------


@each_graphed
@on_gpu
def test_tensors_on_another_device_than_the_current(backend: BackendCase, spec: Spec) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    results = []
    for device in ("cuda:1", "cuda:0"):  # the current device is 0
        problem = build(replace(spec, device=device))
        assert torch.cuda.current_device() == 0
        results.append(problem.run(squeeze_excite, backend=backend.name))
        assert torch.cuda.current_device() == 0
        assert {t.device for t in results[-1].values()} == {torch.device(device)}
    oracle.assert_like_oracle(
        results[0], {n: t.to("cuda:1") for n, t in problem.expected().items()},
        magnitudes(problem), spec.dtype,
    )  # fmt: skip


@each_graphed
@on_gpu
def test_the_current_device_stays(backend: BackendCase, spec: Spec) -> None:
    """After forward and backward, with x on any device there is; backward on this thread, since
    those of autograd have current devices of their own."""
    count = torch.cuda.device_count()
    for current in range(count):
        with torch.cuda.device(current), torch.autograd.set_multithreading_enabled(False):
            for of_x in range(count):
                static = _Static(spec, replace(backend, device=f"cuda:{of_x}"), True)
                y = static.problem.call(squeeze_excite, static.leaves, backend=backend.name)
                assert torch.cuda.current_device() == current
                leaves = [static.leaves[n] for n in static.names]
                torch.autograd.grad(y, leaves, static.problem.dy)
                assert torch.cuda.current_device() == current


@native_on_gpu
def test_the_current_device_stays_when_a_call_fails(
    backend: BackendCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, current = torch.cuda.device_count(), torch.cuda.current_device()
    problem = build(Spec(device=f"cuda:{count - 1}"))
    monkeypatch.setenv(PLAN, "speed=1")
    with pytest.raises(RuntimeError, match="expected exchange, blocks, axis"):
        problem.run(squeeze_excite, backend=backend.name)
    assert torch.cuda.current_device() == current


_BITS = """
import sys, torch
import conftest
conftest.pytest_configure()
from dataclasses import replace
from problems import build
from senet_kernels import squeeze_excite
from test_gpu import _GRAPHED
specs = [_GRAPHED[int(i)] for i in sys.argv[3:]]
problems = [build(replace(spec, device=sys.argv[1])) for spec in specs]
torch.save([p.run(squeeze_excite, backend=sys.argv[2]) for p in problems], "bits.pt")
"""


@on_gpu_or_interpreted
def test_same_bits_in_fresh_processes(backend: BackendCase, tmp_path: Path) -> None:
    """Two processes, each of which compiles what is compiled at run time itself."""
    chosen = [0] if backend.device == "cpu" else range(len(_GRAPHED))
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parent), str(root), os.environ.get("PYTHONPATH", "")])
    results = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
        words = [backend.device, backend.name, *map(str, chosen)]
        done = subprocess.run(
            [sys.executable, "-c", _BITS, *words], cwd=folder, env=env,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(torch.load(folder / "bits.pt", map_location="cpu"))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


# -- races -----------------------------------------------------------------------------------------

# Several images and turns for each block, and sums that several blocks exchange.
# Rows that are no whole bytes of the mask.
_RACING = Spec((40, 136, 7, 7), 12, torch.bfloat16, residual="contiguous", after="relu")
_RACING_LAST = replace(_RACING, layout="channels_last", residual="channels_last")


def _repeat(backend: BackendCase, spec: Spec, times: int) -> None:
    """The same bits each time, while another stream keeps the device busy every other time."""
    static = _Static(spec, backend, True)
    expected = static.step()
    side, noise = torch.cuda.Stream(), torch.randn(1 << 22, device=backend.device)
    torch.cuda.synchronize()
    same = torch.ones((), dtype=torch.bool, device=backend.device)
    for i in range(times):
        if i % 2:
            with torch.cuda.stream(side):
                noise.mul_(1.0)
        for name, t in static.step().items():
            same &= (t == expected[name]).all()
    assert same.item()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy or "automatic")
@native_on_gpu
def test_a_thousand_repeats_by_each_policy(
    backend: BackendCase, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _RACING_LAST if "axis=space" in policy else _RACING
    # More groups, so more blocks, at the same time than the policy has for five images.
    monkeypatch.setenv(PLAN, re.sub(r"\bgroups=\d+", "groups=7", policy))
    try:
        check(build(replace(spec, device=backend.device)), squeeze_excite, backend=backend.name)
    except RuntimeError as error:
        if any(text in str(error) for text in NOT_HERE):
            pytest.skip(str(error).partition("\n")[0])
        raise
    _repeat(backend, spec, 1000)


@triton_on_gpu
def test_a_thousand_repeats(backend: BackendCase) -> None:
    for spec in (_RACING, replace(_RACING, shape=(8, 136, 28, 28))):  # one launch, and two
        _repeat(backend, spec, 1000)


# -- first calls -----------------------------------------------------------------------------------

_FORK = """
import os, sys, torch
import senet_kernels as sk
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:  # CUDA starts here: nothing of it may have been inherited
    x, w = torch.randn(2, 8, 5, 7, device="cuda"), torch.randn(4, 8, device="cuda")
    y = sk.squeeze_excite(x, w, None, w.T, None, backend=sys.argv[1])
    r = sk.squeeze_excite(x, w, None, w.T, None, backend="reference")
    os._exit(0 if torch.allclose(y, r, rtol=1e-4, atol=1e-5) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

_COLD_THREADS = """
import sys, threading, torch
import senet_kernels as sk
x, w = torch.randn(3, 24, 9, 7, device="cuda"), torch.randn(6, 24, device="cuda")
right = sk.squeeze_excite(x, w, None, w.T, None, backend="reference")
start, wrong = threading.Barrier(8), []
def work():
    try:
        start.wait()
        for _ in range(3):
            y = sk.squeeze_excite(x, w, None, w.T, None, backend=sys.argv[1])
            torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)
    except BaseException as error:
        wrong.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong[0]
"""


@pytest.mark.parametrize("script", [_FORK, _COLD_THREADS], ids=["fork", "eight cold threads"])
@on_gpu
def test_first_calls(backend: BackendCase, script: str, tmp_path: Path) -> None:
    """In a forked child that starts CUDA itself; in eight threads with nothing compiled yet."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, backend.name], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


# -- memory that others use ------------------------------------------------------------------------


@each_graphed
@on_gpu
def test_memory_is_free_when_a_call_returns(backend: BackendCase, spec: Spec) -> None:
    """Inputs die while the kernels still run; their memory goes to the next in line, on this stream
    and on another, and is overwritten. What is scratch to us comes from torch's allocator, which
    knows the stream: nothing of it may be used after."""
    static = _Static(spec, backend, True)
    static.renew(1)
    expected = static.step()
    side = torch.cuda.Stream()
    for round_ in range(20):
        fresh = _Static(spec, backend, True)
        fresh.renew(1)
        torch.cuda.synchronize()
        torch.cuda._sleep(5_000_000)
        results = fresh.step()
        sizes = [t.numel() * t.element_size() for t in fresh.tensors()]
        fresh.problem.tensors.clear()
        fresh.leaves.clear()
        del fresh
        poison = [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in sizes]
        with torch.cuda.stream(side):
            poison += [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in sizes]
        torch.cuda.synchronize()
        for name, right in expected.items():
            assert torch.equal(results[name], right), f"{name}, round {round_}"
        del poison


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1100, 32, 256, 256), (1, 16, 12000, 12000)])
@on_gpu
def test_more_than_2_31_elements(backend: BackendCase, shape: tuple[int, ...], layout: str) -> None:
    """Offsets of 64 bits, forward and backward: images beyond 2^31 elements, and one that large."""
    needed = 4 * 2 * math.prod(shape) + 6 * 8 * shape[2] * shape[3]  # x, dy, y, dx; float64 rows
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free")

    def image() -> Tensor:
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        t = torch.empty(shape, dtype=torch.bfloat16, device=backend.device, memory_format=form)
        return t.normal_()

    x, dy = image().requires_grad_(), image()
    w1 = 0.1 * torch.randn(4, shape[1], dtype=x.dtype, device=x.device)
    w2 = torch.randn(shape[1], 4, dtype=x.dtype, device=x.device)
    y = squeeze_excite(x, w1, None, w2, None, backend=backend.name)
    (dx,) = torch.autograd.grad(y, x, dy)
    positions, wide1, wide2 = shape[2] * shape[3], w1.double(), w2.double()
    for b in (0, shape[0] - 1):
        image_x, image_dy = x.detach()[b], dy[b]
        z = torch.stack([rows.double().mean() for rows in image_x])
        h = wide1 @ z
        g = torch.sigmoid(wide2 @ torch.relu(h))
        products = zip(image_x, image_dy, strict=True)
        ds = torch.stack([(rows.double() * grad.double()).sum() for rows, grad in products])
        dh = (wide2.T @ (ds * g * (1 - g))) * (h > 0)
        dz = (wide1.T @ dh) / positions
        for c in range(shape[1]):
            for got, want in (
                (y[b, c], image_x[c].double() * g[c]),
                (dx[b, c], image_dy[c].double() * g[c] + dz[c]),
            ):
                off = (got.double() - want).abs_()
                assert (off <= 2 * oracle.ulp(x.dtype) * want.abs_() + 1e-4).all(), (b, c)
