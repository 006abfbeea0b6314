"""Long sequences of two profiles, compared range by range: from records alone, without a model."""

from __future__ import annotations

import itertools

import numpy as np

from cascade.core.arrays import Array
from cascade.gate.records import LongContextRecord, PositionRange
from cascade.saturation.long_statistics import LongStatistics, range_edges


def compare_long(
    new: LongStatistics | None,
    old: LongStatistics | None,
    tolerance: float,
    *,
    seconds: float = 0.0,
) -> LongContextRecord:
    """Compare long sequences that both sides have, range by range.

    Args:
        new: The statistics of the new profile; None if it has no long sequences.
        old: Those of the baseline.
        tolerance: How far rounding alone may move the mean of a range.
        seconds: How long the new ones took to measure.

    Example:
        >>> similarity, numbers = np.full((1, 1, 128), 0.5), np.zeros(1, np.int64)
        >>> one = LongStatistics.of(["1"], similarity, numbers, numbers)
        >>> compare_long(one, one, 2e-6).verdict
        'PASS'
    """
    if new is None or old is None:
        side = "new profile" if new is None else "baseline"
        return unchecked(f"the {side} has no long sequences")
    if new.layers != old.layers or new.length != old.length:
        return unchecked("the long sequences of both sides have other layers or lengths")
    places = {int(number): place for place, number in enumerate(old.fingerprints)}
    mine = [place for place, number in enumerate(new.fingerprints) if int(number) in places]
    if not mine:
        return unchecked("both sides have other long sequences")
    theirs = [places[int(new.fingerprints[place])] for place in mine]
    new, old = new.only(mine), old.only(theirs)
    ranges = _ranges(new, old, tolerance)
    return LongContextRecord(
        verdict="PASS" if all(each.layer is None for each in ranges) else "FAIL",
        reason=None,
        length=new.length,
        sequences=len(mine),
        tolerance=tolerance,
        ranges=ranges,
        seconds=seconds,
    )


def unchecked(reason: str) -> LongContextRecord:
    """Return the record of long contexts that were not checked.

    Args:
        reason: Why they were not checked.
    """
    return LongContextRecord(
        verdict="NOT CHECKED",
        reason=reason,
        length=0,
        sequences=0,
        tolerance=0.0,
        ranges=[],
        seconds=0.0,
    )


def _ranges(new: LongStatistics, old: LongStatistics, tolerance: float) -> list[PositionRange]:
    # Both are `[R, L]`: the largest difference of any sequence.
    moved = _largest(new.means() - old.means())
    # A square moves twice as far as a similarity near 1.
    squares = _largest(new.mean_squares() - old.mean_squares())
    beyond = (moved > tolerance) | (squares > 2 * tolerance)
    found = []
    for number, (first, end) in enumerate(itertools.pairwise(range_edges(new.length).tolist())):
        layer = new.layers[int(np.argmax(beyond[number]))] if beyond[number].any() else None
        difference = float(moved[number].max())
        found.append(PositionRange(first=first + 1, last=end, difference=difference, layer=layer))
    return found


def _largest(differences: Array) -> Array:
    largest: Array = np.abs(differences).max(axis=0)
    return largest
