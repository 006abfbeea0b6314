"""Checks of token ids, attention masks and seeds that callers pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cascade.core.arguments import as_int
from cascade.core.errors import UsageError
from cascade.decoding.forward import Chunk
from cascade.models.stack import DecoderStack


def read_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises:
        UsageError: The seed is not an integer.
    """
    read = as_int(seed)
    if read is None:
        raise UsageError(f"expected seed to be an integer, got {seed!r}")
    return read


def make_chunk(
    stack: DecoderStack,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    padding: int | None = None,
) -> Chunk:
    """Return checked token ids and mask as a chunk.

    Args:
        stack: The model.
        input_ids: Token ids, `[B, T]`.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding.
        padding: The token that is padding if there is no mask; None: every token is text.

    Raises:
        UsageError: The ids or the mask are empty, ragged, too long, outside the vocabulary, or of
            different shapes, or a padding token could be text.
    """
    ids = _checked_ids(stack, input_ids)
    if attention_mask is None and padding is not None and bool((ids == padding).any()):
        attention_mask = _without(ids, padding)
    if attention_mask is None:
        valid = torch.ones_like(ids, dtype=torch.bool)
        columns = torch.arange(ids.shape[1], device=ids.device)
        return Chunk(ids, valid, columns.expand_as(ids), None)
    valid = _read_mask(attention_mask, ids)
    if not bool(valid.any(dim=1).all()):
        raise UsageError(
            "expected at least one token in every row, got a row of zeros in the attention_mask"
        )
    positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
    return Chunk(ids, valid, positions, None if bool(valid.all()) else valid.long())


def _checked_ids(stack: DecoderStack, input_ids: Any) -> Tensor:
    """Return token ids `[B, T]` on the model's device, or raise an error."""
    if input_ids is None or hasattr(input_ids, "keys"):
        raise UsageError(
            f"expected token ids [B, T], got {type(input_ids).__name__}; pass the tokenizer's "
            '["input_ids"] and ["attention_mask"] separately'
        )
    ids = _tensor(input_ids)
    if ids is None:
        advice = (
            "pad them on the left and pass an attention_mask"
            if _is_ragged(input_ids)
            else "use the model's tokenizer"
        )
        raise UsageError(f"expected token ids [B, T], got {_described(input_ids)}; {advice}")
    if ids.ndim != 2 or ids.numel() == 0:
        raise UsageError(
            f"expected token ids [B, T] with one non-empty row per prompt, got shape "
            f"{list(ids.shape)}"
        )
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise UsageError(
            f"expected integer token ids, got {str(ids.dtype).removeprefix('torch.')}; "
            "use the model's tokenizer"
        )
    ids = ids.to(stack.device, torch.long)
    if stack.max_positions is not None and ids.shape[1] > stack.max_positions:
        raise UsageError(
            f"{ids.shape[1]} tokens exceed the model's {stack.max_positions} positions; "
            "shorten the prompt"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= stack.vocab_size:
        raise UsageError(
            f"expected token ids in 0..{stack.vocab_size - 1}, got {int(ids.min())} to "
            f"{int(ids.max())}; use the model's tokenizer"
        )
    return ids


def _read_mask(attention_mask: Any, ids: Tensor) -> Tensor:
    """Return a mask of zeros and ones as booleans, `[B, T]`."""
    mask = _tensor(attention_mask)
    if mask is None or mask.shape != ids.shape:
        raise UsageError(
            f"expected an attention_mask of the ids' shape {list(ids.shape)}, got "
            f"{_described(attention_mask) if mask is None else list(mask.shape)}"
        )
    mask = mask.to(ids.device)
    valid = mask == 1
    others = mask[~valid & (mask != 0)]
    if len(others):
        raise UsageError(
            "expected an attention_mask of zeros (padding) and ones (tokens), got the value "
            f"{others[0].item():g}"
        )
    return valid


def _without(ids: Tensor, padding: int) -> Tensor:
    """Return a mask `[B, T]` of the text; padding must be before or after the text of a row."""
    mask = ids != padding
    inside = (mask.cumsum(dim=1) > 0) & (mask.flip(1).cumsum(dim=1).flip(1) > 0)
    if bool((inside & ~mask).any()) or not bool(mask.any(dim=1).all()):
        raise UsageError(
            f"the padding token {padding} is between other tokens or fills a whole row, so it could"
            " be text; pass an attention_mask"
        )
    return mask


def _tensor(values: Any) -> Tensor | None:
    """Return values as a tensor, or None if they cannot be converted."""
    try:
        return torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return None


def _is_ragged(values: Any) -> bool:
    """Return whether values are rows of different length."""
    if not isinstance(values, list | tuple):
        return False
    return len({len(row) for row in values if isinstance(row, list | tuple)}) > 1


def _described(values: Any) -> str:
    """Describe values that cannot be converted to a tensor."""
    if _is_ragged(values):
        return "rows of different length"
    name = type(values).__name__
    return f"a {name} that is not an array of numbers" if isinstance(values, list | tuple) else name
