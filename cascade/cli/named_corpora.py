"""Corpora as `cascade compare-corpora` names them: NAME:CONFIG@SPLIT#COLUMN."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.console import status
from cascade.core.errors import CorpusError, UsageError
from cascade.corpora.files.kinds import file_of

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack

_GRAMMAR = "NAME[:CONFIG][@SPLIT][#COLUMN]"


@dataclass(frozen=True)
class NamedCorpus:
    """One of several corpora, as a command names it.

    Attributes:
        source: As for `load_blocks`.
        config: A configuration of a hub dataset.
        split: A split.
        text_column: The column to read.
    """

    source: str
    config: str | None = None
    split: str | None = None
    text_column: str | None = None

    @classmethod
    def read(cls, text: str) -> NamedCorpus:
        """Read NAME[:CONFIG][@SPLIT][#COLUMN].

        Settings are taken from the end, one by one, until what is left exists or ends like a file:
        so a path may hold any of the three signs. A configuration holds no slash.

        Raises:
            UsageError: A part is empty.
        """
        rest, found = text, dict.fromkeys(("text_column", "split", "config"), "")
        for sign, setting in (("#", "text_column"), ("@", "split"), (":", "config")):
            if _is_path(rest):
                break
            name, cut, value = rest.rpartition(sign)
            if not cut or (sign == ":" and set(value) & set("/\\")):
                continue
            if not name or not value:
                raise UsageError(f"expected a corpus {_GRAMMAR}, got {text!r}; fill in all parts")
            rest, found[setting] = name, value
        return cls(rest, **{setting: value or None for setting, value in found.items()})

    def place(self) -> tuple[str | None, ...]:
        """Return what tells it from other corpora; for a path, whichever way it is written."""
        path = os.path.expanduser(self.source)
        source = os.path.realpath(path) if os.path.exists(path) else self.source
        return source, self.config, self.split, self.text_column


def _is_path(text: str) -> bool:
    # These of os.path answer for any string.
    # What ends like a corpus file is one, whatever else its name holds.
    return file_of(Path(text)) is not None or os.path.exists(os.path.expanduser(text))


@dataclass(frozen=True)
class Amount:
    """How much is read of each corpus.

    Attributes:
        num_samples: Records; None for all.
        max_tokens: Tokens, spread evenly over it; None for all.
        seq_len: Tokens per sequence.
        stream: Read hub datasets without fetching the whole of them.
        bos: Whether texts and sequences begin with BOS.
    """

    num_samples: int | None
    max_tokens: int | None
    seq_len: int
    stream: bool
    bos: str = "auto"

    def check(self) -> None:
        """Refuse what gives no sequence, or never ends.

        Raises:
            UsageError: It does.
        """
        if self.stream and self.num_samples is None:
            raise UsageError("expected --num-samples above 0 with --stream, got 0 for all of them")
        if self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise UsageError(
                f"expected --max-tokens of at least one sequence of {self.seq_len} tokens, got "
                f"{self.max_tokens}; raise it or take a smaller --seq-len"
            )


def read_names(texts: Sequence[str]) -> list[NamedCorpus]:
    """Return the corpora that a command names, each once."""
    from cascade.studies.comparisons.corpus_comparison import check_number

    check_number(len(texts))
    named = [NamedCorpus.read(text) for text in texts]
    seen: dict[tuple[str | None, ...], str] = {}
    for text, one in zip(texts, named, strict=True):
        if one.place() in seen:
            raise UsageError(
                f"expected different corpora, got {seen[one.place()]!r} and {text!r}, which are "
                "one; leave one out"
            )
        seen[one.place()] = text
    return named


def load_corpus(named: NamedCorpus, stack: DecoderStack, amount: Amount) -> TokenBlocks:
    """Read a corpus, and take as many of its sequences as are wanted, evenly spaced."""
    from cascade.corpora.blocks import load_blocks

    try:
        with status(f"Reading {named.source}"):
            blocks = load_blocks(
                named.source,
                stack.tokenizer,
                seq_len=amount.seq_len,
                num_samples=amount.num_samples,
                split=named.split,
                config=named.config,
                text_column=named.text_column,
                stream=amount.stream,
                bos=amount.bos,
            )
    except CorpusError as error:
        raise CorpusError(_in_this_grammar(str(error))) from error
    if named.text_column is not None:
        # Two columns of one corpus are two corpora.
        blocks = replace(blocks, name=f"{blocks.name}-{named.text_column.lower()}")
    if amount.max_tokens is None:
        return blocks
    return blocks.spread(amount.max_tokens // amount.seq_len)


def _in_this_grammar(text: str) -> str:
    """Return an error's text with the options of other commands written as they are here."""
    for option, here in (
        ("--config", ":CONFIG"),
        ("--split", "@SPLIT"),
        ("--text-column", "#COLUMN"),
    ):
        text = text.replace(option, here)
    return text
