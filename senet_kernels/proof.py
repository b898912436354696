"""What a module of unknown class computes, by running a copy of it on random numbers."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .forms import (
    LINEAR,
    Foreign,
    Mlp,
    Part,
    Path,
    Refusal,
    class_name,
    descendants,
    find,
    hook_reason,
    not_a_matrix,
    one_line,
    own_input,
    part_of,
    parts_of,
)
from .pointwise import ACTIVATIONS, GATES, POINTWISE

_PROBE_SPACE = {4: (5, 4), 3: (7,), 5: (3, 2, 4)}
_SOUNDS_LIKE_SE = re.compile(
    r"(?i:squeeze(?!bert|net|former)|excit)|(^|[a-z_])SE([A-Z_]|$)|^E?SE", re.ASCII
)
_MOST_CHILDREN = 16  # nothing that only excites has more; keeps whole networks from being tried


def sounds_like_se(module: nn.Module) -> bool:
    """Whether the class's name says squeeze-and-excitation; for the report alone."""
    return _SOUNDS_LIKE_SE.search(type(module).__name__) is not None


def layers_of(module: nn.Module) -> list[Path] | None:
    """Where the one or two layers of an excitation are; None if the module is not made of them."""
    if module._parameters or module._buffers or type(module) is nn.Sequential:
        return None
    layers: list[Path] = []
    for count, (path, child) in enumerate(descendants(module)):
        if count >= _MOST_CHILDREN:
            return None
        if type(child) in LINEAR:
            if not_a_matrix(child):
                return None
            layers.append(path)
    if not 1 <= len(layers) <= 2:
        return None
    shapes = [find(module, path).weight.shape for path in layers]
    if shapes[0][1] != shapes[-1][0] or (len(layers) == 2 and shapes[0][0] != shapes[1][1]):
        return None
    return layers


@contextmanager
def _surroundings() -> Iterator[None]:
    """Those that a proof is about, whatever a model is converted under: fake tensors, a tracer or a
    counter of operators are modes."""
    with (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=()),
    ):
        yield


