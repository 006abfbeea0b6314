"""Checkpoints of a training run: what is needed to resume it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade.core.errors import TrainingError, first_line
from cascade.core.files import write_text
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.training_config import TrainingConfig

#: In the folder of checkpoints: the request that they are of.
_REQUEST = "training.json"


#: The files without which training cannot resume as if it had not stopped. The Trainer itself
#: gives a warning at most where one is missing.
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
    """Return whether a folder holds a checkpoint to resume from.

    Args:
        folder: The folder that `train_stage` was given.
    """
    return any(checkpoints(folder))


@dataclass(frozen=True)
class TrainingRequest(TrainingConfig):
    """Everything that decides the result of a training, except the code.

    It is stored with the checkpoints: only an equal request resumes from them.

    Attributes:
        steps: Exactly so many steps; as many as the epochs have where None.
        tokens: The hash of the request that the hard tokens were collected by.
        threshold: A token whose similarity is below it is hard.
    """

    steps: int | None = None
    tokens: str = ""
    threshold: float = 0.0

    @classmethod
    def of(cls, tokens: HardTokens, config: TrainingConfig, steps: int | None) -> TrainingRequest:
        """Return the request of a training.

        Args:
            tokens: What is trained on.
            config: How.
            steps: Exactly so many steps, or None.
        """
        return cls(
            **dataclasses.asdict(config),
            steps=steps,
            tokens=tokens.record.request,
            threshold=tokens.threshold,
        )


def begin(folder: Path, request: TrainingRequest) -> None:
    """Remove the checkpoints of an earlier training, and store the request of those to come."""
    for path in folder.glob("checkpoint-*"):
        if path.name.partition("-")[2].isdigit():
            shutil.rmtree(path)
    write_text(folder / _REQUEST, json.dumps(dataclasses.asdict(request), indent=1) + "\n")


def checkpoint_of(folder: Path, request: TrainingRequest) -> Path:
    """Return the last checkpoint of a training.

    Args:
        folder: Holds the checkpoints.
        request: The request that they have to be of.

    Raises:
        TrainingError: There is none, it is incomplete, or of another request.
    """
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
    wanted = dataclasses.asdict(request)
    differs = [name for name, value in wanted.items() if made.get(name) != value]
    if differs:
        name = differs[0]
        raise TrainingError(
            f"the checkpoints in {folder} are of another recipe ({name} {made.get(name)}, now "
            f"{wanted[name]}); go on with that one, or train without --resume"
        )
    missing = [name for name in _CHECKPOINT_FILES if not (last[1] / name).is_file()]
    if missing:
        raise TrainingError(
            f"the checkpoint {last[1]} is cut short ({missing[0]} is missing): remove it to go on "
            "from the one before, or train without --resume"
        )
    return last[1]
