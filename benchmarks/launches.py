"""How many kernels a call launches; on a CPU, how many operators it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
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
    names = [
        event.name
        for event in events
        # the optimiser's annotations show on the device's time line as well
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
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


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.launches [cuda|cpu]``: a quick look, on a few layers with their
    neighbours."""
    from .workloads import load_networks

    words = sys.argv[1:] if argv is None else argv
    device = torch.device(words[0] if words else "cuda")
    networks = load_networks(neighbours=True)
    for name in ("seresnet50", "efficientnet_b0", "lc0_20x256"):
        layer = networks[name].layers[-1][0]
        print(f"{layer.name}, before {layer.before}, after {layer.after}:")
        for line in _lines(layer, device):
            print(f"  {line}", flush=True)
    return 0


def _lines(layer: Any, device: torch.device) -> Iterator[str]:
    """One line per provider: the counts of both modes."""
    from .problem import FORWARD, TRAINING, Case, Problem
    from .providers import FUSED, make_call, make_provider, one_line, unavailable

    problem = Problem.create(Case(layer, "fp32", "contiguous", 2), device)
    for name in ["eager-conv", "eager-linear", *FUSED]:
        if reason := unavailable(name, device):
            yield f"{name}: {reason}"
            continue
        module, found = make_provider(name).build(problem), {}
        for mode in (FORWARD, TRAINING):
            step = partial(make_call(module, problem, mode), 0)
            with torch.set_grad_enabled(mode != FORWARD):
                try:
                    step()
                    found[mode] = count(step, device)
                except Exception as error:  # a backend may refuse a layer; the others go on
                    found[mode] = {one_line(error): 0}
        yield f"{name}: " + "; ".join(
            f"{mode} {', '.join(f'{n} {what}' for what, n in counts.items())}"
            for mode, counts in found.items()
        )


if __name__ == "__main__":
    sys.exit(main())
