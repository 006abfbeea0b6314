"""Long sequences: several consecutive sequences of a corpus, joined to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.corpora.blocks import TokenBlocks


@dataclass(frozen=True)
class LongSequences:
    """Sequences that are longer than those of a corpus.

    Attributes:
        ids: `[Q, N]` int32.
        starts: `[Q]`, the number of the corpus's sequence that each begins with.

    Example:
        >>> blocks = TokenBlocks(np.arange(80, dtype=np.int32).reshape(10, 8), "n", "n", records=1)
        >>> long = long_sequences(blocks, 20, 2)
        >>> long.starts.tolist(), long.ids[:, 0].tolist()
        ([1, 6], [8, 48])
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    def only(self, rows: slice) -> LongSequences:
        """Return some of the long sequences."""
        return LongSequences(self.ids[rows], self.starts[rows])

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """Return 64 bits of SHA-256 per long sequence, `[Q]`."""
        return TokenBlocks(self.ids, "", "", records=0).sequence_fingerprints()


def sequences_in_one(blocks: TokenBlocks, length: int) -> int:
    """Return how many sequences of a corpus a long one is joined from.

    Args:
        blocks: The corpus.
        length: The number of tokens of the long sequence.
    """
    added = _added_bos(blocks)
    return math.ceil((length - added) / (int(blocks.ids.shape[1]) - added))


def long_sequences(blocks: TokenBlocks, length: int, most: int) -> LongSequences:
    """Return long sequences, evenly spaced over the corpus, none of which share a token.

    They depend on nothing but the corpus and their length. A corpus that begins each sequence with
    BOS gives long sequences that begin with one BOS.

    Args:
        blocks: The corpus, in the order of its text.
        length: The number of tokens of each long sequence.
        most: The maximum number of long sequences.

    Returns:
        The long sequences; none if the corpus has too few tokens for one.
    """
    joined = sequences_in_one(blocks, length)
    count = min(most, len(blocks.ids) // joined)
    # In the middles of as many equal sections of the text.
    sections = np.arange(count + 1) * len(blocks.ids) // max(1, count)
    starts = sections[:-1] + (np.diff(sections) - joined) // 2
    return _joined(blocks, length, starts)


def found_again(
    blocks: TokenBlocks,
    length: int,
    fingerprints: npt.NDArray[Any],
    first: npt.NDArray[Any],
) -> LongSequences:
    """Return the long sequences of an earlier run that a corpus still has.

    Args:
        blocks: The corpus, which may have grown since.
        length: The number of tokens of each long sequence.
        fingerprints: `[Q]`, the fingerprints of the long sequences.
        first: `[Q]`, the fingerprint of the corpus's sequence that each begins with.
    """
    prints = blocks.sequence_fingerprints()
    last = len(prints) - sequences_in_one(blocks, length)
    starts: list[int] = []
    for wanted, begins in zip(fingerprints, first, strict=True):
        places = np.flatnonzero(prints == begins)
        candidates = _joined(blocks, length, places[places <= last])
        starts += candidates.starts[candidates.fingerprints() == wanted].tolist()[:1]
    return _joined(blocks, length, np.array(starts, dtype=np.int64))


def _joined(blocks: TokenBlocks, length: int, starts: npt.NDArray[np.int64]) -> LongSequences:
    added, joined = _added_bos(blocks), sequences_in_one(blocks, length)
    bos = [blocks.ids[start, :added] for start in starts]
    texts = [blocks.ids[start : start + joined, added:].ravel() for start in starts]
    rows = [np.concatenate(both) for both in zip(bos, texts, strict=True)]
    ids = np.stack(rows)[:, :length] if rows else np.zeros((0, length), dtype=np.int32)
    return LongSequences(ids.astype(np.int32), np.asarray(starts, dtype=np.int64))


def _added_bos(blocks: TokenBlocks) -> int:
    """Return how many tokens at the start of each sequence are not text: 1 for BOS, else 0."""
    return int(blocks.bos == "yes")
