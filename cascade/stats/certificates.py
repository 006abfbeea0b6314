"""Certificates: thresholds whose risk has a guaranteed bound (Learn then Test)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import UsageError

#: The smallest supported risk. At confidence 0.95 it takes 1.5e12 sequences.
MIN_RISK = 1e-6


@dataclass(frozen=True)
class Certificate:
    """The result of `certify`.

    Attributes:
        threshold: The lowest certified threshold, which lets the most tokens exit; None where
            nothing is certified: use the full model then.
        risk: The bound on the true mean loss.
        confidence: The probability, over the choice of calibration sequences, that no certified
            threshold exceeds the risk.
        sequences: The number of sequences with losses.
        sequences_needed: The number that would certify a threshold without any loss.
        empirical_risk: The mean loss at the certified threshold; None where nothing is certified.
        p_values: One per threshold, in test order, including those after testing stopped.
        certified: The number of certified thresholds, starting with the highest.
        reason: One sentence that says why testing stopped there.
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
    """Check the risk and the confidence of a certificate.

    Args:
        risk: The bound on the true mean loss; None for no certificate.
        confidence: The probability that the guarantee holds.

    Raises:
        UsageError: One of them is out of range, or the risk is too small for any corpus.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"expected a {name} between 0 and 1, got {value:g}")
    if risk is not None and risk < MIN_RISK:
        raise UsageError(
            f"expected a risk of at least {MIN_RISK:g}, got {risk:g}; a smaller one "
            "needs more sequences than any corpus has"
        )


def hoeffding_p_value(loss: Array | float, *, sequences: int, risk: float) -> Array:
    """Return the p-value of "the true risk exceeds `risk`": exp(-2 n max(0, risk - loss)^2).

    Hoeffding 1963, theorem 1, as used for early exit by CALM (Schuster et al. 2022,
    arXiv:2207.07061, section 4) and in Learn then Test (Angelopoulos et al. 2021,
    arXiv:2110.01052). It holds for independent sequences whose loss is in [0, 1].

    Args:
        loss: Mean losses in [0, 1], any shape.
        sequences: The number of sequences behind each mean.
        risk: The bound on the true mean loss, in (0, 1).

    Returns:
        P-values in [0, 1] with the shape of `loss`; 1 where the loss is not below the risk.

    Raises:
        ValueError: An argument is out of range or NaN.
    """
    means = np.asarray(loss, dtype=np.float64)
    wrong = ~((means >= 0) & (means <= 1))  # true for NaN as well
    if wrong.any():
        raise ValueError(f"expected mean losses in [0, 1], got {means[wrong][0]}; rescale the loss")
    if sequences < 1:
        raise ValueError(
            f"expected at least one sequence, got {sequences}; pass how many were averaged"
        )
    _check_risk(risk)
    margin = np.maximum(0.0, risk - means)
    return np.asarray(np.exp(-2.0 * sequences * margin * margin))


def sequences_needed(risk: float, confidence: float) -> int:
    """Return the smallest number of sequences that can certify a threshold without any loss.

    This is ln(1 / (1 - confidence)) / (2 risk^2), rounded up. With fewer, not even a mean loss of
    zero has a small enough p-value (see `hoeffding_p_value`).

    Args:
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Raises:
        ValueError: `risk` or `confidence` is out of range.
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
    # Near whole quotients rounding decides, so apply the test itself.
    for number in (least - 1, least):
        if number > 0 and hoeffding_p_value(0.0, sequences=number, risk=risk) <= 1 - confidence:
            return number
    return least + 1


