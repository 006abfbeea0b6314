"""Faults of files: a command is run in a child process that fails or dies at one file operation."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What can happen at a file operation: the process is killed, or the system refuses.
KINDS = ("kill", "ENOSPC", "EIO", "EACCES")

#: Audit events of operations on files.
_EVENTS = frozenset(
    (
        "open",
        "os.rename",
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

#: A command that has not ended by then hangs.
_HANGS_AFTER = 120.0


@dataclass(frozen=True)
class Fault:
    """What happens at which file operation.

    Attributes:
        operation: Its number, from 1.
        kind: One of `KINDS`.
    """

    operation: int
    kind: str


@dataclass(frozen=True)
class Attempt:
    """How a command ended in its child process.

    Attributes:
        status: Its exit status; 137 if it was killed.
        err: What it wrote to stderr.
        operations: The number of file operations in the watched folder, if it ended by itself.
    """

    status: int
    err: str
    operations: int


def attempt(command: Callable[[], int], watched: Path, fault: Fault | None) -> Attempt:
    """Run a command in a forked child, with a fault at one of its file operations.

    Args:
        command: Runs the command and returns its exit status.
        watched: Operations on files below this folder count, corpora excepted.
        fault: The fault; None to only count.
    """
    report = watched.parent / f"report-{os.getpid()}"
    report.write_text("")
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = _in_child(command, watched, fault, report)
        finally:
            os._exit(status)
    status = _status_of(child)
    count, _, err = report.read_text(encoding="utf-8", errors="replace").partition("\n")
    report.unlink()
    return Attempt(status, err, int(count or 0))


def _status_of(child: int) -> int:
    end = time.monotonic() + _HANGS_AFTER
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the command hangs: no end after {_HANGS_AFTER:.0f} s")


def _in_child(command: Callable[[], int], watched: Path, fault: Fault | None, report: Path) -> int:
    handle = os.open(report, os.O_RDWR)
    os.write(handle, b"\n")
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(os.dup(handle), "w", encoding="utf-8")  # noqa: SIM115
    count = 0
    armed = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, armed
        if (
            not armed
            or event not in _EVENTS
            or not _is_watched(arguments[: 1 + (event == "os.rename")], watched)
        ):
            return
        count += 1
        if fault is not None and count == fault.operation:
            armed = False
            if fault.kind == "kill":
                os._exit(137)
            number = getattr(errno, fault.kind)
            # As the system does: only operations on a path know its name.
            name = () if event == "cascade.fsync" else (str(arguments[0]),)
            raise OSError(number, os.strerror(number), *name)

    synchronize = os.fsync

    def audited_fsync(handle: int) -> None:
        sys.audit("cascade.fsync", os.readlink(f"/proc/self/fd/{handle}"))
        synchronize(handle)

    os.fsync = audited_fsync  # type: ignore[assignment]
    sys.addaudithook(watch)
    status = command()
    armed = False
    sys.stderr.flush()
    written = os.pread(handle, 1 << 20, 0).lstrip(b"\n")
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{count}\n".encode() + written, 0)
    return status


def _is_watched(arguments: tuple[Any, ...], watched: Path) -> bool:
    for argument in arguments:
        if isinstance(argument, bytes):
            argument = os.fsdecode(argument)
        if isinstance(argument, str | os.PathLike):
            path = os.path.abspath(argument)
            if path.startswith(f"{watched}{os.sep}") and not path.endswith(".jsonl"):
                return True
    return False
