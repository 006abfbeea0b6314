"""Attribution: each kind of evidence is recognized, and only it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.gate.attribution import attribute

Array = npt.NDArray[np.float64]

LAYERS = [*map(str, range(1, 11)), "10+norm"]
TOLERANCE = 2e-6


def means(sequences: int = 3) -> Array:
    draw = np.random.default_rng(0)
    return 0.5 + 0.4 * draw.random((sequences, len(LAYERS)))


def cause(obtained: Array, expected: Array | None = None) -> tuple[str, str | None]:
    found = attribute(LAYERS, obtained, means() if expected is None else expected, TOLERANCE)
    assert found.text
    return found.cause, found.layer


def from_row(first: int, size: float) -> Array:
    """Return means that have moved from a row on: most there, a tenth of it above."""
    moved = means()
    moved[:, first] += size
    moved[:, first + 1 :] += size / 10
    return moved


@given(st.integers(1, len(LAYERS) - 1), st.sampled_from([1e-4, -1e-4, 0.3]))
def test_the_first_row_that_moved_is_the_broken_layer(first: int, size: float) -> None:
    assert cause(from_row(first, size)) == ("layer", LAYERS[first])


def test_one_sequence_is_enough_to_say_where_it_starts() -> None:
    moved = means()
    moved[1, 4] += 1e-4
    assert cause(moved) == ("layer", "5")


def test_a_layer_that_hands_its_input_through_is_told() -> None:
    skipped = from_row(6, 1e-3)
    skipped[:, 6] = 1.0
    assert "hands its input through" in attribute(LAYERS, skipped, means(), TOLERANCE).text
    other = attribute(LAYERS, from_row(6, 1e-3), means(), TOLERANCE)
    assert "hands its input through" not in other.text


@pytest.mark.parametrize(("size", "expected"), [(1e-4, "numerics"), (9e-4, "numerics")])
def test_small_and_everywhere_from_the_first_layer_on_is_rounding(
    size: float, expected: str
) -> None:
    assert cause(means() + size)[0] == expected


def test_large_from_the_first_layer_on_is_the_whole_model() -> None:
    assert cause(from_row(0, 0.05)) == ("model", "1")
    # Small, but far from everywhere: not rounding.
    only_first = means()
    only_first[:, 0] += 1e-4
    assert cause(only_first) == ("model", "1")


@pytest.mark.parametrize("shift", [1, -1])
def test_rows_of_the_neighbouring_layer_are_an_index_off_by_one(shift: int) -> None:
    right, wrong = means(), means()
    for row in range(10):
        if 0 <= row + shift < 10:
            wrong[:, row] = right[:, row + shift]
    found = attribute(LAYERS, wrong, right, TOLERANCE)
    assert found.cause == "capture"
    assert "off by one" in found.text
    assert ("above" in found.text) is (shift > 0)


@pytest.mark.parametrize(("row", "other"), [(9, 10), (10, 9)])
def test_the_last_row_and_the_normed_one_mixed_up_are_told(row: int, other: int) -> None:
    wrong = means()
    wrong[:, row] = means()[:, other]
    found = attribute(LAYERS, wrong, means(), TOLERANCE)
    assert (found.cause, found.layer) == ("capture", LAYERS[row])
    assert "final norm" in found.text


def test_sequences_in_another_order_are_told_from_sequences_that_moved() -> None:
    found = attribute(LAYERS, means()[[1, 2, 0]], means(), TOLERANCE)
    assert (found.cause, found.layer) == ("capture", None)
    assert "another order" in found.text
    twice = means()[[1, 1, 0]]  # no permutation: one sequence's numbers are gone
    assert cause(twice)[0] == "model"


def test_alike_layers_are_not_taken_for_shifted_ones() -> None:
    alike = means()
    alike[:, 3:8] = alike[:, 3:4]
    moved = alike.copy()
    moved[:, 3] += 1e-4
    moved[:, 4:] += 1e-5
    assert attribute(LAYERS, moved, alike, TOLERANCE).layer == "4"


def test_means_that_are_right_leave_the_counting() -> None:
    assert cause(means()) == ("counting", None)
    assert cause(means() + 0.9 * TOLERANCE) == ("counting", None)


def test_rows_that_a_side_lacks_come_before_all_else() -> None:
    lacking = from_row(2, 0.1)
    lacking[:, 7] = np.nan
    assert cause(lacking) == ("rows", "8")
    assert cause(means(), lacking) == ("rows", "8")
    lacking[:, 8:] = np.nan
    assert "rows 8, 9, 10" in attribute(LAYERS, lacking, means(), TOLERANCE).text


def test_nan_in_some_sequences_is_a_movement() -> None:
    broken = means()
    broken[0, 5:] = np.nan
    assert cause(broken) == ("layer", "6")


def test_limits_can_differ_from_row_to_row() -> None:
    limits = np.full(len(LAYERS), 1e-3)
    limits[4] = 1e-5
    moved = means() + 1e-4
    assert attribute(LAYERS, moved, means(), limits).layer == "5"


def test_a_single_layer_has_no_neighbour_to_be_taken_for() -> None:
    found = attribute(["1"], np.array([[0.5]]), np.array([[0.7]]), TOLERANCE)
    assert found.cause == "model"