def too_few(sequences: int, *, risk: float, confidence: float) -> Certificate | None:
    """Return the certificate of too few sequences, for which no loss has to be computed.

    Args:
        sequences: The number of sequences to test thresholds on.
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Returns:
        A certificate without a threshold; None where there are enough sequences.

    Raises:
        ValueError: `risk` or `confidence` is out of range.
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
    """Return the lowest threshold whose true risk is bounded, by Learn then Test.

    Thresholds are tested in the given order, each at level 1 - `confidence`, up to the first that
    cannot be certified (fixed-sequence testing: Angelopoulos et al. 2021, arXiv:2110.01052; CALM,
    Schuster et al. 2022, arXiv:2207.07061, section 4). With a probability of at least `confidence`,
    no certified threshold has a true mean loss above `risk`. This also holds for losses that do
    not grow along the thresholds.

    The guarantee holds for independent sequences drawn like these, and for thresholds that were
    chosen without these losses. Fit thresholds on other sequences.

    Args:
        thresholds: `[J]`, strictly decreasing, so that the first lets the fewest tokens exit.
        losses: `[J, S]`, the loss of each sequence at each threshold, in [0, 1].
        risk: The bound on the true mean loss, in (0, 1).
        confidence: The probability that the guarantee holds, in (0, 1).

    Raises:
        ValueError: A shape is wrong, thresholds do not decrease, a loss is outside [0, 1] or NaN,
            or `risk` or `confidence` is out of range.
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
    # `math.fsum` is exact. NumPy's sum depends on the order, which could tip a p-value.
    means = np.array([math.fsum(row) for row in table.tolist()]) / table.shape[1]
    return certify_means(grid, means, sequences=table.shape[1], risk=risk, confidence=confidence)


def certify_means(
    thresholds: Array, means: Array, *, sequences: int, risk: float, confidence: float
) -> Certificate:
    """Return the result of `certify` from mean losses, which are all that the test uses.

    Args:
        thresholds: `[J]`, strictly decreasing.
        means: `[J]`, the mean loss over all sequences at each threshold, in [0, 1].
        sequences: The number of sequences behind each mean.
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
    """Return the smallest risk that a mean loss certifies, by the same test as `certify`.

    This is loss + sqrt(ln(1 / (1 - confidence)) / (2 n)), Hoeffding 1963, theorem 1, but at most 1.
    The true mean loss is at or below it with probability `confidence`.

    Args:
        loss: The mean loss, in [0, 1].
        sequences: The number of sequences behind the mean.
        confidence: The probability that the bound holds, in (0, 1).

    Raises:
        ValueError: An argument is out of range.
    """
    check_confidence_level(confidence)
    if not 0 <= loss <= 1:
        raise ValueError(f"expected a mean loss in [0, 1], got {loss}; rescale the loss")
    if sequences < 1:
        raise ValueError(
            f"expected at least one sequence, got {sequences}; pass how many were averaged"
        )
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
        # A p-value depends only on the margin between risk and loss.
        enough = sequences_needed(risk - loss, confidence)
        stop = (
            f"loses {loss:.3g}: {sequences} sequences cannot tell that from the risk of {risk:g}"
            f" at confidence {confidence:g}, {enough} could"
        )
    if certified:
        return f"{reached}, down to {grid[certified - 1]:g}; the next, {grid[certified]:g}, {stop}"
    return f"the safest threshold already {stop}; use the full model"


def checked_losses(losses: Array, sequences: int) -> Array:
    """Return losses `[S]` as float64, after checking that they are finite."""
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
    """Return thresholds `[J]` as float64, after checking that they decrease strictly."""
    grid = np.asarray(thresholds, dtype=np.float64)
    if grid.ndim != 1 or grid.size == 0 or np.isnan(grid).any():
        got = "nan" if grid.ndim == 1 and grid.size else f"shape {grid.shape}"
        raise ValueError(f"expected thresholds [J], got {got}; give at least one")
    if not (grid[1:] < grid[:-1]).all():
        place = int(np.argmin(grid[1:] < grid[:-1]))
        raise ValueError(
            f"expected strictly decreasing thresholds, got {grid[place]:g} before"
            f" {grid[place + 1]:g}; sort both thresholds and losses"
        )
    return grid


def _check_risk(risk: float) -> None:
    if not 0 < risk < 1:
        raise ValueError(f"expected a risk in (0, 1), got {risk}; 0.05 allows a mean loss of 5 %")


def check_confidence_level(confidence: float) -> None:
    """Check that a confidence lies in (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"expected a confidence in (0, 1), got {confidence}; 0.95 is the usual choice"
        )
