"""Asking for all verdicts that a model needs, before a long run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import verdicts
from .kinds import Kind
from .verdicts import Status, Verdict


def verify(model: Any, *inputs: Any, compiled: bool = False, **kwargs: Any) -> Status:
    """Have every kernel proven that a model's calls would run, before a long run.

    Calls ``model(*inputs, **kwargs)`` eagerly, once without gradients and, where it has parameters
    that need some, once with them. Nothing is changed by that: buffers (running statistics) and
    random numbers are as before, no gradient is accumulated.

    Args:
        model: a module or function; of one that ``torch.compile`` returned, what it compiles.
        inputs, kwargs: of a call, of the extents of the run: a verdict holds for a number of images
            up to the next power of two.
        compiled: measure each kernel beside what ``torch.compile`` makes of PyTorch's operators
            too, which takes seconds for each. Only kernels that were measured so run in compiled
            code.

    Returns:
        The verdicts on all kernels that the model asks for, those known before among them: none for
        a model on the CPU, whose kernels run unasked.
    """
    model = getattr(model, "_orig_mod", model)
    found: dict[Kind, Verdict] = {}
    with _listening(found), _unchanged(model):
        with torch.no_grad():
            model(*inputs, **kwargs)
        if any(p.requires_grad for p in _parameters(model)):
            with torch.enable_grad():
                model(*inputs, **kwargs)
    if compiled:
        found = {kind: verdicts.measure_compiled(kind) for kind in found}
    return Status(found.values())


def _parameters(model: Any) -> list[nn.Parameter]:
    return list(model.parameters()) if isinstance(model, nn.Module) else []


@contextmanager
def _listening(found: dict[Kind, Verdict]) -> Iterator[None]:
    def listen(kind: Kind, verdict: Verdict) -> None:
        found[kind] = verdict

    verdicts.forget_answers()  # of them nobody would hear
    verdicts.listeners.append(listen)
    try:
        yield
    finally:
        verdicts.listeners.remove(listen)


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """With the model's buffers and the random numbers as they were, afterwards."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    kept = [b.detach().clone() for b in buffers]
    devices = {t.get_device() for t in (*_parameters(model), *buffers) if t.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in zip(buffers, kept, strict=True):
                    buffer.copy_(before)
