"""What a converted module is: an instance of a subclass of its own class, whose ``forward`` calls
the operation with the module's own parameters, or the original where a call is not what the module
was recognised for, or the module not what it was.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta
from functools import partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import _has_any_global_hook

from . import api, between, dispatch, resolve
from .forms import Asks, Form, Halves, Mlp, one_line, weight_and_bias_at
from .namespaces import Namespaces, Reads, Unwatchable, namespaces_of, of_child, what_changed
from .neighbours import Block
from .parts import Change, Refusal, changed_reason, find, guard, hook_reason
from .pointwise import POINTWISE
from .reference import autocast_is_on
from .tensors import (
    PLAIN_TYPES,
    foreign_class,
    redefines_operators,
    redefining_class,
)
from .validation import DTYPES
from .watched import code_of


def stale_reason(module: Any, form: Form | Block) -> str | Change | None:
    """What is not as it was when the module was fused: of its class and code, of itself, of its
    children."""
    cls = type(module)
    reads = cls._reads.get(form.kinds) or _reads_of(cls, form.kinds)
    return what_changed(reads) or changed_reason(module, form.parts)


def _reads_of(cls: type[Fused], kinds: tuple[type[nn.Module], ...]) -> Reads:
    """What the code of a class, and of those of its children, is to find as it was."""
    reads = cls._reads.get(kinds)
    if reads is None:
        everything = Namespaces()
        everything.add(cls._namespaces)
        for kind in kinds:
            everything.add(of_child(kind)[0])
        reads = cls._reads[kinds] = everything.reads()
    return reads


class Fused(nn.Module):
    """Put before a recognised class by :func:`fused_class`."""

    if TYPE_CHECKING:  # torch.jit.script evaluates annotations
        _original: type[nn.Module]
        _namespaces: Namespaces  # of the original, when it was recognised
        _reads: dict[tuple[type[nn.Module], ...], Reads]  # by the classes of its children
        _forward: tuple[Any]
        _guards: tuple[FunctionType, ...]  # of the globals that the original reads
        _code: str
        _senet_form: Form | Block | None
        _senet_backend: str | None

    def __init_subclass__(cls) -> None:
        """Nothing: the original's may put each class into a list, and ours is none of its own."""

    _senet_form = None  # also where it was made by slicing a Sequential, say
    _senet_backend = None

    def _senet_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The ``forward`` of every such class, under its original's signature."""
        try:
            form, backend = self._senet_form, self._senet_backend
        except AttributeError:  # kept since before unfuse_se_blocks, by whoever wraps forwards
            return type(self).forward(self, *args, **kwargs)
        x: Any = args[0] if args else None
        compiling = resolve.is_compiling()
        if form is None or (
            isinstance(x, Tensor)
            and not (_may_run_halves if type(form) is Halves else dispatch.may_run_kernels)(
                x, backend, compiling
            )
        ):
            if not kwargs and len(args) == 1:  # in fewer instructions
                return self._original.forward(self, x)
            return self._original.forward(self, *args, **kwargs)
        plain, more, lengths = args, kwargs, None
        if isinstance(form, Mlp) and form.lengths is not None:
            plain, more, lengths = _take_lengths(args, kwargs)
        direct = not compiling and resolve.is_direct()
        reason = _call_reason(form, self, plain, more, compiling, direct)
        y: Any = NotImplemented
        if reason is None:
            if isinstance(form, Block):
                y = self._run_block(form, x)
            elif isinstance(form, Mlp):
                y = _excite(self, form, x, lengths=lengths, compiling=compiling, direct=direct)
            else:
                y = _run_halves(self, form, x)
        elif (backend is not None or dispatch._forced is not None) and not isinstance(form, Block):
            _refuse_kernels(self, reason)  # a block's squeeze-and-excitation has its own say
        return self._original.forward(self, *args, **kwargs) if y is NotImplemented else y

    def _run_block(self, block: Block, x: Tensor) -> Any:
        try:
            se = find(self, block.se)
            hooked = any(hook_reason(find(self, path)) for path in block.unhooked)
        except KeyError:  # taken out
            return NotImplemented
        form = se._senet_form if isinstance(se, Fused) else None
        compiling = resolve.is_compiling()
        if (
            not isinstance(form, Mlp)
            or hook_reason(se)
            or (_changed_as_compiled(se, form) if compiling else stale_reason(se, form))
            or not dispatch.may_run_kernels(x, se._senet_backend, compiling)
            or hooked
        ):
            return NotImplemented
        return block.run(block, self, x, partial(_excite_within, se, form))

    def _stale_reason_at_trace_time(self) -> str | None:
        reason = None if self._senet_form is None else stale_reason(self, self._senet_form)
        return None if reason is None else str(reason)

    # Dynamo runs it, and keeps the answer: torch.compiler.assume_constant_result, which would
    # import Dynamo.
    _stale_reason_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle and copy cannot find it by name.
        reduced: Any = super().__reduce_ex__(protocol)
        if "_original" not in vars(type(self)):  # of a class on top, which its user finds
            return reduced
        return (_new_fused, (self._original, self._code), *reduced[2:])


