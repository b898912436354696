"""Data-parallel training gives the gradients of one process, without warnings."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import oracle
from backend_cases import BACKENDS, BackendCase, require
from problems import Problem, Spec, build
from senet_kernels import BackendUnavailableError, FusedSEBlock, squeeze_excite

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
# Gloo on CPU tensors: what is tested is the autograd Functions' part in it, the same on a device.
_BACKENDS = [backend for backend in BACKENDS if backend.device == "cpu"]
each_backend = pytest.mark.parametrize("backend", _BACKENDS, indirect=True, ids=str)


def _net(backend: str, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), FusedSEBlock(8, hidden=4, after="relu", backend=backend)
    ).to(memory_format=memory_format)


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net(x.to(memory_format=torch.channels_last)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_backend
def test_one_rank(backend: BackendCase, one_rank: None) -> None:
    alone = _gradients(_net(backend.name), _images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of gradient strides unlike the bucket's
        ddp = nn.parallel.DistributedDataParallel(_net(backend.name))
        for got, right in zip(_gradients(ddp, _images()), alone, strict=True):
            torch.testing.assert_close(got, right)
            assert got.stride() == right.stride()


# Extents that two ranks share evenly, and unevenly.
_SHARED = (
    Spec((4, 8, 3, 5), 4),
    Spec((3, 7, 3, 5), 5, residual="contiguous", after="relu", activation="silu"),
)
_PLACEMENTS = {"replicated": None, "images": 0, "channels": 1}  # the axis that is split


def _on_mesh(problem: Problem, axis: int | None, mesh: Any) -> dict[str, Tensor]:
    """Outputs and gradients with images split along ``axis``, put together again."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    whole = Replicate()
    leaves = {
        name: None if t is None else distribute_tensor(
            t, mesh, [Shard(axis) if axis is not None and name in ("x", "residual") else whole]
        ).requires_grad_()
        for name, t in problem.tensors.items()
    }  # fmt: skip
    x = leaves["x"]
    assert isinstance(x, DTensor)
    assert (x.to_local().numel() < x.numel()) == (axis is not None)
    y = problem.call(squeeze_excite, leaves)
    assert isinstance(y, DTensor)
    y.backward(distribute_tensor(problem.dy, mesh, y.placements))
    results: dict[str, Tensor] = {"y": y.full_tensor().detach()}
    for name in problem.given:
        leaf: Any = leaves[name]
        assert isinstance(leaf.grad, DTensor)
        results[f"d{name}"] = leaf.grad.full_tensor()
    with pytest.raises(BackendUnavailableError, match="class DTensor"):
        problem.call(squeeze_excite, leaves, backend="native")
    return results


def _rank_of_mesh(rank: int, store: str, results: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {
        f"{placement}, {spec}": _on_mesh(build(spec), axis, mesh)
        for placement, axis in _PLACEMENTS.items()
        for spec in _SHARED
    }
    torch.save(found, f"{results}{rank}")
    dist.barrier()
    os._exit(0)  # see _rank


def test_dtensor(tmp_path: Path) -> None:
    """As eager code does on DTensors: PyTorch's operators, whose sharding it knows. On two ranks,
    each of which has half of the images or of the channels, and must end with all of the result."""
    arguments = (str(tmp_path / "store"), str(tmp_path / "results"))
    torch.multiprocessing.spawn(_rank_of_mesh, arguments, nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"results{rank}")
        for placement, spec in itertools.product(_PLACEMENTS, _SHARED):
            right = build(spec).run(oracle.eager_block)
            case = found.pop(f"{placement}, {spec}")
            assert case.keys() == right.keys()
            for name, value in right.items():
                where = f"{placement}, {spec}: {name}"
                torch.testing.assert_close(
                    case[name], value, msg=lambda m, where=where: f"{where}: {m}"
                )
        assert not found


def _rank(rank: int, kind: str, backend: str, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net: Any
    if kind == "ddp":
        net = nn.parallel.DistributedDataParallel(_net(backend))
    else:  # FSDP takes contiguous parameters only
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        net = _net(backend, torch.contiguous_format)
        mesh = init_device_mesh("cpu", (2,))
        for child in net:
            fully_shard(child, mesh=mesh)
        fully_shard(net, mesh=mesh)
    gradients = _gradients(net, _images()[2 * rank : 2 * rank + 2])
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    if rank == 0:
        torch.save(whole, results)
    dist.barrier()
    # Not through gloo's teardown, which now and then aborts ("terminate called without an active
    # exception") with nothing but torch in the process. A failure above is still reported.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("backend", _BACKENDS, ids=str)
def test_two_ranks(backend: BackendCase, kind: str, tmp_path: Path) -> None:
    require(backend)
    arguments = (kind, backend.name, str(tmp_path / "store"), str(tmp_path / "results.pt"))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
    alone = _gradients(_net(backend.name), _images())
    for got, right in zip(torch.load(tmp_path / "results.pt"), alone, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
