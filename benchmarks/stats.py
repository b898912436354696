"""Statistics of interleaved samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from senet_kernels._libraries import load


def summarise(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles and a 95 % confidence interval of the median, in microseconds.

    The interval comes from order statistics (binomial ranks), so it assumes no distribution.
    """
    np = load("numpy")
    ordered = np.sort(np.asarray(seconds)) * 1e6
    n = len(ordered)
    spread = 1.96 * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - spread))
    high = min(n - 1, math.ceil(n / 2 + spread))
    q1, median, q3 = np.percentile(ordered, [25, 50, 75])
    return {
        "samples": n,
        "median_us": float(median),
        "q1_us": float(q1),
        "q3_us": float(q3),
        "ci_low_us": float(ordered[low]),
        "ci_high_us": float(ordered[high]),
        "min_us": float(ordered[0]),
    }


def speedup(
    baseline: Sequence[float], contender: Sequence[float], seed: int = 0
) -> dict[str, float]:
    """Ratio of medians, baseline over contender, with a bootstrap 95 % interval.

    Rounds are resampled together, because both were measured in the same rounds.
    """
    np = load("numpy")
    a, b = np.asarray(baseline), np.asarray(contender)
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    rows = np.random.default_rng(seed).integers(0, n, (1000, n))
    ratios = np.median(a[rows], axis=1) / np.median(b[rows], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "ratio": float(np.median(a) / np.median(b)),
        "ci_low": float(low),
        "ci_high": float(high),
    }


def geomean(values: Sequence[float]) -> float:
    """Geometric mean; NaN when empty."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
