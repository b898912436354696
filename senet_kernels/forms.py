"""What a squeeze-and-excitation module of any make computes, and what it is made of.

A form says how the operation computes a module's forward; its parts (:mod:`.parts`) are the
children whose work that does, to be checked for changes before each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .parts import LINEAR, Foreign, Part, Path, find
from .pointwise import POINTWISE
from .validation import DTYPES


class Asks(NamedTuple):
    """Flags that a forward reads, and for which of their values its form was proven."""

    training: bool = False  # the mode: where all children are in the module's
    #: Whether gradients are enabled, x needs one, and all parameters do; None: it does not ask.
    gradients: frozenset[tuple[bool, bool, bool]] | None = None
    extents: bool = False  # those of x: where there are elements

    def and_(self, other: Asks) -> Asks:
        """Where both are proven."""
        mine, theirs = self.gradients, other.gradients
        both = theirs if mine is None else mine if theirs is None else mine & theirs
        return Asks(self.training or other.training, both, self.extents or other.extents)


class Mlp(NamedTuple):
    """A block whose excitation is one or two layers: ``squeeze_excite`` computes all of it."""

    fc1: Path | None  # None: a single layer
    fc2: Path
    activation: str
    gate: str
    parts: tuple[Part, ...]
    residual: Callable[[Foreign, Tensor], Tensor] | None = None  # what is added to the product
    ranks: tuple[int, ...] = (4,)  # numbers of dimensions of x it was recognised for
    # Its second argument, `lengths`, as squeeze_excite takes it; None: it has no such argument.
    lengths: Callable[[Tensor, Tensor], Tensor] | None = None
    # Whether it follows autocast; one that leaves it, or casts by itself, runs there as it is.
    autocast: bool = True
    kinds: tuple[type[nn.Module], ...] = ()  # the classes of its children
    asks: Asks | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES  # of x; one that casts may compute otherwise in some


class Halves(NamedTuple):
    """A block with any other excitation, which runs between ``squeeze`` and ``channel_scale``."""

    excite: Callable[[Foreign, Tensor], Tensor]  # (module, z [B, C]) -> pre-gate u [B, C]
    gate: str
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = (4,)
    kinds: tuple[type[nn.Module], ...] = ()
    asks: Asks | None = None


Form = Mlp | Halves


def class_name(module: nn.Module) -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


# ---- the pieces: pointwise functions and layers ----

_TORCH = "torch.nn.modules.activation."
_TIMM = "timm.layers.activations."
_TIMM_ME = "timm.layers.activations_me."
_TRANSFORMERS = "transformers.activations."

#: Further classes of pointwise modules by the table's names, beside torch's own, which have the
#: same names but for case. Arguments are checked in ``pointwise_name``.
_POINTWISE_CLASSES: dict[str, tuple[str, ...]] = {
    "identity": ("torch.nn.modules.linear.Identity",),
    "silu": (_TIMM + "Swish", _TIMM_ME + "SwishMe"),
    "gelu": (_TIMM + "GELU", _TRANSFORMERS + "GELUActivation"),
    "gelu_tanh": (_TIMM + "GELUTanh",),
    "hardswish": (_TIMM + "HardSwish", _TIMM_ME + "HardSwishMe"),
    "mish": (_TIMM + "Mish", _TIMM_ME + "MishMe"),
    "sigmoid": (_TIMM + "Sigmoid",),
    "hardsigmoid": (_TIMM + "HardSigmoid", _TIMM_ME + "HardSigmoidMe"),
    "tanh": (_TIMM + "Tanh",),
}
_LOWER_CASE = {name.replace("_", ""): name for name in POINTWISE}
_POINTWISE_NAMES = {
    _TORCH + c: _LOWER_CASE[c.lower()]
    for c in nn.modules.activation.__all__
    if c.lower() in _LOWER_CASE
} | {c: name for name, classes in _POINTWISE_CLASSES.items() for c in classes}


def pointwise_name(module: nn.Module) -> str | None:
    """The table's name for a pointwise module; None where the table has no such function."""
    name = _POINTWISE_NAMES.get(class_name(module))
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if isinstance(module, nn.ReLU6) and (module.min_val, module.max_val) != (0, 6):
        return None
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != 0.01:
        return None
    return name


def not_a_matrix(layer: nn.Module) -> str | None:
    """Why a layer is not just a matrix and a bias on ``[B, C]``; None if it is."""
    if type(layer) not in LINEAR:
        return f"is a {type(layer).__name__}"
    if isinstance(layer, nn.Linear):
        return None
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ones = tuple(1 for _ in layer.kernel_size)
    padded = layer.padding not in ("valid", "same", tuple(0 for _ in ones))
    if layer.kernel_size != ones or layer.stride != ones or layer.groups != 1 or padded:
        return "is not a plain 1x1 convolution"
    return None


def own_parameter(layer: Foreign, name: str) -> Any:
    """``getattr(layer, name)``, which is slow to find a parameter: it looks elsewhere first."""
    try:
        return layer.__dict__["_parameters"][name]
    except KeyError:  # made by hand, or by a hook
        return getattr(layer, name)


def weight_and_bias(layer: Foreign) -> tuple[Any, Any]:
    """Both at once."""
    try:
        owned = layer.__dict__["_parameters"]
        return owned["weight"], owned["bias"]
    except KeyError:
        return layer.weight, layer.bias


def weight_and_bias_at(module: Foreign, path: Path) -> tuple[Any, Any]:
    """Those of the layer at ``path``. Raises KeyError where there is none."""
    facts = module.__dict__
    try:
        for name in path:
            facts = facts["_modules"][name].__dict__
        owned = facts["_parameters"]
        return owned["weight"], owned["bias"]
    except (AttributeError, KeyError):  # None in a layer's place; made by hand, or by a hook
        return weight_and_bias(find(module, path))


def own_input(module: Foreign, x: Tensor) -> Tensor:
    return x


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