def _excite(
    module: Any,
    form: Mlp,
    x: Tensor,
    *,
    before: str | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    compiling: bool | None = None,
    direct: bool = False,
) -> Any:
    """A module's operation, with the steps around it that its block adds; NotImplemented where
    nothing fused computes it."""
    w1, b1 = (None, None) if form.fc1 is None else weight_and_bias_at(module, form.fc1)
    w2, b2 = weight_and_bias_at(module, form.fc2)
    backend = module.__dict__["_senet_backend"]
    compiling = resolve.is_compiling() if compiling is None else compiling
    reason = _mlp_reason(form, x, w1, w2, compiling)
    if reason is not None:
        _refuse_kernels(module, reason)
        return NotImplemented
    more = form.residual is not None or (form.lengths is not None and lengths is not None)
    if more and resolve.why_no_kernel() is not None:  # the original computes them
        return NotImplemented
    if form.residual is not None:
        residual, direct = form.residual(module, x), False  # it may call anything
    if form.lengths is not None and lengths is not None:
        if not isinstance(lengths, Tensor):  # the original's to refuse
            return NotImplemented
        lengths = form.lengths(x, lengths)
    names = (form.activation, form.gate, before, after)
    try:
        return resolve.run(
            x, w1, b1, w2, b2, names, None, residual, None, None, lengths, False, backend, direct
        )
    except (TypeError, ValueError) as error:
        if dispatch.requested_backend(backend) != "auto":
            raise
        try:
            resolve.prepare(
                x, w1, b1, w2, b2, names, None, residual, None, None, lengths, False, backend
            )
        except (TypeError, ValueError):
            return NotImplemented  # not a call the operation takes: the original's business
        raise error from None  # of a hook, say


def _refuse_kernels(module: Any, reason: str | Change) -> None:
    """Refuse a kernel backend asked for by name, unless what is going on is without kernels."""
    backend = module._senet_backend
    if dispatch.requested_backend(backend) in dispatch.KERNELS and not resolve.why_no_kernel():
        dispatch.refuse_kernels(f"this {module._original.__name__}: {reason}", backend)


def _may_run_halves(x: Tensor, backend: str | None, compiling: bool) -> bool:
    """Whether a module whose excitation runs between kernels is left to them: where they are
    faster, or asked for by name."""
    requested = dispatch._forced if backend is None else backend
    if (requested is None or requested == "auto") and not between.is_worth(x, compiling):
        return False
    return dispatch.may_run_kernels(x, backend, compiling)


def _run_halves(module: Any, form: Halves, x: Tensor) -> Tensor:
    """A module whose excitation runs between the kernels for the halves."""
    backend = module._senet_backend
    options = between.prepared(x, form.gate, backend)
    if options is not None:
        return between.run(x, partial(form.excite, module), form.gate, options)
    u = form.excite(module, api.squeeze(x, backend=backend))
    return between.scaled(x, u, form.gate, backend)


