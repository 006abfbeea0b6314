"""Long sequences are consecutive text of the corpus, without a gap, and are found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences, found_again, long_sequences


def counted(sequences: int, seq_len: int) -> TokenBlocks:
    """Return a corpus whose tokens are 0, 1, 2, ..."""
    ids = np.arange(sequences * seq_len, dtype=np.int32).reshape(sequences, seq_len)
    return TokenBlocks(ids, "counted", "counted", records=1)


def with_bos(sequences: int, seq_len: int) -> TokenBlocks:
    """Return a corpus whose sequences begin with BOS, 0, and whose text is 1, 2, 3, ..."""
    text = counted(sequences, seq_len - 1).ids + 1
    ids = np.concatenate([np.zeros((sequences, 1), dtype=np.int32), text], axis=1)
    return TokenBlocks(ids, "begun", "begun", records=1, bos="yes")


@given(st.integers(1, 40), st.integers(2, 9), st.integers(2, 60), st.integers(1, 4))
def test_each_is_consecutive_text_and_none_share_a_token(
    sequences: int, seq_len: int, length: int, most: int
) -> None:
    found = long_sequences(counted(sequences, seq_len), length, most)
    assert len(found.ids) == min(most, sequences // -(-length // seq_len))
    for start, row in zip(found.starts, found.ids, strict=True):
        assert row.tolist() == list(range(start * seq_len, start * seq_len + length))
    assert len(np.unique(found.ids)) == found.ids.size


def test_they_are_spread_over_the_corpus() -> None:
    assert long_sequences(counted(100, 8), 80, 2).starts.tolist() == [20, 70]


def test_a_corpus_with_bos_gives_one_bos_and_text_without_a_gap() -> None:
    found = long_sequences(with_bos(30, 8), 50, 2)
    assert found.ids[:, 0].tolist() == [0, 0]
    assert (np.diff(found.ids[:, 1:], axis=1) == 1).all()


def test_a_corpus_that_is_too_short_gives_none() -> None:
    assert long_sequences(counted(3, 8), 25, 2).ids.shape == (0, 25)


def again(blocks: TokenBlocks, before: LongSequences, of: TokenBlocks) -> LongSequences:
    first = of.sequence_fingerprints()[before.starts]
    return found_again(blocks, before.ids.shape[1], before.fingerprints(), first)


@pytest.mark.parametrize("make", [counted, with_bos])
def test_they_are_found_again_in_a_corpus_that_has_grown(
    make: Callable[[int, int], TokenBlocks],
) -> None:
    blocks = make(60, 8)
    before = long_sequences(blocks, 50, 2)
    more = np.full((5, 8), 7, dtype=np.int32)
    grown = replace(blocks, ids=np.concatenate([more, blocks.ids, more]))
    found = again(grown, before, blocks)
    assert found.starts.tolist() == [start + 5 for start in before.starts]
    assert (found.ids == before.ids).all()


def test_those_with_another_text_are_not_found() -> None:
    blocks = counted(60, 8)
    before = long_sequences(blocks, 50, 2)
    edited = blocks.ids.copy()
    edited[before.starts[0] + 3] = 7
    found = again(replace(blocks, ids=edited), before, blocks)
    assert (found.ids == before.ids[1:]).all()
    # The first sequence is there, but the text ends before the long one does.
    cut = replace(blocks, ids=blocks.ids[: before.starts[1] + 1])
    assert (again(cut, before, blocks).ids == before.ids[:1]).all()
