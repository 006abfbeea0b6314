"""Fitting thresholds to hard ratios, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.certificates import checked_losses
from cascade.stats.decision import reaches
from cascade.stats.resampling import MIN_RESAMPLES, RESAMPLES, draw_counts, interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class FittedThreshold:
    """A threshold fitted to a target hard ratio.

    Attributes:
        hard_ratio: The target share of hard tokens.
        threshold: The threshold, in the precision of the confidences.
        reached: The share of the fitted tokens strictly below the threshold. With ties it can
            differ from `hard_ratio` by more than one token.
        threshold_interval: Its 95 % interval, from fits on resampled sequences.
        reached_interval: The 95 % interval of the hard ratio at this fixed threshold.
        ties: The number of tokens exactly at the threshold. They exit, but a rounding error could
            change that.
    """

    hard_ratio: float
    threshold: float
    reached: float
    threshold_interval: Interval
    reached_interval: Interval
    ties: int


@dataclass(frozen=True)
class Transfer:
    """The effect of a threshold on another corpus.

    Attributes:
        threshold: The given threshold.
        hard_ratio: The share of tokens strictly below the threshold.
        hard_ratio_interval: Its 95 % interval over resampled sequences.
        loss: The mean loss of the sequences; None without losses.
        loss_interval: Its 95 % interval over the same resamples; None without losses.
        sequences: The number of sequences.
    """

    threshold: float
    hard_ratio: float
    hard_ratio_interval: Interval
    loss: float | None
    loss_interval: Interval | None
    sequences: int


def fit_threshold(
    confidence: Array, hard_ratio: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> FittedThreshold:
    """Return the threshold at which `hard_ratio` of the tokens are hard.

    Without ties this is `numpy.quantile(confidence, hard_ratio)`. A threshold cannot separate
    tokens with equal confidences. Where the quantile falls on such a value or just after it, the
    threshold is that value or the next distinct one, whichever gets closer to the target ratio. At
    ratio 0 the threshold is the smallest confidence (every token exits), at ratio 1 the next number
    above the largest (no token exits). The order of sequences and tokens makes no difference.

    Intervals are percentile bootstraps over sequences (Efron and Tibshirani 1993, section 13.3).
    999 resamples of 511 sequences of 128 tokens take 0.3 s on one core. The time grows in
    proportion to tokens and resamples.

    Args:
        confidence: `[S, T]`, one row per sequence, without padding.
        hard_ratio: The target share of hard tokens, in [0, 1].
        resamples: The number of resamples, at least 39.
        seed: The seed of the resamples.

    Raises:
        ValueError: The array is not `[S, T]` with at least two sequences, a confidence is not
            finite, or another argument is out of range.
    """
    values = _checked_confidence(confidence)
    if not 0 <= hard_ratio <= 1:
        raise ValueError(
            f"expected a hard ratio in [0, 1], got {hard_ratio}; 0.7 sends 70 % of the tokens on"
        )
    _check_resampling(resamples, seed)
    hard_ratio = float(hard_ratio)  # an fp32 ratio would compute ranks in fp32
    values = np.sort(values, axis=1)
    values = values[_canonical_order(values)]
    order = np.argsort(values, axis=None)
    ascending, sequence = values.ravel()[order], order // values.shape[1]
    tokens = _RankedTokens(ascending, np.arange(1, values.size + 1))
    threshold = _fit(tokens, hard_ratio)
    below, upto = tokens.count(threshold, "left"), tokens.count(threshold, "right")
    hard = (~reaches(values, float(threshold))).sum(axis=1)
    refitted, realized = [], []
    for weights in draw_counts(len(values), seed, resamples):
        refitted.append(_fit(_RankedTokens(ascending, weights[sequence].cumsum()), hard_ratio))
        realized.append(weights @ hard / values.size)
    return FittedThreshold(
        hard_ratio=hard_ratio,
        threshold=float(threshold),
        reached=below / values.size,
        threshold_interval=_interval(refitted),
        reached_interval=_interval(realized),
        ties=upto - below,
    )


def quantile_threshold(confidence: Array, hard_ratio: float) -> float:
    """Return the same threshold as `fit_threshold`, without intervals.

    Args:
        confidence: Any shape, without padding; at least one token.
        hard_ratio: The target share of hard tokens, in [0, 1].

    Raises:
        ValueError: There are no confidences, one is not finite, or the ratio is out of range.
    """
    ascending = np.sort(np.asarray(confidence), axis=None)
    if ascending.size == 0 or not np.isfinite(ascending[[0, -1]]).all():  # NaN sorts last
        raise ValueError(
            "expected finite confidences, got none or some that are not; leave padding out"
        )
    if not 0 <= hard_ratio <= 1:
        raise ValueError(f"expected a hard ratio in [0, 1], got {hard_ratio}")
    tokens = _RankedTokens(ascending, np.arange(1, ascending.size + 1))
    return float(_fit(tokens, float(hard_ratio)))


def transfer(
    threshold: float,
    confidence: Array,
    losses: Array | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Transfer:
    """Return the hard ratio and the loss of an existing threshold on this corpus.

    Args:
        threshold: E.g. from `fit_threshold` or `certify`; may be infinite.
        confidence: `[S, T]`, one row per sequence, without padding.
        losses: `[S]`, each sequence's loss with this threshold, in any unit; or None.
        resamples: The number of resamples, at least 39.
        seed: The seed of the resamples.

    Raises:
        ValueError: A shape is wrong, a confidence or loss is not finite, the threshold is NaN, or
            another argument is out of range.
    """
    values = _checked_confidence(confidence)
    if math.isnan(threshold):
        raise ValueError("expected a threshold, got nan; take it from a fit or a certificate")
    _check_resampling(resamples, seed)
    columns = [(~reaches(values, float(threshold))).sum(axis=1)]
    if losses is not None:
        columns.append(checked_losses(losses, len(values)))
    rows = np.stack(columns, axis=1)
    rows = rows[_canonical_order(rows)]
    # Count tokens and divide at the end, so that shares are exact.
    size = np.array([values.size, len(rows)])[: rows.shape[1]]
    means = [weights @ rows / size for weights in draw_counts(len(rows), seed, resamples)]
    intervals = [_interval(column) for column in np.transpose(means)]
    hard_ratio, *loss = (float(mean) for mean in rows.sum(axis=0) / size)
    return Transfer(
        threshold=float(threshold),
        hard_ratio=hard_ratio,
        hard_ratio_interval=intervals[0],
        loss=loss[0] if loss else None,
        loss_interval=intervals[1] if loss else None,
        sequences=len(rows),
    )


@dataclass(frozen=True)
class _RankedTokens:
    """Tokens in ascending order, each weighted by how often a resample contains its sequence.

    A resample repeats whole sequences and does not change the order of the tokens, so one sort
    serves all resamples.

    Attributes:
        values: Every token of the corpus, `[S * T]`, ascending.
        through: The number of tokens in the resample up to and including each of them, `[S * T]`.
    """

    values: Array
    through: Array

    def value(self, rank: int) -> Any:
        """Return the value at an ascending rank, a scalar of the confidences' dtype."""
        return self.values[self.through.searchsorted(rank, "right")]

    def count(self, value: Any, side: Literal["left", "right"]) -> int:
        """Return the number of tokens below `value` ("left"), or at most `value` ("right")."""
        position = self.values.searchsorted(value, side)
        return int(self.through[position - 1]) if position else 0


