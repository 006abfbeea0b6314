"""Typed records: the base classes of every stored record, and conversion from and to JSON.

A record is a frozen `msgspec.Struct`. Its fields are the keys of the JSON, in their order.
`msgspec` checks a record when it is read; its JSON Schema is made from the same types.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cascade.core.schema_errors import describe

__all__ = [
    "UNSET",
    "Count",
    "Finite",
    "Index",
    "Interval",
    "Part",
    "Positive",
    "SchemaError",
    "Share",
    "StoredRecord",
    "Text",
    "UnsetType",
    "from_plain",
    "known",
    "to_plain",
]

_LARGEST = sys.float_info.max

Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST, description="a finite number")]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST, description="a number above 0")]
Share = Annotated[float, Meta(ge=0, le=1, description="a share in 0..1")]
#: From 1 on.
Count = Annotated[int, Meta(ge=1, description="a whole number from 1 on")]
#: From 0 on.
Index = Annotated[int, Meta(ge=0, description="a whole number from 0 on")]
Text = Annotated[str, Meta(min_length=1, description="some text")]
#: Lower and upper end.
Interval = Annotated[
    list[Finite], Meta(min_length=2, max_length=2, description="two finite numbers")
]


class SchemaError(ValueError):
    """A value does not have the type of its record; the message says where."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a record.

    A field that may be absent from the JSON has the default `UNSET`; one that may be null, `None`.
    """


class StoredRecord(Part, frozen=True, kw_only=True):
    """A record that is stored in a file of its own.

    A subclass declares `schema: int = SCHEMA` and `kind: Literal["..."] = "..."` first, so that
    they are written first.

    Attributes:
        KIND: The record's kind, as in its JSON.
        SCHEMA: The schema that this release writes, and the newest that it reads.
        COMMAND: The command that makes such a record, for error messages.
    """

    KIND: ClassVar[str]
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str]


T = TypeVar("T")


def known(value: T | UnsetType) -> T | None:
    """Return the value of a field, or None where it is absent.

    Example:
        >>> known(UNSET) is None
        True
    """
    return None if isinstance(value, UnsetType) else value


def to_plain(value: Any) -> Any:
    """Return a record as dictionaries, lists and plain values, absent fields left out.

    Args:
        value: A record, a part of one, or a collection of them.
    """
    return msgspec.to_builtins(value, enc_hook=_plain_number)


def _plain_number(value: Any) -> Any:
    # Numbers of NumPy.
    if hasattr(value, "__index__"):
        return value.__index__()
    if isinstance(value, float):
        return float(value)
    raise NotImplementedError(f"a {type(value).__name__} cannot be stored in a record")


def from_plain(value: Any, kind: type[T]) -> T:
    """Return a typed value from plain ones, and check it. Unknown keys are ignored.

    Args:
        value: Dictionaries, lists and plain values, as JSON has them.
        kind: The type to make.

    Raises:
        SchemaError: A field is missing or has another type; says where, what was expected and what
            was found.

    Example:
        >>> from_plain([0.1, 0.2], Interval)
        [0.1, 0.2]
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SchemaError(describe(value, kind, error)) from error
