"""Baselines of earlier releases: read, with a note of what cannot be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.build_profiles import a_profile, old_arrays, plain_record, save_run
from support.paths import BASELINES

from cascade.core.records import packed, to_file
from cascade.core.schema import UNSET
from cascade.gate.baselines import StoredProfile, read_profile
from cascade.gate.drift import compare
from cascade.gate.older_baselines import budgets_note, profile_note
from cascade.report.gate.sections import comparison_report

NOTE = (
    "the baseline is of an earlier release (schema 1); not checked: whether it was edited (it has "
    "no hash), how much its machine rounds (it has no noise floor), and which weights and settings "
    "differ (it has no summary of them); accept a new run to check this too"
)


@pytest.fixture
def old(tmp_path: Path) -> StoredProfile:
    """A profile as the first releases wrote them."""
    profile = a_profile()
    lacking = ("hash", "arrays_hash", "noise", "parts")
    content = {k: v for k, v in plain_record(profile).items() if k not in lacking} | {"schema": 1}
    folder = save_run(tmp_path / "old", profile, content)
    (folder / "profile.npz").write_bytes(packed(old_arrays(profile)))
    (folder / "profile.parquet").unlink()
    return read_profile(folder)


def test_a_profile_of_schema_1_is_compared_with_a_note(old: StoredProfile) -> None:
    found = compare(a_profile(), old)
    assert found.verdict == "PASS"
    assert [note for note in found.notes if "earlier release" in note] == [NOTE]
    assert NOTE in str(comparison_report(found.record()))
    assert compare(a_profile(seed=1), old).verdict == "FAIL"


def test_a_profile_without_the_parts_of_its_model_is_compared_with_a_note() -> None:
    profile = a_profile()
    older = StoredProfile(replace(profile.content, parts=UNSET), profile.state, profile.rows)
    note = (
        "the baseline is of an earlier release; not checked: which weights and settings differ "
        "(it has no summary of them); accept a new run to check this too"
    )
    assert profile_note(older.record()) == note
    found = compare(profile, older)
    assert (found.verdict, note in found.notes) == ("PASS", True)


def test_a_profile_of_this_release_has_no_note() -> None:
    assert profile_note(a_profile().record()) is None
    # One in memory is not sealed yet.
    assert not [note for note in compare(a_profile(), a_profile()).notes if "release" in note]


def test_budgets_without_a_hash_have_a_note(tmp_path: Path) -> None:
    (stored,) = BASELINES.rglob("*.budgets.json")
    assert budgets_note(stored) is None
    record = json.loads(stored.read_text())
    path = tmp_path / "a.budgets.json"
    for lacking, words in (
        (("hash",), ("whether they were edited (they have no hash); accept",)),
        (("hash", "lossless"), ("whether they were edited", "and lossless decoding (they have no")),
    ):
        kept = {name: value for name, value in record.items() if name not in lacking}
        path.write_text(json.dumps(kept))
        note = budgets_note(path)
        assert note is not None
        assert all(word in note for word in words), note
    path.write_text(to_file({name: record[name] for name in record if name != "lossless"}))
    assert budgets_note(path) is None  # an evaluation with --no-lossless
