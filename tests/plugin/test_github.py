"""What a session prints on GitHub Actions: annotations at the baselines' files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plugin_project import BASELINE, broken, mended, ran

from cascade.plugin.github import in_repository


def annotations(done: pytest.RunResult) -> list[str]:
    return [line for line in done.outlines if line.startswith("::")]


def test_a_failure_is_annotated_only_on_github(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(guarded)
    assert annotations(ran(guarded, "-m", "saturation")) == []
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(guarded.path.parent))
    (line,) = annotations(ran(guarded, "-m", "saturation"))
    assert line.startswith(
        f"::error file={guarded.path.name}/{BASELINE},title=CASCADE%3A FAIL%3A tiny/texts::drift in"
    )
    assert "%0ALikely cause: one layer: layer 3: the weights of mlp.down_proj are" in line
    mended(guarded)
    assert annotations(ran(guarded, "-m", "saturation")) == []


def test_a_missing_baseline_is_annotated_at_its_path_in_the_repository(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (project.path / ".git").mkdir()
    (line,) = annotations(ran(project, "-m", "saturation"))
    assert line.startswith(f"::error file={BASELINE},title=CASCADE%3A no baseline::{BASELINE}; ")


def test_a_report_that_cannot_be_written_leaves_the_annotations(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(guarded)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(guarded.path))
    done = ran(guarded, "-m", "saturation")
    done.stdout.fnmatch_lines(["No report: cannot write *"])
    assert len(annotations(done)) == 1


def test_a_path_in_a_repository_is_relative_to_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    (tmp_path / "work/repository/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/repository/sub")
    assert in_repository(Path("a/b.json")) is None
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path / "work"))
    assert in_repository(Path("a/b.json")) == "repository/sub/a/b.json"
    (tmp_path / "work/repository/.git").write_text("gitdir: elsewhere")  # a worktree
    assert in_repository(Path("a/b.json")) == "sub/a/b.json"
    assert in_repository(Path("../c.json")) == "c.json"
    assert in_repository(tmp_path / "d.json") is None
