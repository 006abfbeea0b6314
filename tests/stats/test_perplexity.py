"""Perplexities are finite, and intervals of their ratios resample whole sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cascade.stats.perplexity import MAX_NATS, perplexity, perplexity_ratio_interval
from cascade.stats.resampling import draws, interval


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(math.log(7)) == pytest.approx(7)


@pytest.mark.parametrize("nats", [MAX_NATS, 1e6, math.inf])
def test_perplexity_is_finite(nats: float) -> None:
    assert perplexity(nats) == math.exp(MAX_NATS)
    assert math.isfinite(perplexity(nats))
    low, high = perplexity_ratio_interval(np.full(3, 10 * nats), 10, seed=0)
    assert math.isfinite(low)
    assert math.isfinite(high)


def test_perplexity_ratio_interval_resamples_whole_sequences() -> None:
    difference = np.array([1.0, -2.0, 4.0, 0.5])
    means = [difference[drawn].sum() / 20 for drawn in draws(4, 3)]
    expected = interval(np.exp(means))
    assert perplexity_ratio_interval(difference, 20, seed=3) == pytest.approx(expected)
    assert perplexity_ratio_interval(np.zeros(4), 20, seed=3) == [1.0, 1.0]
