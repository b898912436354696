"""The one table of pointwise functions: every activation, gate, ``before`` and ``after`` step.

To add a function, add a row here and one branch to ``evaluate`` in each twin
(``csrc/cpu/pointwise.h``, ``csrc/cuda/pointwise.cuh``, ``backends/triton/pointwise.py``).
CONTRIBUTING.md has a worked example. ``code`` is what ops and C++ receive (the build writes
``csrc/pointwise_codes.h``); it is never reused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pointwise(NamedTuple):
    """One row: the number kernels know it by, where it may stand, and its definition.

    ``in_place`` computes the same over its argument. ``eager`` is one operator of PyTorch that is
    cheaper than the definition and differs from it in rounding.
    """

    code: int
    is_activation: bool
    is_gate: bool
    fn: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor] | None = None
    eager: Callable[[Tensor], Tensor] | None = None


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _hardsigmoid(x: Tensor) -> Tensor:
    # F.hardsigmoid's float64 derivative uses a float32 1/6; this one is exact.
    return F.relu6(x + 3.0) / 6.0


def _hardsigmoid_02(x: Tensor) -> Tensor:
    # Keras' and Paddle's slope: clamp(0.2 x + 0.5, 0, 1); torch's hardsigmoid has slope 1/6.
    y = 0.2 * x + 0.5
    # Exactly at its ends the slope is 0.2, as in the kernels: that of clamp is so up to torch 2.14.
    return torch.where((y >= 0) & (y <= 1), y, torch.clamp(y, 0.0, 1.0))


def _over(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of ``torch.nn.functional`` in place."""
    return partial(fn, inplace=True)


_GELU_ = torch.ops.aten.gelu_

POINTWISE: dict[str, Pointwise] = {
    #                           code  activation gate   definition, in place, eager
    "identity": Pointwise(0, True, True, _identity, _identity),
    "relu": Pointwise(1, True, True, F.relu, _over(F.relu)),
    "relu6": Pointwise(2, True, False, F.relu6, _over(F.relu6)),
    "silu": Pointwise(3, True, False, F.silu, _over(F.silu)),
    "gelu": Pointwise(4, True, False, F.gelu, _GELU_),
    "gelu_tanh": Pointwise(5, True, False, _gelu_tanh, partial(_GELU_, approximate="tanh")),
    "hardswish": Pointwise(6, True, False, F.hardswish, _over(F.hardswish)),
    "leaky_relu": Pointwise(7, True, False, F.leaky_relu, _over(F.leaky_relu)),  # slope 0.01
    "mish": Pointwise(8, True, False, F.mish, _over(F.mish)),
    "sigmoid": Pointwise(9, False, True, torch.sigmoid),
    "hardsigmoid": Pointwise(10, False, True, _hardsigmoid, None, F.hardsigmoid),
    "hardsigmoid_02": Pointwise(11, False, True, _hardsigmoid_02),
    "tanh": Pointwise(12, False, True, torch.tanh),
}

ACTIVATIONS: tuple[str, ...] = tuple(n for n, row in POINTWISE.items() if row.is_activation)
GATES: tuple[str, ...] = tuple(n for n, row in POINTWISE.items() if row.is_gate)

_NAMES: dict[int, str] = {row.code: name for name, row in POINTWISE.items()}


class Options(NamedTuple):
    """The four pointwise choices of one call, by name."""

    activation: str
    gate: str
    before: str
    after: str

    @property
    def after_again(self) -> bool:
        """Whether a backward pass computes the argument of ``after`` again, for which it reads x
        and the residual: not for identity, and relu keeps a bit mask."""
        return self.after not in ("identity", "relu")


def check_name(argument: str, value: str | None) -> str:
    """Return the table's name for ``value`` (``None`` is ``"identity"``).

    Raises:
        TypeError: ``value`` is neither a string nor None.
        ValueError: the table has no such function for this argument.
    """
    if value is None:
        return "identity"
    if not isinstance(value, str):
        raise TypeError(
            f"{argument}: expected the name of a function, got {type(value).__name__} {value!r}"
        )
    legal = GATES if argument == "gate" else ACTIVATIONS
    if value not in legal:
        raise ValueError(f"{argument}: expected one of {', '.join(legal)} or None, got {value!r}")
    return value


def pack(options: Options) -> int:
    """The integer that ops and kernels take: four bits each, activation lowest."""
    return _pack(*options)


def _pack(*names: str) -> int:
    code = 0
    for position, name in enumerate(names):
        code |= POINTWISE[name].code << (4 * position)
    return code


# Dynamo keeps the result, without guards on the table.
_pack._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unpack(code: int) -> Options:
    """Inverse of :func:`pack`."""
    return Options(*(_NAMES[(code >> (4 * position)) & 15] for position in range(4)))
