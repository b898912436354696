"""The cases that say whether the kernels of a backend are right on this machine, without torch.

Shapes are odd, so that every mask is needed, and just beyond a tile; the CUDA kernels run by every
policy of tests/policies.py; then the layers of two networks, as large as the benchmarks have them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Layer, load_networks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from policies import PLAN, POLICIES

BACKENDS = ("triton", "native")
GROUPS = ("verdicts", "situations")
FRESH = "first call"  # for which a process must be new, and Triton's cache empty
SITUATIONS = (FRESH, "graph", "streams")
NETWORKS = ("seresnet50", "efficientnet_b0")
_LAYER_BATCH = 256
_LAYOUTS = ("contiguous", "channels_last")


class Case(NamedTuple):
    """A call. ``policy`` is for the plan of the CUDA kernels; empty leaves the choice to it."""

    shape: tuple[int, ...]
    hidden: int | None
    dtype: str
    last: bool  # channels-last
    options: dict[str, Any]
    policy: str = ""
    what: str = ""  # of SITUATIONS; the proof of the kernel alone without
    layer: str = ""  # the case of the benchmarks

    @property
    def name(self) -> str:
        """Unique among the cases of a backend."""
        words = [self.what, self.layer and "layer", "x".join(map(str, self.shape))]
        words += [self.dtype, "NHWC" if self.last else "NCHW"]
        words += [self.options.get("part", ""), self.policy]
        words += ["in place"] if "inplace" in self.options else []
        return " ".join(word for word in words if word)


_RELU = {"after": "relu", "residual": True}
_ALL = {"before": "silu", "shift": True, "weighted": True}

TRITON_KERNELS = {
    "squeeze_kernel", "mean_kernel", "hidden_kernel", "gates_kernel", "factors_kernel",
    "scale_flat_kernel", "scale_tile_kernel", "bwd_reduce_kernel", "finish_sums_kernel",
    "hidden_bwd_kernel", "excite_bwd_kernel", "sums_kernel", "dx_flat_kernel", "dx_tile_kernel",
}  # fmt: skip
TRITON_CASES = (
    # Vectors of 16 bytes, in rows of a multiple of them and not.
    Case((3, 24, 7, 16), 3, "float32", False, _RELU),
    Case((3, 24, 7, 7), 3, "bfloat16", False, {"before": "silu"}),
    Case((3, 24, 7, 7), 3, "bfloat16", True, {**_RELU, "before": "silu", "shift": True}),
    # Tiles.
    Case((3, 12, 5, 7), 3, "float32", False, _RELU),
    Case((3, 12, 5, 7), 3, "bfloat16", True, {"before": "silu", "shift": True}),
    # Programs that share images, by channels and by positions.
    Case((2, 36, 33, 31), 5, "bfloat16", False, _RELU),
    Case((2, 131, 11, 13), 9, "float16", True, {"before": "hardswish", "weighted": True}),
    Case((2, 20, 33, 31), None, "float32", False, {"lengths": True, "affine": True}),
    Case((19, 1032, 2, 4), 40, "float16", True, {"before": "silu"}),
    # The halves.
    Case((1, 3, 70, 33), None, "float32", False, {"part": "squeeze", "lengths": True,
                                                      "affine": True}),
    Case((2, 20, 70, 33), None, "bfloat16", True, {"part": "channel_scale", "weighted": True,
                                                       **_RELU}),
    # Overwriting x.
    Case((2, 36, 33, 31), 5, "float32", False, {"inplace": True, "before": "silu"}),
)  # fmt: skip

# Images that all policies take: 16-byte accesses, slices that blocks do not share evenly.
_WIDE, _WIDE_LAST = (  # contiguous with rows that are no whole bytes of the mask
    Case((5, 136, 7, 7), 12, "bfloat16", False, _RELU),
    Case((5, 136, 6, 8), 12, "float16", True, _ALL),
)
_WIDE_CASES = (_WIDE, _WIDE_LAST)
_ODD = Case((5, 133, 5, 5), 3, "float32", False, {"before": "hardswish", "weighted": True})


def _legal_cases(policy: str) -> tuple[Case, ...]:
    """Which of these a policy takes, on a device that has what the policy needs."""
    if "axis=space" in policy:
        return (_WIDE_LAST,)
    return (_WIDE, _WIDE_LAST) if "resident=1" in policy else (_WIDE, _WIDE_LAST, _ODD)


NATIVE_CASES = (
    *(case._replace(policy=policy) for policy in POLICIES for case in _legal_cases(policy)),
    Case((3, 20, 9, 7), 5, "float64", False, _ALL),
    Case((3, 20, 33, 31), None, "float32", False, {"lengths": True, "affine": True}),
    Case((2, 3, 70, 33), None, "float32", False, {"part": "squeeze", "lengths": True,
                                                      "affine": True}),
    Case((2, 24, 30, 33), None, "bfloat16", True, {"part": "channel_scale", "weighted": True,
                                                       **_RELU}),
    Case((2, 36, 33, 31), 5, "float32", False, {"inplace": True, "before": "silu"}),
)  # fmt: skip
# How a plan begins to say that the device, not the policy, is the reason.
NOT_HERE = (f"{PLAN}: this device has no", "an image's blocks do not run at once")


def _layers(dry: bool) -> list[Case]:
    """Of the networks, in both layouts; on the CPU few and small ones."""
    found: dict[Layer, None] = {}
    batch = 2 if dry else _LAYER_BATCH
    for name in NETWORKS:
        found |= dict.fromkeys(layer for layer, _ in load_networks()[name].layers)
    if dry:
        found = {layer: None for layer in found if layer.shape in ("240x14x14", "480x14x14")}
    return [
        Case((batch, layer.channels, layer.height, layer.width), layer.hidden,
             "bfloat16", bool(last), {"activation": layer.activation, "gate": layer.gate},
             layer=f"{layer.name} bf16 b{batch} {layout}")
        for layer in found
        for last, layout in enumerate(_LAYOUTS)
    ]  # fmt: skip


def cases(backend: str, group: str, dry: bool) -> list[Case]:
    """Of a group: the ``verdicts`` on all kernels, the CUDA kernels' by all policies, and on layers
    of networks; or the ``situations``."""
    if group == "situations":
        of = (*_WIDE_CASES, *_layers(dry)[:1])
        return [case._replace(what=what) for what in SITUATIONS for case in of]
    own = TRITON_CASES if backend == "triton" else NATIVE_CASES
    return [*own, *_layers(dry)]


class Job(NamedTuple):
    """A case, by its number in :func:`cases` of a backend and a group."""

    backend: str
    group: str
    number: int
    case: Case

    @property
    def file(self) -> str:
        """Where its verdict is."""
        return f"{self.group}-{self.backend}.json"


def jobs(backends: Sequence[str], groups: Sequence[str], dry: bool) -> list[Job]:
    """The cases of backends and groups, the most valuable first: the kernels by the plans that are
    chosen, layers among them, then by those that only a policy forces. The first calls of processes
    are before other situations: processes are new then."""
    found = [
        Job(backend, group, number, case)
        for group in groups
        for backend in backends
        for number, case in enumerate(cases(backend, group, dry))
    ]
    return sorted(found, key=lambda job: (groups.index(job.group), job.case.what != FRESH,
                                          bool(job.case.policy)))  # fmt: skip
