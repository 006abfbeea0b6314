"""Stored JSON holds finite numbers only."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

import cascade
from cascade.core.records import record_hash, to_json, write_record

PACKAGE = Path(cascade.__file__).parent


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(value: float, tmp_path: Path) -> None:
    for record in ({"a": value}, {"a": [1.0, {"b": value}]}, {"a": {"b": [value]}}):
        for write in (to_json, record_hash, lambda each: write_record(tmp_path / "r.json", each)):
            with pytest.raises(ValueError, match="JSON compliant"):
                write(record)
    assert list(tmp_path.iterdir()) == []


def test_every_writer_of_json_refuses_numbers_that_are_not_finite() -> None:
    """`json.dumps` writes NaN and Infinity unless it is told not to, which is no JSON."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("dump", "dumps") and ast.unparse(node.func.value) == "json":
                found += 1
                # Keys, a vocabulary and the words of an error hold no measured number.
                if "get_vocab" in ast.unparse(node) or path.name == "schema_errors.py":
                    continue
                if ast.unparse(node) != "json.dumps(k)":
                    names = {keyword.arg for keyword in node.keywords}
                    assert "allow_nan" in names, f"{path.name}:{node.lineno}"
    assert found > 10
