"""The history of a folder of reports: runs of `cascade analyze` and reports of a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as changed
from support.build_comparisons import a_session
from support.build_history import SMALL, drifted, write_profile
from support.build_profiles import a_profile, profile_of, provenance, similarities_of

from cascade.core.records import write_record
from cascade.gate.baselines import StoredProfile
from cascade.gate.drift import compare
from cascade.gate.history.comparing import HistoryConfig
from cascade.gate.history.history import read_history
from cascade.gate.history.records import VersionSeries
from cascade.gate.records import NamedComparison


def reports_of(folder: Path, **config: Any) -> VersionSeries:
    (found,) = read_history(folder, HistoryConfig(**config)).series
    return found


def names(series: VersionSeries) -> list[str]:
    return [version.name for version in series.versions]


def write_gate(path: Path, profile: StoredProfile, baseline: StoredProfile) -> None:
    """Write what a gate stores: a session with one comparison."""
    record = compare(profile, baseline).record()
    named = NamedComparison.of(record, name="tiny/words", path="baselines/tiny/words.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, changed(a_session(), comparisons=[named], verdict=record.verdict))


# --- Runs of `cascade analyze` ---------------------------------------------------------------


def test_runs_are_ordered_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    for k in (10, 2, 1):
        write_profile(tmp_path / f"run{k}/profile.json", drifted(k / 10))
    found = reports_of(tmp_path)
    assert names(found) == ["run1", "run2", "run10"]
    assert (found.name, found.source, found.order) == ("tiny/words", "profiles", "name")
    assert found.outcome == "no drift"


def test_small_steps_between_runs_show_as_slow_drift(tmp_path: Path) -> None:
    for k in range(4):
        write_profile(tmp_path / f"week/{k}/profile.json", drifted(-k))
    found = reports_of(tmp_path)
    assert names(found) == ["week/0", "week/1", "week/2", "week/3"]
    assert found.outcome == "slow drift"
    (slow,) = (drift for drift in found.drifts if drift.slow)
    assert (slow.layer, slow.up, slow.down) == ("2", 0, 3)
    assert slow.standardized == pytest.approx(-2.25, rel=1e-3)


def test_runs_of_several_models_and_corpora_are_several_series(tmp_path: Path) -> None:
    for k in range(2):
        write_profile(tmp_path / f"{k}/a/profile.json", drifted(k))
        other = drifted(k, model__name="large")
        write_profile(tmp_path / f"{k}/b/profile.json", other)
    found = read_history(tmp_path).series
    assert [(series.name, names(series)) for series in found] == [
        ("tiny/words", ["0/a", "1/a"]),
        ("large/words", ["0/b", "1/b"]),
    ]


def test_an_edited_run_is_marked_in_its_series_and_a_torn_one_beside_it(tmp_path: Path) -> None:
    for k in range(4):
        write_profile(tmp_path / f"{k}/profile.json", drifted(k / 10))
    for k, end in ((1, "}"), (2, "")):
        path = tmp_path / f"{k}/profile.json"
        text = path.read_text()
        path.write_text(
            text.replace('"exit_layer": "2"', '"exit_layer": "1"') if end else text[:90]
        )
    record = read_history(tmp_path)
    (found,) = record.series
    assert names(found) == ["0", "1", "3"]
    assert "was changed after it was written" in (found.versions[1].error or "")
    (unread,) = record.unread
    assert unread.startswith(f"{tmp_path}/2/profile.json: ")
    assert found.outcome == "no drift"


def test_files_of_other_programs_and_hidden_folders_are_left_out(tmp_path: Path) -> None:
    write_profile(tmp_path / "a/profile.json", drifted(0))
    write_profile(tmp_path / ".staging/profile.json", drifted(0))
    for name in ("a/report.json", "package.json"):
        (tmp_path / name).write_text('{"created": 1}')
    (tmp_path / "b.json").write_text("[]")
    record = read_history(tmp_path)
    assert [names(series) for series in record.series] == [["a"]]
    assert record.unread == []


def test_a_file_of_a_run_is_a_history_of_one_version(tmp_path: Path) -> None:
    write_profile(tmp_path / "a/profile.json", drifted(0))
    found = reports_of(tmp_path / "a/profile.json")
    assert (names(found), found.outcome) == (["profile.json"], "one version")


# --- Reports of a gate -----------------------------------------------------------------------


def test_reports_of_a_gate_show_their_distance_from_the_baseline(tmp_path: Path) -> None:
    for k in (1, 2, 3):
        write_gate(tmp_path / f"ci-{k}/report.json", drifted(k), drifted(0))
    found = reports_of(tmp_path)
    assert (found.source, found.first, found.last) == ("gate reports", None, 2)
    assert names(found) == ["ci-1", "ci-2", "ci-3"]
    totals = [version.first for version in found.versions]
    assert [total and total.verdict for total in totals] == ["PASS", "FAIL", "FAIL"]
    # The first report is one step from the baseline, which is no report of this folder.
    steps = [version.before for version in found.versions]
    assert [step and step.verdict for step in steps] == [None, "PASS", "PASS"]
    assert found.outcome == "slow drift"
    (slow,) = (drift for drift in found.drifts if drift.slow)
    assert (slow.layer, slow.up) == ("2", 3)
    assert slow.standardized == pytest.approx(2.25, rel=1e-3)
    assert slow.start == pytest.approx(drifted(0).content.layers[1].mean, abs=1e-6)


def test_one_report_beyond_the_tolerance_is_no_slow_drift(tmp_path: Path) -> None:
    write_gate(tmp_path / "1/report.json", drifted(3), drifted(0))
    found = reports_of(tmp_path)
    assert found.outcome == "drift"
    assert not any(drift.slow for drift in found.drifts)


def test_reports_over_different_sequences_are_not_compared_with_each_other(
    tmp_path: Path,
) -> None:
    write_gate(tmp_path / "1/report.json", drifted(1), drifted(0))
    fewer = profile_of(similarities_of(12)[:, :4])
    write_gate(tmp_path / "2/report.json", fewer, drifted(0))
    step = reports_of(tmp_path).versions[1].before
    assert step is not None
    assert (step.verdict, step.headline) == (
        "NOT COMPARABLE",
        "the two gates compared different sequences",
    )


def test_drift_is_not_called_slow_where_a_step_was_not_compared(tmp_path: Path) -> None:
    """A gate stops early where it fails, so that the step before is over other sequences."""
    write_gate(tmp_path / "1/report.json", drifted(1), drifted(0))
    values = similarities_of(12)[:, :4]
    values[1] += 9 * SMALL
    write_gate(tmp_path / "2/report.json", profile_of(values), drifted(0))
    assert reports_of(tmp_path).outcome == "drift"


def test_reports_of_another_dtype_are_not_comparable(tmp_path: Path) -> None:
    write_gate(tmp_path / "1/report.json", drifted(1), drifted(0))
    write_gate(tmp_path / "2/report.json", drifted(1, model__dtype="bfloat16"), drifted(0))
    found = reports_of(tmp_path)
    assert found.outcome == "not comparable"
    step = found.versions[1].before
    assert step is not None
    assert [each.name for each in step.mismatches] == ["model.dtype"]


def test_reports_on_another_baseline_begin_again(tmp_path: Path) -> None:
    write_gate(tmp_path / "1/report.json", drifted(1), drifted(0))
    about = provenance(versions={"torch": "2.14.0"})
    new = profile_of(similarities_of(12, seed=5), about=about)
    write_gate(tmp_path / "2/report.json", new, new)
    found = reports_of(tmp_path)
    assert found.outcome == "no drift"
    assert {(drift.up, drift.down) for drift in found.drifts} == {(0, 0)}


def test_an_edited_report_of_a_gate_is_named(tmp_path: Path) -> None:
    write_profile(tmp_path / "run/profile.json", a_profile())
    write_gate(tmp_path / "1/report.json", drifted(1), drifted(0))
    path = tmp_path / "1/report.json"
    path.write_text(path.read_text().replace('"verdict": "PASS"', '"verdict": "FAIL"'))
    record = read_history(tmp_path)
    assert [series.source for series in record.series] == ["profiles"]
    (unread,) = record.unread
    assert "1/report.json was changed after it was written" in unread


def test_last_applies_to_reports_too(tmp_path: Path) -> None:
    for k in range(4):
        write_gate(tmp_path / f"{k}/report.json", drifted(k), drifted(0))
    assert names(reports_of(tmp_path, last=2)) == ["2", "3"]
