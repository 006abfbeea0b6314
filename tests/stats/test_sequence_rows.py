"""Rows of sequences in memory: joined in any order, read by place, restored from arrays."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.stats.sequence_rows import COLUMNS, SequenceRows
from cascade.stats.similarity_statistics import SimilarityStatistics
from cascade.stats.token_statistics import TokenStatistics


def rows_of(numbers: list[int]) -> SequenceRows:
    """Return rows whose values say of which sequence they are."""
    own = np.array(numbers, dtype=np.float64)[:, None] + np.array([0.1, 0.2])
    return SequenceRows(np.array(numbers), own, own + 0.5, np.stack([own] * 3, axis=2))


def same(rows: SequenceRows, other: SequenceRows) -> bool:
    columns = ("numbers", *COLUMNS)
    return all(np.array_equal(getattr(rows, name), getattr(other, name)) for name in columns)


@given(st.permutations(range(9)), st.lists(st.integers(0, 9), max_size=4))
def test_parts_in_any_order_give_the_rows_in_ascending_order(
    numbers: list[int], cuts: list[int]
) -> None:
    borders = [0, *sorted(cuts), 9]
    parts = [rows_of(numbers[a:b]) for a, b in itertools.pairwise(borders)]
    assert same(SequenceRows.joined([*parts, SequenceRows.none(2)]), rows_of([*range(9)]))


def test_a_sequence_in_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="every sequence once"):
        SequenceRows.joined([rows_of([1, 2]), rows_of([2, 3])])


def test_rows_are_read_by_place_in_the_given_order() -> None:
    rows = rows_of([4, 5, 6, 7])
    assert same(rows.read(np.array([3, 0])), rows_of([7, 4]))
    assert rows.renumbered(10).numbers.tolist() == [14, 15, 16, 17]
    assert rows.statistics().shape == (4, 2, 5)
    assert [len(batch) for batch in rows.batches()] == [4]
    assert list(SequenceRows.none(2).batches()) == []


@pytest.mark.parametrize("name", ["sequence_mean", "sequence_mean_square", "sequence_share"])
def test_arrays_of_another_shape_are_refused(name: str) -> None:
    arrays: dict[str, Any] = rows_of([0, 1, 2]).arrays()
    assert same(SequenceRows.from_arrays(arrays, 2), rows_of([0, 1, 2]))
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        SequenceRows.from_arrays(arrays | {name: arrays[name][:2]}, 2)
    with pytest.raises(ValueError, match="expected shape"):
        SequenceRows.from_arrays(arrays, 3)


def test_rows_that_were_read_can_be_added_to() -> None:
    statistics = SimilarityStatistics(["1"], np.array([[1, 2, 3]]))
    for number in (2, 0, 1):
        statistics.update(np.full((1, 1, 4), 0.25 * number), np.array([number]))
        assert len(statistics.rows) == statistics.count // 4
    assert statistics.rows.all().mean[:, 0].tolist() == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match="every sequence once"):
        statistics.update(np.zeros((1, 1, 4)), np.array([1]))


def test_sums_of_another_number_of_layers_are_refused() -> None:
    tokens = TokenStatistics(["1", "2"], np.array([[1, 2, 3]] * 2))
    tokens.add(np.zeros((2, 3)))
    arrays = tokens.token_arrays()
    with pytest.raises(ValueError, match="total: expected 2 sums, got 1"):
        TokenStatistics.of_arrays(arrays | {"total": arrays["total"][:1]})
