"""The ops' implementation: prepared calls, scratch memory, launches. Imported on the first call.

What follows from shapes, strides, dtypes, options, device and alignment is worked out once per
such kind of call, and kept: after that a call is a look-up, the allocations and the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from senet_kernels.ops import after_code, mask_numel, saved_numel
from senet_kernels.pointwise import POINTWISE
from senet_kernels.validation import overlaps

from .build import Builder
from .operands import Inputs, Kind, check_kept, examine
from .plan import Plan, TilePlan, is_crowded, make_plan
from .runtime import runtime_of

KEEPS_NO_RESIDUAL = (POINTWISE["identity"].code, POINTWISE["relu"].code)

# Kinds of calls that are kept. Who has more (a new shape in every step) prepares some again.
_MOST_KINDS = 4096


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current stream of the device of x."""
    return runtime_of(x.device).guard(x)


def _is_capturing(x: Tensor) -> bool:
    """Whether the stream that launches for x go to is being captured."""
    return runtime_of(x.device).is_capturing(x)


def planned(
    kind: Kind, x: Tensor, *, masked: bool, lengths: bool = False, sums_in_dx: bool = False
) -> Plan:
    """The plan of one direction of a call, see :func:`.plan.make_plan`."""
    return make_plan(
        kind.shape, x.element_size(), kind.device, masked=masked, lengths=lengths,
        crowded=is_crowded(kind.options.before, kind.options.after_again), sums_in_dx=sums_in_dx,
    )  # fmt: skip


class Forward:
    """Forward calls of one kind."""

    def __init__(self, inputs: Inputs, kind: Kind, save: bool, inplace: bool = False) -> None:
        """``inplace``: where x has a layout of the kernels, y is x."""
        x, w1, _, w2, *_, lengths = inputs
        assert x is not None
        assert w2 is not None
        shape = kind.shape
        self.kind, self.save = kind, save
        self.keeps_mask = save and kind.options.after == "relu"
        self.mask = mask_numel(x) if self.keeps_mask else 0
        self.y_is_x = inplace and 0 not in kind.copied
        # z, h and u, one after the other, as ``saved`` has them.
        hidden, outputs = shape.hidden or 0, shape.outputs if save else 0
        self.vectors = [shape.batch * n for n in (shape.channels, hidden, outputs)]
        self.factors = (1 + kind.shift) * shape.batch * shape.channels
        self.plan = planned(kind, x, masked=self.keeps_mask, lengths=lengths is not None)
        build = Builder(kind, self.plan, x, w2.dtype)
        self.parts = self.plan.sums.splits * self.vectors[0]
        self.squeeze, self.mean = build.squeeze()
        self.hidden = None if w1 is None else build.hidden()
        self.gates = build.gates()
        self.scale = build.scale(kind.strides["x"] if self.y_is_x else None)

    @property
    def launches(self) -> int:
        return 3 + (self.mean is not None) + (self.hidden is not None)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, w1, b1, w2, b2, residual, alpha, beta, a, b, lengths = kind.arranged(inputs)
        y = like if self.y_is_x else kind.dense(like)
        vectors = kind.scratch(like, sum(self.vectors))
        z, h, u = vectors.split(self.vectors)
        factors = kind.scratch(like, self.factors)
        mask = like.new_empty((self.mask,), dtype=torch.uint8)
        with on_device(like):
            if self.mean is None:
                self.squeeze(x, a, b, lengths, z)
            else:
                parts = kind.scratch(like, self.parts)
                self.squeeze(x, a, b, lengths, parts)
                self.mean(parts, lengths, z)
            if self.hidden is not None:
                self.hidden(z, w1, b1, h)
            inner = z if self.hidden is None else h
            self.gates(inner, w2, b2, alpha, beta, u if self.save else None, factors)
            self.scale(x, a, b, factors, residual, y, mask if self.keeps_mask else None)
        saved = vectors if self.save else vectors.new_empty((0,))
        return (y if self.y_is_x else kind.finish(y, like)), saved, mask


