"""The ops' implementation: prepared calls, scratch memory, launches. Imported on the first call.

What follows from shapes, strides, dtypes, options, device and alignment is worked out once per
such kind of call, and kept: after that a call is a look-up, the allocations and the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from senet_kernels.ops import Needs, after_code, mask_numel, saved_numel
from senet_kernels.pointwise import POINTWISE, Options
from senet_kernels.validation import overlaps

from . import tuning
from .backward_kernels import dots_kernel, dx_kernel
from .forward_kernels import scale_kernel, squeeze_kernel
from .launcher import Launch
from .operands import Inputs, Kind, check_kept, examine, units, wide
from .parameter_kernels import parameters_kernel
from .plan import Choice, Plan, ceil_div, power_of_two
from .resident_kernels import resident_backward_kernel, resident_kernel

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
KEEPS_NO_RESIDUAL = (POINTWISE["identity"].code, POINTWISE["relu"].code)

# Of kernels that sum over the batch: images at a time, a tile of a weight, a vector's columns.
BATCH_BLOCK, _TILE_ROWS, _TILE_COLUMNS, VECTOR = 8, 32, 32, 128

# Kinds of calls that are kept. Who has more (a new shape in every step) prepares some again.
_MOST_KINDS = 4096

_NO_GUARD = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current stream of the device of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def _is_capturing(x: Tensor) -> bool:
    """Whether the stream that launches for x go to is being captured."""
    if not x.is_cuda:
        return False
    with on_device(x):
        return torch.cuda.is_current_stream_capturing()


def launch_values(kind: Kind, plan: Plan, y_stride: int | None = None) -> dict[str, Any]:
    """What the kernels take besides pointers. Extents and strides go in units. Images of y are
    dense unless ``y_stride`` is given."""
    shape, options = kind.shape, kind.options
    two_layers = shape.hidden is not None
    values: dict[str, Any] = {
        "batch": shape.batch, "hidden": shape.hidden or 0,
        "tiles": plan.tiles, "splits": plan.splits, "steps": plan.steps,
        "walk": plan.W,
        "parts": plan.tiles * plan.splits if two_layers else plan.splits,
        "LAST": shape.last, "TWO_LAYERS": two_layers, "SHIFT": kind.shift,
        "FLAT": shape.positions if plan.flat else 0,
        "ACC": _ACCUMULATE[kind.accumulate], "INDEX": tl.int64 if wide(kind, plan) else tl.int32,
        "W": plan.W, "G": plan.G, "BC": plan.BC, "BS": plan.BS, "BR": plan.BR, "BK": plan.BK,
        "BP": min(power_of_two(plan.splits), plan.BK), "BB": BATCH_BLOCK, "BV": VECTOR,
    }  # fmt: skip
    values |= {name.upper(): f for name, f in options._asdict().items()}
    extents = {
        "channels": ("C", shape.channels), "positions": ("S", shape.positions),
        "y_stride": ("Y", shape.image if y_stride is None else y_stride),
    }  # fmt: skip
    for name, letter in (("x", "X"), ("dy", "DY"), ("residual", "RES")):
        extents[f"{name}_stride"] = letter, kind.strides.get(name, 0)
    for name, (letter, extent) in extents.items():
        values[f"{name}_units"], values[f"UNIT_{letter}"] = units(extent)
    return values


def launch_over_images(kernel: Any, plan: Plan, values: Mapping[str, Any]) -> Launch:
    """A launch that the plan is for."""
    return Launch(kernel, plan.programs, values, warps=plan.warps)


class Forward:
    """Forward calls of one kind."""

    def __init__(
        self, inputs: Inputs, kind: Kind, save: bool, choice: Choice, inplace: bool = False
    ) -> None:
        """``inplace``: where x has a layout of the kernels, y is x."""
        x, w1, _, w2, *_ = inputs
        assert x is not None
        assert w2 is not None
        shape, plan = kind.shape, choice.plan
        self.kind, self.save, self.resident = kind, save, choice.resident
        self.saved = saved_numel(x, w1, w2) if save else 0
        self.keeps_mask = save and kind.options.after == "relu"
        self.mask = mask_numel(x) if self.keeps_mask else 0
        self.y_is_x = inplace and 0 not in kind.copied
        values = launch_values(kind, plan, kind.strides["x"] if self.y_is_x else None)
        if self.resident:
            self.one_launch = launch_over_images(resident_kernel, plan, values)
            return
        # The mean of a program that has all positions is final: straight into what is saved.
        self.z_is_final = plan.splits == 1 and save
        self.z = (shape.batch, plan.splits, shape.channels)
        self.hidden = (shape.batch, values["parts"], shape.hidden or 0)
        self.squeeze = launch_over_images(squeeze_kernel, plan, values)
        values["hidden"] = shape.inner
        self.scale = launch_over_images(scale_kernel, plan, values)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, w1, b1, w2, b2, residual, alpha, beta, a, b, lengths = kind.arranged(inputs)
        y = like if self.y_is_x else kind.dense(like)
        saved = kind.scratch(like, self.saved)
        mask = like.new_empty((self.mask,), dtype=torch.uint8)
        kept = saved if self.save else None
        bits = mask if self.keeps_mask else None
        if self.resident:
            with on_device(like):
                self.one_launch(
                    x, residual, a, b, lengths, w1, b1, w2, b2, alpha, beta, y, kept, bits
                )
        else:
            z = None
            if self.z_is_final:
                z = saved
            elif self.save or w1 is None:
                z = kind.scratch(like, *self.z)
            hidden = None if w1 is None else kind.scratch(like, *self.hidden)
            with on_device(like):
                self.squeeze(x, a, b, lengths, w1, z, hidden)
                self.scale(
                    x, residual, a, b, b1, w2, b2, alpha, beta, z if hidden is None else hidden,
                    None if self.z_is_final else z, None, y, kept, bits,
                )  # fmt: skip
        return (y if self.y_is_x else kind.finish(y, like)), saved, mask


def reads_x_twice(options: Options, affine: Tensor | None) -> bool:
    """Whether dx needs x, and not only dy."""
    return affine is not None or options.before != "identity" or options.after_again


class Backward:
    """Backward calls of one kind."""

    def __init__(self, inputs: Inputs, kind: Kind, needs: int, choice: Choice) -> None:
        x, w1, b1, w2, b2, _, alpha, beta, a, b, *_ = inputs
        assert x is not None
        assert w2 is not None
        shape, plan = kind.shape, choice.plan
        self.kind, self.resident = kind, choice.resident
        self.masked = kind.options.after == "relu"
        # In the order of Needs. The residual's gradient is laid out like x.
        like = (x, w1, b1, w2, b2, x, alpha, beta, a, b)
        self.wanted = wanted(like, needs)

        values = launch_values(kind, plan)
        values["inner"] = inner = shape.outputs if shape.hidden is None else shape.hidden
        values["READS_X"] = reads_x_twice(kind.options, a)
        self.affine = None
        if needs & (Needs.AFFINE_SCALE | Needs.AFFINE_SHIFT):
            self.affine = (shape.batch, plan.splits, shape.channels)
        if self.resident:
            self.one_launch = launch_over_images(resident_backward_kernel, plan, values)
        else:
            self.dots = (shape.batch, plan.splits, shape.outputs)
            self.hidden = (shape.batch, values["parts"], inner)
            self.to_dots = launch_over_images(dots_kernel, plan, values)
            self.to_dx = launch_over_images(dx_kernel, plan, values)

        hidden = shape.hidden or 0
        w2_tiles = _weight_tiles(shape.outputs, shape.inner) if self.wanted[3] else 0
        w1_tiles = _weight_tiles(hidden, shape.channels) if self.wanted[1] else 0
        vectors = ceil_div(max(shape.outputs, hidden), VECTOR)
        values |= {
            "channels": shape.channels, "outputs": shape.outputs, "w2_tiles": w2_tiles,
            "w1_tiles": w1_tiles, "BO": _TILE_ROWS, "BI": _TILE_COLUMNS,
        }  # fmt: skip
        self.parameters = None
        if any(self.wanted[1:5]) or any(self.wanted[6:]):
            programs = w2_tiles + w1_tiles + vectors
            self.parameters = Launch(parameters_kernel, programs, values, warps=4)

    def __call__(self, inputs: Inputs, saved: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        kind, shape, like = self.kind, self.kind.shape, inputs[0]
        assert like is not None
        x, w1, b1, w2, b2, residual, alpha, beta, a, b, lengths, dy = kind.arranged(inputs)
        originals = (like, *inputs[1:5], like, *inputs[6:10])
        written = empty_gradients(kind, like, originals, self.wanted)
        dx, dw1, db1, dw2, db2, dresidual, *rest = written
        ds = kind.scratch(like, shape.batch, shape.channels)
        du = kind.scratch(like, shape.batch, shape.outputs)
        dh = None if w1 is None else kind.scratch(like, shape.batch, shape.hidden or 0)
        da = db = None
        if self.affine is not None:
            da, db = kind.scratch(like, *self.affine), kind.scratch(like, *self.affine)
        bits = mask if self.masked else None
        with on_device(like):
            if self.resident:
                self.one_launch(
                    dy, x, residual, bits, a, b, lengths, w1, w2, alpha, beta, saved,
                    dx, dresidual, ds, du, dh, da, db,
                )  # fmt: skip
            else:
                dots, hidden = kind.scratch(like, *self.dots), kind.scratch(like, *self.hidden)
                self.to_dots(dy, x, residual, bits, a, b, w2, alpha, beta, saved, dots, hidden)
                self.to_dx(
                    dy, x, residual, bits, a, b, lengths, w2 if w1 is None else w1, alpha, beta,
                    saved, dots, hidden, dx, dresidual, ds, du, dh, da, db,
                )  # fmt: skip
            if self.parameters is not None:
                self.parameters(ds, du, dh, saved, da, db, dw1, db1, dw2, db2, *rest)
        return finished(kind, like, written, originals)


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


def _weight_tiles(rows: int, columns: int) -> int:
    return ceil_div(rows, _TILE_ROWS) * ceil_div(columns, _TILE_COLUMNS)


_calls: dict[Any, Any] = {}


def forget() -> None:
    """Drop every prepared call: what they depend on has changed."""
    _calls.clear()


tuning.on_change(forget)


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
        tuning.forced(),
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
                "succeeded before, so its kernels may have to be compiled, or timed where "
                "autotuning is on. This cannot be done while a CUDA graph is being captured: make "
                "the call once before the capture, as a warm-up"
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


def first_call(
    direction: str,
    kind: Kind,
    x: Tensor,
    make: Callable[[Choice], Any],
    *arguments: Any,
    timed: Callable[[Choice], Any] | None = None,
) -> tuple[Any, Any]:
    """The call ``make(choice)`` for the choice that this kind gets, and the result that it has for
    the arguments. Where choices are timed, ``timed(choice)`` is called in its place.

    A choice whose kernels do not compile or do not fit the device fails before anything is written.
    """

    def ready(choice: Choice) -> Callable[[], object]:
        return partial((timed or make)(choice), *arguments)

    choice = tuning.choose(direction, kind.shape, x, kind.device, ready)
    try:
        call = make(choice)
        return call, call(*arguments)
    except (TritonError, tuning.CannotCompileError) as error:
        other = tuning.instead(choice, error, direction, kind.shape, x, kind.device)
        if other is None:
            raise
        call = make(other)
        return call, call(*arguments)


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
        return first_call("forward", kind, x, partial(Forward, inputs, kind, save), inputs)

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
        # What is timed must leave x as it is.
        timed = partial(Forward, inputs, kind, False)
        make = partial(timed, inplace=True)
        return first_call("forward", kind, x, make, inputs, timed=timed)

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
        make = partial(Backward, inputs, kind, needs)
        return first_call("backward", kind, x, make, inputs, saved, mask)

    result: tuple[Tensor, ...] = run(
        "backward", (*inputs, saved, mask), options, needs,
        first=first, arguments=(inputs, saved, mask),
    )  # fmt: skip
    return result
