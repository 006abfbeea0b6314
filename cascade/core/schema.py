"""Typed records: the base classes of every stored record, and conversion from and to JSON.

A record is a frozen `msgspec.Struct`. Its fields are the keys of the JSON, in the same order.
`msgspec` checks a record when it is read and derives its JSON Schema from the same types.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cascade.core.schema_errors import describe

__all__ = [
    "UNSET",
    "Count",
    "FileName",
    "Finite",
    "Index",
    "Interval",
    "Part",
    "PathBelow",
    "Positive",
    "SchemaError",
    "Share",
    "StoredRecord",
    "Text",
    "UnsetType",
    "beyond",
    "from_plain",
    "known",
    "strangers",
    "to_plain",
]

_LARGEST = sys.float_info.max

Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST, description="a finite number")]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST, description="a number above 0")]
Share = Annotated[float, Meta(ge=0, le=1, description="a share in 0..1")]
#: At least 1.
Count = Annotated[int, Meta(ge=1, description="a whole number from 1 on")]
#: At least 0.
Index = Annotated[int, Meta(ge=0, description="a whole number from 0 on")]
Text = Annotated[str, Meta(min_length=1, description="some text")]
#: A file of the same folder.
FileName = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=r"^(?!\.{1,2}$)[^/\\\x00-\x1f\x7f]*$",
        description="a plain file name",
    ),
]
#: A file of the same folder or of one below.
PathBelow = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1000,
        pattern=r"^(?!.*(^|/)\.{1,2}(/|$))[^/\\\x00-\x1f\x7f]+(/[^/\\\x00-\x1f\x7f]+)*$",
        description="the path of a file inside the folder",
    ),
]
#: Lower and upper end.
Interval = Annotated[
    list[Finite], Meta(min_length=2, max_length=2, description="two finite numbers")
]


class SchemaError(ValueError):
    """A value does not have the type that its record declares; the message says where."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base class of the objects inside a record.

    A field that may be absent from the JSON has the default `UNSET`; one that may be null, `None`.
    """


class StoredRecord(Part, frozen=True, kw_only=True):
    """Base class of records that are stored in their own file.

    A subclass declares `schema: int = SCHEMA` and `kind: Literal["..."] = "..."` first, so that
    they are written first.

    Attributes:
        KIND: The record's kind, as in its JSON.
        SCHEMA: The schema that this release writes, and the newest that it reads.
        COMMAND: The command that creates such a record, for error messages.
        RENAMED: The values that earlier releases wrote into a column of a list, and today's: the
            list and the column, then the earlier value and today's.
    """

    KIND: ClassVar[str]
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str]
    RENAMED: ClassVar[dict[tuple[str, str], dict[str, str]]] = {}

    def inconsistency(self) -> str | None:
        """Describe the first entry that contradicts another one; None if none does.

        Types say what an entry can be alone. A subclass says here what its entries can be
        together, such as the number of a point that the record has. Checked when it is read.
        """
        return None


T = TypeVar("T")


def beyond(numbers: Mapping[str, int | None], length: int, what: str) -> str | None:
    """Describe the first number that is too large for a list; None if none is.

    Args:
        numbers: Where each number is, and the number, from 0; None for no number.
        length: The length of the list.
        what: What the list holds, e.g. "points".
    """
    for place, number in numbers.items():
        if number is not None and number >= length:
            return f"expected one of {length} {what} at {place}, got number {number}"
    return None


def strangers(
    names: Mapping[str, Iterable[str]], known_names: Iterable[str], what: str
) -> str | None:
    """Describe the first name that a record does not have; None if it has all.

    Args:
        names: Where the names are, and the names.
        known_names: Those that the record has.
        what: What they name, e.g. "a layer".
    """
    have = set(known_names)
    for place, given in names.items():
        for name in given:
            if name not in have:
                return f"expected {what} of this record at {place}, got {name[:40]!r}"
    return None


def known(value: T | UnsetType) -> T | None:
    """Return the value of a field, or None where it is absent.

    Example:
        >>> known(UNSET) is None
        True
    """
    return None if isinstance(value, UnsetType) else value


def to_plain(value: Any) -> Any:
    """Return a record as dictionaries, lists and plain values, without its absent fields.

    Args:
        value: A record, an object inside one, or a collection of them.
    """
    return msgspec.to_builtins(value, enc_hook=_plain_number)


def _plain_number(value: Any) -> Any:
    # NumPy numbers.
    if hasattr(value, "__index__"):
        return value.__index__()
    if isinstance(value, float):
        return float(value)
    raise NotImplementedError(f"a {type(value).__name__} cannot be stored in a record")


def from_plain(value: Any, kind: type[T]) -> T:
    """Convert plain values to a type and check them. Unknown keys are ignored.

    Args:
        value: Dictionaries, lists and plain values, as in JSON.
        kind: The type to create.

    Raises:
        SchemaError: A field is missing or has another type. The message names the place, the
            expected type and the value.

    Example:
        >>> from_plain([0.1, 0.2], Interval)
        [0.1, 0.2]
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SchemaError(describe(value, kind, error)) from error
