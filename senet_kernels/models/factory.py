"""Building the networks by name."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

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
    name: str, num_classes: Any, in_chans: Any, reduction: Any, rd_divisor: Any,
    excitation: Any, formula: Any, stride_in_1x1: bool, drop_rate: Any,
) -> Architecture:  # fmt: skip
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(str(name), ARCHITECTURES, 3)
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        known = ", ".join(list_models())
        raise ValueError(f"name: expected one of {known}, got {name!r}{hint}")
    architecture = ARCHITECTURES[name]
    check_count("num_classes", num_classes, 0)
    check_count("in_chans", in_chans, 1)
    check_count("rd_divisor", rd_divisor, 1)
    if reduction is not None:
        check_count("reduction", reduction, 1)
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


def _arguments(
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
) -> dict[str, Any]:
    """create_model's arguments, checked, as those of ResNet."""
    architecture = _check_options(
        name, num_classes, in_chans, reduction, rd_divisor, excitation, formula, stride_in_1x1,
        drop_rate,
    )  # fmt: skip
    reduction = architecture.reduction if reduction is None else reduction
    stem = architecture.stem if stem is None else stem
    if stem == "small" and pool is not None:
        raise ValueError(f"pool: expected None with stem='small', which has none, got {pool!r}")
    pooled = pool
    if pool is None:
        pool = "ceil" if stride_in_1x1 else architecture.pool
    if stem != "small":
        pooled = pool
    drop_rate = architecture.drop_rate if drop_rate is None else drop_rate
    _check_choice("stem", stem, STEMS)
    _check_choice("pool", pool, POOLS)
    config = {
        "name": name, "num_classes": num_classes, "in_chans": in_chans, "reduction": reduction,
        "rd_divisor": rd_divisor, "excitation": excitation, "formula": formula,
        "stride_in_1x1": stride_in_1x1, "stem": stem, "pool": pooled, "drop_rate": drop_rate,
        "zero_init_last": zero_init_last,
    }  # fmt: skip
    make_se = _se_maker(architecture, reduction, rd_divisor, excitation, formula)
    return {
        "architecture": architecture, "num_classes": num_classes, "in_chans": in_chans,
        "make_se": make_se, "stride_in_1x1": stride_in_1x1, "stem": stem, "pool": pool,
        "drop_rate": drop_rate, "zero_init_last": zero_init_last, "config": config,
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
            ``pool`` is ``"ceil"`` unless given: timm's ``legacy_`` networks.
        stem: ``"imagenet"``, ``"deep"`` or ``"small"``, see :class:`ResNet`; None: the network's.
        pool: ``"pad"`` or ``"ceil"``, see :class:`ResNet`; None: the network's.
        drop_rate: dropout before the classifier; None: the network's (0.2 in SENet-154).
        zero_init_last: each block starts as its shortcut.

    Returns:
        The model: ``[B, in_chans, H, W] -> [B, num_classes]``; ``create_model(**model.config)``
        builds another like it.

    Raises:
        ValueError: no such name, or an option is out of range or does not apply.
    """
    return ResNet(**_arguments(
        name, num_classes, in_chans, reduction=reduction, rd_divisor=rd_divisor,
        excitation=excitation, formula=formula, stride_in_1x1=stride_in_1x1, stem=stem, pool=pool,
        drop_rate=drop_rate, zero_init_last=zero_init_last,
    ))  # fmt: skip


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
        super().__init__(**_arguments("se_resnet50", num_classes, in_chans, **form))


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
