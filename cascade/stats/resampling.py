"""Resampling whole sequences: the bootstrap behind every interval, and what intervals decide.

Tokens of one sequence are correlated, so resamples draw whole sequences, never tokens. Every
interval here is from 999 resamples. Intervals of single figures are percentile intervals; those
that hold for many layers at once are symmetric (`half_widths`, `simultaneous_half_widths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from cascade.core.arrays import Array

Interval = tuple[float, float]


Place = Literal["within", "beyond", "straddles"]


RESAMPLES = 999

#: The fewest resamples that have a 95 % percentile interval: its ends have the ranks 0.025 (R + 1)
#: and 0.975 (R + 1).
FEWEST_RESAMPLES = 39

#: The two ends of a 95 % percentile interval.
_ENDS = (0.025, 0.975)

#: The most weights that `resampled_means` holds in memory at once; the draws do not depend on it.
HELD_WEIGHTS = 1 << 22


def resampled_means(
    rows: Array, generator: np.random.Generator, *, resamples: int = RESAMPLES
) -> Array:
    """Return the means of resamples of whole sequences, `[resamples, C]`.

    Args:
        rows: `[S, C]`, one row per sequence, each of as many tokens as the others.
        generator: Draws the resamples.
        resamples: How many.
    """
    count = len(rows)
    each = max(1, HELD_WEIGHTS // count)
    means = [
        generator.multinomial(count, np.full(count, 1 / count), size=min(each, resamples - done))
        @ rows
        / count
        for done in range(0, resamples, each)
    ]
    return np.concatenate(means)


def half_widths(means: Array, center: Array, confidence: float) -> Array:
    """Return how far intervals of this confidence reach to either side, each by itself, `[C]`.

    Symmetric percentile intervals (Hall, The Bootstrap and Edgeworth Expansion, 1992, section 3.6).

    Args:
        means: `[resamples, C]`, of `resampled_means`.
        center: `[C]`, the means of the sequences themselves.
        confidence: That one interval holds, in (0, 1).
    """
    reach: Array = np.quantile(np.abs(means - center), confidence, axis=0, method="higher")
    return reach


def simultaneous_half_widths(means: Array, center: Array, confidence: float) -> Array:
    """Return how far intervals reach that hold all at once with this confidence, `[C]`.

    By the largest |t| over all columns (Romano and Wolf 2005, Econometrica 73): correlated columns
    cost no more than they must. NaN where a column is.

    Args:
        means: `[resamples, C]`: of `resampled_means`, or differences of two of them.
        center: `[C]`, the same of the sequences themselves.
        confidence: That all intervals hold, in (0, 1).
    """
    error = means.std(axis=0, ddof=1)
    known = np.isfinite(error) & (error > 0)
    largest = (np.abs(means - center)[:, known] / error[known]).max(axis=1, initial=0.0)
    reach: Array = float(np.quantile(largest, confidence, method="higher")) * error
    return reach


def placed(interval: Interval, limit: float) -> Place:
    """Return where an interval lies: "within" +-limit, "beyond" it, or on both sides of it.

    Args:
        interval: Lower and upper end.
        limit: At least 0.
    """
    low, high = interval
    if -limit <= low and high <= limit:
        return "within"
    return "straddles" if low <= limit and high >= -limit else "beyond"


def resamples(count: int, seed: int, number: int = RESAMPLES) -> Iterator[Array]:
    """Yield which sequences each resample has, `[count]` integers.

    Args:
        count: How many sequences there are.
        seed: Of the resamples.
        number: How many resamples.
    """
    generator = np.random.default_rng(seed)
    for _ in range(number):
        yield generator.integers(count, size=count)


def draws(count: int, seed: int) -> Array:
    """Return which sequences each resample has, `[RESAMPLES, count]`.

    For what is no mean: a ratio, or a statistic of several means that are drawn together.

    Args:
        count: How many sequences there are.
        seed: Of the resamples.

    Example:
        >>> draws(4, seed=0).shape
        (999, 4)
    """
    return np.stack(list(resamples(count, seed)))


def draw_counts(count: int, seed: int, number: int = RESAMPLES) -> Iterator[Array]:
    """Yield how often each resample has each sequence, `[count]` integers.

    Args:
        count: How many sequences there are.
        seed: Of the resamples.
        number: How many resamples.
    """
    for drawn in resamples(count, seed, number):
        yield np.bincount(drawn, minlength=count)


def percentile_ends(values: Array) -> Array:
    """Return the ends of 95 % percentile intervals, `[2, ...]`, lower ends first.

    The ends are the values of the ranks 0.025 (R + 1) and 0.975 (R + 1) among R resamples: 25 and
    975 of 999 (NumPy's method "weibull"). Unlike NumPy's default, this does not make the interval
    too short where resamples are few: in 1,500 simulated corpora, 99 resamples covered 0.945, by
    the default 0.93.

    Args:
        values: `[R, ...]`, a statistic of each resample.

    Example:
        >>> percentile_ends(np.arange(1.0, 1000.0))
        array([ 25., 975.])
    """
    ends: Array = np.quantile(np.asarray(values, np.float64), _ENDS, axis=0, method="weibull")
    return ends


def interval(values: Array) -> list[float]:
    """Return the 95 % percentile interval of a statistic (see `percentile_ends`).

    Args:
        values: `[R]`, the statistic of each resample.
    """
    low, high = percentile_ends(values).tolist()
    return [low, high]


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
    if not (totals > 0).all():
        return None
    return interval(part[drawn].sum(axis=1) / totals)


def times_more(center: float, half: float, limit: float) -> float | None:
    """Return how many times as many sequences would decide where an interval lies.

    An interval's width goes with one over the root of the number of sequences. Where the center is
    as it is now, so many move the whole interval to one side of the limit; None where no number
    does, because the center is at the limit.

    Args:
        center: Of the interval.
        half: How far it reaches to either side.
        limit: As for `placed`; the interval straddles it.
    """
    room = abs(abs(center) - limit)
    return (half / room) ** 2 if room > 0 else None
