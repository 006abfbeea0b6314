"""Possible causes of a layer's angle, and the remaining angle after removing each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.models.stack import DecoderStack, LayerCall
from cascade.models.sublayers import Update
from cascade.stats.cosine import cosine, norm
from cascade.studies.explanations.residual_stream import angle, massive

#: An update lies in few dimensions if at most this many hold half of its energy.
MOST_DIMENSIONS = 5
_ENERGY = 0.5

#: Causes that can be removed from a layer.
REMOVALS = (
    "attention",
    "mlp",
    "first_token",
    "delimiters",
    "common",
    "dimensions",
    "massive",
)
#: Traits of a layer that can be replaced by the neighbour's.
NEIGHBOUR_TRAITS = ("update_size", "update_direction", "stream_size")


@dataclass(frozen=True)
class UpdateTraits:
    """Traits of a layer's update, learned on the pilot sequences.

    Attributes:
        common: Mean update over all tokens except first tokens, `[D]`.
        common_share: Share of the update's energy in `common`.
        dimensions: Dimensions that hold half of the update's energy; empty if they are many.
        dimensions_for_half: Number of dimensions that hold half of the energy.
        energy: Share of the energy in each of `dimensions`.
        massive: Dimensions with massive activations in the layer's input or output.
        update_size: Median norm of the update, relative to the stream's.
        stream_size: Median norm of the stream.
        update_cosine: Mean cosine of the update and the stream.
    """

    common: Tensor
    common_share: float
    dimensions: tuple[int, ...]
    dimensions_for_half: int
    energy: tuple[float, ...]
    massive: tuple[int, ...]
    update_size: float
    stream_size: float
    update_cosine: float


def learn_traits(updates: Sequence[Update]) -> UpdateTraits:
    """Return the traits of a layer's update over a few batches.

    Args:
        updates: Updates, one per batch.
    """
    start = torch.cat([update.hidden[:, 1:] for update in updates])
    whole = torch.cat([update.whole[:, 1:] for update in updates])
    flat = whole.flatten(0, 1).double()
    common = flat.mean(dim=0)
    energy = (flat**2).mean(dim=0)
    total = energy.sum().clamp_min(1e-30)
    order = energy.argsort(descending=True)
    shares = (energy[order] / total).cumsum(0)
    for_half = int((shares < _ENERGY).sum()) + 1
    few = order[:for_half] if for_half <= MOST_DIMENSIONS else order[:0]
    return UpdateTraits(
        common=common.to(start.dtype),
        common_share=float((common**2).sum() / total),
        dimensions=tuple(few.tolist()),
        dimensions_for_half=for_half,
        energy=tuple((energy[few] / total).tolist()),
        massive=_massive_dimensions(updates),
        update_size=float((norm(whole) / norm(start).clamp_min(1e-30)).median()),
        stream_size=float(norm(start).median()),
        update_cosine=float(cosine(whole, start).mean()),
    )


def _massive_dimensions(updates: Sequence[Update]) -> tuple[int, ...]:
    found = [
        massive(states).any(dim=0).any(dim=0)
        for update in updates
        for states in (update.hidden, update.output)
    ]
    return tuple(torch.nonzero(torch.stack(found).any(dim=0))[:, 0].tolist())


def hide_tokens(call: LayerCall, columns: Tensor) -> LayerCall | None:
    """Return a layer's call in which some tokens are hidden from all tokens except themselves.

    Args:
        call: Call with eager attention, whose mask is a tensor.
        columns: True for the tokens to hide, `[B, T]`.

    Returns:
        The changed call; None if the call has no mask that can be changed.
    """
    length = columns.shape[-1]
    hidden = columns[:, None, None, :].expand(-1, 1, length, -1)
    hidden = hidden & ~torch.eye(length, dtype=torch.bool, device=columns.device)
    found = False

    def changed(value: Any) -> Any:
        nonlocal found
        if (
            not isinstance(value, Tensor)
            or value.ndim != 4
            or value.shape[-2:] != hidden.shape[-2:]
        ):
            return value
        found = True
        lowest = False if value.dtype is torch.bool else torch.finfo(value.dtype).min
        return torch.where(hidden, torch.full_like(value[:1, :1, :1, :1], lowest), value)

    # Some families pass the mask by name, others by position.
    args = tuple(map(changed, call.args))
    kwargs = {name: changed(value) for name, value in call.kwargs.items()}
    return LayerCall(args, kwargs) if found else None


@dataclass(frozen=True)
class MeasuredUpdate:
    """A layer's update in a batch, and its output with hidden tokens.

    Attributes:
        update: The unchanged update.
        outputs_hidden: Output of the layer, `[B, T, D]`, with "first_token" or "delimiters" hidden.
    """

    update: Update
    outputs_hidden: dict[str, Tensor]


def measure_update(
    stack: DecoderStack, layer: int, update: Update, call: LayerCall, delimiters: Tensor | None
) -> MeasuredUpdate:
    """Run a layer again, once with hidden first tokens and once with hidden delimiters.

    Args:
        stack: The model.
        layer: Layer, 1..N.
        update: The layer's unchanged update.
        call: The layer's call, with eager attention.
        delimiters: True for delimiters, `[B, T]`; None to skip hiding delimiters. A batch without
            delimiters keeps the unchanged output.
    """
    first = torch.zeros(update.hidden.shape[:2], dtype=torch.bool, device=update.hidden.device)
    first[:, 0] = True
    hidden = {"first_token": first}
    if delimiters is not None:
        hidden["delimiters"] = delimiters & ~first
    outputs = {}
    for name, columns in hidden.items():
        changed = hide_tokens(call, columns)
        if changed is None:
            continue
        output = update.output
        if columns.any():
            output = stack.step(layer, update.hidden.to(stack.dtype), changed).to(output.dtype)
        outputs[name] = output
    return MeasuredUpdate(update, outputs)


def angles_without(
    measured: MeasuredUpdate, own: UpdateTraits, target: UpdateTraits
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the angle and similarity of a layer without each cause.

    Args:
        measured: The layer's update.
        own: The layer's traits.
        target: Traits of the explained layer. Its dimensions are removed from both layers.

    Returns:
        Degrees and similarities, `[B, T]` each, by removed cause. "nothing" is the unchanged layer.
        Causes that cannot be removed are missing.
    """
    start, end = measured.update.hidden, measured.update.output
    pairs = {
        "nothing": (start, end),
        "attention": (start, start + measured.update.mlp),
        "mlp": (start, start + measured.update.attention),
        "common": (start, end - own.common),
    }
    pairs |= {name: (start, output) for name, output in measured.outputs_hidden.items()}
    for name, dims in (("dimensions", target.dimensions), ("massive", target.massive)):
        if dims:
            keep = torch.ones(start.shape[-1], dtype=torch.bool, device=start.device)
            keep[list(dims)] = False
            pairs[name] = (start[..., keep], end[..., keep])
    return {name: (angle(*pair), cosine(*pair)) for name, pair in pairs.items()}


def angles_with_neighbour_traits(
    update: Update, own: UpdateTraits, neighbour: UpdateTraits
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the angle and similarity of a layer with one trait replaced by the neighbour's.

    Args:
        update: The layer's update.
        own: The layer's traits.
        neighbour: The neighbour's traits.

    Returns:
        Degrees and similarities, `[B, T]` each, by replaced trait.
    """
    start, whole = update.hidden, update.whole
    smaller = neighbour.update_size / max(own.update_size, 1e-30)
    longer = neighbour.stream_size / max(own.stream_size, 1e-30)
    found = {
        "update_size": start + whole * smaller,
        "stream_size": start * longer + whole,
    }
    angles = {name: (angle(start, end), cosine(start, end)) for name, end in found.items()}
    # Keep the size of the update, but use the neighbour's angle to the stream.
    size = norm(whole) / norm(start).clamp_min(1e-30)
    along = 1 + size * neighbour.update_cosine
    across = size * (1 - neighbour.update_cosine**2) ** 0.5
    turned = torch.atan2(across, along)
    return angles | {"update_direction": (torch.rad2deg(turned), torch.cos(turned))}
