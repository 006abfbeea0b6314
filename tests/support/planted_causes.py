"""Causes of a dip, planted into a tiny model, that an explanation has to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from support.tiny_models import random_ids, tiny_model, tiny_tokenizer

#: The layer with the planted cause; its neighbour is the one before.
DIP = 4
LENGTH = 16


def blocks(sequences: int = 16, length: int = LENGTH, *, seed: int = 3) -> TokenBlocks:
    ids = random_ids(sequences, length, seed=seed).numpy().astype(np.int32)
    return TokenBlocks(ids, "planted", "planted", records=sequences)


def quiet_stack(num_layers: int = 6, *, name: str | None = None) -> DecoderStack:
    """Return a tiny Llama whose layers all turn the stream a little."""
    provenance = {} if name is None else {"name": name}
    model = tiny_model("llama", num_layers=num_layers)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    return DecoderStack(model, tokenizer=tiny_tokenizer(), provenance=provenance)


def _direction(width: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the output of a module permanently."""
    module.register_forward_hook(lambda _, __, output: change(output))


def constant_of(stack: DecoderStack, sublayer: str, size: float, *, spread: bool = False) -> None:
    """Let attention or MLP add the same vector to every token, in one dimension or in all."""
    layer: Any = stack.layers[DIP - 1]
    product = layer.self_attn.o_proj if sublayer == "attention" else layer.mlp.down_proj
    vector = _direction(stack.hidden_size) if spread else torch.eye(stack.hidden_size)[7]
    _after(product, lambda output: output + size * vector)


def loud_mlp(stack: DecoderStack, factor: float) -> None:
    """Multiply what the MLP writes."""
    layer: Any = stack.layers[DIP - 1]
    _after(layer.mlp.down_proj, lambda output: factor * output)


def read_from_first_token(stack: DecoderStack, size: float) -> None:
    """Give the first token a value that turns every token which attends to it."""
    layer: Any = stack.layers[DIP - 1]
    vector = _direction(layer.self_attn.v_proj.out_features)

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] += size * vector
        return output

    _after(layer.self_attn.v_proj, change)


def one_class(stack: DecoderStack, size: float) -> None:
    """Turn only digits, each in its own direction."""
    layer: Any = stack.layers[DIP - 1]
    seen: list[Tensor] = []
    stack.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.__setitem__(slice(None), [kwargs["input_ids"]]),
        with_kwargs=True,
    )
    tokenizer = tiny_tokenizer()
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    table = torch.randn((200, stack.hidden_size), generator=torch.Generator().manual_seed(1))

    def change(output: Tensor) -> Tensor:
        ids = seen[0]
        if ids.shape != output.shape[:2]:
            return output
        return output + size * torch.isin(ids, digits)[..., None] * table[ids]

    _after(layer.mlp.down_proj, change)
