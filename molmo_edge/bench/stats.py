"""Numbers about series of numbers: summaries, intervals, and where warm-up ends.

This module knows nothing about models, clocks, files or printing. Every random draw is seeded,
so the same samples always give the same report.

Two rules are used by every benchmark row and are quoted in every report:

* :data:`STEADY_RULE`: which iterations are warm-up and which are the steady state;
* :data:`STOP_RULE`: when a row has been measured often enough.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_CHANGE = 0.03
"""Speeds closer than this (relative) count as one level: a smaller step decides nothing."""

MIN_SEGMENT = 3
"""A level needs this many iterations; only the first level, the cold one, may be shorter."""

MIN_STEADY = 4
"""A steady state is claimed from this many iterations upwards."""

PENALTY = 2.0
"""Cost of one more level, in units of ``log(n) + 1`` noise scales; see ``steady_state``."""

NOISE_FLOOR = 0.003
"""Smallest relative noise assumed, so that a nearly perfect series is not cut at every ripple."""

STEADY_RULE = (
    "The logarithm of decode speed by iteration is cut into constant levels, least absolute "
    "deviations from each level's median plus a penalty per level, noise taken from successive "
    f"differences; levels closer than {MIN_CHANGE:.0%} are joined. The last level is the steady "
    f"state if it holds at least {MIN_STEADY} iterations; all before it is warm-up."
)
STOP_RULE = (
    "A row ends once it has its least number of iterations and the {confidence:.0%} interval of "
    "the mean steady decode speed is within ±{width:.1%} of it; otherwise at its largest number "
    "of iterations or when the time limit is spent."
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One series in numbers; in the unit of the series.

    ``std`` is the sample deviation (n - 1). ``p50``, ``p90``, ``p99`` interpolate linearly
    between order statistics; ``median`` is p50 under its other name. ``ci_low``/``ci_high``
    bound the mean at ``confidence``. What needs more samples than there are is ``None``.
    """

    n: int
    mean: float
    median: float
    std: float | None
    min: float
    max: float
    p50: float
    p90: float
    p99: float
    ci_low: float | None
    ci_high: float | None
    confidence: float


@dataclass(frozen=True, slots=True)
class Steady:
    """Where the steady state of a series begins, by :data:`STEADY_RULE`.

    ``levels`` are (first index, median) pairs. ``start`` is the first steady index, or ``None``
    when the series never settled (the last level is too short).
    """

    start: int | None
    levels: tuple[tuple[int, float], ...]

    @property
    def slowed(self) -> bool:
        """True if the steady level lies below an earlier one (throttling, for example)."""
        medians = [median for _, median in self.levels]
        return bool(medians) and max(medians) > medians[-1] * (1 + MIN_CHANGE)


def summarize(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Summary | None:
    """Summary of ``values``, ``None`` for an empty series.

    Raises:
        ValueError: a value is not finite.
    """
    series = _finite(values)
    if series.size == 0:
        return None
    interval = mean_interval(values, confidence=confidence, seed=seed)
    p50, p90, p99 = (float(q) for q in np.percentile(series, [50, 90, 99]))
    return Summary(
        n=int(series.size),
        mean=float(series.mean()),
        median=p50,
        std=float(series.std(ddof=1)) if series.size > 1 else None,
        min=float(series.min()),
        max=float(series.max()),
        p50=p50,
        p90=p90,
        p99=p99,
        ci_low=interval[0] if interval else None,
        ci_high=interval[1] if interval else None,
        confidence=confidence,
    )


def mean_interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 4000,
) -> tuple[float, float] | None:
    """Bootstrap-t interval of the mean, ``None`` below three values.

    The studentised bootstrap keeps its coverage at the 5 to 10 samples a benchmark row has,
    where the plain percentile bootstrap is too narrow (Efron and Tibshirani, 1993, ch. 12).
    """
    series = _finite(values)
    n = series.size
    if n < 3:
        return None
    mean, error = float(series.mean()), float(series.std(ddof=1)) / math.sqrt(n)
    if error <= abs(mean) * 1e-12:
        return mean, mean
    draws = series[np.random.default_rng(seed).integers(0, n, size=(resamples, n))]
    errors = draws.std(axis=1, ddof=1) / math.sqrt(n)
    # A resample of equal values has no error to studentise by and says nothing.
    usable = errors > error * 1e-6
    t = (draws.mean(axis=1)[usable] - mean) / errors[usable]
    tail = (1 - confidence) / 2
    high_t, low_t = np.quantile(t, [1 - tail, tail])
    return mean - float(high_t) * error, mean - float(low_t) * error


