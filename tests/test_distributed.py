"""Data-parallel training gives the gradients of one process, without warnings."""

from __future__ import annotations

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
from problems import Spec, build
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


@pytest.mark.parametrize("placement", ["replicated", "images", "channels"])
def test_dtensor(placement: str, one_rank: None) -> None:
    """As eager code does on DTensors: PyTorch's operators, whose sharding it knows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = {"replicated": Replicate(), "images": Shard(0), "channels": Shard(1)}
    mesh = init_device_mesh("cpu", (1,))
    problem = build(Spec((4, 8, 3, 5), 4))
    right = problem.run(oracle.eager_block)
    leaves = problem.leaves()
    on_mesh = {
        name: None if t is None else distribute_tensor(
            t.detach(), mesh, [placements[placement] if name == "x" else Replicate()]
        ).requires_grad_()
        for name, t in leaves.items()
    }  # fmt: skip
    y = problem.call(squeeze_excite, on_mesh)
    assert isinstance(y, DTensor)
    y.backward(distribute_tensor(problem.dy, mesh, y.placements))
    torch.testing.assert_close(y.full_tensor().detach(), right["y"])
    for name in problem.given:
        leaf = on_mesh[name]
        assert leaf is not None
        assert isinstance(leaf.grad, DTensor)
        torch.testing.assert_close(leaf.grad.full_tensor(), right[f"d{name}"])
    with pytest.raises(BackendUnavailableError, match="class DTensor"):
        problem.call(squeeze_excite, on_mesh, backend="native")


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
