"""Reading checkpoints quietly, with one-line errors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cascade.core.errors import CascadeError, ModelError, first_line, os_reason


def file_hash(path: Path) -> str:
    """Return the hex SHA-256 of a file.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {os_reason(error)}; get the checkpoint again"
        ) from error


def transformers_version() -> str:
    """Return the version of the installed `transformers`."""
    return importlib.metadata.version("transformers")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's messages, warnings and progress bars."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(
                nowhere
            ),  # the GGUF reader's progress bar cannot be disabled
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_or_explain(what: str, read: Callable[[], Any], *, advice: str | None = None) -> Any:
    """Call `read` and turn any error of a damaged checkpoint into a one-line error.

    Args:
        what: What is read, for the error.
        read: Reads it.
        advice: What to do where it fails. Default: get the checkpoint again.

    Raises:
        ModelError: `read` failed.
    """
    try:
        with quiet_transformers():
            return read()
    except CascadeError:
        raise
    except Exception as error:
        reason = first_line(error).rstrip(".")
        remedy = advice or "get the checkpoint again"
        if isinstance(error, ImportError):
            remedy = "install the package that it names"
        elif "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, which is never run"
            remedy = f"expected an architecture of transformers {transformers_version()}; update it"
        raise ModelError(f"cannot read {what}: {reason}; {remedy}") from error
