"""Stored records: JSON and `.npz` files, written atomically, read with checks, and hashed."""

from __future__ import annotations

import hashlib
import io
import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError, RecordError
from cascade.core.files import atomic_path, write_text
from cascade.core.printable import printable_json
from cascade.core.reading import UnreadableError, read_bytes, read_json
from cascade.core.reading import read_arrays as read_npz
from cascade.core.schema import SchemaError, StoredRecord, from_plain, to_plain

Record = dict[str, Any]

R = TypeVar("R", bound=StoredRecord)
T = TypeVar("T")


def to_json(value: Any, indent: int = 0) -> str:
    """Return readable JSON with one line per table row, so that a diff shows what changed.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    pad = " " * (indent + 1)
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        items = [f"{pad}{_scalar(k)}: {to_json(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [f"{pad}{to_json(item, indent + 1)}" for item in value]
        return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    # `operator.index` converts NumPy integers.
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=operator.index)
    return printable_json(text)


def sealed(record: Record | StoredRecord) -> Record:
    """Return a record as plain dictionaries, with the hash of its content as the last entry.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    plain: Record = to_plain(record)
    unsealed = {name: value for name, value in plain.items() if name != "hash"}
    return unsealed | {"hash": record_hash(plain)}


def to_file(record: Record | StoredRecord) -> str:
    """Return the content of a record's file: its JSON, sealed.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    return to_json(sealed(record)) + "\n"


def write_record(path: Path, record: Record | StoredRecord) -> None:
    """Write a record as JSON, sealed and atomically.

    Raises:
        OutputError: The file cannot be written.
        ValueError: A number is NaN or infinite.
    """
    write_text(path, to_file(record))


def read_plain(path: Path, kind: type[StoredRecord]) -> Record:
    """Read a record as plain dictionaries; only its kind, schema and hash are checked.

    Records of releases before the hash have none.

    Args:
        path: The JSON file.
        kind: The expected type.

    Raises:
        BrokenRecordError: The file is torn, edited or of another kind.
        RecordError: The file is missing or of a newer schema.
    """
    newest = kind.SCHEMA
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise RecordError(f"no record {path}; make one with `cascade {kind.COMMAND}`") from None
    except UnreadableError as error:
        raise BrokenRecordError(
            f"{path} is torn or edited ({error}); restore it or make it again"
        ) from error
    if not isinstance(record, dict) or record.get("kind") != kind.KIND:
        got = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise BrokenRecordError(f"{path}: expected a record of kind {kind.KIND}, got {got}")
    schema = record.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BrokenRecordError(
            f"{path} has schema {schema!r}, expected a whole number from 1 to {newest}; restore it "
            "or make it again"
        )
    if schema > newest:
        writer = at(record, ("provenance", "versions", "cascade-exit"))
        raise RecordError(
            f"{path} has schema {schema}, this release reads up to {newest}; use cascade-exit "
            f"{writer or 'of the release that wrote it'} or a later one, or make the record again"
        )
    check_hash(record, path)
    return record


def has_hash(record: Record) -> bool:
    """Return whether a record has a hash, which is its last entry. Older ones have none.

    Raises:
        SchemaError: The last entry is a hash under another name, so that name was changed.
    """
    if "hash" in record:
        return True
    name, value = next(reversed(record.items()), ("", None))
    if isinstance(value, str) and value.startswith("sha256:"):
        raise SchemaError(f"expected the last entry to be named hash, got {name[:40]!r}")
    return False


def check_hash(record: Record, path: Path) -> None:
    """Raise if a record was changed after it was sealed. Older records have no hash.

    Args:
        record: The record, as it was read.
        path: Its file, for the message.

    Raises:
        BrokenRecordError: The hash is another one, or cannot be computed.
    """
    try:
        if not has_hash(record):
            return
    except SchemaError as error:
        raise BrokenRecordError(
            f"{path} is torn or edited ({error}); restore it or make it again"
        ) from error
    try:
        found = record_hash(record)
    except ValueError as error:
        raise BrokenRecordError(
            f"{path} contains NaN or an infinite number, so it was edited or is torn; restore it"
        ) from error
    if record["hash"] != found:
        raise BrokenRecordError(
            f"{path} was changed after it was written (expected hash "
            f"{str(record['hash'])[:19]}..., got {found[:19]}...); restore it or make it again"
        )


def read_typed(path: Path, kind: type[R]) -> R:
    """Read a record of the given type.

    Args:
        path: The JSON file.
        kind: A subclass of `StoredRecord`.

    Raises:
        BrokenRecordError: The file is torn, edited or of another kind.
        RecordError: The file is missing or of a newer schema.
    """
    return typed(read_plain(path, kind), kind, path)


def typed(record: Record, kind: type[R], path: Path) -> R:
    """Convert the plain content of a file to a typed record.

    Values that earlier releases wrote under another name are read as today's.

    Raises:
        BrokenRecordError: A field is missing, has another type or contradicts another one.
    """
    try:
        found = from_plain(_renamed(record, kind), kind)
        flaw = found.inconsistency()
        if flaw is None:
            return found
        raise SchemaError(flaw)
    except SchemaError as error:
        raise BrokenRecordError(
            f"{path} is torn or edited ({error}); restore it, or make it again with "
            f"`cascade {kind.COMMAND}`"
        ) from error


def _renamed(record: Record, kind: type[StoredRecord]) -> Record:
    """Return a record whose values have today's names; see `StoredRecord.RENAMED`."""
    record = dict(record)
    for (rows, column), names in kind.RENAMED.items():
        found = record.get(rows)
        if isinstance(found, list):
            record[rows] = [_renamed_row(row, column, names) for row in found]
    return record


def _renamed_row(row: Any, column: str, names: Mapping[str, str]) -> Any:
    # Anything else is refused when the record is checked.
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        return row
    return row | {column: names.get(row[column], row[column])}


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to a compressed `.npz` file, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, Array]:
    """Read the arrays of an `.npz` file.

    Raises:
        BrokenRecordError: The file is missing or torn.
    """
    return _read(path, read_npz)


def read_arrays_file(path: Path) -> bytes:
    """Read an `.npz` file as it is, to copy it.

    Raises:
        BrokenRecordError: The file is missing or cannot be read.
    """
    return _read(path, read_bytes)


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except FileNotFoundError:
        raise BrokenRecordError(f"no file {path}; expected it next to its .json record") from None
    except UnreadableError as error:
        raise BrokenRecordError(f"{path} is torn ({error}); restore it or make it again") from error


def at(value: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of keys in nested dictionaries; None where a key is missing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def record_hash(record: Record) -> str:
    """Return a SHA-256 over all entries of a record except `hash`.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    bound = {name: value for name, value in record.items() if name != "hash"}
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode('utf-8')).hexdigest()}"


def packed(arrays: Mapping[str, Array]) -> bytes:
    """Return arrays as the bytes of a compressed `.npz` file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def arrays_hash(arrays: Mapping[str, Array]) -> str:
    """Return a SHA-256 over the names, types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return f"sha256:{digest.hexdigest()}"
