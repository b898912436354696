"""The ops' implementation: prepared calls, scratch memory, launches. Imported on the first call.

What follows from shapes, strides, dtypes, options, device and alignment is worked out once per
such kind of call, and kept: after that a call is a look-up, the allocations and the launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from senet_kernels.ops import Needs, after_code, mask_numel, saved_numel
from senet_kernels.pointwise import POINTWISE

from . import tuning
from .backward_kernels import dots_kernel, dx_kernel, parameters_kernel
from .forward_kernels import scale_kernel, squeeze_kernel
from .operands import Inputs, Kind, examine, units, wide
from .plan import Choice, Plan, ceil_div
from .resident_kernel import resident_kernel

_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}
_KEEPS_NO_RESIDUAL = (POINTWISE["identity"].code, POINTWISE["relu"].code)

# Of the kernel that sums over the batch: images at a time, a tile of a weight, a vector's columns.
_BATCH_BLOCK, _TILE_ROWS, _TILE_COLUMNS, _VECTOR = 8, 32, 32, 128

# Kinds of calls that are kept. Who has more (a new shape in every step) prepares some again.
_MOST_KINDS = 4096

_NO_GUARD = nullcontext()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current stream of the device of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Launch:
    """A kernel with all its arguments but the pointers; called with these it launches.

    Triton's way from a call to a launch binds, specialises and hashes some forty arguments. What
    comes out depends on dtypes, alignment, integers and constants, which are all the same in a
    prepared call: so it is taken once, and then the compiled kernel is called directly.
    """

    def __init__(
        self, kernel: Any, programs: int, values: Mapping[str, Any], *, warps: int
    ) -> None:
        """``values`` has every argument that is no pointer, and may have more."""
        names = kernel.arg_names
        pointers = sum(name not in values for name in names)
        self.kernel = kernel
        self._programs = programs
        self._options = {"num_warps": warps}
        self._rest = tuple(values[name] for name in names[pointers:])
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *pointers: Tensor | None) -> None:
        if self._compiled is not None:
            self._compiled(*pointers, *self._rest)
        elif self._programs:
            kernel = self.kernel[(self._programs,)](*pointers, *self._rest, **self._options)
            if kernel is not None:  # the interpreter has none
                self._compiled = kernel[(self._programs, 1, 1)]


def _values(kind: Kind, plan: Plan) -> dict[str, Any]:
    """What both passes' kernels take besides pointers. Extents and strides go in units."""
    shape, options = kind.shape, kind.options
    values: dict[str, Any] = {
        "batch": shape.batch, "hidden": shape.hidden,
        "tiles": plan.tiles, "splits": plan.splits, "steps": plan.steps,
        "parts": plan.tiles * plan.splits if shape.hidden else plan.splits,
        "LAST": shape.last, "TWO_LAYERS": shape.hidden > 0,
        "SHIFT": shape.outputs > shape.channels,
        "ACC": _ACCUMULATE[kind.accumulate], "INDEX": tl.int64 if wide(kind, plan) else tl.int32,
        "G": plan.G, "BC": plan.BC, "BS": plan.BS, "BR": plan.BR, "BK": plan.BK,
    }  # fmt: skip
    values |= {name.upper(): POINTWISE[f].code for name, f in options._asdict().items()}
    extents = {"channels": ("C", shape.channels), "positions": ("S", shape.positions)}
    for name, letter in (("x", "X"), ("dy", "DY"), ("residual", "RES")):
        extents[f"{name}_stride"] = letter, kind.strides.get(name, 0)
    for name, (letter, extent) in extents.items():
        values[f"{name}_units"], values[f"UNIT_{letter}"] = units(extent)
    return values


