"""The public functions: documentation, checks, the choice of a backend, and the call.

More than 500 lines: public functions of up to sixteen arguments, and what they document of each.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import autograd, dispatch, features, reference, validation
from .dispatch import Choice
from .pointwise import Options, check_name, pack


class Explanation(NamedTuple):
    """Which backend a call runs on, why not the others, and what that backend says about it. Print
    it to read it."""

    backend: str
    passed_over: tuple[tuple[str, str], ...]
    call: features.Call
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"runs on: {self.backend}"]
        lines += [f"not on {name}: {reason}" for name, reason in self.passed_over]
        lines.append(f"needs: {', '.join(features.required_features(self.call))}")
        lines += self.notes
        return "\n".join(lines)


class _Plan(NamedTuple):
    """What one kind of call resolves to; cached per kind, see _resolve."""

    options: Options
    code: int
    call: features.Call
    choice: Choice


_PLANS: dict[tuple[Any, ...], _Plan] = {}


def _make_plan(
    device: str,
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    names: tuple[str | None, str | None, str | None, str | None],
    facts: tuple[str, bool, bool, bool, bool, bool, bool, bool, bool, str | None],
    requested: str,
) -> _Plan:
    options = Options(
        *(check_name(argument, v) for argument, v in zip(Options._fields, names, strict=True))
    )
    call = features.Call(device, dtype, param_dtype, options, *facts)
    return _Plan(options, pack(options), call, dispatch.choose(call, requested))


def _note_short_way(kind: tuple[Any, ...], plan: _Plan) -> None:
    """Keep the plan of a call on the CPU for squeeze_excite's short way too, where the native
    kernels take all calls with these names: of any dtype, layers and residual."""
    if plan.call.device != "cpu" or plan.choice.backend != "native":
        return
    names, requested = kind[3], kind[5]
    rest = (False, False, False)
    for dtype, form, shift, residual in itertools.product(
        validation.DTYPES, ("two layers", "single layer (w1=None)"), (False, True), (False, True)
    ):
        call = features.Call("cpu", dtype, dtype, plan.options, form, shift, *rest, residual, False)
        if dispatch.choose(call, "auto").backend != "native":
            return
    _PLANS[names, requested] = plan
    if requested == "auto":
        _PLANS[names, None] = plan


_NATIVE_FORWARD = autograd.forward_op("native")
_NATIVE_INPLACE = autograd.inplace_op("native")

# Known not to be made of other tensors without a call, which takes time.
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))
# What a Call says of a plain call of the whole operation, beyond device, dtypes and names.
_PLAIN_FACTS = ("two layers", False, False, False, False, False, False, False, False, None)


def _subclass(tensors: tuple[Tensor | None, ...]) -> str | None:
    """The name of a tensor subclass among these that is made of other tensors (a DTensor, a
    quantised weight): it knows what PyTorch's operators mean to it, and nothing of ours."""
    for t in tensors:
        of: type = type(t)
        wraps: bool = of not in _PLAIN_TYPES and is_traceable_wrapper_subclass(t)
        if wraps:
            return of.__name__
    return None


def _resolve(
    form: str,
    tensors: tuple[Tensor | None, ...],
    parameter: Tensor,
    shift: bool,
    names: tuple[str | None, str | None, str | None, str | None],
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine: Any,
    lengths: Tensor | None,
    inplace: bool,
    wide: bool,
    backend: str | None,
) -> _Plan:
    """The plan for a call with these tensors, x first: its kind, looked up."""
    x = tensors[0]
    assert x is not None
    kind = (
        x.device.type,
        x.dtype,
        parameter.dtype,
        names,
        (
            form,
            shift,
            alpha is not None or beta is not None,
            affine is not None,
            lengths is not None,
            residual is not None,
            inplace,
            features.is_huge(x),
            wide,
            _subclass(tensors),
        ),
        dispatch.requested_backend(backend),
    )
    return _look_up(kind)


def _look_up(kind: tuple[Any, ...]) -> _Plan:
    """The plan for a kind of call, from the cache when it was seen before."""
    if torch.compiler.is_compiling():  # a guard on a growing dict would recompile
        return _make_plan(*kind)
    try:
        plan = _PLANS.get(kind)
    except TypeError:  # an unhashable name: _make_plan says which
        plan = None
    if plan is None:
        plan = _make_plan(*kind)
        _PLANS[kind] = plan
        _note_short_way(kind, plan)
    return plan


