"""Checkpoints of a training run: what is needed to resume it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade.core.errors import TrainingError, first_line
from cascade.core.files import write_text
from cascade.stages.dataset import HardTokens
from cascade.stages.training_config import Recipe

#: In the folder of checkpoints: what they are of. Only the same request goes on from them.
_REQUEST = "training.json"


#: What a checkpoint has to hold for training to go on as if it had not stopped; of what is missing
#: the Trainer itself makes no more than a warning, or nothing.
_CHECKPOINT_FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield step and folder of each complete checkpoint."""
    for path in folder.glob("checkpoint-*"):
        number = path.name.partition("-")[2]
        # The Trainer writes its state last: without, the checkpoint was never finished.
        if number.isdigit() and (path / "trainer_state.json").is_file():
            yield int(number), path


def can_resume(folder: Path) -> bool:
    """Say whether a folder holds a checkpoint to go on from.

    Args:
        folder: Of `train_stage`.
    """
    return any(checkpoints(folder))


def request_of(tokens: HardTokens, recipe: Recipe, steps: int | None) -> dict[str, Any]:
    """Return what decides how a training goes, besides the code."""
    return dataclasses.asdict(recipe) | {
        "steps": steps,
        "tokens": tokens.record["request"],
        "threshold": tokens.threshold,
    }


def begin(folder: Path, request: dict[str, Any]) -> None:
    """Say what the checkpoints to come are of; those of an earlier training go."""
    for path in folder.glob("checkpoint-*"):
        if path.name.partition("-")[2].isdigit():
            shutil.rmtree(path)
    write_text(folder / _REQUEST, json.dumps(request, indent=1) + "\n")


def checkpoint_of(folder: Path, request: dict[str, Any]) -> Path:
    """Return the last checkpoint of a training, which has to be of the same request."""
    last = max(checkpoints(folder), default=None)
    if last is None:
        raise TrainingError(f"no checkpoint in {folder} to resume from; train without --resume")
    try:
        made = dict(json.loads((folder / _REQUEST).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{folder / _REQUEST} is missing, torn or edited ({first_line(error)}): what the "
            "checkpoints beside it are of is not known; train without --resume"
        ) from error
    differs = [name for name in request if made.get(name) != request[name]]
    if differs:
        name = differs[0]
        raise TrainingError(
            f"the checkpoints in {folder} are of another recipe ({name} {made.get(name)}, now "
            f"{request[name]}); go on with that one, or train without --resume"
        )
    missing = [name for name in _CHECKPOINT_FILES if not (last[1] / name).is_file()]
    if missing:
        raise TrainingError(
            f"the checkpoint {last[1]} is cut short ({missing[0]} is missing): remove it to go on "
            "from the one before, or train without --resume"
        )
    return last[1]
