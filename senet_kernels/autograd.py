"""The autograd Functions around the raw ops.

Three Functions, because torch asks for three things that exclude each other:

* :class:`NativeSEFunction` and :class:`TritonSEFunction`: the plain ones, the short way in eager
  mode. A Function with ``setup_context`` costs 50 µs and more per call (it inspects its own
  signature), these 6.
* ``_TransformableSE``: with ``setup_context`` and ``vmap``, used under ``torch.func`` transforms.
* ``_Backward``: the backward op as a Function of its own, for double backward. First-order
  gradients come from the kernel even then; second-order ones from the reference. Without it a
  raw op inside ``backward`` would return wrong second derivatives without a word.

The halves of the operation have a plain Function each, :class:`SqueezeFunction` and
:class:`ChannelScaleFunction`, and share ``_Backward``; under ``torch.func`` transforms they are
the reference's business.

More than 500 lines: all Functions share one order of arguments, of gradients and of what is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from . import ops, reference
from .pointwise import Options, pack, unpack
from .tensors import is_traced

DEFAULT_OPTIONS = pack(Options("relu", "sigmoid", "identity", "identity"))

_OPTIONS = 5  # position of `options` among a Function's arguments


# Looked up once: they are on the way of every call.
_OPS = {name: getattr(torch.ops.senet_kernels, name).default for name in ops.NAMES}


def forward_op(backend: str) -> Any:
    """The raw forward op of a backend."""
    return _OPS[f"{backend}_forward"]


def inplace_op(backend: str) -> Any:
    """The raw op of a backend that overwrites x."""
    return _OPS[f"{backend}_forward_"]


def squeeze_op(backend: str) -> Any:
    """The raw op of a backend for the squeeze alone."""
    return _OPS[f"{backend}_squeeze"]


def channel_scale_op(backend: str) -> Any:
    """The raw op of a backend for the scaling alone."""
    return _OPS[f"{backend}_channel_scale"]


class _Part(NamedTuple):
    """The whole operation on a backend, or a half of it: what differentiating it takes.

    ``backward`` calls the raw op with ``(dy, inputs, lengths, saved, mask, options, needs)``,
    ``reference`` is the forward pass by differentiable torch operations, called with
    ``(options, *inputs, lengths)``. ``residual`` is the residual's position among the inputs.
    """

    backward: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    residual: int | None


def _whole(backend: str) -> _Part:
    op = _OPS[f"{backend}_backward"]

    def backward(
        dy: Tensor, inputs: Any, lengths: Any, saved: Any, mask: Any, options: int, needs: int
    ) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = op(dy, *inputs, lengths, saved, mask, options, needs)
        return gradients

    return _Part(backward, reference.squeeze_excite_flat, 5)


def _squeeze(backend: str) -> _Part:
    op = _OPS[f"{backend}_squeeze_backward"]

    def backward(
        dz: Tensor, inputs: Any, lengths: Any, saved: Any, mask: Any, options: int, needs: int
    ) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = op(dz, *inputs, lengths, options, needs)
        return gradients

    return _Part(backward, reference.squeeze_flat, None)


def _channel_scale(backend: str) -> _Part:
    op = _OPS[f"{backend}_channel_scale_backward"]

    def backward(
        dy: Tensor, inputs: Any, lengths: Any, saved: Any, mask: Any, options: int, needs: int
    ) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = op(dy, *inputs, mask, options, needs)
        return gradients

    return _Part(backward, _channel_scale_reference, 2)


def _channel_scale_reference(options: Options, *arguments: Any) -> Tensor:
    return reference.channel_scale_flat(options, *arguments[:-1])


# The whole is called as its backend, a half "<backend> squeeze", "<backend> channel_scale".
_PARTS = {
    f"{backend}{half}": part(backend)
    for backend in ops.BACKENDS_WITH_OPS
    for half, part in (("", _whole), (" squeeze", _squeeze), (" channel_scale", _channel_scale))
}


def _keeps_residual(options: int) -> bool:
    """Whether backward reads the residual."""
    return unpack(options).after_again


# The Needs bit of each argument of a plain Function, options among them.
_BITS = (
    *(1 << i for i in range(_OPTIONS)),
    0,
    *(1 << i for i in range(_OPTIONS, ops.GRADIENTS)),
    0,
)


def _needs(needs_input_grad: tuple[bool, ...]) -> int:
    """The Needs bits out of ``ctx.needs_input_grad``."""
    return sum(itertools.compress(_BITS, needs_input_grad))


def _first_order(
    part: _Part,
    options: int,
    needs: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    *inputs: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients the backward op returns, by differentiable torch operations."""
    chosen = unpack(options)
    x = inputs[0]
    assert x is not None
    if chosen.after == "relu" and mask is not None and mask.numel():
        dy = torch.where(ops.unpack_mask(mask, x), dy, 0.0)
        chosen = chosen._replace(after="identity")
    through_residual = chosen.after == "identity"  # then the residual's gradient is dy itself
    residual = part.residual
    wanted = [
        i for i, t in enumerate(inputs) if needs & (1 << i) and (t is not None or i == residual)
    ]
    varied = [i for i in wanted if not (through_residual and i == residual)]

    def forward(*values: Tensor) -> Tensor:
        full: list[Any] = list(inputs)
        for i, value in zip(varied, values, strict=True):
            full[i] = value
        if through_residual and residual is not None:
            full[residual] = None
        return part.reference(chosen, *full, lengths)

    gradients: list[Tensor | None] = [None] * len(inputs)
    if varied:
        vjp = torch.func.vjp(forward, *(inputs[i] for i in varied))[1]
        for i, gradient in zip(varied, vjp(dy), strict=True):
            gradients[i] = gradient
    if through_residual and residual is not None and residual in wanted:
        gradients[residual] = dy
    return tuple(gradients)


