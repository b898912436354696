"""Argument checks of the public functions: each error names the argument, what was expected and
what came. Nothing here reads a tensor's values, except ``lengths`` on the CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .features import HIDDEN_WEIGHS, NEVER_HUGE, NEVER_WIDE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def check_positive(name: str, value: Any) -> None:
    """``value`` must be an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_positive_number(name: str, value: Any, *, or_zero: bool = False) -> None:
    """``value`` must be a finite number above 0, or 0 where that will do."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (value == 0 and not or_zero):
        expected = "a number of at least 0" if or_zero else "a positive number"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_parameter_dtype(dtype: Any) -> None:
    """``dtype`` must be one that the kernels take."""
    if dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype: expected one of {expected}, got {dtype!r}")


def check_tensor(name: str, t: Any) -> None:
    """``t`` must be a dense tensor of a supported floating dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {t.layout}")
    if t.dtype not in DTYPES:
        expected = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"{name}: expected a dtype among {expected}, got {t.dtype}")


def check_input(x: Any) -> None:
    """``x`` must be ``[B, C, *spatial]`` with at least one spatial dimension."""
    check_tensor("x", x)
    if x.dim() < 3:
        raise ValueError(
            "x: expected [B, C, *spatial] with at least 3 dimensions, got shape "
            f"{_shape(x)}; an unbatched input needs x.unsqueeze(0)"
        )