def _fit(tokens: _RankedTokens, hard_ratio: float) -> Any:
    """Return the threshold (see `fit_threshold`), a scalar of the confidences' dtype."""
    size = tokens.values.size
    place = hard_ratio * (size - 1)
    rank = math.floor(place)
    fraction = place - rank
    low, high = tokens.value(rank), tokens.value(min(rank + 1, size - 1))
    below, upto = tokens.count(low, "left"), tokens.count(low, "right")
    following = tokens.value(upto) if upto < size else np.nextafter(low, low.dtype.type(np.inf))
    if upto - below > 1:
        wanted = hard_ratio * size
        return low if wanted - below <= upto - wanted else following
    # The two formulas of `numpy.quantile`, in the precision of the values: the same bits.
    gap = high - low
    quantile = low + gap * fraction if fraction < 0.5 else high - gap * (1 - fraction)
    quantile = low.dtype.type(quantile)  # NumPy 1 returns float64
    if quantile == low and fraction + hard_ratio >= 1:
        # Rounded down to the lower token (or at ratio 1), the ratio would be off by a whole token.
        return np.nextafter(low, following)
    return quantile


def _interval(resampled: Sequence[float] | Array) -> Interval:
    low, high = interval(np.asarray(resampled))
    return low, high


def _canonical_order(rows: Array) -> list[int]:
    """Return row numbers in an order that depends only on the rows' values.

    Resampling draws by position. With this order, the original order makes no difference.
    """
    keys = rows.tolist()
    return sorted(range(len(keys)), key=keys.__getitem__)


def _checked_confidence(confidence: Array) -> Array:
    values = np.asarray(confidence)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"expected confidence of shape [S, T], got {values.shape}; give one row per sequence"
        )
    if len(values) < 2:
        raise ValueError(
            "expected at least 2 sequences, got 1, whose correlated tokens give no interval; "
            "add sequences"
        )
    if values.dtype not in (np.float16, np.float32, np.float64):
        values = values.astype(np.float64)
    wrong = ~np.isfinite(values)
    if wrong.any():
        row, column = (int(index[0]) for index in np.nonzero(wrong))
        raise ValueError(
            f"expected finite confidences, got {values[row, column]} in sequence {row},"
            f" token {column}; leave padding out"
        )
    return values


def _check_resampling(resamples: int, seed: int) -> None:
    if resamples < MIN_RESAMPLES:
        raise ValueError(
            f"expected at least {MIN_RESAMPLES} resamples, got {resamples}; fewer give no"
            " 95 % interval"
        )
    if seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}; choose any such number")
