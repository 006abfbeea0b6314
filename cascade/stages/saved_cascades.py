"""Save, load and upload cascades. A cascade is a folder of files that are written together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save

from cascade.core.errors import RecordError, first_line
from cascade.core.files import AnyPath
from cascade.core.reading import UnreadableError, check_tensors, read_tensors
from cascade.core.records import read_typed, to_file
from cascade.core.run_folder import RunFolder, current
from cascade.core.schema import UNSET, UnsetType
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.models.checkpoints.reading import file_hash
from cascade.models.stack import DecoderStack
from cascade.stages.records import CascadeRecord, StageProvenance, StageRecord
from cascade.stages.stage import Stage, new_stage

#: Each stage is built on a copy of the model below it, so the time grows with their square.
MOST_STAGES = 64

#: File name of the record in the folder of a saved cascade.
CONFIG = "cascade_config.json"


def write_cascade(
    folder: Path,
    record: CascadeRecord,
    stages: Sequence[Stage],
    heads: Sequence[FittedHeads | None],
    *,
    overwrite: bool,
) -> None:
    """Write a cascade to a folder: either all files or none.

    Args:
        folder: Output folder. It is created if missing.
        record: Record of the cascade, without file hashes.
        stages: Stages of the cascade.
        heads: Fitted heads of each stage's entry, or None.
        overwrite: Replace an existing cascade.

    Raises:
        OutputError: The folder already holds a cascade, or it cannot be written.
    """
    files = [row.file for row in record.stages]
    files += [row.entry.heads for row in record.stages if row.entry.heads is not None]
    rows = []
    with RunFolder(folder, [*files, CONFIG], overwrite=overwrite) as out:
        for row, stage, fitted in zip(record.stages, stages, heads, strict=True):
            weights = {name: value.contiguous() for name, value in stage.weights().items()}
            out.write(row.file, save(weights, metadata={"format": "pt"}))
            digest = file_hash(out.staging / row.file)
            entry = row.entry
            if fitted is not None and entry.heads is not None:
                fitted.save(out.staging / entry.heads)
                sha256 = file_hash(out.staging / entry.heads)
                entry = msgspec.structs.replace(entry, heads_sha256=sha256)
            rows.append(msgspec.structs.replace(row, sha256=digest, entry=entry))
        whole = msgspec.structs.replace(record, stages=rows)
        out.write(CONFIG, to_file(whole))


def upload(
    save_to: Callable[[str], None], repo_id: str, *, private: bool | None, **kwargs: Any
) -> Any:
    """Upload a cascade to a model repository on the Hugging Face Hub.

    Args:
        save_to: Function that saves the cascade to a folder.
        repo_id: "ORG/NAME". The repository is created if missing.
        private: Make a newly created repository private.
        kwargs: Passed to `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The return value of `upload_folder`.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_to(folder)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repository, folder_path=folder, **kwargs)


def local_folder(source: AnyPath, revision: str | None) -> Path:
    """Return a local folder. A Hub repository is downloaded first.

    Args:
        source: Folder or Hub id.
        revision: Hub revision.

    Raises:
        RecordError: The Hub cannot be reached or has no such repository.
    """
    folder = Path(source).expanduser()
    if os.path.isdir(folder) or not isinstance(source, str) or source.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=[CONFIG, "*.safetensors"])
        )
    except Exception as error:  # many unrelated types, one meaning for the user
        raise RecordError(
            f"no cascade {source}: {first_line(error)}; expected a folder written by `cascade "
            "train`, or a Hub id and a connection to the Hub"
        ) from error


def read_cascade_record(folder: Path) -> CascadeRecord:
    """Read the record of a saved cascade.

    Args:
        folder: Folder of the cascade.

    Raises:
        RecordError: The record is missing, torn, edited or from a newer release.
    """
    record = read_typed(folder / CONFIG, CascadeRecord)
    if len(record.stages) > MOST_STAGES:
        raise RecordError(
            f"{folder / CONFIG} has {len(record.stages):,} stages, expected at most {MOST_STAGES}; "
            "restore it, or train the cascade again"
        )
    for number, row in enumerate(record.stages):
        if row.sha256 is UNSET:
            raise RecordError(
                f"{folder / CONFIG} is torn or edited (expected stages[{number}].sha256, got "
                "nothing); restore it, or train the cascade again"
            )
    return record


def read_stage(folder: Path, row: StageRecord, below: DecoderStack) -> Stage:
    """Read a stage of a saved cascade.

    Args:
        folder: Folder of the cascade.
        row: Record of the stage.
        below: Model that the stage follows.

    Raises:
        RecordError: The stage's file is missing, incomplete or changed.
        ModelError: The weights do not match the record.
    """
    path = _checked(folder / row.file, row.sha256)
    stage = new_stage(below, row.num_layers, start=row.start, own_head=row.own_head)
    try:
        weights, _ = read_tensors(path)
    except (UnreadableError, FileNotFoundError) as error:
        raise RecordError(
            f"{path} is not a readable safetensors file ({first_line(error)}); restore it, or "
            "train the cascade again"
        ) from error
    stage.load(weights)
    stage.provenance = row.provenance or StageProvenance()
    return stage


def read_entry_heads(folder: Path, row: StageRecord, below: DecoderStack) -> FittedHeads | None:
    """Read the fitted heads of a stage's entry; None if the entry has none.

    Args:
        folder: Folder of the cascade.
        row: Record of the stage.
        below: Model that the stage follows.

    Raises:
        RecordError: The file is missing, torn or changed.
    """
    entry = row.entry
    if entry.heads is None:
        return None
    return load_heads(_checked(folder / entry.heads, entry.heads_sha256), below)


def _checked(path: Path, sha256: str | UnsetType) -> Path:
    """Return where a file of a cascade lies, after checking its hash.

    Raises:
        RecordError: The file is missing, no regular file, incomplete or changed.
    """
    path = current(path)
    if not path.is_file():
        raise RecordError(f"{path} is missing; restore it, or train the cascade again")
    try:
        # The header says whether the file is whole before all of it is read for its hash.
        check_tensors(path)
        same = sha256 is UNSET or file_hash(path) == sha256
        flaw = None if same else f"its hash differs from the one in {CONFIG}"
    except UnreadableError as error:
        flaw = str(error)
    if flaw is not None:
        raise RecordError(
            f"{path} is incomplete or changed ({flaw}); restore it, or train the cascade again"
        )
    return path
