"""Reading stored files: each format in one function, which gives one error for whatever is broken.

A file can be torn, edited or forged: a pipe under its name, a header that claims more than there
is, JSON that nests a thousand times. Libraries answer these with a dozen types of errors, with a
hang or by taking all memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.core.errors import first_line, os_reason
from cascade.core.files import open_regular
from cascade.core.run_folder import current

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.core.arrays import Array

#: The largest JSON file that is read, in bytes. The largest record so far has 2 MB.
LARGEST_JSON = 1 << 26
LARGEST_FOREIGN_JSON = 1 << 28

#: An archive may claim this much, or `_MOST_COMPRESSED` times its own size if that is more, but
#: never more than `_LARGEST_ARRAYS`: a profile of a million sequences and 100 layers has 0.8 GB.
_SMALL_ARCHIVE, _MOST_COMPRESSED, _LARGEST_ARRAYS = 1 << 26, 20, 1 << 30

#: Half of a pair of escapes that stand for one character together. No file can hold it.
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_ESCAPED_BACKSLASHES = re.compile(r"\\\\")


class UnreadableError(ValueError):
    """A file cannot be read as what it should be; the message is one line that says why."""


def read_bytes(path: Path, *, largest: int | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        largest: The largest size that such a file can have, in bytes.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is no regular file, too large, or cannot be read.
    """
    with _one_error(), open_regular(current(path)) as file:
        size = os.fstat(file.fileno()).st_size
        if largest is not None and size > largest:
            raise UnreadableError(f"expected at most {largest:,} bytes, got {size:,}")
        return file.read()


def read_json(path: Path, *, foreign: bool = False) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        foreign: Whether other programs write such files. Then a key may be there twice, the last
            one counts, and a file may be larger: tokenizers have tens of megabytes.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is not JSON, or an object in it has a key twice.
    """
    data = read_bytes(path, largest=LARGEST_FOREIGN_JSON if foreign else LARGEST_JSON)
    return parse_json(data, foreign=foreign)


def parse_json(data: str | bytes, *, foreign: bool = False) -> Any:
    """Return the value of JSON text.

    Args:
        data: The text; bytes are UTF-8.
        foreign: Whether other programs write such text, see `read_json`.

    Raises:
        UnreadableError: It is not JSON, or an object in it has a key twice.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        if not foreign and "\\u" in text and _HALF.search(_ESCAPED_BACKSLASHES.sub("", text)):
            raise UnreadableError("it holds half of a character (a lone surrogate)")
        return json.loads(text, object_pairs_hook=None if foreign else _without_duplicates)
    except UnreadableError:
        raise
    except RecursionError as error:
        raise UnreadableError("its objects are nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise UnreadableError(first_line(error)) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"the key {twice[:40]!r} is there twice")
    return found


def read_arrays(path: Path) -> dict[str, Array]:
    """Return the arrays of an `.npz` file, whose declared sizes are checked first.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is torn, or an entry does not have the size that it declares.
    """
    with (
        _one_error(),
        open_regular(current(path)) as file,
        zipfile.ZipFile(file) as archive,
    ):
        length = os.fstat(file.fileno()).st_size
        entries = archive.infolist()
        declared = sum(entry.file_size for entry in entries)
        most = min(max(_SMALL_ARCHIVE, _MOST_COMPRESSED * length), _LARGEST_ARRAYS)
        if declared > most:
            raise UnreadableError(
                f"its entries declare {declared:,} bytes, expected at most {most:,} in a file"
                f" of {length:,}"
            )
        # The other methods of zipfile take memory before they compare sizes.
        methods = {entry.compress_type for entry in entries}
        if not methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise UnreadableError("expected entries that are stored or deflated")
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise UnreadableError("an entry is there twice")
        return {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in entries}


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turn what libraries raise for torn files, more than ten types, into an `UnreadableError`."""
    try:
        yield
    except (FileNotFoundError, UnreadableError):
        raise
    except OSError as error:
        raise UnreadableError(os_reason(error)) from error
    except Exception as error:
        raise UnreadableError(first_line(error)) from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Array:
    """Return one entry of an archive as an array."""
    import numpy as np

    content = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(content)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise UnreadableError(f"{entry.filename} has the unknown version {version}")
    shape, _, dtype = read_header(content)
    start, total = content.tell(), content.getbuffer().nbytes
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or size != total - start:
        raise UnreadableError(
            f"{entry.filename} declares {size:,} bytes of {dtype}, but holds {total - start:,}"
        )
    content.seek(0)
    array: Array = np.lib.format.read_array(content, allow_pickle=False)
    return array


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Return the tensors and the metadata of a safetensors file, in memory of their own.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is torn, or no regular file.
    """
    with _opened_tensors(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def check_tensors(path: Path) -> None:
    """Check the header and the size of a safetensors file, without reading its tensors.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableError: It is torn, or no regular file.
    """
    with _opened_tensors(path):
        pass


@contextlib.contextmanager
def _opened_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file inside a `with` block, whose errors are those of the file."""
    from safetensors import safe_open

    with _one_error():
        found = current(path)
        with open_regular(found):  # safetensors would wait for a pipe
            pass
        with safe_open(found, framework="pt") as file:
            yield file
