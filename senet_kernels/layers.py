"""Blocks that timm and torchvision build themselves, given as ``se_layer`` or ``attn_layer``.

Their arguments are those that the two libraries pass; neither library is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from . import validation
from .forms import pointwise_name
from .modules import FusedSEBlock
from .pointwise import ACTIVATIONS, GATES
from .tensors import evaluate_annotations, is_proxy

_Layer = str | Callable[..., nn.Module] | None

# timm's names of functions that the table calls otherwise.
_TIMM_NAMES = {"swish": "silu", "hard_swish": "hardswish", "hard_sigmoid": "hardsigmoid"}


def _function(argument: str, layer: _Layer) -> str:
    """The table's name for an activation given by name, by class or by anything that makes one."""
    legal = GATES if argument in ("gate_layer", "scale_activation") else ACTIVATIONS
    if layer is None or isinstance(layer, str):
        given = (layer or "identity").lower()
        name: str | None = _TIMM_NAMES.get(given, given)
        shown = repr(layer)
    elif isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(
            f"{argument}: expected a name, a class or a function that makes a module, "
            f"got {type(layer).__name__} {layer!r}"
        )
    else:
        module = _make(argument, layer)
        name = pointwise_name(module)
        shown = repr(module)
    if name is None or name not in legal:
        raise ValueError(f"{argument}: expected one of {', '.join(legal)}, got {shown}")
    return name


def _make(argument: str, layer: Callable[..., nn.Module]) -> nn.Module:
    try:
        return layer()
    except TypeError as error:
        with suppress(TypeError):  # timm passes it, where it is taken
            return layer(inplace=True)
        raise TypeError(f"{argument}: {layer!r} cannot be made: {error}") from error


def divisible(value: float, divisor: int) -> int:
    """timm's ``make_divisible`` with ``round_limit=0``: the nearest multiple, at least one."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


class TimmSE(FusedSEBlock):
    """:class:`FusedSEBlock` with the arguments timm passes to an ``se_layer`` or ``attn_layer``.

    ``timm.create_model("resnet50", block_args=dict(attn_layer=TimmSE))`` is ``seresnet50``, with
    the same keys. The EfficientNet family takes it as ``se_layer``; timm's layers there are called
    ``conv_reduce`` and ``conv_expand``, and widths are rounded to the nearest integer: for the same
    ones give ``functools.partial(TimmSE, rd_round_fn=round)``. A model that exists already, or
    whose checkpoint must load, is better served by :func:`senet_kernels.fuse_se_blocks`.

    Args:
        channels: C, the channels of the input ``[B, C, H, W]``.
        rd_ratio: R over C.
        rd_channels: R, the hidden width; None or 0: from ``rd_ratio``.
        rd_divisor: R is the multiple of it nearest to ``C * rd_ratio``, at least one.
        bias: whether ``fc1`` and ``fc2`` have biases.
        act_layer, gate_layer: timm's or this package's name of a function, a class (torch's or
            timm's), or what makes an instance, such as ``functools.partial``; None is identity.
        force_act_layer: goes before ``act_layer``.
        rd_round_fn: R is its value for ``C * rd_ratio``; goes before ``rd_divisor``.
        backend: see :func:`senet_kernels.squeeze_excite`.
        device, dtype: of the parameters.

    Raises:
        TypeError: a layer is neither a name nor callable; or an argument that timm's own module
            takes and this one does not (``add_maxpool``, ``norm_layer``).
        ValueError: no kernel has the function, or a width is not a positive integer.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        *,
        bias: bool = True,
        act_layer: _Layer = nn.ReLU,
        gate_layer: _Layer = "sigmoid",
        force_act_layer: _Layer = None,
        rd_round_fn: Callable[[float], int] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not rd_channels:
            validation.check_positive("channels", channels)
            validation.check_positive("rd_divisor", rd_divisor)
            validation.check_positive_number("rd_ratio", rd_ratio)
            width = channels * rd_ratio
            rd_channels = rd_round_fn(width) if rd_round_fn else divisible(width, rd_divisor)
        super().__init__(
            channels,
            hidden=rd_channels,
            activation=_function("act_layer", force_act_layer or act_layer),
            gate=_function("gate_layer", gate_layer),
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )


class TorchvisionSE(FusedSEBlock):
    """:class:`FusedSEBlock` with the arguments of ``torchvision.ops.SqueezeExcitation``.

    For torchvision's ``se_layer=``, as in ``MBConv`` and MobileNetV3's ``InvertedResidual``; the
    latter wants ``functools.partial(TorchvisionSE, scale_activation=nn.Hardsigmoid)``.

    Args:
        input_channels: C, the channels of the input ``[B, C, H, W]`` or ``[C, H, W]``.
        squeeze_channels: R, the hidden width.
        activation, scale_activation: classes or what makes an instance; names as for
            :class:`TimmSE`.
        backend: see :func:`senet_kernels.squeeze_excite`.
        device, dtype: of the parameters.

    Raises:
        TypeError: an activation is neither a name nor callable.
        ValueError: no kernel has the function, or a width is not a positive integer.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: _Layer = nn.ReLU,
        scale_activation: _Layer = nn.Sigmoid,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        validation.check_positive("input_channels", input_channels)
        validation.check_positive("squeeze_channels", squeeze_channels)
        super().__init__(
            input_channels,
            hidden=squeeze_channels,
            activation=_function("activation", activation),
            gate=_function("scale_activation", scale_activation),
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Tensor, residual: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[B, C, H, W]`` as :class:`FusedSEBlock`; three dimensions are one image, not 1-D."""
        y: Tensor = super().forward(_batch(x), _batch(residual), lengths)
        return y.view_as(x) if is_proxy(x) or x.dim() == 3 else y


def _batch(t: Any) -> Any:
    """One image as a batch of one. torch.fx, which does not know the rank, records the question."""
    if is_proxy(t):
        return handle_torch_function(_batch, (t,), t)
    return t[None] if isinstance(t, Tensor) and t.dim() == 3 else t


evaluate_annotations(TorchvisionSE.forward)
