"""Statistics of measured series: summaries, confidence intervals, and the steady state.

Every random draw is seeded, so the same samples always give the same report. :data:`RULES` apply
to every row and are quoted in every report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from molmo_edge.bench.document import Summary, Warmup

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
WIDTH = 0.02
"""A row is precise enough once its interval is no wider than this to either side, relative to the
mean."""

MIN_STEADY = 4
"""A steady state needs this many iterations."""

TOLERANCE = 0.10
"""Speeds of a warm engine scatter by up to 9 % on a busy machine; what warm-up costs is more: the
cold iterations of the 2025 report were 45 % slower."""

RULES = {
    "steady": "The level of a row is the median decode speed of the second half of its iterations. "
    f"The steady state begins with the first iteration within {TOLERANCE:.0%} of that level, and "
    f"needs at least {MIN_STEADY} iterations; all before it is warm-up.",
    "stop": "A row ends as narrow once it has its minimum number of iterations and the "
    f"{CONFIDENCE:.0%} interval of the mean steady decode speed is within ±{WIDTH:.0%} of it; "
    "otherwise as cap at its maximum number of iterations, or as time when its part of the "
    "scenario's time limit is spent.",
}


def summarize(values: Sequence[float]) -> Summary | None:
    """Summarize a series in its own unit; what needs more samples than there are is ``None``.

    ``std`` is the sample deviation (n - 1), and the interval bounds the mean.
    """
    series = np.asarray(values, dtype=float)
    if not series.size:
        return None
    low, high = mean_interval(values) or (None, None)
    median, p90, p99 = (float(q) for q in np.percentile(series, [50, 90, 99]))
    return Summary(
        n=series.size,
        mean=float(series.mean()),
        median=median,
        std=float(series.std(ddof=1)) if series.size > 1 else None,
        min=float(series.min()),
        max=float(series.max()),
        p90=p90,
        p99=p99,
        ci_low=low,
        ci_high=high,
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bootstrap-t interval of the mean, ``None`` below three values.

    The studentised bootstrap keeps its coverage at the 5 to 10 samples a row has, where the plain
    percentile bootstrap is too narrow (Efron and Tibshirani, 1993, ch. 12).
    """
    series = np.asarray(values, dtype=float)
    if series.size < 3:
        return None
    mean, error = float(series.mean()), float(series.std(ddof=1)) / math.sqrt(series.size)
    draws = np.random.default_rng(0).choice(series, (2000, series.size))
    errors = draws.std(axis=1, ddof=1) / math.sqrt(series.size)
    usable = errors > error * 1e-6  # a draw of equal values has no error to divide by
    if not usable.any():
        return mean, mean
    t = (draws.mean(axis=1)[usable] - mean) / errors[usable]
    low, high = np.quantile(t, TAILS)
    return mean - float(high) * error, mean - float(low) * error


def ratio_interval(
    numerator: Sequence[float], denominator: Sequence[float]
) -> tuple[float, float, float] | None:
    """(ratio of means, low, high) by bootstrap; ``None`` below three values on a side."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if min(top.size, bottom.size) < 3:
        return None
    rng = np.random.default_rng(0)
    tops, bottoms = (rng.choice(x, (4000, x.size)).mean(axis=1) for x in (top, bottom))
    low, high = np.quantile(tops / bottoms, TAILS)
    return float(top.mean() / bottom.mean()), float(low), float(high)


def steady_state(speeds: Sequence[float]) -> Warmup:
    """Warm-up and steady state of speeds by iteration, by the rule in :data:`RULES`.

    ``slowed``: at least ``MIN_STEADY`` iterations before the steady state were faster than it.
    """
    if not speeds:
        return Warmup(start=None, slowed=False)
    series = np.asarray(speeds, dtype=float)
    level = float(np.median(series[series.size // 2 :]))
    near = np.abs(series - level) <= TOLERANCE * level
    start = int(near.argmax()) if near.any() else series.size
    faster = start >= MIN_STEADY and float(np.median(series[:start])) > level
    return Warmup(start=start if series.size - start >= MIN_STEADY else None, slowed=faster)


def is_narrow(speeds: Sequence[float]) -> bool:
    """Whether there is a steady state, and its mean is known within ``WIDTH`` on both sides."""
    start = steady_state(speeds).start
    interval = None if start is None else mean_interval(speeds[start:])
    if interval is None:
        return False
    mean = float(np.mean(speeds[start:]))
    return max(mean - interval[0], interval[1] - mean) <= WIDTH * mean
