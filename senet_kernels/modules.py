"""``FusedSEBlock``: the squeeze-and-excitation block as a module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function

from . import api, dispatch, fallback, reference, resolve, validation
from .forms import own_parameter, weight_and_bias
from .parts import LINEAR, hook_reason
from .pointwise import POINTWISE, check_name
from .tensors import PLAIN_TYPES, evaluate_annotations, foreign_class, is_proxy, untraced

#: What computes the gate: two layers; one of C by C (effective SE, arXiv:1911.06667); two that
#: share a weight; or nothing, the gate being a constant.
EXCITATIONS = ("two", "single", "tied", "constant")


class _TiedConv2d(nn.Module):
    """The second layer of a tied excitation: the first's weight transposed, a bias of its own."""

    def __init__(
        self,
        hidden: int,
        channels: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            nn.init.uniform_(self.bias, -(hidden**-0.5), hidden**-0.5)  # as a convolution's
        else:
            self.register_parameter("bias", None)

    def forward(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(h, weight.transpose(0, 1), self.bias)


def _call_reason(layer: nn.Module) -> str | None:
    """Why a child must really be called rather than computed by the fused op; None if it need not.

    The fused op computes what a 1x1 convolution without hooks computes.
    """
    facts = layer.__dict__  # a third of the time that as many attributes of a module take
    if type(layer) is nn.Conv2d:
        ordinary = facts["groups"] == 1 and facts["padding"] in _NO_PADDING
        if not ordinary or facts["kernel_size"] != (1, 1):
            return "is not a plain 1x1 convolution"
    elif type(layer) is not _TiedConv2d:
        return f"is a {type(layer).__name__}"
    if (
        "forward" in facts
        or facts["_forward_hooks"]
        or facts["_forward_pre_hooks"]
        or facts["_backward_hooks"]
        or facts["_backward_pre_hooks"]
    ):
        return hook_reason(layer)
    return None


_NO_PADDING = ((0, 0), "valid", "same")


def _extent(t: Tensor | None, axis: int) -> int | None:
    """Of a parameter along an axis; None where it does not say."""
    if t is None or isinstance(t, UninitializedTensorMixin) or t.dim() <= axis:
        return None
    return t.shape[axis]


def _check_no_lengths(lengths: Any) -> None:
    if is_proxy(lengths):  # torch.fx: asks later
        handle_torch_function(_check_no_lengths, (lengths,), lengths)
    elif lengths is not None:
        raise ValueError("lengths: expected None with excitation='constant' (nothing is averaged)")


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
        excitation: ``"two"`` layers; ``"single"``: one C by C layer, ``fc2``, and no activation;
            ``"tied"``: W2 is W1 transposed, so that ``fc2`` has a bias only, and the gradients of
            both uses add up in ``fc1.weight``; ``"constant"``: scale-and-shift by a gate that
            does not depend on x, ``y = alpha p + beta`` with ``alpha`` and ``beta`` (``[C]``,
            initially 1 and 0) learned. There is no ``fc1``, ``fc2`` or ``hidden`` in it, and
            it runs as :func:`senet_kernels.channel_scale`.
        backend: see :func:`senet_kernels.squeeze_excite`.
        device, dtype: of the parameters.

    Raises:
        ValueError: channels, reduction or hidden is not a positive integer, a name is unknown, or
            options exclude each other (tied or constant with scale_and_shift, constant with
            weighted_sum, single or constant with hidden).
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
        excitation: str = "two",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        extents = {"channels": channels, "reduction": reduction, "hidden": hidden}
        for name, value in extents.items():
            if value is not None or name != "hidden":
                validation.check_positive(name, value)
        if dtype is not None:
            validation.check_parameter_dtype(dtype)
        if excitation not in EXCITATIONS:
            raise ValueError(f"excitation: expected one of {EXCITATIONS}, got {excitation!r}")
        if scale_and_shift and excitation in ("tied", "constant"):
            raise ValueError(
                f"scale_and_shift: expected False with excitation={excitation!r}, got True"
            )
        if hidden is not None and excitation in ("single", "constant"):
            raise ValueError(
                f"hidden: expected None with excitation={excitation!r}, which has no hidden layer, "
                f"got {hidden!r}"
            )
        if weighted_sum and excitation == "constant":
            raise ValueError("weighted_sum: expected False with excitation='constant', got True")
        self.channels = channels
        self.excitation = excitation
        self.activation = check_name("activation", activation)
        self.gate = check_name("gate", gate)
        self.before = check_name("before", before)
        self.after = check_name("after", after)
        dispatch.check_backend_name(backend, "backend")
        self.backend = backend
        outputs = 2 * channels if scale_and_shift else channels
        # Any: what a user puts in the place of a layer is called as it is.
        self.fc1: Any = None
        self.fc2: Any = None
        self.hidden: int | None = None
        if excitation in ("two", "tied"):
            self.hidden = hidden if hidden is not None else max(1, channels // reduction)
            self.fc1 = nn.Conv2d(channels, self.hidden, 1, bias=bias, device=device, dtype=dtype)
        if excitation == "tied":
            assert self.hidden is not None
            self.fc2 = _TiedConv2d(self.hidden, channels, bias, device, dtype)
        elif excitation != "constant":
            inputs = channels if self.hidden is None else self.hidden
            self.fc2 = nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)
        self.alpha: nn.Parameter | None
        self.beta: nn.Parameter | None
        if weighted_sum or excitation == "constant":
            self.alpha = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
            self.beta = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
            if excitation == "constant":  # the identity
                nn.init.ones_(self.alpha)
                nn.init.zeros_(self.beta)
        else:
            self.register_parameter("alpha", None)
            self.register_parameter("beta", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """``[B, C, *spatial] -> [B, C, *spatial]``; see :func:`senet_kernels.squeeze_excite`."""
        own = self.__dict__  # as in _call_reason
        fc1: Any = own["_modules"].get("fc1")
        fc2: Any = own["_modules"].get("fc2")
        if fc2 is None:
            return self._constant(x, residual, lengths)
        hooked = "has hooks" if _has_any_global_hook() else None
        for name, layer in (("fc1", fc1), ("fc2", fc2)):
            reason = None if layer is None else _call_reason(layer) or hooked
            if reason is not None:
                return self._layer_by_layer(f"its child {name} {reason}", x, residual, lengths)
        w1, b1 = (None, None) if fc1 is None else weight_and_bias(fc1)
        tied = type(fc2) is _TiedConv2d
        w2: Any = w1 if tied else own_parameter(fc2, "weight")
        if not PLAIN_TYPES.issuperset((type(x), type(w1), type(w2))):
            kind = foreign_class(w1) or foreign_class(w2)
            if kind is not None:
                return self._layer_by_layer(f"its weights are of {kind}", x, residual, lengths)
            if is_proxy(x):  # torch.fx records the layers
                return self._layer_by_layer(f"x is a {type(x).__name__}", x, residual, lengths)
        if tied:
            w2 = w2.flatten(1).t()
        b2 = own_parameter(fc2, "bias")
        alpha, beta = own_parameter(self, "alpha"), own_parameter(self, "beta")
        try:
            names = own["activation"], own["gate"], own["before"], own["after"]
        except KeyError:  # a module in the place of a name, which the check refuses
            names = self.activation, self.gate, self.before, self.after
        try:
            y: Any = resolve.run(
                x, w1, b1, w2, b2, names, None, residual, alpha, beta, lengths, False,
                own["backend"],
            )  # fmt: skip
        except ValueError:
            self._check_channels(x)  # names x rather than the layers
            raise
        if y is NotImplemented:
            y = fallback.squeeze_excite(
                x, w1, b1, w2, b2, activation=self.activation, gate=self.gate, before=self.before,
                after=self.after, residual=residual, alpha=alpha, beta=beta, lengths=lengths,
            )  # fmt: skip
        return y  # type: ignore[no-any-return]

    def _width(self) -> int | None:
        """C as the layers have it, whatever the block was made with: pruners change them. None
        where they do not say: a child that was replaced, a weight that is flattened or lazy."""
        if self.fc2 is None:
            return _extent(self._parameters.get("alpha"), 0)
        first = self.fc2 if self.fc1 is None else self.fc1
        if type(first) not in LINEAR:
            return None
        width = _extent(first._parameters.get("weight"), 1)
        return None if width is None else width * int(getattr(first, "groups", 1))

    def _check_channels(self, x: Tensor) -> None:
        if is_proxy(x):
            return
        with untraced():
            validation.check_input(x)
            width = self._width()
            if width is not None and x.shape[1] != width:
                raise ValueError(
                    f"x: expected [B, {width}, *spatial], as this block's layers have {width} "
                    f"channels, got shape {list(x.shape)}"
                )

    def _layer_by_layer(
        self, reason: str, x: Tensor, residual: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """The block with its children called, as hooks, quantised weights and torch.fx want it."""
        dispatch.refuse_kernels(f"this block: {reason}", self.backend)
        self._check_channels(x)
        z = api.squeeze(x, before=self.before, lengths=lengths, backend=self.backend)
        h = z[:, :, None, None]
        if self.fc1 is not None:
            h = POINTWISE[check_name("activation", self.activation)].fn(self.fc1(h))
        # Parametrizations and FSDP make subclasses.
        tied = (self.fc1.weight,) if isinstance(self.fc2, _TiedConv2d) else ()
        u = self.fc2(h, *tied)
        return api.channel_scale(
            x, u.flatten(1), gate=self.gate, before=self.before, after=self.after,
            residual=residual, alpha=self.alpha, beta=self.beta, backend=self.backend,
        )  # fmt: skip

    def _constant(self, x: Tensor, residual: Tensor | None, lengths: Tensor | None) -> Tensor:
        self._check_channels(x)
        _check_no_lengths(lengths)
        if self.alpha is None or self.beta is None:
            raise TypeError(
                "fc2: expected a layer, got None; a block without has excitation='constant'"
            )
        if not is_proxy(x) and not dispatch.may_run_kernels(
            x, self.backend, resolve.is_compiling()
        ):
            validation.check_affine(x, (self.alpha, self.beta))
            if residual is not None:
                validation.check_like_x("residual", residual, x, tuple(x.shape), "that of x")
            if not reference.autocast_is_on(x.device.type):
                given = {"alpha": self.alpha, "beta": self.beta, "residual": residual}
                validation.check_same_dtype(x, given)
            return fallback.channel_affine(
                x, self.alpha, self.beta, before=self.before, after=self.after, residual=residual
            )
        u = torch.cat((self.alpha, self.beta)).expand(x.shape[0], -1)
        return api.channel_scale(
            x, u, gate="identity", before=self.before, after=self.after, residual=residual,
            backend=self.backend,
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
        if getattr(self, "excitation", "two") != "two":  # subclasses may print themselves early
            shown.insert(0, f"excitation={self.excitation!r}")
        if self.hidden is not None:
            hidden = _extent(self.fc1._parameters.get("weight"), 0)
            shown.insert(0, f"hidden={hidden or self.hidden}")
        if self.alpha is not None and self.excitation != "constant":
            shown.append("weighted_sum=True")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join([f"channels={self._width() or self.channels}", *shown])


evaluate_annotations(FusedSEBlock.forward)
