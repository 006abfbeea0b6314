"""Opening corpus files: decompressing and decoding them as a stream."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, TextIO

from cascade.core.errors import CorpusError, first_line, os_reason
from cascade.corpora.files.kinds import CorpusFile

#: Bytes by which the encoding is recognized.
_HEAD = 4096

#: Byte order marks, longest first, and the encoding that each stands for.
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@contextlib.contextmanager
def open_text(file: CorpusFile, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, which is decompressed and decoded as it is read.

    A byte order mark names the encoding; without one it is UTF-8.

    Args:
        file: The file, or `StandardInput`.
        newline: As for `open`.

    Raises:
        CorpusError: It cannot be read, is compressed and damaged, or is in another encoding; also
            for such errors in the body of the `with` statement.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(contextlib.closing(open_bytes(file)))
            buffered = io.BufferedReader(raw, buffer_size=1 << 16)
            head = buffered.peek(_HEAD)[:_HEAD]
            yield io.TextIOWrapper(buffered, _encoding(file, head), newline=newline)
    except UnicodeError as error:
        raise CorpusError(
            f"{file}: expected UTF-8 text ({first_line(error)}); convert it: iconv -f LATIN1 -t "
            "UTF-8, or the encoding that it has"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if file.compression and error.errno is None:
            raise _damaged(file, error) from error
        raise CorpusError(
            f"cannot read {file}: {os_reason(error)}; choose a file you can read"
        ) from error


def open_bytes(file: CorpusFile) -> Any:
    """Return the decompressed bytes of a file, as a raw stream.

    Raises:
        OSError: It cannot be read.
    """
    opened = getattr(file, "open_bytes", None)
    if opened is not None:
        return opened()
    if file.compression == ".zst":
        import pyarrow

        with open(file.path, "rb"):  # for an error with its number
            pass
        return pyarrow.input_stream(str(file.path), compression="zstd")
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    raw: IO[bytes] = (
        openers[file.compression](file.path, "rb")
        if file.compression
        else open(file.path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
    )
    return raw


def _encoding(file: CorpusFile, head: bytes) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if not head.strip(b"\0") and head:
        raise CorpusError(f"{file}: expected UTF-8 text, got bytes of zero; get it again")
    # In UTF-16 every other byte of English text is NUL.
    half = len(head) // 2
    nuls = [head[parity::2].count(0) for parity in (0, 1)]
    for parity, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if half and nuls[parity] > half / 4 and nuls[1 - parity] <= half / 50:
            raise CorpusError(
                f"{file}: expected UTF-8 text, got {name} without a byte order mark; convert it: "
                f"iconv -f {name} -t UTF-8"
            )
    return "utf-8-sig"


def _damaged(file: CorpusFile, error: Exception) -> CorpusError:
    return CorpusError(
        f"{file} is not a readable {file.compression} file ({first_line(error)}); get it again"
    )
