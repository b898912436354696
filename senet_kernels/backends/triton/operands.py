"""Tensors as the kernels take them: dense images in one of two layouts, dense parameters.

What is not laid out so is copied first; a result whose layout is not one of the kernels' is
written beside and copied over. Needs no Triton.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from senet_kernels.ops import inner_is_channels
from senet_kernels.pointwise import Options, pack, unpack
from senet_kernels.reference import accumulate_dtype
from senet_kernels.validation import DTYPES

from .plan import Device, Shape
from .runtime import runtime_of

# Channels and positions are counted in 32 bits, with a tile to spare.
_LARGEST_EXTENT = 2**30


# The ops' tensors, in the order of their arguments; what a backward op has first stands last.
NAMES = (
    "x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "affine_scale", "affine_shift",
    "lengths", "dy",
)  # fmt: skip
# Those of the halves, forward and backward, at one place for each.
HALF_NAMES = (
    "x", "u", "residual", "alpha", "beta", "affine_scale", "affine_shift", "lengths", "dy", "dz",
)  # fmt: skip
_IMAGES = ("x", "residual", "dy")
_MATRICES = ("w1", "w2")

#: As many of these as an op has; None where not given.
Inputs = tuple[Tensor | None, ...]


class Kind(NamedTuple):
    """What calls with the same shapes, strides, dtypes, options and device have in common."""

    shape: Shape
    device: Device
    options: Options
    accumulate: torch.dtype
    direct: bool  # whether y and dx, laid out as eager has them, are in a layout of the kernels
    shift: bool
    strides: dict[str, int]  # from image to image, of the images given, as the kernels see them
    copied: dict[int, str]  # positions and names of the inputs that have no layout of the kernels

    def arranged(self, inputs: Inputs) -> Inputs:
        """The inputs in layouts of the kernels."""
        if not self.copied:
            return inputs
        x, arranged = inputs[0], list(inputs)
        assert x is not None
        for i, name in self.copied.items():
            t = inputs[i]
            assert t is not None
            arranged[i] = self.dense(x).copy_(t) if name in _IMAGES else t.contiguous()
        return tuple(arranged)

    def dense(self, x: Tensor) -> Tensor:
        """An empty tensor of the kernels' layout: for a result, or for a copy."""
        if self.direct:
            return torch.empty_like(x)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def finish(self, written: Tensor, x: Tensor) -> Tensor:
        """A result that was written to ``dense()``, in the strides it must have."""
        return written if self.direct else torch.empty_like(x).copy_(written)

    def scratch(self, x: Tensor, *extents: int) -> Tensor:
        return torch.empty(extents, dtype=self.accumulate, device=x.device)


def _image_is_dense(t: Tensor, last: bool) -> bool:
    """Whether every image is dense: channels adjacent (``last``), or positions adjacent."""
    sizes, strides = t.shape, t.stride()
    channels = sizes[1]
    expected = channels if last else 1
    for d in range(t.dim() - 1, 1, -1):
        if sizes[d] != 1 and strides[d] != expected:
            return False
        expected *= sizes[d]
    return channels == 1 or strides[1] == (1 if last else expected)


