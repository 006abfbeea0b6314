"""Which records of a corpus are read, and what was found in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cascade.core.errors import CorpusError
from cascade.core.provenance import Split
from cascade.corpora.bos import BosRule
from cascade.corpora.files.documents import LongText
from cascade.corpora.forms import RecordReader
from cascade.corpora.joining import JoinedCounts, Passage, RecordText
from cascade.corpora.readers import EMBEDDED

#: In a corpus without its own splits, every 5th record is held out.
HELD_OUT_EVERY = 5


def drawn(records: Iterable[Any], seed: int | None, num_samples: int | None) -> Iterator[Any]:
    """Yield records in order, or shuffled.

    Where records can be read twice, they are counted first, so that no more than those that are
    drawn are held.

    Args:
        records: All records.
        seed: Shuffle them with this seed; None for their order.
        num_samples: How many records; None for all.
    """
    if seed is None:
        yield from itertools.islice(records, num_samples)
        return
    indexed = isinstance(records, Sequence) or hasattr(records, "__getitem__")
    if not indexed and (num_samples is None or iter(records) is records):
        records = list(records)
        indexed = True
    count = len(records) if indexed else sum(1 for _ in records)  # type: ignore[arg-type]
    order = list(range(count))
    random.Random(seed).shuffle(order)
    if indexed:
        for place in order[:num_samples]:
            yield records[place]  # type: ignore[index]
        return
    wanted = set(order[:num_samples])
    held = {place: one for place, one in enumerate(records) if place in wanted}
    for place in order[:num_samples]:
        yield held.pop(place)


@dataclass
class RecordTexts:
    """The texts of a corpus's records, and counts of what was read.

    Attributes:
        reader: Reads a record.
        source: The corpus, for errors.
        record_split: The split to which records are limited; None for all.
        empty: Records that are null or blank.
        characters: Characters of all texts.
        nuls: NUL characters among them.
    """

    reader: RecordReader
    source: str
    record_split: Split | None = None
    empty: int = 0
    characters: int = 0
    nuls: int = 0

    def of(self, records: Iterable[Any]) -> Iterator[RecordText]:
        """Yield the texts of records, counting them."""
        for number, record in enumerate(records, start=1):
            if self.record_split not in (None, split_of(record, number, self.source)):
                continue
            passages = self.reader.passages(record, number)
            self.empty += all(passage.is_blank() for passage in passages)
            for passage in passages:
                yield RecordText(number, self._counted(passage))

    def _counted(self, passage: Passage) -> Passage:
        text = passage.text
        if isinstance(text, str):
            self._count(text)
            return passage

        def pieces() -> Iterator[str]:
            for piece in text.pieces():
                self._count(piece)
                yield piece

        return replace(passage, text=LongText(pieces))

    def _count(self, text: str) -> None:
        self.characters += len(text)
        self.nuls += text.count("\0")

    def check_readable(self, joined: JoinedCounts, eos: int | None, bos: BosRule) -> None:
        """Check that most of what was tokenized is text.

        Raises:
            CorpusError: Most characters are NUL, most texts became no tokens or unknown ones, or
                most tokens are EOS.
        """
        if self.nuls > self.characters / 2:
            raise CorpusError(
                f"{self.nuls} of {self.characters} characters of {self.source} are NUL; expected "
                "text, get the file again or name its column with --text-column"
            )
        texts = joined.texts
        if joined.silent > texts / 2:
            raise CorpusError(
                f"the tokenizer turns {joined.silent} of {texts} texts of {self.source} into no "
                "tokens or unknown ones; expected the model's own tokenizer: copy tokenizer.json "
                "and tokenizer_config.json from the model that it was made from"
            )
        tokens = joined.tokens - (0 if bos.token in (None, eos) else joined.bos)
        if joined.eos > tokens / 2:
            raise CorpusError(
                f"{joined.eos} of {tokens} tokens of {self.source} are EOS, because most of its "
                "records are empty; expected text, name its column with --text-column"
            )


def split_of(record: Any, number: int, source: str) -> str:
    """Return the split that a record belongs to."""
    if source == EMBEDDED:
        return str(record["split"])
    return "train" if number % HELD_OUT_EVERY else "held-out"
