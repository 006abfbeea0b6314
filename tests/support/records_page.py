"""The reference of records (docs/reference/records.md), made from the types in the package."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from typing import Any

from cascade.record_kinds import KINDS, json_schema, record_type

_INTRODUCTION = """# Records

What a command measures is stored as one JSON file, a *record*, and every table, plot and page is
drawn from it. A record names its `kind` and `schema`. It is checked when it is read: a missing
field, a wrong type, NaN or infinity are refused with the place of the fault. Keys that a release
does not know are ignored, and every schema written so far is still read.

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


def records_page() -> str:
    """Return the page: each kind's fields, and its JSON Schema."""
    lines = [_INTRODUCTION]
    schemas = {kind: json_schema(kind) for kind in KINDS}
    uses = Counter(name for schema in schemas.values() for name in schema["$defs"])
    for kind in KINDS:
        record, schema = record_type(kind), schemas[kind]
        lines += [f"## {kind}", "", (inspect.getdoc(record) or "").partition("\n")[0], ""]
        command = record.COMMAND.partition(" --")[0]
        lines += [f"Schema {record.SCHEMA}, written by `cascade {command}`.", ""]
        own = [name for name in schema["$defs"] if uses[name] == 1 and name != record.__name__]
        for name in [record.__name__, *sorted(own)]:
            lines += _table(name, schema["$defs"][name], top=name == record.__name__)
        text = json.dumps(_without_descriptions(schema), separators=(",", ":"))
        lines += ['??? note "JSON Schema"', "", f"        {text}", ""]
    lines += ["## Parts of several records", ""]
    parts = {name: about for schema in schemas.values() for name, about in schema["$defs"].items()}
    for name in sorted(name for name, count in uses.items() if count > 1):
        lines += _table(name, parts[name], top=False)
    return "\n".join(lines)


def _without_descriptions(value: Any) -> Any:
    """Return a schema without the docstrings of its types, which the package has."""
    if isinstance(value, dict):
        return {
            name: _without_descriptions(item)
            for name, item in value.items()
            if not (name == "description" and "properties" in value)
        }
    return [_without_descriptions(item) for item in value] if isinstance(value, list) else value


def _table(name: str, about: dict[str, Any], *, top: bool) -> list[str]:
    heading = [] if top else [f"`{name}`", ""]
    required = set(about.get("required", ()))
    rows = [
        f"| `{field}` | {_cell(_type_words(kind))} | {'' if field in required else 'optional'} |"
        for field, kind in about.get("properties", {}).items()
    ]
    return [*heading, "| field | type | |", "| --- | --- | --- |", *rows, ""]


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
