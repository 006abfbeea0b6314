"""Errors that a user can cause: a one-line message with the remedy, and exit status 2."""

from __future__ import annotations

from cascade.core.printable import printable

#: A message with more characters repeats a value of absurd length. Its end says what to do.
_LONGEST, _BEGINNING, _END = 10_000, 1500, 500


class CascadeError(Exception):
    """Base class of all errors that a user can fix.

    The message is one line: what was expected, what was found and what to do.

    Example:
        >>> import cascade
        >>> try:
        ...     cascade.load("smollm2-135m", dtype="int4")
        ... except cascade.CascadeError as error:
        ...     print(error)
        expected --dtype among float32, bfloat16, float16, got int4
    """

    exit_status = 2

    def __init__(self, message: str = "") -> None:
        # Messages quote names and values from files: they stay one line, wherever they are shown.
        super().__init__(_shortened(printable(" ".join(message.splitlines()))))


class ModelError(CascadeError):
    """The model is missing, truncated or corrupted, or its weights are NaN."""


class UnsupportedModelError(ModelError):
    """The model can be read, but it has no stack of decoder layers to measure."""


class DeviceError(CascadeError):
    """The device is absent or does not support the requested dtype."""


class CorpusError(CascadeError):
    """The corpus is missing, empty, malformed or too small for one block."""


class RecordError(CascadeError):
    """A stored record is missing, torn, of another schema or not comparable."""


class BrokenRecordError(RecordError):
    """A stored record is torn or edited: it can be replaced, but not read."""


class UsageError(CascadeError):
    """An option has an invalid value, or two options contradict each other."""


class TrainingError(CascadeError):
    """Training cannot start, continue or be resumed; saved checkpoints are unharmed."""


class OutputError(CascadeError):
    """Results cannot be written to their destination; existing files are unharmed."""


def _shortened(message: str) -> str:
    if len(message) <= _LONGEST:
        return message
    return f"{message[:_BEGINNING]} [{len(message):,} characters] {message[-_END:]}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def os_reason(error: OSError) -> str:
    """Return the system's reason for an error, without error number and path."""
    return error.strerror or type(error).__name__


def not_finite(what: str) -> ModelError:
    """Return the error for numbers that overflowed or are NaN.

    Args:
        what: The numbers and where they are, e.g. "the logits of layer 3 are not finite".
    """
    return ModelError(f"{what}; use a wider --dtype, or get the checkpoint again")
