"""JSON corpora: one record per line, an array, one object that holds records, or columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TextIO

from cascade.core.errors import CorpusError
from cascade.corpora.files.kinds import CorpusFile
from cascade.corpora.files.opening import open_text

#: Characters that are read at a time.
_CHUNK = 1 << 16

#: An error this close to the end of what was read may be due to the end.
_NEAR_END = 16

#: Keys under which one object holds all records.
_HOLDERS = ("data", "rows", "records", "examples")

_NOT_JSON = (ValueError, RecursionError)


def read_json(file: CorpusFile) -> Iterator[Any]:
    """Yield the records of a JSON file. Its content says how they are stored, not its name.

    An array and one record per line are read as a stream; one object that holds all records is
    read whole.

    Raises:
        CorpusError: It is not JSON.
    """
    with open_text(file) as text:
        number, head = _first_line(text)
        if head.startswith("["):
            yield from _array_or_lines(file, text, number, head)
        elif head:
            head += "" if head.endswith("\n") else text.readline()
            if _goes_on(head):
                yield from _values(_Stream(file, text, number, head))
            else:
                yield from _lines_or_one(file, text, number, head)


def _first_line(text: TextIO) -> tuple[int, str]:
    """Return the first line that is not blank, or its beginning, and its number."""
    number = 1
    while line := text.readline(_CHUNK):
        content = line.lstrip("\ufeff \t\r\n")
        if content:
            return number, content
        number += line.endswith("\n")
    return number, ""


def _goes_on(line: str) -> bool:
    """Return whether a line is the beginning of a longer JSON value."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line.endswith("\n") and error.pos >= len(line.rstrip())
    except _NOT_JSON:
        pass
    return False


def _lines_or_one(file: CorpusFile, text: TextIO, number: int, head: str) -> Iterator[Any]:
    lines, only = _numbered(text, number, head)
    values = _line_values(file, lines)
    if only:
        yield from records_of(next(values))
    yield from values


def _numbered(text: TextIO, number: int, head: str) -> tuple[Iterator[tuple[int, str]], bool]:
    """Return all lines with their numbers, and whether the first one is the only one."""
    lines = ((at, line) for at, line in enumerate(text, start=number + 1) if line.strip())
    following = next(lines, None)
    first = [(number, head)] if following is None else [(number, head), following]
    return chain(first, lines), following is None


def _line_values(file: CorpusFile, lines: Iterator[tuple[int, str]]) -> Iterator[Any]:
    """Yield one value per line."""
    for number, line in lines:
        # Files that were joined have a byte order mark in the middle.
        content = line.lstrip("\ufeff")
        try:
            yield json.loads(content)
        except _NOT_JSON as error:
            raise _not_json(file, number, error) from error


def _array_or_lines(file: CorpusFile, text: TextIO, number: int, head: str) -> Iterator[Any]:
    """Yield the elements of an array; if there are several arrays, one per line, yield these."""
    try:
        first = json.loads(head)
    except _NOT_JSON:
        yield from _elements(_Stream(file, text, number, head))
        return
    lines, only = _numbered(text, number, head)
    if only:
        yield from first
    else:
        yield from _line_values(file, lines)


def _elements(stream: _Stream) -> Iterator[Any]:
    """Yield the elements of an array."""
    stream.at += 1
    if stream.next_character() == "]":
        return
    while True:
        yield stream.value()
        sign = stream.next_character()
        if sign not in (",", "]"):
            raise stream.error("expected ',' or ']' after a record")
        stream.at += 1
        if sign == "]":
            break
    if stream.next_character():
        raise stream.error("more text after the array")


def _values(stream: _Stream) -> Iterator[Any]:
    """Yield values that follow each other, each over several lines."""
    first = stream.value()
    if not stream.next_character():
        yield from records_of(first)
        return
    yield first
    while stream.next_character():
        yield stream.value()


class _Stream:
    """JSON text of which no more than one value is held at a time."""

    def __init__(self, file: CorpusFile, text: TextIO, line: int, head: str) -> None:
        self._file, self._text, self._line = file, text, line
        self._held, self.at, self._ended = head, 0, False

    def next_character(self) -> str:
        """Skip white space; return the next character, or "" at the end."""
        while True:
            while self.at < len(self._held):
                if not self._held[self.at].isspace():
                    return self._held[self.at]
                self.at += 1
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the next value.

        Raises:
            CorpusError: It is not JSON.
        """
        self.next_character()
        decoder = json.JSONDecoder()
        while True:
            try:
                found, end = decoder.raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                near = error.pos >= len(self._held) - _NEAR_END
                if (unfinished or near) and self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            except _NOT_JSON as error:
                raise self.error(str(error)) from error
            # A number may go on behind what was read.
            if end == len(self._held) and self._more():
                continue
            self.at = end
            return found

    def error(self, reason: str, at: int | None = None) -> CorpusError:
        line = self._line + self._held.count("\n", 0, self.at if at is None else at)
        return _not_json(self._file, line, reason)

    def _more(self) -> bool:
        """Read on; return whether there was more."""
        if self._ended:
            return False
        self._line += self._held.count("\n", 0, self.at)
        self._held, self.at = self._held[self.at :], 0
        # As much as is held, so that a long value is not decoded again and again.
        chunk = self._text.read(max(_CHUNK, len(self._held)))
        self._ended = not chunk
        self._held += chunk
        return bool(chunk)


def _not_json(file: CorpusFile, line: int, reason: object) -> CorpusError:
    return CorpusError(f"{file}, line {line}: not JSON ({reason}); fix it")


def records_of(content: Any) -> Iterator[Any]:
    """Yield the records of the only value of a file.

    Args:
        content: An object that holds a list of records ("data", "rows", "records" or "examples"),
            columns (lists, or objects as pandas writes them), or one record.

    Example:
        >>> list(records_of({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}))
        [{'text': 'a'}, {'text': 'b'}]
        >>> list(records_of({"text": ["a", "b"]}))
        [{'text': 'a'}, {'text': 'b'}]
    """
    held = _held_records(content)
    if held is not None:
        for record in held:
            # A page of the dataset viewer holds each record in a row.
            page = isinstance(record, dict) and {"row_idx", "row"} <= set(record)
            yield record["row"] if page else record
    else:
        yield from _by_column(content)


def _held_records(content: Any) -> list[Any] | None:
    if not isinstance(content, dict):
        return None
    lists = [content[key] for key in _HOLDERS if isinstance(content.get(key), list)]
    if not lists or not lists[0]:
        return None
    if isinstance(lists[0][0], dict):
        return list(lists[0])
    if isinstance(lists[0][0], list) and isinstance(content.get("columns"), list):
        return [dict(zip(content["columns"], row, strict=False)) for row in lists[0]]
    return None


def _by_column(content: Any) -> Iterator[Any]:
    values = list(content.values()) if isinstance(content, Mapping) else []
    if values and all(isinstance(value, list) for value in values):
        # A list of messages is one record's.
        turns = any(
            isinstance(one, dict) and set(one) & {"role", "from"}
            for value in values
            for one in value
        )
        if not turns and len({len(value) for value in values}) == 1:
            for row in zip(*values, strict=True):
                yield dict(zip(content, row, strict=True))
            return
    keys = {tuple(value) for value in values if isinstance(value, dict)}
    if len(keys) == 1 and all(isinstance(value, dict) for value in values):
        inner = keys.pop()
        if inner and all(map(str.isdigit, inner)):  # as pandas writes columns
            for key in inner:
                yield {column: content[column][key] for column in content}
            return
        if all(map(str.isdigit, content)):  # as pandas writes rows
            yield from values
            return
    yield content
