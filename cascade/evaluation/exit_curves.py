"""Exit curves: exits and agreement at every threshold, estimated from an exit table.

An exit table has every token's confidence and whether the exit head and the full model predict the
same token. Tokens that continue count as agreeing with the full model. With exact propagation this
is true. With frozen or ridge propagation, continuing tokens attend to approximate keys and values
of exited tokens, and some predictions change. Estimates from a table must therefore be confirmed by
running the exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from cascade.core.arrays import Array
from cascade.evaluation.records import ExitCurve
from cascade.stats.decision import reaches
from cascade.stats.resampling import draw_counts, percentile_ends

#: Approximate exit shares of a curve's thresholds on the tokens to fit on.
_SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.075, *(step / 40 for step in range(4, 41)))


def lowest_threshold(
    confidence: Array,
    agrees: Array,
    agreement: float,
    *,
    more_wrong: Callable[[Array], Array] | None = None,
) -> float | None:
    """Return the lowest threshold at which the predictions of a target share of tokens agree.

    Args:
        confidence: The confidence of every token, any shape.
        agrees: Whether exit head and full model predict the same token; same shape.
        agreement: The minimum share of all tokens whose prediction is the full model's.
        more_wrong: The number of additional differing predictions as a function of the number of
            exits, `[n]` to `[n]` (default: none).

    Returns:
        One of the confidences, or None if no threshold lets a token exit and keeps the agreement.
    """
    values = confidence.ravel()
    order = np.argsort(-values, kind="stable")
    values = values[order]
    wrong = np.cumsum(~agrees.ravel()[order]).astype(np.float64)
    if more_wrong is not None:
        wrong += more_wrong(np.arange(1, len(order) + 1))
    # The same formula as in a point's row, since 1 - 0.9 is slightly less than 0.1 in floats.
    fine = (len(order) - wrong) / len(order) >= agreement
    # Tied tokens exit together, so a threshold must separate different confidences.
    distinct = np.append(values[1:] < values[:-1], True)
    last = np.flatnonzero(fine & distinct)
    return float(values[last[-1]]) if len(last) else None


def threshold_of_share(confidence: Array, share: float) -> float:
    """Return the highest threshold at which at least this share of the tokens exits.

    Args:
        confidence: The confidence of every token, any shape.
        share: The exit share, in (0, 1]; at least one token exits.
    """
    values = -np.sort(-confidence, axis=None)
    return float(values[max(1, round(share * values.size)) - 1])


def exits_and_wrong(confidence: Array, agrees: Array, threshold: float) -> tuple[int, int]:
    """Return how many tokens exit at a threshold, and how many of these disagree.

    Args:
        confidence: The confidence of every token, any shape.
        agrees: Whether exit head and full model predict the same token; same shape.
        threshold: Tokens with a confidence at or above it exit.
    """
    exits = reaches(confidence, threshold)
    return int(exits.sum()), int((exits & ~agrees).sum())


def curve(
    layer: int,
    rule: str,
    fit: tuple[Array, Array],
    confirm: tuple[Array, Array],
    thresholds: Iterable[float] = (),
    *,
    seed: int = 0,
) -> ExitCurve:
    """Return the exits and disagreements at a grid of thresholds on two corpora.

    The grid has 43 thresholds, at which about 1 % to 100 % of the tokens to fit on exit.

    Args:
        layer: The exit layer.
        rule: The name of the exit rule.
        fit: Confidence and agreement of every token to fit on, `[S, T]` each.
        confirm: Confidence and agreement of every token to confirm on, `[S, T]` each.
        thresholds: Additional thresholds.
        seed: Seed of the intervals.
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
    # Six digits resolve one token in a million, which is finer than any corpus here.
    low, high = np.round(ends, 6).tolist()
    return low, high


def lowest_kept(curve: ExitCurve, tokens: int, agreement: float) -> int | None:
    """Return the index of a curve's lowest threshold that keeps a target agreement.

    Args:
        curve: An exit curve.
        tokens: The number of tokens that it was fitted on.
        agreement: The minimum share of all tokens whose prediction is the full model's.

    Returns:
        The index, or None if no threshold lets a token exit and keeps the agreement.
    """
    # At lower thresholds more tokens exit, so the number of disagreements never decreases.
    kept = [
        place
        for place, (exits, wrong) in enumerate(zip(curve.fit_exits, curve.fit_wrong, strict=True))
        if exits and (tokens - wrong) / tokens >= agreement
    ]
    return max(kept, default=None)
