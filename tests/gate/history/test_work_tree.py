"""The versions of a file in git: order, renames, copies, merges, incomplete repositories."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.build_history import BASELINE, Repository, drifted

from cascade.core.errors import RecordError
from cascade.gate.history.work_tree import WorkTree


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "project")


def subjects(repository: Repository, path: str = BASELINE) -> list[str]:
    return [file.commit.subject for file in WorkTree(repository.folder).versions(path, [".npz"])]


def test_versions_are_those_commits_that_changed_the_file_the_oldest_first(
    repository: Repository,
) -> None:
    numbers = [repository.accept(drifted(k), f"Step {k}") for k in range(3)]
    (repository.folder / "README").write_text("x")
    repository.commit("Other file")
    found = WorkTree(repository.folder / "baselines").versions(BASELINE, [".npz"])
    assert [file.commit.short for file in found] == numbers
    assert [file.commit.subject for file in found] == ["Step 0", "Step 1", "Step 2"]
    assert [file.commit.date[:10] for file in found] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    stored = (repository.folder / BASELINE).with_suffix(".npz").read_bytes()
    assert WorkTree(repository.folder).content(str(found[-1].companions[0])) == stored


def test_a_change_of_the_arrays_alone_is_a_version(repository: Repository) -> None:
    repository.accept(drifted(0), "Both")
    (repository.folder / BASELINE).with_suffix(".npz").write_bytes(b"torn")
    repository.commit("Arrays")
    assert subjects(repository) == ["Both", "Arrays"]


def test_a_renamed_baseline_is_followed(repository: Repository) -> None:
    repository.accept(drifted(0), "Old name")
    repository.git("mv", "baselines/tiny", "baselines/renamed")
    repository.commit("Rename")
    repository.accept(drifted(1), "New name", "baselines/renamed/words.saturation.json")
    found = WorkTree(repository.folder).versions(
        "baselines/renamed/words.saturation.json", [".npz"]
    )
    # Renaming changed nothing: it is no version of its own.
    assert [file.commit.subject for file in found] == ["Old name", "New name"]
    assert [file.path for file in found] == [BASELINE, "baselines/renamed/words.saturation.json"]


def test_the_history_of_another_baseline_is_not_that_of_its_copy(repository: Repository) -> None:
    """`git log --follow` takes a similar file for the origin of a new one."""
    other = "baselines/tiny/copy.saturation.json"
    repository.accept(drifted(0), "First baseline")
    repository.accept(drifted(1), "First baseline again")
    repository.accept(drifted(1), "Second baseline", other)
    repository.accept(drifted(2), "Second baseline again", other)
    assert subjects(repository, other) == ["Second baseline", "Second baseline again"]
    assert subjects(repository) == ["First baseline", "First baseline again"]


def test_a_merge_that_keeps_one_side_ends_with_that_side(repository: Repository) -> None:
    repository.accept(drifted(0), "Start")
    repository.git("checkout", "--quiet", "-b", "side")
    repository.accept(drifted(2), "Side")
    repository.git("checkout", "--quiet", "main")
    repository.accept(drifted(1), "Main")
    kept = (repository.folder / BASELINE).read_bytes()
    repository.git("merge", "--quiet", "--strategy=ours", "--message", "Merge", "side")
    tree = WorkTree(repository.folder)
    found = tree.versions(BASELINE, [".npz"])
    assert {"Start", "Side", "Main"} <= {file.commit.subject for file in found}
    assert tree.content(found[-1].blob) == kept


def test_a_merge_of_one_side_alone_is_no_version(repository: Repository) -> None:
    repository.accept(drifted(0), "Start")
    repository.git("checkout", "--quiet", "-b", "side")
    repository.accept(drifted(1), "Side")
    repository.git("checkout", "--quiet", "main")
    (repository.folder / "README").write_text("x")
    repository.commit("Other file")
    repository.git("merge", "--quiet", "--no-edit", "side")
    assert subjects(repository) == ["Start", "Side"]


def test_a_repository_without_commits_has_no_versions(repository: Repository) -> None:
    assert WorkTree(repository.folder).versions(BASELINE, [".npz"]) == []


def test_a_shallow_clone_says_so(repository: Repository, tmp_path: Path) -> None:
    for k in range(3):
        repository.accept(drifted(k), f"Step {k}")
    repository.git("clone", "--quiet", "--depth=1", repository.folder.as_uri(), f"{tmp_path}/c")
    assert not WorkTree(repository.folder).shallow
    assert WorkTree(tmp_path / "c").shallow
    assert len(WorkTree(tmp_path / "c").versions(BASELINE, [".npz"])) == 1


def test_files_are_those_that_git_knows_or_would_add(repository: Repository) -> None:
    repository.accept(drifted(0), "Known")
    for name in ("new", "ignored"):
        path = repository.folder / f"baselines/{name}/a.saturation.json"
        path.parent.mkdir()
        path.write_text("{}")
    (repository.folder / ".gitignore").write_text("ignored\n")
    (repository.folder / BASELINE).unlink()
    tree = WorkTree(repository.folder)
    found = tree.files(repository.folder / "baselines", ".saturation.json")
    assert found == ["baselines/new/a.saturation.json", BASELINE]


def test_a_folder_outside_of_git_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="to be in a git work tree, got: not a git repository"):
        WorkTree(tmp_path)


def test_a_machine_without_git_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecordError, match="expected the program git, got none in PATH; install"):
        WorkTree(tmp_path)


def test_settings_of_the_user_do_not_change_what_is_read(repository: Repository) -> None:
    repository.accept(drifted(0), "Größe \x1b[2J")
    for name in ("log.showSignature", "log.follow", "color.ui"):
        repository.git("config", name, "always" if name == "color.ui" else "true")
    assert subjects(repository) == ["Größe \\x1b[2J"]
