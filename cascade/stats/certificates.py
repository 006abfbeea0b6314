"""Certificates: thresholds whose risk is bounded (Learn then Test)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import UsageError

#: At a confidence of 0.95 this takes 1.5e12 sequences.
LEAST_RISK = 1e-6


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
    check_confidence_level(confidence)
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
    grid, table = checked_thresholds(thresholds), np.asarray(losses, dtype=np.float64)
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
    grid, losses = checked_thresholds(thresholds), np.asarray(means, dtype=np.float64)
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
    check_confidence_level(confidence)
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


def checked_losses(losses: Array, sequences: int) -> Array:
    """Return losses `[S]` as float64, checked to be finite."""
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


def checked_thresholds(thresholds: Array) -> Array:
    """Return thresholds `[J]` as float64, checked to be strictly decreasing."""
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


def _check_risk(risk: float) -> None:
    if not 0 < risk < 1:
        raise ValueError(f"expected a risk in (0, 1), got {risk}; 0.05 allows a mean loss of 5 %")


def check_confidence_level(confidence: float) -> None:
    """Refuse a confidence outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"expected a confidence in (0, 1), got {confidence}; 0.95 is the usual choice"
        )
