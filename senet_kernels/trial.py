"""The trial of ``python -m senet_kernels fuse``: a model of others, an input that fits it, whether
it gives the same with and without ``fuse_se_blocks``, and how long both take."""

from __future__ import annotations

import inspect
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ._command_line import near
from ._libraries import Unusable, load, one_line, why_not
from .convert import unfuse_se_blocks
from .parity import tensors

#: Positions per spatial dimension where none are given, by the number of these.
DEFAULT_SIZES = {0: 1024, 1: 1024, 2: 224, 3: 32}


class TrialError(Exception):
    """The model cannot be tried; the message says why, after its name."""


# -- a model


def make(name: str, device: str) -> nn.Module:
    """The model of a name: ``timm:NAME``, ``torchvision:NAME``, ``MODULE:CALLABLE``, in eval mode.
    Weights are random: what a library would download is switched off.

    Raises:
        TrialError: there is none.
    """
    source, _, rest = name.partition(":")
    if not rest:
        raise TrialError(
            f"is not one of timm:NAME, torchvision:NAME and MODULE:CALLABLE{_near_names(name)}"
        )
    try:
        model = _SOURCES.get(source, _of_module)(source, rest)
        if isinstance(model, nn.Module):
            return model.to(device).eval()
    except Unusable as reason:
        raise TrialError(f"cannot be made: {reason}") from None
    except TrialError:
        raise
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        raise TrialError(f"cannot be made: {type(error).__name__}: {error}") from None
    raise TrialError(f"gives no torch.nn.Module: got {type(model).__name__}")


def _of_timm(source: str, name: str) -> Any:
    # Of a model of the hub, timm fetches the configuration whether or not it is pretrained.
    if urlsplit(name.replace("hf_hub", "hf-hub")).scheme not in ("", "timm", "local-dir"):
        raise TrialError(
            "is on a hub, and nothing is downloaded here: build it in a function, and give "
            "MODULE:CALLABLE"
        )
    timm = load("timm", "create_model", "is_model")
    if urlsplit(name).scheme == "" and not timm.is_model(name):
        raise TrialError(f"is not in timm{_near_names(name, ('timm',))}")
    return timm.create_model(name, pretrained=False)


def _of_torchvision(source: str, name: str) -> Any:
    models = load("torchvision.models", "get_model_builder", "list_models")
    if name.lower() not in models.list_models():
        raise TrialError(f"is not in torchvision{_near_names(name, ('torchvision',))}")
    build = models.get_model_builder(name)
    return build(**_without_weights(build))


def _near_names(name: str, sources: tuple[str, ...] = ("timm", "torchvision")) -> str:
    """The names of libraries' models, as far as these are there, that are nearest to one."""
    known: dict[str, str] = {}  # by the name alone, the first library's
    for source, module in (("torchvision", "torchvision.models"), ("timm", "timm")):
        if source in sources and why_not(module, "list_models") is None:
            known |= {model: f"{source}:{model}" for model in load(module).list_models()}
    if name in known:
        return f", did you mean {known[name]}?"
    return near(name, known)


def _of_module(source: str, name: str) -> Any:
    build = load(source, name.partition(".")[0])
    for part in name.split("."):
        build = getattr(build, part)
    library = str(getattr(build, "__module__", "")).partition(".")[0]
    return build(**(_without_weights(build) if library in _LIBRARIES else {}))


_SOURCES = {"timm": _of_timm, "torchvision": _of_torchvision}
#: Whose functions download weights by default. What a function of the user's loads is meant.
_LIBRARIES = ("segmentation_models_pytorch", "timm", "torchvision")


