"""A corpus from standard input or a pipe: text, or JSON Lines."""

from __future__ import annotations

import functools
import io
import json
import os
import stat
import sys
import tempfile
import weakref
from dataclasses import dataclass
from typing import IO, Any

from cascade.core.errors import CorpusError
from cascade.core.files import kind_of_file

#: The name of standard input as a corpus.
STANDARD_INPUT = "-"

#: Bytes that are read at a time.
_CHUNK = 1 << 16


def is_pipe(source: str) -> bool:
    """Return whether a source is standard input or a named pipe, such as `<(zcat text.gz)`."""
    if source == STANDARD_INPUT:
        return True
    found = _mode_of(source)
    return found is not None and stat.S_ISFIFO(found)


def check_no_device(source: str) -> None:
    """Check that a source is no device and no socket, which may have no end.

    Raises:
        CorpusError: It is one.
    """
    found = _mode_of(source)
    if found is not None and not (
        stat.S_ISREG(found) or stat.S_ISDIR(found) or stat.S_ISFIFO(found)
    ):
        raise CorpusError(
            f"expected a corpus in a file, a folder or a pipe, got {kind_of_file(found)} "
            f"{source}; name a file, or give - for standard input"
        )


def _mode_of(source: str) -> int | None:
    try:
        return os.stat(source).st_mode
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class PipedFile:
    """What a pipe holds, as a file that can be read several times.

    Attributes:
        source: "-" or the path of a pipe.
        kind: "JSON" if the first line begins a JSON object or array, else "text".
    """

    source: str
    kind: str
    compression: str = ""

    def __str__(self) -> str:
        return "standard input" if self.source == STANDARD_INPUT else self.source

    def open_bytes(self) -> io.RawIOBase:
        """Return the bytes from the beginning."""
        return _Replayed(_kept(self.source))


def piped_file(source: str) -> PipedFile:
    """Return what a pipe holds.

    Args:
        source: "-" or the path of a pipe.

    Raises:
        CorpusError: Standard input is a terminal, or the pipe cannot be read.
    """
    if source == STANDARD_INPUT and sys.stdin.isatty():
        raise CorpusError(
            "expected text on standard input, got a terminal; pipe a file into the command"
        )
    head = _Replayed(_kept(source)).read(_CHUNK) or b""
    return PipedFile(source, "JSON" if _is_json(head) else "text")


def _is_json(head: bytes) -> bool:
    """Return whether text begins with an object or an array, or with the beginning of one."""
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    if not text.startswith(("{", "[")):
        return False
    line = text.splitlines()[0]
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line) - 1 or error.msg.startswith("Unterminated")
    except RecursionError:
        return True
    return True


class _Kept:
    """What was read of a pipe, in a temporary file."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        weakref.finalize(self, self._file.close)
        self._length = 0

    def read(self, at: int, most: int) -> bytes:
        """Return some bytes from a place on, none at the end."""
        if at == self._length:
            # One chunk at a time, because a pipe need not end.
            chunk = b"" if self._pipe.closed else self._pipe.read(most)
            self._file.seek(at)
            self._file.write(chunk)
            self._length += len(chunk)
            if not chunk and self._pipe is not sys.stdin.buffer:
                self._pipe.close()
            return chunk
        self._file.seek(at)
        return self._file.read(most)


@functools.cache
def _kept(source: str) -> _Kept:
    if source == STANDARD_INPUT:
        return _Kept(sys.stdin.buffer)
    try:
        return _Kept(open(source, "rb"))
    except OSError as error:
        raise CorpusError(f"cannot read {source}: {error.strerror}; give a file") from error


class _Replayed(io.RawIOBase):
    """The bytes of a pipe, from its beginning."""

    def __init__(self, kept: _Kept) -> None:
        self._kept, self._at = kept, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._kept.read(self._at, len(buffer))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
