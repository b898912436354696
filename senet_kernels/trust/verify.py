"""Asking for all verdicts that a model needs, before a long run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from . import verdicts
from .kinds import Kind
from .verdicts import Status, Verdict


def verify(model: Any, *inputs: Any, compiled: bool = False, **kwargs: Any) -> Status:
    """Have every kernel proven that a model's calls would run, before a long run.

    Calls ``model(*inputs, **kwargs)`` eagerly, what is compiled in it too, once without gradients
    and, where a parameter or an input needs some, or ``model`` is a function, once with them.
    Buffers (running statistics) and random numbers are as before, no gradient is accumulated; of a
    function, those of the modules that its object, closure, arguments or the globals that it names
    hold.

    Args:
        model: a module or function, or what ``torch.compile`` made of it.
        inputs, kwargs: of a call, of the extents of the run: a verdict holds for a number of images
            up to the next power of two.
        compiled: measure each kernel beside what ``torch.compile`` makes of PyTorch's operators
            too, which takes seconds for each. Only kernels that were measured so run in compiled
            code.

    Returns:
        The verdicts on all kernels that the model asks for, those known before among them; empty,
        and printed as such, for a model on the CPU, whose kernels run unasked.
    """
    found: dict[Kind, Verdict] = {}
    owner = _owner(model)
    tensors = [t for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
    parameters = list(owner.parameters()) if owner is not None else []
    of_inference = owner is not None and any(
        t.is_inference() for t in (*parameters, *owner.buffers())
    )
    # Of a function nobody knows what it trains.
    trains = owner is None or any(t.requires_grad for t in (*parameters, *tensors))
    trains = trains and not of_inference
    with (
        _listening(found),
        _eagerly(of_inference),
        _unchanged(_modules_of((model, inputs, kwargs)), tensors),
    ):
        with torch.no_grad():
            model(*inputs, **kwargs)
        if trains:
            inputs, kwargs = tree_map_only(Tensor, _differentiable, (inputs, kwargs))
            with torch.enable_grad():
                model(*inputs, **kwargs)
    if compiled:
        found = {kind: verdicts.measure_compiled(kind) for kind in found}
    return Status(found.values()) if found else NothingToProve()


class NothingToProve(Status):
    """What :func:`verify` returns of a model that asks for no verdict."""

    __slots__ = ()

    def __str__(self) -> str:
        return (
            "nothing to prove: the model made no call whose kernels are proven before they run "
            "(those for the CPU run unasked; see SENET_KERNELS_GPU and senet_kernels.explain)"
        )

    __repr__ = __str__


def _owner(model: Any) -> nn.Module | None:
    """The module that a call of ``model`` runs, also where ``torch.compile`` has wrapped it, or its
    method."""
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "_torchdynamo_orig_callable", model)
    if not isinstance(model, nn.Module):
        model = getattr(model, "__self__", None)
    return model if isinstance(model, nn.Module) else None


def _differentiable(t: Tensor) -> Tensor:
    """What autograd takes: a copy of a tensor that was made in inference mode."""
    return t.clone() if t.is_inference() else t


@contextmanager
def _eagerly(of_inference: bool) -> Iterator[None]:
    """With no part of a model compiled, since compiled code asks for no proof; in inference mode
    only for a model that was made there."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(of_inference))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes long
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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
def _unchanged(modules: list[nn.Module], tensors: list[Tensor]) -> Iterator[None]:
    """With the buffers of modules, by their names, and the random numbers as they were,
    afterwards."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in dict.fromkeys(inner for outer in modules for inner in outer.modules())
        for name, buffer in module._buffers.items()
        if buffer is None or not is_lazy(buffer)
    ]
    tensors = [*tensors, *(parameter for module in modules for parameter in module.parameters())]
    tensors += [buffer for _, _, buffer, _ in kept if buffer is not None]
    devices = {t.get_device() for t in tensors if t.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                module._buffers[name] = buffer
                if buffer is not None and before is not None:
                    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                        buffer.copy_(before)


def _modules_of(called: Any) -> list[nn.Module]:
    """The modules among these things, and those that a callable among them can reach: by the
    attributes of its object, what it is partial of, its closure, its defaults, and the globals that
    it names."""
    found: dict[nn.Module, None] = {}
    todo, seen = [called], set()
    while todo:
        it = todo.pop()
        if id(it) in seen or issubclass(type(it), (type, ModuleType, Tensor, *_PROXIES)):
            continue
        seen.add(id(it))
        if isinstance(it, nn.Module):
            found[it] = None
        elif isinstance(it, dict):
            todo += it.values()
        elif isinstance(it, (list, tuple, set)):
            todo += it
        elif isinstance(it, partial):
            todo += [it.func, it.args, it.keywords]
        elif isinstance(it, FunctionType):
            todo += [it.__defaults__ or (), it.__kwdefaults__ or {}, vars(it)]
            todo += [cell.cell_contents for cell in it.__closure__ or () if _is_filled(cell)]
            names = _names_in(it.__code__)
            todo += [it.__globals__[name] for name in names if name in it.__globals__]
        elif isinstance(it, MethodType):
            todo += [it.__self__, it.__func__]
        elif hasattr(it, "__dict__") and type(it).__module__.partition(".")[0] != "torch":
            todo += vars(it).values()
            todo += [cls.__dict__.get("__call__") for cls in type(it).__mro__]
    return list(found)


# What they stand for may be gone.
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)


def _names_in(code: CodeType) -> list[str]:
    """Of globals, in functions within it too."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names_in(c))]


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
