"""Checkpoints of a training run, and the checks before resuming from one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec.structs import asdict

from cascade.core.errors import TrainingError, first_line, os_reason
from cascade.core.files import flush_to_disk, write_text, xxh3_of
from cascade.core.reading import read_json
from cascade.core.schema import to_plain
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.training_config import TrainingConfig

#: File in the folder of checkpoints that holds their training request.
_REQUEST = "training.json"


#: File in a finished checkpoint that holds the hashes of its files. It is written last.
_SEAL = "cascade.json"

#: The files that an exact resume needs. The Trainer itself only warns if one is missing.
_CHECKPOINT_FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the folder of each finished checkpoint.

    Raises:
        TrainingError: The folder cannot be read.
    """
    for path in _folders(folder):
        # Without the seal, which is written last, the checkpoint was never finished.
        if (path / _SEAL).is_file():
            yield int(path.name.partition("-")[2]), path


def _folders(folder: Path) -> list[Path]:
    try:
        found = list(folder.iterdir())  # glob would leave out what cannot be listed
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(
            f"cannot read {folder}: {os_reason(error)}; make it readable or choose another --output"
        ) from error
    return [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]


def finish(folder: Path) -> None:
    """Mark a checkpoint as finished, by the hashes of its files.

    Raises:
        OSError: A file cannot be read or flushed to disk.
        OutputError: The hashes cannot be written.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != _SEAL]
    for path in files:
        flush_to_disk(path)
    hashes = {path.name: xxh3_of(path) for path in files}
    write_text(folder / _SEAL, json.dumps(hashes, indent=1, allow_nan=False) + "\n")


def can_resume(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint to resume from.

    Args:
        folder: Checkpoint folder of `train_stage`.
    """
    return any(checkpoints(folder))


class TrainingRequest(TrainingConfig, frozen=True, kw_only=True):
    """Everything that determines the result of a training run, except the code.

    The request is stored with the checkpoints. Only an equal request can resume from them.

    Attributes:
        steps: Exact number of steps; None for all steps of the epochs.
        tokens: Hash of the collection request of the hard tokens.
        threshold: A token with a similarity below this value is hard.
    """

    steps: int | None = None
    tokens: str = ""
    threshold: float = 0.0

    @classmethod
    def of(cls, tokens: HardTokens, config: TrainingConfig, steps: int | None) -> TrainingRequest:
        """Return the request of a training run.

        Args:
            tokens: Hard tokens to train on.
            config: Training options.
            steps: Exact number of steps, or None for all steps of the epochs.
        """
        return cls(
            **asdict(config),
            steps=steps,
            tokens=tokens.record.request,
            threshold=tokens.threshold,
        )


def begin(folder: Path, request: TrainingRequest) -> None:
    """Remove the checkpoints of an earlier training run and store the new request.

    Raises:
        TrainingError: The checkpoints cannot be read or removed.
        OutputError: The request cannot be written.
    """
    _remove(_folders(folder))
    write_text(folder / _REQUEST, json.dumps(to_plain(request), indent=1, allow_nan=False) + "\n")


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise TrainingError(
                f"cannot remove the earlier checkpoint {path}: {os_reason(error)}; make its folder "
                "writable or choose another --output"
            ) from error


def checkpoint_of(folder: Path, request: TrainingRequest) -> Path:
    """Return the last checkpoint of a training run, and remove those that were never finished.

    Args:
        folder: Folder of the checkpoints.
        request: Request that the checkpoints must belong to.

    Raises:
        TrainingError: There is no checkpoint, or it is incomplete or belongs to another request.
    """
    last = max(checkpoints(folder), default=None)
    if last is None:
        raise TrainingError(f"no checkpoint in {folder} to resume from; train without --resume")
    try:
        made = dict(read_json(folder / _REQUEST))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{folder / _REQUEST} is missing, torn or edited ({first_line(error)}), so the "
            "configuration of the checkpoints is unknown; train without --resume"
        ) from error
    wanted = to_plain(request)
    differs = [name for name, value in wanted.items() if made.get(name) != value]
    if differs:
        name = differs[0]
        raise TrainingError(
            f"the checkpoints in {folder} belong to another configuration ({name}: "
            f"{made.get(name)}, now {wanted[name]}); continue with that one, or train without "
            "--resume"
        )
    flaw = _flaw_of(last[1])
    if flaw is not None:
        raise TrainingError(
            f"the checkpoint {last[1]} is incomplete ({flaw}); remove it to resume from the"
            " previous one, or train without --resume"
        )
    # The Trainer would write into them, next to what a killed process left there.
    _remove(path for path in _folders(folder) if not (path / _SEAL).is_file())
    return last[1]


def _flaw_of(folder: Path) -> str | None:
    """Describe what is wrong with a finished checkpoint; None if nothing is."""
    missing = [name for name in _CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        hashes = dict(read_json(folder / _SEAL))
        # Only names in the folder are opened, whatever the file says.
        names = [name for name in _CHECKPOINT_FILES if name not in hashes] or [
            path.name for path in folder.iterdir() if path.name in hashes
        ]
        changed = [name for name in names if xxh3_of(folder / name) != hashes.get(name)]
    except (OSError, ValueError, TypeError) as error:
        return f"{_SEAL}: {first_line(error)}"
    return f"{changed[0]} was changed after it was written" if changed else None
