"""`cascade export-drafter` on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Done, Run, check_refusal
from support.disk import contents

BRIEFLY = ("--tokens", 60, "--max-new-tokens", 6, "--batch-size", 4, "--steps", 1)


@pytest.fixture
def export(run: Run, models: Path) -> Callable[..., Done]:
    def export(*arguments: object) -> Done:
        return run("export-drafter", *arguments, "--model", models / "tiny")

    return export


@pytest.fixture
def train(run: Run, models: Path) -> Callable[..., Done]:
    def train(*arguments: object) -> Done:
        usual = ("--corpus", "texts.jsonl", *BRIEFLY, "--vocabulary", 50, "--output", "drafter")
        return run("train-drafter", "--model", models / "tiny", *usual, *arguments)

    return train


def test_a_drafter_is_trained_decodes_and_is_exported(
    train: Callable[..., Done], export: Callable[..., Done], run: Run, here: Path, models: Path
) -> None:
    done = train("--architecture", "eagle3", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["config"]["architecture"] == "eagle3"
    tiny = ("--model", models / "tiny")
    texts = [
        run("generate", *tiny, "--prompt", "Number", "--max-new-tokens", 4, *more).out
        for more in ((), ("--drafter", "drafter"))
    ]
    assert all(texts)
    done = export("drafter", "--output", "out")
    assert done.status == 0, done.err
    assert "Wrote out/config.json and out/model.safetensors (0." in done.out
    assert set(contents(Path("out"))) == {"config.json", "model.safetensors"}
    config = json.loads(Path("out/config.json").read_text())
    verifier = config["speculators_config"]["verifier"]["name_or_path"]
    assert verifier == str((models / "tiny").resolve())
    assert config["cascade"]["command"].startswith("cascade export-drafter drafter")


def test_a_drafter_of_the_usual_architecture_is_refused_before_the_model_is_read(
    train: Callable[..., Done], run: Run, here: Path
) -> None:
    assert train().status == 0
    done = run("export-drafter", "drafter", "--output", "out", "--model", "no-such-model")
    check_refusal(done, ["architecture eagle3, got cascade", "train-drafter --architecture eagle3"])
    assert not Path("out").exists()


def test_an_export_is_replaced_only_on_request(
    train: Callable[..., Done], export: Callable[..., Done], here: Path
) -> None:
    assert train("--architecture", "eagle3").status == 0
    assert export("drafter", "--output", "out").status == 0
    before = contents(Path("out"))
    check_refusal(
        export("drafter", "--output", "out"), ["holds an exported drafter", "--overwrite"]
    )
    assert contents(Path("out")) == before
    done = export("drafter", "--output", "out", "--overwrite", "--verifier", "owner/name")
    assert done.status == 0, done.err
    config = json.loads(Path("out/config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "owner/name"


def test_a_folder_without_a_drafter_is_refused(export: Callable[..., Done], here: Path) -> None:
    check_refusal(export("none", "--output", "out"), ["no record none/record.json"])


def test_an_unknown_architecture_is_refused(train: Callable[..., Done], here: Path) -> None:
    done = train("--architecture", "medusa")
    check_refusal(done, ["expected --architecture cascade or eagle3, got medusa"])