class Backward:
    """Backward calls of one kind. What no gradient asked for needs is not launched."""

    def __init__(self, inputs: Inputs, kind: Kind, needs: int) -> None:
        x, w1, b1, w2, b2, _, alpha, beta, a, b, lengths, _ = inputs
        assert x is not None
        assert w2 is not None
        shape, options = kind.shape, kind.options
        self.kind = kind
        self.masked = options.after == "relu"
        # In the order of Needs. The residual's gradient is laid out like x.
        like = (x, w1, b1, w2, b2, x, alpha, beta, a, b)
        self.wanted = wanted(like, needs)
        dx, dw1, db1, dw2, db2, dresidual, dalpha, dbeta, *affine = self.wanted
        self.to_x = dx or any(affine)
        self.to_z = self.to_x or dw1 or db1
        self.to_alpha = dalpha or dbeta
        two_layers = shape.hidden is not None
        # The mask alone tells which of dy reach the residual.
        self.reduces = options.after_again or any((*self.wanted[:5], *self.wanted[6:]))

        self.plan = planned(kind, x, masked=self.masked, sums_in_dx=any(affine))
        build = Builder(kind, self.plan, x, w2.dtype)
        self.vectors = [shape.batch * n for n in (shape.channels, shape.hidden or 0, shape.outputs)]
        plane = self.vectors[0]
        self.factors = (1 + kind.shift) * plane
        self.parts = self.plan.sums.splits * self.factors
        self.affine = AffineSums(self.plan, shape.batch, shape.channels, any(affine))
        self.reduce, self.finish = build.bwd_reduce()
        self.hidden = build.hidden_bwd() if two_layers and self.to_z else None
        self.excite = build.excite_bwd(
            dz=self.to_x, dw2=dw2, dw1=dw1, vectors=db1 or db2 or self.to_alpha
        )
        reads_x = options.before != "identity" or options.after_again or any(affine)
        self.dx = build.dx(reads_x=reads_x) if self.to_x or dresidual else None
        self.sums = build.sums() if any(affine) else None

    @property
    def launches(self) -> int:
        steps = (self.finish, self.hidden, self.excite, self.dx, self.sums)
        return self.reduces + sum(step is not None for step in steps)

    def __call__(self, inputs: Inputs, saved: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, w1, b1, w2, b2, residual, alpha, beta, a, b, lengths, dy = kind.arranged(inputs)
        originals = (like, *inputs[1:5], like, *inputs[6:10])
        written = empty_gradients(kind, like, originals, self.wanted)
        dx, dw1, db1, dw2, db2, dresidual, dalpha, dbeta, da, db = written
        z, h, u = saved.split(self.vectors)
        plane, hidden, outputs = self.vectors
        bits = mask if self.masked else None
        factors = kind.scratch(like, self.factors) if self.dx and self.reduces else None
        du = kind.scratch(like, outputs)
        ds = kind.scratch(like, plane) if self.to_alpha else None
        dh = kind.scratch(like, hidden) if self.hidden is not None else None
        dz = kind.scratch(like, plane) if self.to_x else None
        with on_device(like):
            if self.reduces:
                results = (u, alpha, beta, ds, du, factors)
                parts = None if self.finish is None else kind.scratch(like, self.parts)
                self.reduce(dy, x, residual, bits, a, b, *results, parts)
                if self.finish is not None:
                    self.finish(parts, *results)
            if self.hidden is not None:
                self.hidden(du, w2, h, dh)
            if self.excite is not None:
                last, w, inner = (du, w2, z) if w1 is None else (dh, w1, h)
                self.excite(last, w, du, dh, inner, z, u, ds, dz, dw2, dw1, db2, db1, dalpha, dbeta)
            if self.dx is not None:
                sums = self.affine.parts(kind, like)
                self.dx(
                    dy, x, residual, bits, a, b, lengths, factors, dz, dx, dresidual, *sums
                )  # fmt: skip
                if self.sums is not None:
                    self.sums(None, None, *sums, None, None, da, db)
        return finished(kind, like, written, originals)


class AffineSums:
    """What dx leaves of the gradients of ``before_affine``: the last arguments of its launch."""

    def __init__(self, plan: Plan, batch: int, channels: int, wanted: bool) -> None:
        writes = plan.writes
        self.tiles, self.wanted = isinstance(writes, TilePlan), wanted
        self.shape = (batch, writes.splits, channels) if isinstance(writes, TilePlan) else ()

    def parts(self, kind: Kind, like: Tensor) -> tuple[Tensor | None, ...]:
        if not self.tiles:
            return ()
        if not self.wanted:
            return None, None
        return kind.scratch(like, *self.shape), kind.scratch(like, *self.shape)


def check_mask(kind: Kind, x: Tensor, mask: Tensor) -> None:
    """The mask must be that of such a call."""
    if kind.options.after == "relu":
        check_kept("mask", mask, x, mask_numel(x), torch.uint8)


def wanted(of: Inputs, needs: int) -> tuple[bool, ...]:
    """Which gradients are asked for, of those that there are."""
    return tuple(t is not None and bool(needs & (1 << i)) for i, t in enumerate(of))


def empty_gradients(
    kind: Kind, x: Tensor, of: Inputs, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """What kernels write gradients to: images in their layout, parameters dense."""
    return [
        None if not needed or t is None
        else kind.dense(x) if t is x
        else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for needed, t in zip(wanted, of, strict=True)
    ]  # fmt: skip


def finished(kind: Kind, x: Tensor, written: list[Tensor | None], of: Inputs) -> tuple[Tensor, ...]:
    """The gradients in the strides of what they belong to; empty where none was asked for."""
    return tuple(
        x.new_empty((0,)) if w is None or t is None
        else kind.finish(w, x) if t is x
        else w if t.is_contiguous() and t.stride() == w.stride()
        else torch.empty_like(t).copy_(w)
        for w, t in zip(written, of, strict=True)
    )  # fmt: skip


_calls: dict[Any, Any] = {}


def forget() -> None:
    """Drop every prepared call: what they depend on has changed."""
    _calls.clear()


# First calls are made one at a time: other threads with a call of the same kind wait for it.
_first_calls = threading.RLock()


def run(
    op: str,
    tensors: Inputs,
    *more: Any,
    first: Callable[[], tuple[Any, Any]],
    arguments: tuple[Any, ...] | None = None,
) -> Any:
    """The result of the prepared call for such tensors, whose first is x. ``first()`` prepares one
    and makes it: that one is kept after its kernels were launched, and called with ``arguments``
    (the tensors unless given) from then on.

    It depends on all that is in the key: Triton compiles apart for pointers that are multiples of
    16. (What PyTorch allocates for results always is.) A tensor whose memory was freed is checked,
    and refused, as in a first call.
    """
    key = (
        op,
        *more,
        *[
            None if t is None
            else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0,
                  t.untyped_storage().nbytes() > 0)
            for t in tensors
        ],
    )  # fmt: skip
    call = _calls.get(key)
    if call is None:
        x = tensors[0]
        if x is not None and _is_capturing(x):
            raise RuntimeError(
                f"triton_{op}: no call with these shapes, dtypes, layouts and options has "
                "succeeded before, so its kernels may have to be compiled. This cannot be done "
                "while a CUDA graph is being captured: make the call once before the capture, as a "
                "warm-up"
            )
        with _first_calls:
            call = _calls.get(key)
            if call is None:
                call, result = first()
                if len(_calls) >= _MOST_KINDS:
                    _calls.clear()
                _calls[key] = call
                return result
    return call(*((tensors,) if arguments is None else arguments))


def forward(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``triton_forward``; see :mod:`senet_kernels.ops`."""
    inputs = (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths)

    def first() -> tuple[Any, Any]:
        kind = examine(inputs, options)
        call = Forward(inputs, kind, save)
        return call, call(inputs)

    result: tuple[Tensor, Tensor, Tensor] = run("forward", inputs, options, save, first=first)
    return result


def forward_(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
) -> None:
    """``triton_forward_``: overwrites x."""
    inputs = (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths)

    def first() -> tuple[Any, Any]:
        if overlaps(x):
            raise RuntimeError(
                "x: expected elements that do not overlap in memory, got shape "
                f"{list(x.shape)} with strides {list(x.stride())}"
            )
        kind = examine(inputs, options)
        call = Forward(inputs, kind, False, inplace=True)
        return call, call(inputs)

    y = run("forward_", inputs, options, first=first)[0]
    if y is not x:
        x.copy_(y)


def backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    saved: Tensor,
    mask: Tensor,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """``triton_backward``; see :mod:`senet_kernels.ops`."""
    if after_code(options) in KEEPS_NO_RESIDUAL:
        residual = None
    inputs = (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths, dy)

    def first() -> tuple[Any, Any]:
        kind = examine(inputs, options)
        check_kept("saved", saved, x, saved_numel(x, w1, w2), kind.accumulate)
        check_mask(kind, x, mask)
        call = Backward(inputs, kind, needs)
        return call, call(inputs, saved, mask)

    result: tuple[Tensor, ...] = run(
        "backward", (*inputs, saved, mask), options, needs,
        first=first, arguments=(inputs, saved, mask),
    )  # fmt: skip
    return result
