"""DecoderStack: a causal language model whose decoder layers can be run one at a time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import CascadeError, UnsupportedModelError, first_line
from cascade.core.float32_products import products_in
from cascade.core.provenance import ModelProvenance, model_provenance
from cascade.core.schema import UNSET, UnsetType, known
from cascade.models.architecture import (
    check_dtypes,
    check_kind,
    check_layer_numbers,
    check_weights,
    find_decoder,
    find_layers,
    run_decoder,
    text_config_of,
)
from cascade.models.checkpoints.adapters import without_wrapper
from cascade.models.checkpoints.quantization import decompress, packages_of
from cascade.models.dispatch import device_of
from cascade.models.identity import weights_digest
from cascade.models.layer_states import attending
from cascade.models.overrides.hooks import (
    changed_outputs,
    hidden_of,
    layer_hooks,
    layer_pre_hook,
    split_output,
)
from cascade.models.overrides.stand_ins import StandIns
from cascade.models.probing import close, probe
from cascade.models.readout import Readout
from cascade.models.text_decoders import has_text_decoder, run_on_text

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LayerCall:
    """The arguments with which `transformers` calls a decoder layer, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A forward pass that is prepared but not computed.

    Attributes:
        embedded: The input of layer 1, `[B, T, D]`.
        calls: The recorded call of each layer; `calls[0]` belongs to layer 1.
    """

    embedded: Tensor
    calls: tuple[LayerCall, ...]


class _Engines(dict[str, Any]):
    """The engines of a model. Its copies make their own: engines hold addresses of its weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engines:
        return _Engines()

    def __reduce__(self) -> tuple[type[_Engines], tuple[()]]:
        return _Engines, ()


