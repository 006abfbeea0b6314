"""Costs: floating-point operations from counted rows."""

from __future__ import annotations

from torch import nn

from cascade.models import DecoderStack
from cascade.skipping import Counts


def flops(stack: DecoderStack, counts: Counts, *, map_width: int = 0, head_size: int = 0) -> float:
    """Return the floating-point operations behind counts: two per multiplication and addition.

    Counted are matrix products and attention; norms, rotations and softmax are left out (below
    1 % of SmolLM2-135M). A mixture of experts is counted as if every expert ran.

    Args:
        stack: The model.
        counts: What was computed.
        map_width: Outputs of the propagation maps per upper layer.
        head_size: Multiplications of an exit head per row, beside the LM head's.
    """
    total = 0.0
    for index, layer in enumerate(stack.layers):
        total += 2.0 * counts.layer_rows[index] * _matrices(layer)
        # A query meets a key, then the weight meets the value: twice heads x head_dim.
        total += 4.0 * counts.pairs[index] * _query_width(layer, stack.hidden_size)
        total += 2.0 * counts.key_value_rows[index] * _key_value_size(layer)
        total += 2.0 * counts.predicted_rows[index] * stack.hidden_size * map_width
    total += 2.0 * counts.lm_head_rows * stack.hidden_size * stack.vocab_size
    total += 2.0 * sum(counts.head_rows.values()) * head_size
    return total


def full_flops(stack: DecoderStack, batch: int, length: int) -> float:
    """Return the operations of the full model over `batch` sequences of `length` tokens."""
    rows = batch * length
    counts = Counts.of(stack.num_layers)
    counts.layer_rows = [rows] * stack.num_layers
    counts.pairs = [rows * length] * stack.num_layers
    counts.lm_head_rows = rows
    return flops(stack, counts)


def _matrices(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)


def _query_width(layer: nn.Module, hidden_size: int) -> int:
    projection = getattr(getattr(layer, "self_attn", None), "q_proj", None)
    return projection.out_features if isinstance(projection, nn.Linear) else hidden_size


def _key_value_size(layer: nn.Module) -> int:
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    return sum(projection.weight.numel() for projection in found if projection is not None)
