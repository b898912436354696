"""What other libraries' squeeze-and-excitation modules compute, without importing those libraries.

A module is recognised in one of two ways: by its exact class, named in ``KNOWN``, or by proof:
a module that holds nothing but the two layers of an excitation is run on random numbers, and is
recognised if exactly one form of the operation reproduces its output and its input's gradient.
To add a class, add a line to ``KNOWN``.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .pointwise import ACTIVATIONS, GATES, POINTWISE

Path = tuple[str, ...]  # names of children, from a module downwards
Foreign = Any  # a module of a class that is not known here


class Refusal(Exception):
    """A module cannot be fused; the message says why."""


class Part(NamedTuple):
    """A child whose work the fused operation does, and what it was when recognised."""

    path: Path  # (): the module itself, which may have become a subclass
    kind: type[nn.Module]
    children: int
    setting: float | str | None  # the argument of an activation that has one


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
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def pointwise_name(module: nn.Module) -> str | None:
    """The table's name for a pointwise module; None where the table has no such function."""
    name = _POINTWISE_NAMES.get(class_name(module))
    if isinstance(module, nn.GELU):
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
    if type(layer) not in _LINEAR:
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
    return module.approximate if isinstance(module, nn.GELU) else None


def part_of(module: nn.Module, path: Path) -> Part:
    """The child at ``path`` as it is now."""
    child = find(module, path)
    return Part(path, type(child), len(child._modules), _setting(child))


def _paths(module: nn.Module) -> Iterator[tuple[Path, nn.Module]]:
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            yield tuple(name.split(".")), child


def _parts(module: nn.Module, *, called: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """All descendants, but for those under the children in ``called``, which still are called."""
    return tuple(part_of(module, path) for path, _ in _paths(module) if path[0] not in called)


# ---- known classes ----


def _path(name: str) -> Path:
    return tuple(name.split("."))


def _function(module: nn.Module, name: str, legal: tuple[str, ...]) -> str:
    """The table's name for a child or, with a leading ``=``, the name itself."""
    if name.startswith("="):
        return name[1:]
    child = find(module, _path(name))
    found = pointwise_name(child)
    if found not in legal:
        raise Refusal(f"no kernel has the function of its child {name}, {child!r}")
    return found


def _layer(module: nn.Module, name: str) -> Path:
    path = _path(name)
    reason = not_a_matrix(find(module, path))
    if reason is not None:
        raise Refusal(f"its child {name} {reason}")
    return path


def _mlp(
    fc1: str | None,
    fc2: str,
    activation: str,
    gate: str,
    *,
    residual: Callable[[Foreign, Tensor], Tensor] | None = None,
    ranks: tuple[int, ...] = (4,),
    called: tuple[str, ...] = (),
    lengths: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Foreign], Form]:
    """A reader of modules with these children; ``=name`` is a function that is no child."""

    def read(module: nn.Module) -> Form:
        if getattr(module, "add_maxpool", False):
            raise Refusal("it adds a maximum to the mean (add_maxpool=True)")
        return Mlp(
            None if fc1 is None else _layer(module, fc1),
            _layer(module, fc2),
            _function(module, activation, ACTIVATIONS),
            _function(module, gate, GATES),
            _parts(module, called=called),
            residual,
            ranks,
            lengths,
        )

    return read


def _timm(module: Foreign) -> Form:
    if class_name(module.bn) == "torch.nn.modules.linear.Identity":
        return _mlp("fc1", "fc2", "act", "gate")(module)
    if module.add_maxpool:
        raise Refusal("it adds a maximum to the mean (add_maxpool=True)")
    gate = _function(module, "gate", GATES)
    return Halves(_excite_with_norm, gate, (part_of(module, ("gate",)),))


def _excite_with_norm(module: Foreign, z: Tensor) -> Tensor:
    h: Tensor = module.act(module.bn(module.fc1(z[:, :, None, None])))
    u: Tensor = module.fc2(h)
    return u.flatten(1)


def _eca(module: Foreign) -> Form:
    if module.conv2 is not None:
        raise Refusal("it has the experimental second convolution (use_mlp=True)")
    gate = _function(module, "gate", GATES)
    return Halves(
        _excite_by_convolution,
        gate,
        (part_of(module, ("gate",)),),
    )


def _excite_by_convolution(module: Foreign, z: Tensor) -> Tensor:
    u: Tensor = module.conv(z[:, None])
    return u[:, 0]