class DecoderStack:
    """A causal language model as embeddings, decoder layers 1..N, final norm and LM head.

    Masks, rotary tables and positions are those that `transformers` builds, so results are
    identical to the model's. Layers are counted from 1, entries of the hidden history from 0 (the
    embeddings).

    Args:
        model: A causal language model. It is set to evaluation mode.
        tokenizer: Its tokenizer, needed to measure text.
        provenance: Details about its origin (see `load`).

    Raises:
        UnsupportedModelError: The model is an encoder-decoder, has no decoder layers, or has
            bidirectional ones.
        ModelError: A weight is NaN or infinite (the message names the layer).

    Example:
        >>> import cascade
        >>> stack = cascade.load("smollm2-135m")
        >>> ids = torch.tensor([[1, 504, 3575]])
        >>> plan = stack.plan(ids)
        >>> hidden = plan.embedded
        >>> for layer, call in enumerate(plan.calls, start=1):
        ...     hidden = stack.step(layer, hidden, call)
        >>> stack.decode(hidden).shape
        torch.Size([1, 3, 49152])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        provenance: Mapping[str, Any] | ModelProvenance | None = None,
    ) -> None:
        model = without_wrapper(model)
        check_kind(model)
        self.model = model
        model.train(False)
        decompress(model)
        self.tokenizer = tokenizer
        #: What decodes few tokens in less time, by its kind (see `engine_of`).
        self.engines: dict[str, Any] = _Engines()
        #: The model that this one continues (see `cascade.stages.stage.extended`).
        self.below: DecoderStack | None = None
        self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.lm_head: nn.Module = model.get_output_embeddings()
        text_config = text_config_of(model.config)
        self.vocab_size = int(text_config.vocab_size)
        limit = getattr(text_config, "max_position_embeddings", None)
        #: The longest supported sequence; None without a limit (ALiBi).
        self.max_positions: int | None = int(limit) if limit else None
        check_weights(model, self.layers)
        check_layer_numbers(self.layers)
        try:
            self.decoder = find_decoder(model, self.layers)
            with products_in(device_of(model)):  # rounded products hide what is the same
                self._probe = probe(model, self.decoder, self.layers)
        except (CascadeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # families raise any error for other inputs or dtypes
            check_dtypes(self.layers)
            raise UnsupportedModelError(
                f"{model.config.model_type} does not run on token ids alone"
                f" ({first_line(error)}); expected a model that continues text"
            ) from error
        parameters = inspect.signature(self.decoder.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        #: The width of a hidden state, D: that of all parallel streams together.
        self.hidden_size = int(text_config.hidden_size) * self._probe.layout.count
        self.has_final_norm = self._probe.has_final_norm
        self._stand_ins = StandIns(model, self.decoder, self.layers)
        self._readout = Readout(model, self.decoder, self._stand_ins, self._probe)
        with products_in(self.device):
            text, idle = self._check_text_decoder()
        found = ModelProvenance(
            family=model.config.model_type,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            attention=model.config._attn_implementation,
            text_decoder=text,
            unused_parts=idle,
            packages=packages_of(self.layers) or UNSET,
        )
        self.provenance = model_provenance(found, provenance)
        if known(idle) and self.provenance.unused_parts != idle:
            parts = {*str(idle).split(", "), *str(self.provenance.unused_parts).split(", ")}
            self.provenance = replace(self.provenance, unused_parts=", ".join(sorted(parts)))

    @torch.no_grad()
    def _check_text_decoder(self) -> tuple[str | UnsetType, str | UnsetType]:
        """Check that a text decoder inside a larger model computes the model's own logits.

        Returns:
            The type of the text decoder, and the parts of the model that text does not use.

        Raises:
            UnsupportedModelError: The model does not run on text alone, or has other logits.
        """
        if not has_text_decoder(self.model):
            return UNSET, UNSET
        family = self.model.config.model_type
        ids = torch.arange(6, device=self.device).remainder(self.vocab_size).reshape(2, 3)
        try:
            own, idle = run_on_text(self.model, ids, self.layers)
        except Exception as error:  # families raise any error without an image
            raise UnsupportedModelError(
                f"{family} does not run on text alone ({first_line(error)}); expected a model that"
                " continues text without images or audio"
            ) from error
        last: list[Tensor] = []
        self.visit(ids, lambda entry, hidden: last.__setitem__(slice(None), [hidden]))
        if torch.isfinite(own).all() and not close(self.decode(last[0]), own):
            raise UnsupportedModelError(
                f"the text decoder of {family} alone has other logits than the whole model;"
                " expected the same for text"
            )
        text = str(text_config_of(self.model.config).model_type)
        return text, ", ".join(idle) if idle else UNSET

    def __repr__(self) -> str:
        name = known(self.provenance.name) or self.model.config.model_type
        about = f"{self.num_layers} layers, {known(self.provenance.dtype)} on {self.device}"
        return f"<{type(self).__name__}: {name}, {about}>"

    @property
    def device(self) -> torch.device:
        """The device of the weights; of a dispatched model, that of its first ones."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def layer_labels(self) -> list[str]:
        """The rows of a saturation profile, "1".."N", and "N+norm" for the final norm."""
        labels = [str(layer) for layer in range(1, self.num_layers + 1)]
        return labels + ([f"{self.num_layers}+norm"] if self.has_final_norm else [])

    @property
    def step_obstacle(self) -> str | None:
        """Why layers cannot be run one at a time (see `plan`), or None if they can."""
        layer = self._probe.scaled_layer
        if layer is not None:
            return f"decoder layer {layer} takes a multiple of what layer {layer - 1} returns"
        layer = self._probe.linked_layer
        if layer is None:
            return None
        return (
            f"decoder layer {layer} ({type(self.layers[layer - 1]).__name__}) takes a second value"
            " from an earlier layer next to the hidden states"
        )

    @property
    def direct_norm(self) -> nn.Module | None:
        """The final norm, if norm and LM head alone give the logits; otherwise None."""
        return self._readout.direct_norm

    @property
    def readout_obstacle(self) -> str | None:
        """Why hidden states cannot be turned into logits (see `decode`), or None if they can."""
        return self._readout.obstacle

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each layer's attention compares every token with every earlier one."""
        return attending(self.model, self.layers)

    def weights_hash(self) -> str:
        """Return the hash of the file that the weights were loaded from.

        For a model created in memory, return the hash of its current weights.
        """
        return known(self.provenance.weights_hash) or self.weights_in_memory()

    def weights_in_memory(self) -> str:
        """Return a SHA-256 over the current weights, including changes made after loading."""
        return weights_digest(self.model)

    def with_base_models(self) -> Iterator[DecoderStack]:
        """Yield this model, then the model that it continues, and so on."""
        stack: DecoderStack | None = self
        while stack is not None:
            yield stack
            stack = stack.below

    @torch.no_grad()
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        """Run the decoder once and pass each entry of the hidden history to a visitor.

        Neither LM head nor KV cache is computed. Entries that the visitor does not keep are freed
        during the pass.

        Args:
            input_ids: `[B, T]`.
            visitor: Called as `visitor(entry, hidden)` with entries 0 (the embeddings) to N (before
                the final norm). `hidden` is `[B, T, D]` and must not be modified.

        Returns:
            The state after the final norm, `[B, T, D]`; None if the model has no final norm.
        """
        with self.visiting(visitor) as decoder:
            final = run_decoder(decoder, input_ids)
        return final if self.has_final_norm else None

    @contextlib.contextmanager
    def visiting(
        self,
        visitor: Callable[[int, Tensor], None],
        *,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[nn.Module]:
        """Yield the decoder, a pass of which gives each entry of the hidden history to a visitor.

        Inside the context, run the decoder once, with any of its own arguments.

        Args:
            visitor: Called as in `visit`.
            change: Changes the hidden states that each layer returns, before the visitor and the
                next layer get them.
        """
        entries = iter(range(1, self.num_layers + 1))
        decoder, layers = self._stand_ins.for_hooks(self.decoder)
        joined = self._probe.layout.joined
        with (
            contextlib.nullcontext() if change is None else changed_outputs(layers, change),
            layer_pre_hook(layers[0], lambda hidden: visitor(0, joined(hidden))),
            layer_hooks(
                layers, lambda _, output: visitor(next(entries), joined(hidden_of(output)))
            ),
        ):
            yield decoder

    @torch.no_grad()
    def plan(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Plan:
        """Prepare a forward pass without computing any layer.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, past + T]`, 1 for tokens and 0 for padding.
            position_ids: `[B, T]` (default: past, past + 1, ...). Models without position ids
                ignore them (BLOOM derives positions from the mask).
            cache: The KV cache that the layers read and extend.

        Returns:
            The embeddings and the call of each layer.

        Raises:
            UnsupportedModelError: The layers hand on more than the hidden states.
        """
        if self.step_obstacle is not None:
            raise UnsupportedModelError(
                f"the layers of {self.model.config.model_type} cannot be run one at a time:"
                f" {self.step_obstacle}; use `cascade analyze` and `cascade gate`, which run the"
                " whole model"
            )
        calls: list[LayerCall] = []
        embedded: list[Tensor] = []

        def record(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, rest, named = split_output(args, kwargs)
            hidden = self._probe.layout.joined(hidden)
            embedded.append(hidden)
            calls.append(LayerCall(rest, named))
            return self._probe.output(number, hidden)

        kwargs: dict[str, Any] = (
            {} if attention_mask is None else {"attention_mask": attention_mask}
        )
        if position_ids is not None and self._takes_position_ids:
            kwargs["position_ids"] = position_ids
        if cache is not None:
            kwargs["past_key_values"] = cache
            if attention_mask is None:
                # With None, unlike with ones, the model takes the length of the cache into account.
                kwargs["attention_mask"] = None
        with self._stand_ins.standing_in(self.decoder, record) as decoder:
            run_decoder(decoder, input_ids, **kwargs)
        return Plan(embedded[0], tuple(calls))

    @torch.no_grad()
    def step(self, layer: int, hidden: Tensor, call: LayerCall) -> Tensor:
        """Compute one decoder layer exactly as the model does.

        Args:
            layer: 1..N.
            hidden: The layer's input, `[B, T, D]`.
            call: The layer's entry of `Plan.calls`.

        Returns:
            The layer's output on the residual stream, `[B, T, D]`.
        """
        if not 1 <= layer <= self.num_layers:
            raise ValueError(f"expected a layer in 1..{self.num_layers}, got {layer}")
        layout = self._probe.layout
        output = self.layers[layer - 1](layout.split(hidden), *call.args, **call.kwargs)
        return layout.joined(hidden_of(output))

    def decode(self, hidden: Tensor) -> Tensor:
        """Return the logits of an entry of the hidden history, with the model's norm and LM head.

        Gradients flow to `hidden` if it requires them.

        Args:
            hidden: `[B, T, D]`, before the final norm; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`.

        Raises:
            UnsupportedModelError: The model's logits need more than the last layer's states.
        """
        return self._readout.decode(hidden)

    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the model's final norm, which follows layer N.

        Args:
            hidden: `[B, T, D]`, an entry of the hidden history; T at most `max_positions`.

        Returns:
            The normed states, `[B, T, D]`.

        Raises:
            UnsupportedModelError: The model has no final norm, or one that changes the width.
        """
        return self._readout.norm(hidden)

    def decode_normed(self, normed: Tensor) -> Tensor:
        """Return the logits of states that are already normed.

        Gradients flow to `normed` if it requires them.

        Args:
            normed: `[B, T, D]`, as `visit` returns them; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`, with the model's soft-capping and scaling.
        """
        return self._readout.decode_normed(normed)
