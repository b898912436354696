"""From the arguments of a call to what runs it: checks, promotion under autocast, the choice of a
backend, and the cache of choices.

:func:`run` computes the whole operation where a kernel (or the reference, by name) takes the call.
Where none does it returns NotImplemented, and the caller has its own way: the public functions and
:class:`senet_kernels.FusedSEBlock` the plain composition of :mod:`senet_kernels.fallback`, a
converted module its original forward.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._device import DeviceContext

from . import autograd, dispatch, features, public_ops, reference, trust, validation
from .pointwise import Options, check_name, pack
from .settle import ResolvedCall as ResolvedCall
from .settle import settle
from .tensors import (
    PLAIN_TYPES,
    dispatch_modes,
    function_modes,
    is_captured,
    proxies,
    untraced,
    wrapper_class,
)
from .tensors import requires_grad as requires_grad

#: activation, gate, before, after, as they were given.
Names = tuple[str | None, str | None, str | None, str | None]


_RESOLVED: dict[tuple[Any, ...], ResolvedCall] = {}


def _make(
    device: str,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    names: Names,
    facts: tuple[str, bool, bool, bool, bool, bool, bool, bool, bool, str | None],
    requested: str,
) -> ResolvedCall:
    options = Options(
        *(check_name(argument, v) for argument, v in zip(Options._fields, names, strict=True))
    )
    call = features.Call(device, dtype, param_dtype, options, *facts)
    choice = dispatch.choose(call, requested)
    asks = trust.is_asked(choice.backend, device)
    return ResolvedCall(options, pack(options), call, choice, asks)


def _note_short_way(kind: tuple[Any, ...], resolved: ResolvedCall) -> None:
    """Keep what a call on the CPU resolves to for the short way of :func:`run` too, where the
    native kernels take all calls with these names: of any dtype, layers and residual."""
    if resolved.call.device != "cpu" or resolved.choice.backend != "native" or resolved.asks:
        return
    names, requested = kind[3], kind[5]
    rest = (False, False, False)
    for dtype, form, shift, residual in itertools.product(
        validation.DTYPES, ("two layers", "single layer (w1=None)"), (False, True), (False, True)
    ):
        call = features.Call("cpu", dtype, dtype, resolved.options, form, shift, *rest, residual,
                             False)  # fmt: skip
        if dispatch.choose(call, "auto").backend != "native":
            return
    _RESOLVED[names, requested] = resolved
    if requested == "auto":
        _RESOLVED[names, None] = resolved


# Looked up once, as the ops are: each is asked before every call.
is_compiling = torch.compiler.is_compiling
_is_autocast_enabled, _is_grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
tracing_state = torch._C._get_tracing_state
_function_mode_at = torch._C._get_function_stack_at


def is_direct() -> bool:
    """Whether operators are simply run: nothing traces, and no mode is on. (``torch.compile`` has
    a question of its own, :data:`is_compiling`.)"""
    return (
        not dispatch_modes()
        and (not function_modes() or _only_default_device())
        and tracing_state() is None
    )


def _only_default_device() -> bool:
    """Whether the one mode that is on is ``torch.set_default_device``'s, which is about tensors
    that are made of no others."""
    return function_modes() == 1 and type(_function_mode_at(0)) is DeviceContext


_NATIVE_FORWARD = autograd.forward_op("native")
_NATIVE_INPLACE = autograd.inplace_op("native")

# What a Call says of a plain call of the whole operation, beyond device, dtypes and names.
_PLAIN_FACTS = ("two layers", False, False, False, False, False, False, False, False, None)


def _subclass(tensors: tuple[Tensor | None, ...]) -> str | None:
    """The name of a tensor subclass among these whose operators are its own."""
    for t in tensors:
        if type(t) not in PLAIN_TYPES:
            name = wrapper_class(t)
            if name is not None:
                return name
    return None


def resolve(
    form: str,
    tensors: tuple[Tensor | None, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    shift: bool,
    names: Names,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine: Any,
    lengths: Tensor | None,
    inplace: bool,
    wide: bool,
    backend: str | None,
    compiling: bool,
    captured: bool,
    may_prove: bool = True,
) -> ResolvedCall:
    """What a call with these tensors, x first, resolves to: its kind, looked up.

    ``dtypes`` are those of x and of the parameters, as a kernel would be given them. Of extents
    that are captured nothing is asked, they may be symbols that an answer would bind. ``may_prove``
    as in :func:`prepare`.
    """
    x = tensors[0]
    assert x is not None
    is_shifted = False
    if shift:  # of symbolic extents it is a symbol, which must not stay in the cache
        is_shifted = True
    kind = (
        "cpu" if x.is_cpu else x.device.type,  # a device and its name are made anew each time
        *dtypes,
        names,
        (
            form,
            is_shifted,
            alpha is not None or beta is not None,
            affine is not None,
            lengths is not None,
            residual is not None,
            inplace,
            not captured and features.is_huge(x),
            wide,
            _subclass(tensors),
        ),
        dispatch.requested_backend(backend),
    )
    resolved = _look_up(kind, compiling)
    if resolved.asks and not captured and why_no_kernel() is None:
        resolved = settle(resolved, tensors, backend, compiling, may_prove)
    return resolved


def _look_up(kind: tuple[Any, ...], compiling: bool) -> ResolvedCall:
    """What a kind of call resolves to, from the cache when it was seen before."""
    if compiling:  # a guard on a growing dict would recompile
        return _make(*kind)
    try:
        return _RESOLVED[kind]
    except (KeyError, TypeError):  # TypeError: an unhashable name, _make says which
        pass
    resolved = _make(*kind)
    if resolved.asks:
        resolved = resolved._replace(asks=trust.Question())
    _RESOLVED[kind] = resolved
    _note_short_way(kind, resolved)
    return resolved


def why_no_kernel() -> str | None:
    """What is going on that no kernel takes part in, whatever the call; None if nothing is."""
    if fwAD._current_level >= 0:
        return "forward-mode AD is on, and kernels carry no tangents"
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "a torch.func transform is being compiled"
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is recording, and keeps PyTorch's own operators alone"
    if torch._C._are_functorch_transforms_active():
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if any(level.key() == _FUNCTIONALIZE for level in levels):
            return "torch.func.functionalize knows PyTorch's own operators alone"
        if is_captured():
            return "a torch.func transform is being captured"
    return None


_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def runs_plain(resolved: ResolvedCall) -> bool:
    """Whether the caller's own way computes a call: so chosen, or because of what is going on."""
    chosen = resolved.choice.backend
    if chosen == "fallback":
        return True
    return chosen != "reference" and why_no_kernel() is not None


