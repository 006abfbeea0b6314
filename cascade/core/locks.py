"""Locks: which process writes to a folder, and whether the owner of a leftover still lives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.core.cache import cache_folder
from cascade.core.errors import OutputError, os_reason

if TYPE_CHECKING:
    from filelock import FileLock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Waiting for another process is announced after this many seconds.
_ANNOUNCED_AFTER = 2.0

#: More lock files than these are sorted out: those that nobody has used for a day go.
_MANY_LOCKS, _DAY = 256, 24 * 3600.0


@contextlib.contextmanager
def locked(path: Path, *, wait: float = 0.0, doing: str = "writing to") -> Iterator[None]:
    """Hold the lock of a path inside a `with` block. The path need not exist.

    Locks are files in the user's cache folder, so that other users cannot hold them.

    Args:
        path: The file or folder to lock.
        wait: The seconds to wait for another process. After two of them, one line on stderr says
            so.
        doing: What the holder of the lock does with the path, for messages.

    Raises:
        OutputError: Another process still holds the lock, or no lock can be created.
    """
    from filelock import FileLock

    name = hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()
    try:
        lock = FileLock(_lock_folder() / f"{name[:32]}.lock", mode=0o600)
        _acquire(lock, path, wait, doing)
    except OSError as error:
        raise OutputError(
            f"cannot lock {path}: {os_reason(error)}; set CASCADE_CACHE to a folder that you can"
            " write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, wait: float, doing: str) -> None:
    from filelock import Timeout

    first = min(wait, _ANNOUNCED_AFTER)
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=first)
        return
    if wait > first:
        sys.stderr.write(f"cascade: waiting for another process that is {doing} {path}\n")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=wait - first)
            return
    still = f" still after {wait:.0f} seconds" if wait else ""
    raise OutputError(
        f"another process is {doing} {path}{still}; wait for it to end, or choose another place"
    )


def _lock_folder() -> Path:
    """Return the folder of the lock files, creating it.

    It is in the cache folder, or in a private folder of the system's folder for temporary files
    where the cache folder cannot be written to.

    Raises:
        OSError: Neither folder can be created.
    """
    folder = cache_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError:
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        folder = Path(tempfile.gettempdir()) / f"cascade-locks-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
            raise
    _sort_out(folder)
    return folder


def _sort_out(folder: Path) -> None:
    """Remove old lock files that nobody holds, where there are many."""
    files = list(folder.glob("*.lock"))
    if len(files) <= _MANY_LOCKS:
        return
    oldest = time.time() - _DAY
    for file in files:
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest and is_abandoned(file):
                file.unlink()


# --- Leftovers ------------------------------------------------------------------------------


def mark_owned(handle: int) -> bool:
    """Lock an open file or folder for as long as it stays open, to show that its owner lives.

    Args:
        handle: A file descriptor.

    Returns:
        False if the path was removed in the meantime, by a process that took it for a leftover.
    """
    if fcntl is not None:
        # A file system without locks has no leftovers that can be told from files in use.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.fstat(handle).st_nlink > 0


def is_abandoned(path: Path) -> bool:
    """Return whether nobody holds a file or folder that was marked by `mark_owned`.

    False where this cannot be known.
    """
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
