"""Rows of sequences: one row per sequence and layer, in columns.

A row holds the mean, the mean square and three shares of the similarities of one sequence in one
layer. Rows are in memory, or in a file of which only some are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array

#: Each row holds the shares of tokens at or below these quantiles of the layer.
QUANTILES = (0.1, 0.5, 0.9)

#: The columns of rows, as they are named in files.
COLUMNS = ("mean", "mean_square", "share")

#: The arrays of rows in `.npz` files.
ARRAYS = ("sequence", *(f"sequence_{name}" for name in COLUMNS))


class Rows(Protocol):
    """Rows of sequences in memory or in a file, in ascending order of their numbers."""

    @property
    def numbers(self) -> npt.NDArray[np.int64] | range:
        """The number of each sequence in the corpus."""
        ...

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def read(self, places: Array) -> SequenceRows:
        """Return the rows of some sequences, in the given order.

        Args:
            places: `[n]`, the places of the sequences, from 0.
        """
        ...

    def batches(self) -> Iterator[SequenceRows]:
        """Yield the rows of all sequences, a few thousand at a time."""
        ...

    def all(self) -> SequenceRows:
        """Return the rows of all sequences."""
        ...


@dataclass(frozen=True)
class SequenceRows:
    """Rows of sequences in memory.

    Attributes:
        numbers: `[S]`, the number of each sequence in the corpus.
        mean: `[S, L]`, the mean similarity.
        mean_square: `[S, L]`, the mean square.
        share: `[S, L, 3]`, the shares of tokens at or below the bin edges of the layer.

    Example:
        >>> rows = SequenceRows.none(layers=2)
        >>> len(rows), rows.mean.shape
        (0, (0, 2))
    """

    numbers: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    mean_square: npt.NDArray[np.float64]
    share: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.numbers)

    @classmethod
    def none(cls, layers: int) -> SequenceRows:
        """Return the rows of no sequence.

        Args:
            layers: The number of layers.
        """
        flat = np.zeros((0, layers))
        return cls(np.zeros(0, np.int64), flat, flat, np.zeros((0, layers, len(QUANTILES))))

    @classmethod
    def joined(cls, parts: Sequence[SequenceRows]) -> SequenceRows:
        """Return the rows of several parts, in ascending order of the sequences' numbers.

        Args:
            parts: At least one.

        Raises:
            ValueError: A sequence is there twice.
        """
        numbers = np.concatenate([part.numbers for part in parts])
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError("expected every sequence once, got one twice")
        columns = (
            np.concatenate([getattr(part, name) for part in parts])[order] for name in COLUMNS
        )
        return cls(ordered, *columns)

    def renumbered(self, shift: int) -> SequenceRows:
        """Return the same rows with other sequence numbers.

        Args:
            shift: The number that is added to each sequence number.
        """
        return replace(self, numbers=self.numbers + shift)

    def read(self, places: Array) -> SequenceRows:
        """Return the rows of some sequences, as `Rows.read` does."""
        return SequenceRows(
            self.numbers[places], self.mean[places], self.mean_square[places], self.share[places]
        )

    def batches(self) -> Iterator[SequenceRows]:
        """Yield all rows at once, as `Rows.batches` does."""
        if len(self):
            yield self

    def all(self) -> SequenceRows:
        """Return the rows themselves, as `Rows.all` does."""
        return self

    def statistics(self) -> npt.NDArray[np.float64]:
        """Return all columns as one array, `[S, L, 5]`: mean, mean square and shares."""
        return np.concatenate(
            [self.mean[..., None], self.mean_square[..., None], self.share], axis=2
        )

    def arrays(self) -> dict[str, Array]:
        """Return the rows as arrays for an `.npz` file."""
        columns = {f"sequence_{name}": getattr(self, name) for name in COLUMNS}
        return {"sequence": self.numbers} | columns

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], layers: int) -> SequenceRows:
        """Restore rows from the result of `arrays`.

        Args:
            arrays: The arrays, which may include others.
            layers: The number of layers.

        Raises:
            KeyError: An array is missing.
            ValueError: The shapes of the arrays do not match.
        """
        numbers = np.asarray(arrays["sequence"], dtype=np.int64)
        shapes = ((len(numbers), layers),) * 2 + ((len(numbers), layers, len(QUANTILES)),)
        columns = []
        for name, shape in zip(COLUMNS, shapes, strict=True):
            column = np.asarray(arrays[f"sequence_{name}"], dtype=np.float64)
            if column.shape != shape:
                raise ValueError(f"sequence_{name}: expected shape {shape}, got {column.shape}")
            columns.append(column)
        return cls(numbers, *columns)
