"""Long contexts: the similarities of a few long sequences, position range by position range.

Sliding windows, RoPE scaling, attention sinks and ALiBi compute the same as without them in the
short sequences of a corpus. They are visible only in long ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from cascade.core.arrays import Array
from cascade.core.defaults import GATED_TOKENS, LONG_CONTEXT
from cascade.core.errors import CascadeError, CorpusError, ModelError, first_line, not_finite
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences, long_sequences
from cascade.models.architecture import text_config_of
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from cascade.saturation.long_statistics import LongStatistics

#: The number of long sequences of a baseline. The gate measures the first one, the full gate all.
LONG_SEQUENCES = 2

#: Models with fewer positions have no long contexts, unless a length is given.
LEAST_POSITIONS = 256


@dataclass(frozen=True)
class LongChoice:
    """Which long sequences are measured.

    Attributes:
        sequences: The long sequences; None for none.
        reason: Why there are none.
        is_short: Whether the reason is a short corpus, which the user can change.

    Example:
        >>> LongChoice(None, "turned off with --long-context 0").sequences is None
        True
    """

    sequences: LongSequences | None
    reason: str | None = None
    is_short: bool = False


def default_length(stack: DecoderStack, seq_len: int) -> int | None:
    """Return how long the long sequences of a model are by default; None for no long sequences.

    Args:
        stack: The model.
        seq_len: The length of the corpus's sequences.
    """
    positions = _positions(stack)
    length = LONG_CONTEXT if positions is None else min(positions, LONG_CONTEXT)
    return length if length >= LEAST_POSITIONS and length > seq_len else None


def _positions(stack: DecoderStack) -> int | None:
    """Return the model's positions; with dynamic RoPE scaling, its config has those before it."""
    rope = getattr(text_config_of(stack.model.config), "rope_parameters", None) or {}
    if stack.max_positions is None or rope.get("rope_type") != "dynamic":
        return stack.max_positions
    return int(stack.max_positions * rope["factor"])


def choose_long(stack: DecoderStack, blocks: TokenBlocks, wanted: int | None) -> LongChoice:
    """Choose the long sequences of a model and a corpus, before anything is measured.

    Args:
        stack: The model.
        blocks: The corpus.
        wanted: The number of tokens of a long sequence, 0 for none; None for the default.

    Raises:
        CorpusError: The length that was given is beyond the model's positions, not above that of
            the corpus's sequences, or the corpus has too few tokens for it.
    """
    if wanted == 0:
        return LongChoice(None, "turned off with --long-context 0")
    seq_len = blocks.ids.shape[1]
    if wanted is not None:
        _check_length(stack, seq_len, wanted)
    length = default_length(stack, seq_len) if wanted is None else wanted
    if length is None:
        return LongChoice(None, _too_few_positions(stack, seq_len))
    found = long_sequences(_beginning(blocks), length, LONG_SEQUENCES)
    if len(found.ids):
        return LongChoice(found)
    short = f"{blocks.source} gives {blocks.tokens:,} tokens, too few for a sequence of {length:,}"
    if wanted is None:
        return LongChoice(None, f"{short}; take more records or a smaller --long-context", True)
    raise CorpusError(f"{short}; take more records, a smaller --long-context, or 0 for none")


def _beginning(blocks: TokenBlocks) -> TokenBlocks:
    """Return the sequences at the beginning of a large corpus, where the quick gate reads."""
    most = max(1, GATED_TOKENS // blocks.ids.shape[1])
    return blocks if len(blocks.ids) <= most else replace(blocks, ids=blocks.ids[:most])


def _too_few_positions(stack: DecoderStack, seq_len: int) -> str:
    if seq_len >= LEAST_POSITIONS:
        return f"sequences of {seq_len:,} tokens are long already"
    return f"the model has {_positions(stack)} positions, fewer than {LEAST_POSITIONS}"


def _check_length(stack: DecoderStack, seq_len: int, wanted: int) -> None:
    positions = _positions(stack)
    if positions is not None and wanted > positions:
        raise CorpusError(
            f"--long-context {wanted} exceeds the model's {positions} positions; use {positions} "
            "or less, or 0 for none"
        )
    if wanted <= seq_len:
        raise CorpusError(
            f"expected --long-context above the {seq_len} tokens of a sequence, got {wanted}; "
            "use a larger one, or 0 for none"
        )


def measure_long(
    stack: DecoderStack,
    sequences: LongSequences,
    *,
    measured: Callable[[DecoderStack, torch.Tensor], torch.Tensor] | None = None,
) -> LongStatistics:
    """Return the statistics of some long sequences, each measured in one forward pass.

    Args:
        stack: The model.
        sequences: The long sequences.
        measured: Returns the similarities `[L, B, T]` of some ids (default: those of the model).

    Raises:
        ModelError: A hidden state is NaN or infinite (the message names the layer), or the model
            raises an error for so many tokens.

    Example:
        >>> from cascade import load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, max_tokens=1024)
        >>> measure_long(stack, long_sequences(blocks, 256, 1)).means().shape
        (1, 4, 31)
    """
    values = [
        _similarities(stack, row, measured or saturation.similarities) for row in sequences.ids
    ]
    return LongStatistics.of(
        stack.layer_labels,
        np.concatenate(values, axis=1),
        sequences.starts,
        sequences.fingerprints(),
    )


def _similarities(
    stack: DecoderStack,
    row: Array,
    measured: Callable[[DecoderStack, torch.Tensor], torch.Tensor],
) -> Array:
    tokens = torch.from_numpy(row[None].astype(np.int64)).to(stack.device)
    try:
        found: Array = measured(stack, tokens).cpu().numpy()
    except (CascadeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # families raise any error beyond their positions
        raise ModelError(
            f"the model raises an error for a sequence of {len(row):,} tokens "
            f"({first_line(error)}); measure without long contexts"
        ) from error
    wrong = ~np.isfinite(found).all(axis=(1, 2))
    if wrong.any():
        label = stack.layer_labels[int(np.argmax(wrong))]
        raise not_finite(
            f"layer {label} is the first to give NaN or infinite hidden states in a sequence of "
            f"{len(row):,} tokens"
        )
    return found
