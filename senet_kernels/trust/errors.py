"""How far a kernel's results may be from float64: four times the promise of docs/reliability.md, by
the measure of eager PyTorch's own errors; the mean error in half precision twice."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import OF_IMAGES, Problem, Results

#: Results that have a row for each channel of an image.
IMAGES = ("y", "d x", "d residual")


class _Promise(NamedTuple):
    """Errors beside those of eager PyTorch; ``times``: how many times the mean may be as large."""

    mean: float
    mean_of_parameters: float  # of their gradients
    largest: float
    times: int


_TIMES = 4
_FLOAT32 = _Promise(1.25, 2.0, 4.0, times=_TIMES)
# Most of their error is the last rounding, which leaves little to chance.
_HALF = _Promise(1.02, 1.02, 2.0, times=2)
_FLOAT64 = 1e-12
_MANY = 256
_ROW = 16  # columns that a matrix has to be judged by rows: chance favours no row then


class _Rows(NamedTuple):
    """Of each row of a result: the largest error, its place in the whole, the largest number, the
    mean error and the mean number."""

    errors: Tensor
    places: Tensor
    sizes: Tensor
    mean_errors: Tensor
    mean_sizes: Tensor


class _Errors:
    """The errors of one result, by way of parts of the batch, and by rows: an image's channel, a
    row of a matrix of parameters, or all of what is neither."""

    def __init__(self, name: str, begins: int = 0) -> None:
        self._begins = begins  # the place of the first number
        self.count, self.total, self.size = 0, 0.0, 0.0  # numbers, their errors, their magnitudes
        self.of_image = name in IMAGES
        self.positions = 1  # numbers in a row, of an image
        self._is_matrix = name in ("d w1", "d w2")
        self._rows: list[_Rows] = []

    def add(self, value: Tensor, right: Tensor) -> None:
        if not right.numel():
            return
        apart = (value.double() - right).abs().nan_to_num(torch.inf, torch.inf)
        size = right.abs()
        if self.of_image and right.dim() > 2:
            apart, size = apart.flatten(2).flatten(0, 1), size.flatten(2).flatten(0, 1)
            self.positions = apart.shape[1]
        elif self._is_matrix and right[0].numel() >= _ROW:
            apart, size = apart.flatten(1), size.flatten(1)
        else:
            apart, size = apart.reshape(1, -1), size.reshape(1, -1)
        largest, places = apart.max(1)
        starts = torch.arange(len(apart), device=apart.device) * apart.shape[1]
        places = places + starts + self.count + self._begins
        self._rows.append(_Rows(largest, places, size.amax(1), apart.mean(1), size.mean(1)))
        self.count += right.numel()
        self.total += apart.sum().item()
        self.size += size.sum().item()

    def rows(self) -> _Rows:
        """All rows."""
        if not self._rows:
            nothing = torch.zeros(0, dtype=torch.float64)
            return _Rows(nothing, nothing.long(), nothing, nothing, nothing)
        return _Rows(*(torch.cat(parts) for parts in zip(*self._rows, strict=True)))

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def finite_mean(self) -> float:
        """The mean; 0 where it overflows, which is no measure for anything."""
        return self.mean if self.mean < float("inf") else 0.0


def compare(
    problem: Problem, results: Results, eager: Results, slack: float, first: int = 0
) -> str | None:
    """Where results are too far from float64, and how far, by the measure of what eager PyTorch
    makes of them; None where they are near enough.

    Args:
        slack: times the limits.
        first: the image to begin with; sums over the batch are compared from the first one alone.
    """
    dtype = problem.kind.call.dtype
    ours: dict[str, _Errors] = {}
    theirs: dict[str, _Errors] = {}
    for part, right in problem.oracle(first):
        for name, expected in right.values.items():
            if name not in results.values or (first and part.stop == 0):
                continue
            of_part = name in OF_IMAGES
            for errors, values in ((ours, results.values), (theirs, eager.values)):
                value = values[name][part] if of_part else values[name]
                if name not in errors:
                    begins = first * expected[:1].numel() if of_part else 0
                    errors[name] = _Errors(name, begins)
                errors[name].add(value, expected)
    for name, found in ours.items():
        too_far = _too_far(dtype, results.values[name], found, theirs[name], slack)
        if too_far is not None:
            return f"{name}{too_far}"
    return None


def _too_far(
    dtype: torch.dtype, value: Tensor, ours: _Errors, eager: _Errors, slack: float
) -> str | None:
    """Where a result is too far from float64, and how far; None where it is near enough."""
    rows, of_eager = ours.rows(), eager.rows()
    if not len(rows.errors):
        return None
    limits = _limits(dtype, value.dtype, ours, eager)
    compared = [("largest", rows.errors, limits.of_rows, of_eager.errors)]
    if limits.of_means is not None:
        compared.append(("mean", rows.mean_errors, limits.of_means, of_eager.mean_errors))
    for what, errors, most, beside in compared:
        row = int((errors / most).argmax())
        if not errors[row] <= slack * most[row]:
            place = [int(i) for i in torch.unravel_index(rows.places[row].cpu(), value.shape)]
            where = str(place) if what == "largest" else f"{place[:2]}, all positions"
            return _distance(where, what, errors[row], slack * most[row], beside[row])
    if not ours.mean <= slack * limits.mean:
        return _distance("", "mean", ours.mean, slack * limits.mean, eager.mean)
    return None


def _distance(where: str, what: str, apart: Any, limit: Any, beside: Any) -> str:
    return (
        f"{where}: {what} error {float(apart):.3g}, expected at most {float(limit):.3g} "
        f"(eager PyTorch has {float(beside):.3g})"
    )


class _Limits(NamedTuple):
    """The errors allowed: the largest and the mean of each row, and the mean of all."""

    of_rows: Tensor
    of_means: Tensor | None
    mean: float


def _limits(dtype: torch.dtype, stored: torch.dtype, ours: _Errors, eager: _Errors) -> _Limits:
    rows, sizes = eager.rows(), ours.rows().sizes
    of_eager = rows.errors.nan_to_num(posinf=0.0)  # where eager PyTorch overflows it is no measure
    largest, size = of_eager.max(), float(sizes.max())
    info = torch.finfo(stored)
    eps, least = info.eps, info.smallest_normal * info.eps  # the step below normal numbers
    promise = _FLOAT32 if dtype == torch.float32 else _HALF
    of_image = promise.mean if ours.of_image else promise.mean_of_parameters
    mean = of_image * eager.finite_mean
    many = ours.count >= _MANY
    if dtype == torch.float64:
        limit = _TIMES * _FLOAT64 * size + least
        return _Limits(torch.full_like(sizes, limit), None, limit)
    if dtype == torch.float32:
        # One limit for all rows. The numbers of a row share the error of the sums before them (a
        # gate's, say), and in eager PyTorch that error may happen to be 0 for a row. The mean of a
        # few errors may be anything that one of them may be.
        largest_of_rows = (promise.largest * largest + eps * size).expand_as(sizes)
        few = eps * size / (16 if many else 1)
        return _Limits(_TIMES * largest_of_rows + least, None, promise.times * (mean + few) + least)
    # A limit for each row: its numbers are of one size, so that a large number elsewhere does not
    # excuse an error here. What is added is for approximated functions, whose error is absolute.
    of_all = ours.size / ours.count
    few = eps * of_all / (16 if many else 2)
    of_rows = _TIMES * (promise.largest * of_eager + eps * sizes)
    of_means = None
    if ours.positions >= _MANY:
        near = promise.mean * rows.mean_errors.nan_to_num(posinf=0.0) + eps * rows.mean_sizes / 4
        of_means = promise.times * near + torch.finfo(dtype).eps * of_all / 8 + least
    return _Limits(
        of_rows + torch.finfo(dtype).eps * size / 4 + least,
        of_means,
        promise.times * (mean + few) + least,
    )
