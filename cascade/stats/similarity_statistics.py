"""Mergeable similarity statistics: any split of the data gives the same bits as one pass.

They are the statistics of all tokens, and one small row per sequence and layer. Tokens of one
sequence are correlated: sequences, not tokens, are the unit of every interval.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from cascade.core.arrays import Array
from cascade.stats.sequence_rows import QUANTILES as QUANTILES
from cascade.stats.sequence_rows import Rows, SequenceRows
from cascade.stats.token_statistics import BINS as BINS
from cascade.stats.token_statistics import EmptyStatisticsError as EmptyStatisticsError
from cascade.stats.token_statistics import TokenStatistics, bin_index
from cascade.stats.token_statistics import bin_edge as bin_edge
from cascade.stats.token_statistics import exact_sums as exact_sums
from cascade.stats.token_statistics import mean_of_sums as mean_of_sums
from cascade.stats.token_statistics import quantile_edges as quantile_edges


class SimilarityStatistics(TokenStatistics):
    """Statistics of the similarities of several layers.

    Args:
        layers: Row labels, e.g. `["1", ..., "30", "30+norm"]`.
        edges: `[L, 3]` bin edges for the shares of each sequence (see `quantile_edges`).

    Raises:
        ValueError: Labels are missing or repeated, or `edges` has another shape.

    Example:
        >>> import cascade
        >>> import numpy as np
        >>> edges = np.array([[1000, 2000, 3000]])
        >>> statistics = cascade.SimilarityStatistics(["1"], edges)
        >>> statistics.update(np.array([[[0.25, 0.75], [0.5, 0.5]]]), np.array([0, 1]))
        >>> statistics.count, statistics.mean().tolist()
        (4, [0.5])
    """

    def __init__(self, layers: Sequence[str], edges: Array) -> None:
        super().__init__(layers, edges)
        self._parts: list[SequenceRows] = []
        self._numbers: set[int] = set()
        self._stored: Rows | None = None

    @classmethod
    def of(cls, tokens: TokenStatistics, rows: Rows) -> Self:
        """Return statistics of given tokens and rows.

        Args:
            tokens: The statistics of all tokens.
            rows: The rows of all sequences, in memory or in a file.
        """
        self = cls(tokens.layers, tokens.edges)
        self._take_tokens(tokens)
        self._stored = rows
        return self

    @property
    def rows(self) -> Rows:
        """One row per sequence and layer, in ascending order of the sequences' numbers."""
        if self._stored is None:
            self._stored = SequenceRows.joined([SequenceRows.none(len(self.layers)), *self._parts])
            self._parts = [self._stored]
        return self._stored

    def update(self, similarity: Array, sequences: Array) -> None:
        """Add a batch of whole sequences.

        Args:
            similarity: `[L, B, T]`, in [-1, 1].
            sequences: `[B]`, the number of each row's sequence in the corpus.

        Raises:
            ValueError: A shape is wrong, a sequence was added before, or a value is NaN or outside
                [-1, 1] (the message names the layer).
        """
        rows = len(self.layers)
        if similarity.ndim != 3 or similarity.shape[0] != rows or similarity.shape[2] == 0:
            raise ValueError(f"expected similarity of shape [{rows}, B, T], got {similarity.shape}")
        if sequences.shape != similarity.shape[1:2]:
            raise ValueError(f"expected {similarity.shape[1]} sequences, got {sequences.shape}")
        numbers = [int(number) for number in sequences]
        self._own_rows()
        if len(set(numbers)) != len(numbers) or self._numbers & set(numbers):
            raise ValueError("expected every sequence once, got one twice")
        values = similarity.astype(np.float64)
        self._check_range(values)
        bins = bin_index(values)
        self.add(values.reshape(rows, -1), bins.reshape(rows, -1))
        self._parts.append(self._rows_of(sequences, values, bins))
        self._numbers.update(numbers)
        self._stored = None

    def _own_rows(self) -> None:
        """Hold all rows in memory, with their numbers, so that more can be added."""
        if self._stored is not None:
            self._parts = [self._stored.all()]
            self._numbers = set(self._parts[0].numbers.tolist())

    def _check_range(self, values: Array) -> None:
        wrong = ~(np.abs(values) <= 1)  # true for NaN as well
        if wrong.any():
            row = int(np.argmax(wrong.any(axis=(1, 2))))
            got = values[row][wrong[row]][0]
            raise ValueError(
                f"layer {self.layers[row]}: expected similarities in [-1, 1], got {got}"
            )

    def _rows_of(self, numbers: Array, values: Array, bins: Array) -> SequenceRows:
        # A bin index at or above the edge is a similarity at or below it.
        share = (bins[..., None] >= self.edges[:, None, None, :]).mean(axis=2)
        return SequenceRows(
            np.asarray(numbers, dtype=np.int64),
            np.ascontiguousarray(values.mean(axis=2).T),
            np.ascontiguousarray((values**2).mean(axis=2).T),
            np.ascontiguousarray(share.transpose(1, 0, 2)),
        )

    def renumbered(self, shift: int) -> SimilarityStatistics:
        """Return the same statistics with other sequence numbers.

        Args:
            shift: The number that is added to each sequence number.
        """
        moved = copy.copy(self)
        moved._stored = self.rows.all().renumbered(shift)
        return moved

    def merge(self, other: SimilarityStatistics) -> SimilarityStatistics:
        """Return the statistics of both together, equal to those of one pass over all tokens.

        Raises:
            ValueError: The two differ in layers or edges, or share a sequence.
        """
        tokens = self.merged_tokens(other)
        return SimilarityStatistics.of(
            tokens, SequenceRows.joined([self.rows.all(), other.rows.all()])
        )

    def arrays(self) -> dict[str, Array]:
        """Return the whole state as arrays for an `.npz` file, sequences in ascending order."""
        return self.token_arrays() | self.rows.all().arrays()

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> SimilarityStatistics:
        """Restore statistics from the result of `arrays`.

        Raises:
            KeyError: An array is missing.
            ValueError: The shapes of the arrays do not match.
        """
        tokens = TokenStatistics.of_arrays(arrays)
        rows = SequenceRows.joined([SequenceRows.from_arrays(arrays, len(tokens.layers))])
        return cls.of(tokens, rows)
