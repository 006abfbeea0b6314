"""Faults of files: a command is run in a forked child that fails or dies at one file operation.

What is covered. Python announces its operations on files to audit hooks: opening for reading and
writing, renaming, removing, making and listing folders, changing modes, truncating. `os.fsync` is
not announced and is wrapped. Each of these can be refused, or be the moment of a kill. Writing
itself is not announced, and safetensors, Arrow and torch open and write files in native code. Both
are failed by a limit on the size of files (RLIMIT_FSIZE), which holds for every `write` of the
process, whoever calls it: the system refuses what exceeds the limit (kind "full", `EFBIG`, and all
later writes fail too, as on a full disk), or kills the process in the middle of the write (kind
"torn"). A power cut is a kill after which every file that was not flushed since it was last written
is empty (kind "power cut"); renames are taken to be kept in order, as file systems with a journal
keep them.

What is not covered: `stat` that fails (`os.path.exists` and its like), a refused open, rename or
read inside native code (it is only killed in between), and a `write` that fails with `EIO` before
the `fsync` does.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

#: Refusals of the system, at one operation.
REFUSALS = ("ENOSPC", "EIO", "EACCES")
#: Kinds that end the process, without any clean-up.
DEATHS = ("kill", "power cut", "torn")
#: What can happen at any file operation.
ANYWHERE = ("kill", "power cut", *REFUSALS)
#: What can happen in the middle of a write after a file was opened for writing.
IN_A_WRITE = ("torn", "full")

#: The bytes that a file may still have after a fault of a write.
_FITS = 64

#: Audit events of operations on files.
_EVENTS = frozenset(
    (
        "open",
        "os.rename",
        "os.link",
        "os.symlink",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.chmod",
        "os.truncate",
        "os.scandir",
        "os.listdir",
        "cascade.fsync",
    )
)
_OF_TWO_PATHS = ("os.rename", "os.link", "os.symlink")
#: Their last argument is a handle of the folder that the path is in, or -1.
_IN_FOLDERS = ("os.remove", "os.rmdir", "os.mkdir")

#: A command that has not ended by then hangs.
_HANGS_AFTER = 120.0

#: What `tempfile` puts into names.
_RANDOM_PART = re.compile(r"((?:^|/)\.[^/]*-)[a-z0-9_]{8}(?=[./]|$)")


@dataclass(frozen=True)
class Operation:
    """One operation on a file.

    Attributes:
        event: The name of the audit event.
        path: The path, relative to the watched folder; what is random in it is "*".
        writes: Whether content may be written after it.
    """

    event: str
    path: str
    writes: bool

    @property
    def removes(self) -> bool:
        """Whether it may belong to removing what a failed command leaves."""
        return self.event in ("os.remove", "os.rmdir", "os.scandir", "os.listdir") or (
            self.event == "open" and not self.writes
        )


@dataclass(frozen=True)
class Fault:
    """What happens at which file operation.

    Attributes:
        operation: Its number, from 1.
        kind: One of `ANYWHERE` or `IN_A_WRITE`.
    """

    operation: int
    kind: str


@dataclass(frozen=True)
class Attempt:
    """How a command ended in its child process.

    Attributes:
        status: Its exit status; negative if a signal killed it.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        operations: Its file operations in the watched folder, if it ended by itself.
    """

    status: int
    out: str = ""
    err: str = ""
    operations: tuple[Operation, ...] = ()


def kinds_of(operation: Operation) -> tuple[str, ...]:
    """Return what can happen at an operation."""
    return (*ANYWHERE, *(IN_A_WRITE if operation.writes else ()))


def attempt(command: Callable[[], int], watched: Path, fault: Fault | None = None) -> Attempt:
    """Run a command in a forked child, with a fault at one of its file operations.

    Args:
        command: Runs the command and returns its exit status.
        watched: Operations on files below this folder count.
        fault: The fault; None to only list the operations.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside idle threads
        child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            sent = _in_child(command, watched, fault)
            with open(writing, "wb") as pipe:
                pipe.write(sent)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        sent = _read_to_end(reading, child)
    finally:
        os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not sent:
        return Attempt(status)
    found = json.loads(sent)
    operations = tuple(Operation(*each) for each in found.pop("operations"))
    return Attempt(**found, operations=operations)


