"""Atomic writes: a reader sees either the old content of a file or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cascade.core.errors import OutputError, os_reason

#: A path as users give it.
AnyPath = str | os.PathLike[str]


def make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents; return those that were missing, outermost first.

    Raises:
        OSError: One of them cannot be created; those created before it are removed.
    """
    made: list[Path] = []
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that `make_folder` created and that are still empty."""
    for folder in reversed(list(folders)):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success.

    Missing parent folders are created. On any failure, including Ctrl-C, the temporary file and
    the created folders are removed, and `path` is unchanged.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    with _temporary_file(path) as temporary:
        try:
            yield temporary
            # mkstemp creates private files; results get the permissions of the user's other files.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {os_reason(error)}; free some space or choose another folder"
                " (the existing file is unharmed)"
            ) from error


def check_writable(path: Path) -> None:
    """Check that a file can be written, without leaving anything behind.

    Raises:
        OutputError: Its folder cannot be created or written to.
    """
    with _temporary_file(path):
        pass


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield an empty file in the folder of `path`; remove it and empty new folders at the end."""
    made: list[Path] = []
    try:
        made = make_folder(path.parent)
        # The suffix stays last: writers such as NumPy's append it where it is missing.
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
    except OSError as error:
        remove_empty(made)
        raise OutputError(
            f"cannot write {path}: {os_reason(error)}; choose a folder you can write to"
        ) from error
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        remove_empty(made)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


class RunFolder:
    """A folder to which all files of one run are moved together, once they are on disk.

    Files are first written to a staging folder inside the target. At the end of the `with` block
    they are renamed into place. A full disk or Ctrl-C therefore affects only the staging folder,
    and an older run survives. Only the files named here are ever replaced.

    Args:
        path: The folder; created where it is missing.
        names: The names of the files that this run writes.
        optional: Names of files that it may write. Those of an older run are removed in any case.
        overwrite: Replace the files of an earlier run.

    Raises:
        OutputError: The folder holds another run and `overwrite` is false, or it cannot be
            written.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[str],
        *,
        optional: Iterable[str] = (),
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.optional = tuple(optional)
        self.names = (*names, *self.optional)
        self._made: list[Path] = []
        try:
            self._check(overwrite)
            self._made = make_folder(path)
            self.staging = Path(tempfile.mkdtemp(prefix=".cascade-", dir=path))
        except OSError as error:
            remove_empty(self._made)
            raise OutputError(
                f"cannot write to {path}: {os_reason(error)}; choose a folder you can write to"
            ) from error

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
        try:
            if kind is None:
                self.commit()
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.path}: {os_reason(error)}; choose another --output "
                "(an older run there is unharmed)"
            ) from error
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
            remove_empty(self._made)

    def commit(self) -> None:
        """Rename the staged files into place: all of them or, on failure or Ctrl-C, none."""
        before = self.staging / "before"
        before.mkdir()
        with contextlib.ExitStack() as undo:
            for name in self.names:
                target, kept = self.path / name, before / name
                if target.exists():
                    undo.callback(_move_back, kept, target)
                    target.replace(kept)
                else:
                    undo.callback(target.unlink, missing_ok=True)
                if name in self.optional and not (self.staging / name).exists():
                    continue
                (self.staging / name).replace(target)
            undo.pop_all()

    def write(self, name: str, content: str | bytes) -> None:
        """Stage one file of the run.

        Raises:
            OutputError: The disk is full, or the folder was removed.
        """
        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            (self.staging / name).write_bytes(data)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path / name}: {os_reason(error)}; free some space or choose "
                "another --output (an older run there is unharmed)"
            ) from error


def _move_back(kept: Path, target: Path) -> None:
    if kept.exists():
        kept.replace(target)


def xxh3_of(path: Path) -> str:
    """Return the XXH3-128 of a file, in hexadecimal.

    The hash detects edits but not forgery. 540 MB take 0.1 s, against 1.7 s with SHA-256.

    Raises:
        OSError: The file cannot be read.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
