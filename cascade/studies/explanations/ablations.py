"""Ablations: the model's perplexity without a layer or one of its sublayers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.decoding.forward import slices
from cascade.models.stack import DecoderStack, LayerCall, Plan
from cascade.models.sublayers import Sublayers, silenced
from cascade.studies.explanations.causes import MeasuredUpdate, UpdateTraits

#: All ablations, in display order.
ABLATIONS = (
    "layer_skipped",
    "attention_skipped",
    "mlp_skipped",
    "update_halved",
    "common_left_out",
    "first_token_hidden",
    "delimiters_hidden",
)


def ablated_outputs(
    stack: DecoderStack,
    sublayers: Sublayers,
    layer: int,
    measured: MeasuredUpdate,
    traits: UpdateTraits,
    call: LayerCall,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each ablation and the layer's output under it, `[B, T, D]`.

    Args:
        stack: The model.
        sublayers: Attention and MLP of the layer.
        layer: Layer, 1..N.
        measured: The layer's update in this batch.
        traits: The layer's traits.
        call: Call arguments of the layer, from the plan.
    """
    start, whole = measured.update.hidden, measured.update.whole
    yield "layer_skipped", start
    with silenced(sublayers.attention):
        without = stack.step(layer, start.to(stack.dtype), call)
    yield "attention_skipped", without
    yield "mlp_skipped", start + measured.update.attention
    yield "update_halved", start + whole / 2
    without_common = start + whole - traits.common
    without_common[:, 0] = (start + whole)[:, 0]
    yield "common_left_out", without_common
    for name, output in measured.outputs_hidden.items():
        yield f"{name}_hidden", output


@torch.no_grad()
def sequence_losses(
    stack: DecoderStack, plan: Plan, layer: int, hidden: Tensor, ids: Tensor
) -> Tensor:
    """Run the model from a layer's output to the end, and return the loss of each sequence.

    Args:
        stack: The model.
        plan: Plan of the batch.
        layer: Layer that returned `hidden`, 0..N (0: the embeddings).
        hidden: Output of that layer, `[B, T, D]`.
        ids: Token ids, `[B, T]`.

    Returns:
        Summed negative log-probability of the next tokens in nats, `[B]` float64.
    """
    hidden = hidden.to(stack.dtype)
    for number in range(layer + 1, stack.num_layers + 1):
        hidden = stack.step(number, hidden, plan.calls[number - 1])
    states, following = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = []
    for some in slices(len(states), stack.max_positions):
        logits = stack.decode(states[some][None])[0].float()
        chosen = logits.gather(1, following[some][:, None])[:, 0]
        losses.append((logits.logsumexp(dim=-1) - chosen).double())
    return torch.cat(losses).reshape(len(ids), -1).sum(dim=1)
