"""Schemas and fake kernels of the raw ops. Needs torch alone: no compiled library, no Triton.

Each backend implements the same ops: ``<backend>_forward`` and ``<backend>_backward``;
``<backend>_forward_``, which overwrites x; and the halves of the operation, ``<backend>_squeeze``
and ``<backend>_channel_scale``, with their ``_backward``. They are private and carry no autograd
formula: :mod:`senet_kernels.autograd` supplies it.

``saved`` is what the forward pass keeps for the backward pass besides its inputs: the pooled
input z ``[B, C]``, the hidden pre-activation ``[B, R]`` and the pre-gate u ``[B, C or 2C]``, one
after the other in one flat tensor of the accumulation dtype. ``mask``, for ``after="relu"``, has a
bit per element, set where y > 0: images, in each its rows (the S positions of a channel, or the C
channels of a position where x is channels last), a row in ``ceil(length / 8)`` bytes, element
8j + k as bit k of byte j; bytes after the last row have no meaning. Both are empty unless ``save``.
This layout is a contract: any backend's backward, and :func:`unpack_mask`, takes what another's
forward kept. ``needs`` has a bit for each gradient, in the
order they are returned; one that is not asked for comes back as an empty tensor: the number of
outputs is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._version import __version__
from .pointwise import POINTWISE
from .reference import accumulate_dtype

BACKENDS_WITH_OPS = ("native", "triton")

FORWARD_SCHEMA = (
    "(Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual,"
    " Tensor? alpha, Tensor? beta, Tensor? affine_scale, Tensor? affine_shift,"
    " Tensor? lengths, int options, bool save)"
    " -> (Tensor y, Tensor saved, Tensor mask)"
)
INPLACE_SCHEMA = (
    "(Tensor(a!) x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual,"
    " Tensor? alpha, Tensor? beta, Tensor? affine_scale, Tensor? affine_shift,"
    " Tensor? lengths, int options) -> ()"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual,"
    " Tensor? alpha, Tensor? beta, Tensor? affine_scale, Tensor? affine_shift,"
    " Tensor? lengths, Tensor saved, Tensor mask, int options, int needs)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual,"
    " Tensor dalpha, Tensor dbeta, Tensor daffine_scale, Tensor daffine_shift)"
)
SQUEEZE_SCHEMA = (
    "(Tensor x, Tensor? affine_scale, Tensor? affine_shift, Tensor? lengths, int options)"
    " -> Tensor z"
)
SQUEEZE_BACKWARD_SCHEMA = (
    "(Tensor dz, Tensor x, Tensor? affine_scale, Tensor? affine_shift, Tensor? lengths,"
    " int options, int needs)"
    " -> (Tensor dx, Tensor daffine_scale, Tensor daffine_shift)"
)
CHANNEL_SCALE_SCHEMA = (
    "(Tensor x, Tensor u, Tensor? residual, Tensor? alpha, Tensor? beta,"
    " Tensor? affine_scale, Tensor? affine_shift, int options, bool save)"
    " -> (Tensor y, Tensor mask)"
)
CHANNEL_SCALE_BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor u, Tensor? residual, Tensor? alpha, Tensor? beta,"
    " Tensor? affine_scale, Tensor? affine_shift, Tensor mask, int options, int needs)"
    " -> (Tensor dx, Tensor du, Tensor dresidual, Tensor dalpha, Tensor dbeta,"
    " Tensor daffine_scale, Tensor daffine_shift)"
)


class Needs(IntFlag):
    """Which gradients the whole operation's backward op computes, in the order it returns them."""

    X = 1
    W1 = 2
    B1 = 4
    W2 = 8
    B2 = 16
    RESIDUAL = 32
    ALPHA = 64
    BETA = 128
    AFFINE_SCALE = 256
    AFFINE_SHIFT = 512


GRADIENTS = len(Needs)
_RELU = POINTWISE["relu"].code


def after_code(options: int) -> int:
    """The ``after`` function's code out of packed options."""
    return (options >> 12) & 15


def has_mask(options: int) -> bool:
    """Whether a forward pass that saves keeps a bit mask."""
    return after_code(options) == _RELU


def saved_numel(x: Tensor, w1: Tensor | None, w2: Tensor) -> int:
    """How many elements ``saved`` has."""
    hidden = 0 if w1 is None else w1.shape[0]
    return x.shape[0] * (x.shape[1] + hidden + w2.shape[0])


def mask_numel(x: Tensor) -> int:
    """How many bytes ``mask`` has."""
    # Rows of the image padded to bytes, whichever of C and S is the inner extent.
    positions = x.shape[2:].numel()
    return x.shape[0] * ((x.shape[1] + 7) // 8) * ((positions + 7) // 8) * 8


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    # One meta tensor among real ones ends up here and would return uninitialised memory.
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"expected every tensor on {x.device} (that of x), got {t.device}")


