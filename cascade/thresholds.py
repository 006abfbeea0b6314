"""Thresholds for a wanted hard ratio, with intervals, and thresholds with a guarantee.

A token whose *confidence* (for instance its similarity) is below the threshold is **hard** and goes
on; at or above it the token is **easy** and exits. Tokens of one sequence are correlated, so every
interval here resamples whole sequences, and a guarantee counts sequences, never tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cascade.errors import UsageError

Array = npt.NDArray[Any]
Interval = tuple[float, float]

#: The two ends of a 95 % percentile interval.
_ENDS = (0.025, 0.975)

#: At a confidence of 0.95 this takes 1.5e12 sequences.
LEAST_RISK = 1e-6

#: The ends have ranks 0.025 (R + 1) and 0.975 (R + 1): among fewer resamples there are none.
_FEWEST_RESAMPLES = 39


@dataclass(frozen=True)
class FittedThreshold:
    """A threshold fitted to a wanted hard ratio.

    Attributes:
        hard_ratio: The share of hard tokens that was wanted.
        threshold: Where to cut; a value of the confidences' own precision.
        reached: The share of these tokens strictly below the threshold. With ties it can differ
            from `hard_ratio` by more than one token.
        threshold_interval: 95 % interval of the threshold, refitted on resampled sequences.
        reached_interval: 95 % interval of the hard ratio that this very threshold realizes.
        ties: Tokens exactly at the threshold: they exit, and rounding alone could move them.
    """

    hard_ratio: float
    threshold: float
    reached: float
    threshold_interval: Interval
    reached_interval: Interval
    ties: int


@dataclass(frozen=True)
class Transfer:
    """What a threshold does on another corpus.

    Attributes:
        threshold: The threshold, as it was given.
        hard_ratio: The share of that corpus's tokens strictly below the threshold.
        hard_ratio_interval: Its 95 % interval over resampled sequences.
        loss: Mean loss of the sequences; None where no losses were given.
        loss_interval: Its 95 % interval over the same resamples; None where `loss` is.
        sequences: How many sequences this rests on.
    """

    threshold: float
    hard_ratio: float
    hard_ratio_interval: Interval
    loss: float | None
    loss_interval: Interval | None
    sequences: int


@dataclass(frozen=True)
class Certificate:
    """The outcome of `certify`.

    Attributes:
        threshold: The boldest certified threshold; None where nothing is certified, which means:
            use the full model.
        risk: The mean loss that must not be exceeded.
        confidence: The probability, over the choice of calibration sequences, that no certified
            threshold exceeds it.
        sequences: How many sequences the losses came from.
        sequences_needed: How many would certify a threshold that never loses anything.
        empirical_risk: Mean loss at the certified threshold; None where nothing is certified.
        p_values: One for each threshold, in the order tested, those after the stop included.
        certified: How many thresholds are certified, counted from the safest.
        reason: One sentence that says why it is these.
    """

    threshold: float | None
    risk: float
    confidence: float
    sequences: int
    sequences_needed: int
    empirical_risk: float | None
    p_values: list[float]
    certified: int
    reason: str


def fit_threshold(
    confidence: Array, hard_ratio: float, *, resamples: int = 999, seed: int = 0
) -> FittedThreshold:
    """Return the threshold at which `hard_ratio` of the tokens are hard.

    Without ties this is `numpy.quantile(confidence, hard_ratio)`. Tokens that share one value
    cannot be parted: where the quantile falls on (or just after) such a value, the threshold is
    that value or the next distinct one, whichever comes closer to the wanted ratio. At ratio 0 the
    threshold is the smallest confidence (every token exits), at ratio 1 the next number above the
    largest (none does). The order of sequences and of their tokens makes no difference.

    Intervals are percentile bootstraps over sequences (Efron and Tibshirani 1993, section 13.3).
    999 resamples of 511 sequences of 128 tokens take 0.3 s on one core, and the time grows with
    tokens and resamples alike.

    Args:
        confidence: `[S, T]`, one row per sequence, without padding.
        hard_ratio: The wanted share of hard tokens, in [0, 1].
        resamples: How often the sequences are drawn anew, at least 39.
        seed: Of the resampling.

    Raises:
        ValueError: The array is not `[S, T]` with two sequences or more, a confidence is not
            finite, or another argument is out of its range.
    """
    values = _checked_confidence(confidence)
    if not 0 <= hard_ratio <= 1:
        raise ValueError(
            f"expected a hard ratio in [0, 1], got {hard_ratio}; 0.7 sends 70 % of the tokens on"
        )
    _check_resampling(resamples, seed)
    hard_ratio = float(hard_ratio)  # a single-precision ratio would rank in single precision
    values = np.sort(values, axis=1)
    values = values[_canonical_order(values)]
    order = np.argsort(values, axis=None)
    ascending, sequence = values.ravel()[order], order // values.shape[1]
    tokens = _RankedTokens(ascending, np.arange(1, values.size + 1))
    threshold = _fit(tokens, hard_ratio)
    below, upto = tokens.count(threshold, "left"), tokens.count(threshold, "right")
    hard = (values < threshold).sum(axis=1)
    refitted, realized = [], []
    for weights in _resampled(len(values), resamples, seed):
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
    """Return the threshold that `fit_threshold` does, without its intervals.

    Args:
        confidence: Any shape, without padding; at least one token.
        hard_ratio: The wanted share of hard tokens, in [0, 1].

    Raises:
        ValueError: There is no confidence, one is not finite, or the ratio is out of its range.
    """
    ascending = np.sort(np.asarray(confidence), axis=None)
    if ascending.size == 0 or not np.isfinite(ascending[[0, -1]]).all():  # NaN sorts last
        raise ValueError("expected finite confidences, got none or others; leave padding out")
    if not 0 <= hard_ratio <= 1:
        raise ValueError(f"expected a hard ratio in [0, 1], got {hard_ratio}")
    tokens = _RankedTokens(ascending, np.arange(1, ascending.size + 1))
    return float(_fit(tokens, float(hard_ratio)))


def transfer(
    threshold: float,
    confidence: Array,
    losses: Array | None = None,
    *,
    resamples: int = 999,
    seed: int = 0,
) -> Transfer:
    """Return what a threshold, fitted elsewhere, does on this corpus.

    Args:
        threshold: From `fit_threshold` or `certify`; infinite ones are allowed.
        confidence: `[S, T]`, one row per sequence, without padding.
        losses: `[S]`, each sequence's loss with this threshold, in any unit; or None.
        resamples: How often the sequences are drawn anew, at least 39.
        seed: Of the resampling.

    Raises:
        ValueError: A shape is wrong, a confidence or loss is not finite, the threshold is NaN, or
            another argument is out of its range.
    """
    values = _checked_confidence(confidence)
    if math.isnan(threshold):
        raise ValueError("expected a threshold, got nan; take it from a fit or a certificate")
    _check_resampling(resamples, seed)
    # A Python float compares in the confidences' own precision, as it does inside the model.
    columns = [(values < float(threshold)).sum(axis=1)]
    if losses is not None:
        columns.append(_checked_losses_of(losses, len(values)))
    rows = np.stack(columns, axis=1)
    rows = rows[_canonical_order(rows)]
    # Tokens are counted and divided at the end: shares are then exact.
    size = np.array([values.size, len(rows)])[: rows.shape[1]]
    means = [weights @ rows / size for weights in _resampled(len(rows), resamples, seed)]
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


def check_certifiable(risk: float | None, confidence: float) -> None:
    """Refuse a wish for a certificate that cannot be meant.

    Args:
        risk: The bound on the true mean loss; None: no certificate is wanted.
        confidence: The probability that the guarantee holds.

    Raises:
        UsageError: One of them is out of its range, or the risk too small for any corpus.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"expected a {name} between 0 and 1, got {value:g}")
    if risk is not None and risk < LEAST_RISK:
        raise UsageError(
            f"expected a risk of at least {LEAST_RISK:g}, got {risk:g}: no corpus has the "
            "sequences that it would need"
        )


