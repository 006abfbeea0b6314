"""Folders whose files are switched together: all of the old ones or all of the new ones."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from cascade.core.errors import CascadeError, OutputError, os_reason
from cascade.core.files import files_below, flush_to_disk, make_folder, remove_empty, staging_folder
from cascade.core.locks import locked
from cascade.core.signals import delayed_signals

#: A complete set of new files on its way to its folder. Creating it is the switch: it appears by
#: one rename, and whoever finds it moves its files into place.
COMMITTED = ".cascade-committed"

#: Lists the files that belong to the new set, inside `COMMITTED`.
_LIST = "files.json"

#: Seconds that a reader waits for a process that is moving files into place.
_READER_WAITS = 10.0


class RunFolder:
    """A folder to which all files of one run are moved together, once they are on disk.

    Files are first written to a staging folder inside the target. At the end of the `with` block
    they are flushed to disk and switched by one rename. A full disk, Ctrl-C or a kill therefore
    leaves all of the old files or all of the new ones. Only the files named here are ever
    replaced. The folder is locked from the check of what it holds to the end.

    Args:
        path: The folder; created where it is missing.
        names: The names of the files that this run writes.
        optional: Names of files that it may write. Those of an older run are removed in any case.
        overwrite: Replace the files of an earlier run.
        wait: The seconds to wait for another process that writes to the folder.

    Raises:
        OutputError: The folder holds another run and `overwrite` is false, another process is
            writing to it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        *,
        optional: Iterable[str] = (),
        overwrite: bool = False,
        wait: float = 0.0,
    ) -> None:
        self.path = path
        self.optional = tuple(optional)
        self.names = (*names, *self.optional)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(path, wait=wait))
                finish_commit(path)
                self._check(overwrite)
                made = make_folder(path)
                held.callback(remove_empty, made)
                self.staging = held.enter_context(staging_folder(path))
            except OSError as error:
                raise OutputError(
                    f"cannot write to {path}: {os_reason(error)}; choose a folder you can write to"
                ) from error
            self._held = held.pop_all()

    def _check(self, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, expected a folder; choose another --output")
        present = [name for name in self.names if (self.path / name).exists()]
        folder = next((name for name in present if (self.path / name).is_dir()), None)
        if folder is not None:
            raise OutputError(
                f"{self.path / folder} is a folder, expected a file of an earlier run; "
                "choose another --output"
            )
        if present and not overwrite:
            raise OutputError(
                f"{self.path} holds another run ({present[0]}): "
                "choose another --output, or replace it with --overwrite"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Move the files into place on success; leave the folder unchanged on failure."""
        with self._held:
            if kind is None:
                self.commit()

    def commit(self) -> None:
        """Switch to the staged files: all of them or, on failure, none.

        Raises:
            OutputError: A file was not staged, or the folder cannot be written.
        """
        try:
            missing = [
                name
                for name in self.names
                if name not in self.optional and not (self.staging / name).exists()
            ]
            if missing:
                raise OutputError(f"cannot write to {self.path}: {missing[0]} was not written")
            with delayed_signals():
                commit(self.staging, self.path, self.names)
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {os_reason(error)}; choose another --output "
                "(an older run there is unharmed)"
            ) from error

    def write(self, name: str, content: str | bytes) -> None:
        """Stage one file of the run.

        Args:
            name: One of the run's names. One with a slash goes to a folder below.
            content: Text is written as UTF-8.

        Raises:
            OutputError: The disk is full, or the folder was removed.
        """
        data = content.encode("utf-8") if isinstance(content, str) else content
        with self.staged(name) as path:
            path.write_bytes(data)

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield the path at which one file of the run is staged, to be written by the caller.

        Args:
            name: One of the run's names. One with a slash goes to a folder below.

        Raises:
            OutputError: The disk is full, or the folder was removed.
        """
        staged = self.staging / name
        try:
            staged.parent.mkdir(parents=True, exist_ok=True)
            yield staged
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path / name}: {os_reason(error)}; free some space or choose "
                "another --output (an older run there is unharmed)"
            ) from error


def commit(staging: Path, folder: Path, names: Iterable[str]) -> None:
    """Switch a folder to staged files and folders by one rename, and move them into place.

    The lock of the folder must be held.

    Args:
        staging: A folder inside `folder` that holds the new files.
        folder: Their destination.
        names: The files or folders that belong together. Those that are not staged are removed
            from the destination.

    Raises:
        OSError: The new files cannot be completed. Nothing has changed.
        OutputError: They are complete, but cannot be moved. The next start moves the rest.
    """
    names = list(names)
    staged = [name for name in names if (staging / name).exists()]
    (staging / _LIST).write_text(
        json.dumps({"all": names, "staged": staged}, allow_nan=False), encoding="utf-8"
    )
    files = files_below(staging)
    folders = {parent for path in files for parent in path.relative_to(staging).parents}
    for path in (*files, *(staging / folder for folder in folders)):
        flush_to_disk(path)
    staging.replace(folder / COMMITTED)
    try:
        flush_to_disk(folder)
        finish_commit(folder)
    except OSError as error:
        raise OutputError(
            f"the new files of {folder} are complete in {folder / COMMITTED}, but cannot be moved"
            f" into place: {os_reason(error)}; make the folder writable, the next command that"
            " uses it moves them"
        ) from error


def finish_commit(folder: Path) -> None:
    """Move the files of an interrupted switch into place, if there is one.

    The lock of the folder must be held.

    Raises:
        OSError: The folder cannot be written.
    """
    committed = folder / COMMITTED
    if not os.path.isdir(committed):
        return
    every, staged_names = _listed(committed)
    for name in every:
        target = folder / name
        if name in staged_names:
            staged = committed / name
            if staged.exists():  # else it was moved before the interruption
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.is_dir():
                    shutil.rmtree(target)
                staged.replace(target)
        else:
            target.unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in every}:
        if parent.is_dir():
            flush_to_disk(parent)
    shutil.rmtree(committed)


def _listed(committed: Path) -> tuple[list[str], list[str]]:
    """Return the names of all files of a set, and of those in it; nothing once it is moved.

    Raises:
        OSError: The list cannot be read, or names files outside the folder.
    """
    try:
        found = json.loads((committed / _LIST).read_text(encoding="utf-8"))
        names = [[str(name) for name in found[key]] for key in ("all", "staged")]
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(errno.EIO, f"{committed} is torn, remove it") from error
    for name in (*names[0], *names[1]):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise OSError(errno.EPERM, f"{committed} names {name!r}, remove it")
    return names[0], names[1]


def current(path: Path) -> Path:
    """Return where the content of a file lies, after finishing an interrupted switch.

    This is `path` itself, except where a killed process left a complete set of new files and
    they cannot be moved into place, as in a folder that is read-only.

    Args:
        path: The file.
    """
    committed = path.parent / COMMITTED
    if not os.path.isdir(committed):
        return path
    recover(path.parent)
    try:
        _, staged = _listed(committed)
    except OSError:
        return path
    kept = committed / path.name
    return kept if path.name in staged and kept.exists() else path


def is_stored(path: Path) -> bool:
    """Return whether something has this path, after finishing an interrupted switch.

    Args:
        path: A file that belongs to a set of files.
    """
    return os.path.exists(current(path))


def recover(folder: Path) -> None:
    """Finish an interrupted switch of a folder, where it can be written to."""
    if os.path.isdir(folder / COMMITTED):
        with (
            contextlib.suppress(CascadeError, OSError),
            locked(folder, wait=_READER_WAITS),
        ):
            finish_commit(folder)
