"""What a module of unknown class computes, by the graph of its forward."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from . import words_asked
from .forms import Asks, Halves, Mlp, class_name, one_line, own_input
from .parts import (
    OF_ANY_MODULE,
    Foreign,
    Part,
    Path,
    Refusal,
    descendants,
    find,
    hook_reason,
    part_of,
)
from .validation import DTYPES
from .watched import classes_of

_SOUNDS_LIKE_SE = re.compile(
    r"(?i:squeeze(?!bert|net|former)|excit)|(^|[a-z_])SE([A-Z_]|$)|^E?SE|(^|[a-z_])E?Se([A-Z_]|$)"
    r"|SE(Block|Module|Unit)",
    re.ASCII,
)
_MOST_CHILDREN = 16  # nothing that only excites has more; keeps whole networks from being captured
_DENSE = (nn.Linear, nn.modules.conv._ConvNd)


def sounds_like_se(module: nn.Module) -> bool:
    """Whether the class's name says squeeze-and-excitation; for the report alone."""
    return _SOUNDS_LIKE_SE.search(type(module).__name__) is not None


# ---- which modules are looked at ----


def is_uninitialised(parameter: Tensor) -> bool:
    return bool(is_lazy(parameter))


def is_small(module: nn.Module) -> bool:
    return len(list(itertools.islice(module.modules(), _MOST_CHILDREN + 2))) < _MOST_CHILDREN + 2


def may_excite(module: nn.Module) -> bool:
    """Whether a module of unknown class is worth a capture: it is small, has the matrices of an
    excitation, and something in it reduces a map. Says nothing of what it computes."""
    if type(module).__module__.startswith("torch.nn.") or not is_small(module):
        return False
    children = list(module.modules())
    shapes = [
        (weight.shape[0], weight.shape[1])
        for child in children
        for weight in child.parameters(recurse=False)
        if not is_uninitialised(weight) and weight.dim() > 1
    ]
    if not 1 <= len(shapes) <= 2:
        return False
    (rows, columns), (rows2, columns2) = shapes[0], shapes[-1]
    is_chain = columns == rows2 and rows == columns2
    return is_chain and _reduces(children)


_REDUCTIONS = re.compile(r"mean|sum|pool|reduce|einsum|std|norm", re.IGNORECASE)


def _reduces(children: list[nn.Module]) -> bool:
    """Whether a name in the code of modules, or of functions that they hold or name, says that it
    reduces something."""
    waiting: list[Any] = []
    for child in children:
        if class_name(child).startswith("torch.nn."):
            if "Pool" in type(child).__name__:
                return True
            continue
        for cls in classes_of(type(child)):
            waiting += vars(cls).values()
        waiting += vars(child).values()
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST_FUNCTIONS:
        value = waiting.pop()
        function = getattr(value, "__func__", getattr(value, "func", value))
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        if any(map(_REDUCTIONS.search, (*code.co_names, *_strings(code)))):
            return True
        waiting += [function.__globals__.get(name) for name in code.co_names]
    return len(seen) >= _MOST_FUNCTIONS


_MOST_FUNCTIONS = 200


def _strings(code: Any) -> Iterator[str]:
    return (c for c in code.co_consts if isinstance(c, str) and len(c) < 100)


# ---- what a module computes ----


class _Fails(Refusal):
    """A forward that raises: it may be for input of other dimensions."""


class _Setting(NamedTuple):
    """What a forward may ask for, and a capture is made under."""

    training: bool = True
    gradients: bool = True  # whether they are enabled, and then: whether x and parameters need them
    of_x: bool = True
    of_parameters: bool = True
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    larger: bool = False

    def needs(self) -> tuple[bool, bool, bool]:
        """As :class:`Asks` has it."""
        return self.gradients, self.of_x, self.of_parameters

    def __str__(self) -> str:
        said = "in training" if self.training else "in eval"
        said += "" if self.gradients else " without gradients"
        said += "" if self.of_x else " on input that needs none"
        said += "" if self.of_parameters else " with parameters that need none"
        said += f" in {str(self.dtype).removeprefix('torch.')}" if self.dtype != _SINGLE else ""
        said += " on channels-last input" if self.channels_last else ""
        return said + (" on larger input" if self.larger else "")


