"""How the corpus of a baseline is read: as its record says, unless the user gives other options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.core.defaults import GATED_TOKENS
from cascade.core.errors import CorpusError, first_line
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.corpora.reading import CorpusReading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How many tokens are read; they do not choose another text.
_AMOUNTS = ("num_samples", "max_tokens")


@dataclass(frozen=True)
class GivenCorpus:
    """The corpus options that a user gave; None where the baseline's record decides.

    Attributes:
        source: The corpus.
        seq_len: Tokens per sequence.
        num_samples: The maximum number of records, 0 for all.
        max_tokens: The maximum number of tokens.
        split: A split of a hub dataset or of the embedded corpus.
        config: A configuration of a hub dataset.
        text_column: The column to read.
        seed: The seed that the records are shuffled with.
        bos: Whether texts begin with BOS, "auto", "yes" or "no".

    Example:
        >>> GivenCorpus(seed=3, split="test").options()
        {'split': 'test', 'seed': 3}
    """

    source: str | None = None
    seq_len: int | None = None
    num_samples: int | None = None
    max_tokens: int | None = None
    split: str | None = None
    config: str | None = None
    text_column: str | None = None
    seed: int | None = None
    bos: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that were given, without the source."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in found.items() if name != "source" and value is not None
        }

    def reading(self, about: CorpusProvenance, *, whole: bool = False) -> CorpusReading:
        """Return how to read the sequences of a baseline.

        Args:
            about: The corpus in the baseline's record.
            whole: Read all records that were asked for, not only as many tokens as the baseline.
        """
        reading = self.over(CorpusReading.of(about))
        if whole and self.num_samples is not None:
            reading = replace(reading, max_tokens=self.max_tokens)
        if reading.max_tokens is not None and self.max_tokens is None:
            return replace(reading, max_tokens=max(reading.max_tokens, reading.seq_len))
        return reading

    def over(self, reading: CorpusReading) -> CorpusReading:
        """Return a reading with the options that the user gave.

        Args:
            reading: How the corpus is read without them.
        """
        reading = replace(reading, **self.options())
        if self.num_samples is not None:
            reading = replace(reading, num_samples=self.num_samples or None)
        if self.split is not None:  # a split of the records is another way to name one
            reading = replace(reading, record_split=None)
        return reading

    def conflicts(self, about: CorpusProvenance) -> Iterator[str]:
        """Yield the options that differ from the record of a baseline, in words.

        Args:
            about: The corpus in the baseline's record.
        """
        for name, value in self.options().items():
            recorded = known(getattr(about, name))
            # A difference in BOS is a mismatch of its own.
            if name != "bos" and value != recorded and not (recorded is None and name in _AMOUNTS):
                option = f"--{name.replace('_', '-')}"
                yield f"{option} {value} was given, the baseline has {_words(recorded)}"


def _words(recorded: object) -> str:
    return "none" if recorded is None else str(recorded)


def baseline_blocks(
    about: CorpusProvenance,
    tokenizer: PreTrainedTokenizerBase | None,
    given: GivenCorpus,
    *,
    whole: bool = False,
    quick: bool = False,
) -> TokenBlocks:
    """Read the sequences that a baseline was measured on.

    Args:
        about: The corpus in the baseline's record.
        tokenizer: The tokenizer of the model.
        given: The options that the user gave; they take precedence.
        whole: As for `GivenCorpus.reading`.
        quick: Read no more than the beginning of a large corpus, hub datasets as a stream.

    Raises:
        CorpusError: The corpus is missing, malformed or too small. Where a relative path of the
            record was looked for is said.
    """
    source = given.source or about.source
    reading = given.reading(about, whole=whole)
    most = reading.max_tokens or about.tokens
    is_cut = quick and most > GATED_TOKENS
    if is_cut:
        reading = replace(reading, max_tokens=GATED_TOKENS)
    try:
        stream = is_cut and reading.seed is None
        blocks = load_blocks(source, tokenizer, stream=stream, **reading.options())
    except CorpusError as error:
        if given.source is not None or source == EMBEDDED or os.path.exists(source):
            raise
        raise CorpusError(
            f"cannot read {source}, the baseline's corpus, looked for in {Path.cwd()} and on the "
            f"hub ({first_line(error)}); name the corpus with --corpus"
        ) from error
    # The record says what was asked for, not how the same text was found again.
    return replace(blocks, reading=given.over(CorpusReading.recorded_in(about)))