def _monai(module: Foreign) -> Form:
    if type(module.avg_pool) not in _POOLS:
        raise Refusal(f"its child avg_pool is a {type(module.avg_pool).__name__}")
    rank = 3 + _POOLS.index(type(module.avg_pool))
    residual = _input if module.add_residual else None
    return _mlp("fc.0", "fc.2", "fc.1", "fc.3", residual=residual, ranks=(rank,))(module)


def _fvcore(module: Foreign) -> Form:
    rank = 5 if module.is_3d else 4
    if len(find(module, ("block",))._modules) != 4:
        raise Refusal("its excitation is not layer, activation, layer, gate")
    return _mlp("block.0", "block.2", "block.1", "block.3", ranks=(rank,))(module)


def _relative_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """Fractions of the longest: position i counts if ``i < lengths * L``."""
    longest = x.shape[-1]
    return (lengths * longest).ceil().clamp(0, longest).long()


def _input(module: Foreign, x: Tensor) -> Tensor:
    return x


def _spatial_half(module: Foreign, x: Tensor) -> Tensor:
    s: Tensor = module.sSE(x)
    return x * s


_HF = "transformers.models."
_PP_LCNET = _mlp("convolutions.0", "convolutions.2", "convolutions.1", "convolutions.3")
_PP_OCR = _mlp("conv1", "conv2", "act_fn", "=hardsigmoid_02")

#: Readers by the class's qualified name; a subclass may compute anything and is not in here.
KNOWN: dict[str, Callable[[Foreign], Form]] = {
    "timm.layers.squeeze_excite.SEModule": _timm,
    "timm.layers.squeeze_excite.EffectiveSEModule": _mlp(None, "fc", "=identity", "gate"),
    "timm.layers.eca.EcaModule": _eca,
    "timm.models._efficientnet_blocks.SqueezeExcite": _mlp(
        "conv_reduce", "conv_expand", "act1", "gate"
    ),
    "timm.models.hgnet.EseModule": _mlp(None, "conv", "=identity", "sigmoid"),
    "timm.models.senet.SEModule": _mlp("fc1", "fc2", "relu", "sigmoid"),
    "torchvision.ops.misc.SqueezeExcitation": _mlp("fc1", "fc2", "activation", "scale_activation"),
    f"{_HF}regnet.modeling_regnet.RegNetSELayer": _mlp(
        "attention.0", "attention.2", "attention.1", "attention.3"
    ),
    f"{_HF}efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": _mlp(
        "reduce", "expand", "act_reduce", "act_expand"
    ),
    f"{_HF}align.modeling_align.AlignVisionSqueezeExciteLayer": _mlp(
        "reduce", "expand", "act_reduce", "act_expand"
    ),
    f"{_HF}pp_lcnet.modeling_pp_lcnet.PPLCNetSqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_lcnet_v3.modeling_pp_lcnet_v3.PPLCNetV3SqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_lcnet_v4.modeling_pp_lcnet_v4.PPLCNetV4SqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_ocrv5_mobile_det.modeling_pp_ocrv5_mobile_det."
    "PPOCRV5MobileDetSqueezeExcitationModule": _PP_OCR,
    f"{_HF}pp_ocrv6_small_det.modeling_pp_ocrv6_small_det."
    "PPOCRV6SmallDetSqueezeExcitationModule": _PP_OCR,
    f"{_HF}qwen2_5_omni.modeling_qwen2_5_omni.SqueezeExcitationBlock": _mlp(
        "conv1", "conv2", "relu", "sigmoid", ranks=(3,)
    ),
    "monai.networks.blocks.squeeze_and_excitation.ChannelSELayer": _monai,
    "monai.networks.blocks.squeeze_and_excitation.ResidualSELayer": _monai,
    "segmentation_models_pytorch.base.modules.SCSEModule": _mlp(
        "cSE.1", "cSE.3", "cSE.2", "cSE.4", residual=_spatial_half, called=("sSE",)
    ),
    "segmentation_models_pytorch.encoders._senet.SEModule": _mlp("fc1", "fc2", "relu", "sigmoid"),
    "segmentation_models_pytorch.encoders.mobileone.SEBlock": _mlp(
        "reduce", "expand", "=relu", "=sigmoid"
    ),
    "speechbrain.lobes.models.ECAPA_TDNN.SEBlock": _mlp(
        "conv1.conv", "conv2.conv", "relu", "sigmoid", ranks=(3,), lengths=_relative_lengths
    ),
    "fvcore.nn.squeeze_excitation.SqueezeExcitation": _fvcore,
}


