"""What the public ops compute, and their gradients: the backend is chosen here, when they run.

The kernels of an op, in the order in which PyTorch's dispatcher comes to them:

* under ``torch.func`` transforms and forward-mode AD: the decomposition into PyTorch's operators;
* under autocast: the promotions of :func:`senet_kernels.squeeze_excite`;
* for tensor subclasses made of other tensors (DTensor): the plain composition;
* where a gradient is needed: the autograd Function of the chosen backend;
* otherwise the chosen backend's private op, or the plain composition where no kernel takes the
  call.

A process without Python has the compiled library's kernels instead (``csrc/registration.cpp``).

The decomposition is the reference: it has the op's accuracy, and is differentiable at will. It
stands in PyTorch's table of decompositions, for exporters that want standard operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch._decomp import register_decomposition
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import api, autograd, fallback, ops, public_ops, reference, resolve
from .pointwise import Options, check_name
from .tensors import PLAIN_TYPES, dispatch_modes, is_captured, wrapper_class

_Tensors = tuple[Tensor | None, ...]


class _Arguments(NamedTuple):
    """Those of a public op: functions by name, and tensors in the order of the private ops."""

    options: Options
    tensors: _Tensors


@functools.cache
def _options(
    activation: str = "identity",
    gate: str = "identity",
    before: str = "identity",
    after: str = "identity",
) -> Options:
    given = Options(activation, gate, before, after)
    return Options(*(check_name(n, v) for n, v in given._asdict().items()))


def _of_squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    before: str = "identity",
    affine_scale: Tensor | None = None,
    affine_shift: Tensor | None = None,
    after: str = "identity",
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    pool: str = "mean",
) -> _Arguments:
    public_ops.check_reserved(mask, pool)
    return _Arguments(
        _options(activation, gate, before, after),
        (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths),
    )


def _of_squeeze(
    x: Tensor,
    *,
    before: str = "identity",
    affine_scale: Tensor | None = None,
    affine_shift: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    pool: str = "mean",
) -> _Arguments:
    public_ops.check_reserved(mask, pool)
    return _Arguments(_options(before=before), (x, affine_scale, affine_shift, lengths))


def _of_channel_scale(
    x: Tensor,
    u: Tensor,
    *,
    gate: str = "identity",
    before: str = "identity",
    affine_scale: Tensor | None = None,
    affine_shift: Tensor | None = None,
    after: str = "identity",
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> _Arguments:
    return _Arguments(
        _options(gate=gate, before=before, after=after),
        (x, u, residual, alpha, beta, affine_scale, affine_shift),
    )


def _pair(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """``before_affine`` as the public functions take it."""
    if (scale is None) != (shift is None):
        raise ValueError("affine_scale, affine_shift: expected both, or none")
    return None if scale is None or shift is None else (scale, shift)


def _is_mixed(tensors: _Tensors) -> bool:
    """Whether parameters in float32 meet x in another dtype, which the plain composition, in the
    dtype of x, cannot take."""
    x = tensors[0]
    assert x is not None
    return any(t is not None and t.is_floating_point() and t.dtype != x.dtype for t in tensors)


class _Call(NamedTuple):
    """A public op's call, checked: on which backend it runs, and how."""

    plain: bool
    backend: str
    code: int
    tensors: _Tensors


def _resolve_squeeze_excite(options: Options, tensors: _Tensors) -> _Call:
    x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths = tensors
    assert x is not None
    assert w2 is not None
    resolved, operands = resolve.prepare(
        x, w1, b1, w2, b2, options, _pair(affine_scale, affine_shift), residual, alpha, beta,
        lengths, False, None, mixed=True,
    )  # fmt: skip
    plain = resolve.runs_plain(resolved)
    return _Call(plain, resolved.choice.backend, resolved.code, (*operands[:5], *operands[6:]))


