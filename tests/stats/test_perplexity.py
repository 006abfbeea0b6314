"""Perplexities beyond numbers are None, and intervals of ratios resample whole sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cascade.stats.perplexity import MAX_NATS, as_ratio, perplexity, stored_nats
from cascade.stats.perplexity_intervals import nats_interval, ratio_interval, resampled_nats
from cascade.stats.resampling import draws, interval


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(MAX_NATS) == math.exp(MAX_NATS)


@pytest.mark.parametrize("nats", [MAX_NATS + 0.1, 1e6, math.inf, -1e4, math.nan])
def test_what_no_number_holds_is_none_and_keeps_its_nats(nats: float) -> None:
    assert perplexity(nats) is None
    assert stored_nats(nats) == (nats if math.isfinite(nats) else None)
    resampled = resampled_nats(np.full(3, 10 * nats), 30, seed=0)
    assert ratio_interval(resampled) is None
    ends = nats_interval(resampled)
    assert ends is None if not math.isfinite(nats) else ends == pytest.approx([nats, nats])


def test_one_end_beyond_numbers_leaves_the_interval_in_nats() -> None:
    resampled = np.linspace(-2.0, MAX_NATS + 1, 999)
    assert ratio_interval(resampled) is None
    assert nats_interval(resampled) == interval(resampled)


@pytest.mark.parametrize(("nats", "ratio"), [(0.0, 1.0), (1e9, math.inf), (-1e9, 0.0)])
def test_ratios_are_compared_as_zero_and_infinity_beyond_numbers(nats: float, ratio: float) -> None:
    assert as_ratio(nats) == ratio


def test_ratio_interval_resamples_whole_sequences() -> None:
    difference = np.array([1.0, -2.0, 4.0, 0.5])
    means = [difference[drawn].sum() / 20 for drawn in draws(4, 3)]
    expected = interval(np.exp(means))
    assert ratio_interval(resampled_nats(difference, 20, 3)) == pytest.approx(expected)
    assert ratio_interval(resampled_nats(np.zeros(4), 20, 3)) == [1.0, 1.0]
