"""`cascade accept`: a reviewed run becomes a baseline."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.commands import (
    Run,
    check_refusal,
    read_profile,
)
from support.disk import contents, largest_file

from cascade.core.run_folder import RunFolder

if TYPE_CHECKING:
    pass


def test_accept_stores_a_run_and_reports_the_comparison_the_next_time(
    analyze: Run, run: Run, here: Path, models: Path
) -> None:
    assert analyze("--output", "report").status == 0
    done = run("accept", "report")
    assert done.status == 0
    assert done.out.splitlines() == [
        "Wrote baselines/tiny/texts.saturation.json, texts.saturation.npz and "
        "texts.saturation.parquet; review and commit all of them"
    ]
    stored = here / "baselines/tiny"
    assert (stored / "texts.saturation.json").read_text() == (
        here / "report/profile.json"
    ).read_text()
    assert sorted(os.listdir(stored)) == [
        "texts.saturation.json",
        "texts.saturation.npz",
        "texts.saturation.parquet",
    ]
    again = run("accept", "report")
    assert again.status == 0
    assert "Compared with the baseline that it replaces:\nPASS" in again.out


def test_accept_reports_differences_from_the_previous_baseline(
    analyze: Run, run: Run, models: Path
) -> None:
    shutil.copytree(models / "tiny", "mine/tiny")
    analyze("--model", "mine/tiny", "--output", "report")
    run("accept", "report", "--baselines", "stored")
    shutil.copytree(models / "other", "mine/tiny", dirs_exist_ok=True)
    analyze("--model", "mine/tiny", "--output", "other")
    done = run("accept", "other", "--baselines", "stored")
    assert done.status == 0
    # What differs is noted, and the numbers are compared all the same.
    assert "Compared with the baseline that it replaces:\nFAIL" in done.out
    assert "model.weights_hash differs: expected sha256:" in " ".join(done.out.split())


def test_accept_replaces_the_baseline_of_another_model_only_on_request(
    analyze: Run, run: Run, models: Path, here: Path
) -> None:
    for name in ("tiny", "other"):
        shutil.copytree(models / name, f"{name}-runs/tiny")
        analyze("--model", f"{name}-runs/tiny", "--output", name)
    run("accept", "tiny")
    done = run("accept", "other")
    check_refusal(done, ["expected source tiny-runs/tiny, got other-runs/tiny", "--replace"])
    suggested = "tiny-other-runs/texts"
    assert f"`cascade accept RUN --name {suggested}`" in done.err
    assert run("accept", "other", "--name", suggested).status == 0
    for name in ("tiny", "other"):  # each is compared with its own
        corpus = ("--corpus", "texts.jsonl")
        assert run("gate", "--model", f"{name}-runs/tiny", *corpus).out.startswith("PASS")
    assert run("accept", "other", "--name", "tiny/texts", "--replace").status == 0
    check_refusal(run("accept", "other", "--name", "tiny"), ["--name MODEL/CORPUS", "got 'tiny'"])


def without_the_run(folder: Path) -> None:
    shutil.rmtree(folder)


def with_a_torn_profile(folder: Path) -> None:
    text = (folder / "profile.json").read_text()
    (folder / "profile.json").write_text(text[: len(text) // 2])


def with_a_torn_state(folder: Path) -> None:
    content = (folder / "profile.npz").read_bytes()
    (folder / "profile.npz").write_bytes(content[: len(content) // 2])


def with_an_edited_profile(folder: Path) -> None:
    profile = read_profile(folder)
    profile["layers"][2]["mean"] += 0.01
    (folder / "profile.json").write_text(json.dumps(profile))


def with_a_file_for_baselines(folder: Path) -> None:
    (folder.parent / "baselines").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (without_the_run, "no record report/profile.json; make one with `cascade analyze"),
        (with_a_torn_profile, "report/profile.json is torn or edited"),
        (with_a_torn_state, "report/profile.npz is torn"),
        (
            with_an_edited_profile,
            "report/profile.json was changed after it was written (expected hash",
        ),
        (with_a_file_for_baselines, "cannot write to baselines/tiny: "),
    ],
)
def test_accept_refuses_a_damaged_run(
    analyze: Run, run: Run, here: Path, damage: Callable[[Path], None], fragment: str
) -> None:
    assert analyze("--max-tokens", 320, "--output", "report").status == 0
    damage(here / "report")
    before = contents(here)
    check_refusal(run("accept", "report"), [fragment])
    assert contents(here) == before


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_accept_on_a_full_disk_keeps_the_previous_baseline(
    analyze: Run, run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    write = RunFolder.write

    def fills(self: RunFolder, name: str, content: str | bytes) -> None:
        with largest_file(100) if name.endswith(suffix) else contextlib.nullcontext():
            write(self, name, content)

    assert analyze("--max-tokens", 320, "--output", "report").status == 0
    assert run("accept", "report").status == 0
    assert analyze("--max-tokens", 640, "--output", "report", "--overwrite").status == 0
    before = contents(here)
    monkeypatch.setattr(RunFolder, "write", fills)
    done = run("accept", "report")
    check_refusal(done, [f"cannot write baselines/tiny/texts.saturation{suffix}: File too large"])
    assert contents(here) == before