def _resolve_squeeze(options: Options, tensors: _Tensors) -> _Call:
    x, affine_scale, affine_shift, lengths = tensors
    assert x is not None
    affine = _pair(affine_scale, affine_shift)
    compiling = resolve.is_compiling()
    resolved, _ = api.resolve_squeeze(
        x, options.before, affine, lengths, None, compiling, is_captured(), mixed=True
    )
    plain = resolve.runs_plain(resolved)
    return _Call(plain, resolved.choice.backend, resolved.code, tensors)


def _resolve_channel_scale(options: Options, tensors: _Tensors) -> _Call:
    x, u, residual, alpha, beta, affine_scale, affine_shift = tensors
    assert x is not None
    assert u is not None
    affine = _pair(affine_scale, affine_shift)
    compiling = resolve.is_compiling()
    resolved, _, _ = api.resolve_channel_scale(
        x, u, options, affine, residual, alpha, beta, None, compiling, is_captured(), mixed=True
    )
    plain = resolve.runs_plain(resolved)
    return _Call(plain, resolved.choice.backend, resolved.code, tensors)


def _promoted_squeeze_excite(device: str, *tensors: Any) -> _Tensors:
    x, *mlp, residual, alpha, beta, affine_scale, affine_shift, lengths = tensors
    names = ("w1", "b1", "w2", "b2", "alpha", "beta", "affine_scale", "affine_shift")
    parameters = (*mlp, alpha, beta, affine_scale, affine_shift)
    dtype, cast_to = resolve.promoted_dtypes(
        x, dict(zip(names, parameters, strict=True)), residual, torch.get_autocast_dtype(device)
    )
    *mlp, alpha, beta, affine_scale, affine_shift = resolve.cast(cast_to, *parameters)
    x, residual = resolve.cast(dtype, x, residual)
    return (x, *mlp, residual, alpha, beta, affine_scale, affine_shift, lengths)


def _promoted_squeeze(device: str, *tensors: Any) -> _Tensors:
    x, affine_scale, affine_shift, lengths = tensors
    parameters = {"affine_scale": affine_scale, "affine_shift": affine_shift}
    _, cast_to = resolve.promoted_dtypes(x, parameters, None)
    if affine_scale is not None:
        affine_scale, affine_shift = resolve.cast(cast_to, affine_scale, affine_shift)
    return (x, affine_scale, affine_shift, lengths)


def _promoted_channel_scale(device: str, *tensors: Any) -> _Tensors:
    x, u, residual, *rest = tensors
    names = ("u", "alpha", "beta", "affine_scale", "affine_shift")
    parameters = dict(zip(names, (u, *rest), strict=True))
    dtype, cast_to = resolve.promoted_dtypes(x, parameters, residual, u)
    x, residual = resolve.cast(dtype, x, residual)
    u, *rest = resolve.cast(cast_to, u, *rest)
    return (x, u, residual, *rest)


def _plain_squeeze_excite(options: Options, *tensors: Any) -> Tensor:
    x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths = tensors
    return fallback.squeeze_excite(
        x, w1, b1, w2, b2, **options._asdict(), before_affine=_pair(affine_scale, affine_shift),
        residual=residual, alpha=alpha, beta=beta, lengths=lengths,
    )  # fmt: skip


def _plain_squeeze(options: Options, *tensors: Any) -> Tensor:
    x, affine_scale, affine_shift, lengths = tensors
    affine = _pair(affine_scale, affine_shift)
    return fallback.squeeze(x, before=options.before, before_affine=affine, lengths=lengths)


def _plain_channel_scale(options: Options, *tensors: Any) -> Tensor:
    x, u, residual, alpha, beta, affine_scale, affine_shift = tensors
    return fallback.channel_scale(
        x, u, gate=options.gate, before=options.before,
        before_affine=_pair(affine_scale, affine_shift), after=options.after, residual=residual,
        alpha=alpha, beta=beta,
    )  # fmt: skip


def _differentiable_squeeze_excite(backend: str, code: int, *tensors: Any) -> Tensor:
    return autograd.apply(backend, *tensors[:5], code, *tensors[5:])


def _differentiable_squeeze(backend: str, code: int, *tensors: Any) -> Tensor:
    z: Tensor = autograd.SqueezeFunction.apply(*tensors, code, backend)
    return z


