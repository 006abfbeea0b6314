"""Probing a model with one short run: the type of its layers' outputs, and its final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.models.architecture import run_decoder
from cascade.models.overrides.hooks import hidden_of, layer_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Probe:
    """The result of `probe`.

    Attributes:
        tuple_sizes: The length of the tuple that each layer returns; 0 for a plain tensor.
        has_final_norm: Whether a norm of the same width follows the last layer.
    """

    tuple_sizes: tuple[int, ...]
    has_final_norm: bool


@torch.no_grad()
def probe(model: PreTrainedModel, layers: nn.ModuleList) -> Probe:
    """Run two sequences through a model and check what its layers return.

    Args:
        model: The model.
        layers: Its decoder layers.

    Raises:
        UnsupportedModelError: A layer returns no hidden states, does not run exactly once, or
            attends to later tokens.
    """
    family = model.config.model_type
    config = model.config.get_text_config()
    outputs: list[Any] = []
    # The rows differ only in their last token, which must not affect the states before it.
    ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)
    ids[1, -1] = int(config.vocab_size) // 2
    with layer_hooks(layers, lambda _, output: outputs.append(output)):
        final = run_decoder(model.base_model, ids)
    shape = (*ids.shape, int(config.hidden_size))
    for number, output in enumerate(outputs, start=1):
        hidden = hidden_of(output)
        if not isinstance(hidden, Tensor) or hidden.shape != shape:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UnsupportedModelError(
                f"decoder layer {number} of {family} returns {got}, expected hidden states {shape}"
            )
    if len(outputs) != len(layers):
        raise UnsupportedModelError(
            f"{family} ran {len(outputs)} of its {len(layers)} decoder layers, expected each "
            "exactly once"
        )
    _check_causal(hidden_of(outputs[0])[:, :-1], family)
    last = hidden_of(outputs[-1])
    # A model without a final norm (or with one that changes the width, as OPT-350m's
    # projection does) has no "N+norm" row to compare.
    return Probe(
        tuple(len(output) if isinstance(output, tuple) else 0 for output in outputs),
        final.shape == last.shape and not torch.equal(final, last),
    )


def _check_causal(rows: Tensor, family: str) -> None:
    """Check that two rows have equal states before the token in which their inputs differ."""
    # The limit is half of the dtype's digits. Kernels and experts that treat two rows differently
    # stay far below it. Attending to later tokens changes fp32 states by 1e-3 of their size even
    # in tiny random models.
    limit = torch.finfo(rows.dtype).eps ** 0.5 * rows.abs().max()
    if (rows[0] - rows[1]).abs().max() > limit:
        raise UnsupportedModelError(
            f"the layers of {family} attend to later tokens; expected a causal language model"
        )
