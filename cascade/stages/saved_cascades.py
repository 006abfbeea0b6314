"""Saved cascades: the files of a folder, written together, read with checks, or uploaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cascade.core.errors import RecordError, first_line
from cascade.core.files import RunFolder
from cascade.core.records import read_typed, to_json
from cascade.core.schema import UNSET, to_plain
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.models.stack import DecoderStack
from cascade.models.weights import file_hash
from cascade.stages.records import CascadeRecord, StageProvenance, StageRecord
from cascade.stages.stage import Stage, new_stage

#: The record of a saved cascade, in its folder.
CONFIG = "cascade_config.json"


def write_cascade(
    folder: Path,
    record: CascadeRecord,
    stages: Sequence[Stage],
    heads: Sequence[FittedHeads | None],
    *,
    overwrite: bool,
) -> None:
    """Write a cascade to a folder: all of its files, or none.

    Args:
        folder: The folder, made where it is missing.
        record: The cascade, without the hashes of its files.
        stages: Its stages.
        heads: The fitted heads of each stage's entry, or None.
        overwrite: Replace a cascade that is there.

    Raises:
        OutputError: It holds a cascade already, or cannot be written.
    """
    files = [row.file for row in record.stages]
    files += [row.entry.heads for row in record.stages if row.entry.heads is not None]
    rows = []
    with RunFolder(folder, [*files, CONFIG], overwrite=overwrite) as out:
        for row, stage, fitted in zip(record.stages, stages, heads, strict=True):
            weights = {name: value.contiguous() for name, value in stage.weights().items()}
            out.write(row.file, save(weights, metadata={"format": "pt"}))
            digest = file_hash(out.staging / row.file)
            rows.append(msgspec.structs.replace(row, sha256=digest))
            if fitted is not None and row.entry.heads is not None:
                fitted.save(out.staging / row.entry.heads)
        whole = msgspec.structs.replace(record, stages=rows)
        out.write(CONFIG, to_json(to_plain(whole)) + "\n")


def upload(
    save_to: Callable[[str], None], repo_id: str, *, private: bool | None, **kwargs: Any
) -> Any:
    """Upload a saved cascade to a model repository of the hub.

    Args:
        save_to: Saves the cascade to a folder.
        repo_id: "ORG/NAME"; made where it is missing.
        private: Whether a repository that is made is private.
        kwargs: For `huggingface_hub.HfApi.upload_folder`.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save_to(folder)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repository, folder_path=folder, **kwargs)


def local_folder(source: str | Path, revision: str | None) -> Path:
    """Return a local folder, or the download of a hub repository.

    Args:
        source: The folder, or a hub id.
        revision: Of the hub.

    Raises:
        RecordError: The hub cannot be reached or has no such repository.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or isinstance(source, Path) or source.count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=[CONFIG, "*.safetensors"])
        )
    except Exception as error:  # many unrelated types, one meaning for the user
        raise RecordError(
            f"no cascade {source}: {first_line(error)}; expected a folder of `cascade train`, or a "
            "hub id where the hub can be reached"
        ) from error


def read_cascade_record(folder: Path) -> CascadeRecord:
    """Read the record of a saved cascade.

    Args:
        folder: The cascade's.

    Raises:
        RecordError: It is missing, torn, edited or of a newer release.
    """
    record = read_typed(folder / CONFIG, CascadeRecord)
    for number, row in enumerate(record.stages):
        if row.sha256 is UNSET:
            raise RecordError(
                f"{folder / CONFIG} is torn or edited (expected stages[{number}].sha256, got "
                "nothing); restore it"
            )
    return record


def read_stage(folder: Path, row: StageRecord, below: DecoderStack) -> Stage:
    """Read a stage of a saved cascade.

    Args:
        folder: The cascade's.
        row: The stage's record.
        below: The model that the stage follows.

    Raises:
        RecordError: Its file is missing, cut short or changed.
        ModelError: Its weights do not fit its record.
    """
    path = folder / Path(row.file).name
    if not path.is_file():
        raise RecordError(f"{path} is missing; restore it, or train the cascade anew")
    if file_hash(path) != row.sha256:
        raise RecordError(
            f"{path} is cut short or changed (its hash is not the one in {CONFIG}); restore it, or "
            "train the cascade anew"
        )
    stage = new_stage(below, row.num_layers, start=row.start, own_head=row.own_head)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(
            f"{path} is no readable safetensors file ({first_line(error)})"
        ) from error
    stage.load(weights)
    stage.provenance = row.provenance or StageProvenance()
    return stage


def read_entry_heads(folder: Path, row: StageRecord, below: DecoderStack) -> FittedHeads | None:
    """Read the fitted heads of a stage's entry; None where it has none.

    Args:
        folder: The cascade's.
        row: The stage's record.
        below: The model that the stage follows.

    Raises:
        RecordError: The file is missing or torn.
    """
    heads = row.entry.heads
    return None if heads is None else load_heads(folder / heads, below)
