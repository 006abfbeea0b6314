"""Resampling: intervals of means over whole sequences, whose tokens are correlated."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Resamples of an interval.
RESAMPLES = 999


def draws(count: int, seed: int) -> Array:
    """Return which sequences each resample has, `[RESAMPLES, count]`."""
    drawn: Array = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    return drawn


def interval(values: Array) -> list[float]:
    """Return the 95 % percentile interval of a statistic's resampled values."""
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def mean_interval(values: Array, seed: int) -> list[float]:
    """Return the interval of a mean over sequences.

    Args:
        values: `[S]`, one per sequence.
        seed: Of the resamples.
    """
    return interval(values[draws(len(values), seed)].mean(axis=1))


def ratio_interval(part: Array, whole: Array, seed: int) -> list[float] | None:
    """Return the interval of a ratio of sums over sequences; None where a resample has no whole.

    Args:
        part: `[S]`, e.g. a sum over some tokens of each sequence.
        whole: `[S]`, e.g. how many they are.
        seed: Of the resamples.
    """
    drawn = draws(len(part), seed)
    totals = whole[drawn].sum(axis=1)
    some = totals > 0
    if not some.all():
        return None
    return interval(part[drawn].sum(axis=1) / totals)
