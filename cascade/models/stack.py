"""DecoderStack: the decoder layers of a causal language model, run one at a time."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError
from cascade.core.provenance import ModelProvenance, model_provenance
from cascade.core.schema import known
from cascade.models.fast_layers import product
from cascade.models.hooks import (
    hidden_of,
    layer_hooks,
    layer_pre_hook,
    replaced_forward,
    split_output,
)
from cascade.models.views import (
    can_be_copied,
    holders,
    paths_of,
    with_children,
    with_descendants,
    with_own_hooks,
)

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

#: Layer types with keys and values per token; any other type carries a recurrent state instead.
_ATTENTION_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


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


def check_config(config: Any) -> None:
    """Refuse, before any weight is read, what can never be measured.

    Raises:
        UnsupportedModelError: An encoder-decoder, no causal LM, or recurrent layers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{family} is an encoder-decoder; expected a decoder-only causal language model"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{family} is not a causal language model that this transformers release knows"
        )
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    types = set(getattr(config.get_text_config(), "layer_types", None) or _ATTENTION_TYPES)
    if getattr(model_class, "_is_stateful", False) or types - _ATTENTION_TYPES:
        kinds = ", ".join(sorted(types - _ATTENTION_TYPES)) or "a recurrent state"
        raise UnsupportedModelError(
            f"{family} has recurrent layers ({kinds}): they keep no keys and values that an early"
            " exit could propagate; expected attention in every layer"
        )


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
        self._layer_paths = {
            root: paths_of(self.layers, root) for root in (self.model, self.decoder)
        }
        self.num_layers = len(self.layers)
        self.lm_head: nn.Module = model.get_output_embeddings()
        self._head_paths = paths_of(self.lm_head, model)
        text_config = model.config.get_text_config()
        self.hidden_size = int(text_config.hidden_size)
        self.vocab_size = int(text_config.vocab_size)
        limit = getattr(text_config, "max_position_embeddings", None)
        #: The longest sequence the positions allow; None where they have no end (ALiBi).
        self.max_positions: int | None = int(limit) if limit else None
        self._check_weights()
        self._tuple_sizes: tuple[int, ...] = ()
        parameters = inspect.signature(self.decoder.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self.has_final_norm = self._probe()
        self._norm = self._find_norm()
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
        """Return what tells these weights from all others.

        That is the hash of what they were loaded from. A model made in memory has none: there it is
        a SHA-256 over the weights as they are at this moment, whoever changed them (650 MB took
        0.5 s on one core).
        """
        return known(self.provenance.weights_hash) or self.weights_in_memory()

    def weights_in_memory(self) -> str:
        """Return a SHA-256 over the weights as they are at this moment, whoever changed them."""
        digest = hashlib.sha256()
        # Each once and without its name: who wraps a module renames weights or lists them twice.
        weights = self.model.state_dict(keep_vars=True).values()
        for value in {id(value): value for value in weights}.values():
            for tensor in _plain(value):
                add_to_digest(digest, tensor)
        return f"in-memory-sha256:{digest.hexdigest()}"

    def with_those_below(self) -> Iterator[DecoderStack]:
        """Yield this model, the one that it continues, and so on."""
        stack: DecoderStack | None = self
        while stack is not None:
            yield stack
            stack = stack.below

    def _check_weights(self) -> None:
        layer_of = {
            id(parameter): number
            for number, layer in enumerate(self.layers, start=1)
            for parameter in layer.parameters()
        }
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                number = layer_of.get(id(parameter))
                where = f"decoder layer {number}" if number else "outside the decoder layers"
                if self.dtype == torch.float16 and not torch.isnan(parameter).any():
                    most = torch.finfo(torch.float16).max
                    raise ModelError(
                        f"the weights are infinite in float16 ({where}: {name}), which holds "
                        f"numbers up to {most:.0f}; use --dtype bfloat16 or float32"
                    )
                raise ModelError(
                    f"the weights hold NaN or infinite values ({where}: {name}); "
                    "expected finite weights, get the checkpoint again"
                )

    @torch.no_grad()
    def _probe(self) -> bool:
        """Run two rows; learn which layers return tuples and whether a final norm follows."""
        outputs: list[Any] = []
        # The rows differ in their last token only, which no causal layer shows to the others.
        ids = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        ids[1, -1] = self.vocab_size // 2
        with layer_hooks(self.layers, lambda _, output: outputs.append(output)):
            final = self._run_decoder(ids)
        for number, output in enumerate(outputs, start=1):
            hidden = hidden_of(output)
            if not isinstance(hidden, Tensor) or hidden.shape != (*ids.shape, self.hidden_size):
                got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise UnsupportedModelError(
                    f"decoder layer {number} of {self.model.config.model_type} returns {got}, "
                    f"expected hidden states {(*ids.shape, self.hidden_size)}"
                )
        if len(outputs) != self.num_layers:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} ran {len(outputs)} of its {self.num_layers} "
                "decoder layers, expected each of them once"
            )
        self._check_causal(hidden_of(outputs[0])[:, :-1])
        self._tuple_sizes = tuple(
            len(output) if isinstance(output, tuple) else 0 for output in outputs
        )
        last = hidden_of(outputs[-1])
        # A model without a final norm (or with one that changes the width, as OPT-350m's
        # projection does) has no "N+norm" row to compare.
        return final.shape == last.shape and not torch.equal(final, last)

    @torch.no_grad()
    def _find_norm(self) -> nn.Module | None:
        """Return the final norm where norm and LM head are all that makes logits, else None.

        Calling the two spares a fifth of decoding one state by the model's forward (SmolLM2-135M
        in fp32, two cores: 1.3 of 5.4 ms).
        """
        norm = getattr(self.decoder, "norm", None)
        if not isinstance(norm, nn.Module) or not self.has_final_norm:
            return None
        self._norm = None
        # A hundred times a normed state: soft-capping and its like bend large logits alone.
        hidden = torch.linspace(-1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        large = 100 * norm(hidden[None, None])
        same = torch.equal(self.lm_head(large), self.decode_normed(large)) and torch.equal(
            self.lm_head(norm(hidden[None, None])), self.decode(hidden[None, None])
        )
        return norm if same else None

    def _check_causal(self, rows: Tensor) -> None:
        """Refuse a layer that made two rows differ before the token in which their inputs do."""
        # Half of the dtype's digits: kernels and experts may treat two rows differently, far below
        # it; looking ahead moves fp32 states by 1e-3 of their size even in tiny random models.
        limit = torch.finfo(rows.dtype).eps ** 0.5 * rows.abs().max()
        if (rows[0] - rows[1]).abs().max() > limit:
            raise UnsupportedModelError(
                f"the layers of {self.model.config.model_type} look ahead, at tokens that are still"
                " to come; expected a causal language model"
            )

    def _run_decoder(
        self, input_ids: Tensor, *, decoder: nn.Module | None = None, **kwargs: Any
    ) -> Tensor:
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        kwargs.setdefault("use_cache", kwargs.get("past_key_values") is not None)
        decoder = self.decoder if decoder is None else decoder
        output: Tensor = decoder(input_ids=input_ids, **kwargs).last_hidden_state
        return output

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
        layers: Iterable[nn.Module] = self.layers
        decoder = self.decoder
        if self._can_be_copied(decoder):  # hooks on copies: other threads may run the model
            layers = [with_own_hooks(layer) for layer in self.layers]
            decoder = self._with_layers(decoder, layers)
        with (
            layer_pre_hook(next(iter(layers)), lambda hidden: visitor(0, hidden)),
            layer_hooks(layers, lambda _, output: visitor(next(entries), hidden_of(output))),
        ):
            final = self._run_decoder(input_ids, decoder=decoder)
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
            return self._shaped(number, hidden)

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
        with self._standing_in(self.decoder, record) as decoder:
            self._run_decoder(input_ids, decoder=decoder, **kwargs)
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
        """Turn an entry of the residual stream into logits, by the model's own last steps.

        Gradients pass through to `hidden` where it asks for them.

        Final norm, LM head, soft-capping and scaling are the model's: its forward runs with its
        first layer standing in for `hidden` and the others passing it on. Where norm and head were
        found to be all of it, they alone are called.

        Args:
            hidden: `[B, T, D]`, before the final norm; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`.
        """
        if self._norm is not None:
            with _gradients_of(hidden):
                return product(self.lm_head, self._norm(hidden))

        def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._shaped(number, hidden)

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._standing_in(self.model, stand_in) as model, _gradients_of(hidden):
            logits: Tensor = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """Return states behind the model's final norm, which follows layer N.

        Args:
            hidden: `[B, T, D]`, an entry of the residual stream; T at most `max_positions`.

        Raises:
            UnsupportedModelError: The model has no final norm, or one that changes the width.
        """
        if not self.has_final_norm:
            raise UnsupportedModelError(
                f"this {self.model.config.model_type} has no final norm that keeps the width"
            )
        if self._norm is not None:
            normed: Tensor = self._norm(hidden)
            return normed
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)

        def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._shaped(number, hidden)

        with self._standing_in(self.decoder, stand_in) as decoder:
            return self._run_decoder(ids, decoder=decoder)

    def decode_normed(self, normed: Tensor) -> Tensor:
        """Turn states that are already behind the final norm into logits: the LM head's own steps.

        Gradients pass through to `normed` where it asks for them.

        Args:
            normed: `[B, T, D]`, as `visit` returns them; T at most `max_positions`.

        Returns:
            Logits, `[B, T, V]`, soft-capped and scaled as the model does.
        """
        if self._norm is not None:
            with _gradients_of(normed):
                return product(self.lm_head, normed)

        def stand_in(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._shaped(number, split_output(args, kwargs)[0])

        def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (normed, *args[1:])

        ids = torch.zeros(normed.shape[:2], dtype=torch.long, device=normed.device)
        with self._standing_in(self.model, stand_in) as model, contextlib.ExitStack() as restored:
            if model is self.model:
                head = self.lm_head
            else:
                head = with_own_hooks(self.lm_head)
                model = with_descendants(model, dict.fromkeys(self._head_paths, head))
            restored.callback(head.register_forward_pre_hook(swap).remove)
            restored.enter_context(_gradients_of(normed))
            logits: Tensor = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits

    def _shaped(self, number: int, hidden: Tensor) -> Any:
        """Return `hidden` in the form in which the layer at index `number` returns its output."""
        size = self._tuple_sizes[number]
        return (hidden,) + (None,) * (size - 1) if size else hidden

    @contextlib.contextmanager
    def _standing_in(
        self,
        root: nn.Module,
        stand_in: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    ) -> Iterator[nn.Module]:
        """Yield a model in which `stand_in` answers for every layer's forward.

        That is a copy, so that other threads can run the model meanwhile. Where a library answers
        the model's calls itself (see `can_be_copied`), a copy cannot work: there the model's own
        layers are changed and restored, and the model is for one thread at a time.

        Args:
            root: The model or its decoder.
            stand_in: Called as `stand_in(index, args, kwargs)` with the layer's index from 0.
        """

        def forward_of(number: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand_in(number, args, kwargs)

        with contextlib.ExitStack() as restored:
            if not self._can_be_copied(root):
                for number, layer in enumerate(self.layers):
                    restored.enter_context(replaced_forward(layer, forward_of(number)))
                yield root
                return
            layers = []
            for number, layer in enumerate(self.layers):
                copied = copy.copy(layer)
                copied.forward = forward_of(number)
                layers.append(copied)
            yield self._with_layers(root, layers)

    def _can_be_copied(self, root: nn.Module) -> bool:
        """Return whether a copy of the model or its decoder runs by itself."""
        paths = self._layer_paths[root]
        holding = [module for path in paths for module in holders(root, path)]
        compiled = any("_compiled_call_impl" in layer.__dict__ for layer in self.layers)
        return not compiled and all(map(can_be_copied, holding))

    def _with_layers(self, root: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
        """Return a copy of the model or its decoder with other decoder layers."""
        names = map(str, range(self.num_layers))
        made = with_children(self.layers, dict(zip(names, layers, strict=True)))
        return with_descendants(root, dict.fromkeys(self._layer_paths[root], made))


def _gradients_of(values: Tensor) -> torch.set_grad_enabled:
    """Let gradients through where `values` asks for them: the model's own weights learn nothing."""
    return torch.set_grad_enabled(values.requires_grad and torch.is_grad_enabled())


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers: the shallowest list of blocks of the config's length."""
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", 0)
    blocks = set(model._no_split_modules or ())
    lists = [
        (not blocks & {type(child).__name__ for child in module}, name.count("."), module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no list of {depth} decoder layers; "
            "expected a decoder-only model whose layers are an nn.ModuleList"
        )
    return min(lists, key=lambda entry: entry[:2])[2]


def add_to_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add a tensor's dtype, shape and every bit of it to a digest."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    numbers = tensor.detach().cpu().contiguous().flatten()
    digest.update(numbers.view(torch.uint8).numpy().data)


def _plain(value: Any) -> Iterator[Tensor]:
    """Yield the tensors behind one weight: quantized ones are several in one."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
