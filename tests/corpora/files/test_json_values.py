"""JSON files give the same records however they are stored, and are read as a stream."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.core.errors import CorpusError
from cascade.corpora.files import json_values
from cascade.corpora.files.json_values import read_json, records_of
from cascade.corpora.files.kinds import file_of

STORED: dict[str, Callable[[list[Any]], str]] = {
    "lines": lambda records: "".join(json.dumps(one) + "\n" for one in records),
    "blank lines": lambda records: "\n \n".join(["", *map(json.dumps, records), ""]),
    "array": json.dumps,
    "indented array": lambda records: json.dumps(records, indent=2),
    "array of lines": lambda records: "[" + ",\n".join(map(json.dumps, records)) + "]\n",
    "indented objects": lambda records: "\n".join(json.dumps(one, indent=2) for one in records),
    "joined files": lambda records: "".join(f"\ufeff{json.dumps(one)}\n" for one in records),
}

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
#: A record has a number, so that it is neither columns nor an object that holds records.
RECORDS = st.lists(st.fixed_dictionaries({"id": st.integers(), "value": VALUES}), min_size=1)


def records(text: str, name: str = "x.jsonl", encoding: str = "utf-8") -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text, encoding=encoding, newline="")
        file = file_of(path)
        assert file is not None
        return list(read_json(file))


@pytest.mark.parametrize("stored", STORED)
@settings(max_examples=25)
@given(expected=RECORDS, chunk=st.sampled_from([3, 1 << 16]))
def test_every_way_to_store_records_gives_the_same_ones(
    stored: str, chunk: int, expected: list[Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", chunk)
        assert records(STORED[stored](expected)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": [{"text": "a"}, {"text": "b"}], "version": "1"}, [{"text": "a"}, {"text": "b"}]),
        ({"text": ["a", "b"], "n": [1, 2]}, [{"text": "a", "n": 1}, {"text": "b", "n": 2}]),
        ({"text": {"0": "a", "1": "b"}}, [{"text": "a"}, {"text": "b"}]),
        ({"0": {"text": "a"}, "1": {"text": "b"}}, [{"text": "a"}, {"text": "b"}]),
        ({"columns": ["text"], "index": [0], "data": [["a"]]}, [{"text": "a"}]),
        ({"features": [{"name": "t"}], "rows": [{"row_idx": 0, "row": {"t": 1}}]}, [{"t": 1}]),
        ({"text": "a"}, [{"text": "a"}]),
        ({"text": "a", "data": []}, [{"text": "a", "data": []}]),
        ({"messages": [{"role": "user"}]}, [{"messages": [{"role": "user"}]}]),
        ({"a": [1, 2], "b": [1]}, [{"a": [1, 2], "b": [1]}]),
        ({}, [{}]),
    ],
)
def test_one_object_holds_records_or_columns_or_is_a_record(
    content: Any, expected: list[Any]
) -> None:
    assert list(records_of(content)) == expected
    assert records(json.dumps(content, indent=1), "x.json") == expected
    assert records(json.dumps(content), "x.jsonl") == expected


def test_an_object_among_others_is_a_record() -> None:
    lines = [{"text": ["a", "b"]}, {"data": [{"text": "c"}]}]
    assert records(STORED["lines"](lines)) == lines


@pytest.mark.parametrize("stored", ["lines", "array", "indented objects"])
def test_records_are_read_as_a_stream(stored: str, tmp_path: Path) -> None:
    text = STORED[stored]([{"text": "a" * 1000, "id": 1}] * 400) + "no JSON"
    path = tmp_path / "x.json"
    path.write_text(text)
    file = file_of(path)
    assert file is not None
    stream = read_json(file)
    assert [next(stream)["id"] for _ in range(300)] == [1] * 300
    with pytest.raises(CorpusError, match=r"x\.json, line \d+: not JSON"):
        list(stream)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n{"a": }]', 2),
        ('[{"a": 1},\n\n{"a": 2}', 3),
        ('{"a": 1},\n{"a": 2}\n', 1),
        ('{"a": 1}\n\n{"a": 2},\n', 3),
        ('{\n "a": 1,\n "b": oops\n}\n', 3),
    ],
)
def test_errors_name_the_line(text: str, line: int) -> None:
    with pytest.raises(CorpusError, match=f", line {line}: not JSON .*; fix it"):
        records(text)
