"""A quick check of an installation: each backend that runs here against float64 arithmetic.

For people who doubt their build or their driver. It is no test suite: a few dozen cases, forward
and every gradient, in a few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import features
from .api import squeeze_excite
from .dispatch import BackendUnavailableError, backends

_SHAPES = ((2, 32, 7, 7), (3, 17, 5, 11), (1, 64, 14, 14))
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "silu", "gate": "hardsigmoid", "before": "silu"},
    {"after": "relu", "residual": True},
)
#: Largest difference, relative to the largest value: a few roundings of the dtype.
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 6e-3,
    torch.float64: 1e-11,
}


class Result(NamedTuple):
    """One backend, device and dtype: the worst case's error, or what went wrong."""

    backend: str
    device: str
    dtype: torch.dtype
    cases: int
    error: float
    failure: str | None

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return self.failure is None

    def __str__(self) -> str:
        what = f"{self.backend} on {self.device}, {str(self.dtype).removeprefix('torch.')}"
        if self.failure is not None:
            return f"FAILED  {what}: {self.failure}"
        return f"passed  {what}: {self.cases} cases, largest error {self.error:.1e}"


def run() -> Iterator[Result]:
    """One result per backend, device and dtype that should work here."""
    available = backends().available
    columns = [("reference", "cpu"), *features.COLUMNS]
    if torch.cuda.is_available():
        columns.insert(1, ("reference", "cuda"))
    for backend, device in columns:
        if available[backend] and (device == "cpu" or torch.cuda.is_available()):
            for dtype in _TOLERANCE:
                yield _check(backend, device, dtype)


def _check(backend: str, device: str, dtype: torch.dtype) -> Result:
    cases, worst = 0, 0.0
    try:
        for shape in _SHAPES:
            for options in _OPTIONS:
                for last in (False, True):
                    cases += 1
                    worst = max(worst, _error(backend, device, dtype, shape, dict(options), last))
    except BackendUnavailableError as error:
        return Result(backend, device, dtype, cases, worst, str(error))
    except Exception as error:  # a crash of a kernel or a compiler is what this is to find
        return Result(backend, device, dtype, cases, worst, f"{type(error).__name__}: {error}")
    wrong = None if worst <= _TOLERANCE[dtype] else f"error {worst:.1e} of the largest value"
    return Result(backend, device, dtype, cases, worst, wrong)


def _error(
    backend: str,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    options: dict[str, Any],
    channels_last: bool,
) -> float:
    """Largest error of the output and the gradients, each relative to its largest value."""
    generator = torch.Generator().manual_seed(shape[1])
    channels, hidden = shape[1], max(1, shape[1] // 4)

    def rand(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(dtype)  # what both sides start from

    inputs = {
        "x": rand(*shape), "w1": rand(hidden, channels), "b1": rand(hidden),
        "w2": rand(channels, hidden), "b2": rand(channels),
    }  # fmt: skip
    if options.pop("residual", False):
        inputs["residual"] = rand(*shape)
    dy = rand(*shape)

    def step(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: t.to(device, dtype).requires_grad_() for n, t in inputs.items()}
        x = leaves["x"]
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        rest: dict[str, Any] = {n: t for n, t in leaves.items() if n != "x"}
        y = squeeze_excite(x, **rest, **options, backend=backend)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(device, dtype))
        return [t.detach().cpu().double() for t in (y, *gradients)]

    right = step("reference", "cpu", torch.float64)
    actual = step(backend, device, dtype)
    return max(
        ((a - r).abs().max() / r.abs().max().clamp_min(1e-30)).nan_to_num(torch.inf).item()
        for a, r in zip(actual, right, strict=True)
    )
