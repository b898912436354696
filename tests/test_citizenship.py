"""A good citizen of a torch process: threads, fork, determinism, memory, hooks, subclasses."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import oracle
import senet_kernels
from backend_cases import BACKENDS, EXACT_BACKENDS, FUSED_BACKENDS, BackendCase, require
from problems import Problem, Spec, build, check, magnitudes
from senet_kernels import squeeze_excite

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=str)
each_exact = pytest.mark.parametrize("backend", EXACT_BACKENDS, indirect=True, ids=str)
each_fused = pytest.mark.parametrize("backend", FUSED_BACKENDS, indirect=True, ids=str)

_PATHS = (str(Path(senet_kernels.__file__).parent.parent), str(Path(__file__).parent))


def _python(script: str, *, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@each_backend
def test_many_threads_at_once(backend: BackendCase) -> None:
    """Eight threads, each with shapes of its own, forward and backward."""
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        try:
            specs = [
                Spec((1 + seed % 3, 8 + seed, 5, 7), 3 + seed % 4, seed=seed, layout=layout,
                     residual="contiguous", after="relu", device=backend.device)
                for layout in ("contiguous", "channels_last")
            ]  # fmt: skip
            problems = [build(spec) for spec in specs]
            start.wait()
            for _ in range(5):
                for problem in problems:
                    check(problem, squeeze_excite, backend=backend.name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


_FORK = """
import os, sys, torch
from problems import Spec, build, check
from senet_kernels import squeeze_excite
problem = build(Spec((4, 32, 20, 20), 8))
before = check(problem, squeeze_excite, backend=%r)  # starts the parent's thread team
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # what a DataLoader's worker does: OpenMP does not survive a fork
    after = problem.run(squeeze_excite, backend=%r)
    same = all(torch.allclose(before[n], after[n], rtol=1e-5, atol=1e-5) for n in before)
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
check(problem, squeeze_excite, backend=%r)  # and the parent is none the worse
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@each_backend
def test_fork(backend: BackendCase, tmp_path: Path) -> None:
    if backend.device == "cuda":
        pytest.skip("CUDA does not survive a fork")
    _python(_FORK % ((backend.name,) * 3), cwd=tmp_path)


def _specs_for_bits(backend: BackendCase) -> list[Spec]:
    return [
        Spec((3, 40, 13, 17), 10, dtype, layout, residual="contiguous", after=after,
             before="relu", device=backend.device)
        for dtype in backend.dtypes
        for layout in ("contiguous", "channels_last")
        for after in ("relu", "silu")
    ]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
