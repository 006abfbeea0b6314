"""Joining the texts of records to one sequence of marked token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cascade.core.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RecordText:
    """The text of one record.

    Attributes:
        number: The record's number, from 1.
        text: The whole text.
        response: The index of the character at which the response text begins.
    """

    number: int
    text: str
    response: int


@dataclass(frozen=True)
class _Span:
    """The tokens of one record, including the EOS after it, if there is one.

    Attributes:
        number: The record's number, from 1.
        tokens: The number of tokens.
        template: The number of tokens before the response text.
    """

    number: int
    tokens: int
    template: int


@dataclass(frozen=True)
class JoinedText:
    """Token ids of several records.

    Attributes:
        ids: The ids of all records, joined by EOS.
        spans: One per text.
        silent: How many texts are not blank, but became no token, or unknown tokens alone.
    """

    ids: list[int]
    spans: list[_Span]
    silent: int = 0

    @property
    def records(self) -> int:
        """The number of records."""
        return len({span.number for span in self.spans})

    def record_numbers(self, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
        """Return the number of each token's record, `[S, T]`."""
        numbers = np.array([span.number for span in self.spans], dtype=np.int32)
        marked = np.repeat(numbers, [span.tokens for span in self.spans])
        return marked[: shape[0] * shape[1]].reshape(shape)

    def response_marks(self, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return which tokens are response text, `[S, T]`."""
        runs = [run for span in self.spans for run in (span.template, span.tokens - span.template)]
        marked = np.repeat(np.tile([False, True], len(self.spans)), runs)
        return marked[: shape[0] * shape[1]].reshape(shape)


def join(
    texts: Iterable[RecordText],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int | None,
    *,
    marks: bool,
) -> JoinedText:
    """Return the token ids of all texts, joined by EOS.

    Args:
        texts: The texts, in order.
        tokenizer: The tokenizer of the model.
        wanted: Stop at this many tokens; None for all texts.
        marks: Determine which tokens are response text.

    Raises:
        CorpusError: The tokenizer has no EOS, or cannot separate template and response.
    """
    eos, unknown = tokenizer.eos_token_id, {getattr(tokenizer, "unk_token_id", None)}
    ids: list[int] = []
    spans: list[_Span] = []
    silent = 0
    for text in texts:
        if spans:
            if eos is None:
                raise CorpusError("the tokenizer has no EOS token to join records with; set one")
            ids.append(int(eos))
            spans[-1] = replace(spans[-1], tokens=spans[-1].tokens + 1)
        own, template = _encode(text, tokenizer, marks=marks)
        ids.extend(own)
        silent += bool(text.text.strip()) and not set(own) - unknown
        spans.append(_Span(text.number, len(own), template))
        if wanted is not None and len(ids) >= wanted:
            break
    return JoinedText(ids, spans, silent)


def _encode(
    text: RecordText, tokenizer: PreTrainedTokenizerBase, *, marks: bool
) -> tuple[list[int], int]:
    """Return the ids of a text, and their number before the response text."""
    placed = marks and text.response > 0
    by_offset = placed and tokenizer.is_fast
    offsets = {"return_offsets_mapping": True} if by_offset else {}
    encoded = tokenizer(text.text, add_special_tokens=False, verbose=False, **offsets)
    ids: list[int] = encoded["input_ids"]
    if not placed:
        return ids, 0
    if by_offset:
        # A token across the border belongs to the template, because it begins there.
        return ids, sum(start < text.response for start, _ in encoded["offset_mapping"])
    # Without offsets the border is known only if a token ends there.
    template = tokenizer(text.text[: text.response], add_special_tokens=False, verbose=False)
    count = len(template["input_ids"])
    if ids[:count] != template["input_ids"]:
        raise CorpusError(
            f"record {text.number}: this tokenizer has no offsets, and a token crosses the border "
            "between template and response, so they cannot be separated; use the fast tokenizer"
        )
    return ids, count
