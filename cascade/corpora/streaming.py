"""Corpora that are larger than memory: token ids are written to a file while they are read."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import numpy.typing as npt

from cascade.core.errors import OutputError, os_reason
from cascade.core.provenance import Split
from cascade.corpora.blocks import OpenCorpus, ReadingOptions, Texts, TokenBlocks
from cascade.corpora.joining import JoinedCounts, JoinedPiece, pieces
from cascade.corpora.reading import CorpusReading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cascade.corpora.joining import Ids

#: Bytes of a token id in a file of ids, which is a little-endian int32.
ID_BYTES = 4

#: Sequences that are written at a time.
_WRITTEN = 1 << 12


class StreamingOptions(ReadingOptions, total=False):
    """How a corpus is read as a stream: options of `load_blocks`."""

    split: str | None
    config: str | None
    record_split: Split | None


def stream_blocks(
    source: str | os.PathLike[str] | Texts,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    *,
    progress: Callable[[int], None] | None = None,
    **reading: Unpack[StreamingOptions],
) -> TokenBlocks:
    """Read a corpus and write its token ids to a file; return the sequences as a memory map.

    The sequences are those of `load_blocks` with the same options. Memory does not grow with the
    corpus. Records are read in order; with a seed, the records that are drawn are held, or a hub
    dataset is downloaded first.

    Args:
        source: As for `load_blocks`.
        tokenizer: The tokenizer of the model.
        path: The file, which is replaced.
        progress: Called with the number of tokens that were read since the last call.
        reading: Options of `load_blocks`.

    Raises:
        CorpusError: As for `load_blocks`.
        OutputError: The file cannot be written.

    Example:
        >>> from cascade import load, load_blocks
        >>> tokenizer, texts = load("smollm2-135m").tokenizer, ["A first text.", "Another one."]
        >>> blocks = stream_blocks(texts, tokenizer, Path("tokens.bin"), seq_len=4)
        >>> bool((blocks.ids == load_blocks(texts, tokenizer, seq_len=4).ids).all())
        True
    """
    named = isinstance(source, str | os.PathLike)
    chosen = CorpusReading(**({} if named else {"num_samples": None}) | dict(reading))  # type: ignore[arg-type]
    stream = named and chosen.seed is None
    corpus = OpenCorpus.of(source, tokenizer, chosen, marks=False, stream=stream)
    found = JoinedCounts()
    joined = pieces(corpus.records(), corpus.tokenizer, corpus.wanted, marks=False, bos=corpus.rule)
    counted = _counted(joined, found, corpus, progress)
    rows = sequences(counted, chosen.seq_len, corpus.rule.token, corpus.most_sequences)
    count = _write(path, (np.frombuffer(row, dtype=np.intc) for row in rows))
    corpus.check_read(found)
    corpus.check_cut(count, found.tokens)
    return corpus.blocks(mapped_ids(path, count, chosen.seq_len), found.records)


def _counted(
    joined: Iterable[JoinedPiece],
    counts: JoinedCounts,
    corpus: OpenCorpus,
    progress: Callable[[int], None] | None,
) -> Iterator[list[int]]:
    """Yield the ids of each piece, after counting them."""
    eos, bos = corpus.tokenizer.eos_token_id, corpus.rule.token
    last = 0
    for piece in joined:
        ids = piece.ids if piece.ended is None else [piece.ended, *piece.ids]
        counts.texts += 1
        counts.silent += piece.silent
        counts.tokens += len(ids)
        counts.bos += 0 if bos is None else ids.count(bos)
        counts.eos += 0 if eos is None else ids.count(eos)
        if piece.number != last:  # texts of one record follow each other
            counts.records += 1
            last = piece.number
        if progress is not None:
            progress(len(ids))
        yield ids


def sequences(
    joined: Iterable[list[int]], seq_len: int, bos: int | None, most: int | None = None
) -> Iterator[Ids]:
    """Yield the sequences that joined ids are cut into, as `cascade.corpora.joining.cut` does.

    Args:
        joined: The ids, in any pieces.
        seq_len: Tokens per sequence, BOS included.
        bos: The id of BOS; None to add none.
        most: The maximum number of sequences; None for no maximum.

    Example:
        >>> [row.tolist() for row in sequences([[1, 2, 3], [4, 5]], 2, None)]
        [[1, 2], [3, 4]]
    """
    waiting = array("i")
    count = 0
    for ids in joined:
        waiting.extend(ids)
        start = 0
        while most is None or count < most:
            added = bos is not None and waiting[start : start + 1] != array("i", [bos])
            end = start + seq_len - added
            if end > len(waiting):
                break
            row = waiting[start:end]
            yield array("i", [bos]) + row if added and bos is not None else row
            count += 1
            start = end
        del waiting[:start]


def _write(path: Path, parts: Iterable[npt.NDArray[np.int32]]) -> int:
    """Write token ids to a file, and return how many parts there were."""
    count = 0
    with _writing(path), path.open("wb", buffering=1 << 20) as file:
        iterator = iter(parts)
        while True:
            with _reading():
                part = next(iterator, None)
            if part is None:
                return count
            file.write(part.astype("<i4").tobytes())
            count += 1


class _ReadingError(Exception):
    """Carries an `OSError` of reading past the handler of those of writing."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _ReadingError from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except _ReadingError as error:
        raise error.__cause__ from None  # type: ignore[misc]  # always an OSError
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {os_reason(error)}; free some space or choose another folder"
        ) from error


def write_ids(path: Path, blocks: TokenBlocks) -> TokenBlocks:
    """Write the token ids of blocks to a file; return the blocks with ids as a memory map.

    Args:
        path: The file, which is replaced.
        blocks: The sequences.

    Raises:
        OutputError: The file cannot be written.
    """
    starts = range(0, len(blocks.ids), _WRITTEN)
    _write(path, (blocks.ids[start : start + _WRITTEN] for start in starts))
    return replace(blocks, ids=mapped_ids(path, *blocks.ids.shape))


def mapped_ids(path: Path, count: int, seq_len: int) -> npt.NDArray[np.int32]:
    """Return a file of token ids as a memory map, `[S, T]`.

    Args:
        path: The file.
        count: The number of sequences.
        seq_len: Tokens per sequence.
    """
    return np.memmap(path, dtype="<i4", mode="r", shape=(count, seq_len))
