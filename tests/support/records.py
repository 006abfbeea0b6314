"""Stored records that a test edits: with a valid hash, so that other checks are reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade.core.records import sealed


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Write a record with the hash of its content."""
    path.write_text(json.dumps(sealed(record)), encoding="utf-8")


def edit_sealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a stored record and seal it again."""
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    write_sealed(path, record)
