"""The folder in which an engine keeps what tasks have finished, until all of them have."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cascade.core.errors import OutputError, os_reason
from cascade.core.files import make_folder, remove_empty, write_text
from cascade.core.locks import locked
from cascade.core.reading import UnreadableError, read_json

#: What the finished tasks were made for. Only the same can continue.
REQUEST = "request.json"

#: What is asked for, by name: numbers, texts and None.
Request = Mapping[str, Any]


@contextlib.contextmanager
def working_folder(
    folder: Path, request: Request, *, overwrite: bool, doing: str
) -> Iterator[Path]:
    """Yield a folder for finished tasks.

    It stays, so that the same command continues, until `discard` removes it. One that holds nothing
    is removed in any case.

    Args:
        folder: The folder.
        request: Everything that a finished task depends on.
        overwrite: Replace a folder of another request.
        doing: What the command does, for messages, e.g. "measuring into run".

    Raises:
        OutputError: The folder is of another request and `overwrite` is false, another process uses
            it, or it cannot be written.
    """
    plain = json.loads(json.dumps(request, allow_nan=False))
    with locked(folder, doing=doing):
        try:
            made = make_folder(folder)
            difference = _difference(folder, plain)
            if difference is not None and not overwrite:
                raise OutputError(
                    f"{folder.parent} holds unfinished work with other arguments ({difference}):"
                    " continue with those, choose another --output, or replace it with --overwrite"
                )
            if difference is not None:
                shutil.rmtree(folder)
                folder.mkdir()
            if not (folder / REQUEST).exists():
                write_text(folder / REQUEST, json.dumps(plain, indent=1, allow_nan=False) + "\n")
            yield folder
        except OSError as error:
            raise OutputError(
                f"cannot write to {folder}: {os_reason(error)}; free some space or make it"
                " writable, and run the same command again"
            ) from error
        finally:
            if _is_untouched(folder):
                shutil.rmtree(folder, ignore_errors=True)
                remove_empty(made)


def discard(folder: Path) -> None:
    """Remove a working folder whose results are stored."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_untouched(folder: Path) -> bool:
    """Return whether a folder holds no finished task and no plan."""
    try:
        return all(path.name == REQUEST for path in folder.iterdir())
    except OSError:
        return False


def _difference(folder: Path, request: Request) -> str | None:
    """Describe the first difference of the request that a folder was made for; None for none."""
    try:
        before = read_json(folder / REQUEST)
    except FileNotFoundError:
        return None if not any(folder.iterdir()) else f"its {REQUEST} is missing"
    except UnreadableError:
        return f"its {REQUEST} is torn"
    if not isinstance(before, dict):
        return f"its {REQUEST} is torn"
    for name in {**request, **before}:
        if before.get(name) != request.get(name):
            return f"{name}: {before.get(name)}, now {request.get(name)}"
    return None
