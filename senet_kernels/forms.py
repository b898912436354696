"""What a squeeze-and-excitation module of any make computes, and what it is made of.

A form says how the operation computes a module's forward; parts are the children whose work that
does, to be checked for changes before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .pointwise import POINTWISE

Path = tuple[str, ...]  # names of children, from a module downwards
Foreign = Any  # a module of a class that is not known here


class Refusal(Exception):
    """A module cannot be fused; the message says why."""


class Part(NamedTuple):
    """A child whose work the fused operation does, and what it was when recognised."""

    path: Path  # (): the module itself, which may have become a subclass
    kind: type[nn.Module]
    children: int
    setting: float | str | None  # the argument of an activation or dropout


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


class Halves(NamedTuple):
    """A block with any other excitation, which runs between ``squeeze`` and ``channel_scale``."""

    excite: Callable[[Foreign, Tensor], Tensor]  # (module, z [B, C]) -> pre-gate u [B, C]
    gate: str
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = (4,)


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
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pointwise_name(module: nn.Module) -> str | None:
    """The table's name for a pointwise module; None where the table has no such function."""
    name = _POINTWISE_NAMES.get(class_name(module))
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != 0.01:
        return None
    return name


def watched(module: nn.Module) -> str | None:
    """Why a module must really be called rather than computed elsewhere; None if it need not."""
    if "forward" in module.__dict__:
        return "has its own forward"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    return None


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


def find(module: nn.Module, path: Path) -> Foreign:
    """The child at ``path``. Raises KeyError where there is none."""
    for name in path:
        child = module._modules[name]
        if child is None:
            raise KeyError(name)
        module = child
    return module


def changed(module: nn.Module, parts: tuple[Part, ...]) -> str | None:
    """What has happened to a recognised module since, so that its own forward must run."""
    if _has_any_global_hook():
        return "a global module hook is registered"
    for path, kind, children, setting in parts:
        try:
            part = find(module, path)
        except KeyError:
            return f"its child {'.'.join(path)} is gone"
        if len(part._modules) != children:
            return f"{'its child ' + '.'.join(path) if path else 'it'} has other children"
        if not path:
            continue
        if type(part) is not kind:
            return f"its child {'.'.join(path)} is a {type(part).__name__}"
        if setting is not None and _setting(part) != setting:
            return f"its child {'.'.join(path)} is now {part!r}"
        reason = watched(part)
        if reason is not None:
            return f"its child {'.'.join(path)} {reason}"
    return None


def _setting(module: nn.Module) -> float | str | None:
    if isinstance(module, nn.LeakyReLU):
        return module.negative_slope
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return module.approximate if isinstance(module, nn.GELU) else None


def part_of(module: nn.Module, path: Path) -> Part:
    """The child at ``path`` as it is now."""
    child = find(module, path)
    return Part(path, type(child), len(child._modules), _setting(child))


def descendants(module: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            yield tuple(name.split(".")), child


def parts_of(module: nn.Module, *, called: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """All descendants, but for those under the children in ``called``, which still are called."""
    return tuple(part_of(module, path) for path, _ in descendants(module) if path[0] not in called)


def own_input(module: Foreign, x: Tensor) -> Tensor:
    return x


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
