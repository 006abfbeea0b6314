"""Readout: from hidden states to logits, with the model's own norm and LM head."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError, first_line
from cascade.core.float32_products import products_in
from cascade.models.architecture import run_decoder, text_config_of
from cascade.models.dispatch import device_of
from cascade.models.overrides.hooks import as_output, hidden_of, layer_hooks, split_output
from cascade.models.overrides.stand_ins import StandIns
from cascade.models.overrides.views import paths_of, with_descendants, with_own_hooks
from cascade.models.probing import Probe, close
from cascade.models.text_decoders import has_text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Readout:
    """Turns hidden states into logits exactly as a model does.

    The model's own forward applies final norm, LM head, soft-capping and scaling: it runs with
    layers that all return the given states. If a test shows that norm and head alone give the same
    logits, they are called directly. That saves 1.3 of 5.4 ms per state (SmolLM2-135M in fp32 on
    two cores).

    Args:
        model: The model.
        decoder: The module that runs its layers.
        stand_ins: Runs the model with other layers.
        probe: The result of `cascade.models.probing.probe`.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: nn.Module, stand_ins: StandIns, probe: Probe
    ) -> None:
        self.model, self.decoder = model, decoder
        self.stand_ins = stand_ins
        self.probe = probe
        self.lm_head: nn.Module = model.get_output_embeddings()
        self._head_paths = paths_of(self.lm_head, model)
        #: Why states cannot be turned into logits, in one line, or None if they can.
        with products_in(device_of(model)):
            self.obstacle = self._find_obstacle()
        #: The final norm, if norm and LM head alone give the logits; otherwise None.
        self.direct_norm: nn.Module | None = None
        # A larger model that does not run on text is refused by DecoderStack, which says why.
        with (
            contextlib.suppress(*([Exception] if has_text_decoder(model) else [])),
            products_in(device_of(model)),
        ):
            self.direct_norm = None if self.obstacle else self._find_direct_norm()

    @torch.no_grad()
    def _find_obstacle(self) -> str | None:
        """Decode the last layer's states of a short text; return why they do not give the logits.

        Raises:
            UnsupportedModelError: The model does not run on token ids alone.
        """
        if has_text_decoder(self.model):
            return None  # DecoderStack checks the logits of those
        family = self.model.config.model_type
        ids = torch.zeros((1, 3), dtype=torch.long, device=device_of(self.model))
        ids[0, 1:] = int(text_config_of(self.model.config).vocab_size) // 2
        states: list[Tensor] = []
        model, layers = self.stand_ins.for_hooks(self.model)
        try:
            with layer_hooks(layers[-1:], lambda _, output: states.append(hidden_of(output))):
                own = _logits_of(model, ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # families raise any error where they need other inputs
            raise UnsupportedModelError(
                f"{family} does not run on token ids alone ({first_line(error)}); expected a model"
                " that continues text"
            ) from error
        if not torch.isfinite(own).all():
            return None  # reported by what is measured, with the layer that does it
        try:
            same = close(self._decode_by_model(self.probe.layout.joined(states[0])), own)
        except Exception as error:  # of layers that return more than states
            return f"the states of {family} alone give no logits ({first_line(error)})"
        return None if same else f"the logits of {family} need more than the last layer's states"

    def _check(self) -> None:
        if self.obstacle is not None:
            raise UnsupportedModelError(
                f"{self.obstacle}; use `cascade analyze` and `cascade gate`, which need no logits"
            )

    @torch.no_grad()
    def _find_direct_norm(self) -> nn.Module | None:
        """Return the final norm if norm and LM head alone give the logits, else None."""
        norm = getattr(self.decoder, "norm", None)
        if not isinstance(norm, nn.Module) or not self.probe.has_final_norm:
            return None
        width = int(text_config_of(self.model.config).hidden_size)
        hidden = torch.linspace(-1, 1, width, dtype=self.model.dtype, device=device_of(self.model))
        normed = norm(hidden[None, None])
        # Soft-capping changes only large logits, so scale a normed state by a hundred.
        large = 100 * normed
        same = _equal(self.lm_head(large), self._decode_normed_by_model(large)) and _equal(
            self.lm_head(normed), self._decode_by_model(hidden[None, None])
        )
        return norm if same else None

    def decode(self, hidden: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of states before the final norm, `[B, T, D]`."""
        self._check()
        if self.direct_norm is None or hidden.dtype != self.model.dtype:
            return self._decode_by_model(hidden)  # which converts a wider residual stream
        with _gradients_of(hidden):
            logits: Tensor = self.lm_head(self.direct_norm(hidden))
            return logits

    def decode_normed(self, normed: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of states after the final norm, `[B, T, D]`."""
        self._check()
        if self.direct_norm is None:
            return self._decode_normed_by_model(normed)
        with _gradients_of(normed):
            logits: Tensor = self.lm_head(normed)
            return logits

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to states, `[B, T, D]`.

        Raises:
            UnsupportedModelError: The model has no final norm, or one that changes the width.
        """
        if not self.probe.has_final_norm:
            raise UnsupportedModelError(
                f"this {self.model.config.model_type} has no final norm that keeps the width"
            )
        self._check()
        if self.direct_norm is not None and hidden.dtype == self.model.dtype:
            normed: Tensor = self.direct_norm(hidden)
            return normed
        with self.stand_ins.standing_in(self.decoder, self._stand_in_for(hidden)) as decoder:
            return run_decoder(decoder, _ids_like(hidden))

    def _decode_by_model(self, hidden: Tensor) -> Tensor:
        with (
            self.stand_ins.standing_in(self.model, self._stand_in_for(hidden)) as model,
            _gradients_of(hidden),
        ):
            return _logits(model, hidden)

    def _decode_normed_by_model(self, normed: Tensor) -> Tensor:
        def pass_on(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            native = split_output(args, kwargs)[0]
            return as_output(native, self.probe.tuple_sizes[number])

        def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (normed, *args[1:])

        with (
            self.stand_ins.standing_in(self.model, pass_on) as model,
            contextlib.ExitStack() as restored,
        ):
            head = self.lm_head
            if model is not self.model:
                head = with_own_hooks(head)
                model = with_descendants(model, dict.fromkeys(self._head_paths, head))
            restored.callback(head.register_forward_pre_hook(swap).remove)
            restored.enter_context(_gradients_of(normed))
            return _logits(model, normed)

    def _stand_in_for(self, hidden: Tensor) -> Any:
        return lambda number, args, kwargs: self.probe.output(number, hidden)


def _equal(a: Tensor, b: Tensor) -> bool:
    # The modules of a dispatched model return results on devices of their own.
    return torch.equal(a, b.to(a.device))


def _logits(model: nn.Module, like: Tensor) -> Tensor:
    return _logits_of(model, _ids_like(like))


def _logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return logits


def _ids_like(hidden: Tensor) -> Tensor:
    """Return arbitrary token ids, one for each state."""
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _gradients_of(values: Tensor) -> torch.set_grad_enabled:
    """Enable gradients only if `values` requires them; the model's weights are not trained."""
    return torch.set_grad_enabled(values.requires_grad and torch.is_grad_enabled())
