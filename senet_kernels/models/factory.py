"""Building the networks by name."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

from senet_kernels._command_line import near
from senet_kernels.layers import divisible
from senet_kernels.modules import EXCITATIONS, FusedSEBlock

from .resnet import POOLS, STEMS, Architecture, MakeSE, ResNet, check_count
from .timm_keys import TIMM_TWINS

#: What becomes of x and its recalibrated self A = g x in a block.
FORMULAS = {
    "plain": "y = A",
    "weighted": "y = alpha x + beta A, alpha and beta learned per channel, 0 and 1 at first",
    "literal": "y = alpha x + beta, no excitation: alpha and beta 1 and 0 at first",
}


def _plain(block: str, *layers: int, **options: Any) -> Architecture:
    return Architecture(block, layers, **options)


_CIFAR = {"planes": (16, 32, 64), "stem": "small", "stem_channels": 16, "reduction": 4}
_32X4D = {"groups": 32, "width_per_group": 4}

_PLAIN = {
    # He et al., section 4.2: three narrow stages, for small images.
    "resnet8": _plain("basic", 1, 1, 1, **_CIFAR),
    "resnet20": _plain("basic", 3, 3, 3, **_CIFAR),
    "resnet18": _plain("basic", 2, 2, 2, 2),
    "resnet34": _plain("basic", 3, 4, 6, 3),
    "resnet50": _plain("bottleneck", 3, 4, 6, 3),
    "resnet101": _plain("bottleneck", 3, 4, 23, 3),
    "resnet152": _plain("bottleneck", 3, 8, 36, 3),
    "resnext50_32x4d": _plain("bottleneck", 3, 4, 6, 3, **_32X4D),
    "resnext101_32x4d": _plain("bottleneck", 3, 4, 23, 3, **_32X4D),
    # Hu et al., appendix: a ResNeXt-152 (64x4d) with a deep stem, thinner first convolutions,
    # 3x3 convolutions in the shortcuts and dropout.
    "resnext152_64x4d": _plain(
        "bottleneck", 3, 8, 36, 3, groups=64, width_per_group=4, first_width_ratio=2,
        stem="deep", stem_channels=128, pool="ceil", downsample_kernel=3, drop_rate=0.2,
    ),
}  # fmt: skip


def with_se(name: str) -> str:
    """The name of a plain network with squeeze-and-excitation."""
    return "senet154" if name == "resnext152_64x4d" else f"se_{name}"


#: Every network by name; the plain twin of ``senet154`` is ``resnext152_64x4d``.
ARCHITECTURES: dict[str, Architecture] = {
    **_PLAIN,
    **{with_se(name): replace(plain, se=True) for name, plain in _PLAIN.items()},
}


def list_models() -> list[str]:
    """The names :func:`create_model` knows, sorted."""
    return sorted(ARCHITECTURES)


def _check_choice(name: str, value: Any, legal: Any) -> None:
    if value not in tuple(legal):
        raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {value!r}")


def _check_options(
    name: str, num_classes: Any, in_chans: Any, *, reduction: Any, rd_divisor: Any,
    excitation: Any, formula: Any, stride_in_1x1: Any, drop_rate: Any, zero_init_last: Any,
    **_: Any,
) -> Architecture:  # fmt: skip
    """The architecture of that name, if the arguments of :func:`create_model` fit it."""
    if name not in ARCHITECTURES:
        known = ", ".join(list_models())
        hint = near(str(name), list(ARCHITECTURES))
        raise ValueError(f"name: expected one of {known}, got {name!r}{hint}")
    architecture = ARCHITECTURES[name]
    check_count("num_classes", num_classes, 0)
    check_count("in_chans", in_chans, 1)
    check_count("rd_divisor", rd_divisor, 1)
    if reduction is not None:
        check_count("reduction", reduction, 1)
    for option, value in (("stride_in_1x1", stride_in_1x1), ("zero_init_last", zero_init_last)):
        if not isinstance(value, bool):
            raise ValueError(f"{option}: expected True or False, got {value!r}")
    _check_choice("excitation", excitation, [e for e in EXCITATIONS if e != "constant"])
    _check_choice("formula", formula, FORMULAS)
    if formula == "literal" and excitation != "two":
        raise ValueError(
            f"excitation: expected the default with formula='literal', which has none, "
            f"got {excitation!r}"
        )
    if not architecture.se and (excitation != "two" or formula != "plain"):
        raise ValueError(
            f"name: expected a network with squeeze-and-excitation for excitation="
            f"{excitation!r}, formula={formula!r}, got {name!r}; try {with_se(name)!r}"
        )
    without_hidden = not architecture.se or excitation == "single" or formula == "literal"
    if without_hidden and (reduction not in (None, architecture.reduction) or rd_divisor != 1):
        raise ValueError(
            f"reduction, rd_divisor: expected the defaults, since {name} with excitation="
            f"{excitation!r}, formula={formula!r} has no hidden layer, got {reduction!r}, "
            f"{rd_divisor!r}"
        )
    if stride_in_1x1 and architecture.block == "basic":
        raise ValueError(
            f"stride_in_1x1: expected False for {name}, whose blocks have no 1x1 convolution, "
            f"got {stride_in_1x1!r}"
        )
    if drop_rate is not None and not (isinstance(drop_rate, (int, float)) and 0 <= drop_rate < 1):
        raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate!r}")
    return architecture


def _se_maker(
    architecture: Architecture, reduction: int, rd_divisor: int, excitation: str, formula: str
) -> MakeSE:
    def make(channels: int) -> FusedSEBlock | None:
        if not architecture.se:
            return None
        hidden = None
        if excitation != "single" and formula != "literal":
            hidden = max(1, channels // reduction)
            if rd_divisor > 1:
                hidden = divisible(channels / reduction, rd_divisor)
        return FusedSEBlock(
            channels,
            hidden=hidden,
            after="relu",
            excitation="constant" if formula == "literal" else excitation,
            weighted_sum=formula == "weighted",
        )

    return make


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`create_model`, all of them, as those of :class:`ResNet`."""
    architecture = _check_options(**given)
    config = dict(given)
    for name in ("reduction", "stem", "drop_rate"):
        if config[name] is None:
            config[name] = getattr(architecture, name)
    _check_choice("stem", config["stem"], STEMS)
    pool = config["pool"]
    if config["stem"] == "small":
        if pool is not None:
            raise ValueError(f"pool: expected None with stem='small', which has none, got {pool!r}")
    elif pool is None:
        config["pool"] = "ceil" if config["stride_in_1x1"] else architecture.pool
    else:
        _check_choice("pool", pool, POOLS)
    make_se = _se_maker(
        architecture, config["reduction"], config["rd_divisor"], config["excitation"],
        config["formula"],
    )  # fmt: skip
    same = ("num_classes", "in_chans", "stride_in_1x1", "stem", "drop_rate", "zero_init_last")
    return {
        "architecture": architecture, "make_se": make_se, "config": config,
        "pool": config["pool"] or architecture.pool, **{name: config[name] for name in same},
    }  # fmt: skip


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    reduction: int | None = None,
    rd_divisor: int = 1,
    excitation: str = "two",
    formula: str = "plain",
    stride_in_1x1: bool = False,
    stem: str | None = None,
    pool: str | None = None,
    drop_rate: float | None = None,
    zero_init_last: bool = True,
) -> ResNet:
    """A network of the SENet family, with random weights, for images of any size.

    Args:
        name: one of :func:`list_models`: ``se_resnet50``, ``senet154``, ...; without ``se_`` the
            plain twin. ``se_resnet8`` and ``se_resnet20`` are He et al.'s narrow networks for
            small images.
        num_classes: outputs of the classifier; 0: pooled features come out instead.
        in_chans: channels of the images.
        reduction: channels over hidden channels of an excitation; None: 16 (4 in the narrow ones).
        rd_divisor: hidden channels are a multiple of it (timm's ``seresnet18``: 8).
        excitation: ``"two"`` layers, a ``"single"`` one, or ``"tied"``: W2 is W1 transposed.
        formula: ``"plain"``: y = A, the recalibrated input; ``"weighted"``: y = alpha x + beta A;
            ``"literal"``: y = alpha x + beta, which has no excitation.
        stride_in_1x1: bottlenecks stride in their first 1x1 convolution, as in the papers, and
            ``pool`` is ``"ceil"`` unless given: timm's ``legacy_`` networks. A state dict does not
            show it: that of timm's ``seresnet50`` loads here too, and is wrong.
        stem: ``"imagenet"``, ``"deep"`` or ``"small"``, see :class:`ResNet`; None: the network's.
        pool: ``"pad"`` or ``"ceil"``, see :class:`ResNet`; None: the network's. A state dict does
            not show it either.
        drop_rate: dropout before the classifier; None: the network's (0.2 in SENet-154).
        zero_init_last: each block starts as its shortcut.

    Returns:
        The model: ``[B, in_chans, H, W] -> [B, num_classes]``; ``create_model(**model.config)``
        builds another like it.

    Raises:
        ValueError: no such name, or an option is out of range or does not apply.
    """
    return ResNet(**_resolved(locals()))  # the first statement: these are the arguments alone


