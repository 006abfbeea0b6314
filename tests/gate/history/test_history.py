"""The history of baselines: slow drift, versions that are not comparable or cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.build_history import BASELINE, Repository, drifted, other_text, write_profile
from support.build_profiles import a_profile, old_arrays, plain_record, provenance

from cascade.core.errors import RecordError
from cascade.core.records import packed, to_json
from cascade.gate.drift import compare
from cascade.gate.history.comparing import HistoryConfig
from cascade.gate.history.history import read_history
from cascade.gate.history.records import HistoryVersion, LayerDrift, VersionSeries


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "project")


def history_of(repository: Repository, **config: object) -> VersionSeries:
    """Return the only series of a repository's baselines."""
    path = repository.folder / "baselines"
    (found,) = read_history(path, HistoryConfig(**config)).series  # type: ignore[arg-type]
    return found


def layer(series: VersionSeries, name: str) -> LayerDrift:
    (found,) = (drift for drift in series.drifts if drift.layer == name)
    return found


def steps(series: VersionSeries) -> list[str | None]:
    """Return the verdict of each version against the one before."""
    return [version.before and version.before.verdict for version in series.versions]


def totals(series: VersionSeries) -> list[str | None]:
    """Return the verdict of each version against the first comparable one."""
    return [version.first and version.first.verdict for version in series.versions]


def torn(version: HistoryVersion) -> str:
    assert version.error is not None
    assert (version.before, version.first, version.means) == (None, None, [])
    return version.error


# --- Drift -----------------------------------------------------------------------------------


def test_many_small_steps_that_each_pass_show_as_slow_drift(repository: Repository) -> None:
    profiles = [drifted(k) for k in range(5)]
    for place, profile in enumerate(profiles):
        repository.accept(profile, f"Step {place}")
    found = history_of(repository)
    # Each step passes the gate.
    assert steps(found) == [None, "PASS", "PASS", "PASS", "PASS"]
    for new, old in zip(profiles[1:], profiles, strict=False):
        assert compare(new, old).verdict == "PASS"
    assert found.outcome == "slow drift"
    assert totals(found) == [None, "PASS", "FAIL", "FAIL", "FAIL"]
    moved = layer(found, "2")
    # Four steps of 1.5e-6, against a tolerance of 2e-6.
    assert moved.change == pytest.approx(4 * 1.5e-6, rel=1e-3)
    assert moved.standardized == pytest.approx(3.0, rel=1e-3)
    assert moved.largest_step == pytest.approx(0.75, rel=1e-3)
    assert (moved.up, moved.down, moved.verdict, moved.slow) == (4, 0, "FAIL", True)
    assert [drift.layer for drift in found.drifts if drift.slow] == ["2"]


def test_steps_that_cancel_out_are_no_drift(repository: Repository) -> None:
    for k in (0, 1, 0, 1, 0):
        repository.accept(drifted(k), f"Step {k}")
    found = history_of(repository)
    assert found.outcome == "no drift"
    assert (layer(found, "2").up, layer(found, "2").down) == (2, 2)
    assert layer(found, "2").change == 0.0


def test_one_large_step_is_drift_but_not_slow(repository: Repository) -> None:
    for k in (0, 1, 5):
        repository.accept(drifted(k), f"Step {k}")
    found = history_of(repository)
    assert (found.outcome, steps(found)) == ("drift", [None, "PASS", "FAIL"])
    assert not layer(found, "2").slow
    assert layer(found, "2").largest_step == pytest.approx(3.0, rel=1e-3)


def test_cumulative_changes_are_those_of_the_gate(repository: Repository) -> None:
    for k in range(3):
        repository.accept(drifted(k), f"Step {k}")
    record = compare(drifted(2), drifted(0)).record()
    first = history_of(repository).versions[-1].first
    assert first is not None
    assert (first.version, first.verdict, first.headline) == (0, record.verdict, record.headline)
    means = {cell.layer: cell for cell in record.cells[::-1] if cell.statistic == "mean"}
    for change in first.layers:
        assert change.standardized == means[change.layer].standardized
        assert change.limit == means[change.layer].limit


def test_other_sequences_are_compared_with_margins(repository: Repository) -> None:
    for seed in (1, 2, 3):
        repository.accept(other_text(seed), f"Sample {seed}")
    found = history_of(repository)
    assert found.outcome == "no drift"
    assert {version.first.method for version in found.versions[1:] if version.first} == {
        "other sequences"
    }
    repository.accept(other_text(4, shift=-0.12), "Moved")
    found = history_of(repository)
    assert (found.outcome, steps(found)[-1]) == ("drift", "FAIL")
    assert (layer(found, "2").standardized or 0) < -1