def is_recorded(resolved: ResolvedCall, backend: str | None) -> bool:
    """Whether a captured call becomes a public op, for which the machine that runs the graph
    chooses the backend: not where PyTorch's own operators were asked for, or must compute it."""
    return (
        dispatch.requested_backend(backend) in ("auto", *dispatch.KERNELS)
        and resolved.call.subclass is None
        and why_no_kernel() is None
    )


def promoted_dtypes(
    x: Tensor,
    parameters: dict[str, Tensor | None],
    residual: Tensor | None,
    *steps: torch.dtype | Tensor | None,
) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtypes of x and of the parameters as an eager block under autocast would promote them.

    The output has the dtype that eager's steps lead to (``steps``: what meets x on the way): fp32 x
    stays fp32; fp16 x under bf16 autocast becomes fp32. Parameters in float32 are used as they
    are rather than rounded, and per-channel ones (alpha, beta, those of a BatchNorm) do not widen
    the output. float64 is left alone, as autocast leaves it. None: parameters stay as they are.
    """
    everything = {**parameters, "residual": residual}
    if any(t is not None and t.dtype == torch.float64 for t in (x, *everything.values())):
        validation.check_same_dtype(x, everything)
        return x.dtype, None
    dtype = x.dtype
    for step in (*steps, residual):
        if step is not None:
            met = step if isinstance(step, torch.dtype) else step.dtype
            if met != dtype:  # of float32, bfloat16 and float16, any two
                dtype = torch.float32
    return dtype, parameter_dtype(dtype, parameters)


def parameter_dtype(dtype: torch.dtype, parameters: dict[str, Tensor | None]) -> torch.dtype | None:
    """What parameters are cast to beside x of this dtype: kernels take all of it, or all in
    float32. None: they are so already."""
    given = {t.dtype for t in parameters.values() if t is not None}
    return None if given == {dtype} or given == {torch.float32} else torch.float32


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in a dtype; None leaves them."""
    if dtype is None:
        return tensors
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def prepare(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    names: Names,
    before_affine: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    inplace: bool,
    backend: str | None,
    *,
    compiling: bool | None = None,
    captured: bool = False,
    mixed: bool = False,
    may_prove: bool = True,
) -> tuple[ResolvedCall, tuple[Any, ...]]:
    """Check everything, choose a backend, promote under autocast for it.

    ``compiling``, ``captured``: whether torch is, and whether the call is
    (:func:`senet_kernels.tensors.is_captured`), where that is known. ``mixed``: outside autocast
    too, parameters may be in float32, as kernels take them. ``may_prove``: whether kernels that
    are to be proven may be tried now.

    Returns what the call resolves to and the arguments of a Function's ``apply``.
    """
    if compiling is None:
        compiling, captured = is_compiling(), is_captured()
    if (
        residual is None
        and alpha is None
        and beta is None
        and before_affine is None
        and lengths is None
        and not inplace
        and not captured
        and validation.is_ordinary(x, w1, b1, w2, b2)
        and PLAIN_TYPES.issuperset((type(x), type(w1), type(b1), type(w2), type(b2)))
    ):
        device, dtype = x.device.type, x.dtype
        if not reference.autocast_is_on(device):
            requested = dispatch.requested_backend(backend)
            kind = (device, dtype, dtype, names, _PLAIN_FACTS, requested)
            resolved = _look_up(kind, compiling)
            if resolved.asks and why_no_kernel() is None:
                given = (x, w1, b1, w2, b2, None)
                resolved = settle(resolved, given, backend, compiling, may_prove)
            return resolved, (x, w1, b1, w2, b2, resolved.code, None, None, None, None, None, None)

    validation.check_input(x)
    validation.check_mlp(x, w1, b1, w2, b2)
    if residual is not None:
        validation.check_like_x("residual", residual, x, tuple(x.shape), "that of x")
    parameters = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    affine_scale = affine_shift = None
    if alpha is not None or beta is not None or before_affine is not None:
        for name, v in (("alpha", alpha), ("beta", beta)):
            if v is not None:
                validation.check_like_x(name, v, x, (x.shape[1],), "C of x")
        if before_affine is not None:
            validation.check_affine(x, before_affine)
            affine_scale, affine_shift = before_affine
        parameters |= {
            "alpha": alpha,
            "beta": beta,
            "before_affine[0]": affine_scale,
            "before_affine[1]": affine_shift,
        }
    if lengths is not None:
        validation.check_lengths(x, lengths)

    dtype, cast_to = x.dtype, None
    if reference.autocast_is_on(x.device.type):
        of_mlp = torch.get_autocast_dtype(x.device.type)
        dtype, cast_to = promoted_dtypes(x, parameters, residual, of_mlp)
    else:
        validation.check_same_dtype(x, parameters, mixed=mixed)
        if residual is not None:
            validation.check_same_dtype(x, {"residual": residual})
    if inplace:
        others = {**parameters, "residual": residual}
        if requires_grad(x, *others.values()):
            raise ValueError(
                "inplace: expected a call that needs no gradient (torch.no_grad() or inputs that "
                "do not require grad), got one that does"
            )
        if x.dtype != dtype:
            raise TypeError(
                f"inplace: expected x in the dtype of the result, {dtype} under this autocast, "
                f"got {x.dtype}"
            )
        validation.check_inplace(x, others)

    form = "two layers" if w1 is not None else "single layer (w1=None)"
    tensors = (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths)
    outputs = w2.shape[0]
    wide = not captured and features.is_wide(x, w2.shape[1], outputs, before_affine is not None)
    resolved = resolve(
        form, tensors, (dtype, cast_to or w2.dtype), outputs != x.shape[1], names, residual, alpha,
        beta, before_affine, lengths, inplace, wide, backend, compiling, captured, may_prove,
    )  # fmt: skip
    if (captured and is_recorded(resolved, backend)) or not runs_plain(resolved):
        if x.dtype != dtype:
            x = x.to(dtype)
        if residual is not None and residual.dtype != dtype:
            residual = residual.to(dtype)
        w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift = cast(  # type: ignore[assignment]
            cast_to, w1, b1, w2, b2, alpha, beta, affine_scale, affine_shift
        )
    layers = (x, w1, b1, w2, b2)
    return resolved, (
        *layers, resolved.code, residual, alpha, beta, affine_scale, affine_shift, lengths,
    )  # fmt: skip


