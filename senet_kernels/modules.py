"""``FusedSEBlock``: the squeeze-and-excitation block as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import api, dispatch
from .pointwise import POINTWISE, check_name


def _not_plain(layer: nn.Module) -> str | None:
    """Why a child must really be called rather than computed by the fused op; None if it need not.

    The fused op computes what an unwatched 1x1 convolution computes.
    """
    if type(layer) is not nn.Conv2d or "forward" in layer.__dict__:
        return f"is a {type(layer).__name__} or has its own forward"
    if layer.weight.shape[2:] != (1, 1) or layer.groups != 1 or layer.padding not in _NO_PADDING:
        return "is not a plain 1x1 convolution"
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return "has hooks"
    return None


_NO_PADDING = ((0, 0), "valid", "same")


class FusedSEBlock(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507) in one fused operation.

    The children ``fc1`` and ``fc2`` are 1x1 ``nn.Conv2d``, with the keys timm's ``SEModule`` and
    torchvision's ``SqueezeExcitation`` use; ``nn.Linear`` and ``nn.Conv1d``/``Conv3d`` weights
    load too. Where a child is hooked, parametrised or replaced, the block runs layer by layer so
    that the child is really called (and raises ``BackendUnavailableError`` where a backend was
    asked for by name).

    Args:
        channels: C, the channels of the input.
        reduction: hidden width is ``max(1, channels // reduction)`` unless ``hidden`` is given.
        hidden: R, the hidden width.
        activation, gate, before, after: see :func:`senet_kernels.squeeze_excite`.
        bias: whether ``fc1`` and ``fc2`` have biases.
        scale_and_shift: ``fc2`` has 2C outputs; the second half is added (Leela Chess Zero).
        weighted_sum: learn ``alpha`` and ``beta`` (``[C]``, initially 0 and 1):
            ``y = alpha p + beta g p``.
        backend: see :func:`senet_kernels.squeeze_excite`.
        device, dtype: of the parameters.

    Raises:
        ValueError: channels, reduction or hidden is not a positive integer, or a name is unknown.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        hidden: int | None = None,
        *,
        activation: str | None = "relu",
        gate: str | None = "sigmoid",
        before: str | None = None,
        after: str | None = None,
        bias: bool = True,
        scale_and_shift: bool = False,
        weighted_sum: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        extents = {"channels": channels, "reduction": reduction, "hidden": hidden}
        for name, value in extents.items():
            if value is None and name == "hidden":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.channels = channels
        self.hidden = hidden if hidden is not None else max(1, channels // reduction)
        self.activation = check_name("activation", activation)
        self.gate = check_name("gate", gate)
        self.before = check_name("before", before)
        self.after = check_name("after", after)
        self.backend = backend
        outputs = 2 * channels if scale_and_shift else channels
        self.fc1 = nn.Conv2d(channels, self.hidden, 1, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(self.hidden, outputs, 1, bias=bias, device=device, dtype=dtype)
        self.alpha: nn.Parameter | None
        self.beta: nn.Parameter | None
        if weighted_sum:
            self.alpha = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
            self.beta = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("alpha", None)
            self.register_parameter("beta", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``; see :func:`senet_kernels.squeeze_excite`."""
        fc1, fc2 = self.fc1, self.fc2
        for name, layer in (("fc1", fc1), ("fc2", fc2)):
            reason = _not_plain(layer)
            if reason is not None:
                dispatch.only_reference(f"this block: its child {name} {reason}", self.backend)
                return self._layer_by_layer(x, residual, lengths)
        return api.squeeze_excite(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            activation=self.activation, gate=self.gate, before=self.before, after=self.after,
            residual=residual, alpha=self.alpha, beta=self.beta, lengths=lengths,
            backend=self.backend,
        )  # fmt: skip

    def _layer_by_layer(self, x: Tensor, residual: Tensor | None, lengths: Tensor | None) -> Tensor:
        z = api.squeeze(x, before=self.before, lengths=lengths, backend=self.backend)
        h = POINTWISE[self.activation].fn(self.fc1(z[:, :, None, None]))
        u = self.fc2(h).flatten(1)
        return api.channel_scale(
            x, u, gate=self.gate, before=self.before, after=self.after, residual=residual,
            alpha=self.alpha, beta=self.beta, backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        # Weights of Linear (2-D), Conv1d (3-D) and Conv3d (5-D) excitations are the same matrix.
        for name in ("fc1", "fc2"):
            key = f"{prefix}{name}.weight"
            weight = state_dict.get(key)
            if weight is not None and weight.dim() in (2, 3, 5):
                matrix = weight.shape[:2]
                if weight.numel() == matrix.numel():
                    state_dict[key] = weight.reshape(*matrix, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        names = ("activation", "gate", "before", "after")
        shown = [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) != "identity"]
        if self.alpha is not None:
            shown.append("weighted_sum=True")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join([f"channels={self.channels}, hidden={self.hidden}", *shown])
