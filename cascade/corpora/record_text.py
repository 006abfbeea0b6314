"""The text of a record, from Alpaca form or a text column."""

from __future__ import annotations

from typing import Any

from cascade.core.errors import CorpusError

Record = dict[str, Any]


def record_text(record: Any, *, source: str, number: int, text_column: str | None = None) -> str:
    """Return a record's first text: all fields in Alpaca form, else the text column.

    Args:
        record: A mapping of columns.
        source: The corpus, for error messages.
        number: The record's number from 1, for error messages.
        text_column: The column to read (default: Alpaca form, else the column "text").

    Raises:
        CorpusError: The record is null, or the column is missing or does not hold text.
    """
    texts = texts_of(record, source, number, text_column)
    if not texts:
        raise CorpusError(f"{source}, record {number}: expected text, got null; fix it")
    return texts[0][0]


def texts_of(
    record: Any, source: str, number: int, text_column: str | None
) -> list[tuple[str, int]]:
    """Return a record's texts, each with the index at which its response text begins.

    A record has one text, or one per entry of its list `instances`. A null record, or one whose
    column is null, has none.
    """
    place = f"{source}, record {number}"
    if record is None:
        return []
    if not isinstance(record, dict):
        raise CorpusError(f"{place}: expected an object, got {type(record).__name__}; fix it")
    alpaca = _alpaca_fields(record) if text_column is None else None
    if alpaca is not None:
        texts = []
        for fields in alpaca:
            if fields["instruction"] is None or fields["output"] is None:
                continue
            for column, value in fields.items():
                _check_text(value, column, place)
            text = alpaca_text(*fields.values())
            texts.append((text, len(text) - len(fields["output"])))
        return texts
    column = text_column or "text"
    if column not in record:
        raise CorpusError(
            f"{place}: expected the column {column!r}"
            f"{'' if text_column else ' or instruction and output'}, got "
            f"{', '.join(sorted(map(str, record))) or 'no columns'}; name one with --text-column"
        )
    if record[column] is None:
        return []
    _check_text(record[column], column, place)
    return [(record[column], 0)]


def _alpaca_fields(record: Record) -> list[dict[str, Any]] | None:
    """Return instruction, input and output per instance; None if this is no Alpaca form."""
    nested = record.get("instances")
    rests = nested if isinstance(nested, list) and nested else [record]
    if "instruction" not in record or not all(
        isinstance(rest, dict) and "output" in rest for rest in rests
    ):
        return None
    return [
        {
            "instruction": record["instruction"],
            "input": "" if rest.get("input") is None else rest["input"],
            "output": rest["output"],
        }
        for rest in rests
    ]


def _check_text(value: Any, column: str, place: str) -> None:
    if not isinstance(value, str):
        raise CorpusError(
            f"{place}: expected text in column {column!r}, got {type(value).__name__}; "
            "fix it or name another column with --text-column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise CorpusError(
            f"{place}: column {column!r} is not valid Unicode ({error.reason} at character "
            f"{error.start}); fix it"
        ) from error


def alpaca_text(instruction: str, given: str, output: str) -> str:
    """Return the text of a record in Alpaca form, with an input section only if `given` is set."""
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n{output}"
