"""How many kernels a call launches; on a CPU, how many operators it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def count(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Counts of one call, which has run before (nothing is compiled or tuned in it any more).

    On CUDA, from torch's profiler, not yet run on a GPU: ``kernels``, and ``copies`` for memcpy
    and memset. On a CPU ``operators``: the calls that reach a kernel, views not counted. What runs
    inside compiled code is not seen there.
    """
    if device.type != "cuda":
        with _Operators() as mode:
            call()
        return {"operators": mode.calls}
    return of_events(profiled(call, device))


def profiled(call: Callable[[], Any], device: torch.device) -> list[Any]:
    """What the profiler saw during one call."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as run:
        call()
        if cuda:
            torch.cuda.synchronize()
    return list(run.events() or [])


def of_events(events: Iterable[Any]) -> dict[str, int]:
    """Kernels and copies among the events of a profile."""
    names = [event.name for event in events if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))
