"""Joining the texts of records to one sequence of marked token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cascade.core.errors import CorpusError
from cascade.corpora.bos import BosRule

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
        template: The number of tokens before the response text, BOS included.
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

    def record_numbers(self, cut: Cut) -> npt.NDArray[np.int32]:
        """Return the number of each token's record, `[S, T]`."""
        numbers = np.array([span.number for span in self.spans], dtype=np.int32)
        return np.repeat(numbers, [span.tokens for span in self.spans])[cut.places]

    def response_marks(self, cut: Cut) -> npt.NDArray[np.bool_]:
        """Return which tokens are response text, `[S, T]`. BOS never is."""
        runs = [run for span in self.spans for run in (span.template, span.tokens - span.template)]
        marked = np.repeat(np.tile([False, True], len(self.spans)), runs)[cut.places]
        marked[cut.begun, 0] = False
        return marked


@dataclass(frozen=True)
class Cut:
    """How joined ids are cut into sequences.

    Attributes:
        places: `[S, T]`, the index of each token; of a BOS that was added, of the token after it.
        begun: `[S]`, whether BOS was added at the sequence's start.
    """

    places: npt.NDArray[np.int64]
    begun: npt.NDArray[np.bool_]


def cut(ids: Sequence[int], seq_len: int, bos: int | None, most: int | None = None) -> Cut:
    """Cut ids into sequences, each of which begins with BOS. An incomplete last one is dropped.

    Args:
        ids: The ids of all records.
        seq_len: Tokens per sequence, BOS included.
        bos: The id of BOS; None to add none.
        most: The maximum number of sequences; None for no maximum.
    """
    starts: list[int] = []
    begun: list[bool] = []
    start = 0
    while most is None or len(starts) < most:
        added = bos is not None and ids[start : start + 1] != [bos]
        if start + seq_len - added > len(ids):
            break
        starts.append(start)
        begun.append(added)
        start += seq_len - added
    marks = np.array(begun, dtype=bool)
    # The BOS that is added takes the first place, and its token the second one.
    columns = np.maximum(np.arange(seq_len)[None, :] - marks[:, None], 0)
    return Cut(np.array(starts, dtype=np.int64)[:, None] + columns, marks)


def join(
    texts: Iterable[RecordText],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int | None,
    *,
    marks: bool,
    bos: BosRule,
) -> JoinedText:
    """Return the token ids of all texts, joined by EOS.

    Where EOS is also BOS, one token is both.

    Args:
        texts: The texts, in order.
        tokenizer: The tokenizer of the model.
        wanted: Stop at this many tokens; None for all texts.
        marks: Determine which tokens are response text.
        bos: How the ids of each text begin.

    Raises:
        CorpusError: The tokenizer has no EOS, or cannot separate template and response.
    """
    eos, unknown = tokenizer.eos_token_id, {getattr(tokenizer, "unk_token_id", None), bos.token}
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
        silent += bool(text.text.strip()) and not set(own) - unknown
        begun = bos.begin(own)
        template = max(0, template + len(begun) - len(own))
        if bos.token is not None:
            template = max(1, template)
            if ids[-1:] == [bos.token]:  # EOS, which is BOS as well
                begun, template = begun[1:], template - 1
        ids.extend(begun)
        spans.append(_Span(text.number, len(begun), template))
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
