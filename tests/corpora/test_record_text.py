"""The text of a record in Alpaca form, or of a text column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import outcome

from cascade.core.errors import CorpusError
from cascade.corpora.record_text import alpaca_text, record_text, texts_of

if TYPE_CHECKING:
    pass


def test_text_of_alpaca_form() -> None:
    assert alpaca_text("Add.", "1 + 1", "2") == (
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2"
    )


def test_text_of_alpaca_form_without_input() -> None:
    expected = "### Instruction:\nSay hi.\n\n### Response:\nhi"
    assert alpaca_text("Say hi.", "", "hi") == expected
    for missing in ({}, {"input": ""}, {"input": None}):
        record = {"instruction": "Say hi.", "output": "hi"} | missing
        assert record_text(record, source="here", number=1) == expected


def test_first_nested_instance_is_used() -> None:
    record = {
        "instruction": "Add.",
        "output": "not this",
        "instances": [{"input": "1 + 1", "output": "2"}, {"input": "2 + 2", "output": "4"}],
    }
    expected = "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2"
    assert record_text(record, source="here", number=1) == expected
    second = expected.replace("1 + 1", "2 + 2").removesuffix("2") + "4"
    assert [text for text, _ in texts_of(record, "here", 1, None)] == [expected, second]


@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("record", [None, {"text": None}])
def test_a_null_record_has_no_text(record: Any, column: str | None) -> None:
    assert texts_of(record, "here", 1, column) == []


def test_alpaca_form_takes_precedence_over_a_default_text_column() -> None:
    record = {"instruction": "Add.", "input": "", "output": "2", "text": "as is", "other": "o"}
    assert record_text(record, source="here", number=1).startswith("### Instruction:\nAdd.")
    assert record_text(record, source="here", number=1, text_column="text") == "as is"
    assert record_text(record, source="here", number=1, text_column="other") == "o"


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        (["text"], None, "expected an object, got list"),
        (None, None, "expected text, got null"),
        ({"body": "b", "id": "1"}, None, "'text' or instruction and output, got body, id; name"),
        ({}, None, "got no columns"),
        ({"text": "t"}, "body", "expected the column 'body', got text; name one with --text-col"),
        ({"instruction": "i"}, None, "'text' or instruction and output, got instruction;"),
        ({"text": 3}, None, "expected text in column 'text', got int"),
        ({"text": None}, None, "expected text, got null"),
        ({"instruction": "i", "output": 3}, None, "expected text in column 'output', got int"),
        ({"instruction": None, "output": "o"}, None, "expected text, got null"),
        ({"instruction": "i", "input": 0, "output": "o"}, None, "text in column 'input', got int"),
        ({"instruction": "i", "input": False, "output": "o"}, None, "in column 'input', got bool"),
        ({"instruction": "i", "input": [1], "output": "o"}, None, "text in column 'input', got l"),
        ({"instruction": "i", "instances": ["output"]}, None, "got instances, instruction"),
        ({"instruction": "i", "instances": [3]}, None, "got instances, instruction"),
        ({"instruction": "i", "instances": []}, None, "got instances, instruction"),
        ({"text": "half a pair: \ud800"}, None, "column 'text' is not valid Unicode"),
        ({"instruction": "\udfff", "output": "o"}, None, "column 'instruction' is not valid Uni"),
    ],
)
def test_error_names_the_record_and_the_expected_columns(
    record: Any, column: str | None, message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        record_text(record, source="here.jsonl", number=7, text_column=column)
    assert str(caught.value).startswith("here.jsonl, record 7: ")
    assert message in str(caught.value)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_any_column_value_gives_text_or_a_corpus_error(value: Any) -> None:
    nested = {"instruction": "i", "instances": [value]}
    for record in (value, {"text": value}, {"instruction": value, "output": "o"}, nested):
        text = outcome(record_text, record, source="here", number=1)
        if isinstance(text, CorpusError):
            assert "\n" not in str(text)
        else:
            assert isinstance(value, str)
            assert value in text
