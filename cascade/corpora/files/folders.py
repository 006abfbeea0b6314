"""Folders: several files of one kind, or what `save_to_disk` of `datasets` wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cascade.core.errors import CorpusError, first_line, os_reason
from cascade.core.files import files_below
from cascade.corpora.files.kinds import ENDINGS, CorpusFile, file_of

#: Files that describe a corpus, and are no part of it.
_NO_DATA = re.compile(
    r"(?i)(readme|license|licence|changelog|citation)(\..*)?|.*\.(md|lock|py|yaml|yml|cff|crc)"
    r"|dataset_infos?\.json|state\.json"
)

#: Names of splits, as `datasets` knows them, and the split that each means.
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved(folder: Path, split: str | None) -> Iterable[Any]:
    """Return the dataset that `save_to_disk` wrote.

    Args:
        folder: The folder of a `Dataset` or a `DatasetDict`.
        split: A split of a `DatasetDict`; None if it has only one.

    Raises:
        CorpusError: It cannot be read, or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        # A damaged folder raises OSError, Arrow's errors, KeyError or ValueError.
        raise CorpusError(
            f"{folder} is not a readable dataset ({first_line(error)}); save it again"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        if split not in (None, str(saved.split)):
            raise CorpusError(f"{folder} holds one dataset without splits; leave out --split")
        only: Iterable[Any] = saved
        return only
    chosen: Iterable[Any] = saved[_chosen(folder, sorted(saved), split)]
    return chosen


def files_of(folder: Path, split: str | None) -> list[CorpusFile]:
    """Return the files of a folder, sorted by path.

    Args:
        folder: Holds files of one kind, compressed or not, also in folders below it.
        split: Only those that are named after this split, or lie in a folder that is. Default:
            all, if no file is named after a split; else "train".

    Raises:
        CorpusError: There are none, they are of several kinds, or there is no such split.
    """
    try:
        paths = [path for path in files_below(folder) if path.is_file() and _is_data(folder, path)]
    except OSError as error:
        raise CorpusError(
            f"cannot list {error.filename}: {os_reason(error)}; change its permissions, or name "
            "one file"
        ) from error
    found = [(path, file_of(path)) for path in paths]
    files = [file for _, file in found if file is not None]
    others = [path.name for path, file in found if file is None]
    if not files or others:
        got = f"got {others[0]}" if others else "got none"
        raise CorpusError(
            f"{folder}: expected only {ENDINGS} files in a folder, {got}; name one file, or move "
            "other files away"
        )
    kinds = {file.kind: file for file in files}
    if len(kinds) > 1:
        got = " and ".join(file.path.name for file in list(kinds.values())[:2])
        raise CorpusError(
            f"{folder}: expected files of one kind in a folder, got {got}; name one file, or move "
            "the others away"
        )
    by_split: dict[str | None, list[CorpusFile]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.path.relative_to(folder)), []).append(file)
    if set(by_split) == {None}:
        if split not in (None, "train"):
            raise CorpusError(f"{folder}: no file is named after a split; leave out --split")
        return files
    named = sorted(name for name in by_split if name)
    return by_split[_chosen(folder, named, split or ("train" if "train" in named else None))]


def _is_data(folder: Path, path: Path) -> bool:
    parts = path.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and not _NO_DATA.fullmatch(path.name)


def _split_of(path: Path) -> str | None:
    """Return the split that a file, or else its folder, is named after."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _chosen(folder: Path, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        got = "none" if split is None else split
        raise CorpusError(f"{folder}: expected --split among {', '.join(splits)}, got {got}")
    return split
