"""Ablations: what a layer is worth, by the perplexity of the model without it or a part of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.decoding.forward import slices
from cascade.models.stack import DecoderStack, LayerCall, Plan
from cascade.models.sublayers import Parts, silenced
from cascade.studies.explanations.causes import Measured, Pilot

#: In the order in which they are shown.
ABLATIONS = (
    "layer_skipped",
    "attention_skipped",
    "mlp_skipped",
    "update_halved",
    "common_left_out",
    "first_token_hidden",
    "delimiters_hidden",
)


def outputs(
    stack: DecoderStack, parts: Parts, layer: int, found: Measured, pilot: Pilot, call: LayerCall
) -> Iterator[tuple[str, Tensor]]:
    """Yield each ablation's name and what the layer then gives, `[B, T, D]`.

    Args:
        stack: The model.
        parts: The layer's.
        layer: 1..N.
        found: Its update in this batch.
        pilot: The layer's.
        call: The layer's entry of the plan.
    """
    start, whole = found.update.hidden, found.update.whole
    yield "layer_skipped", start
    with silenced(parts.attention):
        without = stack.step(layer, start.to(stack.dtype), call)
    yield "attention_skipped", without
    yield "mlp_skipped", start + found.update.attention
    yield "update_halved", start + whole / 2
    left = start + whole - pilot.common
    left[:, 0] = (start + whole)[:, 0]
    yield "common_left_out", left
    for name, output in found.hidden_away.items():
        yield f"{name}_hidden", output


@torch.no_grad()
def nats(stack: DecoderStack, plan: Plan, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
    """Go on from a layer's output to the end, and return each sequence's loss.

    Args:
        stack: The model.
        plan: The batch's.
        layer: 0..N, the layer whose output `hidden` is.
        hidden: `[B, T, D]`.
        ids: `[B, T]`.

    Returns:
        `[B]`, the sum of the next tokens' negative log-probabilities, in nats; float64.
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