def _excite_within(
    module: Any,
    form: Mlp,
    x: Tensor,
    *,
    before: str | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same inside a block that is half computed already: step by step where nothing fused
    computes it."""
    y: Any = NotImplemented
    if x.dim() in form.ranks:  # unless a Sequential reshapes on the way
        y = _excite(module, form, x, before=before, after=after, residual=residual)
    if y is NotImplemented:
        y = module(POINTWISE[before or "identity"].fn(x))
        y = POINTWISE[after or "identity"].fn(y if residual is None else y + residual)
    result: Tensor = y
    return result


def _take_lengths(args: Any, kwargs: Any) -> tuple[Any, Any, Tensor | None]:
    """Positional and named arguments without ``lengths``, and that."""
    if len(args) == 2 and not kwargs:
        return args[:1], kwargs, args[1]
    if len(args) == 1 and kwargs.keys() == {"lengths"}:
        return args, {}, kwargs["lengths"]
    return args, kwargs, None


def _changed_as_compiled(module: Any, form: Form | Block) -> str | None:
    """What of the module is unlike the one that was fused, as Dynamo can trace and guard it."""
    # The answer for one module is that for all equal ones, by whatever `guard` makes Dynamo guard:
    # what it does not is of their class.
    reason: str | None = module._stale_reason_at_trace_time()
    if reason is None and not (
        module._original.forward is module._forward[0]
        and all(is_as_it_was() for is_as_it_was in module._guards)
        and guard(module, form.parts)
    ):
        reason = "it has changed since it was compiled"
    return reason


def _call_reason(
    form: Form | Block, module: Any, args: Any, kwargs: Any, compiling: bool, direct: bool
) -> str | Change | None:
    """Why the original forward runs: what is unlike the calls, or the module, that the form was
    recognised for."""
    if len(args) != 1 or kwargs:
        return "it was called with other arguments than x"
    x = args[0]
    if not isinstance(x, Tensor):  # torch.fx traces the original
        return f"x is a {type(x).__name__}"
    if x.dim() not in form.ranks:
        return f"x has {x.dim()} dimensions"
    if not (direct or compiling):
        if resolve.tracing_state() is not None:
            return resolve.why_no_kernel()
        if redefines_operators():
            return "a mode of torch_function or torch_dispatch is on that may redefine its layers"
    if type(x) is not Tensor and (kind := redefining_class(x)) is not None:
        return f"x is a {kind}"
    if _has_any_global_hook():
        return "a global module hook is registered"
    reason: str | Change | None
    reason = _changed_as_compiled(module, form) if compiling else stale_reason(module, form)
    if reason is None and not isinstance(form, Block) and form.asks is not None:
        reason = _unproven_reason(form, form.asks, module, x)
    if reason is None and not isinstance(form, Mlp):  # of that _excite and resolve.run ask more
        reason = _no_kernel_reason(x, compiling)
    return reason


def _unproven_reason(form: Form, asks: Asks, module: nn.Module, x: Tensor) -> str | None:
    """Which flags that its forward reads have values for which its form was not proven."""
    if asks.gradients is not None:
        needed = {p.requires_grad for p in module.parameters()}
        now = torch.is_grad_enabled(), x.requires_grad, True in needed
        if len(needed) > 1 or now not in asks.gradients:
            return "its forward asks what needs gradients, and is not known for what does now"
    if asks.extents and x.numel() == 0:
        return "its forward asks for extents, and is not known for x without elements"
    if asks.training:
        children = (find(module, part.path) for part in form.parts)
        if any(child.training is not module.training for child in children):
            return "its forward asks for the mode, and some of its children are in another one"
    return None


def _no_kernel_reason(x: Tensor, compiling: bool) -> str | None:
    """Why no kernel takes part, whatever is computed of x; asked before a part of it is."""
    if x.dtype not in DTYPES or x.is_nested or x.layout != torch.strided:
        return f"x is a {x.dtype} tensor of layout {x.layout}"
    if not compiling and _is_transposed(x):
        return _TRANSPOSED
    return resolve.why_no_kernel()


def _is_transposed(x: Tensor) -> bool:
    """Whether channels lie outside images in memory. Not asked in compiled code, of which it would
    bind extents."""
    if type(x) not in PLAIN_TYPES:
        return False
    try:
        strides = x.stride()
    except RuntimeError:  # of no strided layout
        return False
    return strides[0] < strides[1]


#: A product takes the layout of its first factor, which may be the gates: contiguous.
_TRANSPOSED = "channels of x lie outside its images, and its forward may lay out y in another way"


def _mlp_reason(form: Mlp, x: Tensor, w1: Any, w2: Any, compiling: bool) -> str | None:
    """What of x or of the layers is not as the operation takes it."""
    if type(w2) not in PLAIN_TYPES or type(w1) not in PLAIN_TYPES:
        kind = foreign_class(w2) or foreign_class(w1)
        if kind is not None:
            return f"its layers have weights of class {kind}"
    try:
        rows = w2.shape  # a shape is read in half the time of an extent
        channels, outputs = (rows if form.fc1 is None else w1.shape)[1], rows[0]
    except (AttributeError, IndexError):  # None; freed
        return "its layers have no matrices for weights"
    try:
        given = x.shape[1]
    except RuntimeError:
        return "x is nested"
    if given != channels:
        return f"x has {given} channels, its layers have {channels}"
    if not compiling and _is_transposed(x):
        return _TRANSPOSED
    if outputs != channels:  # twice as many would be taken for scale and shift
        return f"its last layer has {outputs} outputs for {channels} channels"
    if form.autocast and x.dtype is w2.dtype:
        return None
    if autocast_is_on(x.device.type):
        return None if form.autocast else "it does not compute as autocast would have it"
    if x.dtype not in form.dtypes:
        return f"its own forward rounds otherwise in {x.dtype}"
    # Outside autocast the original casts, or raises what its user knows.
    return None if x.dtype is w2.dtype else f"x is {x.dtype}, its parameters are {w2.dtype}"


_CLASSES: dict[type[nn.Module], type[Fused]] = {}
_METACLASSES = (type, ABCMeta)


def fused_class(original: type[nn.Module]) -> type[Fused]:
    known = _CLASSES.get(original)
    if known is None or what_changed(_reads_of(known, ())):
        if issubclass(original, GraphModule):
            raise Refusal("it is a traced graph, of a class of its own: fuse before tracing")
        for name in ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"):
            if getattr(original, name, None) is not getattr(nn.Module, name, None):
                raise Refusal(f"its class is copied and pickled in its own way, by {name}")

        if type(original) not in _METACLASSES:
            raise Refusal(f"its class is made by {type(original).__name__}, which may keep a list")
        # A function of its own for each class, which has the original's signature.
        ours = Fused._senet_forward
        forward = wraps(original.forward)(FunctionType(ours.__code__, ours.__globals__))
        namespaces = namespaces_of(original)
        contents = {
            "_original": original, "_namespaces": namespaces, "_reads": {},
            "_guards": namespaces.guards(),
            "_forward": (original.forward,), "_code": code_of(original), "forward": forward,
            "__module__": __name__, "__doc__": original.__doc__,
        }  # fmt: skip
        name = f"Fused{original.__name__}"
        try:
            _CLASSES[original] = type(name, (Fused, original), contents)
        except Exception as error:  # __init_subclass__ and metaclasses may do as they like
            raise Refusal(f"its class cannot be subclassed: {one_line(error)}") from error
    return _CLASSES[original]


def check_code(original: type[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
    """Refuse a module whose code, or that of its children, is not what its form is about."""
    try:
        reason = what_changed(_reads_of(fused_class(original), kinds))
    except Unwatchable as unwatchable:
        reason = str(unwatchable)
    if reason is not None:
        raise Refusal(reason)


def _new_fused(original: type[nn.Module], code: str | None = None) -> nn.Module:
    """An instance for ``copy`` and ``pickle``; ``code``: the class's when its form was found."""
    cls = fused_class(original)
    if code in (None, cls._code):
        return cls.__new__(cls)
    warnings.warn(
        f"{original.__module__}.{original.__qualname__} is not the class that was fused (other "
        "code, or another Python): its own forward runs; call fuse_se_blocks again",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip
    return original.__new__(original)
