"""Intervals of perplexity ratios over resampled sequences."""

from __future__ import annotations

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.perplexity import MAX_NATS
from cascade.stats.resampling import draws, interval


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
