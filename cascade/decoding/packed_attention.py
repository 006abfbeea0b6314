"""Attention for packed queries, which contain only the active tokens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from cascade.decoding.kv_cache import Selection
from cascade.models.overrides.views import can_be_copied, with_children, with_config

#: The name under which packed attention is registered with `transformers`.
_PACKED = "cascade_packed"

#: Implementations of attention that accept a mask per query, which packed queries need.
PACKABLE = ("eager", "sdpa")


@dataclass(frozen=True)
class Packing:
    """The parameters of one packed attention call.

    Attributes:
        selection: Which tokens of the chunk `[B, T]` are in the packed row.
        mask: The chunk's attention mask, `[B or 1, heads or 1, T, L]`, or None.
        implementation: The model's own attention: "eager" or "sdpa".
    """

    selection: Selection
    mask: Tensor | None
    implementation: str


class _PackedConfig:
    """The config of an attention module for one packed call; delegates to the model's config."""

    _attn_implementation = _PACKED

    def __init__(self, config: Any, packing: Packing) -> None:
        self.config, self.packing = config, packing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Unpack the queries per sequence, run the model's own attention, and pack its output.

    Args:
        module: The attention module; its config has the packing.
        query: `[1, heads, n, head_dim]`.
        key: `[B, heads, L, head_dim]`.
        value: `[B, heads, L, head_dim]`.
        attention_mask: Ignored; the packing has the mask of the whole chunk.
        kwargs: Other arguments of the attention function, such as scaling and soft-capping.
    """
    config: Any = module.config
    packing: Packing = config.packing
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
    # In `transformers`, no mask means causal attention without earlier columns.
    return (torch.arange(seen, device=columns.device) <= columns[..., None])[:, None]


def _attention_of(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, eager
    )
    return found


# Only modules whose config is a `_PackedConfig` use it; the model's own attention is unchanged.
AttentionInterface.register(_PACKED, _packed_attention)


@contextlib.contextmanager
def packed_layer(layer: nn.Module, selection: Selection, mask: Tensor | None) -> Iterator[Any]:
    """Yield a decoder layer whose attention accepts the packed row of one call.

    The result is a copy, so that other threads can run the original layer at the same time. If
    another library handles the calls of the layer or its attention (see `can_be_copied`), the
    config of the attention is replaced in place and restored. Such a model may be used by one
    thread at a time.

    Args:
        layer: The layer, with its attention as `self_attn`.
        selection: Which tokens are in the packed row.
        mask: The mask of the whole chunk, or None.
    """
    attention: Any = layer.self_attn
    config = attention.config
    packed = _PackedConfig(config, Packing(selection, mask, config._attn_implementation))
    readers = [module for module in attention.modules() if vars(module).get("config") is config]
    if can_be_copied(layer) and all(map(can_be_copied, [attention, *readers])):
        yield with_children(layer, {"self_attn": with_config(attention, config, packed)})
        return
    try:
        for module in readers:
            module.config = packed
        yield layer
    finally:
        for module in readers:
            module.config = config
