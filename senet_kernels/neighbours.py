"""The steps around a squeeze-and-excitation module, in the blocks that are known to have them.

A *block* is the module that calls the squeeze-and-excitation module. Where its ``forward`` is known
(by its class and a hash of its source), the activation before the module, or the residual and the
activation after it, join the fused operation. A Sequential needs no hash: its forward is torch's.
To add a block, add a line to ``KNOWN_BLOCKS``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .forms import class_name, pointwise_name
from .parts import (
    Foreign,
    Part,
    Path,
    Refusal,
    changed_reason,
    find,
    hook_reason,
    kinds_of,
    part_of,
)
from .pointwise import ACTIVATIONS

# What a block calls in place of its squeeze-and-excitation module.
Excite = Callable[..., Tensor]  # (x, before=None, after=None, residual=None) -> y
# Computes a block; NotImplemented where it cannot this time, and the original forward must run.
Run = Callable[["Block", Foreign, Tensor, Excite], Any]


class Step(NamedTuple):
    """One child that a Sequential calls, or its squeeze-and-excitation module."""

    path: Path
    is_se: bool = False
    before: str | None = None
    after: str | None = None


class Block(NamedTuple):
    """A block whose forward is known, with the place of its squeeze-and-excitation module."""

    se: Path
    run: Run
    function: str  # the pointwise step that joins
    parts: tuple[Part, ...]  # children whose work is done by the operation, or passed over
    note: str
    steps: tuple[Step, ...] = ()  # of a Sequential
    names: tuple[tuple[Path, tuple[str, ...]], ...] = ()  # its children then, and theirs
    ranks: tuple[int, ...] = (4,)
    kinds: tuple[type[nn.Module], ...] = ()
    # Modules whose output its activation would overwrite: a hook that keeps it is to find it so.
    unhooked: tuple[Path, ...] = ()


def _activation(module: nn.Module, *path: str) -> str:
    child = find(module, path)
    name = pointwise_name(child)
    if name not in ACTIVATIONS:
        raise Refusal(f"no kernel has the function of its child {'.'.join(path)}, {child!r}")
    return name


# ---- timm ----


def _is_idle(drop_path: Foreign | None) -> bool:
    """Whether a stochastic depth passes on what it is given, and need not be called."""
    if drop_path is None:
        return True
    known = class_name(drop_path) == "timm.layers.drop.DropPath" and not drop_path.training
    return (known or type(drop_path) is nn.Identity) and hook_reason(drop_path) is None


def _resnet(act: str, run: Run) -> Callable[[Foreign], Block]:
    """A reader of blocks that end in a sum and the activation ``act``."""

    def read(module: Foreign) -> Block:
        function = _activation(module, act)
        parts = (part_of(module, (act,)),)
        return Block(("se",), run, function, parts, f"residual, after {function}")

    return read


def _basic_block(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    shortcut = x
    x = module.aa(module.act1(module.drop_block(module.bn1(module.conv1(x)))))
    x = module.bn2(module.conv2(x))
    return _residual(block, module, x, shortcut, excite)


def _bottleneck(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    shortcut = x
    x = module.act1(module.bn1(module.conv1(x)))
    x = module.aa(module.act2(module.drop_block(module.bn2(module.conv2(x)))))
    x = module.bn3(module.conv3(x))
    return _residual(block, module, x, shortcut, excite)


def _residual(block: Block, module: Foreign, x: Tensor, shortcut: Tensor, excite: Excite) -> Tensor:
    idle = _is_idle(module.drop_path)
    y = x if idle else module.drop_path(excite(x))
    if module.downsample is not None:
        shortcut = module.downsample(shortcut)
    if idle:
        if shortcut.dtype == x.dtype and shortcut.shape == x.shape:
            return excite(x, residual=shortcut, after=block.function)
        y = excite(x)  # autocast: the sum has the dtype of x
    y += shortcut
    act: Tensor = find(module, block.parts[0].path)(y)
    return act


def _norm_with_act(module: nn.Module, *path: str) -> tuple[str, tuple[Part, ...]]:
    """A BatchNorm that applies an activation itself: the activation, and what to watch."""
    norm = find(module, path)
    if class_name(norm) != "timm.layers.norm_act.BatchNormAct2d":
        raise Refusal(f"its child {'.'.join(path)} is a {type(norm).__name__}")
    if type(norm.drop) is not nn.Identity:
        raise Refusal(f"its child {'.'.join(path)} has a dropout")
    function = _activation(module, *path, "act")
    parts = tuple(part_of(module, p) for p in (path, (*path, "act"), (*path, "drop")))
    return function, parts


def _without_act(norm: Foreign, x: Tensor) -> Tensor:
    return nn.BatchNorm2d.forward(norm, x)


def _no_anti_aliasing(module: Foreign) -> Part:
    if type(module.aa) is not nn.Identity:
        raise Refusal("it has an anti-aliasing layer between activation and excitation")
    return part_of(module, ("aa",))


def _inverted_residual(module: Foreign) -> Block:
    function, parts = _norm_with_act(module, "bn2")
    parts = (*parts, _no_anti_aliasing(module))
    return Block(("se",), _run_inverted_residual, function, parts, f"before {function}")


def _run_inverted_residual(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    shortcut = x
    if module.conv_s2d is not None:
        x = module.bn_s2d(module.conv_s2d(x))
    x = module.bn1(module.conv_pw(x))
    x = _without_act(module.bn2, module.conv_dw(x))
    x = excite(x, before=block.function)
    x = module.bn3(module.conv_pwl(x))
    return module.drop_path(x) + shortcut if module.has_skip else x


def _depthwise_separable(module: Foreign) -> Block:
    function, parts = _norm_with_act(module, "bn1")
    parts = (*parts, _no_anti_aliasing(module))
    return Block(("se",), _run_depthwise_separable, function, parts, f"before {function}")


def _run_depthwise_separable(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    shortcut = x
    if module.conv_s2d is not None:
        x = module.bn_s2d(module.conv_s2d(x))
    x = _without_act(module.bn1, module.conv_dw(x))
    x = excite(x, before=block.function)
    x = module.bn2(module.conv_pw(x))
    return module.drop_path(x) + shortcut if module.has_skip else x


def _regnet(module: Foreign) -> Block:
    conv = module.conv2
    if class_name(conv) != "timm.layers.conv_bn_act.ConvNormAct":
        raise Refusal(f"its child conv2 is a {type(conv).__name__}")
    if getattr(conv, "aa", None) is not None:
        raise Refusal("it has an anti-aliasing layer between activation and excitation")
    function, parts = _norm_with_act(module, "conv2", "bn")
    parts = (*parts, part_of(module, ("conv2",)))
    return Block(("se",), _run_regnet, function, parts, f"before {function}")


def _run_regnet(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    shortcut = x
    x = module.conv1(x)
    x = _without_act(module.conv2.bn, module.conv2.conv(x))
    x = module.conv3(excite(x, before=block.function))
    if module.downsample is not None:
        x = module.drop_path(x) + module.downsample(shortcut)
    return module.act3(x)


# ---- Sequential ----


def _sequential(module: nn.Module, is_se: Callable[[nn.Module], bool]) -> Block:
    """The steps of a Sequential, with the activations beside its modules folded in."""
    children: list[Any] = list(module._modules.items())
    if any(child is None for _, child in children):
        raise Refusal("one of its children is None, which its forward calls")
    steps: list[Step] = []
    parts: list[Part] = []
    unhooked: list[Path] = []
    names: list[tuple[Path, tuple[str, ...]]] = [((), tuple(module._modules))]
    notes: list[str] = []
    skip = False
    for i, (name, child) in enumerate(children):
        if skip:
            skip = False
            continue
        if not is_se(child):
            steps.append(Step((name,)))
            continue
        before = after = None
        last = _last_activation(children[:i]) if i else None
        if last is not None and not steps[-1].is_se:
            inner, before, makers = last
            previous = steps.pop()
            if inner:  # all of a nested Sequential but its activation
                nested = tuple(find(module, previous.path)._modules)
                names.append((previous.path, nested))
                parts.append(part_of(module, previous.path))
                steps += [Step((*previous.path, n)) for n in nested if n != inner[0]]
            parts.append(part_of(module, (*previous.path, *inner)))
            unhooked += [(*previous.path, *maker) if inner else maker for maker in makers]
        if i + 1 < len(children):
            function = pointwise_name(children[i + 1][1])
            if function in ACTIVATIONS and function != "identity":
                after, skip = function, True
                parts.append(part_of(module, (children[i + 1][0],)))
        steps.append(Step((name,), True, before, after))
        notes += [f"before {before}"] if before else []
        notes += [f"after {after}"] if after else []
    found = [s for s in steps if s.is_se]
    if len(found) != 1 or not notes:
        raise Refusal("no activation that may join stands beside its one excitation")
    return Block(
        found[0].path, _run_sequential, "", tuple(parts), ", ".join(notes), tuple(steps),
        tuple(names), unhooked=tuple(unhooked),
    )  # fmt: skip


def _last_activation(
    children: list[tuple[str, nn.Module]],
) -> tuple[Path, str, list[Path]] | None:
    """Where the last child ends in an activation that may join what follows: path within it, the
    function, and the modules whose output it overwrites."""
    path: Path = ()
    child = children[-1][1]
    if is_sequential(child) and len(child._modules) > 1:
        children = [(n, c) for n, c in child._modules.items() if c is not None]
        if len(children) < len(child._modules):  # None, which its forward calls
            return None
        path, child = (children[-1][0],), children[-1][1]
    function = pointwise_name(child)
    if function not in ACTIVATIONS or function == "identity":
        return None
    makers: list[Path] = []
    if getattr(child, "inplace", False):
        # What it overwrites others may hold, a shortcut say, unless it was made just before.
        name, made = children[-2] if len(children) > 1 else ("", None)
        makers = [(name,)]
        while made is not None and is_sequential(made):
            name, made = next(reversed(made._modules.items()), ("", None))
            makers.append((*makers[-1], name))
        if type(made) not in _MAKERS and (made is None or class_name(made) not in _FURTHER_MAKERS):
            return None
    return path, function, makers


#: Modules whose output nobody else has.
_MAKERS = frozenset((
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
))  # fmt: skip
_FURTHER_MAKERS = frozenset(("torchvision.ops.misc.FrozenBatchNorm2d",))


def _run_sequential(block: Block, module: Foreign, x: Tensor, excite: Excite) -> Any:
    for path, names in block.names:
        children = find(module, path)._modules
        if tuple(children) != names or None in children.values():  # which its forward calls
            return NotImplemented
    for step in block.steps:
        if step.is_se:
            x = excite(x, before=step.before, after=step.after)
        else:
            x = find(module, step.path)(x)
    return x


def is_sequential(module: nn.Module) -> bool:
    """Whether a module computes what a Sequential does: each child once, in order."""
    cls = type(module)
    return isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward


# ---- known blocks ----


class _Known(NamedTuple):
    read: Callable[[Foreign], Block]
    hashes: tuple[str, ...]  # of forward's source in the releases it was written for


_RESNET = "timm.models.resnet."
_EFFICIENTNET = "timm.models._efficientnet_blocks."

KNOWN_BLOCKS: dict[str, _Known] = {
    f"{_RESNET}BasicBlock": _Known(_resnet("act2", _basic_block), ("c4bd8d82ef4cb977",)),
    f"{_RESNET}Bottleneck": _Known(_resnet("act3", _bottleneck), ("0f8cc905e8ed9daa",)),
    f"{_EFFICIENTNET}InvertedResidual": _Known(_inverted_residual, ("15fd26b018210770",)),
    f"{_EFFICIENTNET}DepthwiseSeparableConv": _Known(_depthwise_separable, ("e57885c10293a08c",)),
    "timm.models.regnet.Bottleneck": _Known(_regnet, ("2a4e872bdf183ca6",)),
}


def source_hash(cls: type[nn.Module]) -> str | None:
    """A hash of ``forward``'s source, blank space and comments aside; None where there is none."""
    return _hash_of(cls.forward) if isinstance(cls.forward, FunctionType) else None


