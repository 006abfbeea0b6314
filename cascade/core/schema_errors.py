"""Error messages for values that do not have the type that their record declares."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, UnsetType

_PLACE = re.compile(r" - at `\$(?P<path>.*)`$", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>[\w-]+)|\[(?P<number>\d+)\]|(?P<any>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")

_WORDS = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}

_NOTHING = object()


def describe(value: Any, kind: Any, error: msgspec.ValidationError) -> str:
    """Return one line that names the wrong value, its place and the expected type.

    Args:
        value: The value that could not be converted.
        kind: The expected type.
        error: The error that `msgspec` raised.

    Returns:
        E.g. "expected a finite number at points[0].threshold, got null".
    """
    text = str(error)
    place = _PLACE.search(text)
    steps = _STEP.finditer(place["path"]) if place else iter(())
    where = ""
    for step in steps:
        kind = _kinds_below(kind, step)
        if step["number"] is not None:
            where += f"[{step['number']}]"
            value = _item(value, int(step["number"]))
            continue
        name = step["name"] or _wrong_key(value, kind)
        where += f".{name}"
        value = _item(value, name)
    missing = _MISSING.match(text)
    if missing is not None:
        where += f".{missing['name']}"
        kind, value = _field(kind, missing["name"]), _NOTHING
    at = f" at {where.lstrip('.')}" if where else ""
    return f"expected {_expected(kind)}{at}, got {_shown(value)}"


def _item(value: Any, key: Any) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return _NOTHING


def _wrong_key(value: Any, kind: Any) -> str:
    """Return the first key whose value has another type, which `msgspec` does not name."""
    for key, item in value.items() if isinstance(value, dict) else ():
        try:
            msgspec.convert(item, kind)
        except msgspec.ValidationError:
            return str(key)
    return "..."


def _alternatives(kind: Any) -> Iterator[Any]:
    """Yield the members of a union, without annotations; a plain type is its only member."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _kinds_below(kind: Any, step: re.Match[str]) -> Any:
    """Return the type of the value to which one step of a path leads."""
    for one in _alternatives(kind):
        arguments = get_args(one)
        if step["name"] is not None:
            found = _field(one, step["name"])
            if found is not Any:
                return found
        elif step["number"] is not None and get_origin(one) in (list, tuple):
            last = len(arguments) - 1
            fixed = get_origin(one) is tuple and Ellipsis not in arguments
            return arguments[min(int(step["number"]), last) if fixed else 0]
        elif step["any"] is not None and get_origin(one) is dict:
            return arguments[1]
    return Any


def _field(kind: Any, name: str) -> Any:
    for one in _alternatives(kind):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            for field in msgspec.structs.fields(one):
                if field.encode_name == name:
                    return field.type
    return Any


def _expected(kind: Any) -> str:
    """Describe a type, by the description of its `Meta` where it has one."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        described = (one.description for one in arguments[1:] if isinstance(one, Meta))
        return next(filter(None, described), None) or _expected(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(one) for one in arguments if one is not UnsetType)
    if origin is Literal:
        names = [one if isinstance(one, str) else json.dumps(one) for one in arguments]
        return json.dumps(arguments[0]) if len(names) == 1 else f"one of {', '.join(names)}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "an object"
    return _WORDS.get(origin or kind, "another value")


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    try:
        shown = json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that are not text, or integers of thousands of digits
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