def check_like_x(name: str, t: Any, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """``t`` must have this shape, on the device of ``x``."""
    check_tensor(name, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {_shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of x), got {t.device}")


def check_weight(name: str, w: Any, x: Tensor, meaning: str) -> None:
    """``w`` must be a matrix, up to trailing extents of 1, on the device of ``x``."""
    check_tensor(name, w)
    if w.dim() < 2 or any(n != 1 for n in w.shape[2:]):
        raise ValueError(
            f"{name}: expected shape {meaning} with optional trailing extents of 1, got {_shape(w)}"
        )
    if w.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of x), got {w.device}")


def check_mlp(x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any) -> None:
    """The weights and biases of the excitation, against the channels of ``x``."""
    channels = x.shape[1]
    check_weight("w2", w2, x, "[C, R] or [2C, R]")
    rows = w2.shape[0]
    # Not `in`: Dynamo takes a number to be in no tuple of symbolic extents.
    if rows != channels and rows != 2 * channels:
        raise ValueError(
            f"w2: expected {channels} rows (C of x), or {2 * channels} for scale-and-shift, "
            f"got shape {_shape(w2)}"
        )
    if w1 is None:
        if b1 is not None:
            raise ValueError("b1: expected None when w1 is None (single layer), got a tensor")
        if w2.shape[1] != channels:
            raise ValueError(
                f"w2: expected {channels} columns (C of x) when w1 is None, got shape {_shape(w2)}"
            )
    else:
        check_weight("w1", w1, x, "[R, C]")
        if w1.shape[1] != channels:
            raise ValueError(f"w1: expected {channels} columns (C of x), got shape {_shape(w1)}")
        if w1.shape[0] != w2.shape[1]:
            raise ValueError(
                f"w1: expected {w2.shape[1]} rows (R, the columns of w2), got shape {_shape(w1)}"
            )
        if b1 is not None:
            check_like_x("b1", b1, x, (w1.shape[0],), "R")
    if b2 is not None:
        check_like_x("b2", b2, x, (w2.shape[0],), "rows of w2")


def is_ordinary(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> bool:
    """Whether these are plainly legal: two layers with biases, one dtype, one device, 4-D x.

    A quick yes for what ``check_input``, ``check_mlp`` and ``check_same_dtype`` accept and
    ``features`` calls neither huge nor wide: on a small call they cost as much as the kernel.
    """
    try:
        dtype, device, strided = x.dtype, x.device, torch.strided
        if x.dim() != 4:  # unpacking says so, but under Dynamo of torch 2.11 in its own way
            return False
        _, channels, height, width = x.shape
        hidden = w2.shape[1]
        return (
            dtype in DTYPES
            and channels * height * width <= NEVER_HUGE
            and channels + HIDDEN_WEIGHS * hidden <= NEVER_WIDE
            and w1.shape in ((hidden, channels), (hidden, channels, 1, 1))
            and w2.shape in ((channels, hidden), (channels, hidden, 1, 1))
            and b1.shape == (hidden,)
            and b2.shape == (channels,)
            and w1.dtype is w2.dtype is b1.dtype is b2.dtype is dtype
            and x.layout is w1.layout is w2.layout is b1.layout is b2.layout is strided
            and device == w1.device == w2.device == b1.device == b2.device
        )
    except (AttributeError, IndexError, RuntimeError, ValueError):  # nested: RuntimeError
        return False


def check_affine(x: Tensor, before_affine: Any) -> None:
    """``before_affine`` must be a pair of ``[C]`` tensors."""
    if not isinstance(before_affine, (tuple, list)) or len(before_affine) != 2:
        raise TypeError(
            f"before_affine: expected a pair (a, b) of [C] tensors, got "
            f"{type(before_affine).__name__}"
        )
    for name, v in zip(("before_affine[0]", "before_affine[1]"), before_affine, strict=True):
        check_like_x(name, v, x, (x.shape[1],), "C of x")


def check_lengths(x: Tensor, lengths: Any) -> None:
    """``lengths`` must be int64 ``[B]``; its values are checked where that needs no transfer."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a tensor, got {type(lengths).__name__}")
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths: expected dtype torch.int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (x.shape[0],):
        raise ValueError(f"lengths: expected shape {[x.shape[0]]} (B), got {_shape(lengths)}")
    if lengths.device != x.device:
        raise ValueError(f"lengths: expected device {x.device} (that of x), got {lengths.device}")
    if (
        lengths.device.type == "cpu"
        and lengths.numel()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # tracing: there may be no values
        and not isinstance(lengths, FakeTensor)
    ):
        low, high = (int(v) for v in torch.aminmax(lengths))
        positions = x.shape[2:].numel()
        if low < 0 or high > positions:
            raise ValueError(
                f"lengths: expected values within 0..{positions} (positions of x), "
                f"got {low}..{high}"
            )


def check_same_dtype(x: Tensor, others: dict[str, Tensor | None], *, mixed: bool = False) -> None:
    """Outside autocast every tensor must have the dtype of ``x``, as in eager PyTorch; or, if
    ``mixed``, all of them may be in float32 beside a narrower x."""
    if mixed and x.dtype != torch.float64:
        given = {t.dtype for t in others.values() if t is not None}
        if given == {torch.float32}:
            return
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(
                f"{name}: expected dtype {x.dtype} (that of x; outside autocast dtypes do not "
                f"mix), got {t.dtype}"
            )


def overlaps(x: Tensor) -> bool:
    """Whether elements of ``x`` may lie on top of each other in memory."""
    if x.is_contiguous():
        return False
    extents = sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1
    )
    reach = 1
    for stride, size in extents:
        if stride < reach and x.numel():
            return True
        reach = stride * (size - 1) + reach
    return False


def check_inplace(x: Tensor, others: dict[str, Tensor | None]) -> None:
    """``x`` must own each of its elements once, and share none with another argument."""
    if overlaps(x):
        raise ValueError(
            "inplace: expected an x whose elements do not overlap in memory, got shape "
            f"{_shape(x)} with strides {list(x.stride())}"
        )
    # Compilers do not know addresses yet, and watch aliases themselves; under torch.func transforms
    # the result is made apart and copied over x.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if x.is_neg():
        raise ValueError("inplace: expected an x in memory as it is, got a lazily negated view")
    storage = x.untyped_storage().data_ptr()
    for name, t in others.items():
        if t is not None and t.numel() and t.untyped_storage().data_ptr() == storage:
            raise ValueError(
                f"inplace: expected {name} not to share memory with x, which is overwritten"
            )
