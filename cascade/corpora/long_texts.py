"""Tokenizing long texts in pieces, which gives the ids of the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cascade.corpora.files.documents import LongText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters of a window. A prime number: a tokenizer that groups digits from the right must not
#: find the same groups in windows of different ends.
_WINDOW = 65_537

#: Characters that two windows share.
_OVERLAP = 8192

#: Characters at each end of a window in which the tokens may depend on the end.
_MARGIN = 2048

#: Texts of at most so many characters are tokenized at once.
LONG = 4 * _WINDOW

#: The ids of tokens, and the index of the character at which each begins.
Tokens = tuple[list[int], list[int]]


def tokens_in_pieces(text: str | LongText, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Yield the tokens of a text piece by piece, the same as those of the whole text.

    A window is tokenized together with the end of the window before it. Where both agree on all
    tokens of a stretch of text, the first window ends at white space and the second one goes on.
    Where they do not agree, or there is no white space, the window is made twice as long, from the
    same start, and tokens are yielded once a window that is twice as long has them as well. So a
    text without white space is in the end tokenized as a whole, unless the caller stops before.
    With a Unigram model, which weighs a whole word at once, it is always tokenized as a whole.

    Args:
        text: The text.
        tokenizer: A fast tokenizer, because pieces are joined by offsets.
    """
    source = _Source(text)
    begin, end = 0, _WINDOW
    window = _encode(source, begin, end, tokenizer)
    done = 0
    by_word = type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"
    while not source.ends_at(end):
        start, after = end - _OVERLAP, end + _WINDOW
        following = _encode(source, start, after, tokenizer)
        shared = source.part(start, end)
        places = _agreement(window, following, shared, start)
        if places is not None:
            yield _some(window, done, places[0])
            window, done = following, places[1]
            begin, end = start, after
            source.forget(begin)
            continue
        after = end + (end - begin)
        longer = _encode(source, begin, after, tokenizer)
        same = _same(window, longer, end - _OVERLAP)
        while by_word and same > done and not source.is_border(window[1][same]):
            same -= 1
        if same > done:
            yield _some(window, done, same)
            done = same
        window, end = longer, after
    yield _some(window, done, len(window[0]))


class _Source:
    """A text of which only the part in use is held."""

    def __init__(self, text: str | LongText) -> None:
        self._pieces = iter([text]) if isinstance(text, str) else text.pieces()
        self._held, self._begin, self._ended = "", 0, False

    def part(self, begin: int, end: int) -> str:
        """Return the text between two characters."""
        self._read(end)
        return self._held[begin - self._begin : end - self._begin]

    def ends_at(self, end: int) -> bool:
        """Return whether there is no text after a character."""
        self._read(end + 1)
        return self._begin + len(self._held) <= end

    def is_border(self, at: int) -> bool:
        """Return whether white space begins or ends at a character."""
        before, after = self.part(max(at - 1, self._begin), at), self.part(at, at + 1)
        return before.isspace() != after.isspace()

    def forget(self, begin: int) -> None:
        """Drop the text before a character."""
        self._held, self._begin = self._held[begin - self._begin :], begin

    def _read(self, end: int) -> None:
        held = [self._held]
        length = self._begin + len(self._held)
        while length < end and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            held.append(piece or "")
            length += len(held[-1])
        if len(held) > 1:
            self._held = "".join(held)


def _encode(source: _Source, begin: int, end: int, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    encoded = tokenizer(
        source.part(begin, end),
        add_special_tokens=False,
        verbose=False,
        return_offsets_mapping=True,
    )
    return encoded["input_ids"], [begin + start for start, _ in encoded["offset_mapping"]]


def _some(tokens: Tokens, first: int, end: int) -> Tokens:
    return tokens[0][first:end], tokens[1][first:end]


def _agreement(one: Tokens, other: Tokens, shared: str, start: int) -> tuple[int, int] | None:
    """Return a place in both at which the same token begins, if they agree on the text around it.

    Args:
        one: The tokens of a window.
        other: The tokens of the next window.
        shared: The text that both have.
        start: The index of its first character.

    Returns:
        A place in each, at which white space begins or ends; None if they do not agree.
    """
    begin, end = start + _MARGIN, start + len(shared) - _MARGIN
    first, second = _between(one, begin, end), _between(other, begin, end)
    if _some(one, *first) != _some(other, *second):
        return None
    starts = one[1]
    middle = sum(first) // 2
    for place in (*range(middle, first[1]), *range(middle, first[0], -1)):
        at = starts[place] - start
        # Tokens that begin at the same character are parts of it.
        parted = place > first[0] and starts[place] > starts[place - 1]
        if parted and shared[at].isspace() != shared[at - 1].isspace():
            return place, place - first[0] + second[0]
    return None


def _between(tokens: Tokens, begin: int, end: int) -> tuple[int, int]:
    """Return the range of tokens that begin between two characters, near the end of the window."""
    starts = tokens[1]
    last = len(starts)
    while last and starts[last - 1] >= end:
        last -= 1
    first = last
    while first and starts[first - 1] >= begin:
        first -= 1
    return first, last


def _same(one: Tokens, longer: Tokens, end: int) -> int:
    """Return how many tokens are the same in both from the start on, before a character."""
    count = 0
    for ids in zip(one[0], longer[0], one[1], longer[1], strict=False):
        if ids[0] != ids[1] or ids[2] != ids[3] or ids[2] >= end:
            break
        count += 1
    return count
