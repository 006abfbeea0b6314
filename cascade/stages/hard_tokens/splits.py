"""Read, check and hash the two splits of a corpus that hard tokens are collected from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError
from cascade.core.provenance import SPLITS, Split
from cascade.corpora.blocks import TokenBlocks, check_blocks, load_blocks
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.shards import row_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: One in five tokens, and one in five records, belongs to the held-out split.
_HELD_OUT = 5

#: Text of each split.
Splits = Mapping[Split, TokenBlocks]


@dataclass(frozen=True)
class CorpusConfig:
    """Options for reading both splits of a corpus.

    Attributes:
        corpus: Corpus, as for `load_blocks`.
        text_column: Column that holds the text (default: detected).
        num_samples: Number of records to read (default: all).
        seq_len: Tokens per sequence.
        max_tokens: Tokens of both splits together, a fifth of them held out (default: all).
        seed: Seed for drawing records at random (default: corpus order).
        bos: Whether records and sequences begin with BOS, as for `load_blocks`.
    """

    corpus: str = "embedded"
    text_column: str | None = None
    num_samples: int | None = None
    seq_len: int = 128
    max_tokens: int | None = None
    seed: int | None = None
    bos: str = "auto"


def load_splits(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase | None
) -> dict[Split, TokenBlocks]:
    """Read both splits of a corpus, with marks of records and response text.

    Args:
        config: Options of the corpus.
        tokenizer: Tokenizer of the model.

    Raises:
        CorpusError: The corpus cannot be read or is too small.
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
            record_split=split,
            marks=True,
            bos=config.bos,
        )
        for split in SPLITS
    }


@dataclass(frozen=True)
class MarkedText:
    """Text of a split with marks of its records and response tokens.

    Attributes:
        blocks: The text.
        record_of: Number of each token's record, `[S, T]` int32.
        response: True for tokens of response text, `[S, T]`.
    """

    blocks: TokenBlocks
    record_of: Array
    response: Array

    def marks_hash(self) -> str:
        """Return a SHA-256 over the marks of all tokens."""
        digest = hashlib.sha256()
        for marks in (self.record_of.astype("<i4"), self.response):
            digest.update(np.ascontiguousarray(marks).tobytes())
        return f"sha256:{digest.hexdigest()}"


def marked_splits(stack: DecoderStack, splits: Splits, batch_size: int) -> dict[Split, MarkedText]:
    """Check both splits and return them with their marks.

    Args:
        stack: The model.
        splits: Splits "train" and "held-out".
        batch_size: Sequences per forward pass.

    Raises:
        CorpusError: A split is missing, has no marks, is too long, or the lengths differ.
    """
    if set(splits) != set(SPLITS):
        raise CorpusError(
            f"expected the splits {' and '.join(SPLITS)}, got "
            f"{', '.join(sorted(splits)) or 'none'}; pass both"
        )
    found = {split: _marked(stack, split, splits[split], batch_size) for split in SPLITS}
    lengths = [splits[split].ids.shape[1] for split in SPLITS]
    if lengths[0] != lengths[1]:
        raise CorpusError(
            f"expected sequences of one length, got {lengths[0]} tokens in the training split and "
            f"{lengths[1]} in the held-out split; read both with the same seq_len"
        )
    return found


def _marked(stack: DecoderStack, split: Split, blocks: TokenBlocks, batch_size: int) -> MarkedText:
    check_blocks(stack, blocks, batch_size)
    record_of, response, shape = blocks.record_of, blocks.response, blocks.ids.shape
    if record_of is None or response is None or not record_of.shape == response.shape == shape:
        raise CorpusError(
            f"expected marks of records and response tokens in the {split} split, got none or "
            "marks of another shape; read it with load_blocks(..., marks=True)"
        )
    return MarkedText(blocks, record_of, response)


def expected_bytes(stack: DecoderStack, splits: Splits) -> int:
    """Return the estimated size of a dataset, in bytes. Each value of a state takes 2 bytes.

    Args:
        stack: The model.
        splits: The corpus: splits "train" and "held-out".
    """
    return int(
        sum(
            len(blocks.ids) * row_bytes(blocks.ids.shape[1], stack.hidden_size)
            for blocks in splits.values()
        )
    )
