"""Whether a model gives the same with and without ``fuse_se_blocks``: of each replaced block, and
of the whole network.

The output of an untrained network says little: a head, a norm or a LayerScale that starts at zero
hides a wrong block, and a network without norms, or one that picks boxes, makes much of a right
block's rounding. So each block is compared by itself, with gradients, and of the whole network as
much is allowed as rounding alone makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._libraries import one_line
from .convert import unfuse_se_blocks

Fuse = Callable[[nn.Module], Any]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns, lists, dictionaries and dataclasses of them, with the
    numbers of sparse, nested and quantised ones in plain tensors."""
    if isinstance(value, Tensor):
        yield _plain(value)
        return
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, field.name) for field in fields(value)]
    for item in inner:
        yield from tensors(item)


def _plain(t: Tensor) -> Tensor:
    if t.is_nested:
        parts = [_plain(part).flatten() for part in t.unbind()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=t.dtype, device=t.device)
    t = t.dequantize() if t.is_quantized else t
    return t if t.layout is torch.strided else t.to_dense()


def _is_lazy(parameter: Any) -> bool:
    return bool(is_lazy(parameter))  # its annotation says that everything else is no tensor


def wake(model: nn.Module, *, biases: bool = False) -> None:
    """Give parameters that are constant and next to nothing another value: norms, LayerScales,
    heads and gates that start so hide from the output whatever comes before them.

    Args:
        biases: these too, which hide only that they are left out.
    """
    for name, parameter in model.named_parameters():
        if _is_lazy(parameter) or not parameter.is_floating_point() or not parameter.numel():
            continue
        values = parameter.detach().float()
        low, high = values.amin(), values.amax()
        if low != high or high.abs() > _NOTHING:
            continue
        if sum(extent > 1 for extent in parameter.shape) > 1:
            nn.init.normal_(parameter, std=(parameter.shape[0] / parameter.numel()) ** 0.5)
        elif not name.endswith("bias"):  # a factor
            nn.init.constant_(parameter, 0.5)
        elif biases:
            nn.init.uniform_(parameter, -0.1, 0.1)


_NOTHING = 1e-2  # LayerScale begins with 1e-6 to 1e-1


def difference(before: Tensor, after: Tensor) -> float:
    """The largest one over the largest finite value; where both have the same infinity, or NaN,
    there is none. NaN or infinity where only one has them, infinity where shapes or integers
    differ."""
    return deviations(before, after)[0]


def deviations(before: Tensor, after: Tensor, least: float = 1e-30) -> tuple[float, float]:
    """:func:`difference`, and the root mean square of the differences over that of the values.

    Args:
        least: what is taken for the largest value where all are smaller.
    """
    if before.shape != after.shape:
        return math.inf, math.inf
    if not before.numel():
        return 0.0, 0.0
    if not (before.is_floating_point() or before.is_complex()):  # indices, labels
        return (0.0, 0.0) if torch.equal(before, after) else (math.inf, math.inf)
    before, after = (torch.view_as_real(t) if t.is_complex() else t for t in (before, after))
    before, after = before.double(), after.double()
    same = (before == after) | (before.isnan() & after.isnan())
    apart = (after - before).abs().masked_fill(same, 0)
    scale = before.nan_to_num(0, 0, 0).abs()
    largest = apart.amax() / scale.amax().clamp_min(least)
    mean = apart.square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(least)
    return largest.item(), mean.item()


class Limit(NamedTuple):
    """How far apart two right results may be: the largest difference, and the root mean square."""

    largest: float
    mean: float

    def holds(self, apart: tuple[float, float]) -> bool:
        """Whether these differences are within it; NaN is not."""
        return apart[0] <= self.largest and apart[1] <= self.mean


# Of one block. A factor of 1.01 shows in every dtype.
_BLOCK = {
    torch.float64: Limit(1e-7, 1e-8), torch.float32: Limit(1e-4, 2e-5),
    torch.float16: Limit(1e-2, 2e-3), torch.bfloat16: Limit(3e-2, 8e-3),
}  # fmt: skip
_TF32 = Limit(1e-2, 2e-3)  # what convolutions that are not ours round to on a GPU


def _limit(values: list[Tensor]) -> Limit:
    """Of a block, by the narrowest dtype in it."""
    limits = [_BLOCK[t.dtype] for t in values if t.dtype in _BLOCK]
    if any(t.is_cuda for t in values) and torch.backends.cudnn.allow_tf32:
        limits.append(_TF32)
    return max(limits, default=_BLOCK[torch.float32])


