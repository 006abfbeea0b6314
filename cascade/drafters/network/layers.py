"""Decoder layers with Llama's modules, computed around an attention of the caller's choice."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.core.errors import UnsupportedModelError, first_line
from cascade.core.float32_products import products_in
from cascade.decoding.engine.modules import obstacle_of
from cascade.decoding.packed_attention import PACKABLE
from cascade.models.probing import close
from cascade.models.stack import DecoderStack

#: Cosines and sines of positions, each `[B or 1, T, head_dim]`.
Tables = tuple[Tensor, Tensor]


def heads_of(layer: Any, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Return a layer's rotated queries and keys, and its values, `[B, heads, T, head_dim]` each.

    Args:
        layer: The decoder layer.
        hidden: Its input, `[B, T, D]`.
        tables: Cosines and sines of the tokens' positions.
    """
    attention = layer.self_attn
    queries, keys, values = projected(attention, layer.input_layernorm(hidden))
    if getattr(attention, "use_rope", True):
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        queries, keys = rotate(queries, keys, *tables)
    return queries, keys, values


def projected(attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an attention's queries, keys and values before rotation, `[B, heads, T, head_dim]`.

    Args:
        attention: The attention.
        normed: What its projections read, `[B, T, inputs]`.
    """

    def heads(projection: nn.Module, norm: str = "") -> Tensor:
        found: Tensor = projection(normed).unflatten(-1, (-1, attention.head_dim))
        own_norm = getattr(attention, norm, None)
        return (found if own_norm is None else own_norm(found)).transpose(1, 2)

    return (
        heads(attention.q_proj, "q_norm"),
        heads(attention.k_proj, "k_norm"),
        heads(attention.v_proj),
    )


def output_of(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """Return a layer's output, `[B, T, D]`.

    Args:
        layer: The decoder layer.
        hidden: Its input, `[B, T, D]`.
        attended: What its attention heads return, `[B, heads, T, head_dim]`.
    """
    hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    mlp, normed = layer.mlp, layer.post_attention_layernorm(hidden)
    output: Tensor = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return output


def attend(
    layer: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    """Return what attention heads return, `[B, heads, T, head_dim]`.

    Args:
        layer: The decoder layer.
        queries: `[B, heads, T, head_dim]`.
        keys: `[B, key heads, L, head_dim]`.
        values: `[B, key heads, L, head_dim]`.
        mask: `[B or 1, 1, T, L]`; None for causal attention of whole sequences, and for a last
            token, which sees everything.
    """
    scale = layer.self_attn.scaling
    batch, _, length, width = queries.shape
    if length == 1:
        # The queries of a group as tokens of one head: its keys are read once.
        grouped = queries.reshape(batch, keys.shape[1], -1, width)
        mask = None if mask is None else mask.expand(batch, *grouped.shape[1:3], -1)
        found = functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
        return found.reshape(queries.shape)
    return functional.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def rotary_tables(stack: DecoderStack, length: int) -> Tables:
    """Return the model's cosines and sines of positions 0 to length - 1, `[1, length, head_dim]`.

    Args:
        stack: The model.
        length: The number of positions.
    """
    rotary: Any = stack.decoder.rotary_emb
    like = torch.empty(0, dtype=torch.float32, device=stack.device)
    cos, sin = rotary(like, torch.arange(length, device=stack.device)[None])
    return cos, sin


def check_can_draft(stack: DecoderStack) -> None:
    """Check that a drafter can be trained for a model: that its layers compute what Llama's do.

    Args:
        stack: The model.

    Raises:
        UnsupportedModelError: They do not; the message says why.
    """
    obstacle = stack.step_obstacle or stack.readout_obstacle or _missing(stack)
    if obstacle is None:
        try:
            with products_in(stack.device):
                obstacle = _difference(stack)
        except Exception as error:  # layers of other families need other arguments
            obstacle = f"its layers cannot be computed as Llama's ({first_line(error)})"
    if obstacle is not None:
        raise UnsupportedModelError(
            f"{stack.model.config.model_type} cannot have a trained drafter: {obstacle}; use drafts"
            " that need no training"
        )


def _missing(stack: DecoderStack) -> str | None:
    """Return which of Llama's modules a model lacks, or None."""
    layer: Any
    for layer in stack.layers:
        obstacle = obstacle_of(layer)
        if obstacle is not None:
            return obstacle
        attending = layer.self_attn.config._attn_implementation
        if attending not in PACKABLE:
            return f"its attention is {attending}, expected {' or '.join(PACKABLE)}"
    if not isinstance(getattr(stack.decoder, "norm", None), nn.Module):
        return "its decoder has no final norm"
    if type(stack.lm_head) is not nn.Linear:
        return f"its LM head is a {type(stack.lm_head).__name__}"
    if not hasattr(stack.decoder, "rotary_emb"):
        return "its decoder has no rotary_emb"
    return None


@torch.no_grad()
def _difference(stack: DecoderStack) -> str | None:
    """Return what a model computes in another way than this module, or None."""
    ids = torch.arange(10, device=stack.device).remainder(stack.vocab_size).reshape(2, 5)
    plan = stack.plan(ids)
    hidden = plan.embedded
    tables = tuple(table.to(hidden.dtype) for table in rotary_tables(stack, ids.shape[1]))
    for number, (layer, call) in enumerate(zip(stack.layers, plan.calls, strict=True), start=1):
        real = stack.step(number, hidden, call)
        queries, keys, values = heads_of(layer, hidden, (tables[0], tables[1]))
        made = output_of(layer, hidden, attend(layer, queries, keys, values, None))
        if not close(made, real):
            return f"decoder layer {number} computes something else than Llama's"
        hidden = real
    norm: Any = stack.decoder.norm
    if not close(stack.lm_head(norm(hidden)), stack.decode(hidden)):
        return "its logits are not those of its final norm and LM head alone"
    return None
