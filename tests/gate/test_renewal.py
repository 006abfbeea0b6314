"""Baselines made anew: whole, sealed, with their noise floor; left alone where nothing moved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from support.build_evaluations import a_row, an_evaluation
from support.build_gate import BLOCKS, a_stack, broken
from support.build_profiles import a_profile, edited, profile_of, provenance, similarities_of
from support.disk import contents, largest_file

from cascade.core.errors import OutputError, RecordError
from cascade.gate.baselines import read_profile
from cascade.gate.drift import compare
from cascade.gate.renewal import measure_whole, replace_budgets, still_holds, store_profile


def test_a_baseline_is_measured_whole_and_stored_with_its_noise_floor(tmp_path: Path) -> None:
    profile = measure_whole(a_stack(), BLOCKS, command="pytest --force-regen")
    path, before = store_profile(tmp_path, profile)
    assert (path, before) == (tmp_path / "tiny/random.saturation.json", None)
    stored = read_profile(path)
    assert stored.record()["noise"]["repeat"] < 1e-6
    assert stored.record()["provenance"]["command"] == "pytest --force-regen"
    assert len(stored.arrays()["sequence"]) == len(BLOCKS.ids)
    again = measure_whole(broken(), BLOCKS)
    _, before = store_profile(tmp_path, again)
    assert before is not None
    assert before.record() == stored.record()


def test_what_is_measured_again_still_holds_and_what_moved_does_not() -> None:
    before = a_profile(12)
    assert still_holds(a_profile(12), before)
    assert not still_holds(a_profile(12, seed=1), before)
    assert compare(a_profile(12, seed=1), before).verdict == "FAIL"


def test_fewer_or_more_sequences_are_another_baseline() -> None:
    values = similarities_of(12)
    ten, twelve = profile_of(values[:, :10]), profile_of(values)
    for new, before in ((ten, twelve), (twelve, ten)):
        assert compare(new, before).verdict == "PASS"
        assert not still_holds(new, before)


def test_another_model_or_an_older_schema_is_made_anew_whatever_the_numbers() -> None:
    old = a_profile(12)
    assert not still_holds(a_profile(12, about=provenance(model__weights_hash="w2")), old)
    first = edited(old, lambda record: record.update(schema=1), sealed=True)
    assert compare(old, first).verdict == "PASS"
    assert not still_holds(old, first)


def test_anyway_shows_what_moved_in_another_checkpoint() -> None:
    other = a_profile(12, seed=1, about=provenance(model__weights_hash="w2"))
    assert compare(other, a_profile(12)).verdict == "NOT COMPARABLE"
    assert compare(other, a_profile(12), anyway=True).verdict == "FAIL"


def test_budgets_are_replaced_as_a_whole_also_by_those_of_another_checkpoint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny/words.budgets.json"
    replace_budgets(path, [an_evaluation(a_row()), an_evaluation(a_row(), propagation="exact")])
    assert len(json.loads(path.read_text())["groups"]) == 2
    other = copy.deepcopy(an_evaluation(a_row()))
    other["provenance"]["model"]["weights_hash"] = "w2"
    replace_budgets(path, [other])
    (group,) = json.loads(path.read_text())["groups"]
    assert group["provenance"]["model"]["weights_hash"] == "w2"


def test_budgets_that_cannot_be_made_or_written_leave_those_before(tmp_path: Path) -> None:
    path = tmp_path / "tiny/words.budgets.json"
    replace_budgets(path, [an_evaluation(a_row())])
    before = contents(tmp_path)
    with pytest.raises(RecordError, match="torn"):
        replace_budgets(path, [an_evaluation(a_row()), an_evaluation({})])
    with largest_file(100), pytest.raises(OutputError):
        replace_budgets(path, [an_evaluation(a_row(agreement=0.5))])
    assert contents(tmp_path) == before
