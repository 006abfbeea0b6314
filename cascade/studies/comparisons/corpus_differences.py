"""Differences between corpora: moved layers, special layers and transfer of thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

from cascade.core.arrays import Array
from cascade.stats.resampling import (
    Place,
    half_widths,
    placed,
    simultaneous_half_widths,
    times_more,
)
from cascade.stats.thresholds import FittedThreshold, fit_threshold, transfer
from cascade.studies.comparisons.corpus_measurement import MeasuredCorpus, roles_of
from cascade.studies.comparisons.corpus_records import (
    ComparedCorpus,
    CorpusDifferences,
    CorpusThreshold,
    LayerDifference,
    LayerMean,
    LayerMeans,
    LayerVerdict,
    SpecialDifference,
    SpecialLayers,
    ThresholdTransfer,
    ThresholdTransfers,
    TransferVerdict,
)

#: Labels of the corpora. A letter fits above a table column, while a name can be as long as a path.
LABELS = "ABCDEFGH"

#: Confidence of all intervals. Those of differences hold simultaneously for all layers of a corpus.
CONFIDENCE = 0.95

#: A layer is surely special if it is special in at least this share of the resamples, and surely
#: not special if it is so in at most the remaining share.
_SURE = 0.95

_LAYER_VERDICTS: dict[Place, LayerVerdict] = {
    "within": "stays",
    "beyond": "moves",
    "straddles": "cannot tell",
}
_TRANSFER_VERDICTS: dict[Place, TransferVerdict] = {
    "within": "transfers",
    "beyond": "does not",
    "straddles": "cannot tell",
}


# --- Layers that move ------------------------------------------------------------------------


def layer_means(
    labels: Sequence[str], measured: Sequence[MeasuredCorpus], draws: Sequence[Array]
) -> list[LayerMeans]:
    """Return the mean of every layer in every corpus, each with its own interval.

    Args:
        labels: Layer labels.
        measured: Measured corpora.
        draws: Means of the resamples of each corpus, `[resamples, L]`.
    """
    halves = [
        half_widths(draw, corpus.means, CONFIDENCE)
        for corpus, draw in zip(measured, draws, strict=True)
    ]
    return [
        LayerMeans(
            layer=layer,
            means=[
                LayerMean(
                    mean=float(corpus.means[row]), interval=_around(corpus.means[row], half[row])
                )
                for corpus, half in zip(measured, halves, strict=True)
            ],
        )
        for row, layer in enumerate(labels)
    ]


def _around(center: float, half: float) -> list[float]:
    return [float(center - half), float(center + half)]


def corpus_differences(
    labels: Sequence[str],
    measured: Sequence[MeasuredCorpus],
    draws: Sequence[Array],
    margin: float,
) -> list[CorpusDifferences]:
    """Return the differences per layer between every other corpus and the first one.

    Args:
        labels: Layer labels.
        measured: Measured corpora.
        draws: Means of the resamples of each corpus, `[resamples, L]`.
        margin: Smallest relevant difference.
    """
    found = []
    for number in range(1, len(measured)):
        tokens = max(measured[0].confidence.size, measured[number].confidence.size)
        difference = measured[number].means - measured[0].means
        halves = simultaneous_half_widths(draws[number] - draws[0], difference, CONFIDENCE)
        rows = [
            _layer_difference(layer, float(by), float(half), margin, tokens)
            for layer, by, half in zip(labels, difference, halves, strict=True)
        ]
        by_size = sorted(rows, key=lambda row: -abs(row.difference))
        found.append(
            CorpusDifferences(
                corpus=LABELS[number],
                against=LABELS[0],
                rows=rows,
                layers={
                    verdict: [row.layer for row in by_size if row.verdict == verdict]
                    for verdict in _LAYER_VERDICTS.values()
                },
            )
        )
    return found


def _layer_difference(
    layer: str, by: float, half: float, margin: float, tokens: int
) -> LayerDifference:
    place = placed((by - half, by + half), margin)
    times = times_more(by, half, margin) if place == "straddles" else None
    return LayerDifference(
        layer=layer,
        difference=by,
        interval=_around(by, half),
        verdict=_LAYER_VERDICTS[place],
        tokens_needed=None if times is None else math.ceil(times * tokens),
    )


# --- Special layers --------------------------------------------------------------------------


def special_layers(corpora: Sequence[ComparedCorpus], labels: Sequence[str]) -> SpecialLayers:
    """Return whether all corpora have the same special layers, and the layers that differ.

    A difference is sure only if the resamples of every corpus confirm it.

    Args:
        corpora: Compared corpora.
        labels: Layer labels.
    """
    differ = []
    for layer in labels:
        rows = {
            corpus.label: row for corpus in corpora for row in corpus.special if row.layer == layer
        }
        special = [label for label, row in rows.items() if row.role is not None]
        if not special or len(special) == len(corpora):
            continue
        shares = {
            corpus.label: rows[corpus.label].share_of_resamples if corpus.label in rows else 0.0
            for corpus in corpora
        }
        sure = all(
            share >= _SURE if label in special else share <= 1 - _SURE
            for label, share in shares.items()
        )
        differ.append(SpecialDifference(layer=layer, special_in=special, shares=shares, sure=sure))
    roles = [roles_of(corpus.structure) for corpus in corpora]
    return SpecialLayers(same=all(found == roles[0] for found in roles), differ=differ)


# --- Thresholds that transfer ----------------------------------------------------------------


def threshold_transfers(
    measured: Sequence[MeasuredCorpus], hard_ratios: Sequence[float], tolerance: float, seed: int
) -> ThresholdTransfers:
    """Fit a threshold for every hard ratio on every corpus, and apply it to every other corpus.

    Args:
        measured: Measured corpora.
        hard_ratios: Distinct shares of hard tokens to fit thresholds to.
        tolerance: Largest difference between the actual and the requested hard ratio.
        seed: Seed of the resamples.
    """
    fitted = [
        {ratio: fit_threshold(corpus.confidence, ratio, seed=seed) for ratio in hard_ratios}
        for corpus in measured
    ]
    rows = [
        transferred(
            fitted[a][ratio],
            measured[b].confidence,
            (LABELS[a], LABELS[b]),
            tolerance=tolerance,
            seed=seed,
        )
        for a, b in permutations(range(len(measured)), 2)
        for ratio in hard_ratios
    ]
    return ThresholdTransfers(
        fitted=[
            _corpus_threshold(label, threshold)
            for label, of_corpus in zip(LABELS, fitted, strict=False)
            for threshold in of_corpus.values()
        ],
        rows=rows,
        counts={
            verdict: sum(row.verdict == verdict for row in rows)
            for verdict in _TRANSFER_VERDICTS.values()
        },
    )


def _corpus_threshold(label: str, fitted: FittedThreshold) -> CorpusThreshold:
    return CorpusThreshold(
        corpus=label,
        hard_ratio=fitted.hard_ratio,
        threshold=fitted.threshold,
        reached=fitted.reached,
        threshold_interval=fitted.threshold_interval,
        reached_interval=fitted.reached_interval,
        ties=fitted.ties,
    )


def transferred(
    fitted: FittedThreshold,
    onto: Array,
    labels: tuple[str, str],
    *,
    tolerance: float,
    seed: int,
) -> ThresholdTransfer:
    """Return the hard ratio of a threshold on another corpus, and whether the threshold transfers.

    Args:
        fitted: The threshold.
        onto: Similarities of the exit layer on the other corpus, `[S, T]`.
        labels: Labels of the corpus that the threshold was fitted on, and of the other corpus.
        tolerance: Largest difference between the actual and the requested hard ratio.
        seed: Seed of the resamples.
    """
    there = transfer(fitted.threshold, onto, seed=seed)
    low, high = (end - fitted.hard_ratio for end in there.hard_ratio_interval)
    place, off = placed((low, high), tolerance), there.hard_ratio - fitted.hard_ratio
    times = None
    if place == "straddles":
        times = times_more(off, max(off - low, high - off), tolerance)
    return ThresholdTransfer(
        fitted_on=labels[0],
        applied_to=labels[1],
        hard_ratio=fitted.hard_ratio,
        threshold=fitted.threshold,
        realized=there.hard_ratio,
        interval=list(there.hard_ratio_interval),
        off=off,
        off_interval=[low, high],
        verdict=_TRANSFER_VERDICTS[place],
        tokens_needed=None if times is None else math.ceil(times * onto.size),
    )