def ratio_interval(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 4000,
) -> tuple[float, float, float] | None:
    """(ratio of means, low, high) by percentile bootstrap; ``None`` below three values a side.

    Series of equal length are taken as pairs measured in turns, and resampled as pairs, which
    keeps slow drift of the machine out of the interval.
    """
    top, bottom = _finite(numerator), _finite(denominator)
    if min(top.size, bottom.size) < 3 or bottom.mean() == 0:
        return None
    rng = np.random.default_rng(seed)
    first = rng.integers(0, top.size, size=(resamples, top.size))
    paired = top.size == bottom.size
    second = first if paired else rng.integers(0, bottom.size, size=(resamples, bottom.size))
    bottoms = bottom[second].mean(axis=1)
    ratios = top[first].mean(axis=1)[bottoms != 0] / bottoms[bottoms != 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(top.mean() / bottom.mean()), float(low), float(high)


def steady_state(speeds: Sequence[float]) -> Steady:
    """Find warm-up and steady state in decode speeds by iteration (:data:`STEADY_RULE`).

    Raises:
        ValueError: a speed is not finite or not above 0.
    """
    series = _finite(speeds)
    if series.size and series.min() <= 0:
        raise ValueError("speeds must be above 0")
    if series.size == 0:
        return Steady(None, ())
    logs = np.log(series)
    bounds = _joined(logs, _cut(logs))
    levels = tuple(
        (start, float(np.median(series[start:end]))) for start, end in _segments(bounds, logs.size)
    )
    start = levels[-1][0]
    return Steady(start if logs.size - start >= MIN_STEADY else None, levels)


def narrow_enough(
    steady: Sequence[float], *, width: float, confidence: float = 0.95, seed: int = 0
) -> bool:
    """True if the interval of the mean lies within ``width`` (relative) of it on both sides."""
    if len(steady) < MIN_STEADY:
        return False
    interval = mean_interval(steady, confidence=confidence, seed=seed)
    mean = float(np.mean(steady))
    if interval is None or mean == 0:
        return False
    return max(mean - interval[0], interval[1] - mean) <= width * abs(mean)


def _finite(values: Sequence[float]) -> np.ndarray:
    series = np.asarray(values, dtype=np.float64)
    if not np.isfinite(series).all():
        raise ValueError("values must be finite numbers")
    return series


def _noise(logs: np.ndarray) -> float:
    """Relative noise of a series with few steps in it: median |difference| / (0.6745·√2)."""
    if logs.size < 2:
        return NOISE_FLOOR
    return max(float(np.median(np.abs(np.diff(logs)))) / (0.6745 * math.sqrt(2)), NOISE_FLOOR)


def _cut(logs: np.ndarray) -> list[int]:
    """Starts of the optimal levels after the first (dynamic programming, O(n²) segments)."""
    n = logs.size
    penalty = PENALTY * (math.log(n) + 1)
    scale = _noise(logs)
    best = [0.0] + [math.inf] * n  # best[j]: least cost of logs[:j]
    previous = [0] * (n + 1)
    for start in range(n):
        if math.isinf(best[start]):
            continue
        ordered: list[float] = []
        for end in range(start + 1, n + 1):
            insort(ordered, float(logs[end - 1]))
            if start > 0 and end - start < MIN_SEGMENT:
                continue
            middle = len(ordered) // 2
            spread = sum(ordered[-middle:]) - sum(ordered[:middle]) if middle else 0.0
            cost = best[start] + spread / scale + (penalty if start else 0.0)
            if cost < best[end]:
                best[end], previous[end] = cost, start
    cuts: list[int] = []
    at = n
    while at > 0:
        at = previous[at]
        if at:
            cuts.append(at)
    return cuts[::-1]


def _joined(logs: np.ndarray, cuts: list[int]) -> list[int]:
    """Drop, closest pair first, every cut whose two levels differ by less than MIN_CHANGE."""
    kept = list(cuts)
    while kept:
        medians = [float(np.median(logs[a:b])) for a, b in _segments(kept, logs.size)]
        steps = [abs(b - a) for a, b in itertools.pairwise(medians)]
        smallest = min(range(len(steps)), key=steps.__getitem__)
        if steps[smallest] >= math.log1p(MIN_CHANGE):
            break
        del kept[smallest]
    return kept


def _segments(cuts: Sequence[int], n: int) -> list[tuple[int, int]]:
    edges = [0, *cuts, n]
    return list(itertools.pairwise(edges))
