"""Statistics of interleaved samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from statistics import median

_RESAMPLED = 1000


def summarise(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and a 95 % confidence interval of the median, in microseconds.

    The interval comes from order statistics (binomial ranks), so it assumes no distribution.
    """
    ordered = sorted(s * 1e6 for s in seconds)
    n = len(ordered)
    spread = 1.96 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - spread))
    high = min(n - 1, math.ceil(n / 2 + spread))
    return {
        "samples": n,
        "median_us": _quantile(ordered, 0.5),
        "q1_us": _quantile(ordered, 0.25),
        "q3_us": _quantile(ordered, 0.75),
        "ci_low_us": ordered[low],
        "ci_high_us": ordered[high],
        "min_us": ordered[0],
    }


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Between the two samples that the place falls between, in proportion."""
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def speedup(
    baseline: Sequence[float], contender: Sequence[float], seed: int = 0
) -> dict[str, float]:
    """Ratio of medians, baseline over contender, with a bootstrap 95 % interval.

    Rounds are resampled together, because both were measured in the same rounds.
    """
    pairs = list(zip(baseline, contender, strict=False))

    def ratio(rounds: Sequence[tuple[float, float]]) -> float:
        return median(a for a, _ in rounds) / median(b for _, b in rounds)

    random = Random(seed)
    ratios = sorted(ratio(random.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLED))
    return {
        "ratio": ratio(pairs),
        "ci_low": _quantile(ratios, 0.025),
        "ci_high": _quantile(ratios, 0.975),
    }


def geomean(values: Sequence[float]) -> float:
    """Geometric mean; NaN when empty."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