@functools.lru_cache(maxsize=4096)
def _layout(sizes: torch.Size, strides: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether kernels walk such an x channels-last, and can write y and dx directly."""
    x = torch.empty_strided(sizes, strides, device="meta")
    y = torch.empty_like(x)
    last = inner_is_channels(x)
    direct = _image_is_dense(y, last) and (sizes[0] <= 1 or y.stride(0) == sizes[1:].numel())
    return last, direct


def _has_memory(t: Tensor) -> bool:
    """Whether the storage of t has all of its elements: ``storage().resize_(0)``, which frees the
    memory of parameters for a while, leaves shape and strides as they were."""
    if t.numel() == 0:
        return True
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    end = (t.storage_offset() + last + 1) * t.element_size()
    return bool(end <= t.untyped_storage().nbytes())


def _check_place(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise RuntimeError(f"{name}: expected a tensor on {x.device} (that of x), got {t.device}")
    if not _has_memory(t):
        raise RuntimeError(
            f"{name}: expected a tensor with memory for all of its elements, got one whose storage "
            "was made smaller or freed"
        )


def _check_images(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape or t.dtype != x.dtype:
        raise RuntimeError(
            f"{name}: expected shape {list(x.shape)} and dtype {x.dtype} (those of x), "
            f"got {list(t.shape)} and {t.dtype}"
        )


def _check_vector(
    name: str, t: Tensor, dtype: torch.dtype, whose: str, extents: tuple[int, ...]
) -> None:
    shape = tuple(t.shape)
    if name in _MATRICES and math.prod(shape[2:]) == 1:
        shape = shape[:2]
    if shape != extents:
        more = " with optional trailing extents of 1" if name in _MATRICES else ""
        raise RuntimeError(f"{name}: expected shape {list(extents)}{more}, got {list(t.shape)}")
    if t.dtype != dtype:
        raise RuntimeError(f"{name}: expected dtype {dtype} (that of {whose}), got {t.dtype}")


def check_kept(name: str, t: Tensor, x: Tensor, numel: int, dtype: torch.dtype) -> None:
    """Check what a backward op gets back of the forward op's results."""
    _check_place(name, t, x)
    if t.numel() != numel or t.dtype != dtype or not t.is_contiguous():
        strided = "" if t.is_contiguous() else ", not contiguous"
        raise RuntimeError(
            f"{name}: expected what the forward op returned for these arguments ({numel} elements "
            f"of {dtype}, contiguous), got {t.numel()} of {t.dtype}{strided}"
        )


def _check_given(given: dict[str, Tensor], x: Tensor) -> None:
    """Which tensors there are, and where."""
    if x.dim() < 3 or x.dtype not in DTYPES:
        raise RuntimeError(
            f"x: expected [B, C, *spatial] of a floating dtype, got {list(x.shape)} {x.dtype}"
        )
    for name, t in given.items():
        _check_place(name, t, x)
        if name in _MATRICES and t.dim() < 2:
            raise RuntimeError(f"{name}: expected a matrix, got shape {list(t.shape)}")
    if ("affine_scale" in given) != ("affine_shift" in given):
        there = "affine_scale" if "affine_scale" in given else "affine_shift"
        raise RuntimeError(f"affine_scale, affine_shift: expected both or none, got {there} alone")
    if "b1" in given and "w1" not in given:
        raise RuntimeError("b1: expected none without w1, got a tensor")


def _unpacked(options: int) -> Options:
    try:
        functions = unpack(options)
    except KeyError:
        functions = None
    if functions is None or pack(functions) != options:
        raise RuntimeError(f"options: expected a packing of known functions, got {options}")
    return functions


def _device(device: torch.device) -> Device:
    return runtime_of(device).device(device)


def examine(inputs: Inputs, options: int, names: tuple[str, ...] = NAMES) -> Kind:
    """Check what a raw call may get wrong, and choose the layout. ``names`` are the inputs'."""
    given = {name: t for name, t in zip(names, inputs, strict=False) if t is not None}
    x = given["x"]
    _check_given(given, x)
    batch, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    hidden = given["w1"].shape[0] if "w1" in given else None
    outputs, columns = 0, channels
    if "w2" in given:
        outputs = columns = given["w2"].shape[0]
    elif "u" in given:
        columns = given["u"].shape[1] if given["u"].dim() > 1 else 0
    if columns not in (channels, 2 * channels):
        what = "w2: expected {} rows" if outputs else "u: expected {} columns"
        raise RuntimeError(what.format(f"{channels} or {2 * channels}") + f", got {columns}")
    if max(columns, positions, hidden or 0) > _LARGEST_EXTENT:
        raise RuntimeError(f"x, w1: expected extents up to {_LARGEST_EXTENT}, got {list(x.shape)}")

    last, direct = _layout(x.shape, x.stride())
    functions = _unpacked(options)
    shape = Shape(batch, channels, positions, hidden, outputs, last)
    extents = {
        "w2": (outputs, shape.inner), "u": (batch, columns), "w1": (hidden or 0, channels),
        "b1": (hidden or 0,), "b2": (outputs,), "alpha": (channels,), "beta": (channels,),
        "affine_scale": (channels,), "affine_shift": (channels,),
    }  # fmt: skip
    # The first of the parameters decides about the dtype of all.
    whose = next((name for name in extents if name in given), "x")
    dtype = given[whose].dtype
    if dtype != x.dtype and (dtype != torch.float32 or x.dtype == torch.float64):
        raise RuntimeError(f"{whose}: expected {x.dtype} (that of x) or float32, got {dtype}")
    strides: dict[str, int] = {}
    copied: dict[int, str] = {}
    for i, (name, t) in enumerate(zip(names, inputs, strict=False)):
        if t is None:
            continue
        if name in _IMAGES:
            _check_images(name, t, x)
            dense = _image_is_dense(t, last)
            strides[name] = t.stride(0) if dense else shape.image
        elif name == "lengths":
            if tuple(t.shape) != (batch,) or t.dtype != torch.int64:
                raise RuntimeError(
                    f"lengths: expected shape {[batch]} and dtype torch.int64, "
                    f"got {list(t.shape)} and {t.dtype}"
                )
            dense = t.is_contiguous()
        elif name == "dz":
            _check_vector(name, t, x.dtype, "x", (batch, channels))
            dense = t.is_contiguous()
        else:
            _check_vector(name, t, dtype, whose, extents[name])
            dense = t.is_contiguous()
        if not dense:
            copied[i] = name
    # Of what is copied or written dense, too. (The last image's stride says nothing where B is 1.)
    alignment = math.gcd(shape.image, *strides.values(), 16)
    shape = shape._replace(alignment=alignment or 1)
    return Kind(
        shape, _device(x.device), functions, accumulate_dtype(x.dtype), direct,
        columns > channels, strides, copied,
    )  # fmt: skip
