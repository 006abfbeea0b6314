"""Causes of a layer's angle: what is left of it when one of them is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.models.stack import DecoderStack, LayerCall
from cascade.models.sublayers import Parts, Update
from cascade.stats.cosine import cosine, norm
from cascade.studies.explanations.residual_stream import angle, massive

#: The update is in few dimensions when so many hold half of its energy.
MOST_DIMENSIONS = 5
_ENERGY = 0.5

#: What can be taken away from both layers alike, and what is made the neighbour's.
REMOVALS = (
    "attention",
    "mlp",
    "first_token",
    "delimiters",
    "common",
    "dimensions",
    "massive",
)
ALIKE = ("update_size", "update_direction", "stream_size")


@dataclass(frozen=True)
class Pilot:
    """What is fixed on the first sequences, before anything is measured on the others.

    Attributes:
        common: The update's mean over tokens, first tokens left out, `[D]`.
        common_share: The share of the update's energy that it holds.
        dimensions: The dimensions that hold half of the update's energy; none where they are many.
        needed: How many they are.
        energy: The share that each of `dimensions` holds.
        massive: Dimensions in which the layer's input or output is massive.
        size: The median of the update's norm over the stream's.
        stream: The median norm of the stream.
        cosine: The mean cosine of the update and the stream.
    """

    common: Tensor
    common_share: float
    dimensions: tuple[int, ...]
    needed: int
    energy: tuple[float, ...]
    massive: tuple[int, ...]
    size: float
    stream: float
    cosine: float

    @classmethod
    def of(cls, updates: Sequence[Update]) -> Pilot:
        """Learn from the updates of a few batches."""
        start = torch.cat([update.hidden[:, 1:] for update in updates])
        whole = torch.cat([update.whole[:, 1:] for update in updates])
        flat = whole.flatten(0, 1).double()
        common = flat.mean(dim=0)
        energy = (flat**2).mean(dim=0)
        total = energy.sum().clamp_min(1e-30)
        order = energy.argsort(descending=True)
        shares = (energy[order] / total).cumsum(0)
        needed = int((shares < _ENERGY).sum()) + 1
        few = order[:needed] if needed <= MOST_DIMENSIONS else order[:0]
        there = [
            massive(states).any(dim=0).any(dim=0)
            for update in updates
            for states in (update.hidden, update.hidden + update.whole)
        ]
        return cls(
            common=common.to(start.dtype),
            common_share=float((common**2).sum() / total),
            dimensions=tuple(few.tolist()),
            needed=needed,
            energy=tuple((energy[few] / total).tolist()),
            massive=tuple(torch.nonzero(torch.stack(there).any(dim=0))[:, 0].tolist()),
            size=float((norm(whole) / norm(start).clamp_min(1e-30)).median()),
            stream=float(norm(start).median()),
            cosine=float(cosine(whole, start).mean()),
        )


def blocked(call: LayerCall, columns: Tensor) -> LayerCall | None:
    """Return a layer's call in which no token but itself attends to some of the tokens.

    Args:
        call: Made with eager attention, whose mask is a tensor.
        columns: `[B, T]`, true for the tokens to hide.

    Returns:
        The call; None where its mask is none that can be changed.
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

    # Some families pass their mask by name, some by place.
    args = tuple(map(changed, call.args))
    kwargs = {name: changed(value) for name, value in call.kwargs.items()}
    return LayerCall(args, kwargs) if found else None


@dataclass(frozen=True)
class Measured:
    """A layer's update in a batch, with what it would be if some tokens could not be read.

    Attributes:
        update: As it is.
        hidden_away: Removal -> the layer's output without them, `[B, T, D]`.
    """

    update: Update
    hidden_away: dict[str, Tensor]


def measure(
    stack: DecoderStack,
    parts: Parts,
    layer: int,
    update: Update,
    call: LayerCall,
    delimiters: Tensor | None,
) -> Measured:
    """Run a layer again with the first token hidden from the others, and with the delimiters.

    Args:
        stack: The model.
        parts: The layer's.
        layer: 1..N.
        update: What it does as it is.
        call: Its call, with eager attention.
        delimiters: `[B, T]`; where a batch has none, the layer gives what it gives. None: they are
            not to be hidden.
    """
    first = torch.zeros(update.hidden.shape[:2], dtype=torch.bool, device=update.hidden.device)
    first[:, 0] = True
    hidden = {"first_token": first}
    if delimiters is not None:
        hidden["delimiters"] = delimiters & ~first
    outputs = {}
    for name, columns in hidden.items():
        changed = blocked(call, columns)
        if changed is None:
            continue
        output = update.hidden + update.whole
        if columns.any():
            output = stack.step(layer, update.hidden.to(stack.dtype), changed).to(output.dtype)
        outputs[name] = output
    return Measured(update, outputs)


def angles_without(found: Measured, own: Pilot, of: Pilot) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what is left of a layer's angle without each cause, and of its similarity.

    Args:
        found: The layer's update.
        own: Its pilot.
        of: The pilot of the layer that is explained: dimensions are taken from both layers alike.

    Returns:
        Removal -> degrees and similarities, `[B, T]` each; "nothing" is the layer as it is. What
        cannot be taken away here is missing.
    """
    start, end = found.update.hidden, found.update.hidden + found.update.whole
    pairs = {
        "nothing": (start, end),
        "attention": (start, start + found.update.mlp),
        "mlp": (start, start + found.update.attention),
        "common": (start, end - own.common),
    }
    pairs |= {name: (start, output) for name, output in found.hidden_away.items()}
    for name, dims in (("dimensions", of.dimensions), ("massive", of.massive)):
        if dims:
            keep = torch.ones(start.shape[-1], dtype=torch.bool, device=start.device)
            keep[list(dims)] = False
            pairs[name] = (start[..., keep], end[..., keep])
    return {name: (angle(*pair), cosine(*pair)) for name, pair in pairs.items()}


def angles_alike(update: Update, own: Pilot, other: Pilot) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a layer's angle with one of its traits exchanged for the neighbour's.

    Args:
        update: What the layer adds.
        own: Its pilot.
        other: The neighbour's.

    Returns:
        Trait -> degrees and similarities, `[B, T]` each.
    """
    start, whole = update.hidden, update.whole
    smaller = other.size / max(own.size, 1e-30)
    longer = other.stream / max(own.stream, 1e-30)
    found = {
        "update_size": start + whole * smaller,
        "stream_size": start * longer + whole,
    }
    angles = {name: (angle(start, end), cosine(start, end)) for name, end in found.items()}
    # An update of the same size, at the neighbour's angle to the stream.
    size = norm(whole) / norm(start).clamp_min(1e-30)
    along, across = 1 + size * other.cosine, size * (1 - other.cosine**2) ** 0.5
    turned = torch.atan2(across, along)
    return angles | {"update_direction": (torch.rad2deg(turned), torch.cos(turned))}
