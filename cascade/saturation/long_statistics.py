"""Statistics of long sequences: one row per layer and range of positions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array
from cascade.saturation.records import LongContext
from cascade.stats.similarity_statistics import exact_sums, mean_of_sums

#: The number of ranges into which the positions of a long sequence are divided.
_MOST_RANGES = 16

#: The fewest positions of a range, unless there are fewer than two ranges. A mean over fewer tokens
#: moves farther by rounding.
_LEAST_POSITIONS = 64

#: The most tokens of a long sequence: sums of more do not fit their integers.
_MOST_TOKENS = 1 << 22


def range_edges(length: int) -> npt.NDArray[np.int64]:
    """Return where the ranges of positions of a long sequence begin, and the end of the last one.

    Args:
        length: The number of positions.

    Example:
        >>> range_edges(256).tolist()
        [0, 64, 128, 192, 256]
        >>> len(range_edges(2048)) - 1
        16
    """
    ranges = max(2, min(_MOST_RANGES, length // _LEAST_POSITIONS))
    return np.arange(ranges + 1) * length // ranges


@dataclass(frozen=True)
class LongStatistics:
    """Exact sums of the similarities of long sequences, per range of positions and layer.

    Attributes:
        layers: Row labels, as in the profile.
        length: The number of tokens of each long sequence.
        starts: `[Q]`, the number of the corpus's sequence that each long one begins with.
        fingerprints: `[Q]`, the fingerprint of each long sequence.
        total: `[Q, R, L]`, sums of the similarities in units of 2**-40.
        square_total: `[Q, R, L]`, sums of their squares.

    Example:
        >>> similarity = np.full((1, 1, 128), 0.5, dtype=np.float32)
        >>> numbers = np.zeros(1, np.int64)
        >>> LongStatistics.of(["1"], similarity, numbers, numbers).means().tolist()
        [[[0.5], [0.5]]]
    """

    layers: tuple[str, ...]
    length: int
    starts: Array
    fingerprints: Array
    total: Array
    square_total: Array

    @classmethod
    def of(
        cls, layers: Sequence[str], similarity: Array, starts: Array, fingerprints: Array
    ) -> LongStatistics:
        """Return the statistics of some long sequences.

        Args:
            layers: Row labels.
            similarity: `[L, Q, N]`, in [-1, 1].
            starts: `[Q]`.
            fingerprints: `[Q]`.
        """
        values = similarity.astype(np.float64)
        edges = range_edges(values.shape[2])
        parts = [values[..., a:b] for a, b in itertools.pairwise(edges)]
        total, square_total = (
            np.stack([exact_sums(part**power) for part in parts]).transpose(2, 0, 1)
            for power in (1, 2)
        )
        return cls(tuple(layers), values.shape[2], starts, fingerprints, total, square_total)

    def only(self, rows: Any) -> LongStatistics:
        """Return the statistics of some of the long sequences."""
        some = {
            name: getattr(self, name)[rows]
            for name in ("starts", "fingerprints", "total", "square_total")
        }
        return replace(self, **some)

    def means(self) -> Array:
        """Return the mean similarity of each range, `[Q, R, L]`."""
        return mean_of_sums(self.total, self._counts)

    def mean_squares(self) -> Array:
        """Return the mean square of each range, `[Q, R, L]`."""
        return mean_of_sums(self.square_total, self._counts)

    @property
    def _counts(self) -> Array:
        counts: Array = np.diff(range_edges(self.length))[:, None]
        return counts

    def record(self) -> LongContext:
        """Return what the profile's record says of the long sequences."""
        sequences, ranges, _ = self.total.shape
        return LongContext(length=self.length, sequences=sequences, ranges=ranges)

    def arrays(self) -> dict[str, Array]:
        """Return the whole state as arrays, next to those of the profile."""
        return {
            "long_length": np.array(self.length),
            "long_start": self.starts,
            "long_fingerprint": self.fingerprints,
            "long_total": self.total,
            "long_square_total": self.square_total,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> LongStatistics | None:
        """Restore the statistics from the arrays of a profile; None if it has no long sequences.

        Raises:
            KeyError: An array is missing.
            ValueError: The types or shapes of the arrays do not match, or a number is out of range.
        """
        if "long_length" not in arrays:
            return None
        layers = tuple(str(label) for label in arrays["layers"])
        length = int(arrays["long_length"])
        starts, prints = arrays["long_start"], arrays["long_fingerprint"]
        totals = arrays["long_total"], arrays["long_square_total"]
        if not 2 <= length <= _MOST_TOKENS:
            raise ValueError(f"expected long sequences of 2 to {_MOST_TOKENS} tokens, got {length}")
        if any(values.dtype.kind not in "iu" for values in (starts, prints, *totals)):
            raise ValueError("expected whole numbers for long sequences")
        shape = (len(prints), len(range_edges(length)) - 1, len(layers))
        if starts.shape != prints.shape or any(values.shape != shape for values in totals):
            raise ValueError(f"expected sums of long sequences of shape {shape}")
        if not ((starts >= 0) & (starts < len(arrays["sequence_fingerprint"]))).all():
            raise ValueError("expected long sequences to begin with sequences of the corpus")
        found = cls(layers, length, starts, prints, *totals)
        if not (np.abs(found.means()) <= 1).all() or not (found.mean_squares() <= 1).all():
            raise ValueError("expected similarities of long sequences in [-1, 1]")
        return found
