"""A model with recurrent layers: measured and gated; commands that need exits refuse it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.commands import Run, check_refusal
from support.tiny_models import save_checkpoint

COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16)


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("kinds") / "lfm2", "lfm2")


def test_recurrent_layers_are_analyzed_accepted_and_gated(
    run: Run, analyze: Run, lfm2: Path, here: Path
) -> None:
    done = analyze("--model", lfm2, "--output", "run")
    assert done.status == 0, done.err
    assert "lfm2, 4 decoder layers" in done.out
    done = run("accept", "run", "--baselines", "stored")
    assert done.status == 0, done.err
    given = ("--corpus", "texts.jsonl", "--seq-len", 32)
    done = run("gate", "--model", lfm2, *given, "--baselines", "stored")
    assert done.status == 0, done.err


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "Number 7"),
        ("calibrate", *COMMON, "--output", "out"),
        ("evaluate", *COMMON, "--output", "out"),
        ("search-exit", *COMMON, "--output", "out"),
        ("fit-heads", *COMMON, "--layers", 2, "--output", "heads.safetensors"),
        ("collect-hard", *COMMON, "--hard-ratio", 0.5, "--output", "out"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_need_exits_name_the_recurrent_layer(
    command: tuple[str, ...], run: Run, lfm2: Path, here: Path
) -> None:
    before = sorted(os.listdir(here))
    done = run(command[0], "--model", lfm2, *command[1:])
    check_refusal(
        done,
        [
            "tokens of lfm2 cannot exit early: decoder layer 1 (Lfm2DecoderLayer,"
            " conv) keeps a recurrent state instead of keys and values",
            "use `cascade analyze` and `cascade gate`",
        ],
    )
    assert sorted(os.listdir(here)) == before


def test_a_recurrent_layer_is_not_explained(run: Run, lfm2: Path, here: Path) -> None:
    done = run("explain", "--model", lfm2, *COMMON, "--layer", 1, "--output", "out")
    check_refusal(done, ["decoder layer 1 of lfm2 (Lfm2DecoderLayer) has no attention"])
