"""Attention over packed queries: only the tokens that are still in the pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from cascade.decoding.kv_cache import Selection

#: The name under which packed attention is registered with `transformers`.
_PACKED = "cascade_packed"


#: The implementations of attention that take a mask per query, as packed queries need one.
PACKABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Packing:
    """What packed attention must know of the call that it stands in."""

    selection: Selection
    mask: Tensor | None
    implementation: str


_PACKING: ContextVar[Packing] = ContextVar("cascade_packing")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Unpack the queries per sequence, let the model's own attention run, and pack its output.

    Args:
        module: The attention module.
        query: `[1, heads, n, head_dim]`.
        key: `[B, heads, L, head_dim]`.
        value: The same.
        attention_mask: Not looked at: the mask for all of the chunk's tokens is in the packing.
        kwargs: What the module passes on: scaling, soft-capping and the like.
    """
    packing = _PACKING.get()
    sequences, packed, place = packing.selection.groups
    if len(sequences) < key.shape[0]:
        key, value = key[sequences], value[sequences]
    padded = query[0].transpose(0, 1)[packed].transpose(1, 2)
    mask = _mask_of(packing, packed, key.shape[2])
    output, _ = _attention_of(module, packing.implementation)(
        module, padded, key, value, mask, **kwargs
    )
    return output.flatten(0, 1)[place][None], None


def _mask_of(packing: Packing, packed: Tensor, seen: int) -> Tensor | None:
    """Return the mask of the padded queries, `[G, 1, M, seen]`."""
    rows, columns = packing.selection.rows[packed], packing.selection.columns[packed]
    if packing.mask is not None:
        batch = packing.selection.active.shape[0]
        mask = packing.mask.expand(batch, *packing.mask.shape[1:])
        return mask[rows, :, columns].transpose(1, 2)
    if packing.selection.active.shape[1] == 1:
        return None  # a single column attends to everything before it
    # Without a mask of its own `transformers` means: causal, nothing before the chunk.
    return (torch.arange(seen, device=columns.device) <= columns[..., None])[:, None]


def _attention_of(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager
    )
    return found


AttentionInterface.register(_PACKED, _packed_attention)


@contextlib.contextmanager
def packed_calls(config: Any, packing: Packing) -> Iterator[None]:
    """Let the attention of one call unpack its queries."""
    token = _PACKING.set(packing)
    config._attn_implementation = _PACKED
    try:
        yield
    finally:
        config._attn_implementation = packing.implementation
        _PACKING.reset(token)
