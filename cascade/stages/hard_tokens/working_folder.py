"""The working folder of a collection: locking, resuming, and publishing the finished dataset."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cascade.core.errors import ModelError, OutputError, os_reason
from cascade.core.files import files_below, make_folder, remove_empty, write_text
from cascade.core.locks import locked
from cascade.core.provenance import SPLITS
from cascade.core.reading import UnreadableError, read_json
from cascade.core.run_folder import COMMITTED, commit, finish_commit
from cascade.core.schema import to_plain
from cascade.core.signals import delayed_signals
from cascade.stages.hard_tokens.dataset import RECORD, SPLITS_FILE, WORK, read_hard_tokens_record
from cascade.stages.hard_tokens.plan import CollectionPlan

#: File in the working folder: the request of the collection.
REQUEST = "request.json"

#: Folder in the working folder: what tasks in other processes read.
INPUTS = "inputs"

#: Files that may lie next to the shards of a split. Cache files of `datasets` need not be kept.
_OWN_FILE = re.compile(r"(data|cache)-.*\.arrow|tmp.*|state\.json|dataset_info\.json")


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Lock the folder of a dataset; yield its working folder and whether that was there before.

    On failure, the working folder is kept only if the same command can resume from it.

    Args:
        folder: Folder of the dataset.

    Raises:
        OutputError: Another process holds the lock, or the folder cannot be written.
    """
    work = folder / WORK
    try:
        with locked(folder, doing="collecting into"):
            interrupted = work.is_dir() or (folder / COMMITTED).is_dir()
            finish_commit(folder)
            made = make_folder(work)
            try:
                yield work, interrupted
            except BaseException as error:
                if isinstance(error, ModelError) or not _can_resume(work):
                    shutil.rmtree(work, ignore_errors=True)
                    remove_empty(made)
                raise
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {os_reason(error)}; free some space or choose "
            "another --output"
        ) from error


def _can_resume(work: Path) -> bool:
    """Return whether a working folder holds shards. One that cannot be listed is kept."""
    try:
        return any(path.suffix == ".arrow" for path in files_below(work))
    except OSError:
        return True


def prepare(plan: CollectionPlan, folder: Path, *, overwrite: bool) -> None:
    """Keep the contents of the working folder if they match the plan; otherwise empty it.

    Args:
        plan: Plan of the collection.
        folder: Folder of the dataset.
        overwrite: Allow deleting an unfinished dataset of another plan.

    Raises:
        OutputError: The folder holds an unfinished dataset of another plan. The message names the
            difference.
    """
    work = folder / WORK
    path = work / REQUEST
    for stray in files_below(work):
        if stray.name.startswith("."):  # incomplete files of a killed process
            stray.unlink()
    difference = None
    if path.exists():
        difference = _difference(_stored_request(path), to_plain(plan.request))
        done = (work / RECORD).exists()
        if difference is None and done:
            record = read_hard_tokens_record(work / RECORD)
            difference = None if plan.is_met_by(record) else "threshold and hard ratio"
    if difference is not None and not overwrite:
        raise OutputError(
            f"{folder} holds an unfinished dataset with other arguments ({difference}); resume it "
            "with those, choose another --output, or replace it with --overwrite"
        )
    if difference is not None or not path.exists():
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_text(path, json.dumps(to_plain(plan.request), indent=1, allow_nan=False) + "\n")


def _stored_request(path: Path) -> Mapping[str, Any] | None:
    """Return the request of an unfinished dataset; None if it is torn."""
    try:
        found = read_json(path)
    except UnreadableError:
        return None
    whole = isinstance(found, dict) and all(isinstance(group, dict) for group in found.values())
    return found if whole else None


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Describe the first difference of two requests; None if they are equal."""
    if before is None:
        return f"its {REQUEST} is torn"
    for group, wanted in now.items():
        found = before.get(group) or {}
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                title = group.replace(" part", " split")  # the stored key is the older word
                return f"{title}, {name}: {found.get(name)}, now {wanted.get(name)}"
    return None


def check_disk(plan: CollectionPlan, folder: Path) -> None:
    """Check that the disk has room for the missing shards.

    Args:
        plan: Plan of the collection.
        folder: Folder of the dataset.

    Raises:
        OutputError: The disk is too small. The message names the needed and the free space.
    """
    work = folder / WORK
    here = sum(path.stat().st_size for path in files_below(work) if path.suffix == ".arrow")
    expected = plan.expected_bytes
    # Setting the hard mask writes each shard a second time.
    needed = expected - here + expected // len(plan.shards)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OutputError(
            f"{folder} needs about {needed / 1e9:.3g} GB, but the disk has {free / 1e9:.3g} GB "
            "free; free some space, or choose a smaller --max-tokens or another --output"
        )


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Check that a folder holds no finished dataset.

    Args:
        folder: Folder of the dataset.
        overwrite: Allow replacing an existing dataset.

    Raises:
        OutputError: The folder holds a dataset, and `overwrite` is false.
    """
    if (folder / RECORD).exists() and not overwrite:
        raise OutputError(
            f"{folder} already holds a dataset of hard tokens; choose another --output, or replace "
            "it with --overwrite"
        )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Check that a dataset can be written to a folder. Nothing is written.

    Args:
        folder: Folder of the dataset.
        overwrite: Allow replacing an existing dataset.

    Raises:
        OutputError: The path is a file, or the folder holds a dataset or conflicting files.
    """
    # os.path accepts any string, while Path raises for an overlong name.
    if os.path.isfile(folder):
        raise OutputError(f"{folder} is a file, expected a folder; choose another --output")
    # An interrupted switch is finished by `working_folder`, which then returns the dataset.
    if not os.path.isdir(folder) or (folder / COMMITTED).is_dir():
        return
    ours = (folder / RECORD).exists() or (folder / WORK).is_dir()
    names = [folder / name for name in (*SPLITS, SPLITS_FILE)]
    foreign = [path for path in names if path.exists()]
    if ours:
        foreign = [
            path
            for split in SPLITS
            for path in sorted((folder / split).glob("*"))
            if not _OWN_FILE.fullmatch(path.name)
        ]
    if foreign:
        raise OutputError(
            f"{foreign[0]} does not belong to a dataset of hard tokens and would be overwritten; "
            "choose another --output"
        )
    if not (folder / WORK).is_dir():
        check_free(folder, overwrite=overwrite)


def publish(folder: Path) -> None:
    """Switch a folder to its complete dataset by one rename. An earlier dataset is removed.

    Args:
        folder: Folder of the dataset.

    Raises:
        OSError: The folder cannot be written.
        OutputError: The dataset is complete, but cannot be moved.
    """
    with delayed_signals():
        commit(folder / WORK, folder, (*SPLITS, SPLITS_FILE, RECORD))
