"""Heads to test with, and what a model gives them to predict."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cascade.models.stack import DecoderStack
from support.reference_early_exit import (
    LAYERS,
    difference,
    visited,
)
from support.tiny_models import random_ids

TEXT = random_ids(6, 20, seed=11)


def is_projected(stack: DecoderStack) -> bool:
    return all(hasattr(getattr(layer, "self_attn", None), "k_proj") for layer in stack.layers)


@torch.no_grad()
def truth(stack: DecoderStack, ids: Tensor) -> tuple[list[Tensor], Tensor, list[list[Tensor]]]:
    """Run the model; return layer inputs and outputs, final states, and each layer's k and v.

    All `[B * T, ...]`, by hooks of our own on modules by name; nothing that the fit has found out.
    """
    stack = copy.deepcopy(stack)  # `output_hidden_states` leaves hooks of its own behind
    kept: dict[str, Tensor] = {}
    handles = []
    for number, layer in enumerate(stack.layers, start=1):
        for name in ("k_proj", "v_proj"):
            attention = getattr(layer, "self_attn", None)
            if hasattr(attention, name):
                key = f"{number}.{name}"
                hook: Any = lambda _, __, out, key=key: kept.__setitem__(key, out)  # noqa: E731
                handles.append(getattr(attention, name).register_forward_hook(hook))
    own: Any = stack.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    history = visited(stack, ids)
    raw = [
        [kept[f"{number}.{name}"].flatten(0, 1) for name in ("k_proj", "v_proj")]
        for number in range(1, LAYERS + 1)
        if is_projected(stack)
    ]
    return [entry.flatten(0, 1) for entry in history], own.hidden_states[-1].flatten(0, 1), raw


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the expected values' root mean square."""
    return difference(got, expected) / expected.square().mean().sqrt().item()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
