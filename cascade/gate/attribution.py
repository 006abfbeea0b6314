"""Attribution: the likely cause of a drift, from the rows alone.

A layer's row depends on that layer and the layers below it, never on those above. The first row
that moves is therefore the broken layer. Faults in capturing the states put correct values in the
wrong rows. What else can be computed needs the model (see `cascade.gate.causes.explaining`).

Long contexts and decoding are attributed by themselves. Long sequences are compared with the
baseline's once its other sequences agree, and passes through the KV cache with the prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec.structs
import numpy as np

from cascade.core.arrays import Array
from cascade.gate.causes.hypotheses import Evidence, best_of, growth, named, tried
from cascade.gate.causes.rows import row_hypotheses
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


#: The share of rows that must have moved to count as all rows.
_MOST = 0.8


def attribute(
    layers: Sequence[str], obtained: Array, expected: Array, tolerance: float | Array
) -> Attribution:
    """Return the likely cause of a drift, as far as the rows alone show it.

    Args:
        layers: Labels of the rows, in order of depth.
        obtained: `[S, L]`, means of the compared sequences, or `[S, L, 2]` with their mean squares.
            NaN where a row is missing.
        expected: The same of the baseline.
        tolerance: The largest difference of a mean that does not count as movement, per row `[L]`
            or for all rows. Mean squares may differ by twice as much.
    """
    evidence = evidence_of(layers, obtained, expected, tolerance)
    both = (evidence.obtained + evidence.expected)[..., 0]
    lacking = [label for label, row in zip(layers, both.T, strict=True) if np.isnan(row).all()]
    if lacking:
        return Attribution(
            cause="rows", layer=lacking[0], text=f"{_rows(lacking)} missing or NaN on one side"
        )
    moved = evidence.moved
    if not moved.any():
        text = (
            "every mean is unchanged, but tokens fall on other sides of the quantiles; the bins, "
            "edges or comparisons have changed"
        )
        return Attribution(cause="counting", layer=None, text=text)
    hypotheses = list(row_hypotheses(evidence))
    best = best_of(hypotheses, evidence.moved_by)
    if best is not None:
        return named(best, hypotheses)
    found = _without_a_name(evidence)
    return msgspec.structs.replace(found, tried=tried(hypotheses))


def evidence_of(
    layers: Sequence[str], obtained: Array, expected: Array, tolerance: float | Array
) -> Evidence:
    """Return what was measured in the form that hypotheses need; arguments as for `attribute`."""
    sides = [side if side.ndim == 3 else side[..., None] for side in (obtained, expected)]
    limits = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), (len(layers),))
    # A square moves twice as far as a similarity near 1.
    scales = np.arange(1, sides[0].shape[2] + 1)
    return Evidence(layers, sides[0], sides[1], limits[:, None] * scales)


def _without_a_name(evidence: Evidence) -> Attribution:
    """Return what is known if no cause is named: the first layer, size and growth."""
    label, first = evidence.layers[evidence.first], evidence.first
    if first == evidence.normed:
        text = "only the row after the final norm has moved; check the norm's weights and epsilon"
        return Attribution(cause="layer", layer=label, text=text)
    if first > 0:
        text = (
            f"{growth(evidence)}; the layers below it are unchanged, so check its weights and the "
            "code that runs only there"
        )
        return Attribution(cause="layer", layer=label, text=text)
    difference = np.abs(evidence.obtained - evidence.expected)[..., 0]
    largest = float(np.nanmax(difference[:, evidence.residual]))
    if largest <= ROUNDING and evidence.moved.mean() >= _MOST:
        text = (
            f"every layer has moved, by at most {largest:.0e}; rounding moves layers that little "
            "(another dtype, quantization, kernel or epsilon)"
        )
        return Attribution(cause="numerics", layer=None, text=text)
    text = (
        f"{growth(evidence)}; check the embeddings, positions, mask, attention and the text "
        f"itself, or layer {label} alone"
    )
    return Attribution(cause="model", layer=label, text=text)


def _rows(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return f"row {labels[0]} is"
    return f"rows {', '.join(labels[:5])}{' ...' * (len(labels) > 5)} are"


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
