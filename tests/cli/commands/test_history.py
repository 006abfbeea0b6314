"""`cascade history`: a baseline through its commits, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.build_history import BASELINE, Repository, drifted, write_profile
from support.commands import Run, check_refusal

from cascade.record_kinds import read_record


@pytest.fixture
def repository(here: Path) -> Repository:
    """Make the working folder a repository with a baseline that drifts slowly."""
    repository = Repository(here)
    for k in range(4):
        repository.accept(drifted(k), f"Accept {k}")
    return repository


def test_a_history_is_printed_and_ends_with_status_0_whatever_it_shows(
    repository: Repository, run: Run
) -> None:
    done = run("history", "baselines")
    assert (done.status, done.err) == (0, "")
    assert "SLOW DRIFT: small steps add up in layer 2" in done.out
    assert all(f"Accept {k}" in done.out for k in range(4))


def test_one_baseline_is_named_by_its_file(repository: Repository, run: Run) -> None:
    repository.accept(drifted(0), "Another", "baselines/tiny/more.saturation.json")
    done = run("history", BASELINE)
    assert "Accept 3" in done.out
    assert "Another" not in done.out


def test_a_path_from_another_folder_of_the_work_tree_is_found(
    repository: Repository, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("baselines/tiny")
    for path in ("..", ".", "words.saturation.json"):
        assert "SLOW DRIFT" in run("history", path).out


def test_output_writes_the_record_and_the_page(repository: Repository, run: Run) -> None:
    done = run("history", "baselines", "--output", "out")
    assert (done.status, done.err) == (0, "Wrote out/history.html\n")
    record = read_record("out/history.json", kind="history")
    assert record.series[0].outcome == "slow drift"  # type: ignore[attr-defined]
    page = Path("out/history.html").read_text()
    assert page.count("<svg ") == 3
    refused = run("history", "baselines", "--output", "out")
    assert refused.status == 2
    assert "holds another run" in refused.err
    assert run("history", "baselines", "--output", "out", "--overwrite").status == 0


def test_json_prints_the_record_that_output_writes(repository: Repository, run: Run) -> None:
    done = run("history", "baselines", "--json", "--output", "out")
    assert done.out == Path("out/history.json").read_text()
    assert json.loads(done.out)["kind"] == "history"
    assert run("history", "baselines", "--quiet").out == ""


def test_options_of_compare_apply(repository: Repository, run: Run) -> None:
    repository.accept(drifted(0, model__dtype="bfloat16"), "Another dtype")
    assert "NOT COMPARABLE" in run("history", "baselines").out
    assert "not comparable" not in run("history", "baselines", "--anyway").out
    refused = run("history", "baselines", "--margin", "-1")
    check_refusal(refused, ["expected a margin above 0"])
    short = run("history", "baselines", "--last", 2)
    assert "Accept 3" in short.out
    assert "Accept 2" not in short.out


def test_a_version_that_cannot_be_read_is_named_and_the_command_goes_on(
    repository: Repository, run: Run
) -> None:
    (repository.folder / BASELINE).write_text("{")
    number = repository.commit("Torn")
    repository.accept(drifted(4), "Mended")
    done = run("history", "baselines")
    assert (done.status, done.err) == (0, "")
    assert f"Not read {number} (2026-01-05): {number}:" in " ".join(done.out.split())
    assert "Mended" in done.out


def test_bad_input_is_refused_in_one_line(here: Path, run: Run) -> None:
    check_refusal(run("history", "nowhere"), ["no file or folder nowhere; name a baseline"])
    check_refusal(run("history", "."), ["expected a baseline (*.saturation.json) or a report"])
    write_profile(here / BASELINE, drifted(0))
    check_refusal(run("history", "baselines"), ["to be in a git work tree, got: not a git"])


def test_without_git_reports_are_read_and_baselines_refused(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(here / "runs/1/profile.json", drifted(0))
    write_profile(here / BASELINE, drifted(0))
    monkeypatch.setenv("PATH", str(here))
    assert "ONE VERSION" in run("history", "runs").out
    check_refusal(run("history", "baselines"), ["expected the program git, got none in PATH"])