# --- Not comparable --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name", "values"),
    [
        ({"model__dtype": "bfloat16"}, "model.dtype", ("float32", "bfloat16")),
        ({"tokenizer_hash": "u"}, "tokenizer_hash", ("t", "u")),
        ({"model__weights_hash": "v"}, "model.weights_hash", ("w", "v")),
        ({"corpus__seq_len": 32}, "corpus.seq_len", ("16", "32")),
    ],
)
def test_another_model_or_text_is_not_comparable_and_says_why(
    repository: Repository, change: dict[str, str], name: str, values: tuple[str, str]
) -> None:
    repository.accept(drifted(0), "Before")
    repository.accept(drifted(1, **change), "After")
    found = history_of(repository)
    assert (found.outcome, steps(found), found.drifts) == (
        "not comparable",
        [None, "NOT COMPARABLE"],
        [],
    )
    step = found.versions[1].before
    assert step is not None
    assert [(each.name, each.expected, each.obtained) for each in step.mismatches] == [
        (name, *values)
    ]
    assert step.layers == []
    assert history_of(repository, anyway=True).outcome == "no drift"


def test_another_corpus_is_not_comparable_although_its_means_could_be(
    repository: Repository,
) -> None:
    repository.accept(a_profile(40), "Words")
    other = other_text(1).content.provenance.corpus
    about = provenance(corpus__source="letters.jsonl", corpus__tokens=other.tokens)
    values = a_profile(40, about=about)
    prints = values.arrays()["sequence_fingerprint"]
    repository.accept(a_profile(40, seed=1, about=about, fingerprints=prints + 999), "Letters")
    step = history_of(repository).versions[1].before
    assert step is not None
    assert [each.name for each in step.mismatches] == ["corpus.source"]


def test_versions_around_a_mistake_are_compared_with_each_other(repository: Repository) -> None:
    repository.accept(drifted(0), "fp32")
    repository.accept(drifted(1), "fp32 again")
    repository.accept(drifted(1, model__dtype="bfloat16"), "bf16 by mistake")
    repository.accept(drifted(2), "Back to fp32")
    found = history_of(repository)
    last = found.versions[3]
    assert steps(found) == [None, "PASS", "NOT COMPARABLE", "NOT COMPARABLE"]
    assert last.first is not None
    assert last.resumed is not None
    assert (last.first.version, last.first.verdict) == (0, "FAIL")
    assert (last.resumed.version, last.resumed.verdict) == (1, "PASS")
    assert (found.outcome, layer(found, "2").up) == ("slow drift", 2)


# --- Versions that cannot be read ------------------------------------------------------------


def test_a_torn_version_is_marked_with_its_commit_and_the_others_are_compared(
    repository: Repository,
) -> None:
    repository.accept(drifted(0), "Good")
    path = repository.folder / BASELINE
    path.write_text(path.read_text()[:200])
    number = repository.commit("Torn")
    repository.accept(drifted(1), "Good again")
    found = history_of(repository)
    assert torn(found.versions[1]).startswith(f"{number}:{BASELINE} is torn or edited (")
    assert "/tmp" not in torn(found.versions[1])
    after = found.versions[2].before
    assert after is not None
    assert (after.version, after.verdict, found.outcome) == (0, "PASS", "no drift")


def test_a_version_of_a_newer_release_is_marked(repository: Repository) -> None:
    repository.accept(drifted(0), "Good")
    path = repository.folder / BASELINE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"schema": 99}))
    repository.commit("Newer")
    (good, newer) = history_of(repository).versions
    assert good.error is None
    assert "has schema 99, this release reads up to 3" in torn(newer)


def test_a_version_of_an_older_release_is_compared(repository: Repository) -> None:
    profile = drifted(0)
    record = plain_record(profile)
    for name in ("noise", "arrays_hash", "hash"):
        del record[name]
    path = repository.folder / BASELINE
    path.parent.mkdir(parents=True)
    path.write_text(to_json(record | {"schema": 1}))
    path.with_suffix(".npz").write_bytes(packed(old_arrays(profile)))
    repository.commit("Schema 1")
    repository.accept(drifted(1), "Schema 2")
    found = history_of(repository)
    assert (found.outcome, steps(found)) == ("no drift", [None, "PASS"])