def _forward_fake(
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
    _check_devices(x, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths)
    saved = x.new_empty((saved_numel(x, w1, w2) if save else 0,), dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(x), saved, _mask(x, options, save)


def _mask(x: Tensor, options: int, save: bool) -> Tensor:
    keep = save and has_mask(options)
    return x.new_empty((mask_numel(x) if keep else 0,), dtype=torch.uint8)


def _gradients(x: Tensor, of: tuple[Tensor | None, ...], needs: int) -> tuple[Tensor, ...]:
    """Like the tensors they are gradients of; empty where not asked for."""
    return tuple(
        torch.empty_like(t) if t is not None and needs & (1 << i) else x.new_empty((0,))
        for i, t in enumerate(of)
    )


def _inplace_fake(x: Tensor, *rest: Tensor | int | None) -> None:
    _check_devices(x, *(t for t in rest if isinstance(t, Tensor)))


def _backward_fake(
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
    _check_devices(
        x, dy, w1, b1, w2, b2, residual, alpha, beta, affine_scale, affine_shift, lengths,
        saved, mask,
    )  # fmt: skip
    # In the order of Needs. The residual is not passed where backward does not read it; its
    # gradient is laid out like x.
    of = (x, w1, b1, w2, b2, x, alpha, beta, affine_scale, affine_shift)
    return _gradients(x, of, needs)


def _squeeze_fake(
    x: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
) -> Tensor:
    _check_devices(x, affine_scale, affine_shift, lengths)
    return x.new_empty(x.shape[:2])


def _squeeze_backward_fake(
    dz: Tensor,
    x: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    lengths: Tensor | None,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_devices(x, dz, affine_scale, affine_shift, lengths)
    return _gradients(x, (x, affine_scale, affine_shift), needs)


def _channel_scale_fake(
    x: Tensor,
    u: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    options: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(x, u, residual, alpha, beta, affine_scale, affine_shift)
    return torch.empty_like(x), _mask(x, options, save)


def _channel_scale_backward_fake(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    residual: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    mask: Tensor,
    options: int,
    needs: int,
) -> tuple[Tensor, ...]:
    _check_devices(x, dy, u, residual, alpha, beta, affine_scale, affine_shift, mask)
    rows = u.new_empty(u.shape)  # contiguous, whatever u is
    return _gradients(x, (x, rows, x, alpha, beta, affine_scale, affine_shift), needs)


def inner_is_channels(x: Tensor) -> bool:
    """Whether kernels walk ``x`` channels-last: channels adjacent, positions C elements apart.

    Anything else is walked as rows of positions (and copied first where it is not contiguous).
    """
    x = torch.empty_like(
        x, device="meta"
    )  # the strides of y and dx, also where x is no dense tensor
    channels, positions = x.shape[1], x.shape[2:].numel()
    if channels == 1 or positions == 1 or x.stride(1) != 1:
        return False
    expected = channels
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The bit mask of ``after="relu"`` as a boolean tensor shaped like ``x``."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    last = inner_is_channels(x)
    rows, inner = (positions, channels) if last else (channels, positions)
    row_bytes = (inner + 7) // 8
    used = mask[: batch * rows * row_bytes].reshape(batch, rows, row_bytes, 1)
    bits = (used >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.reshape(batch, rows, row_bytes * 8)[:, :, :inner].bool()
    return (bits.transpose(1, 2) if last else bits).reshape(x.shape)


NAMESPACE = "senet_kernels"


class _Owner(NamedTuple):
    """Who defined the ops: a process has them once, however many copies of the package it has."""

    version: str
    path: str
    library: torch.library.Library


def _claim() -> tuple[torch.library.Library, bool]:
    """The library to define the ops in; and whether another copy of the package (the same one
    imported anew, or a vendored one) has defined them already, for both.

    Raises:
        ImportError: that copy is of another version, whose ops may mean something else.
    """
    # Kept where the ops are, for as long as they are: modules come and go.
    shared = vars(getattr(torch.ops, NAMESPACE))
    owner = shared.get("_owner")
    path = str(Path(__file__).resolve().parent)
    if owner is None:
        library = torch.library.Library(NAMESPACE, "DEF")
        shared["_owner"] = _Owner(__version__, path, library)
        return library, False
    if owner.version != __version__:
        raise ImportError(
            f"senet_kernels {__version__} ({path}) cannot be imported into a process that has "
            f"senet_kernels {owner.version} ({owner.path}): their ops have the same names"
        )
    return owner.library, True


library, SHARED = _claim()
# flexible_layout: kernels read every layout themselves; without the tag Inductor inserts copies.
TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "forward": (FORWARD_SCHEMA, _forward_fake),
    "forward_": (INPLACE_SCHEMA, _inplace_fake),
    "backward": (BACKWARD_SCHEMA, _backward_fake),
    "squeeze": (SQUEEZE_SCHEMA, _squeeze_fake),
    "squeeze_backward": (SQUEEZE_BACKWARD_SCHEMA, _squeeze_backward_fake),
    "channel_scale": (CHANNEL_SCALE_SCHEMA, _channel_scale_fake),
    "channel_scale_backward": (CHANNEL_SCALE_BACKWARD_SCHEMA, _channel_scale_backward_fake),
}
NAMES = tuple(f"{backend}_{name}" for backend in BACKENDS_WITH_OPS for name in _OPS)
NATIVE_OPS = tuple(f"native_{name}" for name in _OPS)


def _overwriting(op: str) -> Callable[..., None]:
    """The op, saying that it overwrites x. Autograd must know, or it would compute with the new x
    where an earlier op saved the old one."""

    def call(keys: Any, x: Tensor, *rest: Any) -> None:
        torch.autograd.graph.increment_version(x)
        overload = getattr(torch.ops.senet_kernels, op).default
        overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, x, *rest)

    return call


def _define() -> None:
    # The instruction set the CPU kernels run on; takes no tensors.
    library.define("native_isa() -> str")
    # Tensors are allocated by the dispatcher, where modes of Python see it, as long as it was
    # called more often with True than with False.
    library.define("native_dispatch_allocations(bool on) -> ()")
    # How the CUDA kernels would be launched: see launch_plan in backends/native.py.
    library.define("native_plan(int[] call, int[] device) -> str")
    for backend in BACKENDS_WITH_OPS:
        for name, (schema, fake) in _OPS.items():
            op = f"{backend}_{name}"
            library.define(f"{op}{schema}", tags=TAGS)
            torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=library)
        op = f"{backend}_forward_"
        library.impl(op, _overwriting(op), "ADInplaceOrView", with_keyset=True)


if not SHARED:
    _define()