class SENet(ResNet):
    """The network of docs/senet.md: a ResNet-50 whose blocks end in an excitation of two layers
    that share a weight and have biases of their own, weighted by learned alpha and beta.

    ``create_model("se_resnet50", excitation="tied", formula="weighted")`` under another name.

    Args:
        num_classes: outputs of the classifier.
        in_chans: channels of the images, which may have any size.
        options: of :func:`create_model`, which go before those two.

    Raises:
        ValueError: as :func:`create_model`.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, **options: Any) -> None:
        form = {"excitation": "tied", "formula": "weighted", **options}
        if form["formula"] == "literal" and "excitation" not in options:
            form["excitation"] = "two"  # there is none
        call = signature(create_model).bind("se_resnet50", num_classes, in_chans, **form)
        call.apply_defaults()
        super().__init__(**_resolved(call.arguments))


def timm_twin(name: str, num_classes: int = 1000, in_chans: int = 3, **options: Any) -> ResNet:
    """The network that is timm's of that name, into which its state dict loads.

    Args:
        name: one of timm's names in ``TIMM_TWINS``, such as ``"legacy_seresnet50"``.
        num_classes, in_chans, options: of :func:`create_model`.

    Raises:
        ValueError: no twin of that name, or as :func:`create_model`.
    """
    if name not in TIMM_TWINS:
        raise ValueError(f"name: expected one of {', '.join(TIMM_TWINS)}, got {name!r}")
    ours, twin = TIMM_TWINS[name]
    return create_model(ours, num_classes, in_chans, **{**twin, **options})