def tolerance(y: Tensor) -> float:
    """Of a whole network's output, as a share of its largest value."""
    exact = 1e-2 if y.is_cuda and torch.backends.cudnn.allow_tf32 else 1e-3
    return {torch.bfloat16: 3e-2, torch.float16: 1e-2}.get(y.dtype, exact)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The same random numbers inside each time; buffers, such as BatchNorm's statistics, and the
    random numbers' state are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


# -- blocks


class Call(NamedTuple):
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Apart(NamedTuple):
    """How far a fused block is from the original in one of its results."""

    block: str
    what: str
    apart: tuple[float, float]
    limit: Limit

    @property
    def is_right(self) -> bool:
        """Whether the limit holds."""
        return self.limit.holds(self.apart)


def blocks(model: nn.Module, x: Tensor, names: list[str], fuse: Fuse) -> tuple[int, list[Apart]]:
    """Every replaced block, by itself, against the original: outputs and gradients, in eval mode
    and in training mode, for what the network gives it and for random numbers.

    Args:
        names: of the modules that ``fuse`` replaces.

    Returns:
        How many blocks could be compared, and the differences of each.
    """
    unfuse_se_blocks(model)
    model.eval()
    for name in names:
        wake(model.get_submodule(name), biases=True)
    calls = _calls(model, x, names)
    found: list[Apart] = []
    compared: set[str] = set()
    for mode in (False, True):
        unfuse_se_blocks(model)
        model.train(mode)
        before = {}
        for key, call in calls.items():
            original = _tried(model.get_submodule(key[0]), call)
            if isinstance(original, _Results):  # not of one value per channel in training, say
                before[key] = original
        fuse(model)
        for key, original in before.items():
            name = key[0]
            compared.add(name)
            what = f"{key[1]}, {'training' if mode else 'eval'} mode"
            fused = _tried(model.get_submodule(name), calls[key])
            if isinstance(fused, Exception):
                why = f"{what}: it fails: {one_line(fused)}"
                found.append(Apart(name, why, (math.inf, math.inf), Limit(0, 0)))
                continue
            found += [Apart(name, f"{what}: {a}", b, c) for a, b, c in _compare(original, fused)]
    model.eval()
    return len(compared), found


