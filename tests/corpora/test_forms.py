"""The text of a record in Alpaca form, or of a text column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import outcome

from cascade.core.errors import CorpusError
from cascade.corpora.forms import RecordReader, alpaca_text, record_text

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
    assert [part.text for part in RecordReader("here").passages(record, 1)] == [expected, second]


@pytest.mark.parametrize("column", [None, "text"])
@pytest.mark.parametrize("record", [None, {"text": None}])
def test_a_null_record_has_no_text(record: Any, column: str | None) -> None:
    assert RecordReader("here", column).passages(record, 1) == []


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
        ({"body": "b", "id": "1"}, None, "or chosen; got body, id; name"),
        ({}, None, "got no columns"),
        ({"text": "t"}, "body", "expected the column 'body', got text; name one with --text-col"),
        ({"instruction": "i"}, None, "'text' or instruction and output, messages, "),
        ({"text": 3}, None, "expected text in column 'text', got int"),
        ({"text": None}, None, "expected text, got null"),
        ({"instruction": "i", "output": 3}, None, "expected text in column 'output', got int"),
        ({"instruction": None, "output": "o"}, None, "expected text, got null"),
        ({"instruction": "i", "input": 0, "output": "o"}, None, "text in column 'input', got int"),
        ({"instruction": "i", "input": False, "output": "o"}, None, "in column 'input', got bool"),
        (
            {"instruction": "i", "input": [1], "output": "o"},
            None,
            "got a list of 1 token ids; decode",
        ),
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


DOLLY = {"instruction": "i", "context": "c", "response": "r", "category": "qa"}


def test_dolly_is_written_as_alpaca() -> None:
    assert record_text(DOLLY, source="here", number=1) == alpaca_text("i", "c", "r")
    passage = RecordReader("here").passages(DOLLY, 1)[0]
    assert passage.responses == ((len(passage.text) - 1, len(passage.text)),)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("a.b", "literal"),
        ("a.c", "nested"),
        ("a.d.1", "second"),
        ("a.n", None),
        ("n.x", None),
        ("a.d.2", "expected the column 'a.d.2', got list at '2'; name one"),
        ("a.x", "expected the column 'a.x', got b, c, d, n at 'x'; name one"),
        ("a.c.x", "expected the column 'a.c.x', got str at 'x'; name one"),
        ("a.d", "got a list of 2 values; write one record for each text, or name another"),
    ],
)
def test_a_column_is_a_name_or_a_dotted_path(column: str, expected: str | None) -> None:
    inner = {"b": "inner", "c": "nested", "d": ["first", "second"], "n": None}
    record = {"a.b": "literal", "a": inner, "n": None}
    found = outcome(RecordReader("here", column).passages, record, 1)
    if isinstance(found, CorpusError):
        assert expected is not None
        assert expected in str(found)
    else:
        assert [passage.text for passage in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("column", [None, "text"])
def test_a_string_is_a_record_of_text(column: str | None) -> None:
    assert record_text("as is", source="here", number=1, text_column=column) == "as is"


def test_all_records_have_the_form_of_the_first() -> None:
    forms: list[dict[str, Any]] = [
        {"text": "t"},
        {"instruction": "i", "output": "o"},
        {"messages": [{"role": "user", "content": "c"}]},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "chosen": "c"},
        DOLLY,
    ]
    for first in forms:
        for other in forms:
            reader = RecordReader("here")
            assert reader.passages(None, 1) == []
            assert reader.passages(first, 2)
            found = outcome(reader.passages, other, 3)
            assert isinstance(found, CorpusError) == (first is not other)
            if first is not other:
                assert str(found).startswith("here, record 3: expected ")
                assert " as in record 2, got " in str(found)


@pytest.mark.parametrize("record", [{"input_ids": [1, 2], "attention_mask": [1, 1]}])
def test_token_ids_are_refused_by_name(record: Any) -> None:
    with pytest.raises(CorpusError, match=r"got token ids in columns .*input_ids; decode them"):
        record_text(record, source="here", number=1)
    assert record_text(record | {"text": "t"}, source="here", number=1) == "t"
