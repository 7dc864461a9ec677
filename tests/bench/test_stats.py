"""Statistics against synthetic series whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo_edge.bench import stats


def test_summary_of_a_series_with_known_numbers() -> None:
    summary = stats.summarize([4.0, 1.0, 3.0, 2.0])
    assert summary is not None
    assert (summary.n, summary.mean, summary.median, summary.p50) == (4, 2.5, 2.5, 2.5)
    assert (summary.min, summary.max) == (1.0, 4.0)
    assert summary.std == pytest.approx(math.sqrt(5 / 3))
    assert summary.p90 == pytest.approx(3.7)
    assert summary.p99 == pytest.approx(3.97)


def test_unknown_is_none_and_never_zero() -> None:
    assert stats.summarize([]) is None
    one = stats.summarize([5.0])
    assert one is not None and one.std is None and one.ci_low is None and one.ci_high is None
    assert stats.mean_interval([1.0, 2.0]) is None
    assert stats.ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_series_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN"):
        stats.summarize([1.0, bad])
    with pytest.raises(ValueError, match="NaN"):
        stats.steady_state([1.0, bad])
    with pytest.raises(ValueError, match="above 0"):
        stats.steady_state([1.0, 0.0])


def test_the_same_samples_give_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(10, 1, 12).tolist()
    assert stats.mean_interval(values, seed=3) == stats.mean_interval(values, seed=3)
    assert stats.mean_interval(values, seed=3) != stats.mean_interval(values, seed=4)


def test_a_constant_series_has_an_interval_without_width() -> None:
    assert stats.mean_interval([7.0] * 5) == (7.0, 7.0)
    assert stats.narrow_enough([7.0] * 5, width=0.001)


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for i in range(300):
        low, high = stats.mean_interval(rng.normal(10, 1, n).tolist(), seed=i) or (0, 0)
        hits += low <= 10 <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_a_ratio_has_an_interval_that_holds_it() -> None:
    rng = np.random.default_rng(0)
    ratio = stats.ratio_interval(rng.normal(98, 1, 20).tolist(), rng.normal(100, 1, 12).tolist())
    assert ratio is not None and ratio[1] < ratio[0] < ratio[2]
    assert ratio[0] == pytest.approx(0.98, abs=0.01) and ratio[2] - ratio[1] < 0.03
    assert stats.ratio_interval([2.0] * 3, [1.0] * 3) == (2.0, 2.0, 2.0)


def test_the_2025_report_warmed_up_over_four_runs() -> None:
    runs = [7.5, 7.6, 7.7, 7.6, 12.9, 13.9, 14.0, 13.8, 13.9, 13.9]
    steady = stats.steady_state(runs)
    assert steady.start == 4
    assert [level.start for level in steady.levels] == [0, 4]
    assert [level.median for level in steady.levels] == pytest.approx([7.6, 13.9])
    assert not steady.slowed


@pytest.mark.parametrize(
    ("series", "start"),
    [
        ([3.0, 10.1, 10.0, 9.9, 10.0, 10.1], 1),  # one cold iteration
        ([10.0, 10.1, 9.9, 10.0, 6.0, 10.0, 10.1, 9.9, 10.0, 10.0], 0),  # one slow in the middle
        ([10.0] * 5 + [10.2] * 5, 0),  # a ripple below three percent
        ([5.0, 5.0, 5.0], None),  # too few
        ([], None),
    ],
)
def test_the_steady_state_begins_after_the_cold_level(
    series: list[float], start: int | None
) -> None:
    assert stats.steady_state(series).start == start


def test_throttling_makes_the_slower_level_the_steady_one() -> None:
    steady = stats.steady_state([14.0, 14.1, 13.9, 14.0, 14.0, 11.0, 11.1, 10.9, 11.0, 11.0])
    assert steady.start == 5
    assert steady.slowed


def test_a_ramp_that_ends_too_late_is_not_steady() -> None:
    ramp = [float(2**i) for i in range(9)]
    steady = stats.steady_state(ramp)
    assert steady.start is None or steady.start > 0


@pytest.mark.parametrize("sigma", [0.01, 0.05])
@pytest.mark.parametrize("n", [10, 30])
def test_noise_alone_is_hardly_ever_cut(n: int, sigma: float) -> None:
    rng = np.random.default_rng(int(sigma * 1000) + n)
    starts = [
        stats.steady_state(np.exp(rng.normal(0, sigma, n)).tolist()).start for _ in range(150)
    ]
    assert sum(start != 0 for start in starts) <= 0.05 * 150


@pytest.mark.parametrize("n", [10, 30])
def test_a_jump_in_noise_is_found_where_it_is(n: int) -> None:
    rng = np.random.default_rng(n)
    at = n * 4 // 10
    steady = 0
    for _ in range(100):
        series = np.where(np.arange(n) < at, 7.6, 13.9) * np.exp(rng.normal(0, 0.03, n))
        steady += stats.steady_state(series.tolist()).start == at
    assert steady >= 95


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=25), st.floats(0.01, 100.0))
def test_levels_do_not_depend_on_the_unit_of_speed(series: list[float], factor: float) -> None:
    plain = stats.steady_state(series)
    scaled = stats.steady_state([value * factor for value in series])
    assert [level.start for level in plain.levels] == [level.start for level in scaled.levels]
    assert plain.levels[0].start == 0
    assert plain.start is None or len(series) - plain.start >= stats.MIN_STEADY


def test_narrow_enough_needs_a_steady_number_of_samples_and_a_narrow_interval() -> None:
    assert not stats.narrow_enough([10.0] * 3, width=0.5)
    assert not stats.narrow_enough([8.0, 12.0, 9.0, 11.0, 10.0], width=0.02)
    assert stats.narrow_enough([10.0, 10.05, 9.95, 10.0, 10.02, 9.98], width=0.02)
