"""DecoderStack: the decoder layers of a causal language model, run one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.provenance import ModelProvenance, model_provenance
from cascade.core.schema import known
from cascade.models.architecture import check_config, check_weights, find_layers, run_decoder
from cascade.models.identity import weights_digest
from cascade.models.overrides.hooks import (
    as_output,
    hidden_of,
    layer_hooks,
    layer_pre_hook,
    split_output,
)
from cascade.models.overrides.stand_ins import StandIns
from cascade.models.probing import probe
from cascade.models.readout import Readout

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerCall:
    """The arguments with which `transformers` calls one decoder layer, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """One forward pass, prepared but not computed.

    Attributes:
        embedded: The hidden states that enter layer 1, `[B, T, D]`.
        calls: Each layer's recorded call, `calls[0]` being layer 1's.
    """

    embedded: Tensor
    calls: tuple[LayerCall, ...]


class DecoderStack:
    """A causal language model as embeddings, decoder layers 1..N, final norm and LM head.

    Nothing of the model is replaced: masks, rotary tables and positions are those that
    `transformers` builds. Layers are counted from 1, hidden histories from 0 (the embeddings).

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, where text is to be measured.
        provenance: What is known of its origin (see `load`).

    Raises:
        UnsupportedModelError: No decoder layers, recurrent or bidirectional ones, or an
            encoder-decoder.
        ModelError: A weight is NaN or infinite (names the layer).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        provenance: Mapping[str, Any] | ModelProvenance | None = None,
    ) -> None:
        check_config(model.config)
        self.model = model
        model.train(False)
        self.tokenizer = tokenizer
        #: The model of which this one is the continuation; see `cascade.stages.stage.extended`.
        self.below: DecoderStack | None = None
        self.decoder = model.base_model
        self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.lm_head: nn.Module = model.get_output_embeddings()
        text_config = model.config.get_text_config()
        self.hidden_size = int(text_config.hidden_size)
        self.vocab_size = int(text_config.vocab_size)
        limit = getattr(text_config, "max_position_embeddings", None)
        #: The longest sequence the positions allow; None where they have no end (ALiBi).
        self.max_positions: int | None = int(limit) if limit else None
        check_weights(model, self.layers)
        parameters = inspect.signature(self.decoder.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._probe = probe(model, self.layers)
        self.has_final_norm = self._probe.has_final_norm
        self._stand_ins = StandIns(model, self.decoder, self.layers)
        self._readout = Readout(model, self._stand_ins, self._probe)
        found = ModelProvenance(
            family=model.config.model_type,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            attention=model.config._attn_implementation,
        )
        self.provenance = model_provenance(found, provenance)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def layer_labels(self) -> list[str]:
        """The rows of a saturation profile: "1".."N", and "N+norm" where a final norm follows."""
        labels = [str(layer) for layer in range(1, self.num_layers + 1)]
        return labels + ([f"{self.num_layers}+norm"] if self.has_final_norm else [])

    def weights_hash(self) -> str:
        """Return the hash of what the weights were loaded from.

        A model that was made in memory has none; its weights are hashed as they are now.
        """
        return known(self.provenance.weights_hash) or self.weights_in_memory()

    def weights_in_memory(self) -> str:
        """Return a SHA-256 over the weights as they are at this moment, whoever changed them."""
        return weights_digest(self.model)

    def with_those_below(self) -> Iterator[DecoderStack]:
        """Yield this model, the one that it continues, and so on."""
        stack: DecoderStack | None = self
        while stack is not None:
            yield stack
            stack = stack.below

    @torch.no_grad()
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        """Run the decoder once and show each entry of the hidden history as it is made.

        Neither the LM head nor a KV cache is computed, and no entry is kept: what the visitor
        does not hold on to is freed while the pass goes on.

        Args:
            input_ids: `[B, T]`.
            visitor: Called as `visitor(entry, hidden)` with entry 0 (the embeddings) to N
                (before the final norm); `hidden: [B, T, D]`, not to be changed.

        Returns:
            The final normed state, `[B, T, D]`, or None where the model has no final norm.
        """
        entries = iter(range(1, self.num_layers + 1))
        decoder, layers = self._stand_ins.for_hooks(self.decoder)
        with (
            layer_pre_hook(layers[0], lambda hidden: visitor(0, hidden)),
            layer_hooks(layers, lambda _, output: visitor(next(entries), hidden_of(output))),
        ):
            final = run_decoder(decoder, input_ids)
        return final if self.has_final_norm else None

    @torch.no_grad()
    def plan(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Plan:
        """Let the model prepare a forward pass, without computing any layer.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, past + T]`, 1 for tokens and 0 for padding.
            position_ids: `[B, T]`, where they are not simply past, past + 1, ...; left out for a
                model that takes none (BLOOM counts from its mask).
            cache: The KV cache the layers are to read and extend.

        Returns:
            The embedded hidden states and each layer's call.
        """
        calls: list[LayerCall] = []
        embedded: list[Tensor] = []

        def record(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, rest, named = split_output(args, kwargs)
            embedded.append(hidden)
            calls.append(LayerCall(rest, named))
            return as_output(hidden, self._probe.tuple_sizes[number])

        kwargs: dict[str, Any] = (
            {} if attention_mask is None else {"attention_mask": attention_mask}
        )
        if position_ids is not None and self._takes_position_ids:
            kwargs["position_ids"] = position_ids
        if cache is not None:
            kwargs["past_key_values"] = cache
            if attention_mask is None:
                # None lets the model take the cache's length into account; ones would not.
                kwargs["attention_mask"] = None
        with self._stand_ins.standing_in(self.decoder, record) as decoder:
            run_decoder(decoder, input_ids, **kwargs)
        return Plan(embedded[0], tuple(calls))

    @torch.no_grad()
    def step(self, layer: int, hidden: Tensor, call: LayerCall) -> Tensor:
        """Compute one decoder layer, as the model itself would.

        Args:
            layer: 1..N.
            hidden: The layer's input, `[B, T, D]`.
            call: The layer's entry of `Plan.calls`.

        Returns:
            The layer's output on the residual stream, `[B, T, D]`.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"expected a layer in 1..{self.num_layers}, got {layer}")
        output: Tensor = hidden_of(self.layers[layer - 1](hidden, *call.args, **call.kwargs))
        return output

    def decode(self, hidden: Tensor) -> Tensor:
        """Return the logits of an entry of the residual stream, by the model's own last steps.

        Gradients pass through to `hidden` where it needs them.

        Args:
            hidden: `[B, T, D]`, before the final norm; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`.
        """
        return self._readout.decode(hidden)

    def norm(self, hidden: Tensor) -> Tensor:
        """Return states behind the model's final norm, which follows layer N.

        Args:
            hidden: `[B, T, D]`, an entry of the residual stream; T at most `max_positions`.

        Raises:
            UnsupportedModelError: The model has no final norm, or one that changes the width.
        """
        return self._readout.norm(hidden)

    def decode_normed(self, normed: Tensor) -> Tensor:
        """Return the logits of states that are already behind the final norm.

        Gradients pass through to `normed` where it needs them.

        Args:
            normed: `[B, T, D]`, as `visit` returns them; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`, soft-capped and scaled as the model does.
        """
        return self._readout.decode_normed(normed)
