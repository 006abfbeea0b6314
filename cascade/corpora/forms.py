"""Forms of records: the columns by which a form is recognized, and the text of such a record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.core.errors import CorpusError
from cascade.corpora.chat import Chat, chat_text, has_template, is_chat, messages_of
from cascade.corpora.files.documents import LongText
from cascade.corpora.joining import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]

#: Columns of token ids.
_IDS = ("input_ids", "token_ids", "tokens", "labels")


@dataclass(frozen=True)
class _Form:
    """A form of records.

    Attributes:
        name: What errors and records call it.
        matches: Whether a record has the columns of the form.
        parts: Returns the texts and chats of a record, given what holds it, for errors.
        recorded: Whether the provenance of a corpus names the form.
    """

    name: str
    matches: Callable[[Record], bool]
    parts: Callable[[Record, str], list[Passage | Chat]]
    recorded: bool = True


class RecordReader:
    """Reads the records of one corpus, all in the form of the first one.

    Args:
        source: The corpus, for errors.
        text_column: The column to read, as a name or a dotted path. Default: by the form.
        tokenizer: Its chat template is used. Without one, roles are written as text.
        marks: Determine where the responses of chats are.

    Example:
        >>> reader = RecordReader("here")
        >>> [passage.text for passage in reader.passages({"text": "One."}, 1)]
        ['One.']
    """

    def __init__(
        self,
        source: str,
        text_column: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        marks: bool = False,
    ) -> None:
        self._source, self._column = source, text_column
        self._tokenizer, self._marks = tokenizer, marks
        self._form: _Form | None = None
        self._first = 0
        self._has_chats = False

    @property
    def form(self) -> str | None:
        """The form for the provenance; None for text columns and Alpaca, and before a record."""
        if self._form is None or not (self._form.recorded or self._has_chats):
            return None
        if not self._has_chats:
            return self._form.name
        written = "chat template" if has_template(self._tokenizer) else "plain roles"
        return f"{self._form.name}, {written}"

    def passages(self, record: Any, number: int) -> list[Passage]:
        """Return the texts of a record, none for a null record.

        A record has one text, or one per entry of its list `instances`.

        Args:
            record: An object with columns.
            number: The record's number, from 1.

        Raises:
            CorpusError: It is in another form than the first record or in none, or a column does
                not hold what its form needs.
        """
        place = f"{self._source}, record {number}"
        if record is None:
            return []
        if isinstance(record, str):
            record = {self._column or "text": record}
        if not isinstance(record, dict):
            raise CorpusError(f"{place}: expected an object, got {type(record).__name__}; fix it")
        form = self._form_of(record, place)
        if self._form is None:
            self._form, self._first = form, number
        elif form.name != self._form.name:
            raise CorpusError(
                f"{place}: expected {self._form.name} as in record {self._first}, got {form.name}; "
                "write each form to a file of its own, or name a column with --text-column"
            )
        passages = []
        for part in form.parts(record, place):
            if isinstance(part, Chat):
                self._has_chats = True
                part = chat_text(part, self._tokenizer, place, marks=self._marks)
            passages.append(part)
        return passages

    def _form_of(self, record: Record, place: str) -> _Form:
        if self._column is not None:
            return _form_of_column(self._column)
        for form in _FORMS:
            if form.matches(record):
                return form
        columns = ", ".join(sorted(map(str, record))) or "no columns"
        if any(name in record for name in _IDS):
            raise CorpusError(
                f"{place}: expected text, got token ids in columns {_short(columns)}; decode them "
                "with their tokenizer, or name a text column with --text-column"
            )
        raise CorpusError(
            f"{place}: expected the column 'text' or instruction and output, messages, "
            "conversations, prompt and completion, or chosen; got "
            f"{_short(columns)}; name one with --text-column"
        )


def record_text(
    record: Any, *, source: str, number: int, text_column: str | None = None
) -> str | LongText:
    """Return a record's first text.

    Args:
        record: An object with columns.
        source: The corpus, for error messages.
        number: The record's number from 1, for error messages.
        text_column: The column to read (default: by the form of the record).

    Raises:
        CorpusError: The record is null, or its columns are in no form that is known.
    """
    passages = RecordReader(source, text_column).passages(record, number)
    if not passages:
        raise CorpusError(f"{source}, record {number}: expected text, got null; fix it")
    return passages[0].text


def alpaca_text(instruction: str, given: str, output: str) -> str:
    """Return the text of a record in Alpaca form, with an input section only if `given` is set."""
    middle = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n{output}"


# Texts of a record -------------------------------------------------------------------------------


def _alpaca(record: Record, place: str) -> list[Passage | Chat]:
    parts: list[Passage | Chat] = []
    for rest in _instances(record):
        fields = {
            "instruction": record["instruction"],
            "input": "" if rest.get("input") is None else rest["input"],
            "output": rest["output"],
        }
        if fields["instruction"] is None or fields["output"] is None:
            continue
        for column, value in fields.items():
            _check_text(value, column, place)
        parts.append(_answered(alpaca_text(*fields.values()), fields["output"]))
    return parts


def _dolly(record: Record, place: str) -> list[Passage | Chat]:
    same = {"instruction": "instruction", "context": "input", "response": "output"}
    return _alpaca({same.get(name, name): value for name, value in record.items()}, place)


def _instances(record: Record) -> list[Any]:
    nested = record.get("instances")
    return nested if isinstance(nested, list) and nested else [record]


def _is_alpaca(record: Record) -> bool:
    return "instruction" in record and all(
        isinstance(rest, dict) and "output" in rest for rest in _instances(record)
    )


def _answered(text: str, response: str) -> Passage:
    return Passage(text, ((len(text) - len(response), len(text)),))


def _form_of_column(column: str) -> _Form:
    def parts(record: Record, place: str) -> list[Passage | Chat]:
        return _of_column(record, column, place)

    return _Form(f"column {column!r}", lambda record: True, parts, recorded=False)


def _of_column(record: Record, column: str, place: str) -> list[Passage | Chat]:
    value = _value(record, column, place)
    if value is None:
        return []
    if is_chat(value):
        return _chat(value, column, place)
    _check_text(value, column, place)
    return [Passage(value)]


def _value(record: Record, column: str, place: str) -> Any:
    """Return the value of a column; if there is no such column, of a dotted path."""
    if column in record:
        return record[column]
    found: Any = record
    for part in column.split("."):
        if found is None:
            return None
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            got = ", ".join(sorted(map(str, found))) if isinstance(found, dict) else ""
            where = "" if found is record else f" at {part!r}"
            raise CorpusError(
                f"{place}: expected the column {column!r}, got "
                f"{_short(got) or type(found).__name__ if found != {} else 'no columns'}{where}; "
                "name one with --text-column"
            )
    return found


def _chat(value: Any, column: str, place: str, tools: Any = None) -> list[Passage | Chat]:
    messages = messages_of(value, f"{place}, column {column!r}")
    return [Chat(messages, tools=tools or None)] if messages else []


def _chat_form(column: str) -> _Form:
    def parts(record: Record, place: str) -> list[Passage | Chat]:
        value = record[column]
        tools = record.get("tools") if isinstance(record.get("tools"), list) else None
        if value is None:
            return []
        found = _chat(value, column, place, tools)
        system = record.get("system")
        # Many sets keep the system's message in a column of its own, next to the turns.
        if isinstance(system, str) and system.strip():
            found = [chat.after_system(system) for chat in found if isinstance(chat, Chat)]
        return found

    return _Form(f"chat ({column})", lambda record: column in record, parts)


def _pair_form(prompt: str, answer: str, *, whole: bool = False) -> _Form:
    """Return the form of a prompt and its answer, texts or messages.

    Args:
        prompt: The column of the prompt.
        answer: The column of the answer.
        whole: The answer may begin with the prompt, or there may be no prompt.
    """

    def parts(record: Record, place: str) -> list[Passage | Chat]:
        begin, end = record.get(prompt), record[answer]
        if end is None or (begin is None and prompt in record):
            return []
        if begin is None:
            begin = [] if is_chat(end) else ""
        if not is_chat(end) and not is_chat(begin):
            _check_text(begin, prompt, place)
            _check_text(end, answer, place)
            if whole and begin and end.startswith(begin):
                end = end[len(begin) :]
            return [_answered(begin + end, end) if begin else Passage(end)]
        before = _turns(begin, "user", f"{place}, column {prompt!r}")
        after = _turns(end, "assistant", f"{place}, column {answer!r}")
        if whole and before and after[: len(before)] == before:
            after = after[len(before) :]
        return [Chat(before + after, prompt=len(before))]

    name = f"{prompt} and {answer}"
    columns = (answer,) if whole else (prompt, answer)
    return _Form(name, lambda record: all(column in record for column in columns), parts)


def _question(record: Record, place: str) -> list[Passage | Chat]:
    if record["question"] is None or record["answer"] is None:
        return []
    for column in ("question", "answer"):
        _check_text(record[column], column, place)
    turns = _turns(record["question"], "user", place) + _turns(record["answer"], "assistant", place)
    return [Chat(turns, prompt=1)]


def _turns(value: Any, role: str, place: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return messages_of(value, place) if value else ()


def _check_text(value: Any, column: str, place: str) -> None:
    if isinstance(value, LongText):
        return
    if not isinstance(value, str):
        got, remedy = type(value).__name__, "fix it or"
        if isinstance(value, list):
            numbers = value and all(isinstance(one, int) for one in value)
            got = f"a list of {len(value)} {'token ids' if numbers else 'values'}"
            remedy = "decode them or" if numbers else "write one record for each text, or"
        raise CorpusError(
            f"{place}: expected text in column {column!r}, got {got}; "
            f"{remedy} name another column with --text-column"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
        raise CorpusError(
            f"{place}: column {column!r} is not valid Unicode ({error.reason} at character "
            f"{error.start}); fix it"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


#: All forms. The first that matches a record is its form.
_FORMS = (
    _Form("Alpaca (instruction and output)", _is_alpaca, _alpaca, recorded=False),
    _Form(
        "the column 'text'",
        lambda record: "text" in record,
        lambda record, place: _of_column(record, "text", place),
        recorded=False,
    ),
    _chat_form("messages"),
    _chat_form("conversations"),
    _chat_form("conversation"),
    _pair_form("prompt", "completion"),
    _pair_form("prompt", "response"),
    _pair_form("prompt", "chosen", whole=True),
    _Form("question and answer", lambda record: {"question", "answer"} <= set(record), _question),
    _Form(
        "instruction, context and response",
        lambda record: {"instruction", "response"} <= set(record),
        _dolly,
    ),
)
