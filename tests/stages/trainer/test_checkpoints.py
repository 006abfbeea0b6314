"""Test checkpoints: a resumed training run ends with the same stage, others are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from support.disk import largest_file
from support.reference_early_exit import (
    one_line,
)
from support.tiny_stages import (
    SHORT,
    Noted,
    StageStopped,
    StoppingAt,
    a_reader,
)

from cascade.core.errors import (
    TrainingError,
)
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.trainer.checkpoints import can_resume
from cascade.stages.training import Training, train_stage


@pytest.mark.parametrize("share", [0.35, 0.7, 0.95])
def test_a_resumed_training_run_equals_an_uninterrupted_one(
    share: float, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    with pytest.raises(StageStopped):
        train_stage(
            a_reader(), tokens, SHORT, tmp_path, progress=StoppingAt(int(trained.steps * share))
        )
    noted = Noted()
    done = train_stage(
        a_reader(),
        tokens,
        SHORT,
        tmp_path,
        resume=True,
        progress=noted,
    )
    ((_, before),) = noted.starts
    assert before > 0, "training did not resume"
    assert done.evaluations == trained.evaluations
    assert done.chosen == trained.chosen
    assert done.stage.fingerprint() == trained.stage.fingerprint()
    assert done.stage.provenance == trained.stage.provenance


def test_resuming_a_finished_training_run_changes_nothing(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    train_stage(a_reader(), tokens, SHORT, tmp_path)
    done = train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert (done.evaluations, done.chosen) == (trained.evaluations, trained.chosen)
    assert done.stage.fingerprint() == trained.stage.fingerprint()


def stopped(tokens: HardTokens, folder: Path, trained: Training) -> Path:
    """Interrupt a training run and return its last checkpoint."""
    with pytest.raises(StageStopped):
        train_stage(
            a_reader(), tokens, SHORT, folder, progress=StoppingAt(int(trained.steps * 0.7))
        )
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_an_incomplete_checkpoint_gives_a_one_line_error(
    name: str, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    last = stopped(tokens, tmp_path, trained)
    path = last / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrainingError, match="incomplete") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert str(last) in one_line(caught)
    shutil.rmtree(last)  # as the message says
    done = train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert done.stage.fingerprint() == trained.stage.fingerprint()


@pytest.mark.parametrize("name", ["model.safetensors", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_missing_file_gives_a_one_line_error(
    name: str, trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    last = stopped(tokens, tmp_path, trained)
    (last / name).unlink()
    with pytest.raises(TrainingError) as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert str(last) in one_line(caught)


def test_resuming_removes_checkpoints_that_were_never_finished(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    stopped(tokens, tmp_path, trained)
    torn = tmp_path / f"checkpoint-{trained.steps}"
    torn.mkdir()
    (torn / ".tmpuhZ88y").write_text("of a killed process")
    done = train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert done.stage.fingerprint() == trained.stage.fingerprint()
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_training_on_a_full_disk_names_the_last_good_checkpoint_and_goes_on_from_it(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    last = stopped(tokens, tmp_path, trained)
    step = int(last.name.partition("-")[2])
    with largest_file(2000), pytest.raises(TrainingError) as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert re.fullmatch(
        rf"cannot write the checkpoint of step \d+ \(.+\); the last good checkpoint is {last} "
        rf"\(step {step}\); free some space and go on with --resume",
        one_line(caught),
    )
    assert [path.name for path in sorted(tmp_path.glob("checkpoint-*"))][-1] == last.name
    done = train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert done.stage.fingerprint() == trained.stage.fingerprint()


def test_checkpoints_of_another_configuration_are_refused(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    stopped(tokens, tmp_path, trained)
    changes: list[dict[str, Any]] = [
        {"additional_layers": 1},
        {"learning_rate": 1e-3},
        {"routing": "all"},
        {"epochs": 3},
    ]
    for change in changes:
        config = structs.replace(SHORT, **change)
        (name,) = change
        with pytest.raises(TrainingError, match=rf"another configuration \({name}: ") as caught:
            train_stage(a_reader(), tokens, config, tmp_path, resume=True)
        one_line(caught)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(TrainingError, match="torn or edited") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    one_line(caught)


def test_a_new_training_run_does_not_resume_from_old_checkpoints(
    trained: Training, tokens: HardTokens, tmp_path: Path
) -> None:
    stopped(tokens, tmp_path, trained)
    assert can_resume(tmp_path)
    other = structs.replace(SHORT, seed=1)
    with pytest.raises(StageStopped):
        train_stage(a_reader(), tokens, other, tmp_path, progress=StoppingAt(2))
    assert not can_resume(tmp_path)
    with pytest.raises(TrainingError, match=r"no checkpoint in .* to resume from"):
        train_stage(a_reader(), tokens, other, tmp_path, resume=True)


def test_resuming_without_a_checkpoint_gives_a_one_line_error(
    tokens: HardTokens, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"no checkpoint in .* to resume from") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path / "none", resume=True)
    one_line(caught)