def hoeffding_p_value(loss: Array | float, *, sequences: int, risk: float) -> Array:
    """Return the p-value of "the true risk exceeds `risk`": exp(-2 n max(0, risk - loss)^2).

    Hoeffding 1963, theorem 1, as used for early exit by CALM (Schuster et al. 2022,
    arXiv:2207.07061, section 4) and in Learn then Test (Angelopoulos et al. 2021,
    arXiv:2110.01052). It holds for independent sequences whose loss is in [0, 1].

    Args:
        loss: Mean losses in [0, 1], any shape.
        sequences: How many sequences each mean is over.
        risk: The bound on the true mean loss, in (0, 1).

    Returns:
        P-values in [0, 1], of the shape of `loss`; 1 where the loss is not below the risk.

    Raises:
        ValueError: An argument is out of its range, or NaN.
    """
    means = np.asarray(loss, dtype=np.float64)
    wrong = ~((means >= 0) & (means <= 1))  # true for NaN as well
    if wrong.any():
        raise ValueError(f"expected mean losses in [0, 1], got {means[wrong][0]}; rescale the loss")
    if sequences < 1:
        raise ValueError(f"expected at least one sequence, got {sequences}; count those averaged")
    _check_risk(risk)
    margin = np.maximum(0.0, risk - means)
    return np.asarray(np.exp(-2.0 * sequences * margin * margin))


