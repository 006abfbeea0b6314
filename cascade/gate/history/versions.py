"""Versions to compare: those of a baseline in git, and runs of `cascade analyze` in a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.core.printable import printable
from cascade.gate.baselines import ARRAYS, ROWS, StoredProfile, read_profile
from cascade.gate.history.work_tree import CommittedFile, WorkTree
from cascade.saturation.records import ProfileRecord

#: How the names of baselines of profiles end.
SUFFIX = f".{ProfileRecord.KIND}.json"

#: The endings of the files next to it. Those of earlier releases have no rows.
_BESIDE = (ARRAYS, ROWS)

#: The name of a version that is in the work tree alone.
UNCOMMITTED = "uncommitted"

#: How the text begins that Git stores for a file of Git LFS.
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Version:
    """A version that was not read yet.

    Attributes:
        name: As in `HistoryVersion`, like the following ones.
        path: The path of the file in this version.
        read: Reads it, or raises a `RecordError`.
        commit: The whole hash of the commit.
        date: The date of the commit.
        subject: The subject of the commit.
    """

    name: str
    path: str
    read: Callable[[], StoredProfile]
    commit: str | None = None
    date: str | None = None
    subject: str | None = None


def baseline_versions(tree: WorkTree, path: str) -> list[Version]:
    """Return the versions of a baseline, the oldest first, and the uncommitted one if it differs.

    Args:
        tree: The work tree.
        path: The baseline's `.json`, relative to the top of the work tree.

    Raises:
        RecordError: Git cannot read the repository.
    """
    committed = tree.versions(path, _BESIDE)
    versions = [_committed(tree, file) for file in committed]
    here = tree.top / path
    if here.is_file() and not (committed and _is_same(tree, here, committed[-1])):
        versions.append(Version(UNCOMMITTED, printable(path), lambda: read_profile(here)))
    return versions


def _committed(tree: WorkTree, file: CommittedFile) -> Version:
    commit = file.commit
    return Version(
        commit.short,
        printable(file.path),
        lambda: _read(tree, file),
        commit.number,
        commit.date,
        commit.subject,
    )


def _read(tree: WorkTree, file: CommittedFile) -> StoredProfile:
    """Read a committed version with all checks of `read_profile`, from copies of its files.

    Raises:
        RecordError: It is torn, edited or of a newer release; the message names the commit.
    """
    name = Path(file.path).name
    with tempfile.TemporaryDirectory(prefix="cascade-history-") as folder:
        copy = Path(folder) / name
        beside = [copy.with_suffix(ending) for ending in _BESIDE]
        blobs = (file.blob, *file.companions)
        for path, blob in zip((copy, *beside), blobs, strict=True):
            if blob is None:
                continue
            content = tree.content(blob)
            if content.startswith(_POINTER):
                raise RecordError(
                    f"{path.name} is a Git LFS pointer in {file.commit.short}, whose content is "
                    "not read"
                )
            path.write_bytes(content)
        try:
            found = read_profile(copy)
            # The copies are removed, so nothing can be read later.
            return replace(found, rows=found.rows.all())
        except RecordError as error:
            # The copy is gone when the reader looks for it.
            where = f"{file.commit.short}:{file.path[: -len(name)]}"
            raise RecordError(str(error).replace(f"{folder}/", where)) from error


def _is_same(tree: WorkTree, here: Path, file: CommittedFile) -> bool:
    """Return whether the files in the work tree are those of a commit."""
    beside = [here.with_suffix(ending) for ending in _BESIDE]
    blobs = zip((here, *beside), (file.blob, *file.companions), strict=True)
    if all(
        (path.read_bytes() if path.is_file() else None) == (blob and tree.content(blob))
        for path, blob in blobs
    ):
        return True
    # Git can check a file out with other line ends, or from Git LFS.
    try:
        return read_profile(here).record() == _read(tree, file).record()
    except RecordError:
        return False


# --- Runs ------------------------------------------------------------------------------------


def run_versions(paths: Iterable[tuple[str, Path]]) -> list[Version]:
    """Return runs of `cascade analyze` as versions.

    Args:
        paths: The name and the `profile.json` of each run, in order.
    """
    return [
        Version(name, printable(str(path)), lambda path=path: read_profile(path))  # type: ignore[misc]
        for name, path in paths
    ]
