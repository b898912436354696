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
from senet_kernels.pointwise import Options, unpack
from senet_kernels.reference import accumulate_dtype
from senet_kernels.validation import DTYPES

from .plan import Device, Plan, Shape, make_plan, make_resident_plan

# Channels and positions are counted in 32 bits, with a tile to spare.
_LARGEST_EXTENT = 2**30

# The interpreter has no device; a small one makes plans with large tiles and few programs.
INTERPRETER = Device((0, 0), 1)


class Images(NamedTuple):
    """A full-size tensor: dense images, ``stride`` elements apart."""

    tensor: Tensor | None
    stride: int = 0


class Operands(NamedTuple):
    """What the launches of both passes share."""

    shape: Shape
    plan: Plan
    resident: Plan | None  # a forward pass in one launch, where that is better
    options: Options
    like: Tensor  # x as it came
    direct: bool  # whether y and dx, laid out as eager has them, are in a layout of the kernels
    x: Images
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    affine_scale: Tensor | None
    affine_shift: Tensor | None
    lengths: Tensor | None

    @property
    def accumulate(self) -> torch.dtype:
        return accumulate_dtype(self.like.dtype)

    def images(self, name: str, t: Tensor | None) -> Images:
        """``t``, shaped like x, in the kernels' layout."""
        if t is None:
            return Images(None)
        like = self.like
        if t.shape != like.shape or t.dtype != like.dtype or t.device != like.device:
            raise RuntimeError(
                f"{name}: expected shape, dtype and device of x, got {list(t.shape)} {t.dtype} "
                f"on {t.device}"
            )
        return _images(t, self.shape.last, self)

    def dense(self) -> Tensor:
        """An empty tensor of the kernels' layout: for a result, or for a copy."""
        if self.direct:
            return torch.empty_like(self.like)
        return torch.empty(self.like.shape, dtype=self.like.dtype, device=self.like.device)

    def finish(self, written: Tensor) -> Tensor:
        """A result that was written to ``dense()``, in the strides it must have."""
        return written if self.direct else torch.empty_like(self.like).copy_(written)

    def scratch(self, *extents: int) -> Tensor:
        return torch.empty(extents, dtype=self.accumulate, device=self.like.device)


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


def _images(t: Tensor, last: bool, operands: Operands) -> Images:
    if _image_is_dense(t, last):
        return Images(t, t.stride(0))
    copy = operands.dense().copy_(t)
    return Images(copy, copy.stride(0))


def _parameter(name: str, t: Tensor | None, w2: Tensor, *extents: int) -> Tensor | None:
    if t is None:
        return None
    trailing = t.shape[len(extents) :]
    if tuple(t.shape[: len(extents)]) != extents or math.prod(trailing) != 1:
        raise RuntimeError(f"{name}: expected shape {list(extents)}, got {list(t.shape)}")
    if t.dtype != w2.dtype or t.device != w2.device:
        raise RuntimeError(
            f"{name}: expected {w2.dtype} on {w2.device} (those of w2), got {t.dtype} on {t.device}"
        )
    return t.contiguous()


def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


def make_operands(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
) -> Operands:
    """Check what a raw call may get wrong, choose the layout, and plan."""
    if x.dim() < 3 or x.dtype not in DTYPES:
        raise RuntimeError(
            f"x: expected [B, C, *spatial] of a floating dtype, got {list(x.shape)} {x.dtype}"
        )
    batch, channels = x.shape[:2]
    positions, hidden, outputs = x.shape[2:].numel(), 0 if w1 is None else w1.shape[0], w2.shape[0]
    if outputs not in (channels, 2 * channels):
        raise RuntimeError(f"w2: expected {channels} or {2 * channels} rows, got {outputs}")
    if max(outputs, positions, hidden) > _LARGEST_EXTENT:
        raise RuntimeError(f"x, w1: expected extents up to {_LARGEST_EXTENT}, got {list(x.shape)}")
    if w2.dtype != x.dtype and (w2.dtype != torch.float32 or x.dtype == torch.float64):
        raise RuntimeError(f"w2: expected {x.dtype} (that of x) or float32, got {w2.dtype}")
    if lengths is not None and tuple(lengths.shape) != (batch,):
        raise RuntimeError(f"lengths: expected shape {[batch]}, got {list(lengths.shape)}")

    last, direct = _layout(x.shape, x.stride())
    shape = Shape(batch, channels, positions, hidden, outputs, last)
    key = shape, x.element_size(), _device(x.device)
    plans = make_plan(*key), make_resident_plan(*key)
    operands = Operands(
        shape, *plans, unpack(options), x, direct,
        Images(None),
        _parameter("w1", w1, w2, hidden, channels),
        _parameter("b1", b1, w2, hidden),
        w2,
        _parameter("b2", b2, w2, outputs),
        _parameter("alpha", alpha, w2, channels),
        _parameter("beta", beta, w2, channels),
        _parameter("affine_scale", affine_scale, w2, channels),
        _parameter("affine_shift", affine_shift, w2, channels),
        None if lengths is None else lengths.contiguous(),
    )  # fmt: skip
    matrix = _parameter("w2", w2, w2, outputs, shape.inner if w1 is None else hidden)
    assert matrix is not None
    return operands._replace(x=_images(x, last, operands), w2=matrix)


def wide(o: Operands, plan: Plan, *images: Images) -> bool:
    """Whether offsets within a program's tiles pass 32 bits (with room for what is masked)."""
    walk = o.shape.image if o.shape.last else plan.BC * o.shape.positions
    apart = max(o.shape.image, *(t.stride for t in images))
    return plan.G * apart + walk + plan.BS * o.shape.channels >= 2**30


def units(n: int) -> tuple[int, int]:
    """``n`` as a count of units; the unit is the largest power of two up to 16 that divides n."""
    unit = math.gcd(n, 16)
    return n // unit, unit
