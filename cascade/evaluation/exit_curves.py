"""Exit curves: what leaving at every threshold would do, read off what every token would do.

An exit table knows, for every token, a rule's confidence and whether the exit head predicts what
the full model does; a token that stays counts as predicted alike. With exact propagation that is
so. With any other, those that stay see less of those that left, and some are predicted otherwise:
what is read off a table has to be confirmed by running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from cascade.core.arrays import Array
from cascade.evaluation.records import ExitCurve
from cascade.stats.decision import reaches
from cascade.stats.resampling import draw_counts, percentile_ends

#: Shares of the tokens to fit on that leave at a curve's thresholds, about.
_SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.075, *(step / 40 for step in range(4, 41)))


def lowest_threshold(
    confidence: Array,
    agrees: Array,
    agreement: float,
    *,
    more_wrong: Callable[[Array], Array] | None = None,
) -> float | None:
    """Return the lowest threshold at which a wanted share of all tokens is predicted alike.

    Args:
        confidence: Of every token, any shape.
        agrees: Whether its exit head predicts what the full model does, the same shape.
        agreement: The least share of all tokens whose prediction is the full model's.
        more_wrong: How many tokens are predicted otherwise beside those that the table knows of,
            from how many leave, `[n]` to `[n]`; none where not given.

    Returns:
        One of the confidences; None where no threshold lets a token leave and keeps it.
    """
    values = confidence.ravel()
    order = np.argsort(-values, kind="stable")
    values = values[order]
    wrong = np.cumsum(~agrees.ravel()[order]).astype(np.float64)
    if more_wrong is not None:
        wrong += more_wrong(np.arange(1, len(order) + 1))
    # As the row of a point says it: 1 - 0.9 is a little less than a tenth.
    fine = (len(order) - wrong) / len(order) >= agreement
    # Ties leave together: a threshold may only fall between different confidences.
    distinct = np.append(values[1:] < values[:-1], True)
    last = np.flatnonzero(fine & distinct)
    return float(values[last[-1]]) if len(last) else None


def threshold_of_share(confidence: Array, share: float) -> float:
    """Return the highest threshold at which this share of the tokens leaves, or more by ties.

    Args:
        confidence: Of every token, any shape.
        share: In (0, 1]; at least one token leaves.
    """
    values = -np.sort(-confidence, axis=None)
    return float(values[max(1, round(share * values.size)) - 1])


def exits_and_wrong(confidence: Array, agrees: Array, threshold: float) -> tuple[int, int]:
    """Return how many tokens leave at a threshold, and how many of these are predicted otherwise.

    Args:
        confidence: Of every token, any shape.
        agrees: Whether its exit head predicts what the full model does, the same shape.
        threshold: From which confidence on tokens leave.
    """
    leaves = reaches(confidence, threshold)
    return int(leaves.sum()), int((leaves & ~agrees).sum())


def curve(
    layer: int,
    rule: str,
    fit: tuple[Array, Array],
    confirm: tuple[Array, Array],
    thresholds: Iterable[float] = (),
    *,
    seed: int = 0,
) -> ExitCurve:
    """Return what exiting at a grid of thresholds would do on two corpora, from their tables.

    The grid lets about 1 % to 100 % of the tokens to fit on exit, in 43 steps.

    Args:
        layer: The exit layer.
        rule: The exit rule's name.
        fit: Confidence and agreement of every token to fit on, `[S, T]` each.
        confirm: Those of every token to confirm on.
        thresholds: Further ones.
        seed: Of the intervals.
    """
    grid = {threshold_of_share(fit[0], share) for share in _SHARES}
    found = sorted({*grid, *map(float, thresholds)}, reverse=True)
    fitted = [exits_and_wrong(*fit, threshold) for threshold in found]
    confirmed = [exits_and_wrong(*confirm, threshold) for threshold in found]
    low, high = _intervals(*confirm, found, seed)
    return ExitCurve(
        exit_layer=layer,
        rule=rule,
        thresholds=found,
        fit_exits=[exits for exits, _ in fitted],
        fit_wrong=[wrong for _, wrong in fitted],
        exits=[exits for exits, _ in confirmed],
        wrong=[wrong for _, wrong in confirmed],
        low=low,
        high=high,
    )


def _intervals(
    confidence: Array, agrees: Array, thresholds: list[float], seed: int
) -> tuple[list[float], list[float]]:
    sequences, length = confidence.shape
    agreed = np.stack(
        [(agrees | ~reaches(confidence, threshold)).sum(axis=1) for threshold in thresholds], axis=1
    )
    weights = np.stack(list(draw_counts(sequences, seed)))
    ends = percentile_ends(weights @ agreed / (sequences * length))
    # Six digits: a token in a million is finer than any corpus here.
    low, high = np.round(ends, 6).tolist()
    return low, high


def lowest_kept(curve: ExitCurve, tokens: int, agreement: float) -> int | None:
    """Return the index of a curve's lowest threshold that keeps a wanted agreement.

    Args:
        curve: An exit curve.
        tokens: How many tokens it was fitted on.
        agreement: The least share of all tokens whose prediction is the full model's.

    Returns:
        The index; None where no threshold lets a token exit and keeps the agreement.
    """
    # The lower a threshold, the more tokens exit: those predicted otherwise only grow in number.
    kept = [
        place
        for place, (exits, wrong) in enumerate(zip(curve.fit_exits, curve.fit_wrong, strict=True))
        if exits and (tokens - wrong) / tokens >= agreement
    ]
    return max(kept, default=None)