@_surroundings()
def prove(module: nn.Module, paths: list[Path]) -> Mlp:
    """The form of a module of unknown class, established by running a copy of it in float64.

    ``paths`` are its layers. The form found must hold in training and in eval mode, with and
    without gradients, for unusual numbers, extents, layouts and dtypes, and leave no trace in the
    module, nor in the random numbers that others draw on the CPU. What a module reads from outside
    itself cannot be seen.

    Raises:
        Refusal: no form, or more than one, gives what the module gives.
    """
    for path, child in descendants(module):
        reason = hook_reason(child)
        if path not in paths and (child._parameters or child._buffers):
            reason = "has parameters or buffers of its own"
        if any(p.is_complex() for p in child._parameters.values() if p is not None):
            reason = "has complex parameters"
        if class_name(child).startswith("torch.ao."):
            reason = "is made for quantisation"
        if reason is not None:
            raise Refusal(f"its child {'.'.join(path)} {reason}")
    channels = find(module, paths[0]).weight.shape[1]
    # First without data, which turns away the MLPs of transformers at no cost, then with little,
    # which turns away those of convolutions: both can be large.
    generator = torch.Generator().manual_seed(0)
    taken = [
        rank
        for rank, space in _PROBE_SPACE.items()
        if _run(module, torch.empty(3, channels, *space, device="meta")) is not None
        and _seems_to_scale(
            module, torch.randn(2, channels, *space, generator=generator, dtype=torch.float32)
        )
    ]
    if not taken:
        raise Refusal("it multiplies no channels of [B, C, *spatial] by numbers")
    double = _copy(module, torch.float64, "cpu")
    layers = [find(double, path) for path in paths]
    # Hidden values up to about 15 and logits up to about 10, of either sign, and enough of them:
    # functions of the table that differ do so somewhere there (relu and relu6 from 6 on).
    for layer, size in zip(layers, (5.0, 1.5) if len(layers) == 2 else (4.0,), strict=True):
        fan_in = layer.weight.shape[1]
        _fill(layer.weight, size / math.sqrt(max(fan_in, 1)), generator)
        if layer.bias is not None:
            _fill(layer.bias, 1.0, generator)
    double.requires_grad_()

    # Appended to a Sequential, a child becomes part of what its parent computes.
    parts = (part_of(module, ()), *parts_of(module))
    found: Mlp | None = None
    ranks: list[int] = []
    why = ""
    batch = max(3, 96 // max(1, layers[0].weight.shape[0]))
    for rank in taken:
        space = _PROBE_SPACE[rank]
        ones = [1] * len(space)
        x = torch.randn(batch, channels, *space, generator=generator, dtype=torch.float64)
        x += torch.randn(batch, channels, *ones, generator=generator, dtype=torch.float64)
        before = _Attributes(double)
        try:
            # Not called, as its own hooks would fire.
            theirs = [_output_and_gradients(double.train(m).forward, x, double) for m in _MODES]
        except Exception as error:
            why = f"it fails on {rank}-dimensional input: {one_line(error)}"
            continue
        if _Attributes(double) != before:
            raise Refusal("its forward changes its attributes")
        tried = [found] if found else [*_candidates(paths, parts)]
        forms = _forms_of(tried, double, x, theirs)
        if len(forms) != 1:
            what = "more than one form" if forms else "no form"
            why = f"{what} of squeeze-and-excitation gives its output and gradients"
            if not forms and _forms_of(tried, double, x, theirs[1:]):
                why = _different_in_training(tried, double, x)
            continue
        _check_unusual_calls(forms[0], double, x)
        if found is None:
            _check_dtypes(forms[0], double, x)
            found = forms[0]
        ranks.append(rank)
    if found is None:
        raise Refusal(why)
    return found._replace(ranks=tuple(ranks), autocast=_follows_autocast(double, x))


def _follows_autocast(double: nn.Module, x: Tensor) -> bool:
    """Whether a module leaves its dtypes to autocast, as the operation does: one that casts by
    itself takes two dtypes without autocast, one that leaves autocast gives another dtype in it."""
    single, low = copy.deepcopy(double).float(), x.bfloat16()
    with torch.no_grad():
        try:
            single.forward(low)
        except Exception:  # dtypes do not mix
            pass
        else:
            return False
        for autocast, dtype in itertools.product(_LOW, (*_LOW, torch.float32)):
            try:
                with torch.autocast("cpu", autocast, cache_enabled=False):
                    y = single.forward(x.to(dtype))
            except Exception:  # then it is for the original to fail
                return False
            if y.dtype != (dtype if dtype == autocast else torch.float32):
                return False
    return True


_LOW = (torch.bfloat16, torch.float16)


def _forms_of(
    tried: list[Mlp], module: nn.Module, x: Tensor, theirs: list[list[Tensor]]
) -> list[Mlp]:
    """Which forms give all these outputs and gradients."""
    return [
        form
        for form in (tried if _scales(x, theirs[0][0]) else ())
        if _same([_Model(form, module)(x)], [theirs[0][0]])
        and all(_same(_output_and_gradients(_Model(form, module), x, module), t) for t in theirs)
    ]


def _different_in_training(tried: list[Mlp], module: nn.Module, x: Tensor) -> str:
    """Why a module that is squeeze-and-excitation in eval alone is refused."""
    dry = copy.deepcopy(module).train()
    found = []
    for path, child in descendants(dry):
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
            found.append(f"its child {'.'.join(path)}, {child}, is random in training")
            child.p = 0.0
    if found and _forms_of(tried, dry, x, [_output_and_gradients(dry.forward, x, dry)]):
        return (
            f"{found[0]}: for inference put nn.Identity() in its place, for training call squeeze "
            "and channel_scale around your own excitation"
        )
    return "it is squeeze-and-excitation in eval, and computes something else in training"


def _copy(module: nn.Module, dtype: torch.dtype, device: str) -> Foreign:
    """The module with new, uninitialised parameters."""
    memo = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device))
        for p in module.parameters()
    }
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever a stranger's module raises
        raise Refusal(f"a copy of it cannot be made: {one_line(error)}") from error


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """What the module makes of x with random weights; None unless that has the shape of x."""
    double = _copy(module, x.dtype, str(x.device))
    for p in double.parameters():
        nn.init.uniform_(p, -0.1, 0.1)
    try:
        with torch.no_grad():
            y = double.eval().forward(x)
    except Exception:
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


def _seems_to_scale(module: nn.Module, x: Tensor) -> bool:
    """Whether the output is about x times one number per image and channel."""
    y = _run(module, x)
    return y is not None and _scales(x.double(), y.double(), 1e-3)


_MODES = (True, False)  # training, eval


class _Attributes:
    """What a module holds, but for numbers in tensors; unequal once any of it was assigned to."""

    def __init__(self, module: nn.Module) -> None:
        self.held = [
            (name, value, len(value) if isinstance(value, (list, dict, set)) else 0)
            for child in module.modules()
            for name, value in vars(child).items()
            if name != "training"
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Attributes) or len(self.held) != len(other.held):
            return False
        pairs = zip(self.held, other.held, strict=True)
        return all(n == m and v is w and k == j for (n, v, k), (m, w, j) in pairs)

    __hash__ = None  # type: ignore[assignment]


