"""Intervals of resampled sequences hold as often as they say, and decide what lies within."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats import resampling
from cascade.stats.resampling import (
    RESAMPLES,
    draw_counts,
    draws,
    half_widths,
    interval,
    mean_interval,
    percentile_ends,
    placed,
    ratio_interval,
    resampled_means,
    resamples,
    simultaneous_half_widths,
)


def rows_of(sequences: int, columns: int = 5, *, seed: int = 0) -> np.ndarray:
    """Return correlated columns of unequal spread, `[sequences, columns]`."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(sequences, 1))
    own = generator.normal(size=(sequences, columns))
    return (common + own) * 10.0 ** -np.arange(columns)


def test_a_resample_is_a_mean_of_whole_sequences() -> None:
    rows = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, -3.0]])
    means = resampled_means(rows, np.random.default_rng(0), resamples=50)
    assert means.shape == (50, 2)
    # The second column is one minus the first: it is in every resample, if rows stay together.
    assert means.sum(axis=1) == pytest.approx(1.0)
    assert set(np.rint(3 * means[:, 0]).astype(int)) <= {0, 1, 2, 3, 4, 5, 6, 8, 9, 12}
    assert len(set(means[:, 0].tolist())) > 4


def test_many_sequences_are_drawn_in_goes_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(30)
    whole = resampled_means(rows, np.random.default_rng(1))
    monkeypatch.setattr(resampling, "HELD_WEIGHTS", 100)
    assert resampled_means(rows, np.random.default_rng(1)) == pytest.approx(whole, abs=1e-12)


def test_one_column_alone_has_the_same_interval_either_way() -> None:
    rows = rows_of(40, 1)
    means = resampled_means(rows, np.random.default_rng(0))
    one = half_widths(means, rows.mean(axis=0), 0.95)
    assert simultaneous_half_widths(means, rows.mean(axis=0), 0.95) == pytest.approx(one)


def test_intervals_that_hold_all_at_once_are_wider_and_scale_with_each_column() -> None:
    rows = rows_of(60)
    center, means = rows.mean(axis=0), resampled_means(rows, np.random.default_rng(0))
    alone = half_widths(means, center, 0.95)
    together = simultaneous_half_widths(means, center, 0.95)
    assert (together > alone).all()
    assert together / means.std(axis=0, ddof=1) == pytest.approx(
        np.full(5, together[0] / means[:, 0].std(ddof=1))
    )


def test_a_column_that_never_varies_has_no_width_and_one_of_nan_has_none() -> None:
    rows = np.stack([rows_of(20, 1)[:, 0], np.full(20, 0.5), np.full(20, np.nan)], axis=1)
    means = resampled_means(rows, np.random.default_rng(0))
    reach = simultaneous_half_widths(means, rows.mean(axis=0), 0.95)
    assert reach[0] > 0
    assert reach[1] == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(reach[2])


def test_intervals_hold_as_often_as_they_promise() -> None:
    """300 samples of 50 sequences: how often each interval misses, and all at once."""
    alone, together = np.zeros(5), 0
    for seed in range(300):
        rows = rows_of(50, seed=100 + seed)
        center = rows.mean(axis=0)
        means = resampled_means(rows, np.random.default_rng(seed), resamples=399)
        alone += np.abs(center) > half_widths(means, center, 0.95)
        together += bool((np.abs(center) > simultaneous_half_widths(means, center, 0.95)).any())
    # 15 of 300 are promised. Above 30 has a chance of 2e-4, below 4 one of 2e-4; a bootstrap of 50
    # sequences misses a little oftener than it promises.
    assert (alone >= 4).all()
    assert (alone <= 30).all()
    assert 4 <= together <= 30


@pytest.mark.parametrize(
    ("interval", "place"),
    [
        ((-0.1, 0.1), "within"),
        ((-0.05, 0.02), "within"),
        ((0.0, 0.0), "within"),
        ((0.05, 0.11), "straddles"),
        ((-0.11, 0.05), "straddles"),
        ((-0.2, 0.2), "straddles"),
        ((0.11, 0.2), "beyond"),
        ((-0.2, -0.11), "beyond"),
    ],
)
def test_an_interval_lies_within_a_margin_beyond_it_or_on_both_sides(
    interval: tuple[float, float], place: str
) -> None:
    assert placed(interval, 0.1) == place


@given(
    low=st.floats(-1, 1),
    width=st.floats(0, 1),
    limit=st.floats(0, 1),
    value=st.floats(0, 1),
)
def test_where_an_interval_lies_every_value_of_it_does(
    low: float, width: float, limit: float, value: float
) -> None:
    interval = low, low + width
    inside = min(low + value * width, interval[1])
    place = placed(interval, limit)
    assert place == placed((-interval[1], -interval[0]), limit)
    if place != "straddles":
        assert (abs(inside) <= limit) is (place == "within")


def test_a_ratio_of_sums_is_resampled_by_whole_sequences() -> None:
    part, whole = np.array([1.0, 4.0, 0.0, 9.0]), np.array([2.0, 8.0, 5.0, 10.0])
    drawn = draws(4, 7)
    assert drawn.shape == (RESAMPLES, 4)
    by_hand = [part[row].sum() / whole[row].sum() for row in drawn]
    expected = np.quantile(by_hand, [0.025, 0.975], method="weibull")
    assert ratio_interval(part, whole, 7) == pytest.approx(expected.tolist())
    assert ratio_interval(whole, whole, 7) == pytest.approx([1.0, 1.0])
    assert mean_interval(part, 7) == pytest.approx(
        np.quantile([part[row].mean() for row in drawn], [0.025, 0.975], method="weibull").tolist()
    )


def test_an_interval_ends_at_the_values_of_ranks_25_and_975_of_999() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, RESAMPLES + 1))
    assert interval(values) == [25.0, 975.0]
    columns = np.stack([values, -2 * values], axis=1)
    assert percentile_ends(columns).tolist() == [[25.0, -1950.0], [975.0, -50.0]]


@pytest.mark.parametrize("count", [2, 3, 8, 511])
def test_resamples_are_the_same_drawn_one_by_one_counted_or_all_at_once(count: int) -> None:
    whole = np.random.default_rng(5).integers(count, size=(RESAMPLES, count))
    assert np.array_equal(draws(count, 5), whole)
    assert np.array_equal(np.stack(list(resamples(count, 5))), whole)
    assert np.array_equal(np.stack(list(resamples(count, 5, 39))), whole[:39])
    counted = np.stack(list(draw_counts(count, 5)))
    assert (counted.sum(axis=1) == count).all()
    values = np.arange(count)
    assert np.array_equal(counted @ values, whole.sum(axis=1))


def test_a_ratio_has_no_interval_where_a_resample_has_no_whole() -> None:
    assert ratio_interval(np.array([1.0, 0.0]), np.array([2.0, 0.0]), 0) is None