class _Backward(torch.autograd.Function):
    """The backward op, differentiable: its own backward goes through the reference."""

    @staticmethod
    def forward(
        part: str,
        options: int,
        needs: int,
        saved: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        dy: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return _PARTS[part].backward(dy, inputs, lengths, saved, mask, options, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.part, ctx.options, ctx.needs, _, mask, lengths, dy, *tensors = inputs
        ctx.save_for_backward(mask, lengths, dy, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        mask, lengths, dy, *inputs = ctx.saved_tensors
        part, options, needs = _PARTS[ctx.part], ctx.options, ctx.needs
        values = [dy, *inputs]
        varied = [i for i, needed in enumerate(ctx.needs_input_grad[6:]) if needed]
        given = [i for i, g in enumerate(second) if g is not None and needs & (1 << i)]

        def gradients(*changed: Tensor) -> tuple[Tensor, ...]:
            full = list(values)
            for i, value in zip(varied, changed, strict=True):
                full[i] = value
            first = _first_order(part, options, needs, mask, lengths, *full)
            return tuple(g for i in given if (g := first[i]) is not None)

        result: list[Tensor | None] = [None] * len(values)
        if varied and given:
            vjp = torch.func.vjp(gradients, *(values[i] for i in varied))[1]
            for i, g in zip(varied, vjp(tuple(second[i] for i in given)), strict=True):
                result[i] = g
        return (None, None, None, None, None, None, *result)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        # Per-sample parameter gradients do not fold into the batch: the reference, mapped.
        part, options, needs, _, mask, lengths, dy, *inputs = args
        _, _, _, _, mask_dim, lengths_dim, *dims = in_dims
        operands = [mask, lengths, dy, *inputs]
        present = [i for i, t in enumerate(operands) if t is not None]
        all_dims = [mask_dim, lengths_dim, *dims]

        def one(*values: Tensor) -> tuple[Tensor, ...]:
            full: list[Any] = [None] * len(operands)
            for i, value in zip(present, values, strict=True):
                full[i] = value
            grads = _first_order(_PARTS[part], options, needs, full[0], full[1], *full[2:])
            return tuple(full[3].new_empty((0,)) if g is None else g for g in grads)

        mapped = torch.vmap(one, tuple(all_dims[i] for i in present))(
            *(operands[i] for i in present)
        )
        return mapped, (0,) * len(inputs)


def _backward(
    part: str,
    options: int,
    needs: int,
    tensors: tuple[Any, ...],
    dy: Tensor,
    differentiable: bool,
) -> list[Tensor | None]:
    """The inputs' gradients, None where not needed. ``tensors`` is what forward saved."""
    *inputs, lengths, saved, mask = tensors
    residual = _PARTS[part].residual
    bit = 0 if residual is None else needs & (1 << residual)
    # The residual's gradient through identity is dy itself: no kernel, no copy.
    passes_dy = bit != 0 and unpack(options).after == "identity"
    if mask is not None and mask.dtype != torch.uint8:  # y, see output_is_kept
        dy, mask, passes_dy = torch.where(mask <= 0, 0.0, dy), _mask_of_ones(inputs[0]), bit != 0
    asked = needs & ~bit if passes_dy else needs
    gradients: list[Tensor | None] = [None] * len(inputs)
    if asked:
        computed: Any
        if fwAD._current_level >= 0:  # forward ran outside of it; the raw ops carry no tangents
            computed = _first_order(_PARTS[part], options, asked, mask, lengths, dy, *inputs)
        elif differentiable:
            computed = _Backward.apply(part, options, asked, saved, mask, lengths, dy, *inputs)
        else:
            computed = _PARTS[part].backward(dy, inputs, lengths, saved, mask, options, asked)
        for i in range(len(inputs)):
            if asked & (1 << i):
                gradients[i] = computed[i]
    if passes_dy and residual is not None:
        gradients[residual] = dy
    return gradients


def _mask_of_ones(x: Tensor) -> Tensor:
    """For the kernel of ``after="relu"`` where dy has been through the ReLU: no other kernel may
    take its place, since trust is in this one."""
    return x.new_full((ops.mask_numel(x),), 255, dtype=torch.uint8)


_output_is_kept = ContextVar("output_is_kept", default=False)


@contextmanager
def output_is_kept() -> Iterator[None]:
    """For calls, traced by AOTAutograd, whose output another operator keeps for backward.

    With ``after="relu"`` they keep it too, and no bit mask: what Inductor makes of backward
    compares it with 0, as for PyTorch's own ReLU, in one loop with what computes dy.
    """
    token = _output_is_kept.set(True)
    try:
        yield
    finally:
        _output_is_kept.reset(token)


def _keeps_output(y: Tensor, options: int) -> bool:
    if not ops.has_mask(options) or torch.compiler.is_dynamo_compiling():
        return False
    return is_traced(y) and _output_is_kept.get()


def _in_argument_order(gradients: list[Tensor | None], arguments: int) -> tuple[Any, ...]:
    """Gradients as autograd wants them: None for options and for what follows."""
    full = (*gradients[:_OPTIONS], None, *gradients[_OPTIONS:], None)
    return full[:arguments]


def _forward(
    op: Any,
    ctx: Any,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    options: int = DEFAULT_OPTIONS,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    affine_scale: Tensor | None = None,
    affine_shift: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The forward op of one of the plain Functions, keeping what its backward needs."""
    needed = ctx.needs_input_grad
    needs = _needs(needed)
    y, saved, mask = op(
        x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths,
        options, needs != 0,
    )  # fmt: skip
    ctx.options = options
    ctx.needs = needs
    ctx.arguments = len(needed)
    kept = residual if residual is not None and _keeps_residual(options) else None
    mask = y if _keeps_output(y, options) else mask
    ctx.save_for_backward(
        x, w1, b1, w2, b2, kept, alpha, beta, affine_scale, affine_shift, lengths, saved, mask
    )
    result: Tensor = y
    return result


#: Where before_affine is among the tensors that forward keeps.
_AFFINE = 8


def _plain_backward(backend: str, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # Grad mode is on in here only under create_graph=True.
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    tensors = ctx.saved_tensors
    if tensors[_AFFINE] is not None and is_traced(dy):
        # AOTAutograd keeps for backward what an op that it cannot fuse reads there. What a fusible
        # one reads, here neg of neg, it computes again: from the statistics that a BatchNorm keeps.
        pair = (t.neg().neg() for t in tensors[_AFFINE : _AFFINE + 2])
        tensors = (*tensors[:_AFFINE], *pair, *tensors[_AFFINE + 2 :])
    gradients = _backward(backend, ctx.options, ctx.needs, tensors, dy, differentiable)
    return _in_argument_order(gradients, ctx.arguments)


class NativeSEFunction(torch.autograd.Function):
    """Squeeze-and-excitation by the C++ kernels, as a ``torch.autograd.Function``.

    ``y = NativeSEFunction.apply(x, w1, b1, w2, b2, options=..., residual=None, alpha=None,
    beta=None, affine_scale=None, affine_shift=None, lengths=None)``, positional, anything after
    ``b2`` may be left out. Shapes and meaning are those of
    :func:`senet_kernels.squeeze_excite`; ``options`` is the integer of
    :func:`senet_kernels.pack_options` (default: relu and sigmoid). Double backward works. It
    takes what the feature table calls fused and raises ``RuntimeError`` otherwise; for checked
    arguments, fallbacks, autocast and ``torch.func`` use ``squeeze_excite``. On CUDA tensors not
    yet run on a GPU.
    """

    backend = "native"

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _forward(_NATIVE_FORWARD, ctx, *args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _plain_backward("native", ctx, dy)


class TritonSEFunction(torch.autograd.Function):
    """Squeeze-and-excitation by the Triton kernels, not yet run on a GPU; otherwise as
    :class:`NativeSEFunction`.
    """

    backend = "triton"

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _forward(_TRITON_FORWARD, ctx, *args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _plain_backward("triton", ctx, dy)


_NATIVE_FORWARD = forward_op("native")
_TRITON_FORWARD = forward_op("triton")


def _half_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # What may need a gradient comes first among a half's arguments, in the order of its gradients.
    arguments = len(ctx.needs_input_grad)
    needs = sum(1 << i for i, needed in enumerate(ctx.needs_input_grad) if needed)
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    gradients = _backward(ctx.part, ctx.options, needs, ctx.saved_tensors, dy, differentiable)
    return (*gradients, *[None] * (arguments - len(gradients)))


class SqueezeFunction(torch.autograd.Function):
    """The squeeze alone by a backend's kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        affine_scale: Tensor | None,
        affine_shift: Tensor | None,
        lengths: Tensor | None,
        options: int,
        backend: str,
    ) -> Tensor:
        ctx.options, ctx.part = options, f"{backend} squeeze"
        ctx.save_for_backward(x, affine_scale, affine_shift, lengths, None, None)
        z: Tensor = squeeze_op(backend)(x, affine_scale, affine_shift, lengths, options)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        return _half_backward(ctx, dz)


class ChannelScaleFunction(torch.autograd.Function):
    """The scaling alone by a backend's kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        residual: Tensor | None,
        alpha: Tensor | None,
        beta: Tensor | None,
        affine_scale: Tensor | None,
        affine_shift: Tensor | None,
        options: int,
        backend: str,
    ) -> Tensor:
        rest = (alpha, beta, affine_scale, affine_shift)
        y, mask = channel_scale_op(backend)(x, u, residual, *rest, options, True)
        ctx.options, ctx.part = options, f"{backend} channel_scale"
        kept = residual if _keeps_residual(options) else None
        ctx.save_for_backward(x, u, kept, *rest, None, None, mask)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _half_backward(ctx, dy)


class _TransformableSE(torch.autograd.Function):
    """The same operation for ``torch.func`` transforms. Returns ``(y, saved, mask)``."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, w1, b1, w2, b2, options, *rest = args
        result: tuple[Tensor, Tensor, Tensor] = forward_op(backend)(
            x, w1, b1, w2, b2, *rest, options, True
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, x, w1, b1, w2, b2, ctx.options, residual, *rest = inputs
        _, saved, mask = output
        ctx.mark_non_differentiable(saved, mask)
        # The residual is kept for relu too: a mapped backward has no mask, see vmap.
        kept = None if unpack(ctx.options).after == "identity" else residual
        ctx.save_for_backward(x, w1, b1, w2, b2, kept, *rest, saved, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        needs = _needs(ctx.needs_input_grad[1:])
        gradients = _backward(
            ctx.backend, ctx.options, needs, ctx.saved_tensors, dy, differentiable=True
        )
        return (None, *_in_argument_order(gradients, 12))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], backend: str, *args: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, None, None]]:
        options = args[_OPTIONS]
        per_image = (0, 6, 11)  # x, residual, lengths have a batch axis to fold into
        dims = in_dims[1:]
        folds = all(
            (dims[i] is not None) == (i in per_image)
            for i, t in enumerate(args)
            if isinstance(t, Tensor)
        )
        if folds:
            folded = list(args)
            for i in per_image:
                if args[i] is not None:
                    folded[i] = args[i].movedim(dims[i], 0).flatten(0, 1)
            y = _TransformableSE.apply(backend, *folded)[0].unflatten(0, (info.batch_size, -1))
        else:
            y = _mapped_reference(options, args, dims)
        # The backward pass of mapped calls recomputes by the reference: it needs neither of these.
        empty = y.new_empty((0,))
        return (y, empty, empty.to(torch.uint8)), (0, None, None)


def _mapped_reference(options: int, args: tuple[Any, ...], dims: tuple[Any, ...]) -> Tensor:
    """``torch.vmap`` of the reference over the tensors among a Function's arguments."""
    positions = [i for i, t in enumerate(args) if isinstance(t, Tensor)]

    def one(*values: Tensor) -> Tensor:
        full: list[Any] = [None] * len(args)
        for i, value in zip(positions, values, strict=True):
            full[i] = value
        del full[_OPTIONS]
        return reference.squeeze_excite_flat(unpack(options), *full)

    mapped: Tensor = torch.vmap(one, tuple(dims[i] for i in positions))(
        *(args[i] for i in positions)
    )
    return mapped


def distinct(*args: Any) -> tuple[Any, ...]:
    """Each tensor once, views standing in: Dynamo refuses a Function that is given one twice, as
    where x is its own residual."""
    result: list[Any] = []
    for t in args:
        twice = isinstance(t, Tensor) and any(t is other for other in result)
        result.append(t.view_as(t) if twice else t)
    return tuple(result)


def apply(backend: str, *args: Any) -> Tensor:
    """One differentiable call on ``backend``; arguments as ``NativeSEFunction.apply`` takes them,
    all twelve."""
    if torch._C._are_functorch_transforms_active():
        result: Tensor = _TransformableSE.apply(backend, *args)[0]
        return result
    if torch.compiler.is_compiling():
        args = distinct(*args)
    plain: Tensor = _FUNCTIONS[backend].apply(*args)
    return plain


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "native": NativeSEFunction,
    "triton": TritonSEFunction,
}