def run(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    names: Names,
    before_affine: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    inplace: bool,
    backend: str | None,
    direct: bool = False,
) -> Any:
    """The whole operation; NotImplemented, after all checks, where no kernel takes the call, and
    for what is no tensor and records what is done to it.

    Arguments and errors are those of :func:`senet_kernels.squeeze_excite`; ``direct`` where
    nothing compiles and :func:`is_direct` has said so.
    """
    # The short way, for usual calls on the CPU: what checking costs counts there, above all after
    # layers that have flushed the caches Python runs from (docs/tuning-log.md). The op checks
    # shapes, devices and dtypes itself; where it fails, the long way may know a better message.
    compiling = not direct and is_compiling()
    if (
        not compiling
        and before_affine is None
        and alpha is None
        and beta is None
        and lengths is None
        and PLAIN_TYPES.issuperset(map(type, (x, w1, b1, w2, b2, residual)))
        and not _is_autocast_enabled("cpu")
        and fwAD._current_level < 0
        and not _transforms_active()
        and (  # is_direct(), without the cost of a call
            direct
            or (
                not dispatch_modes()
                and (not function_modes() or _only_default_device())
                and tracing_state() is None
            )
        )
    ):
        short: ResolvedCall | None
        try:
            short = (
                _RESOLVED.get((names, dispatch._forced if backend is None else backend))
                if x.is_cpu and w2.dtype is x.dtype
                else None
            )
        except (AttributeError, TypeError):  # None for a tensor, an unhashable name
            short = None
        if short is not None:
            differentiable = _is_grad_enabled() and requires_grad(x, w1, b1, w2, b2, residual)
        if short is not None and not (inplace and differentiable):
            try:
                if inplace:
                    others = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "residual": residual}
                    validation.check_inplace(x, others)
                    _NATIVE_INPLACE(
                        x, w1, b1, w2, b2, residual, None, None, None, None, None, short.code
                    )
                    return x
                if not differentiable:
                    return _NATIVE_FORWARD(
                        x, w1, b1, w2, b2, residual, None, None, None, None, None, short.code, False
                    )[0]
                if residual is None:
                    return autograd.NativeSEFunction.apply(x, w1, b1, w2, b2, short.code)
                return autograd.NativeSEFunction.apply(x, w1, b1, w2, b2, short.code, residual)
            except RuntimeError:
                try:
                    prepare(
                        x, w1, b1, w2, b2, names, None, residual, None, None, None, inplace, backend
                    )
                except (TypeError, ValueError, dispatch.BackendUnavailableError) as wrong:
                    raise wrong from None
                raise
    if proxies(x, w1, b1, w2, b2, residual, alpha, beta, lengths, before_affine):
        return NotImplemented
    arguments = (
        x, w1, b1, w2, b2, names, before_affine, residual, alpha, beta, lengths, inplace, backend,
    )  # fmt: skip
    if not compiling and tracing_state() is not None:
        with untraced():
            prepare(*arguments)  # for its checks
        if dispatch.requested_backend(backend) != "reference":
            return NotImplemented
    captured = False
    if compiling or dispatch_modes() or function_modes():
        captured = is_captured()
    resolved, operands = prepare(*arguments, compiling=compiling, captured=captured)
    x = operands[0]
    if captured and is_recorded(resolved, backend):
        y = public_ops.record("squeeze_excite", resolved.options, *operands[:5], *operands[6:])
        return x.copy_(y) if inplace else y
    if runs_plain(resolved):
        return NotImplemented
    chosen = resolved.choice.backend
    if chosen == "reference":
        y = reference.squeeze_excite_flat(resolved.options, *operands[:5], *operands[6:])
        return x.copy_(y) if inplace else y
    if torch._C._are_functorch_transforms_active() or requires_grad(*operands[:5], *operands[6:11]):
        y = autograd.apply(chosen, *operands)
        return x.copy_(y) if inplace else y
    if inplace:
        autograd.inplace_op(chosen)(*operands[:5], *operands[6:], resolved.code)
        return x
    return autograd.forward_op(chosen)(*operands[:5], *operands[6:], resolved.code, False)[0]
