"""`cascade search-exit`, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run
from support.disk import contents

COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16)
FILES = {"exit-search.json", "exit-search.html", "exit-search-frontier.svg"}


@pytest.fixture
def search(run: Run, models: Path) -> Any:
    """Search with the tiny model on the corpus at hand."""
    return lambda *arguments: run(
        "search-exit", "--model", models / "tiny", "--layers", "2,3", *COMMON, *arguments
    )


@pytest.fixture
def evaluation(run: Run, models: Path, here: Path) -> Path:
    """The folder of an evaluation of the tiny model, for an agreement of 0.5."""
    command = ("evaluate", "--model", models / "tiny", "--layers", "2,3", "--agreement", 0.5)
    done = run(*command, *COMMON, "--output", "e")
    assert done.status == 0, done.err
    return Path("e")


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


def test_a_search_is_printed_and_stored(search: Any, here: Path) -> None:
    done = search("--agreement", 0.5, "--output", "out")
    assert done.status == 0, done.err
    record = read("out/exit-search.json")
    assert record["kind"] == "exit-search"
    assert record["settings"]["agreement"] == 0.5
    assert record["provenance"]["command"].startswith("cascade search-exit --model")
    assert {path.name for path in Path("out").iterdir()} == FILES
    assert " ".join(record["verdict"]["headline"].split()) in " ".join(done.out.split())
    assert "Wrote out/exit-search.html" in done.err
    # The table is whole, whatever its rule's name.
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_search_without_an_admissible_exit_draws_no_picture(search: Any, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "exit-search-frontier.svg").write_text("an older run's")
    # At the first layer the surest token is predicted otherwise.
    options = ("--agreement", 1, "--layers", 1, "--rule", "cosine")
    done = search(*options, "--output", "out", "--overwrite")
    assert done.status == 0, done.err
    assert read("out/exit-search.json")["points"] == []
    assert "There is nothing to draw" in done.out
    assert {path.name for path in Path("out").iterdir()} == FILES - {"exit-search-frontier.svg"}


def test_a_record_that_has_what_is_needed_loads_no_model(
    run: Run, evaluation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.models.loading.load", None)
    for agreement in (0.5, 0.3, 0.8):
        done = run("search-exit", evaluation, "--agreement", agreement)
        assert done.status == 0, done.err
        assert "From the record" in done.out


def test_a_record_is_searched_without_torch(here: Path, evaluation: Path) -> None:
    code = (
        "import sys; from cascade import cli\n"
        "sys.argv = ['cascade', 'search-exit', 'e']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_points_known_only_from_the_exit_table_are_run_on_request(
    run: Run, models: Path, evaluation: Path
) -> None:
    alone = run("search-exit", evaluation, "--agreement", 0.3, "--output", "alone")
    assert alone.status == 0, alone.err
    options = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--measure")
    done = run("search-exit", evaluation, "--agreement", 0.3, *options, "--output", "run")
    assert done.status == 0, done.err
    before, after = read("alone/exit-search.json"), read("run/exit-search.json")
    table = [row for row in before["points"] if row["confirmed_by"] == "table"]
    assert f"Measuring for e: {len(table)} thresholds are known from the table alone" in done.err
    assert {row["confirmed_by"] for row in after["points"]} == {"running"}
    assert [row["threshold"] for row in after["points"]] == [
        row["threshold"] for row in before["points"]
    ]


def test_an_older_record_is_completed_by_measuring_or_reports_what_it_lacks(
    run: Run, models: Path, evaluation: Path
) -> None:
    record = read("e/evaluation.json")
    del record["curves"], record["hash"]  # as earlier releases wrote it
    Path("e/evaluation.json").write_text(json.dumps(record))
    assert run("search-exit", evaluation, "--agreement", 0.5).status == 0
    refused = run("search-exit", evaluation, "--agreement", 0.6, "--no-measure")
    assert (refused.status, refused.out) == (2, "")
    assert "its thresholds are only valid for agreement 0.5; measure them" in refused.err
    options = ("--model", models / "tiny", "--corpus", "texts.jsonl")
    done = run("search-exit", evaluation, "--agreement", 0.6, *options)
    assert done.status == 0, done.err
    assert "Measuring for e: it has no exit curves" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "other"), "expected the weights_hash of the evaluation"),
        (("--corpus", "other.jsonl"), "expected the text to fit on of the evaluation"),
    ],
)
def test_a_record_of_another_model_or_corpus_is_refused(
    run: Run, models: Path, here: Path, evaluation: Path, options: tuple[str, str], words: str
) -> None:
    lines = [json.dumps({"text": f"Line {number} of other text."}) + "\n" for number in range(90)]
    Path("other.jsonl").write_text("".join(lines))
    arguments = {"--model": models / "tiny", "--corpus": "texts.jsonl"}
    arguments |= {options[0]: models / "other" if options[0] == "--model" else options[1]}
    before = contents(here)
    command = ("search-exit", evaluation, "--agreement", 0.3, "--measure", "--output", "out")
    done = run(*command, *(part for pair in arguments.items() for part in pair))
    assert (done.status, done.out) == (2, "")
    assert words in done.err
    assert contents(here) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--agreement", 1.5), "expected a share of agreement in 0..1, got 1.5"),
        (("--risk", 0), "expected a risk between 0 and 1, got 0"),
        (("--measure",), "--measure and --no-measure need records"),
        (("--layers", "9"), "expected an exit layer in 1..4, got 9"),
        (("--rule", "guess"), "guess"),
        (("--rule", "oracle"), "the rule oracle is a control"),
        (("--propagation", "ridge"), "ridge propagation needs fitted heads"),
        (("--heads", "none.safetensors"), "none.safetensors"),
        (("--heads", "a", "--heads", "b"), "expected one --heads, got several"),
        (("--max-tokens", 40), "expected at least 4 sequences to split"),
        (("none.json",), "no record none.json; make one with `cascade evaluate --output`"),
        (("texts.jsonl",), "texts.jsonl"),
    ],
)
def test_invalid_input_gives_a_one_line_error_and_writes_nothing(
    run: Run, models: Path, here: Path, arguments: tuple[object, ...], words: str
) -> None:
    before = contents(here)
    own = () if str(arguments[0]).endswith((".json", ".jsonl")) else COMMON
    options = ("--model", models / "tiny", *own)
    done = run("search-exit", *options, *arguments, "--output", "out")
    assert (done.status, done.out) == (2, "")
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_options_that_the_records_determine_and_repeated_records_are_refused(
    run: Run, evaluation: Path
) -> None:
    done = run("search-exit", evaluation, "--layers", "2", "--seed", 3)
    assert done.status == 2
    assert "leave out --layers, --seed" in done.err
    both = run("search-exit", evaluation, evaluation)
    assert both.status == 2
    assert re.search(r"both measured layer 2 with cosine", both.err)