def _autocast(
    x: Tensor,
    parameters: dict[str, Tensor | None],
    residual: Tensor | None,
    *steps: torch.dtype | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor | None], Tensor | None]:
    """Inputs as an eager block under autocast would promote them.

    The output has the dtype that eager's steps lead to (``steps``: what meets x on the way): fp32 x
    stays fp32; fp16 x under bf16 autocast becomes fp32. Parameters in float32 are used as they
    are rather than rounded, and per-channel ones (alpha, beta, those of a BatchNorm) do not widen
    the output. float64 is left alone, as autocast leaves it.
    """
    everything = {**parameters, "residual": residual}
    if any(t is not None and t.dtype == torch.float64 for t in (x, *everything.values())):
        validation.check_same_dtype(x, everything)
        return x, parameters, residual
    dtype = x.dtype
    for step in (*steps, residual):
        if step is not None:
            met = step if isinstance(step, torch.dtype) else step.dtype
            dtype = torch.promote_types(dtype, met)
    if residual is not None:
        residual = residual.to(dtype)
    return x.to(dtype), _together(dtype, parameters), residual


def _together(dtype: torch.dtype, parameters: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Parameters as kernels take them beside x of this dtype: all of it, or all in float32."""
    given = {t.dtype for t in parameters.values() if t is not None}
    if given == {dtype} or given == {torch.float32}:
        return parameters
    return {n: t if t is None else t.float() for n, t in parameters.items()}


def _requires_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _prepare(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    names: tuple[str | None, str | None, str | None, str | None],
    before_affine: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    inplace: bool,
    backend: str | None,
) -> tuple[_Plan, tuple[Any, ...]]:
    """Check everything, promote under autocast, choose a backend.

    Returns the plan and the arguments of a Function's ``apply``.
    """
    if (
        residual is None
        and alpha is None
        and beta is None
        and before_affine is None
        and lengths is None
        and not inplace
        and validation.is_ordinary(x, w1, b1, w2, b2)
        and _PLAIN_TYPES.issuperset((type(x), type(w1), type(b1), type(w2), type(b2)))
    ):
        device, dtype = x.device.type, x.dtype
        if not reference.autocast_is_on(device):
            requested = dispatch.requested_backend(backend)
            plan = _look_up((device, dtype, dtype, names, _PLAIN_FACTS, requested))
            return plan, (x, w1, b1, w2, b2, plan.code, None, None, None, None, None, None)

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

    given = x
    if reference.autocast_is_on(x.device.type):
        of_mlp = torch.get_autocast_dtype(x.device.type)
        x, parameters, residual = _autocast(x, parameters, residual, of_mlp)
        w1, b1, w2, b2, *more = parameters.values()  # type: ignore[assignment]
        if more:
            alpha, beta, affine_scale, affine_shift = more
    else:
        validation.check_same_dtype(x, parameters)
        if residual is not None:
            validation.check_same_dtype(x, {"residual": residual})
    if inplace:
        others = {**parameters, "residual": residual}
        if _requires_grad(given, *others.values()):
            raise ValueError(
                "inplace: expected a call that needs no gradient (torch.no_grad() or inputs that "
                "do not require grad), got one that does"
            )
        if x.dtype != given.dtype:
            raise TypeError(
                f"inplace: expected x in the dtype of the result, {x.dtype} under this autocast, "
                f"got {given.dtype}"
            )
        validation.check_inplace(given, others)

    form = "two layers" if w1 is not None else "single layer (w1=None)"
    layers = (x, w1, b1, w2, b2)
    rest = (residual, alpha, beta, affine_scale, affine_shift, lengths)
    outputs = w2.shape[0]
    wide = features.is_wide(x, w2.shape[1], outputs, before_affine is not None)
    plan = _resolve(
        form, (*layers, *rest), w2, outputs != x.shape[1], names, residual, alpha, beta,
        before_affine, lengths, inplace, wide, backend,
    )  # fmt: skip
    return plan, (*layers, plan.code, *rest)


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "relu",
    gate: str | None = "sigmoid",
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    lengths: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Squeeze-and-excitation with the pointwise steps around it, as one operation.

    In order, with S spatial positions::

        q     = a_c x + b_c              before_affine = (a, b); without it q = x
        p     = before(q)
        z     = mean of p over space     [B, C]
        h     = activation(W1 z + b1)    [B, R]
        u     = W2 h + b2                [B, C], or [B, 2C] for scale-and-shift
        scale = alpha + beta gate(u[:, :C])
        shift = u[:, C:], or 0
        y     = after(p scale + shift + residual)

    With the defaults this is the block of Hu et al., *Squeeze-and-Excitation Networks*
    (arXiv:1709.01507): ``x * sigmoid(W2 relu(W1 mean(x) + b1) + b2)``. It is differentiable,
    twice; sums and the MLP are computed in float32 (float64 for float64).

    Args:
        x: ``[B, C, *spatial]``, one to any number of spatial dimensions; float32, bfloat16,
            float16 or float64; any strides, contiguous and channels-last without a copy.
        w1: ``[R, C]`` with optional trailing extents of 1 (a 1x1 convolution's weight), or None
            for a single layer, ``u = W2 z + b2`` (then ``activation`` is not applied).
        b1: ``[R]`` or None.
        w2: ``[C, R]``, or ``[2C, R]`` for scale-and-shift; with ``w1=None``, R is C.
        b2: ``[C]`` (``[2C]``) or None.
        activation: one of ``senet_kernels.ACTIVATIONS`` (relu, silu, gelu, ...; leaky_relu's slope
            is 0.01); None is identity.
        gate: one of ``senet_kernels.GATES`` (sigmoid, hardsigmoid, hardsigmoid_02, which is
            ``clamp(0.2 u + 0.5, 0, 1)``, tanh, relu, identity).
        before: an activation applied to x first.
        before_affine: a pair of ``[C]`` tensors applied to x before ``before``: a folded
            BatchNorm, or its normalisation in training.
        after: an activation applied last.
        residual: added before ``after``; same shape and dtype as x.
        alpha: ``[C]``; None is 0.
        beta: ``[C]``; None is 1.
        lengths: int64 ``[B]``: the mean covers the first ``lengths[b]`` positions only; 0 gives
            NaN, as an empty mean does. Every position is scaled.
        inplace: overwrite x with the result and return x; only where no gradient is needed.
        backend: ``"native"``, ``"triton"``, ``"reference"``, or None for :func:`use_backend`'s
            choice, else the best that takes the call. Forward-mode AD (``jvp``) always runs on
            the reference, whatever was chosen: no kernel carries tangents.

    Returns:
        y, with the shape, dtype and strides eager PyTorch gives: those of x. Under autocast its
        dtype is what x, the MLP's autocast dtype and residual promote to: alpha, beta and
        ``before_affine`` in float32 are used so, but keep the dtype of x, as a BatchNorm does.

    Raises:
        TypeError: an argument is of the wrong kind, or dtypes mix outside autocast.
        ValueError: a shape, name, device or value is wrong; the message names the argument.
        BackendUnavailableError: ``backend`` was chosen explicitly and cannot run this call.
    """
    # The short way, for usual calls on the CPU: what checking costs counts there, above all after
    # layers that have flushed the caches Python runs from (docs/performance.md). The op checks
    # shapes, devices and dtypes itself; where it fails, the long way may know a better message.
    if (
        not torch.compiler.is_compiling()
        and before_affine is None
        and alpha is None
        and beta is None
        and lengths is None
        and _PLAIN_TYPES.issuperset(map(type, (x, w1, b1, w2, b2, residual)))
        and not torch.is_autocast_enabled("cpu")
        and fwAD._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None  # a trace and its check go the same way
    ):
        short: _Plan | None = None
        try:
            if x.is_cpu and w2.dtype is x.dtype:
                asked_for = dispatch._forced if backend is None else backend
                short = _PLANS.get(((activation, gate, before, after), asked_for))
        except (AttributeError, TypeError):  # None for a tensor, an unhashable name
            pass
        differentiable = short is not None and _requires_grad(x, w1, b1, w2, b2, residual)
        if short is not None and not (inplace and differentiable):
            y: Tensor
            try:
                if inplace:
                    others = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "residual": residual}
                    validation.check_inplace(x, others)
                    _NATIVE_INPLACE(
                        x, w1, b1, w2, b2, residual, None, None, None, None, None, short.code
                    )
                    return x
                if not differentiable:
                    y = _NATIVE_FORWARD(
                        x, w1, b1, w2, b2, residual, None, None, None, None, None, short.code, False
                    )[0]
                elif residual is None:
                    y = autograd.NativeSEFunction.apply(x, w1, b1, w2, b2, short.code)
                else:
                    y = autograd.NativeSEFunction.apply(x, w1, b1, w2, b2, short.code, residual)
                return y
            except RuntimeError:
                try:
                    _prepare(
                        x, w1, b1, w2, b2, (activation, gate, before, after), None, residual,
                        None, None, None, inplace, backend,
                    )  # fmt: skip
                except (TypeError, ValueError, dispatch.BackendUnavailableError) as wrong:
                    raise wrong from None
                raise
    plan, arguments = _prepare(
        x, w1, b1, w2, b2, (activation, gate, before, after), before_affine, residual, alpha,
        beta, lengths, inplace, backend,
    )  # fmt: skip
    chosen = plan.choice.backend
    # Forward-mode AD: a raw op would drop the tangents silently, the reference carries them.
    if chosen == "reference" or fwAD._current_level >= 0:
        y = reference.squeeze_excite_flat(plan.options, *arguments[:5], *arguments[6:])
        return x.copy_(y) if inplace else y
    if torch._C._are_functorch_transforms_active() or _requires_grad(
        *arguments[:5], *arguments[6:11]
    ):
        y = autograd.apply(chosen, *arguments)
        return x.copy_(y) if inplace else y
    if inplace:
        autograd.inplace_op(chosen)(*arguments[:5], *arguments[6:], plan.code)
        return x
    result: Tensor = autograd.forward_op(chosen)(*arguments[:5], *arguments[6:], plan.code, False)[
        0
    ]
    return result


