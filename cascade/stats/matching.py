"""Finding values of one array in another one, as fast as sorting the shorter one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array


def places_in(values: Array, among: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which values are among others, and the first place of each there.

    Args:
        values: `[n]`, few or many.
        among: `[m]`, where they are looked for. Millions take a fraction of a second.

    Returns:
        The places of the values that were found, in ascending order, and their places in `among`.

    Example:
        >>> mine, theirs = places_in(np.array([7, 5, 9]), np.array([9, 1, 7, 9]))
        >>> mine.tolist(), theirs.tolist()
        ([0, 2], [2, 0])
    """
    none = np.zeros(0, np.int64)
    if not len(values) or not len(among):
        return none, none
    ordered = np.sort(values)
    hits = np.flatnonzero(ordered[_nearest(ordered, among)] == among)
    found = among[hits]
    order = np.argsort(found, kind="stable")
    found, hits = found[order], hits[order]
    first = np.ones(len(found), dtype=bool)
    first[1:] = found[1:] != found[:-1]
    found, hits = found[first], hits[first]
    if not len(found):
        return none, none
    nearest = _nearest(found, values)
    mine = np.flatnonzero(found[nearest] == values)
    return mine, hits[nearest[mine]]


def _nearest(ordered: Array, values: Array) -> npt.NDArray[np.int64]:
    """Return the place of each value in an ordered array, if it is there."""
    return np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
