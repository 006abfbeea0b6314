"""The pilot: the first measured batches of a corpus, which fix the bin edges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.similarity_statistics import quantile_edges

#: Similarities `[L, B, T]` and sequence numbers `[B]` of one batch.
MeasuredBatch = tuple[Array, Array]

#: The number of first sequences whose quantiles give the bin edges. Edges are fixed after them, for
#: any batch size, so that one pass is enough.
PILOT_SEQUENCES = 16


def pilot_of(batches: Iterator[MeasuredBatch]) -> list[MeasuredBatch]:
    """Take the pilot from measured batches: whole batches, with 16 sequences or more.

    Args:
        batches: Measured batches, from the first one on. Those after the pilot are left in it.

    Example:
        >>> batches = ((np.zeros((2, 5, 3)), np.arange(k, k + 5)) for k in range(0, 40, 5))
        >>> len(pilot_of(batches)), len(list(batches))
        (4, 4)
    """
    pilot: list[MeasuredBatch] = []
    for batch in batches:
        pilot.append(batch)
        if sum(len(numbers) for _, numbers in pilot) >= PILOT_SEQUENCES:
            break
    return pilot


def pilot_edges(pilot: Sequence[MeasuredBatch]) -> Array:
    """Return the bin edges that a pilot gives, `[L, 3]`.

    They depend on the first 16 sequences alone, for any batch size.

    Args:
        pilot: At least one measured batch.
    """
    first = np.concatenate([values for values, _ in pilot], axis=1)[:, :PILOT_SEQUENCES]
    return quantile_edges(first.reshape(len(first), -1))


def piloted(batches: Iterator[MeasuredBatch]) -> tuple[Array, Iterator[MeasuredBatch]]:
    """Return the bin edges that the first sequences give, and all batches.

    Args:
        batches: At least one measured batch.

    Returns:
        `[L, 3]` bin edges; and the batches, those that were measured for the edges included.
    """
    pilot = pilot_of(batches)
    return pilot_edges(pilot), itertools.chain(pilot, batches)
