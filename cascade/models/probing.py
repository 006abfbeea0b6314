"""Probing a model with one short run: the type of its layers' outputs, and its final norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.models.architecture import run_decoder, text_config_of
from cascade.models.dispatch import device_of
from cascade.models.overrides.hooks import (
    as_output,
    call_hooks,
    hidden_of,
    layer_hooks,
    split_output,
)
from cascade.models.streams import StreamLayout, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Probe:
    """The result of `probe`.

    Attributes:
        tuple_sizes: The length of the tuple or list that each layer returns; 0 for a plain tensor.
        has_final_norm: Whether a norm of the same width follows the last layer.
        layout: How the layers take and return the residual stream.
        linked_layer: The first layer that takes a value from an earlier layer next to the hidden
            states, 1..N; None if there is no such layer.
        scaled_layer: The first layer that takes a multiple of what the layer before it returns, or
            None.
    """

    tuple_sizes: tuple[int, ...]
    has_final_norm: bool
    layout: StreamLayout
    linked_layer: int | None = None
    scaled_layer: int | None = None

    def output(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the same form as a layer's output.

        Args:
            index: The layer, counted from 0.
            hidden: `[B, T, D]`.
        """
        return as_output(self.layout.split(hidden), self.tuple_sizes[index])


@torch.no_grad()
def probe(model: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList) -> Probe:
    """Run two sequences through a model and check what its layers return.

    Args:
        model: The model.
        decoder: The module that runs the layers (see `find_decoder`).
        layers: Its decoder layers.

    Raises:
        UnsupportedModelError: A layer returns no hidden states, does not run exactly once, or
            attends to later tokens.
    """
    family = model.config.model_type
    config = text_config_of(model.config)
    outputs: list[Any] = []
    inputs: list[Any] = []
    linked: list[int] = []
    ran: list[nn.Module] = []
    # The rows differ only in their last token, which must not affect the states before it.
    ids = torch.zeros((2, 3), dtype=torch.long, device=device_of(model))
    ids[1, -1] = int(config.vocab_size) // 2

    def note_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rests = [
            rest for output in outputs if isinstance(output, (tuple, list)) for rest in output[1:]
        ]
        taken = [*args[1:], *kwargs.values()]
        inputs.append(split_output(args, kwargs)[0])
        if any(rest is value for rest in rests if rest is not None for value in taken):
            linked.append(len(outputs) + 1)

    def note(layer: nn.Module, output: Any) -> None:
        ran.append(layer)
        outputs.append(output)

    with call_hooks(layers, note_input), layer_hooks(layers, note):
        final = run_decoder(decoder, ids)
    _check_runs(family, layers, ran)
    scaled = _check_chain(family, inputs, outputs)
    width = int(config.hidden_size)
    layouts: list[StreamLayout] = []
    for number, output in enumerate(outputs, start=1):
        hidden = hidden_of(output)
        is_tensor = isinstance(hidden, Tensor)
        layout = layout_of(tuple(hidden.shape), tuple(ids.shape), width) if is_tensor else None
        if layout is None or (layouts and layout != layouts[0]):
            got = tuple(hidden.shape) if is_tensor else type(hidden).__name__
            raise UnsupportedModelError(
                f"decoder layer {number} of {family} returns {got}, expected hidden states"
                f" {(*ids.shape, width)}"
            )
        layouts.append(layout)
    layout = layouts[0]
    for output in outputs:
        _check_causal(layout.joined(hidden_of(output))[:, :-1], family)
    last = layout.joined(hidden_of(outputs[-1]))
    # A model without a final norm (or with one that changes the width, as OPT-350m's
    # projection does) has no "N+norm" row to compare.
    return Probe(
        tuple(len(output) if isinstance(output, (tuple, list)) else 0 for output in outputs),
        final.shape == last.shape and not torch.equal(final, last),
        layout,
        linked[0] if linked else None,
        scaled,
    )


def _check_runs(family: str, layers: nn.ModuleList, ran: list[nn.Module]) -> None:
    """Check that the layers ran in order, each of them once."""
    if ran == list(layers):
        return
    expected = "expected every layer to run exactly once for each token"
    idle = [number for number, layer in enumerate(layers, start=1) if layer not in ran]
    if idle:
        kind = type(layers[idle[0] - 1]).__name__
        raise UnsupportedModelError(
            f"decoder layer {idle[0]} of {family} ({kind}) does not run on text"
            f"{f' ({len(idle) - 1} more)' if idle[1:] else ''}; {expected}"
        )
    numbers = list(range(1, len(layers) + 1))
    first = {id(layer): number for number, layer in zip(numbers[::-1], layers[::-1], strict=True)}
    same = [number for number in numbers if first[id(layers[number - 1])] != number]
    if same:
        once = first[id(layers[same[0] - 1])]
        kind = type(layers[once - 1]).__name__
        raise UnsupportedModelError(
            f"decoder layer {once} of {family} ({kind}) runs twice: decoder layer {same[0]} is the"
            f" same module; {expected}"
        )
    times = len(ran) // len(layers)
    how = f"{times} times" if ran == list(layers) * times else "in another order"
    raise UnsupportedModelError(f"{family} runs its {len(layers)} decoder layers {how}; {expected}")


def _check_chain(family: str, inputs: list[Any], outputs: list[Any]) -> int | None:
    """Check that each layer takes what the layer before it returns, or a multiple of it.

    Returns:
        The first layer that takes another multiple, 1..N, or None.
    """
    scaled = None
    for number, (output, taken) in enumerate(zip(outputs, inputs[1:], strict=False), start=2):
        hidden = hidden_of(output)
        if taken is hidden or not isinstance(hidden, Tensor):
            continue  # an output that is no tensor is refused below
        if isinstance(taken, Tensor) and taken.shape == hidden.shape:
            taken = taken.to(hidden.device)
            if torch.equal(taken, hidden) or not torch.isfinite(hidden).all():
                continue
            if close(taken.norm() / hidden.norm() * hidden, taken):
                scaled = scaled or number
                continue
        raise UnsupportedModelError(
            f"decoder layer {number} of {family} does not take what layer {number - 1} returns;"
            " expected layers that follow each other, with nothing computed in between"
        )
    return scaled


def _check_causal(rows: Tensor, family: str) -> None:
    """Check that two rows have equal states before the token in which their inputs differ."""
    # Kernels and experts that treat two rows differently stay far below the limit. Attending to
    # later tokens changes fp32 states by 1e-3 of their size even in tiny random models.
    # States that overflow are reported by what is measured, with the layer that does it.
    if torch.isfinite(rows).all() and not close(rows[0], rows[1]):
        raise UnsupportedModelError(
            f"the layers of {family} attend to later tokens; expected a causal language model"
        )


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two results are the same but for rounding: to half of the dtype's digits."""
    # Kernels differ by much less; a missing operation by much more. Parts of float64 models compute
    # in float32.
    b = b.to(a.device)
    digits = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    limit = digits * torch.maximum(a.abs().max(), b.abs().max())
    return bool((a - b).abs().max() <= limit)