def sequences_needed(risk: float, confidence: float) -> int:
    """Return the least number of sequences that can certify a threshold without any loss.

    This is ln(1 / (1 - confidence)) / (2 risk^2), rounded up: with fewer, not even a mean loss of
    zero has a small enough p-value (see `hoeffding_p_value`).

    Args:
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Raises:
        ValueError: `risk` or `confidence` is out of its range.
    """
    _check_risk(risk)
    _check_confidence_level(confidence)
    quotient = -math.log(1 - confidence) / risk / risk / 2
    if math.isinf(quotient):
        raise ValueError(
            f"expected a risk that some number of sequences can certify, got {risk:g}; take a"
            " larger one"
        )
    least = math.ceil(quotient)
    # Where the quotient is nearly whole, rounding decides: ask the test that will be applied.
    for number in (least - 1, least):
        if number > 0 and hoeffding_p_value(0.0, sequences=number, risk=risk) <= 1 - confidence:
            return number
    return least + 1


def too_few(sequences: int, *, risk: float, confidence: float) -> Certificate | None:
    """Return what comes of too few sequences to certify anything, which is known without a loss.

    Args:
        sequences: How many there are to test thresholds on.
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Returns:
        A certificate of nothing, for which nothing was tested; None where there are enough.

    Raises:
        ValueError: `risk` or `confidence` is out of its range.
    """
    needed = sequences_needed(risk, confidence)
    if sequences >= needed:
        return None
    return Certificate(
        threshold=None,
        risk=risk,
        confidence=confidence,
        sequences=sequences,
        sequences_needed=needed,
        empirical_risk=None,
        p_values=[],
        certified=0,
        reason=_too_few_words(sequences, needed, risk, confidence),
    )


def _too_few_words(sequences: int, needed: int, risk: float, confidence: float) -> str:
    return (
        f"{sequences} sequences cannot certify a risk of {risk:g} at confidence {confidence:g}"
        f" even without any loss: {needed} are needed; use the full model"
    )


