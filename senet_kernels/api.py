"""The public functions: documentation, the choice of a backend, and the call."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import handle_torch_function

from . import autograd, dispatch, fallback, features, public_ops, reference, resolve, validation
from .pointwise import Options, check_name, pack
from .tensors import (
    dispatch_modes,
    function_modes,
    is_captured,
    proxies,
    untraced,
)

# Looked up once, as in resolve.
_is_grad_enabled, _transforms_active = (
    torch.is_grad_enabled,
    torch._C._are_functorch_transforms_active,
)


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
    twice; kernels compute sums and the MLP in float32 (float64 for float64).

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
        backend: ``"native"``, ``"triton"``, ``"fallback"``, ``"reference"``, or None for
            :func:`use_backend`'s choice, else the first of the former three that takes the call.
            ``"fallback"`` is eager PyTorch with linear layers, in the dtype of x, with eager's
            accuracy; ``"reference"`` computes in float32 (float64 for float64). Under
            forward-mode AD (``jvp``), ``torch.jit.trace`` and compiled ``torch.func`` transforms
            the fallback stands in for the kernels, whatever was chosen: they carry no tangents
            and cannot be saved. While ``torch.export`` or ``make_fx`` records, a call that kernels
            may run becomes the op ``torch.ops.senet_kernels.squeeze_excite``, which chooses when
            it runs.

    Returns:
        y, with the shape, dtype and strides eager PyTorch gives: those of x. Under autocast its
        dtype is what x, the MLP's autocast dtype and residual promote to: alpha, beta and
        ``before_affine`` in float32 are used so, but keep the dtype of x, as a BatchNorm does.

    Raises:
        TypeError: an argument is of the wrong kind, or dtypes mix outside autocast.
        ValueError: a shape, name, device or value is wrong; the message names the argument.
        BackendUnavailableError: ``backend`` was chosen explicitly and cannot run this call.
    """
    y: Tensor = resolve.run(
        x, w1, b1, w2, b2, (activation, gate, before, after), before_affine, residual, alpha,
        beta, lengths, inplace, backend,
    )  # fmt: skip
    if y is not NotImplemented:
        return y
    recording = proxies(x, w1, b1, w2, b2, residual, alpha, beta, lengths, before_affine)
    if recording:  # torch.fx records the call
        recorded: Tensor = handle_torch_function(
            squeeze_excite, recording, x, w1, b1, w2, b2, activation=activation, gate=gate,
            before=before, before_affine=before_affine, after=after, residual=residual,
            alpha=alpha, beta=beta, lengths=lengths, inplace=inplace, backend=backend,
        )  # fmt: skip
        return recorded
    return fallback.squeeze_excite(
        x, w1, b1, w2, b2, activation=activation, gate=gate, before=before,
        before_affine=before_affine, after=after, residual=residual, alpha=alpha, beta=beta,
        lengths=lengths, inplace=inplace,
    )  # fmt: skip


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
    resolved, arguments = resolve.prepare(
        x, w1, b1, w2, b2, (activation, gate, before, after), before_affine, residual, alpha,
        beta, lengths, inplace, backend, may_prove=False,
    )  # fmt: skip
    chosen, passed_over = resolved.choice
    if resolve.runs_plain(resolved) and chosen != "fallback":
        passed_over = (*passed_over, (chosen, str(resolve.why_no_kernel())))
        chosen = "fallback"
    notes = dispatch.notes(chosen, resolved.call, arguments[0], arguments[1], arguments[3])
    return Explanation(chosen, passed_over, resolved.call, notes)


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
            always run on the fallback.

    Returns:
        ``[B, C]`` in the dtype of x, summed in float32 (float64 for float64). Differentiable,
        twice.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as in :func:`squeeze_excite`.
    """
    recording = proxies(x, lengths, before_affine)
    if recording:
        recorded: Tensor = handle_torch_function(
            squeeze, recording, x, before=before, before_affine=before_affine, lengths=lengths,
            backend=backend,
        )  # fmt: skip
        return recorded
    compiling = resolve.is_compiling()
    captured = False
    if compiling or dispatch_modes() or function_modes():
        captured = is_captured()
    tracing = not compiling and resolve.tracing_state() is not None
    if tracing:
        with untraced():
            resolved, cast_to = resolve_squeeze(
                x, before, before_affine, lengths, backend, compiling, captured
            )
    else:
        resolved, cast_to = resolve_squeeze(
            x, before, before_affine, lengths, backend, compiling, captured
        )
    captured = captured and resolve.is_recorded(resolved, backend)
    if not captured and _is_plain(resolved, tracing):
        return fallback.squeeze(x, before=before, before_affine=before_affine, lengths=lengths)
    affine_scale, affine_shift = before_affine or (None, None)
    if captured:  # as given: the op promotes by the autocast it runs under
        return public_ops.record(
            "squeeze", resolved.options, x, affine_scale, affine_shift, lengths
        )
    if affine_scale is not None:
        affine_scale, affine_shift = resolve.cast(cast_to, affine_scale, affine_shift)
    arguments = (x, affine_scale, affine_shift, lengths)
    chosen = resolved.choice.backend
    if chosen == "reference":
        return reference.squeeze_flat(resolved.options, *arguments)
    if _is_grad_enabled() and resolve.requires_grad(*arguments[:3]):
        if compiling:
            arguments = autograd.distinct(*arguments)
        differentiable: Tensor = autograd.SqueezeFunction.apply(*arguments, resolved.code, chosen)
        return differentiable
    z: Tensor = autograd.squeeze_op(chosen)(*arguments, resolved.code)
    return z


def resolve_squeeze(
    x: Tensor,
    before: str | None,
    before_affine: tuple[Tensor, Tensor] | None,
    lengths: Tensor | None,
    backend: str | None,
    compiling: bool,
    captured: bool,
    *,
    mixed: bool = False,
) -> tuple[resolve.ResolvedCall, torch.dtype | None]:
    """Check everything, choose a backend; and what the parameters are cast to for it.

    ``compiling``, ``captured`` and ``mixed`` as in :func:`senet_kernels.resolve.prepare`.
    """
    validation.check_input(x)
    affine_scale = affine_shift = None
    parameters: dict[str, Tensor | None] = {}
    cast_to = None
    if before_affine is not None:
        validation.check_affine(x, before_affine)
        names = ("before_affine[0]", "before_affine[1]")
        parameters = dict(zip(names, before_affine, strict=True))
        if reference.autocast_is_on(x.device.type) and x.dtype != torch.float64:
            cast_to = resolve.parameter_dtype(x.dtype, parameters)
        else:
            validation.check_same_dtype(x, parameters, mixed=mixed)
        affine_scale, affine_shift = before_affine
    if lengths is not None:
        validation.check_lengths(x, lengths)
    given = x.dtype if affine_scale is None else affine_scale.dtype
    # Of no concern to a CPU, where a small call should not pay for the question.
    wide = (
        not captured
        and not x.is_cpu
        and features.is_wide(x, 0, x.shape[1], before_affine is not None)
    )
    resolved = resolve.resolve(
        "squeeze alone", (x, affine_scale, affine_shift, lengths), (x.dtype, cast_to or given),
        False, (None, None, before, None), None, None, None, before_affine, lengths, False, wide,
        backend, compiling, captured,
    )  # fmt: skip
    return resolved, cast_to


def _is_plain(resolved: resolve.ResolvedCall, tracing: bool) -> bool:
    """Whether a half is computed by the plain composition: so chosen, or because of what is going
    on (:func:`resolve.why_no_kernel`); and under every transform of torch.func, which the halves'
    Functions do not know."""
    chosen = resolved.choice.backend
    if chosen in ("fallback", "reference"):
        return chosen == "fallback"
    return tracing or fwAD._current_level >= 0 or _transforms_active()


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
    recording = proxies(x, u, residual, alpha, beta, before_affine)
    if recording:
        recorded: Tensor = handle_torch_function(
            channel_scale, recording, x, u, gate=gate, before=before, before_affine=before_affine,
            after=after, residual=residual, alpha=alpha, beta=beta, backend=backend,
        )  # fmt: skip
        return recorded
    compiling = resolve.is_compiling()
    captured = False
    if compiling or dispatch_modes() or function_modes():
        captured = is_captured()
    tracing = not compiling and resolve.tracing_state() is not None
    names = (None, gate, before, after)
    if tracing:
        with untraced():
            resolved, dtype, cast_to = resolve_channel_scale(
                x, u, names, before_affine, residual, alpha, beta, backend, compiling, captured
            )
    else:
        resolved, dtype, cast_to = resolve_channel_scale(
            x, u, names, before_affine, residual, alpha, beta, backend, compiling, captured
        )
    captured = captured and resolve.is_recorded(resolved, backend)
    if not captured and _is_plain(resolved, tracing):
        return fallback.channel_scale(
            x, u, gate=gate, before=before, before_affine=before_affine, after=after,
            residual=residual, alpha=alpha, beta=beta,
        )  # fmt: skip
    affine_scale, affine_shift = before_affine or (None, None)
    rest: tuple[Tensor | None, ...] = (alpha, beta, affine_scale, affine_shift)
    if captured:  # likewise
        return public_ops.record("channel_scale", resolved.options, x, u, residual, *rest)
    if x.dtype != dtype:
        x = x.to(dtype)
    if residual is not None and residual.dtype != dtype:
        residual = residual.to(dtype)
    if cast_to is not None:
        u, rest = u.to(cast_to), resolve.cast(cast_to, *rest)
    operands = (x, u, residual, *rest)
    chosen = resolved.choice.backend
    if chosen == "reference":
        return reference.channel_scale_flat(resolved.options, x, u, residual, *rest)
    if _is_grad_enabled() and resolve.requires_grad(*operands):
        if compiling:
            operands = autograd.distinct(*operands)
        differentiable: Tensor = autograd.ChannelScaleFunction.apply(
            *operands, resolved.code, chosen
        )
        return differentiable
    y: Tensor = autograd.channel_scale_op(chosen)(*operands, resolved.code, False)[0]
    return y


def resolve_channel_scale(
    x: Tensor,
    u: Tensor,
    names: resolve.Names,
    before_affine: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    backend: str | None,
    compiling: bool,
    captured: bool,
    *,
    mixed: bool = False,
) -> tuple[resolve.ResolvedCall, torch.dtype, torch.dtype | None]:
    """Check everything, choose a backend; and what x and the parameters are cast to for it.

    ``compiling``, ``captured`` and ``mixed`` as in :func:`senet_kernels.resolve.prepare`.
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
    parameters: dict[str, Tensor | None] = {
        "u": u,
        "alpha": alpha,
        "beta": beta,
        "before_affine[0]": affine_scale,
        "before_affine[1]": affine_shift,
    }
    if residual is not None:
        validation.check_like_x("residual", residual, x, tuple(x.shape), "that of x")
    dtype, cast_to = x.dtype, None
    if reference.autocast_is_on(x.device.type):
        dtype, cast_to = resolve.promoted_dtypes(x, parameters, residual, u)
    else:
        validation.check_same_dtype(x, parameters, mixed=mixed)
        validation.check_same_dtype(x, {"residual": residual})
    wide = (
        not captured
        and not x.is_cpu
        and features.is_wide(x, 0, u.shape[1], before_affine is not None)
    )
    resolved = resolve.resolve(
        "channel_scale alone", (x, u, residual, alpha, beta, affine_scale, affine_shift),
        (dtype, cast_to or u.dtype), u.shape[1] != channels, names, residual,
        alpha, beta, before_affine, None, False, wide, backend, compiling,
        captured,
    )  # fmt: skip
    return resolved, dtype, cast_to


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
