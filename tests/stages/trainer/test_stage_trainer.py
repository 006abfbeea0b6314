"""Test the Trainer of a stage: patience, progress, losses that are not finite, and logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from support.reference_early_exit import (
    one_line,
)
from support.tiny_stages import (
    SHORT,
    Noted,
    a_reader,
    moved,
)
from torch import Tensor

from cascade.core.errors import (
    TrainingError,
    UsageError,
)
from cascade.stages import training
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.stage import new_stage
from cascade.stages.trainer.stage_module import (
    StageModule,
)
from cascade.stages.training import Training, train_stage


def test_patience_stops_training_early(tokens: HardTokens, tmp_path: Path) -> None:
    config = structs.replace(
        SHORT, learning_rate=0.3, clipping=1e6, evaluations_per_epoch=4, epochs=20, patience=2
    )
    done = train_stage(a_reader(), tokens, config, tmp_path)
    best = min(done.evaluations[1:], key=lambda evaluation: evaluation.worst)
    assert done.evaluations.index(best) + 2 == len(done.evaluations) - 1
    assert done.steps < 20 * len(tokens.split("train")) / 8


def test_progress_is_called_for_every_step_and_evaluation(
    tokens: HardTokens, tmp_path: Path
) -> None:
    noted = Noted()
    config = structs.replace(SHORT, epochs=1)
    done = train_stage(a_reader(), tokens, config, tmp_path, progress=noted)
    assert noted.steps == list(range(1, done.steps + 1))
    assert [one.step for one in noted.evaluations] == [one.step for one in done.evaluations]
    assert noted.starts == [(done.steps, 0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_and_names_step_and_checkpoint(
    value: float,
    trained: Training,
    tokens: HardTokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = trained.steps - 1
    forward, calls = StageModule.forward, [0]

    def breaking(self: Any, **batch: Tensor) -> dict[str, Tensor]:
        calls[0] += 1
        made = forward(self, **batch)
        return {"loss": made["loss"] * value} if calls[0] == last else made

    monkeypatch.setattr(StageModule, "forward", breaking)
    with pytest.raises(TrainingError, match=f"the loss is {value:g} at step {last}") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path)
    text = one_line(caught)
    checkpoints = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints
    assert f"the last good checkpoint is {tmp_path}" in text
    assert f"(step {checkpoints[-1]})" in text
    monkeypatch.undo()
    done = train_stage(a_reader(), tokens, SHORT, tmp_path, resume=True)
    assert done.chosen.worst < 1, "the kept checkpoint is not usable"


def test_a_nan_loss_at_the_first_step_names_no_checkpoint(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StageModule, "forward", lambda self, **_: {"loss": torch.tensor(math.nan)})
    with pytest.raises(TrainingError, match="there is no checkpoint yet") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path)
    one_line(caught)


def test_a_huge_learning_rate_gives_a_one_line_error(tokens: HardTokens, tmp_path: Path) -> None:
    config = structs.replace(SHORT, learning_rate=1e30, clipping=1e30)
    with pytest.raises(TrainingError, match=r"not finite at step|the loss is") as caught:
        train_stage(a_reader(), tokens, config, tmp_path)
    assert "choose a smaller --lr" in one_line(caught)


def test_missing_tensorboard_gives_a_one_line_error(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="TensorBoard is not installed") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path / "c", tensorboard=tmp_path / "t")
    one_line(caught)


def test_tensorboard_gets_losses_and_evaluations(tokens: HardTokens, tmp_path: Path) -> None:
    config = structs.replace(SHORT, epochs=0.5)
    train_stage(a_reader(), tokens, config, tmp_path / "c", tensorboard=tmp_path / "t")
    (events,) = (tmp_path / "t").rglob("events.out.tfevents*")
    text = events.read_bytes()
    assert b"loss" in text
    assert b"eval/worst" in text


def test_training_refuses_a_stage_that_does_not_start_as_the_identity(
    tokens: HardTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_stage

    def shifted(*args: Any, **settings: Any) -> Any:
        return moved(made(*args, **settings), by=1e-3)

    monkeypatch.setattr(training, "new_stage", shifted)
    with pytest.raises(TrainingError, match="is not the identity on the held-out states") as caught:
        train_stage(a_reader(), tokens, SHORT, tmp_path)
    one_line(caught)
    assert not list(tmp_path.iterdir())
