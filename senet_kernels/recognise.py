"""What other libraries' squeeze-and-excitation modules compute, without importing those libraries.

A module is recognised in one of two ways: quickly, by its exact class and a hash of the source
that it runs, both in ``KNOWN``; or by the graph of its forward (:mod:`.captured`), which decides
for every other module and gives the same answer for those of the table. To add a class, add a line
to ``KNOWN``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from .captured import (
    Chain,
    check_children,
    is_small,
    may_excite,
    parts_around,
    read_captured,
    sounds_like_se,
)
from .forms import Form, Halves, Mlp, class_name, not_a_matrix, own_input, pointwise_name
from .namespaces import words_of
from .neighbours import source_hash
from .parts import (
    Foreign,
    Path,
    Refusal,
    changed_reason,
    descendants,
    find,
    kinds_of,
    part_of,
    parts_of,
)
from .pointwise import ACTIVATIONS, GATES
from .tensors import foreign_class
from .watched import package_of
from .words_asked import words_in

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


class _Unusual(Exception):
    """A module is not as its class makes it: what it computes, its graph says."""


def _layer(module: nn.Module, name: str, kind: type[nn.Module]) -> Path:
    path = _path(name)
    layer = find(module, path)
    if type(layer) is not kind:
        raise _Unusual
    reason = not_a_matrix(layer)
    if reason is not None:
        raise Refusal(f"its child {name} {reason}")
    return path


def _mlp(
    fc1: str | None,
    fc2: str,
    activation: str,
    gate: str,
    *,
    pool: str | None = None,
    identities: tuple[str, ...] = (),
    linear: bool = False,
    residual: Callable[[Foreign, Tensor], Tensor] | None = None,
    ranks: tuple[int, ...] = (4,),
    called: tuple[str, ...] = (),
    lengths: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Foreign], Form]:
    """A reader of modules with these children, and no others but containers of them; ``=name`` is a
    function that is no child, ``linear`` says that the layers are no 1x1 convolutions, ``pool`` is
    what averages. It raises ``_Unusual`` for others."""
    named = [name for name in (fc1, fc2, activation, gate, pool) if name and name[0] != "="]
    leaves = {_path(name) for name in (*named, *identities)}
    containers = {path[:i] for path in leaves for i in range(1, len(path))}

    def read(module: nn.Module) -> Form:
        if getattr(module, "add_maxpool", False):
            raise Refusal("it adds a maximum to the mean (add_maxpool=True)")
        others = {path for path, _ in descendants(module) if path[0] not in called}
        pools = pool is None or _averages(find(module, _path(pool)), ranks[0])
        absent = (find(module, _path(name)) for name in identities)
        if (
            others != leaves | containers
            or not pools
            or any(type(m) is not nn.Identity for m in absent)
            or not all(_contains(module, find(module, path)) for path in containers)
        ):
            raise _Unusual
        kind = nn.Linear if linear else _CONVOLUTIONS[ranks[0]]
        return Mlp(
            None if fc1 is None else _layer(module, fc1, kind),
            _layer(module, fc2, kind),
            _function(module, activation, ACTIVATIONS),
            _function(module, gate, GATES),
            parts_of(module, called=called),
            residual,
            ranks,
            lengths,
        )

    return read


_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _contains(module: nn.Module, child: Foreign) -> bool:
    """Whether a child is a container of PyTorch's, or of a class of the module's own library."""
    kind = type(child)
    return kind in (nn.Sequential, nn.ModuleList) or package_of(kind) == package_of(type(module))


def _averages(pool: Foreign, rank: int) -> bool:
    """Whether a module averages over all positions."""
    ones = (1, (1,) * (rank - 2), [1] * (rank - 2))
    return type(pool) is _POOLS[rank - 3] and pool.output_size in ones


def _timm(module: Foreign) -> Form:
    if class_name(module.bn) == "torch.nn.modules.linear.Identity":
        return _mlp("fc1", "fc2", "act", "gate", identities=("bn",))(module)
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
        raise _Unusual
    rank = 3 + _POOLS.index(type(module.avg_pool))
    residual = own_input if module.add_residual else None
    layers = ("fc.0", "fc.2", "fc.1", "fc.3")
    return _mlp(*layers, pool="avg_pool", linear=True, residual=residual, ranks=(rank,))(module)


def _fvcore(module: Foreign) -> Form:
    rank = 5 if module.is_3d else 4
    return _mlp("block.0", "block.2", "block.1", "block.3", ranks=(rank,))(module)


def _relative_lengths(x: Tensor, lengths: Tensor) -> Tensor:
    """Fractions of the longest: position i counts if ``i < lengths * L``."""
    longest = x.shape[-1]
    return (lengths * longest).ceil().clamp(0, longest).long()


def _spatial_half(module: Foreign, x: Tensor) -> Tensor:
    s: Tensor = module.sSE(x)
    return x * s


_HF = "transformers.models."


class _Known(NamedTuple):
    read: Callable[[Foreign], Form]
    hashes: tuple[str, ...]  # of forward's source in the releases it was written for


_PP_LCNET = _Known(
    _mlp("convolutions.0", "convolutions.2", "convolutions.1", "convolutions.3", pool="avg_pool"),
    ("58a0a9d1e1660fb1",),
)
_PP_OCR = _Known(
    _mlp("conv1", "conv2", "act_fn", "=hardsigmoid_02", pool="avg_pool"), ("ade0a4a489e299f1",)
)
_ALIGN = _Known(
    _mlp("reduce", "expand", "act_reduce", "act_expand", pool="squeeze"), ("a52989e5ff0d23cb",)
)
_MONAI = _Known(_monai, ("e295bffa43a8068b",))

#: By the class's qualified name; a subclass may compute anything and is not in here.
KNOWN: dict[str, _Known] = {
    "timm.layers.squeeze_excite.SEModule": _Known(_timm, ("91d2666c6e0dd643",)),
    "timm.layers.squeeze_excite.EffectiveSEModule": _Known(
        _mlp(None, "fc", "=identity", "gate"), ("bfeb53978d176ea8",)
    ),
    "timm.layers.eca.EcaModule": _Known(_eca, ("938c19b7f44a7ee1",)),
    "timm.models._efficientnet_blocks.SqueezeExcite": _Known(
        _mlp("conv_reduce", "conv_expand", "act1", "gate"), ("c9763751291eaf7f",)
    ),
    "timm.models.hgnet.EseModule": _Known(
        _mlp(None, "conv", "=identity", "sigmoid"), ("3e2e05be57ba2066",)
    ),
    "timm.models.senet.SEModule": _Known(
        _mlp("fc1", "fc2", "relu", "sigmoid"), ("84b2729ee08119a0",)
    ),
    "torchvision.ops.misc.SqueezeExcitation": _Known(
        _mlp("fc1", "fc2", "activation", "scale_activation", pool="avgpool"), ("e885e702b6ef1fc6",)
    ),
    f"{_HF}regnet.modeling_regnet.RegNetSELayer": _Known(
        _mlp("attention.0", "attention.2", "attention.1", "attention.3", pool="pooler"),
        ("2fd6b751d3cc8082",),
    ),
    f"{_HF}efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": _ALIGN,
    f"{_HF}align.modeling_align.AlignVisionSqueezeExciteLayer": _ALIGN,
    f"{_HF}pp_lcnet.modeling_pp_lcnet.PPLCNetSqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_lcnet_v3.modeling_pp_lcnet_v3.PPLCNetV3SqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_lcnet_v4.modeling_pp_lcnet_v4.PPLCNetV4SqueezeExcitationModule": _PP_LCNET,
    f"{_HF}pp_ocrv5_mobile_det.modeling_pp_ocrv5_mobile_det."
    "PPOCRV5MobileDetSqueezeExcitationModule": _PP_OCR,
    f"{_HF}pp_ocrv6_small_det.modeling_pp_ocrv6_small_det."
    "PPOCRV6SmallDetSqueezeExcitationModule": _PP_OCR,
    f"{_HF}qwen2_5_omni.modeling_qwen2_5_omni.SqueezeExcitationBlock": _Known(
        _mlp("conv1", "conv2", "relu", "sigmoid", ranks=(3,)), ("60c7863661c2b536",)
    ),
    "monai.networks.blocks.squeeze_and_excitation.ChannelSELayer": _MONAI,
    "monai.networks.blocks.squeeze_and_excitation.ResidualSELayer": _MONAI,
    "segmentation_models_pytorch.base.modules.SCSEModule": _Known(
        _mlp(
            "cSE.1",
            "cSE.3",
            "cSE.2",
            "cSE.4",
            pool="cSE.0",
            residual=_spatial_half,
            called=("sSE",),
        ),
        ("b3604ab7992f32bf",),
    ),
    "segmentation_models_pytorch.encoders._senet.SEModule": _Known(
        _mlp("fc1", "fc2", "relu", "sigmoid", pool="avg_pool"), ("f8708ca9677b34f0",)
    ),
    "segmentation_models_pytorch.encoders.mobileone.SEBlock": _Known(
        _mlp("reduce", "expand", "=relu", "=sigmoid"), ("e94554e4f3e09ccb",)
    ),
    "speechbrain.lobes.models.ECAPA_TDNN.SEBlock": _Known(
        _mlp("conv1.conv", "conv2.conv", "relu", "sigmoid", ranks=(3,), lengths=_relative_lengths),
        ("c0d47e98a87aab3f",),
    ),
    "fvcore.nn.squeeze_excitation.SqueezeExcitation": _Known(_fvcore, ("5aefa761b79e7be2",)),
}


class Passed(Refusal):
    """A module was not recognised that calls itself squeeze-and-excitation. What it holds may be:
    then it is none itself."""


class Recogniser:
    """Recognises the modules of one model; equal ones are captured once."""

    def __init__(self) -> None:
        # Of a class: its code stays what it is while a model is looked at.
        self._words_of: Any = cache(words_of)
        self._seen: list[tuple[Any, Mlp | Halves | Refusal]] = []

    def recognise(self, module: nn.Module) -> Form | None:
        """How to compute a module; None where it has nothing to do with squeeze-and-excitation.

        Raises:
            Refusal: it is, or calls itself, squeeze-and-excitation, and cannot be fused.
        """
        if any(cls.__module__.startswith("senet_kernels.") for cls in type(module).__mro__):
            return None  # it calls the operation as it is
        known = KNOWN.get(class_name(module))
        if "forward" in vars(module):
            if known is None and not sounds_like_se(module):
                return None
            raise Refusal("it has its own forward")
        if known is not None and source_hash(type(module)) in known.hashes:
            _check_own_functions(module)
            try:
                form = known.read(module)
            except (_Unusual, AttributeError, KeyError):
                form = self._capture(module)
        elif known is not None:
            try:
                form = self._capture(module)
            except Refusal as refusal:
                raise Refusal(f"its forward is not the one that is known: {refusal}") from refusal
        elif sounds_like_se(module):
            try:
                form = self._capture(module)
            except Refusal as refusal:
                raise Passed(str(refusal)) from refusal
        elif may_excite(module):
            try:
                form = self._capture(module)
            except Refusal:
                return None
        else:
            return None
        return _checked(module, form)

    def _capture(self, module: nn.Module) -> Form:
        if not is_small(module):
            raise Refusal("it holds more modules than an excitation does")
        check_children(module)
        words = words_in(module, self._words_of)
        key = _key(module, words.every)
        found = next((f for k, f in self._seen if _is_same(k, key)), None)
        if found is None:
            try:
                found = read_captured(module, words)
            except Refusal as refusal:
                found = refusal
            self._seen.append((key, found))
        if isinstance(found, Refusal):
            raise Refusal(str(found))
        chain = found.excite if isinstance(found, Halves) else None
        assert chain is None or isinstance(chain, Chain)
        return found._replace(parts=parts_around(module, chain, words))


_kept: list[Recogniser] = []


@contextmanager
def one_recogniser() -> Iterator[None]:
    """Within, modules that are equal are captured once in all calls: for who converts a model again
    and again, and changes no code meanwhile."""
    _kept.append(recogniser())
    try:
        yield
    finally:
        _kept.pop()


def recogniser() -> Recogniser:
    """For one call."""
    return _kept[-1] if _kept else Recogniser()


def _key(module: nn.Module, words: frozenset[str]) -> Any:
    """All that a forward can read of a module, but for numbers in tensors; parameters that are
    shared are so by their positions."""
    paths = [(), *(path for path, _ in descendants(module))]
    positions: dict[int, int] = {}
    key = []
    for path in paths:
        part, child = part_of(module, path, words), find(module, path)
        tensors = {**child._parameters, **child._buffers}
        shapes = [
            (name, None if t is None else (
                t.shape, t.dtype.is_floating_point, positions.setdefault(id(t), len(positions))
            ))
            for name, t in tensors.items()
        ]  # fmt: skip
        key.append((part.path, part.kind, part.names, part.values, shapes))
    return key


def _is_same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors and arrays do not compare to one truth
        return False


def _checked(module: nn.Module, form: Form) -> Form:
    if isinstance(form, Mlp):
        _check_weights(module, form)
    if not form.parts or form.parts[0].path:  # flags of its own, that the reader has looked at
        form = form._replace(parts=(part_of(module, ()), *form.parts))
    form = form._replace(kinds=kinds_of(form.parts))
    reason = changed_reason(module, form.parts)
    if reason is not None:
        raise Refusal(str(reason))
    return form


def _check_own_functions(module: nn.Module) -> None:
    """Refuse an instance that has, or whose child has, functions in the place of its class's."""
    for path, child in ((), module), *descendants(module):
        for name, value in vars(child).items():
            if callable(value) and hasattr(type(child), name):
                its = f"its child {'.'.join(path)}" if path else "it"
                raise Refusal(f"{its} has its own {name!r}")


def _check_weights(module: nn.Module, form: Mlp) -> None:
    """Refuse quantised weights and their like, which know what a layer means to them. A DTensor may
    be a shard that is gathered before each call."""
    for path in filter(None, (form.fc1, form.fc2)):
        weight = find(module, path).weight
        kind = foreign_class(weight)
        if kind is not None and not type(weight).__module__.startswith("torch.distributed."):
            raise Refusal(f"its child {'.'.join(path)} has a weight of class {kind}")
