"""`cascade explain` from end to end, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import Run

ARGUMENTS = ("--corpus", "texts.jsonl", "--seq-len", 16, "--max-tokens", 256)


def test_explaining_a_layer_writes_all_output_files(run: Run, here: Path, models: Path) -> None:
    done = run("explain", "--layer", 2, "--model", models / "tiny", *ARGUMENTS, "--output", "out")
    assert done.status == 0, done.err
    assert "Layer 2 of" in done.out
    assert "Wrote out/explanation.html" in done.err
    record = json.loads((here / "out/explanation.json").read_text())
    assert record["kind"] == "explanation"
    assert record["provenance"]["command"].startswith("cascade explain --layer 2")
    written = {path.name for path in (here / "out").iterdir()}
    assert {"explanation.html", "explanation-depth.svg", "explanation-tokens.svg"} <= written
    again = run("explain", "--layer", 2, "--model", models / "tiny", *ARGUMENTS, "--output", "out")
    assert again.status == 2
    assert "holds another run" in again.err


def test_explaining_the_final_norm_writes_all_output_files(
    run: Run, here: Path, models: Path
) -> None:
    done = run(
        "explain", "--layer", "4+norm", "--model", models / "tiny", *ARGUMENTS, "--output", "out"
    )
    assert done.status == 0, done.err
    assert "and its final norm" in done.out
    assert json.loads((here / "out/final-norm.json").read_text())["kind"] == "final-norm"
    assert (here / "out/final-norm.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layer", "dip"), "expected a row of a profile"),
        (("--layer", "9"), "expected --layer in 1..4, got 9"),
        (("--layer", "0"), "expected --layer in 1..4, got 0"),
        (("--layer", "3+norm"), "expected 4+norm, got 3+norm"),
        (("--layer", "4+norm", "--contrast", 2), "leave it out for a norm"),
        (("--layer", "2", "--contrast", 2), "expected --contrast to differ from layer 2"),
        (("--layer", "2", "--max-tokens", 32), "expected at least 4 sequences"),
        (("--layer", "2", "--corpus", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_invalid_options_give_a_one_line_error_and_write_nothing(
    run: Run, here: Path, models: Path, arguments: tuple[object, ...], words: str
) -> None:
    done = run("explain", "--model", models / "tiny", *ARGUMENTS, *arguments, "--output", "out")
    assert done.status == 2
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (here / "out").exists()
