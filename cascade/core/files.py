"""Atomic writes: a reader sees either the old content of a file or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from cascade.core.errors import OutputError, os_reason
from cascade.core.locks import is_abandoned, mark_owned
from cascade.core.signals import delayed_signals

#: A path as users give it.
AnyPath = str | os.PathLike[str]

#: The beginning of the names of folders in the cache that are being made or deleted. Those that a
#: killed process left behind are removed when the next one is made there.
INCOMING = ".incoming-"

#: The characters that `tempfile` puts between prefix and suffix.
_RANDOM = 8


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

    Missing parent folders are created. The content is on disk before it gets its name. On any
    failure, including Ctrl-C, the temporary file and the created folders are removed, and `path`
    is unchanged. What a killed process left behind is removed at the next write of the same file.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    with _temporary_file(path) as temporary:
        try:
            yield temporary
            # mkstemp creates private files; results get the permissions of the user's other files.
            temporary.chmod(0o666 & ~_umask())
            flush_to_disk(temporary)
            temporary.replace(path)
            flush_to_disk(path.parent)
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
    # The suffix stays last: writers such as NumPy's append it where it is missing.
    prefix = f".{path.stem}-"
    try:
        made = make_folder(path.parent)
        _remove_abandoned(path.parent, prefix, path.suffix)
        handle, temporary = _owned(
            lambda: tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        )
    except OSError as error:
        remove_empty(made)
        raise OutputError(
            f"cannot write {path}: {os_reason(error)}; choose a folder you can write to"
        ) from error
    try:
        yield temporary
    finally:
        with delayed_signals():
            with contextlib.suppress(OSError):  # the next write of this file removes it
                temporary.unlink(missing_ok=True)
            os.close(handle)
            remove_empty(made)


@contextlib.contextmanager
def staging_folder(parent: Path, prefix: str = ".cascade-") -> Iterator[Path]:
    """Yield a new private folder in `parent`; remove it at the end, with everything inside.

    Folders with this prefix that a killed process left behind are removed first.

    Args:
        parent: An existing folder.
        prefix: The beginning of the folder's name.

    Raises:
        OSError: The folder cannot be created.
    """
    _remove_abandoned(parent, prefix, "")

    def made() -> tuple[int, str]:
        name = tempfile.mkdtemp(prefix=prefix, dir=parent)
        return os.open(name, os.O_RDONLY), name

    handle, folder = _owned(made)
    try:
        yield folder
    finally:
        with delayed_signals():
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _owned(make: Callable[[], tuple[int, str]]) -> tuple[int, Path]:
    """Return a new path that is marked as in use, and the open handle that marks it."""
    while True:
        handle, name = make()
        if mark_owned(handle):
            return handle, Path(name)
        os.close(handle)  # taken for a leftover before it was marked


def _remove_abandoned(folder: Path, prefix: str, suffix: str) -> None:
    """Remove the temporary files and folders that killed processes left behind."""
    length = len(prefix) + _RANDOM + len(suffix)
    with os.scandir(folder) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if len(entry.name) == length
            and entry.name.startswith(prefix)
            and entry.name.endswith(suffix)
        ]
    for path in found:
        if is_abandoned(path):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def flush_to_disk(path: Path) -> None:
    """Make the system write a file or the entries of a folder to disk, and wait for it.

    Raises:
        OSError: The disk is full or broken.
    """
    if os.name == "nt" and path.is_dir():  # Windows has no such call for folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted by path.

    Raises:
        OSError: A folder cannot be listed; `Path.rglob` would leave out what is in it.
    """

    def fail(error: OSError) -> None:
        raise error

    return sorted(
        Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names
    )


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes, without waiting for anything else of that name.

    Raises:
        OSError: There is no such file, it cannot be read, or it is a folder, a pipe, a socket or a
            device. Reading a pipe would wait for a writer, and reading a device may never end.
    """
    # A pipe is opened at once, and regular files ignore the flag.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"expected a regular file, got {kind_of_file(mode)}")
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def kind_of_file(mode: int) -> str:
    """Return what is no regular file in words, by its mode."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def xxh3_of(path: Path) -> str:
    """Return the XXH3-128 of a file, in hexadecimal.

    The hash detects edits but not forgery. 540 MB take 0.1 s, against 1.7 s with SHA-256.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: The file cannot be read, or is no regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
