"""Chunks of tokens to run through layers one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cascade.models.stack import DecoderStack, LayerCall
from support.reference_early_exit import (
    positions_of,
)


def planned(
    stack: DecoderStack,
    ids: Tensor,
    mask: Tensor | None,
    cache: Any,
    start: int = 0,
    stop: int | None = None,
) -> Any:
    positions = None if mask is None else positions_of(ids, mask)[:, start:stop]
    seen = None if mask is None else mask[:, :stop]
    return stack.plan(ids[:, start:stop], attention_mask=seen, position_ids=positions, cache=cache)


def stepped(stack: DecoderStack, hidden: Tensor, calls: tuple[LayerCall, ...]) -> Tensor:
    for layer, call in enumerate(calls, start=1):
        hidden = stack.step(layer, hidden, call)
    return hidden


def at(states: Tensor, valid: Tensor) -> Tensor:
    """Return `[n, heads, head_dim]` of a cache's `[B, heads, T, head_dim]`."""
    return states.transpose(1, 2)[valid]
