"""The last steps of a model: from hidden states to logits, by its own norm and LM head."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.models.architecture import run_decoder
from cascade.models.fast_layers import product
from cascade.models.hooks import as_output, replaced_layers, split_output
from cascade.models.probing import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Readout:
    """Turns hidden states into logits exactly as a model does.

    Final norm, LM head, soft-capping and scaling are the model's: its forward runs with its first
    layer standing in for the given states and the others passing them on. If norm and head prove to
    be all of it, they are called directly. That saves a fifth of decoding one state (SmolLM2-135M
    in fp32 on two cores: 1.3 of 5.4 ms).

    Args:
        model: The model.
        layers: Its decoder layers.
        probe: What `cascade.models.probing.probe` found.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, probe: Probe) -> None:
        self.model = model
        self.layers = layers
        self.probe = probe
        self.lm_head: nn.Module = model.get_output_embeddings()
        self._direct_norm = self._find_direct_norm()

    @torch.no_grad()
    def _find_direct_norm(self) -> nn.Module | None:
        """Return the final norm where norm and LM head are all that makes logits, else None."""
        norm = getattr(self.model.base_model, "norm", None)
        if not isinstance(norm, nn.Module) or not self.probe.has_final_norm:
            return None
        width = int(self.model.config.get_text_config().hidden_size)
        hidden = torch.linspace(-1, 1, width, dtype=self.model.dtype, device=self.model.device)
        normed = norm(hidden[None, None])
        # A hundred times a normed state: soft-capping and its like bend large logits alone.
        large = 100 * normed
        same = torch.equal(
            self.lm_head(large), self._decode_normed_by_model(large)
        ) and torch.equal(self.lm_head(normed), self._decode_by_model(hidden[None, None]))
        return norm if same else None

    def decode(self, hidden: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of states before the final norm, `[B, T, D]`."""
        if self._direct_norm is None:
            return self._decode_by_model(hidden)
        with _gradients_of(hidden):
            return product(self.lm_head, self._direct_norm(hidden))

    def decode_normed(self, normed: Tensor) -> Tensor:
        """Return the logits `[B, T, V]` of states behind the final norm, `[B, T, D]`."""
        if self._direct_norm is None:
            return self._decode_normed_by_model(normed)
        with _gradients_of(normed):
            return product(self.lm_head, normed)

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """Return states `[B, T, D]` behind the final norm.

        Raises:
            UnsupportedModelError: The model has no final norm, or one that changes the width.
        """
        if not self.probe.has_final_norm:
            raise UnsupportedModelError(
                f"this {self.model.config.model_type} has no final norm that keeps the width"
            )
        if self._direct_norm is not None:
            normed: Tensor = self._direct_norm(hidden)
            return normed
        with replaced_layers(self.layers, self._stand_in_for(hidden)):
            return run_decoder(self.model.base_model, _ids_like(hidden))

    def _decode_by_model(self, hidden: Tensor) -> Tensor:
        with (
            replaced_layers(self.layers, self._stand_in_for(hidden)),
            _gradients_of(hidden),
        ):
            return self._logits(hidden)

    def _decode_normed_by_model(self, normed: Tensor) -> Tensor:
        def pass_on(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return as_output(split_output(args, kwargs)[0], self.probe.tuple_sizes[number])

        def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (normed, *args[1:])

        with contextlib.ExitStack() as restored:
            restored.enter_context(replaced_layers(self.layers, pass_on))
            restored.callback(self.lm_head.register_forward_pre_hook(swap).remove)
            restored.enter_context(_gradients_of(normed))
            return self._logits(normed)

    def _stand_in_for(self, hidden: Tensor) -> Any:
        sizes = self.probe.tuple_sizes
        return lambda number, args, kwargs: as_output(hidden, sizes[number])

    def _logits(self, like: Tensor) -> Tensor:
        ids = _ids_like(like)
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
        return logits


def _ids_like(hidden: Tensor) -> Tensor:
    """Return any token ids for as many tokens as there are states."""
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _gradients_of(values: Tensor) -> torch.set_grad_enabled:
    """Compute gradients if `values` needs them: the model's own weights learn nothing."""
    return torch.set_grad_enabled(values.requires_grad and torch.is_grad_enabled())
