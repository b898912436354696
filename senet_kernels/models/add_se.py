"""``add_se_blocks``: squeeze-and-excitation for a ResNet that has none, outputs unchanged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from senet_kernels.forms import Foreign, Refusal, class_name, hook_reason, pointwise_name
from senet_kernels.modules import FusedSEBlock
from senet_kernels.neighbours import source_hash
from senet_kernels.report import Entry, listing

from .factory import ARCHITECTURES, with_se
from .resnet import BasicBlock, Bottleneck, ResNet


class _Kind(NamedTuple):
    """A class of residual blocks that compute what one of ours computes."""

    ours: type[nn.Module]
    activations: tuple[str, ...]  # children that ours does without, and their work is a ReLU
    passes: tuple[str, ...] = ()  # children that must be nothing or an Identity for that
    calls_se: bool = False  # its own forward calls a child `se`
    hashes: tuple[str, ...] = ()  # of forward's source in the releases it was written for


_TIMM, _TORCHVISION = "timm.models.resnet.", "torchvision.models.resnet."
_PASSES = ("aa", "drop_block", "drop_path")

KINDS: dict[str, _Kind] = {
    f"{BasicBlock.__module__}.BasicBlock": _Kind(BasicBlock, (), calls_se=True),
    f"{Bottleneck.__module__}.Bottleneck": _Kind(Bottleneck, (), calls_se=True),
    f"{_TIMM}BasicBlock": _Kind(BasicBlock, ("act1", "act2"), _PASSES, True, ("c4bd8d82ef4cb977",)),
    f"{_TIMM}Bottleneck": _Kind(
        Bottleneck, ("act1", "act2", "act3"), _PASSES, True, ("0f8cc905e8ed9daa",)
    ),
    f"{_TORCHVISION}BasicBlock": _Kind(BasicBlock, ("relu",), hashes=("faaf7fa861b63ee6",)),
    f"{_TORCHVISION}Bottleneck": _Kind(Bottleneck, ("relu",), hashes=("502ff930576dc006",)),
}


def _why_not_ours(block: Foreign, kind: _Kind) -> str | None:
    """Why a block does not compute what ours computes; None if it does."""
    for name in kind.passes:
        child = getattr(block, name, None)
        if child is not None and type(child) is not nn.Identity:
            return f"it has a {type(child).__name__} ({name})"
    for name in kind.activations:
        child = getattr(block, name)
        if pointwise_name(child) != "relu":
            return f"its child {name} is a {type(child).__name__}"
    for name in (*kind.activations, *kind.passes):
        child = getattr(block, name, None)
        reason = None if child is None else hook_reason(child)
        if reason is not None:
            return f"its child {name} {reason}"
    return None


class AdditionReport(NamedTuple):
    """What :func:`add_se_blocks` did. Print it to read it."""

    added: tuple[Entry, ...]
    refused: tuple[Entry, ...]

    def __str__(self) -> str:
        counts = f"added {len(self.added)}, refused {len(self.refused)}"
        return "\n".join([counts, *listing(zip(self._fields, self, strict=True))])


class _Plan(NamedTuple):
    block: Foreign
    se: FusedSEBlock
    becomes: type[nn.Module] | None  # None: it stays what it is, and calls its child `se`


def _plan(block: Foreign, kind: _Kind, options: dict[str, Any]) -> tuple[_Plan, str]:
    """What is to be done to a block, and a note about it.

    Raises:
        Refusal: nothing can be.
    """
    if "forward" in block.__dict__:
        raise Refusal("it has its own forward")
    if getattr(block, "se", None) is not None:
        raise Refusal("it has an excitation already")
    if kind.hashes and source_hash(type(block)) not in kind.hashes:
        raise Refusal("its forward is not the one that is known (another release?)")
    reason = _why_not_ours(block, kind)
    if reason is not None and not kind.calls_se:
        raise Refusal(reason)
    last = block.conv2 if kind.ours is BasicBlock else block.conv3
    weight = last.weight
    se = FusedSEBlock(
        last.out_channels, weighted_sum=True, after=None if reason else "relu",
        device=weight.device, dtype=weight.dtype, **options,
    )  # fmt: skip
    assert se.alpha is not None
    assert se.beta is not None
    with torch.no_grad():  # y = 1 x + 0 A
        se.alpha.fill_(1)
        se.beta.fill_(0)
    se.train(block.training)
    if reason:
        return _Plan(block, se, None), f"excitation alone, residual and activation apart: {reason}"
    return _Plan(block, se, kind.ours), "excitation, residual and relu in one operation"


def add_se_blocks(
    model: nn.Module,
    reduction: int = 16,
    *,
    excitation: str = "two",
    backend: str | None = None,
) -> AdditionReport:
    """Put squeeze-and-excitation into every residual block of a plain ResNet, in place.

    The blocks have the weighted form, ``relu(alpha x + beta A + shortcut)`` with A the recalibrated
    x, and start at alpha = 1 and beta = 0: as long as all values are finite, outputs are exactly
    what they were, and training goes on from there (beta moves first, then the excitation).

    Recognised are the blocks of this package's, timm's and torchvision's ResNets, by their exact
    classes. Blocks of the latter two become this package's, which compute the same (``type(m)``
    changes); their children, parameter objects, names, state_dict keys and hooks stay, and each
    gains a child ``se``. A block of timm's with stochastic depth, DropBlock, anti-aliasing or
    another activation stays what it is and calls its ``se`` itself.

    Args:
        model: a ResNet or a module that contains one.
        reduction: channels over hidden channels.
        excitation: ``"two"``, ``"single"`` or ``"tied"``, see :class:`~senet_kernels.FusedSEBlock`.
        backend: see :func:`senet_kernels.squeeze_excite`.

    Returns:
        The blocks that got an excitation, and those that did not, with the reason.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no block could be given an excitation, or an option is wrong.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if excitation not in ("two", "single", "tied"):
        raise ValueError(f"excitation: expected 'two', 'single' or 'tied', got {excitation!r}")
    options = {"reduction": reduction, "excitation": excitation, "backend": backend}
    plans: list[_Plan] = []
    added: list[Entry] = []
    refused: list[Entry] = []
    for name, module in model.named_modules():
        known = KINDS.get(class_name(module))
        if known is None:
            continue
        try:
            plan, note = _plan(module, known, options)
        except Refusal as refusal:
            refused.append(Entry(name, class_name(module), str(refusal)))
        else:
            plans.append(plan)
            added.append(Entry(name, class_name(module), note))
    if not plans:
        reasons = "; ".join(f"{e.name}: {e.note}" for e in refused)
        raise ValueError(
            "model: expected a ResNet of senet_kernels, timm or torchvision without excitations, "
            f"got {type(model).__name__}" + (f" ({reasons})" if reasons else "")
        )
    for block, se, becomes in plans:
        block.se = se
        if becomes is not None:
            block.__class__ = becomes
    for module in model.modules():
        if isinstance(module, ResNet):
            _update_config(module, reduction, excitation)
    return AdditionReport(tuple(added), tuple(refused))


def _update_config(model: ResNet, reduction: int, excitation: str) -> None:
    """``create_model(**model.config)`` must go on building the same network."""
    name = model.config["name"]
    blocks = [m for m in model.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    if model.architecture.se or any(block.se is None for block in blocks):
        return
    model.architecture = ARCHITECTURES[with_se(name)]
    has_hidden = excitation != "single"
    model.config = {
        **model.config,
        "name": with_se(name),
        "reduction": reduction if has_hidden else model.architecture.reduction,
        "excitation": excitation,
        "formula": "weighted",
    }
