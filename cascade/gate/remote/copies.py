"""The copy of remote baselines in the cache: brought up to date, or used as it is.

A file enters the copy only after its seal was checked. All files that changed enter it by one
switch, so a process that is killed leaves the earlier copy or the new one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cascade.core.cache import cache_folder
from cascade.core.errors import OutputError, RecordError, os_reason
from cascade.core.files import make_folder, remove_empty, sha256_of, staging_folder, write_text
from cascade.core.locks import locked
from cascade.core.records import read_typed, to_file
from cascade.core.run_folder import commit, finish_commit
from cascade.core.signals import delayed_signals
from cascade.core.urls import redacted, without_last_slash, without_user
from cascade.gate.remote.filesystem import (
    ENDINGS,
    RemoteFile,
    RemoteFolder,
    UnreachableError,
    is_offline,
)
from cascade.gate.remote.records import (
    BaselinesCopy,
    BaselinesCopyRecord,
    CopiedFile,
    RemoteOrigin,
)
from cascade.gate.remote.verification import belonging, check_baseline

#: The record of a copy, next to the folders of its models.
RECORD = "copy.json"

#: Why a copy is used without asking.
OFFLINE = "HF_HUB_OFFLINE is set"

#: Seconds to wait for another process that reads the same baselines.
_WAITS = 600.0

#: The most characters of an address in the name of its copy.
_LONGEST_NAME = 60


def address(url: str) -> str:
    """Return an address as it is shown and recorded: without credentials and slash at its end."""
    return redacted(without_last_slash(url))


def copy_folder(url: str) -> Path:
    """Return the folder in the cache for the copy of a remote folder of baselines.

    Args:
        url: The address. A user, a password and a slash at its end make no difference.
    """
    place = without_last_slash(without_user(url))
    words = re.sub(r"[^a-z0-9._]+", "-", re.split("[?#]", place)[0].lower()).strip("-.")
    digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / "baselines" / f"{words[:_LONGEST_NAME]}-{digest[:16]}"


def up_to_date(url: str) -> BaselinesCopy:
    """Compare the copy of remote baselines with their address, and read what has changed.

    Args:
        url: The address, with credentials if it has some.

    Returns:
        What is known of the copy. If the address cannot be reached, that is the copy of before.

    Raises:
        UsageError: No installed package reads such an address; names the package.
        RecordError: The address cannot be reached and there is no copy, or it has no baselines.
        OutputError: The copy cannot be written; the earlier one is unharmed.
    """
    folder = copy_folder(url)
    if is_offline(url):
        return _as_it_is(url, folder, OFFLINE)
    try:
        remote = RemoteFolder(url)
        files = {file.name: file for file in remote.files()}
    except UnreachableError as error:
        return _as_it_is(url, folder, f"it cannot be reached: {error}")
    if not files:
        raise RecordError(
            f"expected baselines such as MODEL/CORPUS.saturation.json in {address(url)}, found "
            "none; push some, or name another address"
        )
    stored = _stored(folder)
    if stored is not None and not _Update(remote, folder, files, stored).is_needed:
        return _copy(url, stored)
    made: list[Path] = []
    try:
        made = make_folder(folder)
        with (
            locked(folder, wait=_WAITS, doing="reading baselines into"),
            staging_folder(folder) as staging,
        ):
            finish_commit(folder)
            # Another process may have read them while this one waited.
            update = _Update(remote, folder, files, _stored(folder))
            record = update.run(staging)
    except OSError as error:
        raise OutputError(
            f"cannot write a copy of {address(url)} to {folder}: {os_reason(error)}; set "
            "CASCADE_CACHE to a folder that you can write to"
        ) from error
    finally:
        remove_empty(made)
    return _copy(
        url,
        record,
        refused=update.refused,
        removed=update.removed,
        reason=next(iter(update.unread.values()), None),
    )


@dataclass
class _Update:
    """What has changed between a copy and its address, and the way from one to the other.

    Attributes:
        remote: The remote folder.
        folder: The folder of the copy.
        files: The remote files, by name.
        stored: The record of the copy; None if there is no copy.
        refused: The baselines that could not be taken, by their `.json` or heads, and why.
        unread: Those whose earlier version is used, because the new one could not be read.
        removed: The files that the address no longer has.
    """

    remote: RemoteFolder
    folder: Path
    files: Mapping[str, RemoteFile]
    stored: BaselinesCopyRecord | None
    refused: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = [] if self.stored is None else self.stored.files
        self._whole = {file.name: file for file in files if is_whole(self.folder, file)}
        self._here = belonging({*self._whole, *_names_in(self.folder)})
        self._there = belonging(self.files)

    @property
    def is_needed(self) -> bool:
        """Whether anything has changed."""
        return bool(self._changed() or self._gone())

    def run(self, staging: Path) -> BaselinesCopyRecord:
        """Bring the copy up to date, and return its record. The lock of the folder is held.

        Args:
            staging: A new folder inside that of the copy.

        Raises:
            OSError: The copy cannot be written; the earlier one is unharmed.
            OutputError: The same.
        """
        new: dict[str, CopiedFile] = {}
        for main in self._changed():
            new |= self._read(main, staging)
        self.removed = self._gone()
        kept = {name: file for name, file in self._whole.items() if name not in self.removed}
        if self.stored is not None and not new and not self.removed:
            return self.stored
        record = BaselinesCopyRecord(
            url=address(self.remote.url),
            fetched=datetime.now(UTC).isoformat(timespec="seconds"),
            files=sorted((kept | new).values(), key=lambda file: file.name),
        )
        if new or self.removed:
            write_text(staging / RECORD, to_file(record))
            with delayed_signals():
                commit(staging, self.folder, [*new, *self.removed, RECORD])
        return record

    def _changed(self) -> list[str]:
        """Return the baselines that are new or have another version than in the copy."""
        return [
            main
            for main, names in self._there.items()
            if names != self._here.get(main) or not all(map(self._is_same, names))
        ]

    def _is_same(self, name: str) -> bool:
        stamp = self.files[name].stamp
        return stamp is not None and name in self._whole and self._whole[name].stamp == stamp

    def _gone(self) -> list[str]:
        """Return the files here whose baseline the address no longer has, or has without them."""
        return sorted(
            name
            for main, names in self._here.items()
            for name in names
            if name not in self.files and main not in self.refused and main not in self.unread
        )

    def _read(self, main: str, staging: Path) -> dict[str, CopiedFile]:
        """Read the files of a baseline into the staging folder; return none if it is refused."""
        names, where = self._there[main], address(self.remote.url)
        (staging / main).parent.mkdir(parents=True, exist_ok=True)
        try:
            for name in names:
                self.remote.download(self.files[name], staging / name)
            check_baseline(staging / main)
        except UnreachableError as error:
            whole = main in self._here and all(name in self._whole for name in self._here[main])
            found = self.unread if whole else self.refused
            found[main] = f"cannot read {where}/{name}: {error}"
        except RecordError as error:
            self.refused[main] = str(error).replace(f"{staging}/", f"{where}/")
        else:
            return {name: _copied(staging / name, self.files[name]) for name in names}
        for name in names:
            (staging / name).unlink(missing_ok=True)
        return {}


def _copied(path: Path, file: RemoteFile) -> CopiedFile:
    return CopiedFile(
        name=file.name, size=path.stat().st_size, sha256=sha256_of(path), stamp=file.stamp
    )


def is_whole(folder: Path, file: CopiedFile) -> bool:
    """Return whether a file of a copy is as it was read.

    Args:
        folder: The folder of the copy.
        file: What its record says.
    """
    path = folder / file.name
    try:
        return path.stat().st_size == file.size and sha256_of(path) == file.sha256
    except OSError:
        return False


def _names_in(folder: Path) -> set[str]:
    """Return the names of all files of baselines in the folder of a copy."""
    found = (path for path in folder.glob("*/*") if path.name.endswith(ENDINGS))
    return {path.relative_to(folder).as_posix() for path in found}


def _stored(folder: Path) -> BaselinesCopyRecord | None:
    """Return the record of a copy; None if there is none, or if it is torn: all is read again.

    Reading it finishes a switch that was interrupted.
    """
    try:
        return read_typed(folder / RECORD, BaselinesCopyRecord)
    except RecordError:
        return None


def _as_it_is(url: str, folder: Path, reason: str) -> BaselinesCopy:
    """Return what is known of a copy that cannot be compared with its address.

    Raises:
        RecordError: There is no copy.
    """
    stored = _stored(folder)
    if stored is None:
        raise RecordError(
            f"cannot read baselines from {address(url)}: {reason}, and the cache has no copy of "
            "them; check the address and the network, or name a local folder"
        )
    damaged = {file.name for file in stored.files if not is_whole(folder, file)}
    refused = {
        main: f"the copy of {address(url)}/{main} in {folder} is damaged ({reason})"
        for main, names in belonging(file.name for file in stored.files).items()
        if damaged & set(names)
    }
    return _copy(url, stored, refused=refused, reason=reason)


def _copy(
    url: str,
    record: BaselinesCopyRecord,
    *,
    refused: Mapping[str, str] | None = None,
    removed: Sequence[str] = (),
    reason: str | None = None,
) -> BaselinesCopy:
    content = "".join(f"{file.name} {file.sha256}\n" for file in record.files)
    origin = RemoteOrigin(
        url=address(url),
        revision=f"sha256:{hashlib.sha256(content.encode()).hexdigest()}",
        fetched=record.fetched,
        checked=reason is None,
        reason=reason,
    )
    return BaselinesCopy(origin=origin, refused=dict(refused or {}), removed=list(removed))