_UNIFORM = ((True, True, True), (False, False, False))
_SINGLE = torch.float32
_EXTENTS = {3: (3, 7), 4: (3, 5, 7), 5: (3, 4, 5, 7)}  # B, then space
_RANKS = {1: 3, 2: 4, 3: 5}


class Chain(NamedTuple):
    """An excitation of any children, called one after the other."""

    shape: tuple[int | None, ...]  # that the first takes: extents of the mean, None for 1
    children: tuple[Path, ...]

    def __call__(self, module: Foreign, z: Tensor) -> Tensor:
        v = z.reshape([1 if i is None else z.shape[i] for i in self.shape])
        for path in self.children:
            v = find(module, path)(v)
        return v.flatten(1)


class _Reading(NamedTuple):
    """What a capture shows to be computed; equal in all settings."""

    activation: str
    gate: str
    residual: bool
    names: tuple[str | None, ...] = ()  # of weights and biases
    chain: Chain | None = None  # where the excitation is not one or two layers
    dtypes: tuple[torch.dtype, ...] = DTYPES  # of x that it was read for


@contextmanager
def _surroundings() -> Iterator[None]:
    """Those that a capture is about, whatever a model is converted under: fake tensors, a tracer or
    a counter of operators are modes."""
    with (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def read_captured(module: nn.Module, words: words_asked.Words | None = None) -> Mlp | Halves:
    """The form of a module of unknown class, as its captured graph shows it.

    The graph is made of a copy without data, and nothing is run. It must be one excitation and
    nothing else, in training and in eval, with and without gradients, for all extents, and for
    every dtype and layout if the code asks for them.

    Args:
        words: see :func:`.words_asked.words_in`, which is asked where they are not given.

    Raises:
        Refusal: it is not; or the module cannot be captured; the message says why.
    """
    words = words_asked.words_in(module) if words is None else words
    with _surroundings():
        likely = [rank for k, rank in _RANKS.items() if k in _dimensions(module)]
        tried = [*likely, *(rank for rank in (4, 3, 5) if rank not in likely)]
        found: _Reading | None = None
        good: list[int] = []
        autocast = True
        asks = Asks()
        first: Refusal | None = None
        for rank in tried:
            if likely and rank not in likely and not isinstance(first, _Fails):
                break
            try:
                reading, follows, asked = _read_in_all_settings(module, rank, words.every)
            except Refusal as refusal:
                first = first or refusal
                continue
            if found is None or reading == found:
                found, autocast, asks = reading, autocast and follows, asks.and_(asked)
                good.append(rank)
        if found is None:
            assert first is not None
            raise first
    if found.chain is not None:
        excite: Any = found.chain
        parts = parts_around(module, found.chain, words)
        return Halves(excite, found.gate, parts, tuple(good), asks=_if_any(asks))
    form = _form_of(module, found, tuple(good), autocast, words)
    return form._replace(asks=_if_any(asks))


def _if_any(asks: Asks) -> Asks | None:
    return None if asks == Asks() else asks


def check_children(module: nn.Module) -> None:
    """Refuse a module with a child that must really be called, or that is not there yet."""
    for path, child in descendants(module):
        reason = hook_reason(child)
        if any(map(is_uninitialised, child.parameters(recurse=False))):
            reason = "is lazy: run the module once before"
        elif any(p.is_complex() for p in child._parameters.values() if p is not None):
            reason = "has complex parameters"
        elif class_name(child).startswith("torch.ao."):
            reason = "is made for quantisation"
        if reason is not None:
            raise Refusal(f"its child {'.'.join(path)} {reason}")


def _dimensions(module: nn.Module) -> set[int]:
    """Numbers of spatial dimensions that its layers are for."""
    names = [cls.__name__ for child in module.modules() for cls in type(child).__mro__]
    found = {n for n in (1, 2, 3) if any(re.search(f"(Conv|Pool){n}d$", name) for name in names)}
    return found if len(found) == 1 else set()


def _read_in_all_settings(
    module: nn.Module, rank: int, known: frozenset[str]
) -> tuple[_Reading, bool, Asks]:
    """What a module computes, whether it follows autocast, and where that is proven. As many
    captures are made as the code that they show asks for: of one that does not ask for dtypes, one
    is enough for all."""
    words = set(known)
    training, extents = [True], [False]
    done: dict[_Setting, _Reading | None] = {}
    unproven: set[tuple[bool, bool, bool]] = set()
    # One that casts to float32 runs its own forward in float64, and where that raises.
    casts, refused = False, set[torch.dtype]()
    follows = True
    while True:
        gradients = (True, False) if words & words_asked.OF_GRADIENTS else (True,)
        choices = (
            training,
            *((gradients,) * 3),
            DTYPES if words & words_asked.OF_DTYPES else (_SINGLE,),
            (False, True) if words & words_asked.OF_LAYOUT else (False,),
            extents,
        )
        settings = (_Setting(*choice) for choice in itertools.product(*choices))
        setting = next((s for s in settings if s not in done and s.dtype not in refused), None)
        if setting is None:
            break
        is_optional = setting.needs() not in _UNIFORM
        try:
            reading, captured = _read(module, rank, setting)
        except Refusal as refusal:
            if is_optional:
                unproven.add(setting.needs())
                done[setting] = None
                continue
            if not done and setting.training:
                _check_training(module, rank, setting, refusal)
            wide = setting.dtype is torch.float64 or isinstance(refusal, _Fails)
            if done and casts and setting.dtype is not _SINGLE and wide:
                refused.add(setting.dtype)
                continue
            if done:
                raise type(refusal)(f"{setting}: {refusal}") from refusal
            raise
        first = next(iter(done.values()), reading)
        if reading != first and is_optional:
            unproven.add(setting.needs())
        elif reading != first:
            raise Refusal(f"it computes something else {setting}")
        done[setting] = reading
        words |= captured.words
        training = [True, False] if captured.reads_training else training
        extents = extents if captured.any_extents else [False, True]
        casts = casts or captured.casts
        follows = follows and not any(map(words_asked.OF_AUTOCAST.search, words))
        words_asked.check(words)
    needs = {(a, b, c) for a in gradients for b in gradients for c in gradients} - unproven
    asks = Asks(
        len(training) > 1,
        frozenset(needs) if len(gradients) > 1 else None,
        bool(words & words_asked.OF_EXTENTS),
    )
    found = next(iter(done.values()))
    assert found is not None
    dtypes = tuple(dtype for dtype in DTYPES if dtype not in refused)
    return found._replace(dtypes=dtypes), follows and not casts, asks


def _check_training(module: nn.Module, rank: int, setting: _Setting, refusal: Refusal) -> None:
    """Say so where a module is squeeze-and-excitation in eval alone."""
    try:
        _read(module, rank, setting._replace(training=False))
    except Refusal:
        return
    for path, child in descendants(module):
        is_dropout = isinstance(child, nn.modules.dropout._DropoutNd) and "dropout" in str(refusal)
        if is_dropout and getattr(child, "p", 0) > 0:
            raise Refusal(
                f"its child {'.'.join(path)}, {child}, is random in training: for inference put "
                "nn.Identity() in its place, for training call squeeze and channel_scale around "
                "your own excitation"
            ) from refusal
    raise Refusal(
        f"it is squeeze-and-excitation in eval, and not in training: {refusal}"
    ) from refusal


class _Captured(NamedTuple):
    words: frozenset[str]
    reads_training: bool
    any_extents: bool
    casts: bool


def _read(module: nn.Module, rank: int, setting: _Setting) -> tuple[_Reading, _Captured]:
    """One capture, and what it shows."""
    from .fuse.capture import NotCaptured, capture
    from .fuse.find import Match
    from .fuse.nodes import Mismatch
    from .fuse.whole import read_whole

    copied = _copy(module, setting)
    channels = _channels(copied)
    batch, *space = _EXTENTS[rank]
    space = [n + 4 for n in space] if setting.larger else space
    shape = (batch, channels, *space)
    x = torch.zeros(shape, dtype=setting.dtype)
    if setting.channels_last and rank > 3:
        x = x.to(memory_format=torch.channels_last if rank == 4 else torch.channels_last_3d)
    if setting.of_x:
        x = x.requires_grad_() * 1  # no leaf, which cannot be written to
    with torch.set_grad_enabled(setting.gradients):
        try:
            captured = capture(copied, x)
            whole = read_whole(captured)
        except (NotCaptured, Mismatch) as reason:
            kind = _Fails if isinstance(reason, NotCaptured) and reason.fails else Refusal
            raise kind(str(reason)) from reason
    facts = _Captured(captured.words, captured.reads_training, captured.any_extents, whole.casts)
    if not isinstance(whole.match, Match):
        assert whole.steps is not None
        return _Reading("", whole.match.gate, False, chain=Chain(*whole.steps)), facts
    if whole.match.shift:
        raise Refusal(
            "it scales and shifts (2C outputs): call squeeze_excite, or compile it with the "
            "backend 'senet_kernels'"
        )
    nodes = (whole.match.w1, whole.match.b1, whole.match.w2, whole.match.b2)
    found = tuple(None if node is None else captured.tensors[node][0] for node in nodes)
    return _Reading(whole.match.activation, whole.match.gate, whole.residual, found), facts


def _copy(module: nn.Module, setting: _Setting) -> Foreign:
    """The module with new parameters and buffers on the CPU, so that nothing is written to its own
    and they may be anywhere."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(
            torch.empty(p.shape, dtype=setting.dtype, device="cpu"),
            requires_grad=setting.of_parameters,
        )
        for p in module.parameters()
    }
    for b in module.buffers():
        dtype = setting.dtype if b.is_floating_point() else b.dtype
        memo[id(b)] = torch.zeros(b.shape, dtype=dtype, device="cpu")
    try:
        copied: Foreign = copy.deepcopy(module, memo)
        for child in copied.modules():
            child.training = setting.training
    except Exception as error:  # whatever a stranger's module raises
        raise Refusal(f"a copy of it cannot be made: {one_line(error)}") from error
    return copied


def _channels(module: nn.Module) -> int:
    """Those of x: the columns of the first matrix that has as many as another has rows. A layer of
    one column works along the channels, whose number is any."""
    shapes = []
    for child in module.modules():
        groups = vars(child).get("groups", 1)
        groups = groups if isinstance(groups, int) else 1
        own = child._parameters.values()
        shapes += [(p.shape[0], p.shape[1] * groups) for p in own if p is not None and p.dim() > 1]
    for _, columns in shapes:
        if any(columns in (rows, rows // 2) for rows, _ in shapes):
            return int(columns) if columns > 1 else 16
    raise Refusal("it has not the layers of an excitation")


def parts_around(
    module: nn.Module, chain: Chain | None, words: words_asked.Words
) -> tuple[Part, ...]:
    """A module and its descendants, but for those that are called.

    Raises:
        Refusal: something of them cannot be watched for changes; or the module's own code asks one
            that is called for more.
    """
    called = () if chain is None else chain.children
    paths = [path for path, _ in descendants(module)]
    kept = [p for p in paths if not any(p[: len(c)] == c for c in called)]
    for path in called:
        settings = vars(find(module, path)).keys() - OF_ANY_MODULE
        asked = words.own & (settings | words_asked.OF_CLASSES)
        if asked:
            what, its = ", ".join(sorted(asked)), f"its child {'.'.join(path)}"
            raise Refusal(f"its forward asks for {what}, and {its} is called, and not watched")
    return tuple(part_of(module, path, words.every) for path in [(), *kept])


def _form_of(
    module: nn.Module,
    found: _Reading,
    ranks: tuple[int, ...],
    autocast: bool,
    words: words_asked.Words,
) -> Mlp:
    w1, b1, w2, b2 = found.names
    fc1 = None if w1 is None else _layer(module, w1, b1)
    return Mlp(
        fc1, _layer(module, w2, b2), found.activation, found.gate,
        parts_around(module, None, words),
        own_input if found.residual else None, ranks, None, autocast, dtypes=found.dtypes,
    )  # fmt: skip


def _layer(module: nn.Module, weight: str | None, bias: str | None) -> Path:
    """The child that has these parameters, and no other."""
    assert weight is not None
    *path, name = weight.split(".")
    if not path:
        raise Refusal(
            "its weights are parameters of its own, not of layers: compile it with the backend "
            "'senet_kernels'"
        )
    layer = find(module, tuple(path))
    given = f"{'.'.join(path)}.bias" if layer._parameters.get("bias") is not None else None
    if name != "weight" or bias != given or "bias" not in layer._parameters:
        raise Refusal(f"its weight {weight} and its bias {bias} are not those of one layer")
    return tuple(path)
