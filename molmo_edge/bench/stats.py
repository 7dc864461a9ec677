"""Statistics of measured series: summaries, confidence intervals, and the steady state.

Every random draw is seeded, so the same samples always give the same report. :data:`STEADY_RULE`
and :data:`STOP_RULE` apply to every row and are quoted in every report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from molmo_edge.bench.document import Level, Summary, Warmup

MIN_CHANGE = 0.03
"""Levels closer than this (relative) count as one."""

MIN_SEGMENT = 3
"""A level needs this many iterations; only the first one, the cold one, may be shorter."""

MIN_STEADY = 4
"""A steady state needs this many iterations."""

PENALTY = 2.5
"""Gain a split must bring, in units of ``log(n) + 1`` noise scales."""

NOISE_FLOOR = 0.003
"""Smallest relative noise assumed, so that a nearly constant series is not split."""

STEADY_RULE = (
    "The logarithm of decode speed by iteration is split in two where the absolute deviations from "
    "the two medians are smallest, and each part again, while a split gains more than a multiple "
    "of the noise (taken from successive differences) and the medians differ by at least "
    f"{MIN_CHANGE:.0%}. The last part is the steady state if it holds at least {MIN_STEADY} "
    "iterations; all before it is warm-up."
)
STOP_RULE = (
    "A row ends once it has its minimum number of iterations and the {confidence:.0%} interval of "
    "the mean steady decode speed is within ±{width:.1%} of it; otherwise at its maximum number "
    "of iterations or when the time limit is spent."
)


def summarize(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Summary | None:
    """Summarize a series in its own unit; ``None`` for an empty series.

    ``std`` is the sample deviation (n - 1), percentiles interpolate linearly, and the interval
    bounds the mean. What needs more samples than there are is ``None``.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    series = _finite(values)
    if series.size == 0:
        return None
    low, high = mean_interval(values, confidence=confidence, seed=seed) or (None, None)
    p50, p90, p99 = (float(q) for q in np.percentile(series, [50, 90, 99]))
    return Summary(
        n=series.size,
        mean=float(series.mean()),
        median=p50,
        std=float(series.std(ddof=1)) if series.size > 1 else None,
        min=float(series.min()),
        max=float(series.max()),
        p50=p50,
        p90=p90,
        p99=p99,
        ci_low=low,
        ci_high=high,
        confidence=confidence,
    )


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Bootstrap-t interval of the mean, ``None`` below three values.

    The studentised bootstrap keeps its coverage at the 5 to 10 samples a row has, where the plain
    percentile bootstrap is too narrow (Efron and Tibshirani, 1993, ch. 12).
    """
    series = _finite(values)
    if series.size < 3:
        return None
    mean, error = float(series.mean()), float(series.std(ddof=1)) / math.sqrt(series.size)
    if error <= abs(mean) * 1e-12:
        return mean, mean
    draws = np.random.default_rng(seed).choice(series, (2000, series.size))
    errors = draws.std(axis=1, ddof=1) / math.sqrt(series.size)
    usable = errors > error * 1e-6  # a draw of equal values has no error to divide by
    t = (draws.mean(axis=1)[usable] - mean) / errors[usable]
    low, high = np.quantile(t, [(1 - confidence) / 2, (1 + confidence) / 2])
    return mean - float(high) * error, mean - float(low) * error


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float] | None:
    """(ratio of means, low, high) at 95 % by bootstrap; ``None`` below three values on a side."""
    top, bottom = _finite(numerator), _finite(denominator)
    if min(top.size, bottom.size) < 3 or bottom.min() <= 0:
        return None
    rng = np.random.default_rng(seed)
    tops, bottoms = (rng.choice(x, (4000, x.size)).mean(axis=1) for x in (top, bottom))
    low, high = np.quantile(tops / bottoms, [0.025, 0.975])
    return float(top.mean() / bottom.mean()), float(low), float(high)


def steady_state(speeds: Sequence[float]) -> Warmup:
    """Find warm-up and steady state in speeds by iteration (:data:`STEADY_RULE`).

    Raises:
        ValueError: a speed is NaN, infinite or not above 0.
    """
    series = _finite(speeds)
    if series.size == 0:
        return Warmup(start=None, levels=[], slowed=False)
    if series.min() <= 0:
        raise ValueError("speeds must be above 0")
    logs = np.log(series)
    steps = np.abs(np.diff(logs))
    # Median |difference| of normal noise is 0.6745·√2 deviations.
    noise = max(float(np.median(steps)) / 0.954 if steps.size else 0.0, NOISE_FLOOR)
    edges = [0, *_splits(logs, 0, PENALTY * (math.log(logs.size) + 1) * noise), logs.size]
    medians = [float(np.median(series[a:b])) for a, b in itertools.pairwise(edges)]
    return Warmup(
        start=edges[-2] if logs.size - edges[-2] >= MIN_STEADY else None,
        levels=[Level(start=at, median=m) for at, m in zip(edges, medians, strict=False)],
        slowed=max(medians) > medians[-1] * (1 + MIN_CHANGE),
    )


def narrow_enough(
    steady: Sequence[float], *, width: float, confidence: float = 0.95, seed: int = 0
) -> bool:
    """Whether the interval of the mean lies within ``width`` (relative) of it on both sides."""
    interval = mean_interval(steady, confidence=confidence, seed=seed)
    if interval is None or len(steady) < MIN_STEADY:
        return False
    mean = float(np.mean(steady))
    return max(mean - interval[0], interval[1] - mean) <= width * abs(mean)


def _splits(logs: np.ndarray, offset: int, penalty: float) -> list[int]:
    """Indices at which levels begin, the first level's apart (binary segmentation)."""
    cuts = range(MIN_SEGMENT if offset else 1, logs.size - MIN_SEGMENT + 1)
    if not cuts:
        return []
    costs = [_spread(logs[:at]) + _spread(logs[at:]) for at in cuts]
    at = cuts[int(np.argmin(costs))]
    step = abs(float(np.median(logs[at:]) - np.median(logs[:at])))
    if _spread(logs) - min(costs) <= penalty or step < math.log1p(MIN_CHANGE):
        return []
    left = _splits(logs[:at], offset, penalty)
    return [*left, offset + at, *_splits(logs[at:], offset + at, penalty)]


def _spread(logs: np.ndarray) -> float:
    return float(np.abs(logs - np.median(logs)).sum())


def _finite(values: Sequence[float]) -> np.ndarray:
    series = np.asarray(values, dtype=np.float64)
    if not np.isfinite(series).all():
        raise ValueError("values must not contain NaN or infinity")
    return series