def _scales(x: Tensor, y: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether y is x times a number per image and channel."""
    x, y = x.flatten(2), y.flatten(2)
    scaled = x * ((x * y).sum(2) / (x * x).sum(2)).unsqueeze(2)
    size = y.abs().max().item() if y.numel() else 0.0
    return torch.allclose(scaled, y, rtol=tolerance, atol=tolerance * size)


def _check_unusual_calls(form: Mlp, double: nn.Module, x: Tensor) -> None:
    """Refuse a module that is what ``form`` says on some inputs only."""
    nan = x.clone()
    nan.view(-1)[0] = math.nan
    calls = {
        "without gradients": x,
        "on zeros and positive numbers": x.relu(),
        "on large numbers": 1000 * x,
        "on small numbers": x / 1000,
        "on NaN": nan,
        "on one image": x[:1],
        "on one position": x.flatten(2)[:, :, :1].reshape(*x.shape[:2], *[1] * (x.dim() - 2)),
        "on larger maps": x[:1].repeat(1, 1, *[8 if n > 3 else 3 for n in x.shape[2:]]),
    }
    if x.dim() > 3 and x.shape[1] > 1:
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        calls["on channels-last input"] = x.contiguous(memory_format=layout)
    for how, given in calls.items():
        with torch.no_grad():
            right = _Model(form, double)(given)
        for mode in _MODES:
            copied = given.clone()
            try:
                with torch.no_grad():
                    y = double.train(mode).forward(copied)
            except Exception as error:
                raise Refusal(f"it fails {how}: {one_line(error)}") from error
            if not _same([copied], [given]):
                raise Refusal(f"it overwrites its input {how}")
            if not _same([y], [right]):
                raise Refusal(f"it computes something else {how}")
            if y.stride() != given.stride() and given.shape == x.shape:
                raise Refusal(f"its output has other strides than its input {how}")


def _check_dtypes(form: Mlp, double: nn.Module, x: Tensor) -> None:
    """Refuse a module that computes something else in another dtype, or returns one."""
    with torch.no_grad():
        right = _Model(form, double)(x)
        # Low precision inside a float32 module, under an autocast of its own, is not its error.
        for dtype, tolerance in ((torch.float32, 1e-3), *((low, 0.1) for low in _LOW)):
            low = copy.deepcopy(double).to(dtype)
            try:
                y = low.forward(x.to(dtype))
            except Exception:  # not every dtype has every operation on every device
                continue
            if y.dtype != dtype:
                raise Refusal(f"it makes {y.dtype} of {dtype}")
            if (y - right).abs().max() > tolerance * right.abs().max():
                raise Refusal(f"it computes something else in {dtype}")


def _fill(t: Tensor, size: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        t.copy_(size * torch.randn(t.shape, generator=generator, dtype=torch.float64))


def _candidates(paths: list[Path], parts: tuple[Part, ...]) -> Iterator[Mlp]:
    fc1 = paths[0] if len(paths) == 2 else None
    for activation in ACTIVATIONS if fc1 else ("identity",):
        for gate in GATES:
            for residual in (None, own_input):
                yield Mlp(fc1, paths[-1], activation, gate, parts, residual)


class _Model:
    """What a form says that a module computes, by the reference."""

    def __init__(self, form: Mlp, module: nn.Module) -> None:
        self.form, self.module = form, module

    def __call__(self, x: Tensor) -> Tensor:
        form, fc2 = self.form, find(self.module, self.form.fc2)
        fc1 = None if form.fc1 is None else find(self.module, form.fc1)
        z = x.flatten(2).mean(2)
        h = z if fc1 is None else POINTWISE[form.activation].fn(_apply(fc1, z))
        scale = POINTWISE[form.gate].fn(_apply(fc2, h))
        y = x * scale.reshape(*scale.shape, *[1] * (x.dim() - 2))
        return y if form.residual is None else y + form.residual(self.module, x)


def _apply(layer: Foreign, v: Tensor) -> Tensor:
    u: Tensor = nn.functional.linear(v, layer.weight.flatten(1), layer.bias)
    return u


def _output_and_gradients(
    fn: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    with torch.enable_grad():
        y = fn(leaves[0])
        if getattr(y, "shape", None) != x.shape or y.dtype != x.dtype:
            raise TypeError(f"its output is no {x.dtype} tensor of shape {list(x.shape)}")
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
        gradients = torch.autograd.grad(y, leaves, weights, materialize_grads=True)
    return [y.detach(), *gradients]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether outputs, first in each, and gradients agree, relative to the largest number."""
    if any(getattr(x, "shape", None) != y.shape or x.dtype != y.dtype
           for x, y in zip(a, b, strict=True)):  # fmt: skip
        return False
    # torch's own hardsigmoid has a float32 constant in its float64 derivative.
    tolerances = (1e-9, *[1e-6] * (len(a) - 1))
    for x, y, tolerance in zip(a, b, tolerances, strict=True):
        finite = y.nan_to_num().abs()
        size = finite.max().item() if y.numel() else 0.0
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            return False
    return True