def _read_to_end(handle: int, child: int) -> bytes:
    end, chunks = time.monotonic() + _HANGS_AFTER, []
    while True:
        ready, _, _ = select.select([handle], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the command hangs: no end after {_HANGS_AFTER:.0f} s")
        chunk = os.read(handle, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _in_child(command: Callable[[], int], watched: Path, fault: Fault | None) -> bytes:
    gc.freeze()  # what the parent made need not be looked through
    sys.stdout, sys.stderr = StringIO(), StringIO()
    watch = _Watch(watched, fault)
    synchronize = os.fsync

    def audited_fsync(handle: int) -> None:
        # Without waiting for the disk: only a power cut would show the difference.
        os.fstat(handle)
        sys.audit("cascade.fsync", os.readlink(f"/proc/self/fd/{handle}"))
        watch.flushed(handle)

    os.fsync = audited_fsync  # type: ignore[assignment]
    sys.addaudithook(watch)
    try:
        status = command()
    except Exception:
        status = 70
        sys.stderr.write(traceback.format_exc())
    watch.armed = False
    os.fsync = synchronize
    found = {
        "status": status,
        "out": sys.stdout.getvalue(),
        "err": sys.stderr.getvalue(),
        "operations": watch.operations,
    }
    return json.dumps(found).encode()


class _Watch:
    """An audit hook that lists operations on files below a folder and fails one of them."""

    def __init__(self, watched: Path, fault: Fault | None) -> None:
        self.watched, self.fault = f"{watched}{os.sep}", fault
        self.armed = True
        self.operations: list[tuple[str, str, bool]] = []
        self._on_disk = {_state(entry) for entry in _files(watched)}

    def flushed(self, handle: int) -> None:
        """Note that the content of an open file is on disk."""
        self._on_disk.add(_state(os.fstat(handle)))

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event not in _EVENTS:
            return
        paths = [_path_of(each) for each in arguments[: 1 + (event in _OF_TWO_PATHS)]]
        if event in _IN_FOLDERS and arguments[-1] >= 0:
            paths = [os.path.join(_path_of(arguments[-1]), arguments[0])]
        found = [path for path in paths if path.startswith(self.watched)]
        if not found:
            return
        writes = event == "os.mkdir" or (
            event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        )
        name = _RANDOM_PART.sub(r"\1*", found[-1].removeprefix(self.watched))
        self.operations.append((event, name, writes))
        if self.fault is not None and len(self.operations) == self.fault.operation:
            self._happen(self.fault.kind, event, arguments)

    def _happen(self, kind: str, event: str, arguments: tuple[Any, ...]) -> None:
        if kind in IN_A_WRITE:
            action = signal.SIG_DFL if kind == "torn" else signal.SIG_IGN
            signal.signal(signal.SIGXFSZ, action)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FITS, resource.RLIM_INFINITY))
            return
        self.armed = False
        if kind == "power cut":
            for path in _files(Path(self.watched)):
                if not path.is_symlink() and _state(path) not in self._on_disk:
                    os.truncate(path, 0)
        if kind in DEATHS:
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, kind)
        # As the system does: only operations on a path know its name.
        named = event != "cascade.fsync" and not isinstance(arguments[0], int)
        raise OSError(number, os.strerror(number), *((str(arguments[0]),) if named else ()))


def _files(folder: Path) -> Iterable[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _state(file: Path | os.stat_result) -> tuple[int, int, int]:
    found = file if isinstance(file, os.stat_result) else file.lstat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _path_of(argument: Any) -> str:
    if isinstance(argument, int):
        try:
            return os.readlink(f"/proc/self/fd/{argument}")
        except OSError:
            return ""
    if isinstance(argument, bytes):
        argument = os.fsdecode(argument)
    return os.path.abspath(argument) if isinstance(argument, str | os.PathLike) else ""


def contents(folders: Sequence[Path]) -> dict[str, bytes | None]:
    """Return everything below some folders, by path; what is random in names is "*"."""
    return {
        _RANDOM_PART.sub(r"\1*", f"{folder.name}/{path.relative_to(folder)}"): (
            os.readlink(path).encode()
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }
