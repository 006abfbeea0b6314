"""The errors a user can cause: one line that says what to do, and exit status 2."""

from __future__ import annotations


class CascadeError(Exception):
    """Anything that a user can put right: expected, got, and what to do, in one line."""

    exit_status = 2


class ModelError(CascadeError):
    """The model cannot be found, read or trusted (missing, truncated, corrupted, NaN)."""


class UnsupportedModelError(ModelError):
    """The model is readable, but it is not a stack of decoder layers that can be measured."""


class DeviceError(CascadeError):
    """The device is absent, or lacks the wanted dtype."""


class CorpusError(CascadeError):
    """The corpus is missing, empty, malformed, or too small for one block."""


class RecordError(CascadeError):
    """A stored record is missing, torn, of another schema, or not comparable."""


class UsageError(CascadeError):
    """An option that cannot be meant."""


class TrainingError(CascadeError):
    """Training cannot start, go on or be resumed; what was saved before is unharmed."""


class OutputError(CascadeError):
    """Results cannot be written where they should go; what was there before is unharmed."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def os_reason(error: OSError) -> str:
    """Return what the system said, without the number and the path that messages repeat."""
    return error.strerror or type(error).__name__


def not_finite(what: str) -> ModelError:
    """Return the error for numbers that overflowed or are NaN.

    Args:
        what: Which numbers, e.g. "the logits of layer 3 are not finite".
    """
    return ModelError(f"{what}; use a wider --dtype, or get the checkpoint again")