def _differentiable_channel_scale(backend: str, code: int, *tensors: Any) -> Tensor:
    y: Tensor = autograd.ChannelScaleFunction.apply(*tensors, code, backend)
    return y


def _fused_squeeze_excite(backend: str, code: int, *tensors: Any) -> Tensor:
    y: Tensor = autograd.forward_op(backend)(*tensors, code, False)[0]
    return y


def _fused_squeeze(backend: str, code: int, *tensors: Any) -> Tensor:
    z: Tensor = autograd.squeeze_op(backend)(*tensors, code)
    return z


def _fused_channel_scale(backend: str, code: int, *tensors: Any) -> Tensor:
    y: Tensor = autograd.channel_scale_op(backend)(*tensors, code, False)[0]
    return y


class _Operation(NamedTuple):
    """What a public op's kernels are made of. All but the first two take its functions (options,
    or a backend and their code) and its tensors."""

    arguments: Callable[..., _Arguments]
    reference: Callable[..., Tensor]
    promote: Callable[..., _Tensors]  # called with a device type
    resolve: Callable[[Options, _Tensors], _Call]
    plain: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    differentiable: Callable[..., Tensor]


_OPERATIONS: dict[str, _Operation] = {
    "squeeze_excite": _Operation(
        _of_squeeze_excite,
        reference.squeeze_excite_flat,
        _promoted_squeeze_excite,
        _resolve_squeeze_excite,
        _plain_squeeze_excite,
        _fused_squeeze_excite,
        _differentiable_squeeze_excite,
    ),
    "squeeze": _Operation(
        _of_squeeze,
        reference.squeeze_flat,
        _promoted_squeeze,
        _resolve_squeeze,
        _plain_squeeze,
        _fused_squeeze,
        _differentiable_squeeze,
    ),
    "channel_scale": _Operation(
        _of_channel_scale,
        reference.channel_scale_flat,
        _promoted_channel_scale,
        _resolve_channel_scale,
        _plain_channel_scale,
        _fused_channel_scale,
        _differentiable_channel_scale,
    ),
}


class _Recorded(torch.autograd.Function):
    """A public op that a graph records: forward is the op, backward its gradients by PyTorch's own
    operators, so that a graph that holds them can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, options: Options, *tensors: Tensor | None) -> Tensor:
        ctx.name, ctx.options = name, options
        ctx.save_for_backward(*tensors)
        return public_ops.record(name, options, *tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:]
        operation, tensors = _OPERATIONS[ctx.name], list(ctx.saved_tensors)
        with torch.enable_grad():
            for i, t in enumerate(tensors):
                if t is not None:  # each argument by itself, though two may be one tensor
                    tensors[i] = t.view_as(t)
            y = operation.reference(ctx.options, *tensors)
        varied = [t for t, needed in zip(tensors, wanted, strict=True) if needed]
        differentiated = torch.is_grad_enabled()
        gradients = iter(torch.autograd.grad(y, varied, dy, create_graph=differentiated))
        return (None, None, *(next(gradients) if needed else None for needed in wanted))


def _is_recorded_here(x: Tensor) -> bool:
    """Whether a graph records a call that is differentiated. AOTAutograd's graphs hold forward and
    backward together, and so the private ops."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None:
        return False
    return isinstance(x, FakeTensor) or get_proxy_mode() is not None


_AFTER_AUTOGRAD = torch._C._after_autograd_keyset
_AFTER_SELECTION = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


def _decompose(name: str, *args: Any, **kwargs: Any) -> Tensor:
    operation = _OPERATIONS[name]
    options, tensors = operation.arguments(*args, **kwargs)
    return operation.reference(options, *tensors)