def _without_weights(build: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that keep a library's function from loading weights: of the network, of its
    backbone or encoder."""
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(build).parameters.values():
        name, default = parameter.name, parameter.default
        if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        if "pretrained" in name and isinstance(default, bool):
            arguments[name] = False
        elif "weights" in name and not isinstance(default, bool):  # init_weights=True is none
            arguments[name] = None
    return arguments


# -- an input


class Shape(NamedTuple):
    """Of an input: ``extents`` come after the batch."""

    extents: tuple[int, ...]
    spatial: tuple[int, ...]
    dtype: torch.dtype


def shapes(model: nn.Module, size: int | None) -> list[Shape]:
    """Inputs that the model may take, the likeliest first: as its first layer has it, and, as the
    first that is registered need not be the first that runs, as others have it.

    Args:
        model: of any dtype; nothing of it runs.
        size: positions per spatial dimension; None for :data:`DEFAULT_SIZES`.

    Raises:
        TrialError: the first layer is lazy: its channels depend on its input.
    """
    found: list[Shape] = []

    def add(channels: int, rank: int, dtype: torch.dtype, *, last: bool = False) -> None:
        spatial = (size or DEFAULT_SIZES[rank],) * rank
        extents = (*spatial, channels) if last else (channels, *spatial)
        shape = Shape(extents, spatial, dtype)
        if shape not in found:
            found.append(shape)

    # What a Flatten makes of an input does not tell the extents before it.
    flattened = convolutional = False
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and not is_lazy(p)]
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for name, module in model.named_modules():
        flattened = flattened or isinstance(module, nn.Flatten)
        lazy = any(is_lazy(p) for p in module.parameters(recurse=False))
        if lazy and not found:
            raise TrialError(
                f"cannot be given an input: its first layer, {name or 'the model'}, is lazy "
                f"({type(module).__name__}), and how many channels its input has is not known: "
                "run the model once on an input before it is returned"
            )
        if lazy:
            continue
        if isinstance(module, _ConvNd):
            convolutional = True
            add(module.in_channels, len(module.kernel_size), module.weight.dtype)
        elif isinstance(module, nn.Linear) and not flattened:
            for rank, last in ((0, False), (1, True), (2, False), (1, False), (3, False)):
                add(module.in_features, rank, module.weight.dtype, last=last)
        if len(found) >= _MANY:
            break
    for rank in sorted({len(shape.spatial) for shape in found if convolutional}) or (2, 1, 3):
        for channels in (3, 1):
            add(channels, rank, found[0].dtype if found else dtype)
    return found


_MANY = 8


class Trial(NamedTuple):
    """An input, on the model's device, and its spatial extents."""

    x: Tensor
    spatial: tuple[int, ...]


def find_input(model: nn.Module, batch: int, size: int | None, device: str) -> Trial:
    """An input that the model, in its present mode, runs on. It has run once then.

    Raises:
        TrialError: it runs on none.
    """
    first: str | None = None
    for shape in shapes(model, size):
        extents = [batch, *shape.extents]
        kind = "" if shape.dtype == torch.float32 else f" of {shape.dtype}".replace("torch.", "")
        try:
            x = torch.randn(extents, device=device).to(shape.dtype)
        except Exception as error:  # too large, or of a dtype that has no numbers
            raise TrialError(f"does not run on {extents}{kind}: {one_line(error)}") from None
        try:
            with torch.no_grad():
                model(x)
            return Trial(x, shape.spatial)
        except (Exception, SystemExit) as error:  # of a stranger's model
            first = first or f"{extents}{kind}: {type(error).__name__}: {error}"
    raise TrialError(f"does not run on {first}")


# -- times


def infer(model: nn.Module, x: Tensor) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(x)


def train(model: nn.Module, x: Tensor) -> None:
    """A forward and a backward pass, of the sum of all outputs that have gradients."""
    outputs = [y for y in tensors(model(x)) if y.requires_grad]
    if not outputs:
        raise TrialError("no output has a gradient")
    torch.autograd.backward([y.sum() for y in outputs])
    model.zero_grad(set_to_none=True)


class OtherLoad:
    """Cores that other processes kept busy between creation and ``read``; None if unknown.

    A neighbour on the same cores makes every OpenMP barrier wait for its time slice, which turns a
    millisecond into tens: such a measurement must be told from a quiet one.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - time.process_time()

    def read(self) -> float | None:
        end = self._now()
        if self._start is None or end is None or end[0] - self._start[0] < 0.05:
            return None
        return max(0.0, (end[1] - self._start[1]) / (end[0] - self._start[0]))


class Times(NamedTuple):
    """Of a step, in seconds, and how much faster the fused model is."""

    original: float  # the median
    fused: float
    ratio: float  # original over fused: the median over the rounds
    low: float  # its 95 % interval; of fewer than 6 rounds, all that was seen
    high: float
    rounds: int
    cores_busy_elsewhere: float | None  # see OtherLoad


def times(
    model: nn.Module,
    x: Tensor,
    step: Callable[[nn.Module, Tensor], None],
    fuse: Callable[[nn.Module], object],
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> Times:
    """A step, original and fused, turn by turn, for about ``seconds``: one round at least, and none
    begun that would not end in time. ``train`` runs in train mode.

    BatchNorm's statistics are those of before afterwards.
    """
    rounds: list[tuple[float, float]] = []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    start, others, longest = time.perf_counter(), OtherLoad(), 0.0
    while not rounds or time.perf_counter() - start + longest < seconds:
        begin = time.perf_counter()
        turns = [(unfuse_se_blocks, 0), (fuse, 1)]
        took = [0.0, 0.0]
        # Whoever comes second finds other caches: each does in turn.
        for switch, i in turns if len(rounds) % 2 == 0 else turns[::-1]:
            # The mode first: what a module is replaced by may depend on it.
            model.train(step is train)
            switch(model)
            took[i] = _timed(model, x, step)
        rounds.append((took[0], took[1]))
        longest = max(longest, time.perf_counter() - begin)
        progress(f"round {len(rounds)}, {time.perf_counter() - start:.0f} of {seconds:.0f} s")
    fuse(model)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return _summary(rounds, others.read())


def _timed(model: nn.Module, x: Tensor, step: Callable[[nn.Module, Tensor], None]) -> float:
    """Seconds of a step, the second one after a switch: the first takes its snapshots."""
    step(model, x)
    _wait(x)
    begin = time.perf_counter()
    step(model, x)
    _wait(x)
    return time.perf_counter() - begin


def _summary(rounds: list[tuple[float, float]], busy: float | None) -> Times:
    ratios = sorted(original / fused for original, fused in rounds)
    left_out = _left_out(len(ratios))
    return Times(
        statistics.median(original for original, _ in rounds),
        statistics.median(fused for _, fused in rounds),
        statistics.median(ratios), ratios[left_out], ratios[-1 - left_out], len(ratios), busy,
    )  # fmt: skip


def _left_out(count: int) -> int:
    """How many of ``count`` sorted samples lie outside the 95 % interval of the median, on each
    side: by binomial ranks, which assume no distribution."""
    left_out, tail = 0, 0.5**count
    while tail <= 0.025:  # of the median below the sample of this rank
        left_out += 1
        tail += math.comb(count, left_out) * 0.5**count
    return max(left_out - 1, 0)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
