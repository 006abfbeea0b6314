"""The network of EAGLE-3: one layer that reads an embedding and a state side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cascade.drafters.network.drafter_network import (
    FIT_STRENGTH,
    DrafterNetwork,
    FitRows,
    Linear,
    plain_linear,
    trainable_copy,
)
from cascade.drafters.network.layers import Tables, output_of, projected
from cascade.models.stack import DecoderStack
from cascade.stats.ridge import NormalEquations, rms_normalized

#: The projections that read an embedding in addition to a state.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Eagle3Network(DrafterNetwork):
    """A copy of a layer whose queries, keys and values read an embedding next to the state.

    The layer's input is `[..., 2 D]`: an embedding, then a state. At a first step, the state is a
    projection of the inputs of three layers. At later steps it is the layer's own output. Every
    layer of this kind rotates its queries and keys as Llama does.

    Args:
        stack: As for `DrafterNetwork`.
        feature_layers: Three layers, as for `DrafterNetwork`. The last layer's normed output is
            not read.

    Attributes:
        scales: What the inputs of each of the three layers are multiplied with, `[F]`. They differ
            by orders of magnitude, and one learning rate has to suit them all. They are powers of
            two, so multiplying the columns of `fc` with them instead is exact.
    """

    is_plain = False
    scales: Tensor

    def __init__(self, stack: DecoderStack, feature_layers: Sequence[int]) -> None:
        super().__init__(stack, feature_layers)
        width, layers = self.hidden_size, len(self.feature_layers)
        options: dict[str, Any] = {"device": stack.device, "dtype": torch.float32}
        self.fc = nn.Linear(layers * width, width, bias=False, **options)
        nn.init.zeros_(self.fc.weight)
        self.register_buffer("scales", torch.ones(layers, **options))
        self.layer = trainable_copy(stack.layers[self.feature_layers[-1] - 1])
        self.layer.hidden_norm = trainable_copy(self.layer.input_layernorm)
        nn.init.ones_(self.layer.input_layernorm.weight)
        attention = self.layer.self_attn
        attention.scaling = attention.head_dim**-0.5
        for name in _PROJECTIONS:
            setattr(attention, name, _widened(getattr(attention, name)))
        decoder: Any = stack.decoder
        self.norm = trainable_copy(decoder.norm)

    def first_input(
        self, embedded: Tensor, features: Tensor, linear: Linear = plain_linear
    ) -> Tensor:
        """Return the layer's input at a first step; see `DrafterNetwork`."""
        dtype = self.fc.weight.dtype
        read = (features[..., :-1, :].to(dtype) * self.scales[:, None]).flatten(-2)
        return torch.cat([embedded.to(dtype), linear(self.fc, read).to(dtype)], dim=-1)

    def next_input(self, embedded: Tensor, states: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Return the layer's input at a later step; see `DrafterNetwork`."""
        dtype = self.fc.weight.dtype
        return torch.cat([embedded.to(dtype), states.to(dtype)], dim=-1)

    def heads(self, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; see `DrafterNetwork`."""
        embedded, state = hidden.chunk(2, dim=-1)
        normed = [self.layer.input_layernorm(embedded), self.layer.hidden_norm(state)]
        queries, keys, values = projected(self.layer.self_attn, torch.cat(normed, dim=-1))
        queries, keys = apply_rotary_pos_emb(queries, keys, *tables)
        return queries, keys, values

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output; see `DrafterNetwork`."""
        return output_of(self.layer, hidden.chunk(2, dim=-1)[1], attended)

    @torch.no_grad()
    def fit(self, rows: Iterable[FitRows]) -> None:
        """Fit the projections of states and of embeddings; see `DrafterNetwork`.

        The state that the layer adds to cannot depend on the embedding, so `fc` predicts as much
        as states alone can. Queries, keys and values read what the embedding adds to that.
        """
        width, device = self.hidden_size, self.fc.weight.device
        read_width = self.fc.in_features
        alone = NormalEquations(read_width, width, device=device)
        both = NormalEquations(read_width + width, width, device=device)
        for each in rows:
            read = each.features[:, :-1].float()
            if not alone.count:
                size = read.square().mean(dim=-1).sqrt().median(dim=0).values
                self.scales.copy_(torch.exp2(-size.clamp_min(1e-6).log2().round()))
            scaled = (read * self.scales[:, None]).flatten(1)
            alone.update(scaled, each.wanted)
            both.update(torch.cat([scaled, rms_normalized(each.embedded)], dim=1), each.wanted)
        self.fc.weight.copy_(alone.solve(FIT_STRENGTH, intercept=False)[0].T)
        of_embedding = both.solve(FIT_STRENGTH, intercept=False)[0][read_width:].T
        # The norm divides a state by its size, which is about that of the states it predicts.
        size = (both.yy.mean() / both.count).sqrt().float()
        of_embedding = self.layer.hidden_norm.weight[:, None] * of_embedding / size
        for name in _PROJECTIONS:
            weight = getattr(self.layer.self_attn, name).weight
            weight[:, :width] = weight[:, width:] @ of_embedding


def _widened(linear: nn.Linear) -> nn.Linear:
    """Return a projection that reads as many further inputs before its own, with zeros for them."""
    made = nn.Linear(
        2 * linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    with torch.no_grad():
        made.weight.zero_()
        made.weight[:, linear.in_features :] = linear.weight
        if linear.bias is not None:
            made.bias.copy_(linear.bias)
    return made
