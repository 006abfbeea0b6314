"""The gap between a layer's angle and its neighbour's, and how much of it each cause closes."""

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

#: A cause is supported where taking it away closes more than this share of the gap.
SUPPORTED = 0.5

#: Gaps below this many degrees are not explained.
LEAST_GAP = 1.0


@dataclass(frozen=True)
class ClosedGap:
    """The share of a gap that is gone without a cause, and what that says about the cause.

    Attributes:
        share: The share; None where there is no gap to close.
        interval: Its interval; None where there is none.
        verdict: Whether the whole interval lies above half, or below it.
    """

    share: float | None
    interval: list[float] | None
    verdict: CauseVerdict


@dataclass(frozen=True)
class AngleGap:
    """The angle by which a layer turns the stream more than its neighbour, per sequence.

    Attributes:
        drawn: The sequences of each resample, `[R, S]`.
        target: Mean degrees of the layer, `[S]`.
        contrast: Mean degrees of the neighbour, `[S]`.
    """

    drawn: Array
    target: Array
    contrast: Array

    def row(self) -> GapRow:
        """Return the gap in degrees, its interval, and whether it asks for a cause."""
        whole = self.target - self.contrast
        between = interval(whole[self.drawn].mean(axis=1))
        degrees = float(whole.mean())
        return GapRow(
            degrees=degrees,
            interval=between,
            asks_for_a_cause=bool(degrees >= LEAST_GAP and between[0] > 0),
        )

    def closed(self, target: Array, contrast: Array) -> ClosedGap:
        """Return the share of the gap that is gone without a cause.

        It is the angle that the layer loses without the cause, minus the angle that the neighbour
        loses without it, over the gap. A neighbour that turns more without it closes nothing.

        Args:
            target: Mean degrees of the layer without the cause, `[S]`.
            contrast: Mean degrees of the neighbour without it, `[S]`.
        """
        sides = (target, contrast, self.target, self.contrast)
        whole = self.target - self.contrast
        if whole.mean() <= 0 or (whole[self.drawn].mean(axis=1) <= 0).any():
            return ClosedGap(None, None, "cannot tell")
        share = _closed_share(*(side.mean(axis=0) for side in sides))
        resampled = _closed_share(*(side[self.drawn].mean(axis=1) for side in sides))
        low, high = interval(resampled)
        verdict: CauseVerdict = "cannot tell"
        if low > SUPPORTED:
            verdict = "carries"
        elif high < SUPPORTED:
            verdict = "does not carry"
        return ClosedGap(float(share), [low, high], verdict)


def _closed_share(target: Array, contrast: Array, whole: Array, other: Array) -> Array:
    found: Array = 1 - (target - np.minimum(contrast, other)) / (whole - other)
    return found


def gap_of(measured: MeasuredLayers, seed: int) -> AngleGap:
    """Return the gap between the two layers as they are.

    Args:
        measured: Both layers.
        seed: Seed of the resamples.
    """
    target, contrast = (side.plain[0].mean(axis=1) for side in measured.sides)
    return AngleGap(draws(len(measured.classes), seed), target, contrast)


class CauseTests:
    """Tests every possible cause of a gap.

    Args:
        measured: Both layers.
        gap: The gap between them.
    """

    def __init__(self, measured: MeasuredLayers, gap: AngleGap) -> None:
        self._target, self._contrast = measured.sides
        self._classes, self._gap = measured.classes, gap

    def rows(self) -> list[CauseRow]:
        """Return one row per cause, in the order in which they are shown."""
        return [
            *self._removals(),
            *self._neighbour_traits(),
            self._one_class(),
            self._first_positions(),
        ]

    def _row(self, cause: str, target: Array, contrast: Array) -> CauseRow:
        """Return a cause's row.

        Args:
            cause: Its name.
            target: Degrees and similarities of the layer without it, `[2, S, T]`.
            contrast: The same of the neighbour.
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
            "first_token": "no mask that could be changed",
            "delimiters": "no delimiter to hide, or no mask that could be changed",
            "dimensions": (
                f"half of the update's energy lies in {for_half} dimensions, which are not few"
            ),
            "massive": "no activation is massive before or behind the layer",
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
        """Leave each class of tokens out of both layers, and return the class that closes most."""
        rows: list[tuple[float, CauseRow]] = []
        for number, name in enumerate(CLASSES):
            stays = self._classes != number
            if stays.all() or not stays.any(axis=1).all():
                continue
            row = self._left_out("one_class", stays)
            if isinstance(row.closed, float):
                rows.append((row.closed, msgspec.structs.replace(row, token_class=name)))
        if not rows:
            return _not_tried("one_class", "all tokens are of one class")
        return max(rows, key=lambda pair: pair[0])[1]

    def _first_positions(self) -> CauseRow:
        """Leave the first eighth of the positions out of both layers."""
        length = self._classes.shape[1]
        early = max(1, length // 8)
        stays = np.broadcast_to(np.arange(length) >= early, self._classes.shape)
        return msgspec.structs.replace(self._left_out("first_positions", stays), positions=early)

    def _left_out(self, cause: str, stays: Array) -> CauseRow:
        target, contrast = (_over(side, stays) for side in (self._target, self._contrast))
        return self._row(cause, target, contrast)


def _not_tried(cause: str, reason: str) -> CauseRow:
    return CauseRow(cause=cause, verdict="not tried", reason=reason)


def _over(side: MeasuredSide, stays: Array) -> Array:
    """Return each sequence's mean over the tokens that stay, `[2, S, 1]`."""
    values = np.where(stays, side.plain, 0).sum(axis=2, keepdims=True)
    found: Array = values / stays.sum(axis=1)[None, :, None]
    return found
