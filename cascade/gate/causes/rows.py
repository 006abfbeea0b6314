"""Causes that the baseline's own rows predict: correct values in the wrong rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cascade.core.arrays import Array
from cascade.gate.causes.hypotheses import Evidence, Hypothesis

#: The name of the hypothesis that the row after the final norm holds the values before it.
NO_FINAL_NORM = "no final norm"


#: The name of the hypothesis that a layer returns its input.
SKIPPED = "layer skipped"


def row_hypotheses(evidence: Evidence) -> Iterator[Hypothesis]:
    """Yield each cause that predicts the rows from the baseline's rows alone.

    Args:
        evidence: What was measured, with no row missing.
    """
    yield from _neighbours(evidence)
    yield from _around_the_norm(evidence)
    yield from _other_order(evidence)
    yield from _skipped(evidence)


def _neighbours(evidence: Evidence) -> Iterator[Hypothesis]:
    layers, residual = evidence.layers, evidence.residual
    for shift in (1, -1):
        pairs = [(place, place + shift) for place in residual if place + shift in residual]
        if len(pairs) < 2:
            continue
        predicted = np.full_like(evidence.expected, np.nan)
        for here, there in pairs:
            predicted[:, here] = evidence.expected[:, there]
        side = "above" if shift > 0 else "below"
        here, there = pairs[0]
        yield Hypothesis(
            name=f"rows of the pair {side}",
            cause="capture",
            layer=layers[here],
            text=(
                f"row {layers[here]} holds the baseline's values of layer {layers[there]}, and so "
                f"on; the layer index is off by one (each row uses the pair {side})"
            ),
            left=evidence.distance(predicted, evidence.obtained),
        )


def _around_the_norm(evidence: Evidence) -> Iterator[Hypothesis]:
    layers, normed = evidence.layers, evidence.normed
    if normed is None or not evidence.residual:
        return
    last = evidence.residual[-1]
    predicted = evidence.expected.copy()
    predicted[:, last] = evidence.expected[:, normed]
    yield Hypothesis(
        name="last layer read after the final norm",
        cause="capture",
        layer=layers[last],
        text=(
            f"row {layers[last]} holds the baseline's values of row {layers[normed]}; the last "
            "layer's output is read after the final norm"
        ),
        left=evidence.distance(predicted, evidence.obtained),
    )
    predicted = evidence.expected.copy()
    predicted[:, normed] = evidence.expected[:, last]
    yield Hypothesis(
        name=NO_FINAL_NORM,
        cause="layer",
        layer=layers[normed],
        text=(
            f"row {layers[normed]} holds the baseline's values of row {layers[last]}, so the "
            "final norm changes no direction: its weights are all equal, it is skipped, or the "
            "state is read before it"
        ),
        left=evidence.distance(predicted, evidence.obtained),
    )


def _other_order(evidence: Evidence) -> Iterator[Hypothesis]:
    order = _order(evidence)
    if order is None:
        return
    yield Hypothesis(
        name="sequences in another order",
        cause="capture",
        layer=None,
        text=(
            "every sequence has the values of another one; the rows of the batch are in another "
            "order than their texts"
        ),
        left=evidence.distance(evidence.expected[order], evidence.obtained),
    )


def _order(evidence: Evidence) -> list[int] | None:
    """Return the sequence that each row really is, if rows are permuted; otherwise None."""
    order = []
    for row in evidence.obtained:
        near = (np.abs(evidence.expected - row) <= evidence.tolerance).all(axis=(1, 2))
        fits: Array = np.flatnonzero(near)
        if not len(fits):
            return None
        order.append(int(fits[0]))
    wanted = list(range(len(evidence.expected)))
    return order if sorted(order) == wanted and order != wanted else None


def _skipped(evidence: Evidence) -> Iterator[Hypothesis]:
    first = evidence.first
    if first not in evidence.residual:
        return
    predicted = np.full_like(evidence.expected, np.nan)
    predicted[:, :first] = evidence.expected[:, :first]
    predicted[:, first] = 1.0
    label = evidence.layers[first]
    yield Hypothesis(
        name=SKIPPED,
        cause="layer",
        layer=label,
        text=f"layer {label} returns its input unchanged; it is skipped, or its output is zero",
        left=evidence.distance(predicted, evidence.obtained),
    )
