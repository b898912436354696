"""What other libraries' squeeze-and-excitation modules compute, without importing those libraries.

A module is recognised in one of two ways: by its exact class, named in ``KNOWN``, or by proof:
a module that holds nothing but the two layers of an excitation is run on random numbers, and is
recognised if exactly one form of the operation reproduces its output and its input's gradient.
To add a class, add a line to ``KNOWN``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

from torch import Tensor, nn

from .forms import (
    Foreign,
    Form,
    Halves,
    Mlp,
    Path,
    Refusal,
    class_name,
    find,
    not_a_matrix,
    own_input,
    part_of,
    parts_of,
    pointwise_name,
    stale_reason,
)
from .pointwise import ACTIVATIONS, GATES
from .proof import layers_of, prove, sounds_like_se
from .tensors import foreign_class

_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


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
            parts_of(module, called=called),
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
    return u.flatten(1)  # of more than one row, channels do not agree


def _monai(module: Foreign) -> Form:
    if type(module.avg_pool) not in _POOLS:
        raise Refusal(f"its child avg_pool is a {type(module.avg_pool).__name__}")
    rank = 3 + _POOLS.index(type(module.avg_pool))
    residual = own_input if module.add_residual else None
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


def recognise(module: nn.Module) -> Form | None:
    """How to compute a module; None where it has nothing to do with squeeze-and-excitation.

    Raises:
        Refusal: it is, or calls itself, squeeze-and-excitation, and cannot be fused.
    """
    read = KNOWN.get(class_name(module))
    if read is None:
        paths = layers_of(module)
        if paths is None:
            return None
        try:
            form: Form = prove(module, paths)
        except Refusal:
            if sounds_like_se(module):
                raise
            return None
    else:
        _check_class(module)
        try:
            form = read(module)
        except (AttributeError, KeyError) as error:
            raise Refusal(f"it is not built as {class_name(module)} is: {error}") from error
    if "forward" in module.__dict__:
        raise Refusal("it has its own forward")
    if isinstance(form, Mlp):
        _check_weights(module, form)
    if not form.parts or form.parts[0].path:  # flags of its own, that the reader has looked at
        form = form._replace(parts=(part_of(module, ()), *form.parts))
    reason = stale_reason(module, form.parts)
    if reason is not None:
        raise Refusal(reason)
    return form


def _check_class(module: nn.Module) -> None:
    """Refuse a module of a known class with functions that are not that class's: what the class is
    known to compute, it may not."""
    cls = type(module)
    for name, value in vars(cls).items():
        if isinstance(value, FunctionType) and not (
            value.__module__ == cls.__module__
            and value.__qualname__.startswith(f"{cls.__qualname__}.")
        ):
            raise Refusal(f"the {name!r} of its class has been replaced")
    for name, value in vars(module).items():
        if callable(value) and hasattr(cls, name):
            raise Refusal(f"it has its own {name!r}")


def _check_weights(module: nn.Module, form: Mlp) -> None:
    """Refuse quantised weights and their like, which know what a layer means to them. A DTensor may
    be a shard that is gathered before each call."""
    for path in filter(None, (form.fc1, form.fc2)):
        weight = find(module, path).weight
        kind = foreign_class(weight)
        if kind is not None and not type(weight).__module__.startswith("torch.distributed."):
            raise Refusal(f"its child {'.'.join(path)} has a weight of class {kind}")
