"""One process, or several under torchrun: DDP, or FSDP2 (``fully_shard``)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import TrainError

T = TypeVar("T")
HOW = "torchrun --nproc-per-node 2 -m senet_kernels.train ..."


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them. ``kind``: ``"none"``, ``"ddp"``,
    ``"fsdp2"``."""

    rank: int
    world: int
    kind: str
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """``work`` done by the first process, its result (or its failure) given to all."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:  # or the others would wait for a result for ever
                is_ours = isinstance(error, TrainError)
                outcome[1] = str(error) if is_ours else f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise TrainError(outcome[1])
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank; to the first process only."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.gather_object(value, values if self.first else None, dst=0)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def average_statistics(self, norms: Iterable[_BatchNorm]) -> None:
        """Give every process the mean of all processes' statistics of these BatchNorms."""
        if self.world == 1:
            return
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= self.world

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, wrapped (DDP) or changed in place (FSDP2) so that gradients are averaged.

        What is frozen must be frozen before.
        """
        if self.kind == "ddp":
            # Each process keeps its own BatchNorm statistics within an epoch, as under FSDP2.
            ddp = nn.parallel.DistributedDataParallel
            known = inspect.signature(ddp).parameters
            # The same by its new name, where torch has it.
            name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
            keywords: dict[str, Any] = {name: False}
            if self.device.type == "cuda":
                keywords["device_ids"] = [self.device]
            return ddp(model, **keywords)
        if self.kind == "fsdp2":
            _shard(model, self.world, self.device.type)
        return model


def _shard(model: nn.Module, world: int, device: str) -> None:
    """FSDP2, a group for each residual block; the rest is the root's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world,))
    for name, stage in model.named_children():
        if name.startswith("layer"):
            for block in stage.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def under_torchrun() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def processes(parallel: str, device: str) -> Iterator[Processes]:
    """What ``--parallel`` and ``--device`` ask for, of what torchrun started.

    Raises:
        TrainError: there is no such device, or ``parallel`` needs torchrun and there is none.
    """
    if not under_torchrun() and not dist.is_initialized():
        if parallel in ("ddp", "fsdp2"):
            raise TrainError(f"--parallel {parallel}: start it with torchrun: {HOW}")
        yield Processes(0, 1, "none", _device(device, 0))
        return
    where = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    kind = ("ddp" if world > 1 else "none") if parallel == "auto" else parallel
    if kind == "none" and world > 1:
        raise TrainError(f"--parallel none: but torchrun started {world} processes")
    try:
        yield Processes(rank, world, kind, where)
    finally:
        if started:
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise TrainError(f"--device: {name!r} is not here: torch can use {count} GPUs")
        torch.cuda.set_device(device)
    return device