@each_backend
def test_same_bits_every_time(
    backend: BackendCase, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    for spec in _specs_for_bits(backend):
        problem = build(spec)
        first = problem.run(squeeze_excite, backend=backend.name)
        keep = []
        for i in range(6):
            # Moves the allocator along.
            keep.append(torch.full((64 * (i + 1),), torch.nan, device=backend.device))
            again = problem.run(squeeze_excite, backend=backend.name)
            for name, value in first.items():
                assert torch.equal(again[name], value), f"{name} of {spec}"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_has_the_same_bits_in_any_batch(
    layout: torch.memory_format, set_threads: Callable[[int], None]
) -> None:
    """On one thread of a CPU, however many images share a reading of the weights."""
    require(BackendCase("native", "cpu"))
    set_threads(1)
    torch.manual_seed(0)
    sizes = [(64, 4, 5), (72, 24, 28), (96, 40, 7), (31, 9, 14), (256, 32, 8), (300, 130, 3)]
    for (channels, hidden, size), batch in itertools.product(sizes, (3, 4, 9)):
        x, dy = (
            torch.randn(batch, channels, size, size).to(memory_format=layout) for _ in range(2)
        )
        w1, w2 = torch.randn(hidden, channels), torch.randn(channels, hidden)
        b1, b2 = torch.randn(hidden), torch.randn(channels)

        def run(x: Tensor, dy: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            y = squeeze_excite(x, *weights, backend="native")
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        whole = run(x, dy, w1, b1, w2, b2)
        for b in range(batch):
            alone = run(x[b : b + 1], dy[b : b + 1], w1, b1, w2, b2)
            for name, a, w in zip(("y", "dx"), alone, whole, strict=True):
                assert torch.equal(a[0], w[b]), f"{name} of image {b} of {list(x.shape)}"


_BITS = """
import sys, torch
from backend_cases import BackendCase
from test_citizenship import _specs_for_bits
from problems import build
from senet_kernels import squeeze_excite
torch.set_num_threads(2)
results = [build(spec).run(squeeze_excite, backend=%r)
           for spec in _specs_for_bits(BackendCase(%r, %r))]
torch.save(results, "bits.pt")
"""


@each_backend
def test_same_bits_in_another_process(backend: BackendCase, tmp_path: Path) -> None:
    _python(_BITS % (backend.name, backend.name, backend.device), cwd=tmp_path)
    others = torch.load(tmp_path / "bits.pt")
    for spec, theirs in zip(_specs_for_bits(backend), others, strict=True):
        ours = build(spec).run(squeeze_excite, backend=backend.name)
        for name, value in ours.items():
            assert torch.equal(theirs[name], value), f"{name} of {spec}"


def _saved(problem: Problem, **extra: Any) -> list[Tensor]:
    """What the graph of one call keeps for backward."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    leaves = problem.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = problem.call(squeeze_excite, leaves, **extra)
    y.backward(problem.dy)
    return kept


@pytest.mark.parametrize(("after", "keeps_residual"),
                         [("identity", False), ("relu", False), ("silu", True)])  # fmt: skip
@each_fused
def test_memory_kept_for_backward(backend: BackendCase, after: str, keeps_residual: bool) -> None:
    """x, the parameters, a few vectors; for relu a bit per element; never y or p."""
    spec = Spec((2, 32, 16, 16), 8, residual="contiguous", after=after, device=backend.device)
    problem = build(spec)
    residual, x = problem.tensors["residual"], problem.tensors["x"]
    assert residual is not None
    assert x is not None
    kept = {t.untyped_storage().data_ptr(): t for t in _saved(problem, backend=backend.name)}
    assert (residual.untyped_storage().data_ptr() in kept) == keeps_residual
    given = {t.untyped_storage().data_ptr() for t in problem.tensors.values() if t is not None}
    own = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in given)
    vectors = 4 * 2 * (32 + 8 + 32)
    mask = x.numel() // 8 if after == "relu" else 0
    assert own <= vectors + mask + 256


@each_fused
def test_nothing_is_kept_without_gradients(backend: BackendCase) -> None:
    problem = build(Spec(device=backend.device))
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t)
    with hooks:
        problem.call(squeeze_excite, backend=backend.name)
        with torch.no_grad():
            problem.call(squeeze_excite, problem.leaves(), backend=backend.name)
    assert not kept


@each_backend
def test_graph_is_freed_without_the_garbage_collector(backend: BackendCase) -> None:
    problem = build(Spec(residual="contiguous", after="relu", device=backend.device))
    gc.collect()
    gc.disable()
    try:
        leaves = problem.leaves()
        y = problem.call(squeeze_excite, leaves, backend=backend.name)
        dead = [weakref.ref(t) for t in leaves.values() if t is not None]
        dead.append(weakref.ref(y))
        y.backward(problem.dy)
        del leaves, y
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


@each_backend
def test_checkpoint_and_tensor_hooks(backend: BackendCase) -> None:
    from torch.utils.checkpoint import checkpoint

    problem = build(Spec(before="silu", device=backend.device))
    right = problem.run(squeeze_excite, backend=backend.name)
    leaves = problem.leaves()
    seen: list[torch.Size] = []
    x = leaves["x"]
    assert x is not None
    x.register_hook(lambda g: seen.append(g.shape))
    y = checkpoint(
        lambda *_: problem.call(squeeze_excite, leaves, backend=backend.name),
        x,
        use_reentrant=False,
    )
    y.backward(problem.dy)
    assert seen == [x.shape]
    assert x.grad is not None
    assert torch.equal(x.grad, right["dx"])


@each_backend
def test_inference_mode(backend: BackendCase) -> None:
    problem = build(Spec(device=backend.device))
    plain = problem.call(squeeze_excite, backend=backend.name)
    with torch.inference_mode():
        y = problem.call(squeeze_excite, problem.leaves(), backend=backend.name)
    assert y.is_inference()
    assert torch.equal(y, plain)


class _Tagged(Tensor):
    """The simplest of subclasses; torch keeps it through its functions."""


@each_backend
def test_subclass(backend: BackendCase) -> None:
    problem = build(Spec(device=backend.device))
    right = problem.call(squeeze_excite, backend=backend.name)
    x = problem.tensors["x"]
    assert x is not None
    problem.tensors["x"] = x.as_subclass(_Tagged)
    y = problem.call(squeeze_excite, backend=backend.name)
    assert torch.equal(y.as_subclass(Tensor), right)
    expected = problem.expected()
    oracle.assert_like_oracle(
        {n: t.as_subclass(Tensor) for n, t in
         problem.run(squeeze_excite, backend=backend.name).items()},
        {n: t.as_subclass(Tensor) for n, t in expected.items()},
        magnitudes(problem), problem.dtype,
    )  # fmt: skip


class _Logging(Tensor):
    """Wraps a tensor and notes which operators reach it."""

    inner: Tensor
    seen: ClassVar[list[str]] = []
    knows_only_torch: ClassVar[bool] = False

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Logging:
        wrapper: _Logging = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(func.name())
        if cls.knows_only_torch and func.namespace == "senet_kernels":
            raise NotImplementedError(func.name())
        plain = tree_map_only(_Logging, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*plain[0], **plain[1]))


class _Quantised(_Logging):
    """Such as torchao's tensors: its operators are its own, ours are none of them."""

    knows_only_torch = True

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> _Quantised:
        return _Quantised(inner["inner"])


@pytest.mark.parametrize("wrapper", [_Logging, _Quantised])
@each_fused
def test_wrapper_subclass(backend: BackendCase, wrapper: type[_Logging]) -> None:
    """What re-dispatches sees our operators; for what knows PyTorch's alone the automatic choice is
    the fallback, and a backend asked for by name says why it cannot."""
    problem = build(Spec(device=backend.device))
    right = problem.call(squeeze_excite, backend=backend.name)
    problem.tensors = {n: t if t is None else wrapper(t) for n, t in problem.tensors.items()}
    wrapper.seen.clear()
    if wrapper.knows_only_torch:
        with pytest.raises(senet_kernels.BackendUnavailableError, match="class _Quantised"):
            problem.call(squeeze_excite, backend=backend.name)
        y = problem.call(squeeze_excite)
        assert not [name for name in wrapper.seen if "senet_kernels" in name]
    else:
        y = problem.call(squeeze_excite, backend=backend.name)
        assert f"senet_kernels::{backend.name}_forward" in wrapper.seen
    assert isinstance(y, wrapper)
    torch.testing.assert_close(y.inner, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta"])
def test_one_wrapper_subclass_among_plain_tensors(name: str) -> None:
    """A model with one layer quantised, say."""
    problem = build(Spec(residual="contiguous", weighted=True))
    right = problem.call(squeeze_excite)
    tensor = problem.tensors[name]
    assert tensor is not None
    wrapped: dict[str, Tensor | None] = {**problem.tensors, name: _Quantised(tensor)}
    y = problem.call(squeeze_excite, wrapped)
    assert isinstance(y, _Quantised)
    torch.testing.assert_close(y.inner, right, rtol=1e-5, atol=1e-6)
    with pytest.raises(senet_kernels.BackendUnavailableError, match="class _Quantised"):
        problem.call(squeeze_excite, wrapped, backend="native")


@each_exact
def test_gradient_scaler_sees_overflow(backend: BackendCase) -> None:
    """An overflowing gradient comes out as Inf or NaN, so that GradScaler skips the step."""
    if torch.float16 not in backend.dtypes:
        pytest.skip("the feature table leaves float16 to the reference")
    spec = Spec((2, 8, 8, 8), 4, torch.float16, residual="contiguous", weighted=True, affine=True)
    problem = build(replace(spec, device=backend.device))
    problem.dy = torch.full_like(problem.dy, 60000.0)
    results = problem.run(squeeze_excite, backend=backend.name)
    largest = torch.finfo(torch.float16).max
    for name, right in problem.expected().items():
        overflows = right.abs() > 1.01 * largest
        assert overflows.any() == (name not in ("y", "dresidual")), name
        assert not results[name][overflows].isfinite().any(), name
        # And nothing else does, for want of room on the way.
        assert results[name][right.abs() < 0.99 * largest].isfinite().all(), name
