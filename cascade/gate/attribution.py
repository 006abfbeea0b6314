"""Attribution: the likely cause of a drift, from layer means alone.

A layer's row depends on that layer and the layers below it, never on those above. The first row
that moves is therefore the broken layer. Faults that move every row are distinguished by the size
of the movement. Faults in capturing the states put correct values in the wrong rows.

Long contexts and decoding are attributed by themselves. Long sequences are compared with the
baseline's once its other sequences agree, and passes through the KV cache with the prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.core.arrays import Array
from cascade.gate.records import (
    Attribution,
    DecodingKind,
    DecodingRecord,
    LongContextRecord,
    PositionRange,
)

#: The most by which rounding moves a sequence's mean similarity on the residual stream. Measured
#: on SmolLM2-135M: all weights rounded to bf16, 1e-4; to int8, 7e-4; an epsilon of 1e-6 instead of
#: 1e-5, 4e-5. Structural faults in every layer begin at 4e-3 (attention scale times 1.05).
ROUNDING = 1e-3


#: The share of rows that must have moved, or be found in another place, to count as all rows. It
#: is below 1 because the ends of a shifted table have no neighbour.
_MOST = 0.8


_NORMED = "+norm"


def attribute(
    layers: Sequence[str], obtained: Array, expected: Array, tolerance: float | Array
) -> Attribution:
    """Return the likely cause of a drift.

    Args:
        layers: Labels of the rows, in order of depth.
        obtained: `[S, L]`, means of the compared sequences, NaN where a row is missing.
        expected: `[S, L]`, the same means of the baseline.
        tolerance: The largest difference that does not count as movement, per row `[L]` or for all
            rows.
    """
    limits = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), (len(layers),))
    lacking = [
        label
        for label, row in zip(layers, (obtained + expected).T, strict=True)
        if np.isnan(row).all()
    ]
    if lacking:
        return Attribution(
            cause="rows", layer=lacking[0], text=f"{_rows(lacking)} missing or NaN on one side"
        )
    difference = np.abs(obtained - expected)
    moved = ~(difference <= limits).all(axis=0)  # NaN has moved
    found = _capture(layers, obtained, expected, limits, moved)
    if found is not None:
        return found
    if not moved.any():
        text = (
            "every mean is unchanged, but tokens fall on other sides of the quantiles; the bins, "
            "edges or comparisons have changed"
        )
        return Attribution(cause="counting", layer=None, text=text)
    first = int(np.argmax(moved))
    if first > 0:
        return Attribution(
            cause="layer", layer=layers[first], text=_one_layer(layers, first, obtained, limits)
        )
    residual = [not label.endswith(_NORMED) for label in layers]
    largest = float(np.nanmax(difference[:, residual]))
    if largest <= ROUNDING and moved.mean() >= _MOST:
        text = (
            f"every layer has moved, by at most {largest:.0e}; this looks like rounding, from "
            "another dtype, quantization, kernel or epsilon"
        )
        return Attribution(cause="numerics", layer=None, text=text)
    text = (
        f"layers have moved from layer {layers[0]} on, by up to {largest:.0e}; check the "
        "embeddings, positions, mask, attention and the text itself, or layer "
        f"{layers[0]} alone"
    )
    return Attribution(cause="model", layer=layers[0], text=text)


def _rows(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return f"row {labels[0]} is"
    return f"rows {', '.join(labels[:5])}{' ...' * (len(labels) > 5)} are"


def _one_layer(layers: Sequence[str], first: int, obtained: Array, limits: Array) -> str:
    label = layers[first]
    if label.endswith(_NORMED):
        return "only the row after the final norm has moved; check the norm's weights and epsilon"
    if (np.abs(obtained[:, first] - 1) <= limits[first]).all():
        return f"layer {label} returns its input unchanged; it is skipped, or its output is zero"
    return (
        f"layer {label} is the first that moved, the layers below it are unchanged; check its "
        "weights and the code that runs only there"
    )


def _capture(
    layers: Sequence[str], obtained: Array, expected: Array, limits: Array, moved: Array
) -> Attribution | None:
    """Return the attribution if rows are found in another place; otherwise None."""
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
                f"row {layers[here[0]]} holds the baseline's values of layer "
                f"{layers[here[0] + shift]}, and so on; the layer index is off by one (each row "
                f"uses the pair {side})"
            )
            return Attribution(cause="capture", layer=layers[here[0]], text=text)
    last = residual[-1] if residual else None
    normed = next((p for p, label in enumerate(layers) if label.endswith(_NORMED)), None)
    if last is not None and normed is not None:
        for a, b in ((last, normed), (normed, last)):
            if moved[a] and _same(obtained[:, a], expected[:, b], limits[a]):
                text = (
                    f"row {layers[a]} holds the baseline's values of row {layers[b]}; the states "
                    "before and after the final norm are swapped"
                )
                return Attribution(cause="capture", layer=layers[a], text=text)
    order = _order(obtained, expected, limits)
    if order is not None:
        text = (
            "every sequence has the values of another one; the rows of the batch are in another "
            "order than their texts"
        )
        return Attribution(cause="capture", layer=None, text=text)
    return None


def _same(one: Array, other: Array, limit: float) -> bool:
    return bool((np.abs(one - other) <= limit).all())


def _order(obtained: Array, expected: Array, limits: Array) -> list[int] | None:
    """Return the sequence that each row really is, if rows are permuted; otherwise None."""
    order = []
    for row in obtained:
        fits = np.flatnonzero((np.abs(expected - row) <= limits).all(axis=1))
        if not len(fits):
            return None
        order.append(int(fits[0]))
    wanted = list(range(len(expected)))
    return order if sorted(order) == wanted and order != wanted else None


# --- Long contexts ---------------------------------------------------------------------------


def long_attribution(record: LongContextRecord) -> Attribution | None:
    """Return long contexts as the likely cause, with the first positions and layer; None if passed.

    Args:
        record: The result of `cascade.gate.long_context_comparison.compare_long`.
    """
    if not record.moved:
        return None
    first = record.moved[0]
    most = max(each.difference for each in record.moved)
    text = (
        f"{moved_positions(record)} are computed differently, from layer {first.layer} on, by up "
        f"to {most:.0e}, and short sequences are not; {_what_to_check(first)}"
    )
    return Attribution(cause="long context", layer=first.layer, text=text)


def moved_positions(record: LongContextRecord) -> str:
    """Return which positions of the long sequences have moved, in words.

    Args:
        record: A result with at least one range that moved.
    """
    first, last = record.moved[0].first, record.moved[-1].last
    whole = last == record.length
    if first == 1:
        some = "all positions" if whole else f"positions up to {last:,}"
        return f"{some} of sequences of {record.length:,} tokens"
    return f"positions beyond {first - 1:,}" if whole else f"positions {first:,} to {last:,}"


def _what_to_check(first: PositionRange) -> str:
    """Return what can compute long sequences differently, by the first positions that moved."""
    if first.first == 1:
        return (
            "check what depends on the length of the whole sequence (dynamic or long RoPE scaling) "
            "and the sliding window, attention sinks and positions of layer "
            f"{first.layer}"
        )
    return (
        f"check the sliding window, attention sinks and positions of layer {first.layer} (RoPE, "
        "its scaling and original length, ALiBi, learned positions)"
    )


# --- Decoding --------------------------------------------------------------------------------

#: What to check if a pass of this kind is the first that differs.
_CHECKS: dict[DecodingKind, str] = {
    "prefix": "what layer {layer} computes only with use_cache",
    "token": "the cached keys and values of layer {layer}, and its positions, mask and kernel for "
    "a single token",
    "draft": "positions, mask and kernel of layer {layer} for several tokens behind a cache",
    "after draft": "how the cache of layer {layer} removes rejected tokens (crop)",
}


def decoding_attribution(record: DecodingRecord) -> Attribution | None:
    """Return decoding as the likely cause, with the first step and layer; None if it passed.

    Args:
        record: The result of `cascade.gate.decoding_check.check_decoding`.
    """
    first = record.first
    if first is None:
        return None
    if record.error is not None and first == len(record.passes):
        where = "" if record.error_layer is None else f" in layer {record.error_layer}"
        text = f"cached step {first} raises an error{where}, the prefill does not: {record.error}"
        return Attribution(cause="decoding", layer=record.error_layer, text=text)
    made = record.passes[first]
    layer = str(made.layer)
    size = "NaN" if made.difference is None else f"up to {made.difference:.0e}"
    text = (
        f"{pass_in_words(record, first)} is the first that differs from the prefill of the same "
        f"tokens, from layer {layer} on, by {size}; check "
        f"{_CHECKS[made.kind].format(layer=layer)}"
    )
    return Attribution(cause="decoding", layer=layer, text=text)


def pass_in_words(record: DecodingRecord, number: int) -> str:
    """Return what a pass through the KV cache computed, in words.

    Args:
        record: The result of `cascade.gate.decoding_check.check_decoding`.
        number: The number of the pass, from 0.
    """
    made = record.passes[number]
    first, last = made.start + 1, made.start + made.tokens + made.rejected
    if made.kind == "prefix":
        return f"the pass over tokens 1 to {last:,} that fills the KV cache"
    if made.kind == "token":
        return f"cached step {number} (token {first:,} alone)"
    if made.kind == "draft":
        return f"cached step {number} (tokens {first:,} to {last:,} at once)"
    return f"cached step {number} (token {first:,} alone, after rejected tokens were removed)"
