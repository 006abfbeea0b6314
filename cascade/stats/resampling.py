"""Bootstrap intervals from resampled sequences, and comparing intervals with a margin.

Tokens of one sequence are correlated, so resamples draw whole sequences, never tokens. Every
interval comes from 999 resamples. Intervals of single figures are percentile intervals; those that
hold for many layers at once are symmetric (`half_widths`, `simultaneous_half_widths`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from cascade.core.arrays import Array

Interval = tuple[float, float]


Place = Literal["within", "beyond", "straddles"]


RESAMPLES = 999

#: The smallest number R of resamples with a 95 % percentile interval. Its ends have the ranks
#: 0.025 (R + 1) and 0.975 (R + 1).
MIN_RESAMPLES = 39

#: The quantiles at the ends of a 95 % percentile interval.
_ENDS = (0.025, 0.975)

#: The most weights that `resampled_means` keeps in memory at once. It does not affect the draws.
MAX_WEIGHTS = 1 << 22


def resampled_means(
    rows: Array, generator: np.random.Generator, *, resamples: int = RESAMPLES
) -> Array:
    """Return the means of resamples of whole sequences, `[resamples, C]`.

    Args:
        rows: `[S, C]`, one row per sequence; all sequences have the same number of tokens.
        generator: Draws the resamples.
        resamples: The number of resamples.
    """
    count = len(rows)
    each = max(1, MAX_WEIGHTS // count)
    means = [
        generator.multinomial(count, np.full(count, 1 / count), size=min(each, resamples - done))
        @ rows
        / count
        for done in range(0, resamples, each)
    ]
    return np.concatenate(means)


def half_widths(means: Array, center: Array, confidence: float) -> Array:
    """Return the half width of each column's interval, `[C]`.

    These are symmetric percentile intervals (Hall, The Bootstrap and Edgeworth Expansion, 1992,
    section 3.6).

    Args:
        means: `[resamples, C]`, from `resampled_means`.
        center: `[C]`, the means of the original sequences.
        confidence: The probability that a single interval covers the truth, in (0, 1).
    """
    reach: Array = np.quantile(np.abs(means - center), confidence, axis=0, method="higher")
    return reach


def simultaneous_half_widths(means: Array, center: Array, confidence: float) -> Array:
    """Return the half widths of intervals that hold simultaneously, `[C]`.

    They follow from the largest |t| over all columns (Romano and Wolf 2005, Econometrica 73), so
    that correlated columns do not widen them needlessly. A column with NaN gives NaN.

    Args:
        means: `[resamples, C]`, from `resampled_means`, or the difference of two such arrays.
        center: `[C]`, the same for the original sequences.
        confidence: The probability that all intervals cover the truth, in (0, 1).
    """
    error = means.std(axis=0, ddof=1)
    known = np.isfinite(error) & (error > 0)
    largest = (np.abs(means - center)[:, known] / error[known]).max(axis=1, initial=0.0)
    reach: Array = float(np.quantile(largest, confidence, method="higher")) * error
    return reach


def placed(interval: Interval, limit: float) -> Place:
    """Return whether an interval lies "within" +-limit, "beyond" it or "straddles" it.

    Args:
        interval: Lower and upper end.
        limit: At least 0.
    """
    low, high = interval
    if -limit <= low and high <= limit:
        return "within"
    return "straddles" if low <= limit and high >= -limit else "beyond"


def resamples(count: int, seed: int, number: int = RESAMPLES) -> Iterator[Array]:
    """Yield the indices of each resample's sequences, `[count]` integers.

    Args:
        count: The number of sequences.
        seed: The seed of the resamples.
        number: The number of resamples.
    """
    generator = np.random.default_rng(seed)
    for _ in range(number):
        yield generator.integers(count, size=count)


def draws(count: int, seed: int) -> Array:
    """Return the indices of each resample's sequences, `[RESAMPLES, count]`.

    Use it for statistics other than a single mean, such as ratios.

    Args:
        count: The number of sequences.
        seed: The seed of the resamples.

    Example:
        >>> draws(4, seed=0).shape
        (999, 4)
    """
    return np.stack(list(resamples(count, seed)))


def draw_counts(count: int, seed: int, number: int = RESAMPLES) -> Iterator[Array]:
    """Yield how often each resample contains each sequence, `[count]` integers.

    Args:
        count: The number of sequences.
        seed: The seed of the resamples.
        number: The number of resamples.
    """
    for drawn in resamples(count, seed, number):
        yield np.bincount(drawn, minlength=count)


def percentile_ends(values: Array) -> Array:
    """Return the ends of 95 % percentile intervals, `[2, ...]`, lower ends first.

    The ends are the values at the ranks 0.025 (R + 1) and 0.975 (R + 1) among R resamples, which
    are 25 and 975 of 999 (NumPy's method "weibull"). NumPy's default makes intervals too short
    when there are few resamples: in 1,500 simulated corpora with 99 resamples it covered 0.93,
    this method 0.945.

    Args:
        values: `[R, ...]`, the statistic of each resample.

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
    """Return the 95 % interval of a mean over sequences.

    Args:
        values: `[S]`, one per sequence.
        seed: The seed of the resamples.
    """
    return interval(values[draws(len(values), seed)].mean(axis=1))


def ratio_interval(numerators: Array, denominators: Array, seed: int) -> list[float] | None:
    """Return the 95 % interval of a ratio of sums over sequences.

    Args:
        numerators: `[S]`, e.g. a sum over some tokens of each sequence.
        denominators: `[S]`, e.g. the number of these tokens.
        seed: The seed of the resamples.

    Returns:
        Lower and upper end; None where the denominators of a resample add up to zero.
    """
    drawn = draws(len(numerators), seed)
    totals = denominators[drawn].sum(axis=1)
    if not (totals > 0).all():
        return None
    return interval(numerators[drawn].sum(axis=1) / totals)


def times_more(center: float, half: float, limit: float) -> float | None:
    """Return by which factor to increase the sequences until an interval excludes a limit.

    The width of an interval is proportional to one over the root of the number of sequences. The
    factor assumes that the center stays where it is.

    Args:
        center: The center of the interval.
        half: Half the width of the interval.
        limit: The margin, as for `placed`; the interval straddles it.

    Returns:
        The factor; None where the center lies at the limit, so that no number is enough.
    """
    distance = abs(abs(center) - limit)
    return (half / distance) ** 2 if distance > 0 else None
