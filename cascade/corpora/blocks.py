"""Reading corpora as blocks of tokens: tokenized, joined and cut into sequences."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from cascade.core.defaults import NUM_SAMPLES, SEQ_LEN
from cascade.core.errors import CorpusError, ModelError
from cascade.core.names import file_name, path_name
from cascade.core.provenance import SPLITS, CorpusProvenance, Split
from cascade.core.schema import UNSET, UnsetType
from cascade.corpora.bos import BosRule, bos_rule
from cascade.corpora.files.kinds import name_of_file
from cascade.corpora.files.standard_input import STANDARD_INPUT, is_pipe
from cascade.corpora.forms import Record, RecordReader
from cascade.corpora.joining import JoinedCounts, RecordText, cut, join
from cascade.corpora.readers import EMBEDDED, name_of_texts, read_records, read_texts
from cascade.corpora.reading import CorpusReading
from cascade.corpora.selection import HELD_OUT_EVERY, RecordTexts, drawn
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A corpus in memory: texts, or the rows of a dataset.
Texts = Iterable[str] | Iterable[Record]


#: The fewest sequences that can be divided into a pilot and a rest.
_MIN_WITH_PILOT = 4


#: Sequences whose token ids are hashed at a time.
_HASHED = 1 << 14


def ids_hash(ids: npt.NDArray[np.int32]) -> str:
    """Return a SHA-256 over the shape and the token ids of sequences, in memory or in a file.

    Args:
        ids: `[S, T]`.
    """
    digest = hashlib.sha256(f"{ids.shape}".encode())
    for start in range(0, len(ids), _HASHED):
        some = np.ascontiguousarray(ids[start : start + _HASHED], dtype="<i4")
        digest.update(some.tobytes())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids cut into blocks. Each block is one sequence, the unit of every interval.

    Attributes:
        ids: `[S, T]` int32.
        source: The source that the user named.
        name: The name of the corpus in baseline paths.
        records: The number of records read.
        record_of: `[S, T]` int32, the number of each token's record, from 1. The EOS that joins
            two records belongs to the first. None without marks.
        response: `[S, T]`, true for tokens of response text, and for the EOS that follows it: the
            output of Alpaca form, the assistant's turns of a chat, the completion of a prompt, or
            all of a text. None without marks.
        record_split: The split that was read, "train" or "held-out"; None for the whole corpus.
        empty_records: The number of records that are null or blank.
        form: The form of the records, if they are not in Alpaca form or read from a text column.
        bos: As in `CorpusProvenance`: "yes" where records and sequences begin with BOS.
        spread_over: The number of sequences in the text, if these are only some of them, evenly
            spaced; else None.
        reading: How the corpus was read.

    Example:
        >>> blocks = TokenBlocks(np.zeros((3, 8), np.int32), "zeros", "zeros", records=1)
        >>> blocks.tokens
        24
        >>> [ids.shape for ids, numbers in blocks.batches(2)]
        [(2, 8), (1, 8)]
    """

    ids: npt.NDArray[np.int32]
    source: str
    name: str
    records: int
    record_of: npt.NDArray[np.int32] | None = None
    response: npt.NDArray[np.bool_] | None = None
    record_split: Split | None = None
    spread_over: int | None = None
    empty_records: int = 0
    form: str | None = None
    reading: CorpusReading = field(default_factory=CorpusReading)
    bos: Literal["yes", "no"] | UnsetType = UNSET

    def __repr__(self) -> str:
        sequences, length = self.ids.shape
        return f"<TokenBlocks: {self.name}, {sequences:,} sequences of {length:,} tokens>"

    @property
    def tokens(self) -> int:
        """The number of tokens in all blocks."""
        return int(self.ids.size)

    def fingerprint(self) -> str:
        """Return a SHA-256 over shape and ids."""
        return ids_hash(self.ids)

    def sequence_fingerprints(self) -> npt.NDArray[np.uint64]:
        """Return 64 bits of SHA-256 per sequence, `[S]`, to find sequences that two runs share."""
        found = np.empty(len(self.ids), dtype="<u8")
        for number, row in enumerate(self.ids):
            digest = hashlib.sha256(row.astype("<i4").tobytes()).digest()
            found[number] = int.from_bytes(digest[:8], "little")
        return found.astype(np.uint64)

    def batches(
        self, batch_size: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
        """Yield `(ids [B, T], sequence numbers [B])`; the last batch may be smaller."""
        for start in range(0, len(self.ids), batch_size):
            rows = self.ids[start : start + batch_size]
            yield rows, np.arange(start, start + len(rows))

    def spread(self, sequences: int) -> TokenBlocks:
        """Return some sequences, evenly spaced over the text; all of them if there are fewer.

        The first sequences would all come from the first few documents.

        Args:
            sequences: The number of sequences, at least 1.
        """
        if sequences >= len(self.ids):
            return self
        # The middles of as many equal sections of the text.
        rows = (np.arange(sequences) * 2 + 1) * len(self.ids) // (2 * sequences)
        return replace(self._only(rows), spread_over=self.spread_over or len(self.ids))

    def pilot(self, *, least: int = 1, most: int | None = None) -> tuple[TokenBlocks, TokenBlocks]:
        """Divide the sequences into a pilot, the first quarter, and the rest.

        Args:
            least: The minimum number of sequences in the pilot.
            most: The maximum number of sequences in the pilot; None for no maximum.

        Returns:
            The pilot and the rest.

        Raises:
            CorpusError: There are fewer than 4 sequences.
        """
        if len(self.ids) < _MIN_WITH_PILOT:
            raise CorpusError(
                f"expected at least {_MIN_WITH_PILOT} sequences to learn from and to measure "
                f"on, got {len(self.ids)}; take a larger corpus, a larger --max-tokens or a "
                "smaller --seq-len"
            )
        first = max(least, len(self.ids) // 4)
        first = first if most is None else min(first, most)
        return self._only(slice(first)), self._only(slice(first, None))

    def _only(self, rows: Any) -> TokenBlocks:
        """Return the blocks of some rows, with their marks."""

        def some(marks: Any) -> Any:
            return None if marks is None else marks[rows]

        return replace(
            self, ids=self.ids[rows], record_of=some(self.record_of), response=some(self.response)
        )

    def provenance(self) -> CorpusProvenance:
        """Return the provenance of the text."""
        rule = f"every {HELD_OUT_EVERY}th is held out"
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
            record_split=UNSET if self.record_split is None else self.record_split,
            split_rule=UNSET if self.record_split is None else f"by record, {rule}",
            empty_records=self.empty_records or UNSET,
            form=UNSET if self.form is None else self.form,
            spread=UNSET if over is None else f"evenly over {over:,} sequences",
            **self.reading.recorded(),
            bos=self.bos,
        )


class ReadingOptions(TypedDict, total=False):
    """How texts in memory are read: the options of `load_blocks` that apply to them."""

    seq_len: int
    num_samples: int | None
    max_tokens: int | None
    text_column: str | None
    seed: int | None
    bos: str


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
    record_split: Split | None = None,
    marks: bool = False,
    stream: bool = False,
    bos: str = "auto",
) -> TokenBlocks:
    """Read a corpus and cut its tokens into blocks.

    The columns of the first record say in which form all records are (docs/how-to/corpora.md).
    Token ids of all records are joined by the tokenizer's EOS. With BOS, each record and each block
    begins with one BOS token, which counts as a token of the block. An incomplete last block is
    dropped.

    Args:
        source: "embedded", a file (`.jsonl`, `.json`, `.ndjson`, `.csv`, `.tsv`, `.txt`, each also
            compressed; `.parquet`, `.arrow`), a folder of such files or of a saved dataset, a hub
            id, "-" for standard input, a list of texts, or a `datasets.Dataset`.
        tokenizer: The tokenizer of the model.
        seq_len: Tokens per block.
        num_samples: The number of records to read, before `record_split` selects some; None for
            all.
        max_tokens: The maximum number of tokens, rounded down to whole blocks (default: no
            maximum).
        split: A split of a hub dataset or of a folder (default: "train"), or of the embedded
            corpus, "train" or "held-out" (default: both).
        config: A configuration of a hub dataset.
        text_column: The column to read, as a name or a dotted path (default: by the form of the
            records).
        seed: Shuffle the records with this seed (default: the order of the corpus).
        record_split: Keep only records for training ("train") or for evaluation ("held-out"). The
            embedded corpus assigns each record to one of them; in any other corpus every fifth
            record is held out.
        marks: Mark each token with its record, and whether it is response text.
        stream: Read a hub dataset record by record instead of downloading it first.
        bos: Whether records and blocks begin with BOS: "auto" (if the tokenizer puts it before a
            text), "yes" or "no".

    Raises:
        CorpusError: The corpus is missing, empty, malformed or too small for one block.
        UsageError: `bos` is "yes", and the tokenizer has no BOS token.

    Example:
        >>> from cascade import load
        >>> tokenizer = load("smollm2-135m").tokenizer
        >>> load_blocks("embedded", tokenizer, seq_len=64, max_tokens=256).ids.shape
        (4, 64)
        >>> load_blocks(["A first text.", "And a second one."], tokenizer, seq_len=4).ids.shape
        (2, 4)
    """
    reading = CorpusReading(
        seq_len=seq_len,
        num_samples=num_samples,
        max_tokens=max_tokens,
        split=split,
        config=config,
        text_column=text_column,
        seed=seed,
        record_split=record_split,
        bos=bos,
    )
    corpus = OpenCorpus.of(source, tokenizer, reading, marks=marks, stream=stream)
    rule, source = corpus.rule, corpus.source
    joined = join(corpus.records(), corpus.tokenizer, corpus.wanted, marks=marks, bos=rule)
    corpus.check_read(joined.counts(rule.token, corpus.tokenizer.eos_token_id))
    ids = joined.ids
    rows = cut(ids, seq_len, rule.token, corpus.most_sequences)
    corpus.check_cut(len(rows.places), len(ids))
    tokens = np.array(ids, dtype=np.int32)[rows.places]
    if rule.token is not None:
        tokens[rows.begun, 0] = rule.token
    return corpus.blocks(
        tokens,
        joined.records,
        record_of=joined.record_numbers(rows) if marks else None,
        response=joined.response_marks(rows) if marks else None,
    )


