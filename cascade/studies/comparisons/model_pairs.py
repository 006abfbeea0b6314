"""Compare a measured model with the first one: dips, profiles, sequences and thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from scipy import stats

from cascade.core.arrays import Array
from cascade.core.schema import known
from cascade.studies.comparisons.compared_models import MeasuredModel
from cascade.studies.comparisons.model_records import (
    DipMatch,
    LayerChange,
    MatchedDips,
    ModelPair,
    PairedChanges,
    ProfileDistance,
    ReachedHardRatio,
)

#: Two dips match if their relative depths differ by at most this, or by at most one layer of the
#: shallower model, whichever is larger.
TOLERANCE = Fraction(1, 20)

_CONFIDENCE = 0.95


def compare_with_first(measured: Mapping[str, MeasuredModel]) -> Iterator[ModelPair]:
    """Yield the comparison of every other measured model with the first one.

    Args:
        measured: Measured models by label, in order.
    """
    if not measured:
        return
    (first_label, first), *others = measured.items()
    for label, other in others:
        reason = _unpaired(first, other)
        same_depth = first.sizes.num_layers == other.sizes.num_layers
        yield ModelPair(
            model=label,
            against=first_label,
            same_tokenizer=_same_tokenizer(first, other),
            dips=_matched_dips(first, other),
            apart=_apart(first, other),
            unpaired=reason,
            paired=_paired(first, other) if reason is None else None,
            thresholds=_reached(first, other) if same_depth else None,
        )


def relative_depth(layer: int, num_layers: int) -> float:
    """Return a layer's relative depth, rounded to six decimals.

    Example:
        >>> relative_depth(29, 30)
        0.966667
    """
    return round(layer / num_layers, 6)


def _same_tokenizer(first: MeasuredModel, other: MeasuredModel) -> bool:
    hashes = [model.record.provenance.tokenizer_hash for model in (first, other)]
    return hashes[0] == hashes[1] and hashes[0] is not None


# --- Dips and profiles -----------------------------------------------------------------------


def match_dips(
    first: Sequence[int], first_layers: int, second: Sequence[int], second_layers: int
) -> list[tuple[int, int]]:
    """Match the dips of two models by relative depth, one to one, nearest pairs first.

    Args:
        first: Dips of the first model, layers in 1..first_layers.
        first_layers: Number of decoder layers of the first model.
        second: Dips of the second model.
        second_layers: Number of decoder layers of the second model.

    Returns:
        Pairs (first, second), in the order of the first. The relative depths of a pair differ by at
        most 0.05 or one layer of the shallower model, whichever is larger. No two unmatched dips
        are that close to each other.

    Example:
        >>> match_dips([25], 30, [50], 60)
        [(25, 50)]
    """
    most = _most_apart(first_layers, second_layers)
    near = []
    for one in first:
        for other in second:
            depths = Fraction(one, first_layers), Fraction(other, second_layers)
            distance = abs(depths[0] - depths[1])
            if distance <= most:
                # Sort by depths, so that the order of the two models does not matter.
                near.append((distance, min(depths), max(depths), one, other))
    matched: dict[int, int] = {}
    for *_, one, other in sorted(near):
        if one not in matched and other not in matched.values():
            matched[one] = other
    return sorted(matched.items())


def _most_apart(first_layers: int, second_layers: int) -> Fraction:
    return max(TOLERANCE, Fraction(1, min(first_layers, second_layers)))


def _matched_dips(first: MeasuredModel, other: MeasuredModel) -> MatchedDips:
    models = (first, other)
    num_layers = [model.sizes.num_layers for model in models]
    means = [{row.layer: row.mean for row in model.record.layers} for model in models]
    dips = [[int(layer) for layer in model.record.structure.dips] for model in models]
    pairs = match_dips(dips[0], num_layers[0], dips[1], num_layers[1])
    return MatchedDips(
        # Dips are defined only for profiles with a cutoff.
        judged=all(model.record.structure.cutoff is not None for model in models),
        tolerance=round(float(_most_apart(num_layers[0], num_layers[1])), 6),
        matched=[
            DipMatch(
                layers=[str(layer) for layer in pair],
                depths=[
                    relative_depth(layer, depth)
                    for layer, depth in zip(pair, num_layers, strict=True)
                ],
                means=[of_model[str(layer)] for layer, of_model in zip(pair, means, strict=True)],
            )
            for pair in pairs
        ],
        unmatched=[
            [str(dip) for dip in dips[side] if dip not in {pair[side] for pair in pairs}]
            for side in (0, 1)
        ],
    )


def _apart(first: MeasuredModel, other: MeasuredModel) -> ProfileDistance:
    """Return the distance of two profiles in degrees, at the depths of the shallower one."""
    shallow, deep = sorted((first, other), key=lambda model: model.sizes.num_layers)
    depths, angles = _angles(shallow)
    difference = np.abs(np.interp(depths, *_angles(deep)) - angles)
    most = int(np.argmax(difference))
    return ProfileDistance(
        degrees=round(float(np.sqrt(np.mean(difference**2))), 4),
        most_degrees=round(float(difference[most]), 4),
        most_depth=round(float(depths[most]), 6),
    )


def _angles(model: MeasuredModel) -> tuple[Array, Array]:
    """Return relative depths and the angles of mean similarities in degrees, `[N]` each."""
    depth = model.sizes.num_layers
    means = np.clip(model.profile.statistics.mean()[:depth], -1, 1)
    return np.arange(1, depth + 1) / depth, np.degrees(np.arccos(means))


# --- Sequences and thresholds ----------------------------------------------------------------


def _unpaired(first: MeasuredModel, other: MeasuredModel) -> str | None:
    """Return why two models cannot be compared sequence by sequence; None if they can."""
    if not _same_tokenizer(first, other):
        return "their tokenizers differ, so their tokens differ"
    begun = [known(one.record.provenance.corpus.bos) == "yes" for one in (first, other)]
    if begun[0] != begun[1]:
        return "only one of them read text with BOS"
    if not np.array_equal(first.profile.sequence_fingerprints, other.profile.sequence_fingerprints):
        return "they read different sequences"
    if first.profile.statistics.layers != other.profile.statistics.layers:
        counts = [model.sizes.num_layers for model in (first, other)]
        if counts[0] != counts[1]:
            return f"they have different numbers of layers ({counts[0]} and {counts[1]})"
        return "only one of them has a final norm"
    return None


def _paired(first: MeasuredModel, other: MeasuredModel) -> PairedChanges:
    """Return the changes between two models over the same tokens, layer by layer."""
    means = [model.profile.rows.all().mean for model in (first, other)]
    moved = means[1] - means[0]
    rows = [
        _layer_change(layer, moved[:, row])
        for row, layer in enumerate(first.profile.statistics.layers)
    ]
    # Skip the final norm: it is not a layer, and it amplifies the changes of the layers.
    decoder = rows[: first.sizes.num_layers]
    largest = max(decoder, key=lambda row: row.mean_size)
    return PairedChanges(sequences=len(moved), layers=rows, largest_mover=largest.layer)


def _layer_change(layer: str, values: Array) -> LayerChange:
    most = int(np.argmax(np.abs(values)))
    return LayerChange(
        layer=layer,
        mean=_digits(float(values.mean())),
        interval=_interval(values),
        mean_size=_digits(float(np.abs(values).mean())),
        largest=_digits(float(values[most])),
        sequence=most + 1,
    )


def _interval(values: Array) -> list[float] | None:
    """Return Student's t interval of the mean; None for a single sequence."""
    if len(values) < 2:
        return None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * error
    mean = float(values.mean())
    return [_digits(mean - reach), _digits(mean + reach)]


def _digits(value: float) -> float:
    """Round to six significant digits. Differences can be as small as arithmetic errors."""
    return float(f"{value:.6g}")


def _reached(first: MeasuredModel, other: MeasuredModel) -> list[ReachedHardRatio]:
    """Return the hard ratios that the first model's thresholds give in the other model."""
    thresholds = first.record.thresholds
    statistics = other.profile.statistics
    row = statistics.layers.index(thresholds.exit_layer)
    return [
        ReachedHardRatio(
            layer=thresholds.exit_layer,
            hard_ratio=entry.hard_ratio,
            threshold=entry.threshold,
            reached=round(float(statistics.share_below(entry.threshold)[row]), 6),
        )
        for entry in thresholds.by_hard_ratio
    ]
