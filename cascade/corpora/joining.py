"""Joining the texts of records to one sequence of marked token ids."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cascade.core.errors import CorpusError
from cascade.corpora.bos import BosRule
from cascade.corpora.files.documents import LongText
from cascade.corpora.long_texts import LONG, tokens_in_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    #: Token ids, in 4 bytes each.
    Ids = array[int]


@dataclass(frozen=True)
class Passage:
    """A text, and which of it is response text.

    Attributes:
        text: The whole text.
        responses: The characters `[begin, end)` of each response; None if all of it is one.
        closed: The text ends with the tokenizer's EOS, so that none follows it.
    """

    text: str | LongText
    responses: tuple[tuple[int, int], ...] | None = None
    closed: bool = False

    @property
    def ends_in_response(self) -> bool:
        """Whether the EOS that follows the text belongs to a response."""
        if self.responses is None:
            return True
        return bool(self.responses) and self.responses[-1][1] == len(self.whole())

    def whole(self) -> str:
        """Return the whole text."""
        return self.text if isinstance(self.text, str) else self.text.whole()

    def is_blank(self) -> bool:
        """Return whether the text has no characters but white space. A long text is not blank."""
        return isinstance(self.text, str) and not self.text.strip()


@dataclass(frozen=True)
class RecordText:
    """One text of a record.

    Attributes:
        number: The record's number, from 1.
        passage: The text.
    """

    number: int
    passage: Passage


@dataclass(frozen=True)
class _Span:
    """The tokens of one text, including BOS before it and EOS after it, if there are any.

    Attributes:
        number: The record's number, from 1.
        tokens: The number of tokens.
    """

    number: int
    tokens: int


@dataclass
class JoinedCounts:
    """Counts of joined texts.

    Attributes:
        records: The number of records.
        texts: The number of texts.
        silent: How many of them are not blank, but became no token, or unknown tokens alone.
        tokens: The number of tokens.
        bos: How many of them are BOS.
        eos: How many of them are EOS.
    """

    records: int = 0
    texts: int = 0
    silent: int = 0
    tokens: int = 0
    bos: int = 0
    eos: int = 0


@dataclass(frozen=True)
class JoinedText:
    """Token ids of several records.

    Attributes:
        ids: The ids of all records, joined by EOS.
        spans: One per text.
        responses: One per token, 1 for response text; empty without marks.
        silent: How many texts are not blank, but became no token, or unknown tokens alone.
    """

    ids: Ids
    spans: list[_Span]
    responses: bytearray
    silent: int = 0

    @property
    def records(self) -> int:
        """The number of records."""
        return len({span.number for span in self.spans})

    def counts(self, bos: int | None, eos: int | None) -> JoinedCounts:
        """Return counts of what was joined.

        Args:
            bos: The id of BOS; None if the tokenizer has none.
            eos: The id of EOS; None if the tokenizer has none.
        """
        return JoinedCounts(
            records=self.records,
            texts=len(self.spans),
            silent=self.silent,
            tokens=len(self.ids),
            bos=0 if bos is None else self.ids.count(bos),
            eos=0 if eos is None else self.ids.count(eos),
        )

    def record_numbers(self, cut: Cut) -> npt.NDArray[np.int32]:
        """Return the number of each token's record, `[S, T]`."""
        numbers = np.array([span.number for span in self.spans], dtype=np.int32)
        return np.repeat(numbers, [span.tokens for span in self.spans])[cut.places]

    def response_marks(self, cut: Cut) -> npt.NDArray[np.bool_]:
        """Return which tokens are response text, `[S, T]`. BOS never is."""
        marked = np.frombuffer(self.responses, dtype=np.bool_)[cut.places]
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


def cut(ids: Ids, seq_len: int, bos: int | None, most: int | None = None) -> Cut:
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
        added = bos is not None and ids[start : start + 1] != array("i", [bos])
        if start + seq_len - added > len(ids):
            break
        starts.append(start)
        begun.append(added)
        start += seq_len - added
    marks = np.array(begun, dtype=bool)
    # The BOS that is added takes the first place, and its token the second one.
    columns = np.maximum(np.arange(seq_len)[None, :] - marks[:, None], 0)
    return Cut(np.array(starts, dtype=np.int64)[:, None] + columns, marks)


@dataclass(frozen=True)
class JoinedPiece:
    """What one text adds to the joined ids.

    Attributes:
        number: The record's number, from 1.
        ended: The EOS that ends the text before it; None if there is none.
        ended_in_response: Whether this EOS belongs to a response.
        ids: The ids of the text, BOS included.
        responses: One per id, 1 for response text; empty without marks.
        silent: Whether the text is not blank, but became no token, or unknown tokens alone.
    """

    number: int
    ended: int | None
    ended_in_response: bool
    ids: list[int]
    responses: bytearray
    silent: bool


