"""`cascade train`, and the commands that read what it wrote, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Done, Run

from cascade import Cascade, load

#: Enough to learn something, in a second.
SHORT = ("--corpus", "texts.jsonl", "--seq-len", 16)
BRIEFLY = ("--hard-ratio", 0.5, "--epochs", 1, "--lr", 3e-3)


@pytest.fixture
def train(run: Run, models: Path) -> Callable[..., Done]:
    def train(*arguments: object) -> Done:
        return run("train", "--model", models / "tiny", *SHORT, *arguments)

    return train


def test_a_trained_stage_can_be_evaluated_and_generates_text(
    train: Run, run: Run, here: Path, models: Path
) -> None:
    done = train(*BRIEFLY, "--controls", "--output", "staged")
    assert done.status == 0, done.err
    assert "Step 0: held-out perplexity 1.0000 x" in done.err
    assert "2 layers (copies), trained on hard tokens" in " ".join(done.out.split())
    assert "chosen" in done.out
    assert Cascade.from_pretrained("staged", load(str(models / "tiny"))).stack.num_layers == 6
    assert sorted(path.name for path in Path("staged/controls").iterdir()) == ["all", "random"]

    done = run("evaluate", "--cascade", "staged", *SHORT, "--output", "out")
    assert done.status == 0, done.err
    record = json.loads(Path("out/cascade-evaluation.json").read_text())
    assert [row["name"] for row in record["rows"]][:2] == ["base", "cascade"]
    assert len(record["comparisons"]) == 4
    for words in (record["verdict"]["stage"], record["verdict"]["routing"]):
        assert " ".join(words.split())[1:] in " ".join(done.out.split())
    assert "control: random / random" in done.out

    done = run("generate", "--cascade", "staged", "--prompt", "Number", "--max-new-tokens", 6)
    assert done.status == 0, done.err
    assert "cosine@3" in done.out


def test_a_second_stage_follows_the_first(train: Run, run: Run, here: Path) -> None:
    assert train(*BRIEFLY, "--output", "one").status == 0
    done = train(*BRIEFLY, "--hard-ratio", 0.25, "--after", "one", "--output", "two")
    assert done.status == 0, done.err
    assert "similarity at layer 6 below" in " ".join(done.out.split())
    done = run("evaluate", "--cascade", "two", *SHORT, "--output", "out")
    assert done.status == 0, done.err
    rows = json.loads(Path("out/cascade-evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["base", "stage 1", "cascade"]
    entered = [row["exits"][-1]["share"] for row in rows[1:]]
    assert 0 < entered[1] < entered[0] < 1
    assert [len(row["stage_rows"]) for row in rows] == [0, 1, 2]


def test_resumed_training_ends_with_the_same_stage(train: Run, here: Path) -> None:
    assert train(*BRIEFLY, "--output", "staged").status == 0
    first = Path("staged/stage-1.safetensors").read_bytes()
    collected = _changed_at("staged/hard-tokens")
    before, last = sorted(Path("staged/checkpoints/hard").glob("checkpoint-*"), key=_step)
    shutil.rmtree(last)
    done = train(*BRIEFLY, "--resume", "--output", "staged")
    assert done.status == 0, done.err
    assert Path("staged/stage-1.safetensors").read_bytes() == first
    assert f"Step {_step(last)}:" in done.err
    assert f"Step {_step(before)}:" not in done.err, "it began anew"
    assert _changed_at("staged/hard-tokens") == collected, "the model ran a second time"


def _changed_at(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def test_training_uses_an_existing_dataset_unchanged(
    train: Run, run: Run, here: Path, models: Path
) -> None:
    model = ("--model", models / "tiny")
    assert run("collect-hard", *model, *SHORT, "--threshold", 0.8, "--output", "hard").status == 0
    done = train("--dataset", "hard", "--epochs", 0.5, "--output", "staged")
    assert done.status == 0, done.err
    entry = json.loads(Path("staged/cascade_config.json").read_text())["stages"][0]["entry"]
    assert entry == {"layer": 3, "rule": "cosine", "threshold": 0.8, "heads": None}
    for wrong, words in (
        (("--threshold", 0.7), "collected for threshold 0.8, got 0.7"),
        (("--layer", 2), "collected for exit layer 3, got layer 2"),
        (("--model", models / "other"), "the hard tokens in hard belong to"),
    ):
        done = train("--dataset", "hard", *wrong, "--output", "another")
        assert done.status == 2
        assert words in done.err
        assert not Path("another").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give --threshold or --hard-ratio"),
        (("--hard-ratio", 1.5), "expected a hard ratio between 0 and 1, got 1.5"),
        (("--hard-ratio", 0.5, "--lr", 0), "expected learning_rate above 0"),
        (("--hard-ratio", 0.5, "--epochs", "nan"), "expected epochs above 0"),
        (("--hard-ratio", 0.5, "--start", "halfway"), "expected a start among copies, fresh"),
        (("--hard-ratio", 0.5, "--additional-layers", 5), "expected 1 to 4 layers"),
        (("--hard-ratio", 0.5, "--after", "nothing"), "nothing/cascade_config.json"),
        (("--hard-ratio", 0.5, "--after", "new"), "--after and --output are both new"),
        (("--dataset", "nothing", "--hard-ratio", 0.5), "leave --hard-ratio out"),
        (("--dataset", "nothing"), "nothing"),
        (("--threshold", -0.99), "no token of the train split is hard"),
        (("--hard-ratio", 0.5, "--layer", 9), "expected an exit layer in 1..4, got 9"),
    ],
)
def test_invalid_training_options_give_a_one_line_error(
    train: Run, here: Path, options: tuple[Any, ...], words: str
) -> None:
    done = train(*options, "--output", "new")
    assert done.status == 2
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("cascade: ")
    assert words in line
    assert not Path("new/cascade_config.json").exists()


def test_a_cascade_is_replaced_only_with_overwrite(train: Run, here: Path) -> None:
    Path("staged").mkdir()
    Path("staged/cascade_config.json").write_text("{}")
    done = train(*BRIEFLY, "--output", "staged")
    assert done.status == 2
    assert "replace it with --overwrite" in done.err
    assert train(*BRIEFLY, "--overwrite", "--output", "staged").status == 0


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_options_that_contradict_a_cascade_are_refused(run: Run, here: Path, command: str) -> None:
    prompt = ("--prompt", "a") if command == "generate" else ()
    option = ("--layer", 3) if command == "generate" else ("--layers", 3)
    done = run(command, "--cascade", "staged", *prompt, *option)
    assert done.status == 2
    assert f"leave out {option[0]}" in done.err
    done = run(command, "--cascade", "staged", *prompt)
    assert done.status == 2
    assert (
        "no record staged/cascade_config.json; make one with `cascade train --output`" in done.err
    )
