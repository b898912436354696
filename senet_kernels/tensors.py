"""What kind of tensor an argument is: kernels read the memory of plain ones alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

#: Classes whose operators are PyTorch's own, without asking further. None: no tensor.
PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None)))
# Stand-ins for plain tensors while something is traced: raw ops have fake kernels for them.
_STAND_INS = (FakeTensor, FunctionalTensor)


def wrapper_class(t: Tensor | None) -> str | None:
    """The name of t's class where it is made of other tensors (a DTensor, a quantised weight): it
    knows what PyTorch's operators mean to it, and nothing of ours."""
    kind: type = type(t)
    wraps: bool = kind not in PLAIN_TYPES and is_traceable_wrapper_subclass(t)
    return kind.__name__ if wraps else None


def redefining_class(t: Tensor) -> str | None:
    """The same, and the name of a class that has its own ``__torch_function__`` or
    ``__torch_dispatch__``: it may say what PyTorch's operators do, so that a module's own forward
    is another computation for it."""
    kind: type = type(t)
    if kind in PLAIN_TYPES:
        return None
    return wrapper_class(t) or (kind.__name__ if _has_own_operators(kind) else None)


def _has_own_operators(kind: Any) -> bool:
    if issubclass(kind, _STAND_INS):
        return False
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return function not in _USUAL_FUNCTIONS or kind.__torch_dispatch__ is not _USUAL_DISPATCH


# Dynamo keeps the answer, as of torch.compiler.assume_constant_result.
_has_own_operators._dynamo_marked_constant = True  # type: ignore[attr-defined]

_USUAL_FUNCTIONS = (
    vars(Tensor)["__torch_function__"].__func__,
    torch._C._disabled_torch_function_impl,
)
_USUAL_DISPATCH = torch._C._disabled_torch_dispatch_impl


def redefines_operators() -> bool:
    """Whether a mode is on that may say what PyTorch's operators do: one that is not PyTorch's own,
    and does not say of itself that it only observes (``only_observes = True``)."""
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    return any(
        not (type(mode).__module__.startswith("torch.") or getattr(mode, "only_observes", False))
        for mode in modes
    )


def foreign_class(weight: Any) -> str | None:
    """The name of a weight's class unless it is a plain tensor's.

    Stricter than :func:`wrapper_class`: a layer is a matrix product of what its weight holds only
    where the weight does not redefine the product.
    """
    kind: type = type(weight)
    if kind in PLAIN_TYPES or issubclass(kind, _STAND_INS):
        return None
    return kind.__name__


def is_proxy(x: Any) -> bool:
    """Whether x is no tensor and records what is done to it, as torch.fx's Proxy."""
    # Not has_torch_function, which says yes of anything while a mode is on.
    if x is None or isinstance(x, Tensor):  # Dynamo of torch 2.11 has no hasattr of None's class
        return False
    return hasattr(type(x), "__torch_function__")


def proxies(*arguments: Any) -> tuple[Any, ...]:
    """Those of a call's arguments, and of the members of a tuple among them, that are."""
    if PLAIN_TYPES.issuperset(map(type, arguments)):
        return ()
    members = [v for a in arguments for v in (a if isinstance(a, tuple) else (a,))]
    return tuple(filter(is_proxy, members))


def is_traced(t: Tensor) -> bool:
    """Whether torch.compile records what is done to t: Dynamo, or AOTAutograd behind it, during
    which torch 2.11 does not call itself compiling."""
    return torch.compiler.is_compiling() or isinstance(t, _STAND_INS)


def is_captured() -> bool:
    """Whether calls are recorded in a graph that is run, and perhaps trained, elsewhere: by
    ``torch.export``, ``make_fx``. Not under torch.compile, whose graphs stay in this process."""
    if _is_compiling():
        return _is_exporting()
    # make_fx has a mode of one kind or the other.
    modes = dispatch_modes() or function_modes()
    return bool(modes) and get_proxy_mode() is not None


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Dynamo calls it: that of torch 2.11 takes the question itself to be True under torch.compile too.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]

# Looked up once: asked before many a call. No call is captured where torch is not compiling and
# both of these are 0.
_is_compiling = torch.compiler.is_compiling
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors is differentiated."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def evaluate_annotations(forward: Callable[..., Any]) -> None:
    """Make classes of a function's annotations, which postponed evaluation has left strings:
    torch.fx keeps them in its graphs, and cannot pickle strings there."""
    forward.__annotations__ = get_type_hints(forward)


def untraced() -> AbstractContextManager[None]:
    """Where extents are numbers. While ``torch.jit.trace`` records they are tensors instead, and
    each comparison of them is warned of."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return _NOTHING
    return _paused()


_NOTHING = nullcontext()


@contextmanager
def _paused() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)
