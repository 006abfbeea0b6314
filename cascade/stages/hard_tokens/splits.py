"""The two splits of a corpus that hard tokens are collected from: read, checked, and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError
from cascade.corpora.blocks import TokenBlocks, check_blocks, load_blocks
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.records import SPLITS, Split
from cascade.stages.hard_tokens.shards import row_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: One token in so many is of the held-out split, as is one record.
_HELD_OUT = 5

#: Split -> its text.
Splits = Mapping[Split, TokenBlocks]


@dataclass(frozen=True)
class CorpusConfig:
    """Which text both splits are read from.

    Attributes:
        corpus: As for `load_blocks`.
        text_column: The column that holds the text; found where None.
        num_samples: Records to read; all where None.
        seq_len: Tokens per sequence.
        max_tokens: Tokens of both splits together, a fifth of them held out; all where None.
        seed: Draws the records at random; in corpus order where None.
    """

    corpus: str = "embedded"
    text_column: str | None = None
    num_samples: int | None = None
    seq_len: int = 128
    max_tokens: int | None = None
    seed: int | None = None


def load_splits(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[Split, TokenBlocks]:
    """Read both splits of a corpus, with the marks of their records and response text.

    Args:
        config: Which text.
        tokenizer: The model's.

    Raises:
        CorpusError: The corpus cannot be read, or is too small.
    """
    most: dict[Split, int | None] = dict.fromkeys(SPLITS)
    if config.max_tokens is not None:
        held_out = max(config.seq_len, config.max_tokens // _HELD_OUT)
        most = {"train": config.max_tokens - held_out, "held-out": held_out}
    return {
        split: load_blocks(
            config.corpus,
            tokenizer,
            seq_len=config.seq_len,
            num_samples=config.num_samples,
            max_tokens=most[split],
            text_column=config.text_column,
            seed=config.seed,
            part=split,
            marks=True,
        )
        for split in SPLITS
    }


@dataclass(frozen=True)
class MarkedText:
    """A split's text, of which it is known which tokens are of which record and of the response.

    Attributes:
        blocks: The text.
        record_of: `[S, T]` int32, the number of each token's record.
        response: `[S, T]`, true for tokens of response text.
    """

    blocks: TokenBlocks
    record_of: Array
    response: Array

    def marks_hash(self) -> str:
        """Return a SHA-256 over the marks of every token."""
        digest = hashlib.sha256()
        for marks in (self.record_of.astype("<i4"), self.response):
            digest.update(np.ascontiguousarray(marks).tobytes())
        return f"sha256:{digest.hexdigest()}"


def marked_splits(stack: DecoderStack, splits: Splits, batch_size: int) -> dict[Split, MarkedText]:
    """Return both splits with their marks, checked.

    Args:
        stack: The model.
        splits: "train" and "held-out".
        batch_size: Sequences per forward pass.

    Raises:
        CorpusError: A split is missing, of another length, without marks, or too long.
    """
    if set(splits) != set(SPLITS):
        raise CorpusError(
            f"expected the parts {' and '.join(SPLITS)}, got {', '.join(sorted(splits)) or 'none'}"
        )
    found = {split: _marked(stack, split, splits[split], batch_size) for split in SPLITS}
    lengths = [splits[split].ids.shape[1] for split in SPLITS]
    if lengths[0] != lengths[1]:
        raise CorpusError(
            f"expected sequences of one length, got {lengths[0]} tokens in the training part and "
            f"{lengths[1]} in the held-out one; read both with one seq_len"
        )
    return found


def _marked(stack: DecoderStack, split: Split, blocks: TokenBlocks, batch_size: int) -> MarkedText:
    check_blocks(stack, blocks, batch_size)
    record_of, response, shape = blocks.record_of, blocks.response, blocks.ids.shape
    if record_of is None or response is None or not record_of.shape == response.shape == shape:
        raise CorpusError(
            f"the {split} part does not say which tokens are of which record and of the "
            "response; read it with load_blocks(..., marks=True)"
        )
    return MarkedText(blocks, record_of, response)


def expected_bytes(stack: DecoderStack, splits: Splits) -> int:
    """Return about how large a dataset will be, in bytes; a number of a state takes 2.

    Args:
        stack: The model.
        splits: The corpus, "train" and "held-out".
    """
    return int(
        sum(
            len(blocks.ids) * row_bytes(blocks.ids.shape[1], stack.hidden_size)
            for blocks in splits.values()
        )
    )
