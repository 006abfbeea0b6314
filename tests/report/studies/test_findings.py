"""Tests of the page of findings."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import Done, Run
from support.findings_texts import with_todays_texts
from support.paths import DOCS

from cascade.core.records import to_file
from cascade.core.schema import from_plain, to_plain
from cascade.report.studies.findings import (
    FINDINGS,
    Finding,
    FindingsRecords,
    findings_markdown,
    findings_pictures,
    read_findings,
)
from cascade.studies.explanations.records import FinalNormExplanation, LayerExplanation

#: The module, which the command of the same name hides in its package.
command = importlib.import_module("cascade.cli.commands.explain")

FOLDER = DOCS / "findings"


@pytest.fixture(scope="module")
def records() -> FindingsRecords:
    return read_findings(FOLDER)


@pytest.fixture(scope="module")
def page(records: FindingsRecords) -> str:
    return findings_markdown(records, pictures="findings")


def page_of(records: FindingsRecords, **changes: Any) -> str:
    """Return the page of some records, with other ones in the place of those of these names."""
    return findings_markdown(replace(records, **changes), pictures="findings")


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.stem)
def test_texts_of_the_stored_records_are_those_that_the_code_writes(
    finding: Finding, records: FindingsRecords, request: pytest.FixtureRequest
) -> None:
    path = FOLDER / f"{finding.stem}.json"
    written = to_file(with_todays_texts(records)[finding.stem])
    if request.config.getoption("--force-regen", default=False):
        path.write_text(written, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == written, (
        f"{path.name} holds texts that the code no longer writes; run `pytest "
        "tests/report/studies/test_findings.py --force-regen`, then `cascade findings`"
    )


def test_the_stored_page_equals_the_page_of_its_records(page: str) -> None:
    assert page == (DOCS / "findings.md").read_text(encoding="utf-8"), (
        "docs/findings.md is not what its records give; run `cascade findings`"
    )


def test_the_stored_pictures_equal_those_of_the_records(records: FindingsRecords) -> None:
    pictures = findings_pictures(records)
    for picture in pictures:
        assert (FOLDER / picture.file).read_text(encoding="utf-8") == picture.svg, picture.file
    names = {picture.file for picture in pictures}
    assert {path.name for path in FOLDER.glob("*.svg")} == names, "none is left over"
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    assert all(f"(findings/{name})" in page for name in names)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.stem)
def test_every_finding_names_its_command(finding: Finding, page: str) -> None:
    assert f"## {finding.heading}" in page
    line = json.loads((FOLDER / f"{finding.stem}.json").read_text())["provenance"]["command"]
    assert line.startswith("cascade ")
    assert f"```bash\n{line}\n```" in page


def test_the_pages_numbers_come_from_the_records(records: FindingsRecords) -> None:
    plain = to_plain(records.explanation)
    row = next(row for row in plain["ablations"] if row["ablation"] == "layer_skipped")
    row["perplexity_ratio"] = 7.654321
    page = page_of(records, explanation=from_plain(plain, LayerExplanation))
    assert "7.654" in page
    assert "7.65 x" in page


_ONE_ANSWER = "Both answers have the same origin"


def test_layer_and_norm_are_one_answer_where_they_share_a_dimension(page: str) -> None:
    assert _ONE_ANSWER in page


@pytest.mark.parametrize(
    "changes",
    [
        {"sides": [{"dimensions": [{"dimension": 999, "energy": 0.7}]}]},
        {"verdict": {"carried_by": ["attention"]}},
    ],
    ids=["another dimension", "dimensions are no cause"],
)
def test_layer_and_norm_are_two_answers_for_other_explanations(
    changes: dict[str, Any], records: FindingsRecords
) -> None:
    plain = to_plain(records.explanation)
    plain["sides"][0] |= changes.get("sides", [{}])[0]
    plain["verdict"] |= changes.get("verdict", {})
    explanation = from_plain(plain, LayerExplanation)
    assert _ONE_ANSWER not in page_of(records, explanation=explanation)


def test_layer_and_norm_are_two_answers_for_another_norm(records: FindingsRecords) -> None:
    plain = to_plain(records.final_norm)
    plain["provenance"]["model"]["weights_hash"] = "another"
    other = from_plain(plain, FinalNormExplanation)
    assert _ONE_ANSWER not in page_of(records, final_norm=other)
    plain = to_plain(records.final_norm)
    written = {row.dimension for row in records.explanation.sides[0].dimensions}
    for row in plain["dimensions"]:
        if row["dimension"] in written:
            row["weight"] = 1.0
    positive = from_plain(plain, FinalNormExplanation)
    assert _ONE_ANSWER not in page_of(records, final_norm=positive)


def test_limits_of_the_norm_name_other_text_only_for_the_same_model(
    page: str, records: FindingsRecords
) -> None:
    words = "the similarity varies with the text"
    assert words in page
    plain = to_plain(records.final_norm)
    plain["provenance"]["model"]["weights_hash"] = "another"
    assert words not in page_of(records, final_norm=from_plain(plain, FinalNormExplanation))


def test_the_command_draws_the_page_from_its_folder(run: Run, here: Path) -> None:
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
        (("--corpus", "texts.jsonl"), "--corpus and --heads need --measure"),
        (("--measure",), "expected at least one --corpus"),
        (("page", "--measure", "--corpus", "texts.jsonl"), "expected a page such as"),
        (("absent.md",), "explanation.json is missing"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
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
    for finding in FINDINGS:
        assert (here / "page" / f"{finding.stem}.json").exists()
        assert f"## {finding.heading}" in page


def test_a_failing_command_ends_the_measuring(
    run: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "status_of", lambda line: 2)
    done = run("findings", "page.md", "--measure", "--corpus", "texts.jsonl")
    assert done.status == 2
    assert not (here / "page.md").exists()


def test_an_interrupted_command_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
