"""Measure in one pass over a corpus how a layer and its neighbour change the residual stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.token_classes import classify
from cascade.models.stack import DecoderStack, Plan
from cascade.models.sublayers import Sublayers, Update, find_sublayers, split_update
from cascade.studies.explanations.ablations import ablated_outputs, sequence_losses
from cascade.studies.explanations.causes import (
    MeasuredUpdate,
    UpdateTraits,
    angles_with_neighbour_traits,
    angles_without,
    learn_traits,
    measure_update,
)
from cascade.studies.explanations.residual_stream import StreamStatistics, attention_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MeasuredSide:
    """Measurements of the explained layer or of its neighbour.

    Attributes:
        layer: Layer, 1..N.
        traits: Traits learned on the pilot sequences.
        angles: Degrees and similarities, `[2, S, T]`, by removed cause. "nothing" is the unchanged
            layer.
        losses: Loss of each sequence in nats, by ablation.
    """

    layer: int
    traits: UpdateTraits
    angles: dict[str, Array] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def plain(self) -> Array:
        """Degrees and similarities of the unchanged layer, `[2, S, T]`."""
        return self.angles["nothing"]


@dataclass(frozen=True)
class MeasuredLayers:
    """Measurements of a layer and its neighbour.

    Attributes:
        target: The explained layer.
        contrast: Its neighbour.
        classes: Class of each token, `[S, T]`, as an index of `token_classes.CLASSES`.
        stream: Statistics of the residual stream over all layers.
        full_losses: Loss of each sequence in the unchanged model, in nats.
    """

    target: MeasuredSide
    contrast: MeasuredSide
    classes: Array
    stream: StreamStatistics
    full_losses: list[float]

    @property
    def sides(self) -> tuple[MeasuredSide, MeasuredSide]:
        """The explained layer, then its neighbour."""
        return self.target, self.contrast


class LayerMeasurement:
    """Measure a layer and its neighbour.

    Args:
        stack: The model, with eager attention, which returns attention weights.
        tokenizer: Tokenizer of the model.
        layers: The explained layer and its neighbour.
        batch_size: Sequences per forward pass.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UnsupportedModelError: A layer's update is not the sum of attention and MLP.
    """

    def __init__(
        self,
        stack: DecoderStack,
        tokenizer: PreTrainedTokenizerBase,
        layers: tuple[int, int],
        batch_size: int,
        progress: Callable[[int], None],
    ) -> None:
        self._stack, self._tokenizer, self._layers = stack, tokenizer, layers
        self._batch_size, self._progress = batch_size, progress
        self._sublayers: dict[int, Sublayers] = {
            number: find_sublayers(stack, number) for number in range(1, stack.num_layers + 1)
        }

    def run(self, pilot: TokenBlocks, rest: TokenBlocks) -> MeasuredLayers:
        """Learn the traits of both layers on pilot sequences, and measure on the others.

        Args:
            pilot: Sequences to learn from.
            rest: Sequences to measure.
        """
        target, contrast = self._learn(pilot)
        classes, delimiters = classify(rest.ids, self._tokenizer)
        found = MeasuredLayers(target, contrast, classes, StreamStatistics(), [])
        # First tokens cannot be hidden from themselves.
        can_hide = bool(delimiters[:, 1:].any())
        for ids, numbers in self._batches(rest):
            in_batch = torch.from_numpy(delimiters[numbers]).to(ids.device)
            self._measure_batch(found, ids, numbers, in_batch, hide=can_hide)
        return found

    def _batches(self, blocks: TokenBlocks) -> Iterator[tuple[Tensor, Array]]:
        """Yield token ids `[B, T]` and sequence indices `[B]`."""
        for ids, numbers in blocks.batches(self._batch_size):
            yield torch.from_numpy(ids.astype(np.int64)).to(self._stack.device), numbers
            self._progress(ids.size)

    def _learn(self, pilot: TokenBlocks) -> tuple[MeasuredSide, MeasuredSide]:
        """Return both layers with the traits learned on the pilot sequences."""
        updates: dict[int, list[Update]] = defaultdict(list)
        for ids, _ in self._batches(pilot):
            plan = self._stack.plan(ids)
            hidden = plan.embedded
            for layer in range(1, max(self._layers) + 1):
                call = plan.calls[layer - 1]
                if layer in self._layers:
                    sublayers = self._sublayers[layer]
                    hidden, update = split_update(self._stack, sublayers, layer, hidden, call)
                    updates[layer].append(update)
                else:
                    hidden = self._stack.step(layer, hidden, call)
        target, contrast = (
            MeasuredSide(layer, learn_traits(updates[layer])) for layer in self._layers
        )
        return target, contrast

    def _measure_batch(
        self, found: MeasuredLayers, ids: Tensor, numbers: Array, delimiters: Tensor, *, hide: bool
    ) -> None:
        """Add one batch to the measurements.

        Args:
            found: Measurements of both layers.
            ids: Token ids, `[B, T]`.
            numbers: Indices of the sequences in the batch, `[B]`.
            delimiters: True for delimiters, `[B, T]`.
            hide: Also measure the layers with hidden delimiters.
        """
        plan = self._stack.plan(ids)
        hidden = plan.embedded
        found.stream.add_entry(0, hidden, ids)
        updates: dict[int, MeasuredUpdate] = {}
        for layer in range(1, self._stack.num_layers + 1):
            call = plan.calls[layer - 1]
            with attention_weights(self._stack.layers[layer - 1]) as weights:
                hidden, update = split_update(
                    self._stack, self._sublayers[layer], layer, hidden, call
                )
            found.stream.add_layer(layer, update, next(iter(weights), None), delimiters)
            found.stream.add_entry(layer, hidden, ids)
            if layer in self._layers:
                hidden_away = delimiters if hide else None
                updates[layer] = measure_update(self._stack, layer, update, call, hidden_away)
        found.full_losses.extend(self._losses(plan, self._stack.num_layers, hidden, ids))
        for side in found.sides:
            measured = updates[side.layer]
            self._keep_angles(found, side, measured, numbers)
            self._keep_losses(side, measured, plan, ids)

    def _losses(self, plan: Plan, layer: int, hidden: Tensor, ids: Tensor) -> list[float]:
        found: list[float] = sequence_losses(self._stack, plan, layer, hidden, ids).tolist()
        return found

    def _keep_losses(
        self, side: MeasuredSide, measured: MeasuredUpdate, plan: Plan, ids: Tensor
    ) -> None:
        call, sublayers = plan.calls[side.layer - 1], self._sublayers[side.layer]
        outputs = ablated_outputs(self._stack, sublayers, side.layer, measured, side.traits, call)
        for name, output in outputs:
            side.losses[name] += self._losses(plan, side.layer, output, ids)

    @staticmethod
    def _keep_angles(
        found: MeasuredLayers, side: MeasuredSide, measured: MeasuredUpdate, numbers: Array
    ) -> None:
        angles = angles_without(measured, side.traits, found.target.traits)
        if side is found.target:
            neighbour = found.contrast.traits
            angles |= angles_with_neighbour_traits(measured.update, side.traits, neighbour)
        for name, pair in angles.items():
            if name not in side.angles:
                # Allocate once. Kept arrays that lie between temporary arrays of batches fragment
                # the heap, and memory would grow with the number of batches.
                side.angles[name] = np.empty((2, *found.classes.shape))
            for kind, values in enumerate(pair):
                side.angles[name][kind, numbers] = values.cpu().numpy()
