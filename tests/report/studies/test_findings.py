"""The page of findings is drawn from its records alone, and says what they say."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.commands import Done, Run
from support.paths import DOCS

from cascade.report.studies.findings import QUESTIONS, findings_markdown, findings_pictures

#: The room; the command of the same name hides it.
command = importlib.import_module("cascade.cli.commands.explain")

FOLDER = DOCS / "findings"


def stored() -> dict[str, Any]:
    return {
        question.stem: json.loads((FOLDER / f"{question.stem}.json").read_text(encoding="utf-8"))
        for question in QUESTIONS
    }


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return stored()


@pytest.fixture
def records(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


def test_the_stored_page_is_what_its_records_give(records: dict[str, Any]) -> None:
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    assert page == findings_markdown(records, pictures="findings"), (
        "docs/findings.md is not what its records give; run `cascade findings`"
    )


def test_the_stored_pictures_are_what_the_records_give(records: dict[str, Any]) -> None:
    pictures = findings_pictures(records)
    for picture in pictures:
        assert (FOLDER / picture.file).read_text(encoding="utf-8") == picture.svg, picture.file
    names = {picture.file for picture in pictures}
    assert {path.name for path in FOLDER.glob("*.svg")} == names, "none is left over"
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    assert all(f"(findings/{name})" in page for name in names)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.stem)
def test_every_answer_has_its_command_and_its_lead(question: Any, records: dict[str, Any]) -> None:
    page = findings_markdown(records, pictures="findings")
    assert f"## {question.heading}" in page
    line = records[question.stem]["provenance"]["command"]
    assert line.startswith("cascade ")
    assert f"```bash\n{line}\n```" in page


def test_a_number_of_a_record_is_a_number_of_the_page(records: dict[str, Any]) -> None:
    row = next(
        row for row in records["explanation"]["ablations"] if row["ablation"] == "layer_skipped"
    )
    row["perplexity_ratio"] = 7.654321
    page = findings_markdown(records, pictures="findings")
    assert "7.654" in page
    assert "7.65 x" in page


def test_one_number_behind_two_answers_is_said_only_where_it_is_one(
    records: dict[str, Any],
) -> None:
    words = "These two answers are one"
    side = records["explanation"]["sides"][0]
    assert words in findings_markdown(records, pictures="f")
    other = copy.deepcopy(records)
    other["explanation"]["sides"][0]["dimensions"] = [{"dimension": 999, "energy": 0.7}]
    assert words not in findings_markdown(other, pictures="f")
    other = copy.deepcopy(records)
    other["final-norm"]["provenance"]["model"]["weights_hash"] = "another"
    assert words not in findings_markdown(other, pictures="f")
    other = copy.deepcopy(records)
    other["explanation"]["verdict"]["carried_by"] = ["attention"]
    assert words not in findings_markdown(other, pictures="f")
    for row in records["final-norm"]["dimensions"]:
        if row["dimension"] in {dim["dimension"] for dim in side["dimensions"]}:
            row["weight"] = 1.0
    assert words not in findings_markdown(records, pictures="f")


def test_the_page_is_drawn_anew_from_its_folder(run: Run, here: Path) -> None:
    (here / "docs").mkdir()
    shutil.copytree(FOLDER, here / "docs/findings")
    done = run("findings")
    assert done.status == 0, done.err
    assert (here / "docs/findings.md").read_bytes() == (DOCS / "findings.md").read_bytes()
    (here / "docs/findings/models.json").unlink()
    before = (here / "docs/findings.md").read_bytes()
    done = run("findings")
    assert done.status == 2
    assert "models.json is missing" in done.err
    assert (here / "docs/findings.md").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--corpus", "texts.jsonl"), "give --measure as well"),
        (("--measure",), "expected at least one corpus beside the embedded one"),
        (("page", "--measure", "--corpus", "texts.jsonl"), "expected a page such as"),
        (("absent.md",), "explanation.json is missing"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    run: Run, here: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run("findings", *arguments)
    assert done.status == 2
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_measuring_runs_every_command_and_draws_the_page(
    run: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []

    def in_process(line: list[str]) -> int:
        lines.append(line[3:])
        done: Done = run(*line[3:], *_SMALL[line[3]])
        assert done.status == 0, done.err
        return done.status

    monkeypatch.setattr(command, "status_of", in_process)
    done = run(
        *("findings", "page.md", "--measure", "--model", models / "tiny", "--layer", 2),
        *("--corpus", "texts.jsonl"),
    )
    assert done.status == 0, done.err
    assert [line[0] for line in lines] == [
        "explain",
        "explain",
        "compare-corpora",
        "compare-models",
        "search-exit",
    ]
    assert lines[1][1:3] == ["--layer", "4+norm"]
    page = (here / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Findings")
    for question in QUESTIONS:
        assert (here / "page" / f"{question.stem}.json").exists()
        assert f"## {question.heading}" in page


def test_a_command_that_fails_ends_the_measuring(
    run: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "status_of", lambda line: 2)
    done = run("findings", "page.md", "--measure", "--corpus", "texts.jsonl")
    assert done.status == 2
    assert not (here / "page.md").exists()


def test_a_command_whose_wait_is_broken_off_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    pathlib.Path('tidied').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    wait = subprocess.Popen.wait

    def broken_off(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess.Popen, "wait", broken_off)
    with pytest.raises(KeyboardInterrupt):
        command.status_of([sys.executable, "-c", script])
    assert (tmp_path / "tidied").exists()


#: What keeps the commands short, on a model of 64 positions.
_TEXT = ("--seq-len", "16", "--max-tokens", "512")
_SMALL: dict[str, tuple[str, ...]] = {
    "explain": _TEXT,
    "compare-corpora": _TEXT,
    "compare-models": _TEXT,
    "search-exit": _TEXT,
}
