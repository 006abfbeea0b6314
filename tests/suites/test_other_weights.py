"""What was made with a model is refused by other weights in the same folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.commands import Done, Run
from support.disk import contents

ON_TEXTS = ("--corpus", "texts.jsonl", "--seq-len", 16)

#: What is made with the first weights, in order.
MADE = {
    "run": ("analyze", *ON_TEXTS, "--output", "run"),
    "heads": ("fit-heads", *ON_TEXTS, "--layers", "2,3", "--output", "h.safetensors"),
    "calibration": ("calibrate", *ON_TEXTS, "--output", "calibrated"),
    "evaluation": ("evaluate", *ON_TEXTS, "--output", "evaluated"),
    "hard tokens": ("collect-hard", *ON_TEXTS, "--hard-ratio", 0.5, "--output", "hard"),
    "cascade": ("train", "--dataset", "hard", "--epochs", 1, "--output", "staged"),
}

#: What uses it, and what the refusal has to name.
USED = {
    "baseline": ("gate", *ON_TEXTS),
    "heads": ("evaluate", *ON_TEXTS, "--heads", "h.safetensors", "--layers", "2,3"),
    "calibration": (
        "generate",
        "--prompt",
        "Number",
        "--calibration",
        "calibrated/calibration.json",
        "--hard-ratio",
        0.5,
    ),
    "evaluation": ("search-exit", "evaluated", *ON_TEXTS[:2], "--measure", "--agreement", 0.3),
    "hard tokens": ("train", "--dataset", "hard", "--epochs", 1, "--output", "again"),
    "cascade": ("generate", "--prompt", "Number", "--cascade", "staged"),
    "evaluation of the cascade": ("evaluate", *ON_TEXTS, "--cascade", "staged"),
}


def test_what_was_made_with_other_weights_of_the_same_folder_is_refused(
    run: Run, here: Path, models: Path
) -> None:
    shutil.copytree(models / "tiny", here / "model")

    def with_model(arguments: tuple[object, ...]) -> Done:
        name, *rest = arguments
        return run(name, *([] if "--cascade" in rest else ["--model", "model"]), *rest)

    for arguments in MADE.values():
        done = with_model(arguments)
        assert done.status == 0, done.err
    assert run("accept", "run").status == 0
    for arguments in USED.values():
        assert with_model((*arguments, "--quiet")).status == 0, arguments

    weights = load_file(here / "model/model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, here / "model/model.safetensors", {"format": "pt"})
    shutil.rmtree(here / "again")
    before = contents(here)
    for what, arguments in USED.items():
        done = with_model(arguments)
        assert done.status == 2, (what, done)
        said = done.out + done.err
        assert "weights_hash" in said, (what, said)
        assert said.count("sha256:") >= 2, (what, said)
    assert contents(here) == before


def test_an_unfinished_dataset_of_other_weights_is_not_resumed(
    run: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "tiny", here / "model")
    collect = ("collect-hard", "--model", "model", *ON_TEXTS, "--hard-ratio", 0.5)

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cascade.stages.hard_tokens.collecting.complete", stop)
        assert run(*collect, "--output", "hard").status == 130
    shutil.copy(models / "other/model.safetensors", here / "model")
    done = run(*collect, "--output", "hard")
    assert done.status == 2
    assert "unfinished dataset with other arguments (model, weights_hash:" in done.err