# ---- proof by numbers ----

_PROBE_SPACE = {4: (5, 4), 3: (7,), 5: (3, 2, 4)}
_SOUNDS_LIKE_SE = re.compile(r"(?i:squeeze|excit)|(^|[a-z_])SE([A-Z_]|$)|^E?SE", re.ASCII)
_MOST_CHILDREN = 16  # nothing that only excites has more; keeps whole networks from being tried


def sounds_like_se(module: nn.Module) -> bool:
    """Whether the class's name says squeeze-and-excitation; for the report alone."""
    return _SOUNDS_LIKE_SE.search(type(module).__name__) is not None


def _layers(module: nn.Module) -> list[Path] | None:
    """Where the one or two layers of an excitation are; None if the module is not made of them."""
    if module._parameters or module._buffers or type(module) is nn.Sequential:
        return None
    layers: list[Path] = []
    for count, (path, child) in enumerate(_paths(module)):
        if count >= _MOST_CHILDREN:
            return None
        if type(child) in _LINEAR:
            if not_a_matrix(child):
                return None
            layers.append(path)
    if not 1 <= len(layers) <= 2:
        return None
    shapes = [find(module, path).weight.shape for path in layers]
    if shapes[0][1] != shapes[-1][0] or (len(layers) == 2 and shapes[0][0] != shapes[1][1]):
        return None
    return layers


def prove(module: nn.Module, paths: list[Path]) -> Mlp:
    """The form of a module of unknown class, established by running a copy of it in float64.

    ``paths`` are its layers. The form found must hold in training and in eval mode, with and
    without gradients, for unusual numbers, extents, layouts and dtypes, and leave no trace in the
    module. What a module reads from outside itself cannot be seen.

    Raises:
        Refusal: no form, or more than one, gives what the module gives.
    """
    for path, child in _paths(module):
        reason = watched(child)
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
        and _seems_to_scale(module, torch.randn(2, channels, *space, generator=generator))
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
    parts = (part_of(module, ()), *_parts(module))
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
        tried = [found] if found else _candidates(paths, parts)
        forms = [
            form
            for form in (tried if _scales(x, theirs[0][0]) else ())
            if _same([_Model(form, double)(x)], [theirs[0][0]])
            and all(
                _same(_output_and_gradients(_Model(form, double), x, double), t) for t in theirs
            )
        ]
        if len(forms) != 1:
            what = "more than one form" if forms else "no form"
            why = f"{what} of squeeze-and-excitation gives its output and gradients"
            continue
        _check_unusual_calls(forms[0], double, x)
        if found is None:
            _check_dtypes(forms[0], double, x)
            found = forms[0]
        ranks.append(rank)
    if found is None:
        raise Refusal(why)
    return found._replace(ranks=tuple(ranks))


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
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            low = copy.deepcopy(double).to(dtype)
            try:
                y = low.forward(x.to(dtype))
            except Exception:  # not every dtype has every operation on every device
                continue
            if y.dtype != dtype:
                raise Refusal(f"it makes {y.dtype} of {dtype}")
            if (y - right).abs().max() > 0.1 * right.abs().max():
                raise Refusal(f"it computes something else in {dtype}")


def _fill(t: Tensor, size: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        t.copy_(size * torch.randn(t.shape, generator=generator, dtype=torch.float64))


def _candidates(paths: list[Path], parts: tuple[Part, ...]) -> Iterator[Mlp]:
    fc1 = paths[0] if len(paths) == 2 else None
    for activation in ACTIVATIONS if fc1 else ("identity",):
        for gate in GATES:
            for residual in (None, _input):
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


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# ---- the question ----


def recognise(module: nn.Module) -> Form | None:
    """How to compute a module; None where it has nothing to do with squeeze-and-excitation.

    Raises:
        Refusal: it is, or calls itself, squeeze-and-excitation, and cannot be fused.
    """
    read = KNOWN.get(class_name(module))
    if read is None:
        paths = _layers(module)
        if paths is None:
            return None
        try:
            form: Form = prove(module, paths)
        except Refusal:
            if sounds_like_se(module):
                raise
            return None
    else:
        try:
            form = read(module)
        except (AttributeError, KeyError) as error:
            raise Refusal(f"it is not built as {class_name(module)} is: {error}") from error
    if "forward" in module.__dict__:
        raise Refusal("it has its own forward")
    reason = changed(module, form.parts)
    if reason is not None:
        raise Refusal(reason)
    return form