def test_arrays_that_are_missing_or_in_git_lfs_are_marked(repository: Repository) -> None:
    repository.accept(drifted(0), "Good")
    arrays = (repository.folder / BASELINE).with_suffix(".npz")
    arrays.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    number = repository.commit("Pointer")
    arrays.unlink()
    repository.commit("Missing")
    _, pointer, missing = history_of(repository).versions
    assert f"words.saturation.npz is a Git LFS pointer in {number}" in torn(pointer)
    assert "no file " in torn(missing)
    assert missing.name in torn(missing)


def test_a_history_without_any_readable_version_is_refused(repository: Repository) -> None:
    repository.accept(drifted(0), "Good")
    repository.git("rm", "--quiet", "-r", "baselines")
    path = repository.folder / "baselines/tiny/torn.saturation.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    (repository.folder / "other").mkdir()
    shutil.move(path, repository.folder / "other")
    with pytest.raises(RecordError, match=r"no version of .*other can be read: .*torn or"):
        read_history(repository.folder / "other")


# --- The work tree ---------------------------------------------------------------------------


def test_the_uncommitted_version_is_read_if_it_differs(repository: Repository) -> None:
    repository.accept(drifted(0), "Start")
    assert [version.name for version in history_of(repository).versions[1:]] == []
    write_profile(repository.folder / BASELINE, drifted(5))
    last = history_of(repository).versions[-1]
    assert (last.name, last.commit, last.date) == ("uncommitted", None, None)
    assert last.before is not None
    assert last.before.verdict == "FAIL"


def test_other_line_ends_are_no_version(repository: Repository) -> None:
    repository.accept(drifted(0), "Start")
    path = repository.folder / BASELINE
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(history_of(repository).versions) == 1


def test_reading_changes_neither_the_work_tree_nor_the_repository(repository: Repository) -> None:
    for k in range(2):
        repository.accept(drifted(k), f"Step {k}")
    write_profile(repository.folder / BASELINE, drifted(3))

    def state() -> dict[Path, int]:
        files = (path for path in repository.folder.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    history_of(repository)
    assert state() == before


def test_a_baseline_that_was_removed_from_the_work_tree_has_a_history(
    repository: Repository,
) -> None:
    for k in range(2):
        repository.accept(drifted(k), f"Step {k}")
    shutil.rmtree(repository.folder / "baselines")
    (found,) = read_history(repository.folder / BASELINE).series
    assert len(found.versions) == 2
    assert found.notes == ["the file is not in the work tree"]


def test_a_shallow_clone_says_that_versions_are_missing(
    repository: Repository, tmp_path: Path
) -> None:
    for k in range(3):
        repository.accept(drifted(k), f"Step {k}")
    repository.git("clone", "--quiet", "--depth=1", repository.folder.as_uri(), f"{tmp_path}/c")
    (found,) = read_history(tmp_path / "c/baselines").series
    assert len(found.versions) == 1
    assert [note for note in found.notes if "git fetch --unshallow" in note]


def test_last_reads_the_newest_versions_only(repository: Repository) -> None:
    numbers = [repository.accept(drifted(k), f"Step {k}") for k in range(4)]
    found = history_of(repository, last=2)
    assert [version.name for version in found.versions] == numbers[2:]
    assert found.outcome == "no drift"


def test_a_single_version_has_nothing_to_compare_with(repository: Repository) -> None:
    repository.accept(drifted(0), "Start")
    assert (history_of(repository).outcome, history_of(repository).drifts) == ("one version", [])


def test_every_baseline_of_a_folder_has_its_own_series(repository: Repository) -> None:
    repository.accept(drifted(0), "One")
    repository.accept(drifted(0), "Two", "baselines/tiny/more.saturation.json")
    found = read_history(repository.folder / "baselines").series
    assert [series.name for series in found] == ["baselines/tiny/more.saturation.json", BASELINE]
    assert [len(series.versions) for series in found] == [1, 1]


def test_baselines_outside_of_git_are_refused(tmp_path: Path) -> None:
    write_profile(tmp_path / BASELINE, drifted(0))
    for path in (tmp_path / "baselines", tmp_path / BASELINE):
        with pytest.raises(RecordError, match="to be in a git work tree, got: not a git"):
            read_history(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "no file or folder .*nowhere; name a baseline"),
        ("nowhere.saturation.json", "no baseline .*, neither in the work tree nor in a commit"),
        (".", r"expected a baseline \(\*.saturation.json\) or a report .* got none"),
    ],
)
def test_a_path_without_baseline_and_report_is_refused(
    repository: Repository, name: str, reason: str
) -> None:
    with pytest.raises(RecordError, match=reason):
        read_history(repository.folder / name)