def certify(thresholds: Array, losses: Array, *, risk: float, confidence: float) -> Certificate:
    """Return the boldest threshold whose true risk is bounded, by Learn then Test.

    Thresholds are tested in their order, each at level 1 - `confidence`, until the first that
    cannot be certified (fixed-sequence testing: Angelopoulos et al. 2021, arXiv:2110.01052; CALM,
    Schuster et al. 2022, arXiv:2207.07061, section 4). With probability `confidence` at least, no
    certified threshold has a true mean loss above `risk`. Losses need not grow along the
    thresholds for this to hold.

    The guarantee is for sequences drawn as these were, independently of each other, and for
    thresholds chosen without these losses: fit them on other sequences.

    Args:
        thresholds: `[J]`, strictly decreasing: from the safest, which lets few tokens exit, to the
            boldest.
        losses: `[J, S]`, in [0, 1]: each sequence's loss at each threshold.
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Raises:
        ValueError: A shape is wrong, thresholds do not decrease, a loss is outside [0, 1] or NaN,
            or `risk` or `confidence` is out of its range.
    """
    grid, table = _checked_thresholds(thresholds), np.asarray(losses, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(grid) or table.shape[1] == 0:
        raise ValueError(
            f"expected losses of shape [{len(grid)}, S], got {table.shape}; give one row per"
            " threshold, one column per sequence"
        )
    wrong = ~((table >= 0) & (table <= 1))  # true for NaN as well
    if wrong.any():
        row, column = (int(index[0]) for index in np.nonzero(wrong))
        raise ValueError(
            f"expected losses in [0, 1], got {table[row, column]} at threshold {grid[row]:g},"
            f" sequence {column}; rescale or clip the loss"
        )
    # Exact sums: those of numpy depend on the sequences' order, which could tip a p-value.
    means = np.array([math.fsum(row) for row in table.tolist()]) / table.shape[1]
    return certify_means(grid, means, sequences=table.shape[1], risk=risk, confidence=confidence)


def certify_means(
    thresholds: Array, means: Array, *, sequences: int, risk: float, confidence: float
) -> Certificate:
    """Return what `certify` does, from mean losses alone: no more of them enters the test.

    Args:
        thresholds: `[J]`, strictly decreasing.
        means: `[J]`, in [0, 1]: the mean loss of all sequences at each threshold.
        sequences: How many sequences each mean is over.
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Raises:
        ValueError: As `certify`.
    """
    grid, losses = _checked_thresholds(thresholds), np.asarray(means, dtype=np.float64)
    if losses.shape != grid.shape:
        raise ValueError(
            f"expected {len(grid)} mean losses, got shape {losses.shape}; give one per threshold"
        )
    risk, confidence = float(risk), float(confidence)
    needed = sequences_needed(risk, confidence)
    p_values = hoeffding_p_value(losses, sequences=sequences, risk=risk)
    stops = np.flatnonzero(~(p_values <= 1 - confidence))
    certified = int(stops[0]) if len(stops) else len(grid)
    return Certificate(
        threshold=float(grid[certified - 1]) if certified else None,
        risk=risk,
        confidence=confidence,
        sequences=sequences,
        sequences_needed=needed,
        empirical_risk=float(losses[certified - 1]) if certified else None,
        p_values=[float(p) for p in p_values],
        certified=certified,
        reason=_reason(grid, losses, certified, sequences, risk, confidence),
    )


def risk_bound(loss: float, *, sequences: int, confidence: float) -> float:
    """Return the least risk that a mean loss certifies, by the test that `certify` applies.

    This is loss + sqrt(ln(1 / (1 - confidence)) / (2 n)), Hoeffding 1963, theorem 1, and never
    more than 1: with probability `confidence` the true mean loss is no larger.

    Args:
        loss: The mean loss, in [0, 1].
        sequences: How many sequences it is over.
        confidence: The probability that the bound holds, in (0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_confidence_level(confidence)
    if not 0 <= loss <= 1:
        raise ValueError(f"expected a mean loss in [0, 1], got {loss}; rescale the loss")
    if sequences < 1:
        raise ValueError(f"expected at least one sequence, got {sequences}; count those averaged")
    return min(1.0, loss + math.sqrt(-math.log(1 - confidence) / (2 * sequences)))


def _reason(
    grid: Array, means: Array, certified: int, sequences: int, risk: float, confidence: float
) -> str:
    """Return why testing stopped after `certified` thresholds."""
    needed = sequences_needed(risk, confidence)
    if sequences < needed:
        return _too_few_words(sequences, needed, risk, confidence)
    reached = f"{certified} of {len(grid)} thresholds certified"
    if certified == len(grid):
        return f"{reached}, down to {grid[-1]:g}; bolder ones were not tested"
    loss = float(means[certified])
    if loss >= risk:
        stop = f"loses {loss:.3g}, which is not below the risk of {risk:g}"
    else:
        # A p-value depends on the margin alone, so a margin needs what a risk of its size does.
        enough = sequences_needed(risk - loss, confidence)
        stop = (
            f"loses {loss:.3g}: {sequences} sequences cannot tell that from the risk of {risk:g}"
            f" at confidence {confidence:g}, {enough} could"
        )
    if certified:
        return f"{reached}, down to {grid[certified - 1]:g}; the next, {grid[certified]:g}, {stop}"
    return f"the safest threshold already {stop}; use the full model"


@dataclass(frozen=True)
class _RankedTokens:
    """Tokens in ascending order, each counted as often as a resample has its sequence.

    A resample repeats whole sequences and leaves the order of the tokens alone, so that one sort
    serves every resample.

    Attributes:
        values: Every token of the corpus, `[S * T]`, ascending.
        through: How many tokens the resample has up to and with each of them, `[S * T]`.
    """

    values: Array
    through: Array

    def value(self, rank: int) -> Any:
        """Return the value of ascending `rank`, a scalar of the confidences' own type."""
        return self.values[self.through.searchsorted(rank, "right")]

    def count(self, value: Any, side: Literal["left", "right"]) -> int:
        """Return how many tokens lie below `value` (`"left"`), or not above it (`"right"`)."""
        position = self.values.searchsorted(value, side)
        return int(self.through[position - 1]) if position else 0


def _fit(tokens: _RankedTokens, hard_ratio: float) -> Any:
    """Return the threshold (see `fit_threshold`), a scalar of the confidences' own type."""
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
    # The two forms of `numpy.quantile`, in the values' own precision: equal to the last bit.
    gap = high - low
    quantile = low + gap * fraction if fraction < 0.5 else high - gap * (1 - fraction)
    quantile = low.dtype.type(quantile)  # NumPy 1 has widened it
    if quantile == low and fraction + hard_ratio >= 1:
        # Rounded onto its lower neighbour (or at ratio 1) it would miss by a whole token.
        return np.nextafter(low, following)
    return quantile


def _resampled(sequences: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each resample has each sequence, `[S]`."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(sequences, size=sequences), minlength=sequences)


def _interval(resampled: Sequence[float] | Array) -> Interval:
    # "weibull" takes the value of rank p (R + 1), which does not make the interval too short where
    # resamples are few: in 1,500 simulated corpora, 99 resamples covered 0.945, by numpy's default
    # 0.93.
    values = np.asarray(resampled, dtype=np.float64)
    low, high = np.quantile(values, _ENDS, method="weibull")
    return float(low), float(high)


def _canonical_order(rows: Array) -> list[int]:
    """Return the rows' numbers in an order that depends on their values alone.

    Resampling draws by position: with this, the order in which sequences came makes no difference.
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
            "expected at least 2 sequences, got 1; its tokens are correlated and give no interval"
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


def _checked_losses_of(losses: Array, sequences: int) -> Array:
    values = np.asarray(losses, dtype=np.float64)
    if values.shape != (sequences,):
        raise ValueError(
            f"expected losses of shape [{sequences}], got {values.shape}; give one per sequence"
        )
    wrong = ~np.isfinite(values)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"expected finite losses, got {values[row]} for sequence {row}; leave that sequence out"
        )
    return values


def _checked_thresholds(thresholds: Array) -> Array:
    grid = np.asarray(thresholds, dtype=np.float64)
    if grid.ndim != 1 or grid.size == 0 or np.isnan(grid).any():
        got = "nan" if grid.ndim == 1 and grid.size else f"shape {grid.shape}"
        raise ValueError(f"expected thresholds [J], got {got}; give at least one")
    if not (grid[1:] < grid[:-1]).all():
        place = int(np.argmin(grid[1:] < grid[:-1]))
        raise ValueError(
            f"expected strictly decreasing thresholds, got {grid[place]:g} before"
            f" {grid[place + 1]:g}; start with the safest and sort the losses alike"
        )
    return grid


def _check_resampling(resamples: int, seed: int) -> None:
    if resamples < _FEWEST_RESAMPLES:
        raise ValueError(
            f"expected at least {_FEWEST_RESAMPLES} resamples, got {resamples}; fewer have no"
            " 95 % interval"
        )
    if seed < 0:
        raise ValueError(f"expected a seed of 0 or more, got {seed}; take any whole number")


def _check_risk(risk: float) -> None:
    if not 0 < risk < 1:
        raise ValueError(f"expected a risk in (0, 1), got {risk}; 0.05 allows a mean loss of 5 %")


def _check_confidence_level(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(
            f"expected a confidence in (0, 1), got {confidence}; 0.95 is the usual choice"
        )
