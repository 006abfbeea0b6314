"""Rows: the tokens of one call of the engine, and what each of them sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: The most rows of one call. With more, the model's own modules are as fast.
MAX_ROWS = 32


@dataclass(frozen=True)
class Rows:
    """Tokens that are computed together; row r is one token of one sequence.

    A row sees the columns `first` to `base - 1` of its sequence, and the columns of those rows
    whose bits are set in `sees`. All rows write their keys and values before any row reads.

    Attributes:
        sequence: The sequence of each row, `[R]`.
        column: Where its keys and values are written in the KV cache, `[R]`.
        position: Its position in the text, `[R]`.
        first: The first column that it sees, `[R]`; the columns before are padding.
        base: See above, `[R]`.
        sees: Bit t is set if it also sees the column of row t, int32 `[R]`.
    """

    sequence: Tensor
    column: Tensor
    position: Tensor
    first: Tensor
    base: Tensor
    sees: Tensor

    def __len__(self) -> int:
        return len(self.sequence)

    @classmethod
    def block(cls, batch: int, start: int, stop: int, first: Tensor | None = None) -> Rows:
        """Return the rows of a chunk: columns start to stop - 1 of every sequence.

        Args:
            batch: The number of sequences.
            start: The first column.
            stop: The column behind the last one.
            first: The first column of each sequence that is no padding, `[B]` (default: 0).
        """
        length = stop - start
        sequence = torch.arange(batch).repeat_interleave(length)
        column = torch.arange(start, stop).repeat(batch)
        begin = torch.zeros_like(column) if first is None else first[sequence]
        # Padding sees itself, so that its state is a number.
        begin = torch.minimum(begin, column)
        position = (column - begin).clamp_min(0)
        return cls(sequence, column, position, begin, column + 1, torch.zeros_like(column).int())

    @classmethod
    def chains(cls, sequences: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> Rows:
        """Return the rows of texts of different lengths, without padding.

        Args:
            sequences: The sequence of each chain.
            starts: The first column of each chain.
            counts: The number of tokens of each chain.
        """
        sequence = torch.tensor(
            [number for number, n in zip(sequences, counts, strict=True) for _ in range(n)]
        )
        column = torch.tensor(
            [start + i for start, n in zip(starts, counts, strict=True) for i in range(n)]
        )
        nothing = torch.zeros_like(column)
        return cls(sequence, column, column, nothing, column + 1, nothing.int())

    @classmethod
    def trees(
        cls, sequences: Sequence[int], starts: Sequence[int], parents: Sequence[Sequence[int]]
    ) -> Rows:
        """Return the rows of trees, each the tokens that may follow a text.

        Args:
            sequences: The sequence of each tree.
            starts: The first column of each tree.
            parents: For each tree, the parent of every row, as the number of a row before it in the
                tree; -1 for the first row.
        """
        sequence: list[int] = []
        column: list[int] = []
        position: list[int] = []
        base: list[int] = []
        sees: list[int] = []
        for number, start, tree in zip(sequences, starts, parents, strict=True):
            offset = len(sequence)
            depths: list[int] = []
            masks: list[int] = []
            for row, parent in enumerate(tree):
                depths.append(0 if parent < 0 else depths[parent] + 1)
                masks.append((0 if parent < 0 else masks[parent]) | 1 << (offset + row))
            sequence += [number] * len(tree)
            column += range(start, start + len(tree))
            position += [start + depth for depth in depths]
            base += [start] * len(tree)
            sees += [mask - (1 << 32) if mask >> 31 else mask for mask in masks]
        columns = torch.tensor(column)
        return cls(
            torch.tensor(sequence),
            columns,
            torch.tensor(position),
            torch.zeros_like(columns),
            torch.tensor(base),
            torch.tensor(sees, dtype=torch.int32),
        )

    def picked(self, places: Tensor) -> Rows:
        """Return some of the rows, which see only columns before their `base`."""
        fields = (self.sequence, self.column, self.position, self.first, self.base, self.sees)
        return Rows(*(values[places] for values in fields))

    def visible(self, stop: int, window: int | None = None) -> Tensor:
        """Return which columns each row sees, `[R, stop]`.

        Args:
            stop: The column behind the last one.
            window: The columns that a row sees, itself included (default: all).
        """
        columns = torch.arange(stop)
        seen = (columns >= self.first[:, None]) & (columns < self.base[:, None])
        if window is not None:
            # Columns behind `base` are tested below by their own positions.
            nearest = self.first + self.position - window
            seen &= columns > nearest[:, None]
        for row in range(len(self)):
            bits = int(self.sees[row])
            for other in range(len(self)):
                if bits >> other & 1:
                    near = int(self.position[row] - self.position[other])
                    seen[row, self.column[other]] = window is None or near < window
        return seen
