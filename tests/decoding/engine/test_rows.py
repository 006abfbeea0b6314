"""Rows see what their sequence and their tree have before them."""

from __future__ import annotations

import pytest
import torch

from cascade.decoding.engine.rows import MAX_ROWS, Rows


def seen(rows: Rows, stop: int, window: int | None = None) -> list[list[int]]:
    return [torch.nonzero(row).flatten().tolist() for row in rows.visible(stop, window)]


def test_block_sees_everything_before_it_and_itself() -> None:
    rows = Rows.block(2, 3, 5)
    assert rows.sequence.tolist() == [0, 0, 1, 1]
    assert rows.column.tolist() == rows.position.tolist() == [3, 4, 3, 4]
    assert seen(rows, 5) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]] * 2


def test_block_does_not_see_padding() -> None:
    rows = Rows.block(2, 3, 4, torch.tensor([2, 0]))
    assert seen(rows, 4) == [[2, 3], [0, 1, 2, 3]]
    assert rows.position.tolist() == [1, 3]


def test_padding_sees_itself() -> None:
    rows = Rows.block(1, 0, 3, torch.tensor([2]))
    assert seen(rows, 3) == [[0], [1], [2]]
    assert rows.position.tolist() == [0, 0, 0]


def test_window_hides_columns_that_are_too_far() -> None:
    assert seen(Rows.block(1, 5, 7), 7, window=3) == [[3, 4, 5], [4, 5, 6]]
    assert seen(Rows.block(1, 5, 6, torch.tensor([4])), 6, window=3) == [[4, 5]]


def test_chains_have_their_own_lengths() -> None:
    rows = Rows.chains([1, 0], [4, 2], [2, 1])
    assert rows.sequence.tolist() == [1, 1, 0]
    assert rows.column.tolist() == rows.position.tolist() == [4, 5, 2]
    assert seen(rows, 6) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2]]


def test_rows_of_a_tree_see_their_ancestors_only() -> None:
    # The token at column 3 has two children; the second child has one itself.
    rows = Rows.trees([0], [3], [[-1, 0, 0, 2]])
    assert rows.column.tolist() == [3, 4, 5, 6]
    assert rows.position.tolist() == [3, 4, 4, 5]
    past = [0, 1, 2]
    assert seen(rows, 7) == [[*past, 3], [*past, 3, 4], [*past, 3, 5], [*past, 3, 5, 6]]


def test_window_of_a_tree_counts_positions() -> None:
    rows = Rows.trees([0], [3], [[-1, 0, 0, 2]])
    assert seen(rows, 7, window=2) == [[2, 3], [3, 4], [3, 5], [5, 6]]


def test_trees_of_several_sequences_do_not_see_each_other() -> None:
    rows = Rows.trees([1, 0], [2, 1], [[-1, 0], [-1, 0, 0]])
    assert rows.sequence.tolist() == [1, 1, 0, 0, 0]
    assert seen(rows, 4) == [[0, 1, 2], [0, 1, 2, 3], [0, 1], [0, 1, 2], [0, 1, 3]]


def test_the_last_bit_is_a_row_like_any_other() -> None:
    rows = Rows.trees([0], [0], [list(range(-1, MAX_ROWS - 1))])
    assert seen(rows, MAX_ROWS)[-1] == list(range(MAX_ROWS))


@pytest.mark.parametrize("places", [[0, 2], [1]])
def test_picked_rows_keep_what_they_see(places: list[int]) -> None:
    rows = Rows.block(1, 2, 5)
    picked = rows.picked(torch.tensor(places))
    assert seen(picked, 5) == [seen(rows, 5)[place] for place in places]
