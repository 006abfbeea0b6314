"""Ratios of sums over few pairs: how often their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from cascade.stats.ratios import student_ratio_interval


def test_an_interval_covers_the_true_ratio_even_with_two_pairs() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 4, 8):
        hits = 0
        for _ in range(500):
            full = rng.normal(1, 0.05, count)
            point = full * rng.normal(0.95, 0.03, count)
            interval = student_ratio_interval(list(point), list(full))
            assert interval is not None
            hits += interval[0] <= 0.95 <= interval[1]
        # 95 % +- 3 standard errors of 500 draws.
        assert abs(hits / 500 - 0.95) < 0.03, count


def test_an_interval_is_that_of_the_residuals() -> None:
    rng = np.random.default_rng(1)
    whole = rng.normal(1, 0.05, 6)
    part = whole * rng.normal(0.9, 0.03, 6)
    ratio = part.sum() / whole.sum()
    # Cochran 1977, section 6.3, in units of the mean of the whole.
    around = ttest_1samp(part - ratio * whole, 0).confidence_interval()
    expected = [ratio + end / whole.mean() for end in around]
    assert student_ratio_interval(part.tolist(), whole.tolist()) == pytest.approx(expected)


def test_one_pair_has_no_interval_and_a_lower_end_is_never_negative() -> None:
    assert student_ratio_interval([1.0], [2.0]) is None
    low, high = student_ratio_interval([0.0, 1.0], [1.0, 1.0]) or (1.0, 0.0)
    assert low == 0 < 0.5 < high
