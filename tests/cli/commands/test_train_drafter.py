"""`cascade train-drafter` on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Done, Run, check_refusal
from support.disk import contents

from cascade import load, load_drafter
from cascade.drafters.texts import shards
from cascade.drafters.training import NetworkTraining

#: Enough to draft something, in seconds.
BRIEFLY = ("--tokens", 300, "--max-new-tokens", 12, "--batch-size", 8, "--steps", 6)


@pytest.fixture
def train(run: Run, models: Path) -> Callable[..., Done]:
    def train(*arguments: object) -> Done:
        usual = ("--corpus", "texts.jsonl", *BRIEFLY, "--vocabulary", 50)
        return run("train-drafter", "--model", models / "tiny", *usual, *arguments)

    return train


def test_a_drafter_is_trained_and_its_worth_is_shown(train: Run, here: Path, models: Path) -> None:
    done = train("--output", "out")
    assert done.status == 0, done.err
    assert "Generating 300 tokens" in done.err
    assert "Step 0: " in done.err
    assert "tokens per pass on held-out text, accepted by position: " in done.err
    assert done.err.splitlines()[-1].startswith("Wrote out (0.0 MB")
    words = " ".join(done.out.split())
    assert "Drafter of tiny: 50 tokens, a copy of layer 4" in words
    assert "texts.jsonl: 32 prompts to train, 8 held out" in words
    assert "kept" in words
    assert "Draft " in words.partition("table and network")[2]
    drafter = load_drafter("out", load(str(models / "tiny")))
    assert drafter.record.provenance.command.startswith("cascade train-drafter --model")


def test_json_is_the_stored_record(train: Run, here: Path) -> None:
    done = train("--output", "out", "--json", "--quiet")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == json.loads(Path("out/record.json").read_text())


def test_several_corpora_give_prompts(train: Run, here: Path) -> None:
    Path("more.jsonl").write_text("".join(f'{{"body": "More {n}"}}\n' for n in range(10)))
    done = train("--corpus", "more.jsonl#body", "--output", "out", "--json")
    assert done.status == 0, done.err
    corpora = json.loads(done.out)["provenance"]["corpora"]
    assert [(one["source"], one["train"]) for one in corpora] == [
        ("texts.jsonl", 32),
        ("more.jsonl", 8),
    ]


def test_an_interruption_says_how_to_continue(
    train: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert train("--output", "whole").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", stop)
        done = train("--output", "out")
    assert done.status == 130
    assert "Stopped; out is kept: run the same command again to continue" in done.err
    with monkeypatch.context() as patch:
        patch.setattr(NetworkTraining, "_save", stop)
        done = train("--output", "out")
    assert done.status == 130
    assert "Stopped; out is kept: add --resume to continue the training" in done.err
    assert train("--output", "out").status == 0
    weights = "drafter.safetensors"
    assert contents(Path("out"))[weights] == contents(Path("whole"))[weights]


def test_a_drafter_that_is_there_is_replaced_only_on_request(train: Run, here: Path) -> None:
    assert train("--output", "out").status == 0
    before = contents(Path("out"))
    check_refusal(train("--output", "out"), ["out holds a drafter", "--overwrite"])
    assert contents(Path("out")) == before
    assert train("--output", "out", "--overwrite", "--seed", 1).status == 0
    assert contents(Path("out"))["drafter.safetensors"] != before["drafter.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--layer", 5), ["expected --layer in 1..4", "got 5"]),
        (("--corpus", "texts.jsonl#"), ["expected a corpus NAME", "fill in all parts"]),
        (("--corpus", "nowhere.jsonl"), ["no corpus file nowhere.jsonl"]),
        (("--vocabulary", 1), ["--vocabulary", "got '1'"]),
        (("--lr", 0), ["expected learning_rate above 0, got 0"]),
        (("--resume",), ["no checkpoint in out/checkpoints to resume from"]),
        (("--bos", "yes"), ["expected a tokenizer with a BOS token"]),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    train: Run, here: Path, arguments: tuple[object, ...], fragments: list[str]
) -> None:
    done = train("--output", "out", *arguments, "--quiet")
    check_refusal(done, fragments)
