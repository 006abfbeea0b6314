"""Reading checkpoints quietly, with one-line errors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade.core.errors import CascadeError, ModelError, first_line, os_reason
from cascade.core.files import sha256_of

_CORRECT = "correct config.json"


def file_hash(path: Path) -> str:
    """Return the hex SHA-256 of a file.

    Raises:
        ModelError: The file cannot be read, or is no regular file.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def cannot_read(path: Path, error: OSError) -> ModelError:
    """Return the error for a file of a checkpoint that the system cannot read."""
    denied = isinstance(error, PermissionError)
    remedy = "change its permissions" if denied else "get the checkpoint again"
    return ModelError(f"cannot read {path}: {os_reason(error)}; {remedy}")


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it.

    Example:
        >>> is_installed("torch"), is_installed("no.such.module")
        (True, False)
    """
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent is absent, or the module is blocked
        return False


def transformers_version() -> str:
    """Return the version of the installed `transformers`."""
    return importlib.metadata.version("transformers")


class _Nowhere(io.TextIOBase):
    """A stream that drops its text. It is no file, so that a library that keeps it can write on."""

    def write(self, text: str) -> int:
        return len(text)


class _Messages(logging.Handler):
    """Keeps the messages of a library instead of showing them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """Silence the libraries' messages, warnings and progress bars, and yield the messages.

    Example:
        >>> with quiet_transformers() as messages:
        ...     print("unseen")
        >>> messages
        []
    """
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()  # adds the library's own handler first
    bars = transformers_logging.is_progress_bar_enabled()
    logger, kept = logging.getLogger("transformers"), _Messages()
    handlers, logger.handlers = logger.handlers, [kept]
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            # Some progress bars and banners cannot be disabled.
            contextlib.redirect_stderr(_Nowhere()),
            contextlib.redirect_stdout(_Nowhere()),
        ):
            warnings.simplefilter("ignore")
            yield kept.texts
    finally:
        logger.handlers = handlers
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_or_explain(what: str, read: Callable[[], Any], *, advice: str | None = None) -> Any:
    """Call `read` and turn any error of a damaged checkpoint into a one-line error.

    Args:
        what: What is read, for the error.
        read: Reads it.
        advice: What to do where it fails. Default: get the checkpoint again.

    Raises:
        ModelError: `read` failed.
    """
    messages: list[str] = []
    try:
        with quiet_transformers() as messages:
            return read()
    except CascadeError:
        raise
    except Exception as error:
        reason, remedy = _explained(error, messages)
        raise ModelError(
            f"cannot read {what}: {reason}; {remedy or advice or 'get the checkpoint again'}"
        ) from error


def _explained(error: Exception, messages: Sequence[str]) -> tuple[str, str | None]:
    """Return the reason for an error in one line, and what to do about it, if it says so."""
    text = str(error)
    if "trust_remote_code" in text:
        remedy = f"expected an architecture of transformers {transformers_version()}; update it"
        return "it needs Python code of its own, which is never run", remedy
    if "weights_only" in text:
        return (
            "its .bin files hold Python objects in addition to tensors, which are never loaded",
            "get the model as safetensors",
        )
    if isinstance(error, KeyError) and error.args:
        name = str(error.args[0])  # a sentence, or the name that a table lacks
        return (name, None) if " " in name else (f"transformers knows no {name}", _CORRECT)
    if "above report" in text:  # which is silenced here
        lines = [line.strip() for message in messages for line in message.splitlines()]
        causes = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
        return (causes or [first_line(error)])[-1].rstrip("."), None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = first_line(error)
    if reason.endswith(":") and lines[1:]:  # "Validation error for field 'rms_norm_eps':"
        reason = f"{reason} {lines[1]}"
    install = isinstance(error, ImportError) or "pip install" in text
    return reason.rstrip("."), "install the package that it names" if install else None
