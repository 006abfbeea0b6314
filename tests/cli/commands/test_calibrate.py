"""`cascade calibrate`, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import Run, read_record
from support.disk import contents


def test_a_calibration_prints_its_table_and_generates(tiny: Run, here: Path) -> None:
    done = tiny("calibrate", "--layer", 3, "--transfer-to", "texts.jsonl", "--output", "c")
    assert done.status == 0, done.err
    assert "history[2] against history[3]" in done.out
    record = read_record("c/calibration.json")
    assert [row["hard_ratio"] for row in record["by_hard_ratio"]] == [0.3, 0.5, 0.7]
    # The same corpus again: what was reached is what is realized.
    for row, moved in zip(record["by_hard_ratio"], record["transfer"]["rows"], strict=True):
        assert moved["hard_ratio"] == row["reached"]
    done = tiny(
        "generate",
        *("--prompt", "Number 7", "--calibration", "c/calibration.json", "--hard-ratio", 0.5),
        *("--max-new-tokens", 6),
    )
    assert done.status == 0, done.err


def test_thresholds_are_fitted_on_held_out_text(run: Run, models: Path, here: Path) -> None:
    few = ("--model", models / "tiny", "--seq-len", 16, "--max-tokens", 320)
    assert run("fit-heads", *few, "--layers", 3, "--output", "h.safetensors").status == 0
    given = ("calibrate", *few, "--layer", 3, "--heads", "h.safetensors")
    done = run(*given, "--transfer-to", "embedded", "--output", "c")
    assert done.status == 0, done.err
    assert "the heads were fitted on this text" not in done.out
    assert "The same thresholds on the same text" in done.out
    record = read_record("c/calibration.json")
    assert record["provenance"]["heads"]["corpus"]["name"] == "embedded-train"
    assert record["provenance"]["corpus"]["name"] == "embedded-held-out"
    assert record["transfer"]["corpus"]["name"] == "embedded-held-out"
    done = run(*given, "--split", "train")
    assert "Warning" in done.out
    assert "the heads were fitted on this text" in done.out
    evaluated = run("evaluate", *few, "--heads", "h.safetensors", "--split", "train")
    assert "Warning" in evaluated.out


def test_the_transfer_corpus_has_its_own_split_and_column(
    tiny: Run, here: Path, tmp_path: Path
) -> None:
    Path("other.jsonl").write_text(
        "".join(
            json.dumps({"body": f"Text {n}, in a column of its own."}) + "\n" for n in range(40)
        )
    )
    onto = ("--transfer-to", "other.jsonl", "--transfer-text-column", "body")
    done = tiny("calibrate", "--layer", 3, *onto, "--output", "c")
    assert done.status == 0, done.err
    assert read_record("c/calibration.json")["transfer"]["corpus"]["name"] == "other"
    split = ("--transfer-to", "embedded", "--transfer-split", "train", "--max-tokens", 320)
    done = tiny("calibrate", "--layer", 3, *split, "--output", "d")
    assert read_record("d/calibration.json")["transfer"]["corpus"]["name"] == "embedded-train"
    done = tiny("calibrate", "--layer", 3, "--transfer-split", "train")
    assert done.status == 2
    assert "--transfer-to" in done.err


def test_the_default_layer_is_one_that_the_heads_have(tiny: Run, here: Path) -> None:
    for layers, expected in (("2", 2), ("1,3", 3), ("2,4", 2), ("4", 4)):
        path = f"{layers.replace(',', '-')}.safetensors"
        assert tiny("fit-heads", "--layers", layers, "--output", path).status == 0
        done = tiny("calibrate", "--heads", path, "--output", "c", "--overwrite")
        assert done.status == 0, done.err
        assert read_record("c/calibration.json")["exit_layer"] == expected


def test_too_few_sequences_certify_no_threshold_and_the_full_model_runs(
    tiny: Run, here: Path, models: Path
) -> None:
    done = tiny("calibrate", "--layer", 3, "--risk", 0.05, "--output", "c")
    assert done.status == 0, done.err
    assert "600" in done.out
    assert read_record("c/calibration.json")["certificate"]["threshold"] is None
    given = ("generate", "--prompt", "Number 7", "--no-compare", "--max-new-tokens", 6, "--json")
    texts = [
        json.loads(tiny(*given, *extra).out)["tokens"]
        for extra in ((), ("--calibration", "c/calibration.json"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", 0), "expected an exit layer in 1..4, got 0"),
        (("--layer", 9), "expected an exit layer in 1..4, got 9"),
        (("--rule", "cosinus"), "expected a rule among cosine"),
        (("--rule", "oracle"), "needs the full model's prediction and cannot be calibrated"),
        (("--rule", "fixed"), "the rule fixed lets every token exit and has no threshold"),
        (("--risk", 1e-155), "expected a risk of at least 1e-06, got 1e-155"),
        (("--seed", -1), "got '-1'"),
        (("--heads", "."), ". is a folder, expected the .safetensors file"),
        (("--hard-ratio", 1.5), "expected a hard ratio in 0..1, got 1.5"),
        (("--risk", 0), "expected a risk between 0 and 1, got 0"),
        (("--risk", 0.1, "--confidence", 1), "expected a confidence between 0 and 1, got 1"),
        (("--propagation", "thawed"), "expected a propagation among frozen, ridge, exact"),
        (("--heads", "none.safetensors"), "expected exit heads at none.safetensors"),
        (("--transfer-to", "none.jsonl"), "no corpus file none.jsonl"),
        (("--max-tokens", 16), "a larger --max-tokens"),
        (("--dtype", "int8"), "expected --dtype among"),
    ],
)
def test_calibrate_rejects_invalid_options_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("calibrate", "--output", "c", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_heads_or_calibrations_of_another_model_are_refused_with_both_names(
    tiny: Run, run: Run, models: Path, fitted: Path, here: Path
) -> None:
    shutil.copy(fitted, here / "h.safetensors")
    assert tiny("calibrate", "--layer", 3, "--heads", "h.safetensors", "--output", "c").status == 0
    given = ("--heads", "h.safetensors")
    prompt = ("generate", "--prompt", "Number 7", "--max-new-tokens", 4)
    saved = ("--calibration", "c/calibration.json", "--hard-ratio", 0.5)
    for model, options, what in (
        (models / "other", given, "these exit heads"),
        (models / "other", saved, "this calibration's thresholds"),
        (models / "tiny", (*given, "--dtype", "bfloat16"), "these exit heads"),
    ):
        done = run(*prompt, "--model", model, *options)
        assert done.status == 2, done.out
        assert f"{what} belong" in done.err
        named = ("float32", "bfloat16") if "bfloat16" in options else ("tiny", "other")
        assert all(name in done.err for name in named)
    done = run(*prompt, "--model", models / "tiny", *saved)
    assert "pass the same --heads" in done.err
