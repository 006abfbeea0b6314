"""Tests of the comparison of a model with the first one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.build_models import levels, measured, sizes

from cascade.core.records import to_json
from cascade.core.schema import to_plain
from cascade.studies.comparisons.compared_models import (
    UnmeasuredModel,
)
from cascade.studies.comparisons.configurations import Configuration
from cascade.studies.comparisons.model_comparison import compare_models
from cascade.studies.comparisons.model_pairs import match_dips

# --- Dips ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # The same depth in 30 and 60 layers.
        (([25], 30), ([50], 60), [(25, 50)]),
        # 0.833 and 0.84375 are within 0.05; 0.833 and 0.906 are not.
        (([25], 30), ([27], 32), [(25, 27)]),
        (([25], 30), ([29], 32), []),
        # 0.05 itself still matches.
        (([10], 40), ([12], 40), [(10, 12)]),
        (([10], 40), ([13], 40), []),
        # In a model of ten layers, one layer is more than 0.05.
        (([5], 10), ([6], 10), [(5, 6)]),
        (([5], 10), ([7], 10), []),
        (([5], 10), ([22], 40), [(5, 22)]),
        # The nearest pair is matched first: 9 with 10. Then 12 has no match.
        (([9, 12], 100), ([10], 100), [(9, 10)]),
        (([8, 9], 100), ([10], 100), [(9, 10)]),
        (([9, 12], 100), ([10, 13], 100), [(9, 10), (12, 13)]),
        # If both are equally near, the lower layer is matched.
        (([9, 11], 100), ([10], 100), [(9, 10)]),
        (([], 30), ([25], 30), []),
    ],
)
def test_matched_dips_equal_the_examples(
    first: tuple[list[int], int], second: tuple[list[int], int], expected: list[tuple[int, int]]
) -> None:
    assert match_dips(*first, *second) == expected


def dips_of(num_layers: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, num_layers), unique=True, max_size=8).map(sorted)


both = st.tuples(st.integers(1, 60), st.integers(1, 60)).flatmap(
    lambda depths: st.tuples(
        dips_of(depths[0]), st.just(depths[0]), dips_of(depths[1]), st.just(depths[1])
    )
)


@given(both)
def test_matching_is_one_to_one_complete_and_symmetric(
    case: tuple[list[int], int, list[int], int],
) -> None:
    first, first_layers, second, second_layers = case
    pairs = match_dips(*case)
    ones, others = [one for one, _ in pairs], [other for _, other in pairs]
    assert set(ones) <= set(first)
    assert set(others) <= set(second)
    assert len(set(ones)) == len(set(others)) == len(pairs)
    most = max(Fraction(1, 20), Fraction(1, min(first_layers, second_layers)))

    def apart(one: int, other: int) -> Fraction:
        return abs(Fraction(one, first_layers) - Fraction(other, second_layers))

    assert all(apart(*pair) <= most for pair in pairs)
    left = [
        (one, other)
        for one in set(first) - set(ones)
        for other in set(second) - set(others)
        if apart(one, other) <= most
    ]
    assert not left
    turned = match_dips(second, second_layers, first, first_layers)
    assert sorted((one, other) for other, one in turned) == pairs


@given(st.integers(1, 60).flatmap(lambda depth: st.tuples(dips_of(depth), st.just(depth))))
def test_a_model_matches_itself(case: tuple[list[int], int]) -> None:
    assert match_dips(*case, *case) == [(dip, dip) for dip in case[0]]


def test_matched_and_unmatched_dips_are_recorded() -> None:
    record = compare_models([measured(levels(30, 10, 25)), measured(levels(40, 20, 33))])
    (pair,) = record.pairs
    assert pair.dips.judged
    assert pair.dips.tolerance == 0.05
    (match,) = pair.dips.matched
    assert match.layers == ["25", "33"]
    assert match.depths == [0.833333, 0.825]
    assert match.means == pytest.approx([0.8, 0.8], abs=0.01)
    assert pair.dips.unmatched == [["10"], ["20"]]


def test_models_with_few_layers_have_no_dips() -> None:
    record = compare_models([measured([0.1, 0.9, 0.9, 0.6]), measured(levels(30, 25))])
    (pair,) = record.pairs
    assert not pair.dips.judged
    assert pair.dips.tolerance == 0.25
    assert record.models[0].exit.layer == "3"


# --- Profiles ------------------------------------------------------------------------------


def test_profiles_of_the_same_shape_have_no_distance_at_any_depth() -> None:
    line = [0.5] * 10
    record = compare_models([measured(line), measured([0.5] * 25)])
    assert record.pairs[0].apart.degrees < 0.3  # sampling noise
    turned = compare_models([measured([0.5] * 25), measured(line)])
    assert turned.pairs[0].apart == record.pairs[0].apart


def test_the_distance_of_profiles_is_the_angle_between_them() -> None:
    # The angles are 60 and 45 degrees, except in the last layer of the second model: 90 degrees.
    first = measured([0.5] * 4, sequences=1)
    second = measured([np.sqrt(0.5)] * 3 + [0.0], sequences=1)
    apart = compare_models([first, second]).pairs[0].apart
    assert apart.degrees == pytest.approx(np.sqrt((3 * 15**2 + 30**2) / 4), abs=1.0)
    assert apart.most_degrees == pytest.approx(30, abs=1.0)
    assert apart.most_depth == 1.0


# --- The same tokens -----------------------------------------------------------------------


def test_changes_are_found_by_layer_and_sequence() -> None:
    moved = np.zeros((11, 4))
    moved[2] = [0.001, 0.001, 0.001, 0.001]
    moved[6] = [-0.01, 0.03, -0.01, -0.01]
    record = compare_models(
        [
            measured([0.5] * 10, sequences=4),
            measured([0.5] * 10, sequences=4, moved=moved),
        ]
    )
    (pair,) = record.pairs
    assert (pair.unpaired, pair.paired.sequences) == (None, 4)
    rows = {row.layer: row for row in pair.paired.layers}
    assert pair.paired.largest_mover == "7"
    assert rows["3"].mean == pytest.approx(0.001)
    assert rows["3"].interval == pytest.approx([0.001, 0.001])
    assert rows["7"].mean == pytest.approx(0, abs=1e-12)
    assert rows["7"].mean_size == pytest.approx(0.015)
    assert (rows["7"].largest, rows["7"].sequence) == (pytest.approx(0.03), 2)
    # Student's interval by hand: t(0.975, 3) = 3.182446, standard deviation 0.02, four sequences.
    assert rows["7"].interval == pytest.approx([-0.0318245, 0.0318245], abs=1e-6)
    assert rows["1"].mean == rows["1"].largest == 0


def test_the_final_norm_is_never_the_largest_mover() -> None:
    moved = np.zeros((6, 3))
    moved[1], moved[5] = 0.01, 0.3
    pair = compare_models(
        [measured([0.5] * 5, sequences=3), measured([0.5] * 5, sequences=3, moved=moved)]
    ).pairs[0]
    assert pair.paired.largest_mover == "2"
    assert pair.paired.layers[-1].mean == pytest.approx(0.3)


def test_one_sequence_has_no_interval() -> None:
    pair = compare_models([measured([0.5] * 5, sequences=1), measured([0.5] * 5, sequences=1)])
    assert pair.pairs[0].paired.layers[0].interval is None
    to_json(to_plain(pair))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"means": [0.5] * 6}, "they have different numbers of layers (5 and 6)"),
        ({"tokenizer": "another"}, "their tokenizers differ, so their tokens differ"),
        ({"tokenizer": None}, "their tokenizers differ, so their tokens differ"),
        ({"fingerprints": np.arange(6) + 1}, "they read different sequences"),
        ({"sequences": 5}, "they read different sequences"),
        ({"norm": False}, "only one of them has a final norm"),
    ],
)
def test_unpaired_models_name_the_reason(other: dict[str, Any], reason: str) -> None:
    means = other.pop("means", [0.5] * 5)
    (pair,) = compare_models([measured([0.5] * 5), measured(means, **other)]).pairs
    assert (pair.unpaired, pair.paired) == (reason, None)


def test_thresholds_are_applied_only_to_models_of_the_same_depth() -> None:
    first, same, other = (measured(levels(depth)) for depth in (10, 10, 12))
    lower = measured(levels(10), moved=-0.02)
    pairs = compare_models([first, same, other, lower]).pairs
    reached = [row.reached for row in pairs[0].thresholds]
    assert reached == pytest.approx([0.3, 0.5, 0.7], abs=0.03)
    assert pairs[1].thresholds is None
    for row, before in zip(pairs[2].thresholds, reached, strict=True):
        assert row.reached > before + 0.2


def test_every_model_is_compared_with_the_first_measured_one() -> None:
    unmeasured = UnmeasuredModel(Configuration("other", "its config.json", None), sizes(12))
    record = compare_models([unmeasured, *(measured(levels(10)) for _ in range(3))])
    assert [(pair.against, pair.model) for pair in record.pairs] == [
        ("B", "C"),
        ("B", "D"),
    ]