@dataclass(frozen=True)
class OpenCorpus:
    """A corpus whose records can be read, with the rules by which they are joined.

    Attributes:
        source: The source that the user named, or the name of texts in memory.
        tokenizer: The tokenizer of the model.
        reading: How the corpus is read.
        rule: How the ids of each text begin.
        texts: The texts of its records, and counts of what was read.
        drawn: The records that are read.
    """

    source: str
    tokenizer: PreTrainedTokenizerBase
    reading: CorpusReading
    rule: BosRule
    texts: RecordTexts
    drawn: Iterator[Any]

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str] | Texts,
        tokenizer: PreTrainedTokenizerBase | None,
        reading: CorpusReading,
        *,
        marks: bool,
        stream: bool,
    ) -> OpenCorpus:
        """Open a corpus. `load_blocks` describes the arguments and the errors."""
        if tokenizer is None:
            raise CorpusError(
                "the model has no tokenizer to read text with; load it with its tokenizer"
            )
        _check_sizes(reading.seq_len, reading.max_tokens)
        rule = bos_rule(tokenizer, reading.bos)
        split, config, seed = reading.split, reading.config, reading.seed
        in_memory: Texts | None = None
        if isinstance(source, str | os.PathLike):
            source = os.fspath(source)
        else:
            in_memory, source = source, name_of_texts(source)
            _check_in_memory(split=split, config=config, stream=stream or None)
        if reading.record_split is not None:
            _check_record_split(reading.record_split, source, split)
        if stream and seed is not None:
            raise CorpusError(
                "expected no seed for a stream, which keeps the order of its records; leave out "
                "the seed or the stream"
            )
        records = (
            read_records(source, split=split, config=config, stream=stream)
            if in_memory is None
            else read_texts(in_memory, reading.text_column)
        )
        reader = RecordReader(source, reading.text_column, tokenizer, marks=marks)
        texts = RecordTexts(reader, source, reading.record_split)
        return cls(
            source, tokenizer, reading, rule, texts, drawn(records, seed, reading.num_samples)
        )

    def records(self) -> Iterator[RecordText]:
        """Yield the texts of the records, once."""
        return self.texts.of(self.drawn)

    @property
    def most_sequences(self) -> int | None:
        """The maximum number of sequences; None for no maximum."""
        most = self.reading.max_tokens
        return None if most is None else most // self.reading.seq_len

    @property
    def wanted(self) -> int | None:
        """The number of tokens to read; None for all."""
        most = self.most_sequences
        return None if most is None else most * self.reading.seq_len

    def check_read(self, counts: JoinedCounts) -> None:
        """Check that text was read.

        Args:
            counts: Counts of what was read.

        Raises:
            CorpusError: There is none, or most of it is no text.
        """
        if not counts.texts:
            split = _in_split(self.reading.record_split)
            raise CorpusError(f"{self.source} is empty; expected at least one record{split}")
        self.texts.check_readable(counts, self.tokenizer.eos_token_id, self.rule)

    def check_cut(self, sequences: int, tokens: int) -> None:
        """Check that there is a sequence.

        Args:
            sequences: The number of sequences.
            tokens: The number of tokens that they were cut from.

        Raises:
            CorpusError: There is none.
        """
        if not sequences:
            split = _in_split(self.reading.record_split)
            raise CorpusError(
                f"{self.source} gives {tokens} tokens{split}, expected at least one "
                f"block of {self.reading.seq_len}; take more records or a smaller --seq-len"
            )

    def blocks(
        self,
        ids: npt.NDArray[np.int32],
        records: int,
        *,
        record_of: npt.NDArray[np.int32] | None = None,
        response: npt.NDArray[np.bool_] | None = None,
    ) -> TokenBlocks:
        """Return the sequences of the corpus, after everything was read.

        Args:
            ids: `[S, T]`.
            records: The number of records that were read.
            record_of: As in `TokenBlocks`.
            response: As in `TokenBlocks`.
        """
        reading = self.reading
        name = corpus_name(self.source, config=reading.config, split=reading.split)
        split = reading.record_split
        return TokenBlocks(
            ids,
            self.source,
            f"{name}-{split}" if split else name,
            records,
            empty_records=self.texts.empty,
            form=self.texts.reader.form,
            record_split=split,
            reading=reading,
            bos=self.rule.recorded,
            record_of=record_of,
            response=response,
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


def _check_record_split(record_split: str, source: str, split: str | None) -> None:
    if record_split not in SPLITS:
        raise CorpusError(f"expected record_split among {', '.join(SPLITS)}, got {record_split!r}")
    if source == EMBEDDED and split is not None:
        raise CorpusError(
            f"expected record_split or split for {source}, got record_split {record_split} and "
            f"split {split}; leave one out"
        )


def _in_split(split: str | None) -> str:
    return f" in its {split} split" if split else ""


def corpus_name(source: str, *, config: str | None = None, split: str | None = None) -> str:
    """Return the name of a corpus in baseline paths, without reading the corpus.

    Args:
        source: As for `load_blocks`.
        config: A configuration of a hub dataset.
        split: A split.
    """
    path = Path(os.path.expanduser(source))
    if is_pipe(source):
        name = "stdin" if source == STANDARD_INPUT else "pipe"
    elif os.path.exists(path):
        name = path_name(path, name_of_file(Path(os.path.realpath(path))))
    else:
        name = file_name(source)
    return file_name("-".join(part for part in (name, config, split) if part))


def check_blocks(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> None:
    """Check that a model can read a corpus.

    Args:
        stack: The model.
        blocks: The corpus.
        batch_size: Sequences per forward pass.

    Raises:
        CorpusError: A sequence is longer than the model's positions, or the batch size is below 1.
        ModelError: A token id is outside the model's vocabulary.
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
