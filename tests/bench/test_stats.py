"""Statistics against synthetic series whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from molmo_edge.bench import stats


def test_summary_of_a_series_with_known_numbers() -> None:
    summary = stats.summarize([4.0, 1.0, 3.0, 2.0])
    assert summary is not None
    assert (summary.n, summary.mean, summary.median) == (4, 2.5, 2.5)
    assert (summary.min, summary.max) == (1.0, 4.0)
    assert summary.std == pytest.approx(math.sqrt(5 / 3))
    assert (summary.p90, summary.p99) == pytest.approx((3.7, 3.97))


def test_unknown_is_none_and_never_zero() -> None:
    assert stats.summarize([]) is None
    one = stats.summarize([5.0])
    assert one is not None and one.std is None and one.ci_low is None
    assert stats.mean_interval([1.0, 2.0]) is None
    assert stats.ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [stats.mean_interval(rng.normal(10, 1, n).tolist()) or (0, 0) for _ in range(300)]
    assert 0.91 <= np.mean([low <= 10 <= high for low, high in intervals]) <= 0.985


def test_a_ratio_has_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(0)
    ratio = stats.ratio_interval(rng.normal(98, 1, 20).tolist(), rng.normal(100, 1, 12).tolist())
    assert ratio is not None and ratio[1] < ratio[0] < ratio[2]
    assert ratio[0] == pytest.approx(0.98, abs=0.01) and ratio[2] - ratio[1] < 0.03


@pytest.mark.parametrize(
    ("series", "start", "slowed"),
    [
        ([7.5, 7.6, 7.7, 7.6, 12.9, 13.9, 14.0, 13.8, 13.9, 13.9], 4, False),  # the 2025 report
        ([3.0, 10.1, 10.0, 9.9, 10.0, 10.1], 1, False),  # one cold iteration
        ([10.0, 10.1, 9.9, 10.0, 6.0, 10.0, 10.1, 9.9, 10.0, 10.0], 0, False),  # one slow later
        ([10.0] * 5 + [10.5] * 5, 0, False),  # within the scatter of a warm engine
        ([14.0, 14.1, 13.9, 14.0, 14.0, 11.0, 11.1, 10.9, 11.0, 11.0], 5, True),  # throttled
        ([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0], None, False),  # still rising
        ([5.0, 5.0, 5.0], None, False),
        ([], None, False),
    ],
)
def test_the_steady_state_begins_after_the_cold_iterations(
    series: list[float], start: int | None, slowed: bool
) -> None:
    steady = stats.steady_state(series)
    assert (steady.start, steady.slowed) == (start, slowed)
