"""Corpora as blocks of tokens: read, tokenized, joined and cut into sequences."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from cascade.core.defaults import NUM_SAMPLES, SEQ_LEN
from cascade.core.errors import CorpusError, ModelError
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import UNSET
from cascade.corpora.joining import RecordText, join
from cascade.corpora.readers import EMBEDDED, name_of_texts, read_records, read_texts
from cascade.corpora.record_text import Record, text_of
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["train", "held-out"]

#: A corpus in memory: texts, or the rows of a dataset.
Texts = Iterable[str] | Iterable[Record]


#: The two parts of a corpus that something is trained and judged on.
PARTS: tuple[Part, ...] = ("train", "held-out")


#: With fewer sequences there is nothing left to measure beside a pilot.
_FEWEST_WITH_PILOT = 4


#: Of a corpus without a split of its own, one record in so many is held out: the 5th, the 10th.
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids cut into blocks; each block is one sequence, the unit of every interval.

    Attributes:
        ids: `[S, T]` int32.
        source: What the user gave.
        name: A file-system name for baselines.
        records: How many records of the corpus were read.
        record_of: `[S, T]` int32, the number of each token's record, from 1; the EOS that joins
            two records belongs to the first. None where it was not asked for.
        response: `[S, T]`, true for tokens of response text: in a record of Alpaca form, those
            that begin behind its last heading, and its EOS; of any other record all of them. None
            where it was not asked for.
        part: The part of the corpus that this is; None for all of it.
        spread_over: How many sequences the text gave, where only some of them, evenly spaced, are
            these; None where they are all.
    """

    ids: npt.NDArray[np.int32]
    source: str
    name: str
    records: int
    record_of: npt.NDArray[np.int32] | None = None
    response: npt.NDArray[np.bool_] | None = None
    part: Part | None = None
    spread_over: int | None = None

    def __repr__(self) -> str:
        sequences, length = self.ids.shape
        return f"<TokenBlocks: {self.name}, {sequences:,} sequences of {length:,} tokens>"

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.ids.size)

    def fingerprint(self) -> str:
        """Return a SHA-256 over shape and ids: equal exactly when every token is."""
        digest = hashlib.sha256(f"{self.ids.shape}".encode())
        digest.update(np.ascontiguousarray(self.ids, dtype="<i4").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def sequence_fingerprints(self) -> npt.NDArray[np.uint64]:
        """Return 64 bits of SHA-256 per sequence, `[S]`: which sequences two runs share."""
        return np.array(
            [
                int.from_bytes(hashlib.sha256(row.astype("<i4").tobytes()).digest()[:8], "little")
                for row in self.ids
            ],
            dtype=np.uint64,
        )

    def batches(
        self, batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Yield `(ids [B, T], sequence numbers [B])`; the last batch can be smaller."""
        for start in range(0, len(self.ids), batch_size):
            rows = self.ids[start : start + batch_size]
            yield rows, np.arange(start, start + len(rows))

    def spread(self, sequences: int) -> TokenBlocks:
        """Return so many sequences, evenly spaced over the text; all of them where it has fewer.

        The first ones would be of the first documents alone, and their neighbours much like them.

        Args:
            sequences: How many, at least 1.
        """
        if sequences >= len(self.ids):
            return self
        # The middles of as many equal parts of the text.
        rows = (np.arange(sequences) * 2 + 1) * len(self.ids) // (2 * sequences)
        return replace(self._only(rows), spread_over=self.spread_over or len(self.ids))

    def pilot(self, *, least: int = 1, most: int | None = None) -> tuple[TokenBlocks, TokenBlocks]:
        """Part off the first quarter of the sequences: to learn from before the rest is measured.

        Args:
            least: The pilot has so many sequences at least.
            most: And so many at most; any number where None.

        Returns:
            The pilot and the rest.

        Raises:
            CorpusError: Fewer than 4 sequences.
        """
        if len(self.ids) < _FEWEST_WITH_PILOT:
            raise CorpusError(
                f"expected at least {_FEWEST_WITH_PILOT} sequences to learn from and to measure "
                f"on, got {len(self.ids)}; take a larger corpus, a larger --max-tokens or a "
                "smaller --seq-len"
            )
        first = max(least, len(self.ids) // 4)
        first = first if most is None else min(first, most)
        return self._only(slice(first)), self._only(slice(first, None))

    def _only(self, rows: Any) -> TokenBlocks:
        """Return some of the sequences, with their marks."""

        def some(marks: Any) -> Any:
            return None if marks is None else marks[rows]

        return replace(
            self, ids=self.ids[rows], record_of=some(self.record_of), response=some(self.response)
        )

    def provenance(self) -> CorpusProvenance:
        """Return which text these tokens are."""
        rule = f"every {_HELD_OUT_EVERY}th is held out"
        if self.source == EMBEDDED:
            rule = "as the corpus says of each"
        over = self.spread_over
        return CorpusProvenance(
            source=self.source,
            name=self.name,
            fingerprint=self.fingerprint(),
            records=self.records,
            tokens=self.tokens,
            sequences=len(self.ids),
            seq_len=int(self.ids.shape[1]),
            part=UNSET if self.part is None else self.part,
            parted=UNSET if self.part is None else f"by record, {rule}",
            spread=UNSET if over is None else f"evenly over {over:,} sequences",
        )


class ReadingOptions(TypedDict, total=False):
    """How texts in memory are read: the options of `load_blocks` that apply to them."""

    seq_len: int
    num_samples: int | None
    max_tokens: int | None
    text_column: str | None
    seed: int | None


def load_blocks(
    source: str | os.PathLike[str] | Texts,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seq_len: int = SEQ_LEN,
    num_samples: int | None = NUM_SAMPLES,
    max_tokens: int | None = None,
    split: str | None = None,
    config: str | None = None,
    text_column: str | None = None,
    seed: int | None = None,
    part: Part | None = None,
    marks: bool = False,
    stream: bool = False,
) -> TokenBlocks:
    """Read a corpus, put its records together, and cut the tokens into blocks.

    Records in Alpaca form become the seed study's text, others give their text column. Token ids
    of all records are joined by the tokenizer's EOS; what does not fill a last block is dropped.

    Args:
        source: "embedded", a `.jsonl`, `.json`, `.parquet` or `.txt` file (one document), or
            whatever `datasets.load_dataset` takes: a hub id or a folder. Or a corpus in memory: a
            list of texts, or a `datasets.Dataset`.
        tokenizer: The model's.
        seq_len: Tokens per block.
        num_samples: How many records to take, before they are parted; None for all.
        max_tokens: Stop at this many tokens, rounded down to whole blocks.
        split: A split of a hub dataset ("train" where not given), or of the embedded corpus
            ("train", "held-out"; all of it where not given).
        config: A configuration of a hub dataset.
        text_column: The column to read, for records that are not in Alpaca form.
        seed: Take the records in an order drawn with this seed; in the corpus's own where None.
        part: Take the records of one part alone, "train" or "held-out". No record is in both: the
            embedded corpus says of each in which it is, of any other every fifth is held out.
        marks: Mark each token with its record and as response text or not.
        stream: Read a hub dataset record by record, without fetching the whole of it first.

    Raises:
        CorpusError: The corpus is missing, empty, malformed or too small for one block.

    Example:
        >>> from cascade import load
        >>> tokenizer = load("smollm2-135m").tokenizer
        >>> load_blocks("embedded", tokenizer, seq_len=64, max_tokens=256).ids.shape
        (4, 64)
        >>> load_blocks(["A first text.", "And a second one."], tokenizer, seq_len=4).ids.shape
        (2, 4)
    """
    if tokenizer is None:
        raise CorpusError("the model has no tokenizer to read text with; load it with one")
    _check_sizes(seq_len, max_tokens)
    in_memory: Texts | None = None
    if isinstance(source, str | os.PathLike):
        source = os.fspath(source)
    else:
        in_memory, source = source, name_of_texts(source)
        _check_in_memory(split=split, config=config, stream=stream or None)
    if part is not None:
        _check_part(part, source, split)
    if stream and seed is not None:
        raise CorpusError(
            "expected no seed for a stream, which gives its records in their own order; leave the "
            "one or the other out"
        )
    records = (
        read_records(source, split=split, config=config, stream=stream)
        if in_memory is None
        else read_texts(in_memory, text_column)
    )
    if seed is not None:
        records = _shuffled(records, seed)
    texts = (
        RecordText(number, *text_of(record, source, number, text_column))
        for number, record in enumerate(itertools.islice(records, num_samples), start=1)
        if part is None or part == _part_of(record, number, source)
    )
    wanted = None if max_tokens is None else max_tokens // seq_len * seq_len
    joined = join(texts, tokenizer, wanted, marks=marks)
    ids = joined.ids
    if not joined.spans:
        raise CorpusError(f"{source} is empty; expected at least one record{_of_part(part)}")
    rows = len(ids) // seq_len
    if wanted is not None:
        rows = min(rows, wanted // seq_len)
    if rows == 0:
        raise CorpusError(
            f"{source} gives {len(ids)} tokens{_of_part(part)}, expected at least one block of "
            f"{seq_len}; take more records or a smaller --seq-len"
        )
    shape = (rows, seq_len)
    name = corpus_name(source, config=config, split=split)
    return TokenBlocks(
        np.array(ids[: rows * seq_len], dtype=np.int32).reshape(shape),
        source,
        f"{name}-{part}" if part else name,
        len(joined.spans),
        record_of=joined.record_numbers(shape) if marks else None,
        response=joined.response_marks(shape) if marks else None,
        part=part,
    )


def _check_sizes(seq_len: int, max_tokens: int | None) -> None:
    if seq_len < 2:
        raise CorpusError(f"expected --seq-len of at least 2, got {seq_len}")
    if max_tokens is not None and max_tokens < seq_len:
        raise CorpusError(
            f"expected --max-tokens of at least one block of {seq_len} tokens, got {max_tokens}; "
            "raise it or take a smaller --seq-len"
        )


def _check_in_memory(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise CorpusError(
                f"{name} is for hub datasets, got it for texts in memory; leave it out"
            )


def _check_part(part: str, source: str, split: str | None) -> None:
    if part not in PARTS:
        raise CorpusError(f"expected a part among {', '.join(PARTS)}, got {part!r}")
    if source == EMBEDDED and split is not None:
        raise CorpusError(
            f"the parts of {source} are its splits, got the part {part} and the split {split}; "
            "leave one out"
        )


def _part_of(record: Any, number: int, source: str) -> str:
    """Return the part of the corpus that a record is in."""
    if source == EMBEDDED:
        return str(record["split"])
    return "train" if number % _HELD_OUT_EVERY else "held-out"


def _of_part(part: str | None) -> str:
    return f" in its {part} part" if part else ""


def corpus_name(source: str, *, config: str | None = None, split: str | None = None) -> str:
    """Return the file-system name that baselines know a corpus by; nothing of it is read.

    Args:
        source: As for `load_blocks`.
        config: A configuration of a hub dataset.
        split: A split.
    """
    path = Path(os.path.expanduser(source))
    name = path.resolve().stem if os.path.exists(path) else source.replace("/", "--")
    return "-".join(part.lower() for part in (name, config, split) if part)


def _shuffled(records: Iterable[Record], seed: int) -> Iterator[Record]:
    everything = list(records)
    random.Random(seed).shuffle(everything)
    return iter(everything)


def check_blocks(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> None:
    """Refuse a corpus that the model cannot read.

    Args:
        stack: The model.
        blocks: The corpus.
        batch_size: Sequences per forward pass.

    Raises:
        CorpusError: Sequences beyond the model's positions, or batches of none.
        ModelError: Tokens beyond its vocabulary.
    """
    if batch_size < 1:
        raise CorpusError(f"expected --batch-size of at least 1, got {batch_size}")
    length = blocks.ids.shape[1]
    if stack.max_positions is not None and length > stack.max_positions:
        raise CorpusError(
            f"sequences of {length} tokens exceed the model's {stack.max_positions} positions; "
            f"use --seq-len {stack.max_positions} or less"
        )
    if int(blocks.ids.max()) >= stack.vocab_size:
        raise ModelError(
            f"the tokenizer gave token id {int(blocks.ids.max())}, but the model embeds "
            f"{stack.vocab_size} tokens; expected the model's own tokenizer"
        )
