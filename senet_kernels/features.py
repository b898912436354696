"""The feature table: what each backend fuses, and what it leaves to the fallback.

This table is the decision: dispatch asks it, ``backends()`` and ``explain()`` print it, and a
test exercises every cell. A backend adds a column; a feature adds a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import triton
from .pointwise import ACTIVATIONS, GATES, Options

FUSED = "fused"
FALLS_BACK = "falls back"  # auto: to the fallback; asked for by name: raises, saying why

#: Columns: (backend, device type). Triton has one for the CPU under its interpreter.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("native", "cpu"),
    ("native", "cuda"),
    *(("triton", device) for device in triton.DEVICES),
)

_ROWS: tuple[str, ...] = (
    "dtype float32",
    "dtype bfloat16",
    "dtype float16",
    "dtype float64",
    "parameters in float32 under autocast",
    "two layers",
    "single layer (w1=None)",
    "squeeze alone",
    "channel_scale alone",
    "scale-and-shift (w2 with 2C rows)",
    "alpha, beta",
    "before_affine",
    "lengths",
    "residual",
    "inplace",
    *(f"activation {name}" for name in ACTIVATIONS),
    *(f"gate {name}" for name in GATES),
    *(f"before {name}" for name in ACTIVATIONS),
    *(f"after {name}" for name in ACTIVATIONS),
)

#: Every backend fuses everything. Cells of one that does not are changed below this line, as by
#: ``FEATURES["lengths"] = (FUSED, FALLS_BACK, ...)``, a cell per column.
FEATURES: dict[str, tuple[str, ...]] = dict.fromkeys(_ROWS, (FUSED,) * len(COLUMNS))


# What the kernels for a GPU count in: positions and columns of u in 32 bits, with a tile to spare,
# and units of eight elements of an image likewise. On a CPU all is counted in 64 bits.
_MOST_POSITIONS, _MOST_CHANNELS, _MOST_ELEMENTS = 1 << 30, 1 << 29, (1 << 34) - 1
_HUGE = (
    f"images of more than {_MOST_ELEMENTS:,} elements, {_MOST_POSITIONS:,} positions or "
    f"{_MOST_CHANNELS:,} channels"
)
#: Images of so many elements are not, whatever their shape: nearly all images there are.
NEVER_HUGE = min(_MOST_POSITIONS, _MOST_CHANNELS, _MOST_ELEMENTS)


# A block of the CUDA kernels has vectors of all hidden channels and of its share of the channels in
# shared memory. Up to this many bytes, so weighed, there is a plan for every GPU since sm_75, which
# has least; tests/test_launch_plans.py tries.
_MOST_SHARED, HIDDEN_WEIGHS = 263_000, 13

#: Channels, and hidden channels so weighed: two layers of no more are not wide, in any dtype.
NEVER_WIDE = _MOST_SHARED // 8


def is_wide(x: Tensor, inner: int, outputs: int, affine: bool) -> bool:
    """Whether a call has more channels than the CUDA kernels have room for.

    ``inner`` is R, C for a single layer, 0 for a half of the operation; ``outputs`` is C or 2C.
    """
    channels, size = x.shape[1], 8 if x.dtype == torch.float64 else 4
    if outputs != channels:
        inner *= 2
    vectors = HIDDEN_WEIGHS * inner + outputs + (channels if affine else 0)
    if size * vectors > _MOST_SHARED:  # noqa: SIM103 (with symbolic shapes the condition is a symbol)
        return True
    return False


def is_huge(x: Tensor) -> bool:
    """Whether an image of x is beyond what the kernels for a GPU count in."""
    # Not by x.numel(): torch.export would bind a dynamic batch to it.
    shape = x.shape
    elements = channels = shape[1]
    for extent in shape[2:]:
        elements *= extent
    if elements <= NEVER_HUGE:
        return False
    if elements > _MOST_ELEMENTS or channels > _MOST_CHANNELS:
        return True
    if elements > channels * _MOST_POSITIONS:  # noqa: SIM103 (as above)
        return True
    return False


class Call(NamedTuple):
    """The static properties of one call: all that the choice of a backend depends on."""

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    options: Options
    form: str  # which part, by which excitation: a row of the table
    shift: bool
    weighted: bool  # alpha or beta given
    affine: bool
    lengths: bool
    residual: bool
    inplace: bool
    huge: bool = False  # see is_huge
    wide: bool = False  # see is_wide
    subclass: str | None = None  # whose operators are its own, see tensors.wrapper_class

    @property
    def operands(self) -> frozenset[str]:
        """The optional arguments that a plan of the kernels may depend on, of those given."""
        names = (
            (self.affine, "before_affine"), (self.lengths, "lengths"), (self.residual, "residual"),
        )  # fmt: skip
        return frozenset(name for given, name in names if given)


def required_features(call: Call) -> list[str]:
    """The rows of the table that a call needs."""
    names = [f"dtype {str(call.dtype).removeprefix('torch.')}"]
    if call.param_dtype != call.dtype:
        names.append("parameters in float32 under autocast")
    names.append(call.form)
    optional = (
        (call.shift, "scale-and-shift (w2 with 2C rows)"),
        (call.weighted, "alpha, beta"),
        (call.affine, "before_affine"),
        (call.lengths, "lengths"),
        (call.residual, "residual"),
        (call.inplace, "inplace"),
    )
    names += [name for wanted, name in optional if wanted]
    names += [f"{argument} {name}" for argument, name in call.options._asdict().items()]
    return names


def missing_feature(backend: str, call: Call) -> str | None:
    """Why the table says ``backend`` does not take this call; None when it does."""
    # What is about extents may be of symbols, which are asked outside of what Dynamo keeps.
    facts = (False if not fact else True for fact in call[5:11])  # noqa: SIM211
    missing = _missing_in_table(
        backend, call.device, call.dtype, call.param_dtype, *call.options, call.form, *facts,
        call.subclass,
    )  # fmt: skip
    if missing is None and call.huge and (backend, call.device) != ("native", "cpu"):
        return f"it does not take {_HUGE}"
    if missing is None and call.wide and (backend, call.device) == ("native", "cuda"):
        return "it does not take so many channels and hidden channels: they exceed shared memory"
    return missing


def _missing_in_table(backend: str, *properties: Any) -> str | None:
    options, rest = Options(*properties[3:7]), properties[7:-1]
    call = Call._make((*properties[:3], options, *rest, False, False, properties[-1]))
    if call.subclass is not None:
        return f"it has no kernels for tensors of class {call.subclass}"
    if (backend, call.device) not in COLUMNS:
        return f"it has no kernels for device type {call.device!r}"
    column = COLUMNS.index((backend, call.device))
    for name in required_features(call):
        if name not in FEATURES:
            return f"it does not support {name}"
        if FEATURES[name][column] != FUSED:
            return f"it has no fused kernel for: {name}"
    return None


# Of the table and the call alone: Dynamo keeps the answer, as of torch.compiler's
# assume_constant_result, in place of guards on the table before each compiled call.
_missing_in_table._dynamo_marked_constant = True  # type: ignore[attr-defined]


def format_table() -> str:
    """The feature table as text: what every backend fuses, and a line for each exception."""
    fused = [name for name, cells in FEATURES.items() if set(cells) == {FUSED}]
    families = ("dtype", "activation", "gate", "before", "after")
    by_family: dict[str, list[str]] = {}
    for name in fused:
        family, _, function = name.partition(" ")
        if family in families and function:
            by_family.setdefault(family, []).append(function)
        else:
            by_family.setdefault("", []).append(name)
    shared: dict[str, list[str]] = {}  # the functions, and who takes them
    for family, functions in by_family.items():
        shared.setdefault(", ".join(functions), []).append(family)
    columns = ", ".join(f"{backend} ({device})" for backend, device in COLUMNS)
    lines = [f"fused by {columns}; computed by fallback and reference:"]
    lines += [
        f"  {', '.join(takers)}{': ' if any(takers) else ''}{functions}"
        for functions, takers in shared.items()
    ]
    for name, cells in FEATURES.items():
        for (backend, device), cell in zip(COLUMNS, cells, strict=True):
            if cell != FUSED:
                lines.append(f"not by {backend} ({device}), which {cell}: {name}")
    return "\n".join(lines)
