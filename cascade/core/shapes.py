"""Shapes of stored things: what they must hold, and the first place where they do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A single value.

    Attributes:
        words: What is expected, e.g. "a finite number".
        holds: Whether a value is one.
    """

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A value that may be null, or missing altogether.

    Attributes:
        shape: What it is where it is there.
        present: It must not be missing.
    """

    shape: Shape
    present: bool = False


#: A mapping has at least these names, each with its own shape; a list has any number of one shape.
Shape = Kind | Maybe | Mapping[str, "Shape"] | list["Shape"]

_MISSING = object()


def _is_number(value: Any) -> bool:
    # bool is an int, and no number that was measured; an int can be too large for a double.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NUMBER = Kind("a finite number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a share in 0..1", lambda value: _is_number(value) and 0 <= value <= 1)
COUNT = Kind("a whole number from 1 on", lambda value: _is_whole(value) and value >= 1)
WHOLE = Kind("a whole number from 0 on", lambda value: _is_whole(value) and value >= 0)
INTERVAL = Kind(
    "two finite numbers",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
)
TEXT = Kind("some text", lambda value: isinstance(value, str) and value != "")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


def one_of(*names: str) -> Kind:
    """Return the kind of a text that is one of these."""
    return Kind(
        f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
    )


def flaw(value: Any, shape: Shape, place: str = "") -> str | None:
    """Return the first thing about a stored value that is not as it should be, in words.

    Args:
        value: What was read.
        shape: What is expected; more than that may be there.
        place: Where in the whole it lies, e.g. "points[0]".

    Returns:
        E.g. "expected a finite number at points[0].threshold, got null"; None where all is well.
    """
    if isinstance(shape, Maybe):
        if value is _MISSING and shape.present:
            return _unlike(f"{_words(shape.shape)} or null", value, place)
        return None if value is None or value is _MISSING else flaw(value, shape.shape, place)
    if isinstance(shape, Kind):
        return None if shape.holds(value) else _unlike(shape.words, value, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _unlike(_words(shape), value, place)
        parts = ((item, shape[0], f"{place}[{number}]") for number, item in enumerate(value))
    else:
        if not isinstance(value, Mapping):
            return _unlike(_words(shape), value, place)
        parts = (
            (value.get(name, _MISSING), inner, f"{place}.{name}" if place else name)
            for name, inner in shape.items()
        )
    return next((found for part in parts if (found := flaw(*part)) is not None), None)


def _words(shape: Shape) -> str:
    if isinstance(shape, Kind):
        return shape.words
    return "a list" if isinstance(shape, list) else "an object"


def _unlike(words: str, value: Any, place: str) -> str:
    got = "nothing" if value is _MISSING else json.dumps(value, default=str)
    got = got if len(got) <= 40 else f"{got[:37]}..."
    return f"expected {words}{f' at {place}' if place else ''}, got {got}"
