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

from .plan import Device, Plan, Shape

# Channels and positions are counted in 32 bits, with a tile to spare.
_LARGEST_EXTENT = 2**30

# The interpreter has no device; a small one makes plans with large tiles and few programs.
INTERPRETER = Device("", 1)


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


def _check_images(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        raise RuntimeError(
            f"{name}: expected shape, dtype and device of x, got {list(t.shape)} {t.dtype} "
            f"on {t.device}"
        )


def _check_vector(name: str, t: Tensor, like: Tensor, whose: str, *extents: int) -> None:
    trailing = t.shape[len(extents) :]
    if tuple(t.shape[: len(extents)]) != extents or math.prod(trailing) != 1:
        raise RuntimeError(f"{name}: expected shape {list(extents)}, got {list(t.shape)}")
    if t.dtype != like.dtype or t.device != like.device:
        raise RuntimeError(
            f"{name}: expected {like.dtype} on {like.device} (those of {whose}), "
            f"got {t.dtype} on {t.device}"
        )


def is_rocm() -> bool:
    """Whether this torch is for AMD GPUs, whose device type is "cuda" too. The capability does not
    tell: gfx942 reports (9, 4), which reads like a Hopper GPU's."""
    return torch.version.hip is not None


def _device(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if is_rocm():
        # With the features that the target has switched on or off: gfx942:sramecc+:xnack-.
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Device(architecture, properties.multi_processor_count)


def examine(inputs: Inputs, options: int, names: tuple[str, ...] = NAMES) -> Kind:
    """Check what a raw call may get wrong, and choose the layout. ``names`` are the inputs'."""
    given = {name: t for name, t in zip(names, inputs, strict=False) if t is not None}
    x = given["x"]
    if x.dim() < 3 or x.dtype not in DTYPES:
        raise RuntimeError(
            f"x: expected [B, C, *spatial] of a floating dtype, got {list(x.shape)} {x.dtype}"
        )
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
    functions = unpack(options)
    shape = Shape(batch, channels, positions, hidden, outputs, last, functions.after_again)
    extents = {
        "w2": (outputs, shape.inner), "u": (batch, columns), "w1": (hidden or 0, channels),
        "b1": (hidden or 0,), "b2": (outputs,), "alpha": (channels,), "beta": (channels,),
        "affine_scale": (channels,), "affine_shift": (channels,),
    }  # fmt: skip
    # The first of the parameters decides about the dtype of all.
    whose = next((name for name in extents if name in given), "x")
    like = given[whose]
    if like.dtype != x.dtype and (like.dtype != torch.float32 or x.dtype == torch.float64):
        raise RuntimeError(f"{whose}: expected {x.dtype} (that of x) or float32, got {like.dtype}")
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
            if tuple(t.shape) != (batch,):
                raise RuntimeError(f"lengths: expected shape {[batch]}, got {list(t.shape)}")
            dense = t.is_contiguous()
        elif name == "dz":
            _check_vector(name, t, x, "x", batch, channels)
            dense = t.is_contiguous()
        else:
            _check_vector(name, t, like, whose, *extents[name])
            dense = t.is_contiguous()
        if not dense:
            copied[i] = name
    return Kind(
        shape, _device(x.device), functions, accumulate_dtype(x.dtype), direct,
        columns > channels, strides, copied,
    )  # fmt: skip


def wide(kind: Kind, plan: Plan) -> bool:
    """Whether offsets within a program's tiles pass 32 bits (with room for what is masked)."""
    shape = kind.shape
    walk = shape.image if shape.last else plan.BC * shape.positions
    apart = max(shape.image, *kind.strides.values())
    return plan.G * apart + walk + plan.BS * shape.channels >= 2**30


def units(n: int) -> tuple[int, int]:
    """``n`` as a count of units; the unit is the largest power of two up to 16 that divides n."""
    unit = math.gcd(n, 16)
    return n // unit, unit
