"""The kinds of stored records: reading any of them, and their JSON Schemas."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from cascade.core.records import read_typed
from cascade.core.schema import StoredRecord

#: Kind -> module and class of its type; loaded on first use.
KINDS: dict[str, tuple[str, str]] = {}


def record_type(kind: str) -> type[StoredRecord]:
    """Return the type of records of a kind.

    Raises:
        ValueError: There is no such kind; names those that there are.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of record among {', '.join(KINDS)}, got {kind!r}")
    module, name = KINDS[kind]
    found: type[StoredRecord] = getattr(import_module(f"cascade.{module}"), name)
    return found


def read_record(path: Path | str, *, kind: str) -> StoredRecord:
    """Read and check a stored record.

    Args:
        path: Its JSON file.
        kind: E.g. "evaluation".

    Raises:
        RecordError: The file is missing, torn, of another kind or of a newer schema.
        ValueError: There is no such kind.
    """
    return read_typed(Path(path), record_type(kind))


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of records of a kind.

    Raises:
        ValueError: There is no such kind.
    """
    return msgspec.json.schema(record_type(kind))
