"""Hypotheses: one is named only if it leaves little, and all others clearly more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.gate.attribution import evidence_of
from cascade.gate.causes.hypotheses import (
    CLEARLY,
    MOST_LEFT,
    Hypothesis,
    best_of,
    growth,
    named,
    tried,
)

LAYERS = [*map(str, range(1, 5)), "4+norm"]


def a_hypothesis(name: str, left: float) -> Hypothesis:
    return Hypothesis(name, "model", "1", f"because of {name}", left)


@given(st.floats(0, MOST_LEFT), st.floats(CLEARLY, 1e6), st.floats(CLEARLY, 1e6))
def test_the_one_that_leaves_little_is_named(left: float, other: float, moved_by: float) -> None:
    found = best_of([a_hypothesis("b", other), a_hypothesis("a", left)], moved_by)
    assert found is not None
    assert found.name == "a"


@given(st.floats(MOST_LEFT * 1.001, 1e9))
def test_one_that_leaves_much_is_not_named_however_bad_the_others_are(left: float) -> None:
    assert best_of([a_hypothesis("a", left)], 1e12) is None


@given(st.floats(0, MOST_LEFT), st.floats(0, CLEARLY * 0.999))
def test_two_that_explain_about_as_much_are_not_named(one: float, other: float) -> None:
    assert best_of([a_hypothesis("a", one), a_hypothesis("b", other)], 1e6) is None


def test_two_values_of_one_cause_do_not_compete() -> None:
    same = [a_hypothesis("a", 0.1), a_hypothesis("a", 0.2), a_hypothesis("b", 9.0)]
    found = best_of(same, 1e6)
    assert found is not None
    assert found.left == 0.1


@pytest.mark.parametrize(("moved_by", "is_named"), [(0.9 * CLEARLY, False), (CLEARLY, True)])
def test_a_movement_that_is_hardly_beyond_the_tolerance_has_no_name(
    moved_by: float, is_named: bool
) -> None:
    assert (best_of([a_hypothesis("a", 0.0)], moved_by) is not None) is is_named


def test_nothing_is_named_without_a_hypothesis_or_with_nan() -> None:
    assert best_of([], 1e6) is None
    assert best_of([a_hypothesis("a", math.nan), a_hypothesis("b", math.inf)], 1e6) is None


def test_what_was_tried_is_listed_once_per_name_and_the_best_first() -> None:
    hypotheses = [
        a_hypothesis(*each) for each in (("b", 7.0), ("a", 3.0), ("b", 2.0), ("c", math.inf))
    ]
    assert [(one.name, one.left) for one in tried(hypotheses)] == [
        ("b", 2.0),
        ("a", 3.0),
        ("c", None),
    ]
    found = named(hypotheses[2], hypotheses)
    assert (found.cause, found.layer, found.named) == ("model", "1", "b")
    assert found.tried == tried(hypotheses)


def test_distances_are_in_tolerances_and_leave_out_rows_that_nothing_is_said_about() -> None:
    expected = np.full((2, 5, 2), 0.5)
    obtained = expected.copy()
    obtained[1, 2] += [3e-3, 8e-3]
    evidence = evidence_of(LAYERS, obtained, expected, 1e-3)
    assert evidence.moved_by == pytest.approx(4.0)  # the mean square has twice the tolerance
    assert (evidence.first, evidence.moved.tolist()) == (2, [False, False, True, False, False])
    silent = expected.copy()
    silent[:, 2] = np.nan
    assert evidence.distance(silent, obtained) == 0.0
    silent = expected.copy()
    silent[0, 2] = np.nan  # in one sequence only: a value is missing
    assert evidence.distance(silent, obtained) == math.inf
    broken = obtained.copy()
    broken[0, 0, 0] = np.nan
    assert evidence.distance(expected, broken) == math.inf


def test_growth_names_the_first_layer_and_the_one_that_moved_most() -> None:
    expected = np.full((1, 5), 0.5)
    obtained = expected.copy()
    obtained[0, 1:] += [1e-4, 3e-4, 2e-4, 1e-4]
    text = growth(evidence_of(LAYERS, obtained, expected, 1e-6))
    assert text == "layer 2 is the first that moved, by 1e-04, and layer 3 moved most, by 3e-04"
    obtained[0, 2:] = expected[0, 2:]
    text = growth(evidence_of(LAYERS, obtained, expected, 1e-6))
    assert text == "layer 2 is the first that moved, by 1e-04"
