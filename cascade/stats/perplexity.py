"""Perplexities and the intervals of their ratios."""

from __future__ import annotations

import math

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.resampling import draws, interval

#: Means beyond this many nats are cut off: exp(709.8) is the largest double, and a record holds no
#: infinite number.
MOST_NATS = 700.0


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss per token, or of a difference of two: their ratio."""
    return math.exp(min(nats, MOST_NATS))


def perplexity_ratio_interval(difference: Array, scored: int, seed: int) -> list[float]:
    """Return the interval of a perplexity ratio, by whole sequences.

    Args:
        difference: `[S]`, each sequence's loss less the full model's, in nats, summed over tokens.
        scored: How many tokens that is in all.
        seed: Of the resamples.
    """
    per_token = difference * (len(difference) / scored)
    means = per_token[draws(len(per_token), seed)].mean(axis=1)
    return interval(np.exp(np.minimum(means, MOST_NATS)))
