"""The gap between a layer's angle and its neighbour's, and the share that each cause explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from cascade.core.arrays import Array
from cascade.corpora.token_classes import CLASSES
from cascade.stats.resampling import draws, interval
from cascade.studies.explanations.causes import NEIGHBOUR_TRAITS, REMOVALS
from cascade.studies.explanations.layer_measurement import MeasuredLayers, MeasuredSide
from cascade.studies.explanations.records import CauseRow, CauseVerdict, GapRow

#: A cause is supported if removing it closes more than this share of the gap.
SUPPORTED = 0.5

#: Gaps below this many degrees are not explained.
LEAST_GAP = 1.0


@dataclass(frozen=True)
class ClosedGap:
    """The share of a gap that closes without a cause, and the verdict on the cause.

    Attributes:
        share: Closed share; None if there is no gap.
        interval: Interval of the share; None if there is no gap.
        verdict: Whether the whole interval lies above one half, or below it.
    """

    share: float | None
    interval: list[float] | None
    verdict: CauseVerdict


@dataclass(frozen=True)
class AngleGap:
    """The angle by which a layer turns the stream more than its neighbour, per sequence.

    Attributes:
        drawn: Sequences of each resample, `[R, S]`.
        target: Mean degrees of the layer, `[S]`.
        contrast: Mean degrees of the neighbour, `[S]`.
    """

    drawn: Array
    target: Array
    contrast: Array

    def row(self) -> GapRow:
        """Return the gap in degrees, its interval, and whether it needs an explanation."""
        whole = self.target - self.contrast
        between = interval(whole[self.drawn].mean(axis=1))
        degrees = float(whole.mean())
        return GapRow(
            degrees=degrees,
            interval=between,
            asks_for_a_cause=bool(degrees >= LEAST_GAP and between[0] > 0),
        )

    def closed(self, target: Array, contrast: Array) -> ClosedGap:
        """Return the share of the gap that closes without a cause.

        The share is the reduction of the layer's angle minus the reduction of the neighbour's
        angle, divided by the gap. If the neighbour's angle grows, its reduction counts as 0.

        Args:
            target: Mean degrees of the layer without the cause, `[S]`.
            contrast: Mean degrees of the neighbour without the cause, `[S]`.
        """
        sides = (target, contrast, self.target, self.contrast)
        whole = self.target - self.contrast
        if whole.mean() <= 0 or (whole[self.drawn].mean(axis=1) <= 0).any():
            return ClosedGap(None, None, "undecided")
        share = _closed_share(*(side.mean(axis=0) for side in sides))
        resampled = _closed_share(*(side[self.drawn].mean(axis=1) for side in sides))
        low, high = interval(resampled)
        verdict: CauseVerdict = "undecided"
        if low > SUPPORTED:
            verdict = "supported"
        elif high < SUPPORTED:
            verdict = "not supported"
        return ClosedGap(float(share), [low, high], verdict)


def _closed_share(target: Array, contrast: Array, whole: Array, other: Array) -> Array:
    found: Array = 1 - (target - np.minimum(contrast, other)) / (whole - other)
    return found


def gap_of(measured: MeasuredLayers, seed: int) -> AngleGap:
    """Return the gap between the two unchanged layers.

    Args:
        measured: Both layers.
        seed: Seed of the resamples.
    """
    target, contrast = (side.plain[0].mean(axis=1) for side in measured.sides)
    return AngleGap(draws(len(measured.classes), seed), target, contrast)


class CauseTests:
    """Test every possible cause of a gap.

    Args:
        measured: Both layers.
        gap: Gap between the layers.
    """

    def __init__(self, measured: MeasuredLayers, gap: AngleGap) -> None:
        self._target, self._contrast = measured.sides
        self._classes, self._gap = measured.classes, gap

    def rows(self) -> list[CauseRow]:
        """Return one row per cause, in display order."""
        return [
            *self._removals(),
            *self._neighbour_traits(),
            self._one_class(),
            self._first_positions(),
        ]

    def _row(self, cause: str, target: Array, contrast: Array) -> CauseRow:
        """Return the row of a cause.

        Args:
            cause: Name of the cause.
            target: Degrees and similarities of the layer without the cause, `[2, S, T]`.
            contrast: The same for the neighbour.
        """
        closed = self._gap.closed(target[0].mean(axis=1), contrast[0].mean(axis=1))
        return CauseRow(
            cause=cause,
            degrees=float(target[0].mean()),
            similarity=float(target[1].mean()),
            contrast_degrees=float(contrast[0].mean()),
            contrast_similarity=float(contrast[1].mean()),
            closed=closed.share,
            interval=closed.interval,
            verdict=closed.verdict,
        )

    def _removals(self) -> Iterator[CauseRow]:
        for_half = self._target.traits.dimensions_for_half
        reasons = {
            "first_token": "the layer takes no attention mask that can be changed",
            "delimiters": (
                "the text has no delimiters, or the layer takes no attention mask that can be "
                "changed"
            ),
            "dimensions": (
                f"half of the update's energy is spread over {for_half} dimensions, which are too "
                "many"
            ),
            "massive": "the input and output of the layer have no massive activations",
        }
        for name in REMOVALS:
            target, contrast = self._target.angles.get(name), self._contrast.angles.get(name)
            if target is None or contrast is None:
                yield _not_tried(name, reasons.get(name, ""))
            else:
                yield self._row(name, target, contrast)

    def _neighbour_traits(self) -> Iterator[CauseRow]:
        for name in NEIGHBOUR_TRAITS:
            yield self._row(name, self._target.angles[name], self._contrast.plain)

    def _one_class(self) -> CauseRow:
        """Exclude each token class from both layers, and return the one that closes most."""
        rows: list[tuple[float, CauseRow]] = []
        for number, name in enumerate(CLASSES):
            kept = self._classes != number
            if kept.all() or not kept.any(axis=1).all():
                continue
            row = self._over_kept("one_class", kept)
            if isinstance(row.closed, float):
                rows.append((row.closed, msgspec.structs.replace(row, token_class=name)))
        if not rows:
            return _not_tried("one_class", "all tokens belong to one class")
        return max(rows, key=lambda pair: pair[0])[1]

    def _first_positions(self) -> CauseRow:
        """Exclude the first eighth of the positions from both layers."""
        length = self._classes.shape[1]
        early = max(1, length // 8)
        kept = np.broadcast_to(np.arange(length) >= early, self._classes.shape)
        return msgspec.structs.replace(self._over_kept("first_positions", kept), positions=early)

    def _over_kept(self, cause: str, kept: Array) -> CauseRow:
        target, contrast = (_mean_over(side, kept) for side in (self._target, self._contrast))
        return self._row(cause, target, contrast)


def _not_tried(cause: str, reason: str) -> CauseRow:
    return CauseRow(cause=cause, verdict="not tried", reason=reason)


def _mean_over(side: MeasuredSide, kept: Array) -> Array:
    """Return the mean of each sequence over the kept tokens, `[2, S, 1]`."""
    values = np.where(kept, side.plain, 0).sum(axis=2, keepdims=True)
    found: Array = values / kept.sum(axis=1)[None, :, None]
    return found
