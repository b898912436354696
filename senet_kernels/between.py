"""A converted module whose own excitation runs between the kernels for the two halves.

``squeeze`` and ``channel_scale`` know a part of the gradient of x each: called one after the other,
both write an image-sized tensor, and autograd adds them up. The two Functions here share the work
instead. Forward, the first hands x on to the second, beside the mean and a place for u::

    z, passed, place = _Squeeze(x)        u = excitation(z)        y = _Scale(passed, place, u, x)

Backward, the second returns as gradients of x and of the place, which nobody but the first sees,
what that needs to write all of dx at once: dy and u. So dy is read twice, x once, dx written once::

    du = gate'(u) sum over space of dy x          dx = dy gate(u) + dz / S

Under ``create_graph=True`` each returns what its gradients are, by differentiable operations. Their
derivatives belong to x itself, which the second keeps, not to ``passed``: there they would be added
to dy, and scaled with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from . import api, autograd, dispatch, features
from .pointwise import POINTWISE, Options, pack
from .reference import autocast_is_on
from .resolve import is_compiling, tracing_state
from .tensors import PLAIN_TYPES, dispatch_modes, function_modes, is_captured, requires_grad
from .validation import DTYPES

_SQUEEZE, _SCALE = autograd.squeeze_op("native"), autograd.channel_scale_op("native")
_SCALE_BACKWARD = torch.ops.senet_kernels.native_channel_scale_backward.default
_NO_OPTIONS = pack(Options("identity", "identity", "identity", "identity"))
_X, _U = 1, 2  # bits of the scaling's `needs`

# Looked up once, as in resolve.
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active


def _scale(x: Tensor, u: Tensor, options: int, save: bool) -> tuple[Tensor, Tensor]:
    """The scaling, and where ``save`` what its backward pass needs beside x and u."""
    both: tuple[Tensor, Tensor] = _SCALE(x, u, None, None, None, None, None, options, save)
    return both


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.extents = options, x.shape
        z = _SQUEEZE(x, None, None, None, _NO_OPTIONS)
        return z, x, torch.empty_like(z)

    @staticmethod
    def backward(ctx: Any, dz: Any, dy: Any, u: Any) -> tuple[Any, None]:
        """Without ``u``, ``dy`` is the gradient of x through the scaling."""
        extents = ctx.extents
        if dz is None:
            if u is not None:
                dy = _scale(dy, u, ctx.options, False)[0]
            return dy, None
        through_mean = dz / extents[2:].numel()
        if u is None:
            through_mean = through_mean[:, :, None, None]
            return through_mean.expand(extents) if dy is None else dy + through_mean, None
        scale_and_shift = torch.cat((u, through_mean), 1)
        return _scale(dy, scale_and_shift, ctx.options, False)[0], None


class _Scale(torch.autograd.Function):
    """``place`` is None where x needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any, passed: Tensor, place: Tensor | None, u: Tensor, x: Tensor, options: int
    ) -> Tensor:
        y, mask = _scale(x, u, options, True)
        ctx.options = options
        ctx.save_for_backward(x, u, mask)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, u, mask = ctx.saved_tensors
        of_x, _, of_u, *_ = ctx.needs_input_grad
        if _is_grad_enabled() or fwAD._current_level >= 0:
            tensors = (x, u, None, None, None, None, None, None, None, mask)
            needs = (_X if of_x else 0) | (_U if of_u else 0)
            gradients = autograd._backward(
                "native channel_scale", ctx.options, needs, tensors, dy, True
            )
            return gradients[0], None, gradients[1], None, None
        if 0 in dy.stride():  # expanded: the kernels would copy it for each reading
            dy = dy.contiguous()
        du = None
        if of_u:
            du = _SCALE_BACKWARD(dy, x, u, None, None, None, None, None, mask, ctx.options, _U)[1]
        return (dy, u, du, None, None) if of_x else (None, None, du, None, None)


#: From how many elements of x on the Functions here are faster than PyTorch's operators on a CPU
#: (docs/tuning-log.md has the measurements).
WORTH = 1 << 18
#: The same in words, for reports.
WHERE = (
    f"its own forward below {WORTH} elements of x, under torch.compile, and in float32 and float64 "
    "without gradients, where that is faster"
)


def is_worth(x: Tensor, compiling: bool) -> bool:
    """Whether the halves are expected to be faster than a module's own forward.

    Below ``WORTH`` elements the host decides, and the module's own forward has fewer calls. Without
    gradients both move the same bytes: only in half precision, where PyTorch sums slowly, is there
    something to gain. What torch.compile makes of the module's own forward is faster; captured
    graphs choose where they run.
    """
    if (compiling or dispatch_modes() or function_modes()) and is_captured():
        return True
    if compiling or tracing_state() is not None or x.numel() < WORTH:
        return False
    return x.dtype in _HALF or (_is_grad_enabled() and x.requires_grad)


_HALF = frozenset((torch.bfloat16, torch.float16))


def prepared(x: Tensor, gate: str, backend: str | None) -> int | None:
    """The options of the scaling for a call that the Functions here take: a plain one on the CPU,
    by the native kernels, with nothing going on around it. None: the public functions' business."""
    if (
        is_compiling()
        or type(x) not in PLAIN_TYPES
        or not x.is_cpu
        or fwAD._current_level >= 0
        or _transforms_active()
        or dispatch_modes()
        or function_modes()
        or tracing_state() is not None
    ):
        return None
    kind = (gate, dispatch._forced if backend is None else backend)
    if kind not in _PREPARED:
        _PREPARED[kind] = _prepare(*kind)
    return _PREPARED[kind]


_PREPARED: dict[tuple[str, str | None], int | None] = {}


def _prepare(gate: str, asked_for: str | None) -> int | None:
    options = Options("identity", gate, "identity", "identity")
    rest = (False, False, False, False, False, False)
    for dtype in DTYPES:
        for form in ("squeeze alone", "channel_scale alone"):
            call = features.Call("cpu", dtype, dtype, options, form, *rest)
            if dispatch.choose(call, asked_for or "auto").backend != "native":
                return None
    return pack(options)


def run(x: Tensor, excite: Callable[[Tensor], Tensor], gate: str, options: int) -> Tensor:
    """``x gate(u)`` of a call for which :func:`prepared` gave options, with u what ``excite`` makes
    of the mean of x, ``[B, C]``."""
    passed, place = x, None
    if _is_grad_enabled() and x.requires_grad:
        z, passed, place = _Squeeze.apply(x, options)
    else:
        z = _SQUEEZE(x, None, None, None, _NO_OPTIONS)
    u = excite(z)
    if u.dtype is not x.dtype or u.shape != x.shape[:2] or type(u) not in PLAIN_TYPES:
        return scaled(passed, u, gate, None)
    y: Tensor
    if requires_grad(x, u):
        y = _Scale.apply(passed, place, u, x, options)
    else:
        y = _scale(x, u, options, False)[0]
    return y


def scaled(x: Tensor, u: Tensor, gate: str, backend: str | None) -> Tensor:
    """``x gate(u)`` by the public function, or by PyTorch's operators where that does not take u:
    there is another layer in the place of one that was recognised, and u is of another dtype than
    x, or as wide as broadcasting allows."""
    if u.shape == x.shape[:2] and (u.dtype == x.dtype or autocast_is_on(x.device.type)):
        return api.channel_scale(x, u, gate=gate, backend=backend)
    row = POINTWISE[gate]
    return x * (row.eager or row.fn)(u[:, :, None, None])
