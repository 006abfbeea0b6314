"""Chats: the text that a tokenizer's chat template makes of messages, and the assistant's turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cascade.core.errors import CorpusError, first_line
from cascade.corpora.joining import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Names of roles in ShareGPT data, and the roles that chat templates know.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_response": "tool",
    "observation": "tool",
}

#: The keys of a message: of the role, and of the text.
_KEYS = (("role", "content"), ("from", "value"))

#: Stands for a message's text in a rendered template; the characters are in private use.
_PLACE = "\ue0f0{}\ue0f1"
_PLACES = re.compile("\ue0f0(\\d+)\ue0f1")


@dataclass(frozen=True)
class Chat:
    """Messages.

    Attributes:
        messages: As chat templates take them, each with `role` and `content`.
        prompt: How many of them at the start are the prompt, and so no response.
        tools: The record's tools.
    """

    messages: tuple[dict[str, Any], ...]
    prompt: int = 0
    tools: Any = None

    def after_system(self, text: str) -> Chat:
        """Return the chat with a system message first; itself if it begins with one."""
        if self.messages[0]["role"] == "system":
            return self
        first = {"role": "system", "content": text}
        return replace(self, messages=(first, *self.messages), prompt=self.prompt + 1)


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of messages, or columns of them."""
    if isinstance(value, dict):
        return any(isinstance(value.get(role), list) and text in value for role, text in _KEYS)
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, dict) and any(key in one for key, _ in _KEYS) for one in value)


def messages_of(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Return messages as chat templates take them.

    Args:
        value: Messages with `role` and `content`, or with `from` and `value` (ShareGPT); or an
            object with a list of each.
        place: What holds them, for errors.

    Raises:
        CorpusError: They are neither, or hold something that is no text.
    """
    if isinstance(value, dict) and is_chat(value):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise _no_messages(place, type(value).__name__)
    return tuple(_message(one, f"{place}, message {at}") for at, one in enumerate(value, start=1))


def _message(value: Any, place: str) -> dict[str, Any]:
    keys = value if isinstance(value, dict) else {}
    role, text = next(
        ((role, text) for role, text in _KEYS if isinstance(keys.get(role), str)), ("", "")
    )
    if not role or not (text in keys or "tool_calls" in keys):
        raise _no_messages(place, ", ".join(map(str, keys)) or type(value).__name__)
    name = value[role].lower() if role == "from" else value[role]
    # Data sets fill in the keys that other messages have.
    others = {key: one for key, one in value.items() if key not in (role, text) and one is not None}
    if role == "from":
        others = {}
    content = _content(value.get(text), place)
    return {"role": _ROLES.get(name, name), "content": content, **others}


def _content(value: Any, place: str) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if part is None:
            continue
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise CorpusError(f"{place}: expected text, got {kind}; remove it")
        texts.append(part)
    return "".join(texts)


def _no_messages(place: str, got: str) -> CorpusError:
    return CorpusError(
        f"{place}: expected messages with role and content, or with from and value, got {got}; "
        "fix it or name a text column with --text-column"
    )


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(
    chat: Chat, tokenizer: PreTrainedTokenizerBase | None, place: str, *, marks: bool
) -> Passage:
    """Return the text of a chat; its responses are the turns of the assistant.

    Args:
        chat: The messages.
        tokenizer: Its chat template is used. Without one, each message is "role: text" on a line.
        place: What holds the chat, for errors.
        marks: Determine where the responses are.

    Raises:
        CorpusError: The template refuses the chat or leaves out a message, or the responses cannot
            be found in the text.
    """
    if tokenizer is None or not has_template(tokenizer):
        if any(message.get("tool_calls") for message in chat.messages):
            raise CorpusError(
                f"{place}: expected a chat template for its tool calls, the tokenizer has none; "
                "add the model's chat_template.jinja, or remove them"
            )
        return _plain(chat)
    text = _rendered(chat.messages, chat, tokenizer, place)
    pieces = _template_of(chat, tokenizer, place)
    spans: tuple[tuple[int, int], ...] | None = ()
    if marks:
        # A template writes tool calls and the like next to the text of a message.
        plain = all(set(message) == {"role", "content"} for message in chat.messages)
        spans = _placed(text, pieces, chat, tokenizer) if plain else None
        spans = _by_turns(text, chat, tokenizer, place) if spans is None else spans
    eos = tokenizer.eos_token
    closed = isinstance(eos, str) and text.rstrip().endswith(eos)
    return Passage(text, spans, closed=closed)


def _plain(chat: Chat) -> Passage:
    text, spans = "", []
    for number, message in enumerate(chat.messages):
        text += f"{message['role']}: " if not text else f"\n{message['role']}: "
        start = len(text)
        text += message["content"]
        if _is_response(chat, number):
            spans.append((start, len(text)))
    return Passage(text, tuple(spans))


def _is_response(chat: Chat, number: int) -> bool:
    return number >= chat.prompt and chat.messages[number]["role"] == "assistant"


def _rendered(
    messages: Sequence[dict[str, Any]],
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    *,
    prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        # Templates raise errors of their own, and TypeError and others for what they do not expect.
        raise CorpusError(
            f"{place}: the tokenizer's chat template does not take this chat "
            f"({first_line(error)}); fix it or name a text column with --text-column"
        ) from error
    return str(text)


def _template_of(chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str) -> list[str]:
    """Return what the template writes around the texts of messages, and their numbers in between.

    Raises:
        CorpusError: It leaves out a message, for example one of a role that it does not know.
    """
    signs = [
        message | {"content": _PLACE.format(number)} if message["content"] else message
        for number, message in enumerate(chat.messages)
    ]
    pieces = _PLACES.split(_rendered(signs, chat, tokenizer, place))
    for number, message in enumerate(chat.messages):
        if message["content"].strip() and str(number) not in pieces[1::2]:
            raise CorpusError(
                f"{place}: the tokenizer's chat template leaves out message {number + 1} (role "
                f"{message['role']}); rename the role or name a text column with --text-column"
            )
    return pieces


def _placed(
    text: str, pieces: list[str], chat: Chat, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, int], ...] | None:
    """Return where the responses are, from what the template writes around the texts.

    Returns:
        None if the template changes texts by more than the white space around them.
    """
    if not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for number, after in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        content = chat.messages[number]["content"]
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        found = next((form for form in forms if text.startswith(form + after, at)), None)
        if found is None:
            return None
        end = at + len(found)
        if _is_response(chat, number):
            spans.append((at, end + _end_of_turn(after, tokenizer)))
        at = end + len(after)
    return tuple(spans) if at == len(text) else None


def _end_of_turn(after: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of characters of the token that ends a turn, which the model writes."""
    return max(
        (len(token) for token in tokenizer.all_special_tokens if after.startswith(token)),
        default=0,
    )


def _by_turns(
    text: str, chat: Chat, tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[tuple[int, int], ...]:
    """Return where the responses are, from the template with the messages up to each."""
    spans = []
    for number in range(len(chat.messages)):
        if not _is_response(chat, number):
            continue
        before = _rendered(chat.messages[:number], chat, tokenizer, place, prompt=True)
        turn = _rendered(chat.messages[: number + 1], chat, tokenizer, place)
        if not (turn.startswith(before) and text.startswith(turn)):
            raise CorpusError(
                f"{place}: the tokenizer's chat template changes message {number + 1} by those "
                "around it, so the assistant's turns cannot be marked; keep only the last turn"
            )
        spans.append((len(before), len(turn)))
    return tuple(spans)