def _differentiate(name: str, keys: Any, *args: Any, **kwargs: Any) -> Tensor:
    operation = _OPERATIONS[name]
    options, tensors = operation.arguments(*args, **kwargs)
    if fwAD._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return operation.reference(options, *tensors)
    differentiated = resolve.requires_grad(*tensors)
    x = args[0]
    if PLAIN_TYPES.issuperset(map(type, tensors)):
        if not dispatch_modes() and not x.is_meta:
            return _run(operation, options, tensors, differentiated)
    elif any(wrapper_class(t) is not None for t in tensors):
        return operation.plain(options, *tensors)
    if not differentiated:
        y: Tensor = public_ops.OPS[name].redispatch(keys & _AFTER_AUTOGRAD, *args, **kwargs)
        return y
    if _is_recorded_here(x):
        recorded: Tensor = _Recorded.apply(name, options, *tensors)
        return recorded
    return _run(operation, options, tensors, differentiated)


def _select(name: str, keys: Any, *args: Any, **kwargs: Any) -> Tensor:
    if args[0].is_meta:
        y: Tensor = public_ops.OPS[name].redispatch(keys & _AFTER_SELECTION, *args, **kwargs)
        return y
    operation = _OPERATIONS[name]
    options, tensors = operation.arguments(*args, **kwargs)
    return _run(operation, options, tensors, False)


def _run(
    operation: _Operation, options: Options, tensors: _Tensors, differentiated: bool
) -> Tensor:
    """The op on the backend that is chosen now."""
    if operation is _OPERATIONS["squeeze_excite"] and not resolve.is_compiling():
        y = _run_shortly(options, *tensors)
        if y is not NotImplemented:
            return y  # type: ignore[no-any-return]
    call = operation.resolve(options, tensors)
    if call.backend == "reference" or (call.plain and _is_mixed(tensors)):
        return operation.reference(options, *tensors)
    if call.plain:
        return operation.plain(options, *tensors)
    compute = operation.differentiable if differentiated else operation.fused
    return compute(call.backend, call.code, *call.tensors)


def _run_shortly(options: Options, *tensors: Any) -> Any:
    """What the public function runs for usual calls; NotImplemented for others."""
    x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths = tensors
    if w2.dtype is not x.dtype or dispatch_modes():
        return NotImplemented
    return resolve.run(
        x, w1, b1, w2, b2, options, _pair(affine_scale, affine_shift), residual, alpha, beta,
        lengths, False, None,
    )  # fmt: skip


def _promote(name: str, device: str, *args: Any, **kwargs: Any) -> Tensor:
    """The op under autocast: with the promotions of the public function."""
    operation = _OPERATIONS[name]
    options, tensors = operation.arguments(*args, **kwargs)
    promoted = operation.promote(device, *tensors)
    with torch.autocast(device, enabled=False):
        return public_ops.record(name, options, *promoted)


# The key of autocast for each device type that has kernels.
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def decomposition(name: str) -> Callable[..., Tensor]:
    """The decomposition of a public op, with its arguments; a plain function, as torch's table
    wants."""

    def decompose(*args: Any, **kwargs: Any) -> Tensor:
        return _decompose(name, *args, **kwargs)

    return decompose


def _register(name: str) -> None:
    op, library = public_ops.OPS[name], ops.library
    decompose = decomposition(name)
    library.impl(name, decompose, "FuncTorchBatched")
    for device, key in _AUTOCAST.items():
        library.impl(name, functools.partial(_promote, name, device), key)
    library.impl(name, functools.partial(_differentiate, name), "Autograd", with_keyset=True)
    library.impl(name, functools.partial(_select, name), "BackendSelect", with_keyset=True)
    register_decomposition(op)(decompose)
    # Or FakeTensorMode takes the decomposition for the fake kernel where extents are symbols.
    register_decomposition(op, type="meta")(public_ops.FAKES[name])


def keep_in_inductor() -> None:
    """Have Inductor lower the public ops to calls of them. It would by itself, but where the
    environment has ``CI`` set it refuses an op that has a decomposition and no lowering."""
    from torch._inductor.lowering import lowerings, make_fallback

    for op in public_ops.OPS.values():
        if op not in lowerings:
            make_fallback(op, warn=False)


def register() -> None:
    """Give the public ops their kernels, unless another copy of this package has done so."""
    if not ops.SHARED:
        for name in public_ops.OPS:
            _register(name)