class Forward:
    """Forward calls of one kind."""

    def __init__(self, inputs: Inputs, kind: Kind, save: bool, plan: Plan, resident: bool) -> None:
        """``resident``: the plan is for one launch, whole images in a program."""
        x, w1, _, w2, *_ = inputs
        assert x is not None
        assert w2 is not None
        shape = kind.shape
        self.kind, self.save, self.resident = kind, save, resident
        self.saved = saved_numel(x, w1, w2) if save else 0
        self.keeps_mask = save and kind.options.after == "relu"
        self.mask = mask_numel(x) if self.keeps_mask else 0
        values = _values(kind, plan)
        if resident:
            self.one_launch = Launch(resident_kernel, plan.programs, values, warps=plan.warps)
            return
        # The mean of a program that has all positions is final: straight into what is saved.
        self.z_is_final = plan.splits == 1 and save
        self.z = (shape.batch, plan.splits, shape.channels)
        self.hidden = (shape.batch, values["parts"], shape.hidden)
        self.squeeze = Launch(squeeze_kernel, plan.programs, values, warps=plan.warps)
        values["hidden"] = shape.inner
        self.scale = Launch(scale_kernel, plan.programs, values, warps=plan.warps)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        kind, like = self.kind, inputs[0]
        assert like is not None
        x, w1, b1, w2, b2, residual, alpha, beta, a, b, lengths = kind.arranged(inputs)
        y = kind.dense(like)
        saved = kind.scratch(like, self.saved)
        mask = like.new_empty((self.mask,), dtype=torch.uint8)
        kept = saved if self.save else None
        bits = mask if self.keeps_mask else None
        if self.resident:
            with _on(like):
                self.one_launch(
                    x, residual, a, b, lengths, w1, b1, w2, b2, alpha, beta, y, kept, bits
                )
            return kind.finish(y, like), saved, mask

        z = None
        if self.z_is_final:
            z = saved
        elif self.save or w1 is None:
            z = kind.scratch(like, *self.z)
        hidden = None if w1 is None else kind.scratch(like, *self.hidden)
        with _on(like):
            self.squeeze(x, a, b, lengths, w1, z, hidden)
            self.scale(
                x, residual, a, b, b1, w2, b2, alpha, beta, z if hidden is None else hidden,
                None if self.z_is_final else z, y, kept, bits,
            )  # fmt: skip
        return kind.finish(y, like), saved, mask


class Backward:
    """Backward calls of one kind."""

    def __init__(
        self, inputs: Inputs, kind: Kind, saved: Tensor, mask: Tensor, needs: int, plan: Plan
    ) -> None:
        x, w1, b1, w2, b2, _, alpha, beta, a, b, *_ = inputs
        assert x is not None
        assert w2 is not None
        shape, after = kind.shape, kind.options.after
        if saved.numel() != saved_numel(x, w1, w2) or saved.dtype != kind.accumulate:
            raise RuntimeError("saved: expected what the forward op returned for these arguments")
        if after == "relu" and mask.numel() != mask_numel(x):
            raise RuntimeError("mask: expected what the forward op returned for these arguments")
        self.kind = kind
        self.masked = after == "relu"
        # In the order of Needs. The residual's gradient is laid out like x.
        like = (x, w1, b1, w2, b2, x, alpha, beta, a, b)
        self.wanted = tuple(t is not None and bool(needs & (1 << i)) for i, t in enumerate(like))

        values = _values(kind, plan)
        values["inner"] = inner = shape.hidden or shape.outputs
        values["READS_X"] = (
            a is not None
            or kind.options.before != "identity"
            or after not in ("identity", "relu")
        )  # fmt: skip
        self.dots = (shape.batch, plan.splits, shape.outputs)
        self.hidden = (shape.batch, values["parts"], inner)
        self.affine = None
        if needs & (Needs.AFFINE_SCALE | Needs.AFFINE_SHIFT):
            self.affine = (shape.batch, plan.splits, shape.channels)
        self.launches = (
            Launch(dots_kernel, plan.programs, values, warps=plan.warps),
            Launch(dx_kernel, plan.programs, values, warps=plan.warps),
        )

        w2_tiles = _weight_tiles(shape.outputs, shape.inner) if self.wanted[3] else 0
        w1_tiles = _weight_tiles(shape.hidden, shape.channels) if self.wanted[1] else 0
        vectors = ceil_div(max(shape.outputs, shape.hidden), _VECTOR)
        values |= {
            "channels": shape.channels, "outputs": shape.outputs, "w2_tiles": w2_tiles,
            "w1_tiles": w1_tiles, "BB": _BATCH_BLOCK, "BO": _TILE_ROWS, "BI": _TILE_COLUMNS,
            "BV": _VECTOR,
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
        # Parameters' gradients are written dense, see _finish.
        written = [
            None if not wanted or t is None
            else kind.dense(like) if t is like
            else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for wanted, t in zip(self.wanted, originals, strict=True)
        ]  # fmt: skip
        dx, dw1, db1, dw2, db2, dresidual, *rest = written
        dots, hidden = kind.scratch(like, *self.dots), kind.scratch(like, *self.hidden)
        ds = kind.scratch(like, shape.batch, shape.channels)
        du = kind.scratch(like, shape.batch, shape.outputs)
        dh = None if w1 is None else kind.scratch(like, shape.batch, shape.hidden)
        da = db = None
        if self.affine is not None:
            da, db = kind.scratch(like, *self.affine), kind.scratch(like, *self.affine)
        bits = mask if self.masked else None
        to_dots, to_dx = self.launches
        with _on(like):
            to_dots(dy, x, residual, bits, a, b, w2, alpha, beta, saved, dots, hidden)
            to_dx(
                dy, x, residual, bits, a, b, lengths, w2 if w1 is None else w1, alpha, beta, saved,
                dots, hidden, dx, dresidual, ds, du, dh, da, db,
            )  # fmt: skip
            if self.parameters is not None:
                self.parameters(ds, du, dh, saved, da, db, dw1, db1, dw2, db2, *rest)
        return tuple(self._finish(t, o, like) for t, o in zip(written, originals, strict=True))

    def _finish(self, written: Tensor | None, original: Tensor | None, like: Tensor) -> Tensor:
        """A gradient in the strides of what it belongs to; empty where none was asked for."""
        if written is None or original is None:
            return like.new_empty((0,))
        if original is like:
            return self.kind.finish(written, like)
        if original.is_contiguous() and original.stride() == written.stride():
            return written
        return torch.empty_like(original).copy_(written)


def _weight_tiles(rows: int, columns: int) -> int:
    return ceil_div(rows, _TILE_ROWS) * ceil_div(columns, _TILE_COLUMNS)


_forwards: dict[Any, Forward] = {}
_backwards: dict[Any, Backward] = {}
_Call = TypeVar("_Call")


def forget() -> None:
    """Drop every prepared call: what they depend on has changed."""
    _forwards.clear()
    _backwards.clear()


tuning.on_change(forget)


def _key(inputs: Inputs, *more: Any) -> tuple[Any, ...]:
    """All that a prepared call depends on: Triton compiles apart for pointers that are multiples
    of 16. What PyTorch allocates for results always is."""
    return (
        *more,
        *[
            None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0)
            for t in inputs
        ],
    )


