"""Numbers of two sides that were measured in turns.

Median of the pairs' own ratios, so that a disturbed pair moves it little and slow drift of the
machine, which touches both halves of a pair, not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo_edge.bench.stats import ratio_interval, steady_state

MIN_PAIRS = 5
"""Fewer steady pairs than this are not reported as a steady part."""


def compare(
    ours: Sequence[float], other: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Any]:
    """Ratios ours ÷ other of paired measurements, with bootstrap intervals over the pairs.

    Returns the median of the pairs' ratios (``median``, ``low``, ``high``), the ratio of means
    (``mean_ratio``, ``mean_low``, ``mean_high``), each side's median, and ``pairs``. Intervals are
    None below three pairs.
    """
    top, bottom = np.asarray(ours, dtype=float), np.asarray(other, dtype=float)
    if top.shape != bottom.shape or top.ndim != 1 or not top.size:
        raise ValueError("pairs need two series of equal length")
    ratios = top / bottom
    low = high = None
    if ratios.size >= 3:
        draws = np.random.default_rng(seed).integers(0, ratios.size, size=(4000, ratios.size))
        tail = (1 - confidence) / 2
        edges = np.quantile(np.median(ratios[draws], axis=1), [tail, 1 - tail])
        low, high = float(edges[0]), float(edges[1])
    means = ratio_interval(ours, other, confidence=confidence, seed=seed)
    return {
        "median": float(np.median(ratios)),
        "low": low,
        "high": high,
        "mean_ratio": None if means is None else means[0],
        "mean_low": None if means is None else means[1],
        "mean_high": None if means is None else means[2],
        "ours_median": float(np.median(top)),
        "other_median": float(np.median(bottom)),
        "pairs": int(ratios.size),
        "confidence": confidence,
    }


def steady_from(series: Sequence[Sequence[float]]) -> tuple[int, bool]:
    """First round from which every series is steady, and whether all of them settled.

    Where one never settles, or too few rounds are left, all rounds count: a shared machine changes
    its speed without end, and pairs bear that.
    """
    found = [steady_state(one).start for one in series]
    starts = [start for start in found if start is not None]
    settled = len(starts) == len(found)
    first = max(starts, default=0)
    if not settled or len(series[0]) - first < MIN_PAIRS:
        return 0, False
    return first, True
