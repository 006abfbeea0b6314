"""Bootstrap intervals have their nominal coverage and are compared with margins."""

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


def test_resampled_means_draw_whole_sequences() -> None:
    rows = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, -3.0]])
    means = resampled_means(rows, np.random.default_rng(0), resamples=50)
    assert means.shape == (50, 2)
    # The second column is one minus the first. Resamples keep this if rows stay together.
    assert means.sum(axis=1) == pytest.approx(1.0)
    assert set(np.rint(3 * means[:, 0]).astype(int)) <= {0, 1, 2, 3, 4, 5, 6, 8, 9, 12}
    assert len(set(means[:, 0].tolist())) > 4


def test_resampled_means_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(30)
    whole = resampled_means(rows, np.random.default_rng(1))
    monkeypatch.setattr(resampling, "MAX_WEIGHTS", 100)
    assert resampled_means(rows, np.random.default_rng(1)) == pytest.approx(whole, abs=1e-12)


def test_simultaneous_interval_of_one_column_is_its_single_interval() -> None:
    rows = rows_of(40, 1)
    means = resampled_means(rows, np.random.default_rng(0))
    one = half_widths(means, rows.mean(axis=0), 0.95)
    assert simultaneous_half_widths(means, rows.mean(axis=0), 0.95) == pytest.approx(one)


def test_simultaneous_intervals_are_wider_and_scale_with_each_column() -> None:
    rows = rows_of(60)
    center, means = rows.mean(axis=0), resampled_means(rows, np.random.default_rng(0))
    alone = half_widths(means, center, 0.95)
    together = simultaneous_half_widths(means, center, 0.95)
    assert (together > alone).all()
    assert together / means.std(axis=0, ddof=1) == pytest.approx(
        np.full(5, together[0] / means[:, 0].std(ddof=1))
    )


def test_constant_column_has_zero_width_and_nan_column_has_nan_width() -> None:
    rows = np.stack([rows_of(20, 1)[:, 0], np.full(20, 0.5), np.full(20, np.nan)], axis=1)
    means = resampled_means(rows, np.random.default_rng(0))
    reach = simultaneous_half_widths(means, rows.mean(axis=0), 0.95)
    assert reach[0] > 0
    assert reach[1] == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(reach[2])


def test_intervals_have_their_nominal_coverage() -> None:
    """Count how often single and simultaneous intervals miss in 300 samples of 50 sequences."""
    alone, together = np.zeros(5), 0
    for seed in range(300):
        rows = rows_of(50, seed=100 + seed)
        center = rows.mean(axis=0)
        means = resampled_means(rows, np.random.default_rng(seed), resamples=399)
        alone += np.abs(center) > half_widths(means, center, 0.95)
        together += bool((np.abs(center) > simultaneous_half_widths(means, center, 0.95)).any())
    # 15 of 300 misses are expected. More than 30 and fewer than 4 each have a probability of 2e-4.
    # A bootstrap of 50 sequences misses slightly more often than its nominal rate.
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
def test_placed_compares_an_interval_with_a_margin(
    interval: tuple[float, float], place: str
) -> None:
    assert placed(interval, 0.1) == place


@given(
    low=st.floats(-1, 1),
    width=st.floats(0, 1),
    limit=st.floats(0, 1),
    value=st.floats(0, 1),
)
def test_placed_holds_for_every_value_of_the_interval(
    low: float, width: float, limit: float, value: float
) -> None:
    interval = low, low + width
    inside = min(low + value * width, interval[1])
    place = placed(interval, limit)
    assert place == placed((-interval[1], -interval[0]), limit)
    if place != "straddles":
        assert (abs(inside) <= limit) is (place == "within")


def test_ratio_interval_resamples_whole_sequences() -> None:
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


def test_interval_ends_are_ranks_25_and_975_of_999() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, RESAMPLES + 1))
    assert interval(values) == [25.0, 975.0]
    columns = np.stack([values, -2 * values], axis=1)
    assert percentile_ends(columns).tolist() == [[25.0, -1950.0], [975.0, -50.0]]


@pytest.mark.parametrize("count", [2, 3, 8, 511])
def test_draws_resamples_and_counts_agree(count: int) -> None:
    whole = np.random.default_rng(5).integers(count, size=(RESAMPLES, count))
    assert np.array_equal(draws(count, 5), whole)
    assert np.array_equal(np.stack(list(resamples(count, 5))), whole)
    assert np.array_equal(np.stack(list(resamples(count, 5, 39))), whole[:39])
    counted = np.stack(list(draw_counts(count, 5)))
    assert (counted.sum(axis=1) == count).all()
    values = np.arange(count)
    assert np.array_equal(counted @ values, whole.sum(axis=1))


def test_ratio_interval_is_none_if_a_resample_has_a_zero_denominator() -> None:
    assert ratio_interval(np.array([1.0, 0.0]), np.array([2.0, 0.0]), 0) is None