def _keep(calls: dict[Any, _Call], key: Any, x: Tensor, prepare: Callable[[], _Call]) -> _Call:
    """Prepare a call of a new kind."""
    if _is_capturing(x):
        raise RuntimeError(
            "squeeze_excite: a call with these shapes, dtypes, layouts and options was never made "
            "before, so its kernels may have to be compiled, or timed where autotuning is on. This "
            "cannot be done while a CUDA graph is being captured: make the call once before the "
            "capture, as a warm-up"
        )
    if len(calls) >= _MOST_KINDS:
        calls.clear()
    call = calls[key] = prepare()
    return call


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
    key = _key(inputs, options, save)
    call = _forwards.get(key) or _keep(
        _forwards, key, x, lambda: _prepare_forward(x, inputs, options, save)
    )
    return call(inputs)


def _prepare_forward(x: Tensor, inputs: Inputs, options: int, save: bool) -> Forward:
    kind = examine(inputs, options)

    def prepared(choice: Choice) -> Forward:
        return Forward(inputs, kind, save, choice.plan, choice.resident)

    def ready(choice: Choice) -> Callable[[], object]:
        return partial(prepared(choice), inputs)

    return prepared(tuning.choose("forward", kind.shape, x, kind.device, ready))


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
    if after_code(options) in _KEEPS_NO_RESIDUAL:
        residual = None
    inputs = (x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths, dy)
    key = _key((*inputs, saved, mask), options, needs)
    call = _backwards.get(key) or _keep(
        _backwards, key, x, lambda: _prepare_backward(x, inputs, saved, mask, options, needs)
    )
    return call(inputs, saved, mask)


def _prepare_backward(
    x: Tensor, inputs: Inputs, saved: Tensor, mask: Tensor, options: int, needs: int
) -> Backward:
    kind = examine(inputs, options)

    def prepared(choice: Choice) -> Backward:
        return Backward(inputs, kind, saved, mask, needs, choice.plan)

    def ready(choice: Choice) -> Callable[[], object]:
        return partial(prepared(choice), inputs, saved, mask)

    return prepared(tuning.choose("backward", kind.shape, x, kind.device, ready))
