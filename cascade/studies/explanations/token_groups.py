"""The similarity of a layer and its neighbour by token class and by position in the sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from cascade.core.arrays import Array
from cascade.corpora.token_classes import CLASSES
from cascade.stats.resampling import ratio_interval
from cascade.studies.explanations.layer_measurement import MeasuredLayers, MeasuredSide
from cascade.studies.explanations.records import GroupSimilarity, TokenGroup


def class_groups(measured: MeasuredLayers, seed: int) -> list[TokenGroup]:
    """Return the similarity of both layers by token class, without empty classes.

    Args:
        measured: Both layers.
        seed: Seed of the intervals.
    """
    groups = ((name, measured.classes == number) for number, name in enumerate(CLASSES))
    return _rows(measured, groups, seed)


def position_groups(measured: MeasuredLayers, seed: int) -> list[TokenGroup]:
    """Return the similarity of both layers by position: 0, 1, 2-3, 4-7, and so on.

    Args:
        measured: Both layers.
        seed: Seed of the intervals.
    """
    return _rows(measured, _positions(measured.classes.shape), seed)


def _positions(shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Yield the name and the mask, `[S, T]`, of ranges of positions that double in length."""
    length = shape[1]
    position = np.broadcast_to(np.arange(length), shape)
    start, stop = 0, 1
    while start < length:
        last = min(stop, length) - 1
        name = str(start) if last == start else f"{start}-{last}"
        yield name, (position >= start) & (position <= last)
        start, stop = stop, 2 * stop


def _rows(
    measured: MeasuredLayers, groups: Iterable[tuple[str, Array]], seed: int
) -> list[TokenGroup]:
    return [
        TokenGroup(
            name=name,
            tokens=int(mask.sum()),
            layer=_similarity(measured.target, mask, seed),
            contrast=_similarity(measured.contrast, mask, seed),
        )
        for name, mask in groups
        if mask.any()
    ]


def _similarity(side: MeasuredSide, mask: Array, seed: int) -> GroupSimilarity:
    counts = mask.sum(axis=1).astype(float)
    sums = np.where(mask, side.plain[1], 0).sum(axis=1)
    return GroupSimilarity(
        similarity=float(sums.sum() / counts.sum()), interval=ratio_interval(sums, counts, seed)
    )
