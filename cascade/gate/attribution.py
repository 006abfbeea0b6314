"""Attribution: where the evidence of a drift points, from layer means alone.

A layer's row depends on that layer and on those below it, never on those above. So the first row
that moves is the broken one. Faults that move every row are distinguished by the size of the
movement. Faults in reading the states leave the right numbers in the wrong place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.core.arrays import Array
from cascade.gate.records import Attribution

#: The most that rounding moves a sequence's mean similarity on the residual stream. Measured on
#: SmolLM2-135M: all weights through bf16 1e-4, through int8 7e-4; an epsilon of 1e-6 instead of
#: 1e-5 4e-5. Faults of structure in every layer begin at 4e-3 (attention scale times 1.05).
ROUNDING = 1e-3


#: The share of rows that must have moved, or be found in another place, to count as all of them:
#: the ends of a shifted table have no neighbour.
_MOST = 0.8


_NORMED = "+norm"


def attribute(
    layers: Sequence[str], obtained: Array, expected: Array, tolerance: float | Array
) -> Attribution:
    """Return where the evidence of a drift points.

    Args:
        layers: Labels of the rows, in order of depth.
        obtained: `[S, L]`, means of the compared sequences, NaN where a row is missing.
        expected: The same of the baseline.
        tolerance: Of each row `[L]`, or of all: a smaller difference is no movement.
    """
    limits = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), (len(layers),))
    lacking = [
        label
        for label, row in zip(layers, (obtained + expected).T, strict=True)
        if np.isnan(row).all()
    ]
    if lacking:
        return Attribution(
            cause="rows", layer=lacking[0], text=f"{_rows(lacking)} on one side only, or NaN there"
        )
    difference = np.abs(obtained - expected)
    moved = ~(difference <= limits).all(axis=0)  # NaN has moved
    found = _capture(layers, obtained, expected, limits, moved)
    if found is not None:
        return found
    if not moved.any():
        text = "every mean is as before, but tokens are counted on other sides of the quantiles"
        return Attribution(
            cause="counting", layer=None, text=f"{text}: bins, edges or comparisons changed"
        )
    first = int(np.argmax(moved))
    if first > 0:
        return Attribution(
            cause="layer", layer=layers[first], text=_one_layer(layers, first, obtained, limits)
        )
    residual = [not label.endswith(_NORMED) for label in layers]
    largest = float(np.nanmax(difference[:, residual]))
    if largest <= ROUNDING and moved.mean() >= _MOST:
        text = (
            f"small (at most {largest:.0e}) and in every layer from the first on: rounding, as of "
            "another dtype, quantization, kernel or epsilon"
        )
        return Attribution(cause="numerics", layer=None, text=text)
    text = (
        f"from layer {layers[0]} on, up to {largest:.0e}: embeddings, positions, mask, attention "
        f"or the text itself, in all layers; or layer {layers[0]} alone"
    )
    return Attribution(cause="model", layer=layers[0], text=text)


def _rows(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return f"row {labels[0]} is"
    return f"rows {', '.join(labels[:5])}{' ...' * (len(labels) > 5)} are"


def _one_layer(layers: Sequence[str], first: int, obtained: Array, limits: Array) -> str:
    label = layers[first]
    if label.endswith(_NORMED):
        return "nothing moved but the row behind the final norm: its weights or epsilon"
    if (np.abs(obtained[:, first] - 1) <= limits[first]).all():
        return f"layer {label} hands its input through: it is skipped, or its output is zero"
    return (
        f"layers below {label} are as before, layer {label} is the first that moved: its weights, "
        "or code that runs there only"
    )


def _capture(
    layers: Sequence[str], obtained: Array, expected: Array, limits: Array, moved: Array
) -> Attribution | None:
    """Return which rows are found in another place; None where none is."""
    if not moved.any():
        return None
    residual = [place for place, label in enumerate(layers) if not label.endswith(_NORMED)]
    for shift in (1, -1):
        pairs = [(a, a + shift) for a in residual if a + shift in residual]
        here = [
            a for a, b in pairs if _same(obtained[:, a], expected[:, b], limits[a]) and moved[a]
        ]
        if len(pairs) > 1 and len(here) >= _MOST * len(pairs):
            side = "above" if shift > 0 else "below"
            text = (
                f"row {layers[here[0]]} holds what the baseline has for layer "
                f"{layers[here[0] + shift]}, and so on: the layer index is off by one (the pair "
                f"{side} is taken)"
            )
            return Attribution(cause="capture", layer=layers[here[0]], text=text)
    last = residual[-1] if residual else None
    normed = next((p for p, label in enumerate(layers) if label.endswith(_NORMED)), None)
    if last is not None and normed is not None:
        for a, b in ((last, normed), (normed, last)):
            if moved[a] and _same(obtained[:, a], expected[:, b], limits[a]):
                text = (
                    f"row {layers[a]} holds what the baseline has for row {layers[b]}: the states "
                    "before and behind the final norm are mixed up"
                )
                return Attribution(cause="capture", layer=layers[a], text=text)
    order = _order(obtained, expected, limits)
    if order is not None:
        text = (
            "every sequence's numbers are another one's: rows of the batch are in another order "
            "than their texts"
        )
        return Attribution(cause="capture", layer=None, text=text)
    return None


def _same(one: Array, other: Array, limit: float) -> bool:
    return bool((np.abs(one - other) <= limit).all())


def _order(obtained: Array, expected: Array, limits: Array) -> list[int] | None:
    """Return which sequence each row really is, where rows are permuted; None where not."""
    order = []
    for row in obtained:
        fits = np.flatnonzero((np.abs(expected - row) <= limits).all(axis=1))
        if not len(fits):
            return None
        order.append(int(fits[0]))
    wanted = list(range(len(expected)))
    return order if sorted(order) == wanted and order != wanted else None
