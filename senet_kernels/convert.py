"""``fuse_se_blocks``: squeeze-and-excitation modules of an existing model run on the fused kernels.

A module is converted by giving it a new class: a subclass of its own whose ``forward`` calls
``squeeze_excite`` with the module's own parameters. Nothing else changes, so that parameters,
names, state_dict keys, hooks, flags and copies stay what they were, and giving the old class back
undoes it. Where a call is not what the module was recognised for, or a child has been hooked or
replaced since, the module's original forward runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import _has_any_global_hook

from . import api, dispatch, resolve
from .forms import (
    Form,
    Functions,
    Halves,
    Mlp,
    Refusal,
    code_of,
    find,
    functions_of,
    guard,
    hook_reason,
    is_patched,
    one_line,
    stale_reason,
    weight_and_bias,
)
from .neighbours import Block, recognise_block
from .pointwise import POINTWISE
from .recognise import recognise
from .reference import autocast_is_on
from .tensors import PLAIN_TYPES, foreign_class, wrapper_class
from .validation import DTYPES


class Entry(NamedTuple):
    """One line of a report: a module by its name in the model, and what became of it."""

    name: str
    kind: str
    note: str  # what it computes, or why it was refused


def report(**sections: tuple[Entry, ...]) -> str:
    """Entries as text: a line of counts, then a line for each."""
    lines = [", ".join(f"{title} {len(entries)}" for title, entries in sections.items())]
    for title, entries in sections.items():
        rows = [(title, e.name or "(the model)", e.kind, e.note) for e in entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        for *cells, note in rows:
            padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
            lines.append("  ".join([*padded, note]))
    return "\n".join(lines)


class FusionReport(NamedTuple):
    """What :func:`fuse_se_blocks` did. Print it to read it."""

    replaced: tuple[Entry, ...]
    refused: tuple[Entry, ...]

    def __str__(self) -> str:
        return report(replaced=self.replaced, refused=self.refused)


def _stale_reason(module: Any) -> str | None:
    """What is not as it was when the module was fused: of itself, of its class, of its children."""
    if is_patched(module._functions):
        return "its class has been changed"
    return stale_reason(module, module._senet_form.parts)


def _stale_reason_at_trace_time(module: Any) -> str | None:
    return _stale_reason(module)


# Dynamo runs it, and keeps the answer: torch.compiler.assume_constant_result, which would import
# Dynamo.
_stale_reason_at_trace_time._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Fused(nn.Module):
    """Put before a recognised class by :func:`_fused_class`."""

    if TYPE_CHECKING:  # torch.jit.script evaluates annotations
        _original: type[nn.Module]
        _functions: Functions  # of the original, when it was recognised
        _forward: tuple[Any]
        _code: str
        _senet_form: Form | Block | None
        _senet_backend: str | None
    _senet_form = None  # also where it was made by slicing a Sequential, say
    _senet_backend = None

    def _senet_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The ``forward`` of every such class, under its original's signature."""
        form, backend = self._senet_form, self._senet_backend
        x: Any = args[0] if args else None
        compiling = resolve.is_compiling()
        if form is None or (
            isinstance(x, Tensor) and not dispatch.may_run_kernels(x, backend, compiling)
        ):
            return self._original.forward(self, *args, **kwargs)
        plain, more, lengths = args, kwargs, None
        if isinstance(form, Mlp) and form.lengths is not None:
            plain, more, lengths = _take_lengths(args, kwargs)
        reason = _call_reason(form, self, plain, more, compiling)
        y: Any = NotImplemented
        if reason is None:
            if isinstance(form, Block):
                y = self._run_block(form, x)
            elif isinstance(form, Mlp):
                y = _excite(self, form, x, lengths=lengths)
            else:
                y = _run_halves(self, form, x)
        elif (backend is not None or dispatch._forced is not None) and not isinstance(form, Block):
            _refuse_kernels(self, reason)  # a block's squeeze-and-excitation has its own say
        return self._original.forward(self, *args, **kwargs) if y is NotImplemented else y

    def _run_block(self, block: Block, x: Tensor) -> Any:
        try:
            se = find(self, block.se)
        except KeyError:  # taken out
            return NotImplemented
        form = se._senet_form if isinstance(se, _Fused) else None
        compiling = resolve.is_compiling()
        if (
            not isinstance(form, Mlp)
            or hook_reason(se)
            or (_changed_as_compiled(se, form) if compiling else _stale_reason(se))
            or not dispatch.may_run_kernels(x, se._senet_backend, compiling)
        ):
            return NotImplemented
        return block.run(block, self, x, partial(_excite_within, se, form))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle and copy cannot find it by name.
        reduced: Any = super().__reduce_ex__(protocol)
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
) -> Any:
    """A module's operation, with the steps around it that its block adds; NotImplemented where
    nothing fused computes it."""
    w1, b1 = (None, None) if form.fc1 is None else weight_and_bias(find(module, form.fc1))
    w2, b2 = weight_and_bias(find(module, form.fc2))
    backend = module.__dict__["_senet_backend"]
    reason = _mlp_reason(form, x, w1, w2)
    if reason is not None:
        _refuse_kernels(module, reason)
        return NotImplemented
    more = form.residual is not None or (form.lengths is not None and lengths is not None)
    if more and resolve.why_no_kernel() is not None:  # the original computes them
        return NotImplemented
    if form.residual is not None:
        residual = form.residual(module, x)
    if form.lengths is not None and lengths is not None:
        lengths = form.lengths(x, lengths)
    names = (form.activation, form.gate, before, after)
    try:
        return resolve.run(
            x, w1, b1, w2, b2, names, None, residual, None, None, lengths, False, backend
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


def _refuse_kernels(module: Any, reason: str) -> None:
    """Refuse a kernel backend asked for by name, unless what is going on is without kernels."""
    backend = module._senet_backend
    if dispatch.requested_backend(backend) in dispatch.KERNELS and not resolve.why_no_kernel():
        dispatch.refuse_kernels(f"this {module._original.__name__}: {reason}", backend)


def _run_halves(module: Any, form: Halves, x: Tensor) -> Tensor:
    """A module whose excitation runs between the kernels for the halves."""
    backend = module._senet_backend
    u = form.excite(module, api.squeeze(x, backend=backend))
    if u.shape == x.shape[:2] and (u.dtype == x.dtype or autocast_is_on(x.device.type)):
        return api.channel_scale(x, u, gate=form.gate, backend=backend)
    # A layer in its place has another dtype, or is as wide as broadcasting allows.
    row = POINTWISE[form.gate]
    return x * (row.eager or row.fn)(u[:, :, None, None])


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
    reason = _stale_reason_at_trace_time(module)
    if reason is None and not (
        module._original.forward is module._forward[0] and guard(module, form.parts)
    ):
        reason = "it has changed since it was compiled"
    return reason


def _call_reason(
    form: Form | Block, module: Any, args: Any, kwargs: Any, compiling: bool
) -> str | None:
    """Why the original forward runs: what is unlike the calls, or the module, that the form was
    recognised for."""
    if len(args) != 1 or kwargs:
        return "it was called with other arguments than x"
    x = args[0]
    if not isinstance(x, Tensor):  # torch.fx traces the original
        return f"x is a {type(x).__name__}"
    if x.dim() not in form.ranks:
        return f"x has {x.dim()} dimensions"
    if not compiling and torch._C._get_tracing_state() is not None:
        return resolve.why_no_kernel()
    if _has_any_global_hook():
        return "a global module hook is registered"
    reason = _changed_as_compiled(module, form) if compiling else _stale_reason(module)
    if reason is None and not isinstance(form, Mlp):  # of that _excite and resolve.run ask more
        reason = _no_kernel_reason(x)
    return reason


def _no_kernel_reason(x: Tensor) -> str | None:
    """Why no kernel takes part, whatever is computed of x; asked before a part of it is."""
    if x.dtype not in DTYPES or x.is_nested or x.layout != torch.strided:
        return f"x is a {x.dtype} tensor of layout {x.layout}"
    kind = wrapper_class(x)
    return resolve.why_no_kernel() if kind is None else f"x is a {kind}"


def _mlp_reason(form: Mlp, x: Tensor, w1: Any, w2: Any) -> str | None:
    """What of x or of the layers is not as the operation takes it."""
    if type(w2) not in PLAIN_TYPES or type(w1) not in PLAIN_TYPES:
        kind = foreign_class(w2) or foreign_class(w1)
        if kind is not None:
            return f"its layers have weights of class {kind}"
    channels = (w2 if w1 is None else w1).size(1)
    if x.is_nested or x.size(1) != channels:
        return f"x has {x.size(1)} channels, its layers have {channels}"
    if w2.size(0) != channels:  # twice as many would be taken for scale and shift
        return f"its last layer has {w2.size(0)} outputs for {channels} channels"
    if form.autocast and x.dtype is w2.dtype:
        return None
    if autocast_is_on(x.device.type):
        return None if form.autocast else "it does not compute as autocast would have it"
    # Outside autocast the original casts, or raises what its user knows.
    return None if x.dtype is w2.dtype else f"x is {x.dtype}, its parameters are {w2.dtype}"


_CLASSES: dict[type[nn.Module], type[_Fused]] = {}


def _fused_class(original: type[nn.Module]) -> type[_Fused]:
    known = _CLASSES.get(original)
    if known is None or is_patched(known._functions):
        if issubclass(original, GraphModule):
            raise Refusal("it is a traced graph, of a class of its own: fuse before tracing")
        for name in ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__"):
            if getattr(original, name, None) is not getattr(nn.Module, name, None):
                raise Refusal(f"its class is copied and pickled in its own way, by {name}")

        # A function of its own for each class, which has the original's signature.
        ours = _Fused._senet_forward
        forward = wraps(original.forward)(FunctionType(ours.__code__, ours.__globals__))
        contents = {
            "_original": original, "_functions": functions_of(original),
            "_forward": (original.forward,), "_code": code_of(original), "forward": forward,
            "__module__": __name__, "__doc__": original.__doc__,
        }  # fmt: skip
        name = f"Fused{original.__name__}"
        try:
            _CLASSES[original] = type(name, (_Fused, original), contents)
        except Exception as error:  # __init_subclass__ and metaclasses may do as they like
            raise Refusal(f"its class cannot be subclassed: {one_line(error)}") from error
    return _CLASSES[original]


def _new_fused(original: type[nn.Module], code: str | None = None) -> nn.Module:
    """An instance for ``copy`` and ``pickle``; ``code``: the class's when its form was found."""
    cls = _fused_class(original)
    if code in (None, cls._code):
        return cls.__new__(cls)
    warnings.warn(
        f"{original.__module__}.{original.__qualname__} is not the class that was fused (other "
        "code, or another Python): its own forward runs; call fuse_se_blocks again",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip
    return original.__new__(original)


def _describe(form: Form) -> str:
    if not isinstance(form, Mlp):
        return f"squeeze, its own excitation, channel_scale; gate {form.gate}"
    layers = "one layer" if form.fc1 is None else f"two layers, {form.activation}"
    added = "" if form.residual is None else ", plus a residual"
    return f"squeeze_excite: {layers}, gate {form.gate}{added}"


class _Plan:
    """What is to be done to a model, worked out before anything is changed."""

    def __init__(
        self, model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None
    ) -> None:
        self.forms: dict[nn.Module, Form | Block] = {}
        self.replaced: list[Entry] = []
        self.refused: list[Entry] = []
        self.candidates = [
            (name, module)
            for name, module in model.named_modules()
            if filter_fn is None or filter_fn(name, module)
        ]

    def add_modules(self) -> None:
        """Every squeeze-and-excitation module; what lies inside one is done with."""
        inside: set[nn.Module] = set()
        for name, module in self.candidates:
            if module in inside or isinstance(_form_of(module), Block):
                continue
            try:
                form = _form_of(module) or recognise(module)
                if form is not None and not isinstance(module, _Fused):
                    _fused_class(type(module))
            except Refusal as refusal:
                self.refused.append(Entry(name, _kind(module), str(refusal)))
            else:
                if form is None:
                    continue
                assert not isinstance(form, Block)
                self.forms[module] = form
                self.replaced.append(Entry(name, _kind(module), _describe(form)))
            inside.update(module.modules())

    def add_blocks(self) -> None:
        """Every module that calls one of those found."""
        for name, module in self.candidates:
            if not any(self._is_found(child) for child in module.children()):
                continue
            try:
                block = _form_of(module) or recognise_block(module, self._is_found)
                if not isinstance(module, _Fused):
                    _fused_class(type(module))
            except Refusal as refusal:
                self.refused.append(Entry(name, _kind(module), f"neighbours: {refusal}"))
            else:
                assert isinstance(block, Block)
                self.forms[module] = block
                self.replaced.append(Entry(name, _kind(module), f"neighbours: {block.note}"))

    def _is_found(self, module: nn.Module) -> bool:
        form = self.forms.get(module)
        return isinstance(form, Mlp) and form.residual is None

    def carry_out(self, backend: str | None) -> None:
        """Convert the modules, all or none.

        Raises:
            TypeError: one of them does not let its class or its attributes be set.
        """
        done: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        for module, form in self.forms.items():
            before = {n: v for n, v in vars(module).items() if n.startswith("_senet_")}
            done.append((module, type(module), before))
            try:
                if not isinstance(module, _Fused):
                    module.__class__ = _fused_class(type(module))
                module._senet_form = form  # type: ignore[assignment]
                module._senet_backend = backend  # type: ignore[assignment]
            except Exception as error:  # __setattr__ may do as it likes
                for other, kind, facts in reversed(done):
                    object.__setattr__(other, "__class__", kind)
                    for name in ("_senet_form", "_senet_backend"):
                        vars(other).pop(name, None)
                    vars(other).update(facts)
                raise TypeError(
                    f"model: expected modules that can be converted, got one of class "
                    f"{_kind(module)}: {one_line(error)}; leave it out by filter_fn"
                ) from error


def _form_of(module: nn.Module) -> Form | Block | None:
    return module._senet_form if isinstance(module, _Fused) else None


def _kind(module: nn.Module) -> str:
    cls = module._original if isinstance(module, _Fused) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def fuse_se_blocks(
    model: nn.Module,
    *,
    neighbours: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    backend: str | None = None,
) -> FusionReport:
    """Run the squeeze-and-excitation modules of ``model`` on the fused kernels, in place.

    Recognised are the modules of timm, torchvision, transformers, MONAI,
    segmentation-models-pytorch, fvcore and speechbrain, by their exact classes, and any other
    module that consists of an excitation's two layers and is shown on random numbers to compute
    the operation (what a forward would do for extents or values that were not tried is not seen:
    leave a module that branches on them out by ``filter_fn``). Parameter objects, names,
    state_dict keys, hooks on the module, train flag, ``isinstance``, deepcopy and pickle stay as
    they are (``type(m)`` becomes a subclass); inlined blocks that are no module of their own are
    not found. A child that gets a hook, a parametrization or a replacement later makes its block
    run its original forward; so do settings of the module or its children that are changed later,
    functions of its class that are replaced, and inputs of other widths.

    Args:
        model: any module; it may itself be a squeeze-and-excitation module.
        neighbours: let the steps around a module join its operation: the activation before it
            (timm's EfficientNet, MobileNetV3 and RegNet blocks, any Sequential, so torchvision's
            too), or the residual and the activation after it (timm's ResNet blocks). Hooks on
            the block fire as before, those on the steps that joined make the block run its
            original forward.
        filter_fn: called with name and module; False leaves a module alone.
        strict: raise where a module is refused, before anything is changed.
        backend: see :func:`senet_kernels.squeeze_excite`; asked for by name, it never falls back.

    Returns:
        What was replaced, what was refused, and why. Modules already fused are left as they are
        (but for ``backend``) and listed as replaced.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` no function; or a module does not let
            its class be set (nothing is changed then).
        ValueError: ``strict``, and a module was refused; or no such backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn: expected a function of name and module, got {type(filter_fn).__name__}"
        )
    dispatch.check_backend_name(backend, "backend")
    plan = _Plan(model, filter_fn)
    plan.add_modules()
    if neighbours:
        plan.add_blocks()
    if strict and plan.refused:
        raise ValueError(
            "strict: expected every squeeze-and-excitation module to be replaceable, got "
            + "; ".join(f"{e.name or 'the model'} ({e.kind}): {e.note}" for e in plan.refused)
        )
    plan.carry_out(backend)
    return FusionReport(tuple(plan.replaced), tuple(plan.refused))


def unfuse_se_blocks(model: nn.Module) -> int:
    """Give every module that :func:`fuse_se_blocks` converted its original class back.

    Do so before pickling a whole model for others, scripting, or quantising layers by their class.
    Exports need it not: docs/deploy.md.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: ``model`` is no module, or something has given one of them another class on top
            (FSDP2, a parametrization): undo that first. Nothing is restored then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    fused = [module for module in model.modules() if isinstance(module, _Fused)]
    for module in fused:
        if "_original" not in vars(type(module)):
            raise TypeError(
                f"model: expected modules with the classes that fuse_se_blocks gave them, got one "
                f"of {type(module).__name__}, made of {_kind(module)}: undo first what was done to "
                "it since"
            )
    for module in fused:
        module.__dict__.pop("_senet_form", None)
        module.__dict__.pop("_senet_backend", None)
        module.__class__ = module._original  # type: ignore[assignment]
    return len(fused)
