"""Perplexities, as far as a number can hold them, and the intervals of their ratios."""

from __future__ import annotations

import math

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.resampling import draws, interval

#: The largest mean loss, or difference of two, whose exponential is stored: exp(709.8) is the
#: largest double, exp(-745) the smallest. Beyond it there are only the nats themselves.
MAX_NATS = 700.0


def perplexity(nats: float) -> float | None:
    """Return the perplexity of a mean loss per token, or the ratio of two from their difference.

    Args:
        nats: The mean loss, or the difference of two, in nats.

    Returns:
        The exponential; None where a number cannot hold it.

    Example:
        >>> perplexity(0.0), perplexity(1234.0)
        (1.0, None)
    """
    return math.exp(nats) if abs(nats) <= MAX_NATS else None


def as_ratio(nats: float) -> float:
    """Return a difference in nats as a ratio for comparisons: 0 or infinity beyond numbers."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def stored_nats(nats: float) -> float | None:
    """Return a number of nats as stored in records: None if it is infinite."""
    return float(nats) if math.isfinite(nats) else None


def resampled_nats(difference: Array, scored: int, seed: int) -> Array:
    """Return the difference of two losses, in nats per token, for every resample of sequences.

    Args:
        difference: `[S]`, each sequence's loss minus the full model's, in nats, summed over tokens.
        scored: The number of scored tokens in all sequences.
        seed: The seed of the resamples.

    Returns:
        `[resamples]`.
    """
    per_token = difference * (len(difference) / scored)
    means: Array = per_token[draws(len(per_token), seed)].mean(axis=1)
    return means


def nats_interval(resampled: Array) -> list[float] | None:
    """Return the 95 % interval of a difference in nats per token; None if an end is infinite.

    Args:
        resampled: The differences of all resamples.
    """
    return interval(resampled) if np.isfinite(resampled).all() else None


def ratio_interval(resampled: Array) -> list[float] | None:
    """Return the 95 % interval of a perplexity ratio; None where numbers cannot hold it.

    Args:
        resampled: The differences in nats per token of all resamples.
    """
    kept = np.abs(resampled) <= MAX_NATS
    return interval(np.exp(resampled)) if kept.all() else None
