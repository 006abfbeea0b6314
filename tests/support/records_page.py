"""The reference of records (docs/reference/records.md), made from the types in the package."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from cascade.record_kinds import KINDS, json_schema, record_type

_INTRODUCTION = """# Records

What a command measures is stored as one JSON file, a *record*, and every table, plot and page is
drawn from it. A record names its `kind` and `schema`. It is checked when it is read: a missing
field, a wrong type, NaN or infinity are refused, and the error names the place. Keys that a release
does not know are ignored. Every schema written so far is still read, and so are names of outcomes
and verdicts that earlier releases wrote. The [glossary](../glossary.md) explains the terms.

From Python, `read_record` returns a typed record, whose fields are attributes:

```bash
cascade analyze --output out
```

```python
from cascade import read_record

profile = read_record("out/profile.json", kind="saturation")
print(profile.structure.dips)
```

This page is made from the types in the package (`pytest tests/test_record_kinds.py --force-regen`).
"""


#: The meaning of fields that need no words of their own in a docstring.
_EVERYWHERE = {
    "schema": "The schema of the record.",
    "kind": "The kind of the record.",
    "provenance": "The origin of the figures: model, corpus, machine, versions and command.",
    "machine": "The machine that measured.",
    "versions": "Versions of the libraries, by name.",
    "command": "The command line that made the record; null from Python.",
    "tokenizer_hash": "The hash of the tokenizer.",
    "model": "The model.",
    "corpus": "The corpus.",
    "mean": "The mean.",
    "std": "The standard deviation.",
    "min": "The minimum.",
    "p10": "The 10 % quantile.",
    "p50": "The median.",
    "p90": "The 90 % quantile.",
    "max": "The maximum.",
}


def records_page() -> str:
    """Return the page: each kind's fields, and its JSON Schema."""
    lines = [_INTRODUCTION]
    schemas = {kind: json_schema(kind) for kind in KINDS}
    types = {kind: _types_in(record_type(kind)) for kind in KINDS}
    # Two types of one name are not the same part.
    uses = Counter(type_ for found in types.values() for type_ in found.values())
    for kind in KINDS:
        record, schema = record_type(kind), schemas[kind]
        lines += [f"## {kind}", "", _first_sentence(record), ""]
        command = record.COMMAND.partition(" --")[0]
        lines += [f"Schema {record.SCHEMA}, written by `cascade {command}`.", ""]
        own = [name for name, type_ in types[kind].items() if uses[type_] == 1]
        for name in [record.__name__, *sorted(set(own) - {record.__name__})]:
            top = name == record.__name__
            lines += _table(types[kind][name], schema["$defs"][name], top=top)
        text = json.dumps(_without_descriptions(schema), separators=(",", ":"))
        lines += ['??? note "JSON Schema"', "", f"        {text}", ""]
    lines += ["## Parts of several records", ""]
    shared = {
        type_: schemas[kind]["$defs"][name]
        for kind, found in types.items()
        for name, type_ in found.items()
        if uses[type_] > 1
    }
    for type_ in sorted(shared, key=lambda each: each.__name__):
        lines += _table(type_, shared[type_], top=False)
    return "\n".join(lines)


def _types_in(record: type) -> dict[str, type]:
    """Return the type of a record and those of all objects in it, by their names."""
    found: dict[str, type] = {}
    left: list[Any] = [record]
    while left:
        each = left.pop()
        left += get_args(each)
        if not (hasattr(each, "__struct_fields__") or is_dataclass(each)):
            continue
        if each.__name__ not in found:
            found[each.__name__] = each
            left += get_type_hints(each, include_extras=True).values()
    return found


def _first_sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _without_descriptions(value: Any) -> Any:
    """Return a schema without the docstrings of its types, which the package has."""
    if isinstance(value, dict):
        return {
            name: _without_descriptions(item)
            for name, item in value.items()
            if not (name == "description" and "properties" in value)
        }
    return [_without_descriptions(item) for item in value] if isinstance(value, list) else value


def _table(kind: type, about: dict[str, Any], *, top: bool) -> list[str]:
    heading = [] if top else [f"`{kind.__name__}`: {_first_sentence(kind)}", ""]
    required, meanings = set(about.get("required", ())), _meanings(kind)
    rows = [
        f"| `{field}` | {_cell(_type_words(type_))} "
        f"| {_cell(_meaning(meanings.get(field, ''), optional=field not in required))} |"
        for field, type_ in about.get("properties", {}).items()
    ]
    return [*heading, "| field | type | meaning |", "| --- | --- | --- |", *rows, ""]


def _meanings(kind: type) -> dict[str, str]:
    """Return what the docstrings of a type and of its bases say of each field, by its JSON key."""
    found = dict(_EVERYWHERE)
    for each in reversed(kind.__mro__):
        _, _, text = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        for entry in re.findall(r"^ {4}(\w.*(?:\n {5,}.*)*)", text.split("\n\n")[0], re.MULTILINE):
            name, _, meaning = " ".join(entry.split()).partition(": ")
            found[name] = meaning
    fields = getattr(kind, "__struct_fields__", ())
    keys = dict(zip(fields, getattr(kind, "__struct_encode_fields__", ()), strict=True))
    return {keys.get(name, name): meaning for name, meaning in found.items()}


def _meaning(text: str, *, optional: bool) -> str:
    return " ".join((["Optional."] if optional else []) + ([text] if text else []))


def _cell(text: str) -> str:
    return re.sub(r"([\[\]|<])", r"\\\1", " ".join(text.split()))


def _type_words(about: dict[str, Any]) -> str:
    """Return a field's type in words, e.g. "list of Row", "number or null"."""
    if "anyOf" in about:
        return " or ".join(_type_words(each) for each in about["anyOf"])
    if "$ref" in about:
        return f"`{about['$ref'].rpartition('/')[2]}`"
    if "enum" in about:
        return " or ".join(f"`{value}`" for value in about["enum"])
    if "description" in about:
        return str(about["description"])
    if about.get("type") == "array":
        return f"list of {_type_words(about.get('items') or {})}"
    if about.get("type") == "object":
        inner = about.get("additionalProperties")
        return f"object of {_type_words(inner)}" if isinstance(inner, dict) else "object"
    return str(about.get("type", "any value"))
