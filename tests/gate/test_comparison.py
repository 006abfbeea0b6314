"""Cells, comparisons and tolerances."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.build_profiles import (
    a_profile,
    floor,
    plain_record,
    profile_of,
    provenance,
    similarities_of,
)

from cascade.core.schema import from_plain, to_plain
from cascade.gate.comparison import (
    EXTREME_TOLERANCE,
    LEAST_TOLERANCE,
    NOISE_FACTOR,
    TABLE_TOLERANCE,
    Cell,
    Comparison,
    environment_differences,
    table_cells,
    tolerance_of,
)
from cascade.gate.drift import compare
from cascade.gate.records import ComparisonRecord

# --- Cells -----------------------------------------------------------------------------------


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_a_cell_passes_only_if_both_values_are_finite_and_close(a: float, b: float) -> None:
    cell = Cell("1", "mean", a, b, 0.5)
    passes = bool(np.isfinite([a, b]).all() and abs(b - a) <= 0.5)
    assert (cell.verdict == "PASS") is passes
    assert cell.verdict in ("PASS", "FAIL")


@given(st.floats(-2, 2), st.floats(0, 2))
def test_an_interval_passes_within_the_margin_and_fails_beyond_it(
    middle: float, half: float
) -> None:
    cell = Cell("1", "mean", 0.0, middle, 0.5, interval=(middle - half, middle + half))
    expected = "INCONCLUSIVE"
    if abs(middle) + half <= 0.5:
        expected = "PASS"
    elif abs(middle) - half > 0.5:
        expected = "FAIL"
    assert cell.verdict == expected


def test_a_difference_is_signed_and_in_units_of_its_limit() -> None:
    cell = Cell("1", "mean", 0.5, 0.4, 0.05)
    assert cell.difference == pytest.approx(-0.1)
    assert cell.standardized == pytest.approx(-2)
    assert Cell("1", "count", 5, 6, 0.0).standardized == math.inf
    assert Cell("1", "count", 5, 5, 0.0).standardized == 0
    row = Cell("1", "mean", math.nan, 0.4, 0.05).row()
    assert row.expected is row.difference is row.standardized is None
    assert row.verdict == "FAIL"


def test_a_comparison_without_cells_fails() -> None:
    assert Comparison("same sequences").verdict == "FAIL"


# --- Tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistic", "tolerance"),
    [
        ("std", TABLE_TOLERANCE),
        ("p50", TABLE_TOLERANCE),
        ("frac_negative", TABLE_TOLERANCE),
        ("min", EXTREME_TOLERANCE),
        ("max", EXTREME_TOLERANCE),
        ("count", 0.0),
    ],
)
def test_a_statistic_of_the_table_fails_just_beyond_its_tolerance(
    statistic: str, tolerance: float
) -> None:
    rows = plain_record(a_profile())["layers"]
    for sign in (-1, 1):
        for share, verdict in ((0.9, "PASS"), (1.1, "FAIL")):
            by = sign * share * tolerance if tolerance else sign * (share > 1)
            other = [dict(row) for row in rows]
            other[1][statistic] += by
            found = [c for c in table_cells(other, rows) if c.statistic == statistic]
            assert [c.verdict for c in found if c.layer == "2"] == [verdict]


@pytest.mark.parametrize("value", [math.nan, None, "0.9", True])
def test_a_table_entry_that_is_not_a_number_fails(value: Any) -> None:
    rows = plain_record(a_profile())["layers"]
    other = [rows[0], rows[1] | {"p90": value}, *rows[2:]]
    for pair in ((other, rows), (rows, other), (other, other)):
        verdicts = {(c.layer, c.statistic): c.verdict for c in table_cells(*pair)}
        assert verdicts["2", "p90"] == "FAIL"


def test_a_statistic_missing_on_one_side_fails() -> None:
    rows = plain_record(a_profile())["layers"]
    narrower = [rows[0], {k: v for k, v in rows[1].items() if k != "std"}, *rows[2:]]
    for pair in ((narrower, rows), (rows, narrower)):
        found = {(c.layer, c.statistic) for c in table_cells(*pair) if c.verdict == "FAIL"}
        assert found == {("2", "std")}


def test_a_layer_missing_from_one_table_fails_in_every_statistic() -> None:
    rows = plain_record(a_profile())["layers"]
    for pair in ((rows[1:], rows), (rows, rows[1:])):
        found = [c.statistic for c in table_cells(*pair) if c.verdict == "FAIL"]
        assert found == [name for name in rows[0] if name != "layer"]


# --- Tolerances ------------------------------------------------------------------------------


def test_the_tolerance_is_three_times_the_noise_with_a_minimum() -> None:
    new = a_profile(noise=None).content
    quiet, loud = (replace(new, noise=floor(repeat, 1e-3)) for repeat in (1e-9, 1e-5))
    assert tolerance_of(new, quiet, None) == (LEAST_TOLERANCE, [])
    assert tolerance_of(new, loud, None) == (pytest.approx(NOISE_FACTOR * 1e-5), [])


def test_without_a_noise_floor_the_smallest_tolerance_is_used_and_noted() -> None:
    bare = a_profile(noise=None).content
    tolerance, (note,) = tolerance_of(bare, bare, None)
    assert tolerance == LEAST_TOLERANCE
    assert "no noise floor" in note


def test_another_number_of_threads_is_the_same_environment() -> None:
    other = provenance(machine__threads=7)
    assert environment_differences(other, provenance()) == []


# --- Whole comparisons -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "words"),
    [
        ("same sequences", 1, "128 tokens, 1 of the baseline's sequences"),
        ("same sequences", 4, "128 tokens, 4 of the baseline's sequences"),
        ("other sequences", 1, "128 tokens, 1 sequence that the baseline does not have"),
        ("other sequences", 64, "128 tokens, 64 sequences that the baseline does not have"),
    ],
)
def test_the_headline_names_the_compared_sequences(method: Any, count: int, words: str) -> None:
    cell = Cell("1", "mean", 0.5, 0.5, 1e-6)
    comparison = Comparison(method, cells=(cell,), sequences=(count, count), tokens=128)
    assert comparison.headline().endswith(f"({words})")


def test_the_record_is_json_with_the_verdict_first() -> None:
    values = similarities_of(12)
    values[1, 5] += 1e-3
    record = compare(profile_of(values), a_profile()).record()
    plain = to_plain(record)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain)[:3] == ["schema", "kind", "verdict"]
    assert from_plain(plain, ComparisonRecord) == record
    assert record.verdict == "FAIL"
    assert record.attribution is not None
    assert record.attribution.layer == "2"
    assert record.profile[1].layer == "2"
    assert record.headline.startswith("drift in ")