def explain(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str | None = "relu",
    gate: str | None = "sigmoid",
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    lengths: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend :func:`squeeze_excite` would run for these arguments, and why.

    Computes nothing. Same arguments and errors as ``squeeze_excite``.
    """
    plan, arguments = _prepare(
        x, w1, b1, w2, b2, (activation, gate, before, after), before_affine, residual, alpha,
        beta, lengths, inplace, backend,
    )  # fmt: skip
    chosen, passed_over = plan.choice
    notes = dispatch.notes(chosen, plan.call, arguments[0], arguments[1], arguments[3])
    return Explanation(chosen, passed_over, plan.call, notes)


def squeeze(
    x: Tensor,
    *,
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The squeeze half alone: mean over space of ``before(a_c x + b_c)``.

    Put any torch code between it and :func:`channel_scale` for excitations that are not this MLP
    (a norm in between, a 1-D convolution as in ECA).

    Args:
        x: ``[B, C, *spatial]``.
        before, before_affine, lengths: as in :func:`squeeze_excite`.
        backend: as in :func:`squeeze_excite`. ``torch.func`` transforms, as forward-mode AD,
            always run on the reference.

    Returns:
        ``[B, C]`` in the dtype of x, summed in float32 (float64 for float64). Differentiable,
        twice.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`squeeze_excite`.
    """
    validation.check_input(x)
    affine_scale = affine_shift = None
    parameter = x
    if before_affine is not None:
        validation.check_affine(x, before_affine)
        names = ("before_affine[0]", "before_affine[1]")
        pair: dict[str, Tensor | None] = dict(zip(names, before_affine, strict=True))
        if reference.autocast_is_on(x.device.type) and x.dtype != torch.float64:
            pair = _together(x.dtype, pair)
        else:
            validation.check_same_dtype(x, pair)
        affine_scale, affine_shift = pair.values()
        assert affine_scale is not None
        parameter = affine_scale
    if lengths is not None:
        validation.check_lengths(x, lengths)
    arguments = (x, affine_scale, affine_shift, lengths)
    wide = features.is_wide(x, 0, x.shape[1], before_affine is not None)
    plan = _resolve(
        "squeeze alone", arguments, parameter, False, (None, None, before, None), None, None, None,
        before_affine, lengths, False, wide, backend,
    )  # fmt: skip
    if _is_reference(plan):
        return reference.squeeze_flat(plan.options, *arguments)
    chosen = plan.choice.backend
    if _requires_grad(*arguments[:3]):
        differentiable: Tensor = autograd.SqueezeFunction.apply(*arguments, plan.code, chosen)
        return differentiable
    z: Tensor = autograd.squeeze_op(chosen)(*arguments, plan.code)
    return z


def _is_reference(plan: _Plan) -> bool:
    """Whether a half is computed by the reference: so chosen, or under a transform that its
    Functions, which are plain ones, do not know."""
    return (
        plan.choice.backend == "reference"
        or fwAD._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def channel_scale(
    x: Tensor,
    u: Tensor,
    *,
    gate: str | None = None,
    before: str | None = None,
    before_affine: tuple[Tensor, Tensor] | None = None,
    after: str | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scaling half alone: ``after(p (alpha + beta gate(u[:, :C])) + u[:, C:] + residual)``.

    Args:
        x: ``[B, C, *spatial]``; p is ``before(a_c x + b_c)``.
        u: the pre-gate, ``[B, C]``, or ``[B, 2C]`` for scale-and-shift.
        gate, before, before_affine, after, residual, alpha, beta: as in :func:`squeeze_excite`.
        backend: as in :func:`squeeze`.

    Returns:
        y, like x; under autocast in the dtype that x, u and residual promote to.
        Differentiable, twice.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`squeeze_excite`.
    """
    validation.check_input(x)
    validation.check_tensor("u", u)
    batch, channels = x.shape[:2]
    # Not `in`, as in validation.check_mlp.
    if u.shape != (batch, channels) and u.shape != (batch, 2 * channels):
        raise ValueError(
            f"u: expected shape {[batch, channels]} or {[batch, 2 * channels]}, got {list(u.shape)}"
        )
    if u.device != x.device:
        raise ValueError(f"u: expected device {x.device} (that of x), got {u.device}")
    affine_scale = affine_shift = None
    for name, v in (("alpha", alpha), ("beta", beta)):
        if v is not None:
            validation.check_like_x(name, v, x, (channels,), "C of x")
    if before_affine is not None:
        validation.check_affine(x, before_affine)
        affine_scale, affine_shift = before_affine
    tensors: dict[str, Tensor | None] = {
        "u": u,
        "alpha": alpha,
        "beta": beta,
        "before_affine[0]": affine_scale,
        "before_affine[1]": affine_shift,
    }
    if residual is not None:
        validation.check_like_x("residual", residual, x, tuple(x.shape), "that of x")
    if reference.autocast_is_on(x.device.type):
        x, tensors, residual = _autocast(x, tensors, residual, u)
    else:
        validation.check_same_dtype(x, {**tensors, "residual": residual})
    given, *rest = tensors.values()
    assert given is not None
    alpha, beta, affine_scale, affine_shift = rest
    arguments = (x, given, residual, alpha, beta, affine_scale, affine_shift)
    wide = features.is_wide(x, 0, u.shape[1], before_affine is not None)
    plan = _resolve(
        "channel_scale alone", arguments, given, u.shape[1] != channels,
        (None, gate, before, after), residual, alpha, beta, before_affine, None, False, wide,
        backend,
    )  # fmt: skip
    if _is_reference(plan):
        return reference.channel_scale_flat(plan.options, *arguments)
    chosen = plan.choice.backend
    if _requires_grad(*arguments):
        differentiable: Tensor = autograd.ChannelScaleFunction.apply(*arguments, plan.code, chosen)
        return differentiable
    y: Tensor = autograd.channel_scale_op(chosen)(*arguments, plan.code, False)[0]
    return y


def pack_options(
    *,
    activation: str | None = "relu",
    gate: str | None = "sigmoid",
    before: str | None = None,
    after: str | None = None,
) -> int:
    """The ``options`` integer that ``NativeSEFunction`` and ``TritonSEFunction`` take.

    Raises:
        TypeError, ValueError: not a function of the table.
    """
    return pack(
        Options(
            check_name("activation", activation),
            check_name("gate", gate),
            check_name("before", before),
            check_name("after", after),
        )
    )
