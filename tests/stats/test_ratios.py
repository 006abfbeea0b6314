"""Student's t intervals of ratios over few pairs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from cascade.stats.ratios import student_ratio_interval


def test_interval_has_its_nominal_coverage_with_two_pairs() -> None:
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


def test_interval_matches_scipy_on_the_residuals() -> None:
    rng = np.random.default_rng(1)
    below = rng.normal(1, 0.05, 6)
    above = below * rng.normal(0.9, 0.03, 6)
    ratio = above.sum() / below.sum()
    # Cochran 1977, section 6.3, in units of the mean denominator.
    around = ttest_1samp(above - ratio * below, 0).confidence_interval()
    expected = [ratio + end / below.mean() for end in around]
    assert student_ratio_interval(above.tolist(), below.tolist()) == pytest.approx(expected)


def test_single_pair_has_no_interval_and_lower_end_is_not_negative() -> None:
    assert student_ratio_interval([1.0], [2.0]) is None
    low, high = student_ratio_interval([0.0, 1.0], [1.0, 1.0]) or (1.0, 0.0)
    assert low == 0 < 0.5 < high