@functools.lru_cache(1000)
def _hash_of(forward: FunctionType) -> str | None:
    try:
        lines = inspect.getsource(forward).splitlines()
    except (OSError, TypeError):
        return None
    code = [line.split("#")[0].strip() for line in lines]
    return hashlib.sha256("\n".join(filter(None, code)).encode()).hexdigest()[:16]


def recognise_block(module: nn.Module, is_se: Callable[[nn.Module], bool]) -> Block:
    """How a module that calls a squeeze-and-excitation module computes.

    Raises:
        Refusal: it is not known, or not built as expected.
    """
    if "forward" in module.__dict__:
        raise Refusal("it has its own forward")
    if is_sequential(module):
        block = _sequential(module, is_se)
    else:
        known = KNOWN_BLOCKS.get(class_name(module))
        if known is None:
            raise Refusal("a block of this class is not known")
        if source_hash(type(module)) not in known.hashes:
            raise Refusal("its forward is not the one that is known (another release?)")
        try:
            block = known.read(module)
            if not is_se(find(module, block.se)):
                raise Refusal("its excitation is not computed by squeeze_excite")
        except (AttributeError, KeyError) as error:
            raise Refusal(f"it is not built as expected: {error}") from error
    reason = changed_reason(module, block.parts)
    if reason is not None:
        raise Refusal(str(reason))
    return block._replace(kinds=kinds_of(block.parts))
