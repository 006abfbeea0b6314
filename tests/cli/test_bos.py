"""`--bos`: what text was read with is shown, recorded, and used again."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Run, check_refusal, read_record
from support.tiny_models import tiny_bos_tokenizer, tiny_model

GIVEN = ("--model", "begun", "--corpus", "texts.jsonl", "--seq-len", 16)


@pytest.fixture
def begun(here: Path) -> Path:
    """A checkpoint whose tokenizer begins every text with BOS."""
    tiny_model("llama", vocab_size=98).save_pretrained(here / "begun")
    tiny_bos_tokenizer().save_pretrained(here / "begun")
    return here / "begun"


def test_the_gate_reads_text_as_its_baseline_did(run: Run, begun: Path) -> None:
    done = run("analyze", *GIVEN, "--bos", "no", "--output", "run")
    assert "sequences x 16, without BOS" in done.out, done.err
    assert read_record("run/profile.json")["provenance"]["corpus"]["bos"] == "no"
    assert run("accept", "run").status == 0
    assert run("gate", *GIVEN).status == 0
    other = run("gate", *GIVEN, "--bos", "yes")
    assert other.status == 2
    assert "the baseline's corpus was read without BOS, this one with BOS" in other.out
    assert "x 16, with BOS" in run("analyze", *GIVEN).out
    check_refusal(run("analyze", *GIVEN, "--bos", "maybe"), ["--bos", "auto, yes or no"])


def test_a_prompt_begins_as_the_text_that_thresholds_were_fitted_on(run: Run, begun: Path) -> None:
    done = run(
        "calibrate", *GIVEN, "--layer", 2, "--hard-ratio", 0.5, "--bos", "no", "--output", "c"
    )
    assert done.status == 0, done.err
    given = ("generate", "--model", "begun", "--prompt", "Number 7", "--max-new-tokens", 2)
    calibrated = (*given, "--calibration", "c/calibration.json")
    assert "without BOS" in run(*calibrated).out
    check_refusal(
        run(*calibrated, "--bos", "yes"),
        ["the exits were fitted on text without BOS", "is read with it; use --bos no, or fit them"],
    )
    assert "begins with BOS" in run(*given).out