def _calls(model: nn.Module, x: Tensor, names: list[str]) -> dict[tuple[str, str], Call]:
    """What the blocks are called with: what the network gives them, where that is of use, and
    random numbers instead."""
    recorded: dict[str, Call] = {}

    def record(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        recorded.setdefault(name, _mapped(Call(args, kwargs), lambda t: t.detach().clone()))

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(
                partial(record, name), with_kwargs=True
            )
            hooks.callback(handle.remove)
        for some in (x[:2], x):  # a few images are enough, where the model takes fewer
            try:
                with torch.no_grad(), unchanged(model):
                    model(some)
                break
            except Exception:
                recorded.clear()
    calls = {}
    for name, call in recorded.items():
        if all(map(_is_of_use, tensors(call))):
            calls[name, "on its input"] = call
        generator = torch.Generator().manual_seed(0)
        calls[name, "on random numbers"] = _mapped(call, partial(_random, generator))
    return calls


def _is_of_use(t: Tensor) -> bool:
    """Whether a result for these values tells a right block from a wrong one."""
    if not t.is_floating_point() or not t.numel():
        return True
    t = t.float()
    largest = t.abs().amax()
    spread = t.std(correction=0)
    return bool(t.isfinite().all() and 1e-6 < largest < 1e4 and spread > 1e-3 * largest)


def _random(generator: torch.Generator, t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    values = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
    return torch.empty_like(t).copy_(values)  # of the same memory format


def _mapped(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if type(value) in (list, tuple):
            return type(value)(map(of, value))
        return {k: of(v) for k, v in value.items()} if type(value) is dict else value

    return Call(of(call.args), of(call.kwargs))


class _Results(NamedTuple):
    outputs: list[Tensor]
    changed: list[bool]  # which tensors among its arguments it has written to
    gradients: list[Tensor | None]
    limit: Limit


def _tried(module: nn.Module, call: Call) -> _Results | Exception:
    try:
        return _results(module, call)
    except Exception as error:
        return error


def _results(module: nn.Module, call: Call) -> _Results:
    leaves: list[Tensor] = []

    def copied(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.clone()
        leaves.append(t.clone().requires_grad_())
        return leaves[-1].clone()  # no leaf: a block may write to its input

    args, kwargs = copies = _mapped(call, copied)
    with torch.enable_grad(), unchanged(module):
        outputs = list(tensors(module(*args, **kwargs)))
        changed = [
            not torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(tensors(call), tensors(copies), strict=True)
        ]
        trained = [p for p in module.parameters() if p.requires_grad and not _is_lazy(p)]
        some = [y for y in outputs if y.requires_grad]
        gradients: Any = ()
        if some:
            generator = torch.Generator().manual_seed(1)
            weights = [_random(generator, y.detach()) for y in some]
            gradients = torch.autograd.grad(some, [*leaves, *trained], weights, allow_unused=True)
    limit = _limit([*leaves, *trained, *outputs])
    return _Results([y.detach() for y in outputs], changed, list(gradients), limit)


def _compare(
    original: _Results, fused: _Results
) -> Iterator[tuple[str, tuple[float, float], Limit]]:
    limit, wrong = original.limit, (math.inf, math.inf)
    if len(original.outputs) != len(fused.outputs):
        yield "number of outputs", wrong, limit
        return
    for before, after in zip(original.outputs, fused.outputs, strict=True):
        yield "output", deviations(before, after), limit
    if any(
        after and not before for before, after in zip(original.changed, fused.changed, strict=True)
    ):
        yield "it writes to its input", wrong, limit
    sizes = [g.abs().amax().item() for g in original.gradients if g is not None and g.numel()]
    # One that is zero but for rounding, as a bias's before a BatchNorm, is held to the others.
    least = max([1e-2 * size for size in sizes if math.isfinite(size)], default=0) or 1e-30
    wider = Limit(10 * limit.largest, 10 * limit.mean)
    for was, now in zip(original.gradients, fused.gradients, strict=False):
        there = was if was is not None else now
        if there is not None:
            none = torch.zeros_like(there)
            apart = deviations(none if was is None else was, none if now is None else now, least)
            yield "gradient", apart, wider


# -- the whole network


class Outputs(NamedTuple):
    """How far the fused network is from the original, and how far it may be."""

    apart: float
    usual: float  # what is allowed
    noise: float = 0.0  # what rounding alone makes of it, where it was asked
    failure: str | None = None
    nothing: str | None = None  # why these differences say nothing

    @property
    def tolerance(self) -> float:
        """What is allowed, all in all."""
        return max(self.usual, 10 * self.noise)

    @property
    def is_right(self) -> bool:
        """Whether the tolerance holds."""
        return self.failure is None and self.apart <= self.tolerance


def outputs(
    model: nn.Module, x: Tensor, names: list[str], fuse: Fuse, *, training: bool
) -> Outputs | None:
    """The network's outputs, all of them, in one of its modes; None where the original does not
    run in it. It is fused afterwards, and in eval mode.

    Args:
        names: of the modules that ``fuse`` replaces.
    """
    unfuse_se_blocks(model)
    model.train(training)
    try:
        before = _run(model, x)
        fuse(model)
        try:
            after = _run(model, x)
        except Exception as error:
            return Outputs(math.inf, 0.0, failure=f"it fails: {one_line(error)}")
        apart, usual = _apart(before, after), max(map(tolerance, before), default=1e-3)
        if apart <= usual or math.isnan(apart):
            return Outputs(apart, usual, nothing=_says_nothing(before))
        # A network without norms, or one that picks boxes, may make that of rounding alone.
        unfuse_se_blocks(model)
        noise = [_apart(before, _run_with_noise(model, x, names, n)) for n in range(3)]
        return Outputs(apart, usual, max(0.0 if math.isnan(n) else n for n in noise))
    except Exception:
        return None
    finally:
        model.eval()
        fuse(model)


def _says_nothing(outputs: list[Tensor]) -> str | None:
    if not any(y.numel() for y in outputs):
        return "there are no numbers in it to compare"
    if not any(bool(y.isfinite().any()) for y in outputs):
        return "there are no finite numbers in it to compare"
    return None


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad(), unchanged(model):
        return [y.clone() for y in tensors(model(x))]


def _apart(before: list[Tensor], after: list[Tensor]) -> float:
    if len(before) != len(after):
        return math.inf
    found = [difference(a, b) for a, b in zip(before, after, strict=True)]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _run_with_noise(model: nn.Module, x: Tensor, names: list[str], seed: int) -> list[Tensor]:
    """The original with a few roundings more at each block that is replaced."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        noise = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        return y + y * noise * (4 * torch.finfo(y.dtype).eps)

    handles = [model.get_submodule(name).register_forward_hook(disturb) for name in names]
    try:
        return _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
