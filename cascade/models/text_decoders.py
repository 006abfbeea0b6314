"""The text decoder inside a model that also reads images or audio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cascade.models.architecture import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_text_decoder(model: PreTrainedModel) -> bool:
    """Return whether a model has a text decoder next to other parts, such as a vision tower."""
    return text_config_of(model.config) is not model.config


@torch.no_grad()
def run_on_text(
    model: PreTrainedModel, ids: Tensor, layers: nn.ModuleList
) -> tuple[Tensor, tuple[str, ...]]:
    """Run a whole model on text alone.

    Args:
        model: The model.
        ids: Token ids, `[B, T]`.
        layers: Its decoder layers.

    Returns:
        The logits, `[B, T, V]`, and the names of the parts that did not run, sorted, e.g.
        `("multi_modal_projector", "vision_tower")`.
    """
    inner = {id(module) for module in layers.modules()}
    parts = [
        (name, part)
        for holder in dict.fromkeys((model, model.base_model))
        for name, part in holder.named_children()
        if any(True for _ in part.parameters())
        and not any(id(module) in inner for module in part.modules())
    ]
    ran: set[int] = set()
    handles = [
        module.register_forward_hook(lambda module, *_: ran.add(id(module)))
        for _, part in parts
        for module in part.modules()
    ]
    try:
        mask = torch.ones_like(ids)
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    idle = {name for name, part in parts if not any(id(module) in ran for module in part.modules())}
    return logits, tuple(sorted(idle))
