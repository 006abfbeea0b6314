"""Perplexities and the intervals of their ratios."""

from __future__ import annotations

import math

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.resampling import draws, interval

#: Mean losses are cut off at this many nats, because records hold no infinite numbers and
#: exp(709.8) is the largest double.
MAX_NATS = 700.0


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss per token, or the ratio of two from their difference.

    Args:
        nats: The mean loss, or the difference of two, in nats.
    """
    return math.exp(min(nats, MAX_NATS))


def perplexity_ratio_interval(difference: Array, scored: int, seed: int) -> list[float]:
    """Return the 95 % interval of a perplexity ratio, from resampled sequences.

    Args:
        difference: `[S]`, each sequence's loss minus the full model's, in nats, summed over tokens.
        scored: The number of scored tokens in all sequences.
        seed: The seed of the resamples.
    """
    per_token = difference * (len(difference) / scored)
    means = per_token[draws(len(per_token), seed)].mean(axis=1)
    return interval(np.exp(np.minimum(means, MAX_NATS)))