def pieces(
    texts: Iterable[RecordText],
    tokenizer: PreTrainedTokenizerBase,
    wanted: int | None,
    *,
    marks: bool,
    bos: BosRule,
) -> Iterator[JoinedPiece]:
    """Yield what each text adds to the token ids of all texts, as `join` joins them."""
    eos, unknown = tokenizer.eos_token_id, {getattr(tokenizer, "unk_token_id", None), bos.token}
    count, last = 0, None
    before: Passage | None = None
    for text in texts:
        ended = None
        if before is not None and not before.closed:
            if eos is None:
                raise CorpusError("the tokenizer has no EOS token to join records with; set one")
            ended = last = int(eos)
            count += 1
        ended_in_response = marks and before is not None and before.ends_in_response
        before = text.passage
        most = None if wanted is None else max(wanted - count, 1)
        own, marked = _encode(text, tokenizer, most, marks=marks)
        silent = not before.is_blank() and not set(own) - unknown
        begun = bos.begin(own)
        marked = bytearray(max(len(begun) - len(own), 0)) + marked[max(len(own) - len(begun), 0) :]
        if bos.token is not None:
            marked[:1] = b"\0"  # BOS is no response
            if last == bos.token:  # EOS, which is BOS as well
                begun, marked = begun[1:], marked[1:]
        yield JoinedPiece(
            text.number, ended, ended_in_response, begun, marked if marks else bytearray(), silent
        )
        count += len(begun)
        last = begun[-1] if begun else last
        if wanted is not None and count >= wanted:
            return


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
    ids, responses = array("i"), bytearray()
    spans: list[_Span] = []
    silent = 0
    for piece in pieces(texts, tokenizer, wanted, marks=marks, bos=bos):
        if piece.ended is not None:
            ids.append(piece.ended)
            spans[-1] = replace(spans[-1], tokens=spans[-1].tokens + 1)
            responses += bytes([piece.ended_in_response]) if marks else b""
        ids.extend(piece.ids)
        responses += piece.responses
        spans.append(_Span(piece.number, len(piece.ids)))
        silent += piece.silent
    return JoinedText(ids, spans, responses, silent)


def _encode(
    text: RecordText, tokenizer: PreTrainedTokenizerBase, most: int | None, *, marks: bool
) -> tuple[list[int], bytearray]:
    """Return the ids of a text, and 1 for each that is response text, 0 for each that is not.

    Args:
        text: The text.
        tokenizer: The tokenizer of the model.
        most: Stop a long text at this many tokens; None for all of it.
        marks: Determine which tokens are response text.
    """
    passage = text.passage
    ranges = passage.responses if marks else None
    fast = bool(getattr(tokenizer, "is_fast", False))
    ids: list[int] = []
    starts: list[int] = []
    if fast and (isinstance(passage.text, LongText) or len(passage.text) > LONG):
        for piece, begins in tokens_in_pieces(passage.text, tokenizer):
            ids += piece
            starts += begins if ranges else []
            if most is not None and len(ids) >= most:
                break
        return ids, _marked(ids, starts, ranges)
    whole = passage.whole()
    offsets = {"return_offsets_mapping": True} if ranges and fast else {}
    encoded = tokenizer(whole, add_special_tokens=False, verbose=False, **offsets)
    ids = encoded["input_ids"]
    if ranges and not fast:
        return ids, _marked_by_border(ids, whole, ranges, tokenizer, text.number)
    return ids, _marked(ids, [start for start, _ in encoded.get("offset_mapping", ())], ranges)


def _marked(
    ids: list[int], starts: list[int], ranges: tuple[tuple[int, int], ...] | None
) -> bytearray:
    """Mark the tokens that begin in a response: one across its border belongs to the template."""
    if ranges is None:
        return bytearray(b"\1") * len(ids)
    if not ranges:
        return bytearray(len(ids))
    places = np.array(starts)
    marked = np.zeros(len(ids), dtype=np.bool_)
    for begin, end in ranges:
        marked |= (places >= begin) & (places < end)
    return bytearray(marked.tobytes())


def _marked_by_border(
    ids: list[int],
    text: str,
    ranges: tuple[tuple[int, int], ...],
    tokenizer: PreTrainedTokenizerBase,
    number: int,
) -> bytearray:
    """Mark the tokens of responses without offsets, where a token must end at each border."""
    marked = bytearray(len(ids))
    for begin, end in ranges:
        counts = []
        for border in (begin, end):
            before = tokenizer(text[:border], add_special_tokens=False, verbose=False)["input_ids"]
            if ids[: len(before)] != before:
                raise CorpusError(
                    f"record {number}: this tokenizer has no offsets, and a token crosses the "
                    "border between template and response, so they cannot be separated; use the "
                    "fast tokenizer"
                )
            counts.append(len(before))
        marked[counts[0] : counts[1]] = b"\1" * (counts[1] - counts[0])
    return marked
