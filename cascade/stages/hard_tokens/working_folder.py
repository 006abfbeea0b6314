"""The folder in which a dataset is made: locked, resumed, and moved to its place when complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cascade.core.errors import ModelError, OutputError, os_reason
from cascade.core.files import make_folder, remove_empty, write_text
from cascade.core.schema import to_plain
from cascade.stages.hard_tokens.dataset import RECORD, SPLITS_FILE, WORK, read_hard_tokens_record
from cascade.stages.hard_tokens.plan import CollectionPlan
from cascade.stages.hard_tokens.records import SPLITS

#: In the working folder: the request, and a lock.
REQUEST, LOCK = "request.json", "lock"

#: What may lie next to the shards of a split; what `datasets` caches there need not be kept.
_OWN_FILE = re.compile(r"(data|cache)-.*\.arrow|tmp.*|state\.json|dataset_info\.json")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Yield the working folder of a dataset; no other process has it at the same time.

    On failure the folder stays only where the same command can resume from it.

    Args:
        folder: The dataset's.

    Raises:
        OutputError: Another process has it, or it cannot be written.
    """
    work = folder / WORK
    made: list[Path] = []
    try:
        made = make_folder(work)
        with FileLock(work / LOCK, timeout=0):
            try:
                yield work
            except BaseException as error:
                if isinstance(error, ModelError) or not any(work.rglob("data-*.arrow")):
                    shutil.rmtree(work, ignore_errors=True)
                    remove_empty(made)
                raise
    except Timeout:
        raise OutputError(
            f"another process is collecting into {folder}; wait for it or choose another --output"
        ) from None
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {os_reason(error)}; free some space or choose "
            "another --output"
        ) from error


def prepare(plan: CollectionPlan, folder: Path, *, overwrite: bool) -> None:
    """Keep what the working folder holds where it is of this plan; else empty it.

    Args:
        plan: What is collected.
        folder: The dataset's.
        overwrite: Whether an unfinished dataset of another plan may be dropped.

    Raises:
        OutputError: It holds an unfinished dataset of another plan (says how they differ).
    """
    work = folder / WORK
    path = work / REQUEST
    for stray in work.rglob(".*"):  # half a file that a killed process left
        stray.unlink()
    difference = None
    if path.exists():
        difference = _difference(json.loads(path.read_text("utf-8")), to_plain(plan.request))
        done = (work / RECORD).exists()
        if difference is None and done:
            record = read_hard_tokens_record(work / RECORD)
            difference = None if plan.is_met_by(record) else "threshold and hard ratio"
    if difference is not None and not overwrite:
        raise OutputError(
            f"{folder} holds an unfinished dataset of other arguments ({difference}); go "
            "on with those, choose another --output, or drop it with --overwrite"
        )
    if difference is not None or not path.exists():
        for entry in work.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_text(path, json.dumps(to_plain(plan.request), indent=1) + "\n")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first difference of two requests in words; None where they are equal."""
    for what, wanted in now.items():
        found = before.get(what) or {}
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                return f"{what}, {name}: {found.get(name)}, now {wanted.get(name)}"
    return None


def check_disk(plan: CollectionPlan, folder: Path) -> None:
    """Refuse a disk that is too small for the shards that are still missing.

    Args:
        plan: What is collected.
        folder: The dataset's.

    Raises:
        OutputError: Says how much is needed and how much is free.
    """
    work = folder / WORK
    here = sum(path.stat().st_size for path in work.rglob("data-*.arrow"))
    expected = plan.expected_bytes
    # A shard is written a second time when its hard mask is set.
    needed = expected - here + expected // len(plan.shards)
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OutputError(
            f"{folder} needs about {needed / 1e9:.3g} GB, the disk has "
            f"{free / 1e9:.3g} GB free; free some, take a smaller --max-tokens or choose "
            "another --output"
        )


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a finished dataset.

    Args:
        folder: The dataset's.
        overwrite: Whether an earlier dataset may be replaced.

    Raises:
        OutputError: It holds one that may not be replaced.
    """
    if (folder / RECORD).exists() and not overwrite:
        raise OutputError(
            f"{folder} holds a dataset of hard tokens already: choose another --output, or replace "
            "it with --overwrite"
        )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a dataset cannot be written to; nothing is written.

    Args:
        folder: The dataset's.
        overwrite: Whether an earlier dataset there may be replaced.

    Raises:
        OutputError: It is a file, holds a dataset, or other files in a dataset's place.
    """
    # os.path answers for any string, where Path raises for an overlong name.
    if os.path.isfile(folder):
        raise OutputError(f"{folder} is a file, expected a folder; choose another --output")
    if not os.path.isdir(folder):
        return
    ours = (folder / RECORD).exists() or (folder / WORK).is_dir()
    names = [folder / name for name in (*SPLITS, SPLITS_FILE)]
    strangers = [path for path in names if path.exists()]
    if ours:
        strangers = [
            path
            for split in SPLITS
            for path in sorted((folder / split).glob("*"))
            if not _OWN_FILE.fullmatch(path.name)
        ]
    if strangers:
        raise OutputError(
            f"{strangers[0]} is in the way, and of no dataset of hard tokens; choose another "
            "--output"
        )
    if not (folder / WORK).is_dir():
        check_free(folder, overwrite=overwrite)


def publish(folder: Path) -> None:
    """Move a complete dataset to its place, its record last; an earlier one is removed.

    Args:
        folder: The dataset's.
    """
    work = folder / WORK
    (folder / RECORD).unlink(missing_ok=True)
    for name in (*SPLITS, SPLITS_FILE, RECORD):
        if (work / name).exists():  # else it was moved before an interruption
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (work / name).replace(folder / name)
    shutil.rmtree(work)
