"""Attribution: each kind of evidence is recognized and not mistaken for another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.core.schema import UNSET
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
    """Return means that moved by `size` in one row and by a tenth of it in the rows above."""
    moved = means()
    moved[:, first] += size
    moved[:, first + 1 :] += size / 10
    return moved


@given(st.integers(1, len(LAYERS) - 1), st.sampled_from([1e-4, -1e-4, 0.3]))
def test_the_first_row_that_moved_is_the_broken_layer(first: int, size: float) -> None:
    assert cause(from_row(first, size)) == ("layer", LAYERS[first])


def test_one_moved_sequence_is_enough_to_name_the_layer() -> None:
    moved = means()
    moved[1, 4] += 1e-4
    assert cause(moved) == ("layer", "5")


def test_a_skipped_layer_is_recognized() -> None:
    skipped = from_row(6, 1e-3)
    skipped[:, 6] = 1.0
    assert "returns its input unchanged" in attribute(LAYERS, skipped, means(), TOLERANCE).text
    other = attribute(LAYERS, from_row(6, 1e-3), means(), TOLERANCE)
    assert "returns its input unchanged" not in other.text


@pytest.mark.parametrize(("size", "expected"), [(1e-4, "numerics"), (9e-4, "numerics")])
def test_a_small_movement_of_every_layer_is_rounding(size: float, expected: str) -> None:
    assert cause(means() + size)[0] == expected


def test_a_large_movement_from_the_first_layer_on_is_the_whole_model() -> None:
    assert cause(from_row(0, 0.05)) == ("model", "1")
    # Small, but not in most rows: not rounding.
    only_first = means()
    only_first[:, 0] += 1e-4
    assert cause(only_first) == ("model", "1")


@pytest.mark.parametrize("shift", [1, -1])
def test_values_of_the_neighbouring_layer_mean_an_index_off_by_one(shift: int) -> None:
    right, wrong = means(), means()
    for row in range(10):
        if 0 <= row + shift < 10:
            wrong[:, row] = right[:, row + shift]
    found = attribute(LAYERS, wrong, right, TOLERANCE)
    assert found.cause == "capture"
    assert "off by one" in found.text
    assert ("above" in found.text) is (shift > 0)


def test_a_last_layer_read_after_the_final_norm_is_recognized() -> None:
    wrong = means()
    wrong[:, 9] = means()[:, 10]
    found = attribute(LAYERS, wrong, means(), TOLERANCE)
    assert (found.cause, found.layer) == ("capture", "10")
    assert found.named == "last layer read after the final norm"


def test_rows_alone_do_not_tell_why_a_final_norm_changes_nothing() -> None:
    wrong = means()
    wrong[:, 10] = means()[:, 9]
    found = attribute(LAYERS, wrong, means(), TOLERANCE)
    assert (found.cause, found.layer) == ("layer", "10+norm")
    assert found.named == "no final norm"
    for reason in ("weights are all equal", "it is skipped", "read before it"):
        assert reason in found.text
    # Another row has moved too, so that the norm does not explain it all.
    wrong[:, 3] += 1e-3
    assert attribute(LAYERS, wrong, means(), TOLERANCE).named is UNSET


@pytest.mark.parametrize("squares", [False, True])
def test_mean_squares_decide_between_rows_of_equal_means(squares: bool) -> None:
    expected = np.stack([means(), means() ** 2 + 0.01], axis=2)
    wrong = expected.copy()
    wrong[:, 9, 0] = expected[:, 10, 0]
    if squares:
        wrong[:, 9, 1] = expected[:, 10, 1]
    found = attribute(LAYERS, wrong, expected, TOLERANCE)
    assert (found.named == "last layer read after the final norm") is squares


def test_reordered_sequences_are_distinguished_from_moved_ones() -> None:
    found = attribute(LAYERS, means()[[1, 2, 0]], means(), TOLERANCE)
    assert (found.cause, found.layer) == ("capture", None)
    assert "another order" in found.text
    twice = means()[[1, 1, 0]]  # not a permutation: one sequence is missing
    assert cause(twice)[0] == "model"


def test_similar_layers_are_not_mistaken_for_shifted_ones() -> None:
    alike = means()
    alike[:, 3:8] = alike[:, 3:4]
    moved = alike.copy()
    moved[:, 3] += 1e-4
    moved[:, 4:] += 1e-5
    assert attribute(LAYERS, moved, alike, TOLERANCE).layer == "4"


def test_unchanged_means_point_to_the_counting() -> None:
    assert cause(means()) == ("counting", None)
    assert cause(means() + 0.9 * TOLERANCE) == ("counting", None)


def test_missing_rows_take_precedence() -> None:
    lacking = from_row(2, 0.1)
    lacking[:, 7] = np.nan
    assert cause(lacking) == ("rows", "8")
    assert cause(means(), lacking) == ("rows", "8")
    lacking[:, 8:] = np.nan
    assert "rows 8, 9, 10" in attribute(LAYERS, lacking, means(), TOLERANCE).text


def test_nan_in_some_sequences_counts_as_movement() -> None:
    broken = means()
    broken[0, 5:] = np.nan
    assert cause(broken) == ("layer", "6")


def test_tolerances_can_differ_between_rows() -> None:
    limits = np.full(len(LAYERS), 1e-3)
    limits[4] = 1e-5
    moved = means() + 1e-4
    assert attribute(LAYERS, moved, means(), limits).layer == "5"


def test_a_single_layer_is_attributed_to_the_model() -> None:
    found = attribute(["1"], np.array([[0.5]]), np.array([[0.7]]), TOLERANCE)
    assert found.cause == "model"
