"""Passes: a chunk of tokens on its way up through the layers, some of them leaving early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.core.errors import ModelError
from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.selective_layers import SkippingLayers
from cascade.exits.heads import ExitHead, PropagationMap
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint, ExitRule
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack, Plan
from cascade.stats.decision import reaches

#: Rows that go through the LM head at once: 512 rows of 49,152 logits in fp32 are 100 MB.
_LOGIT_ROWS = 512

#: Takes `(layer, rows [n], columns [n], logits [n, V])` of tokens whose logits are made.
Sink = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Exit:
    """One exit: where, by which rule, from which confidence on, and through which head.

    Attributes:
        layer: 1..N.
        rule: Decides.
        threshold: Tokens with a confidence at or above it leave.
        head: Makes their logits.
        propagation: Predicts what upper layers need of them; None: keys and values are projected
            from the exit state itself.
    """

    layer: int
    rule: ExitRule
    threshold: float
    head: ExitHead
    propagation: PropagationMap | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens that go up together.

    Attributes:
        ids: `[B, T]`.
        valid: `[B, T]`, false for padding and for sequences that have ended.
        positions: `[B, T]`.
        attention_mask: `[B, past + T]`, None where nothing is padded.
    """

    ids: Tensor
    valid: Tensor
    positions: Tensor
    attention_mask: Tensor | None

    def plan(self, layers: SkippingLayers, cache: KeyValueCache) -> Plan:
        """Let the model prepare the chunk; the cache's window says where it lies."""
        return layers.stack.plan(
            self.ids,
            attention_mask=self.attention_mask,
            position_ids=None if self.attention_mask is None else self.positions,
            cache=cache,
        )


class Pass:
    """One chunk on its way up.

    Args:
        layers: Compute the layers.
        exits: In ascending order of layers.
        chunk: The tokens.
        cache: Its window is the chunk.
        counts: What is computed is added here.
        leaving: Whether tokens that exit stop being computed (frozen, ridge), or everything is
            computed and only their logits come from the exit (exact).
        full_prediction: `[B, T]` of the full model, for controls.
        seed: For rules that draw.
        plan: The chunk's, where it is made already.
    """

    def __init__(
        self,
        layers: SkippingLayers,
        exits: Sequence[Exit],
        chunk: Chunk,
        cache: KeyValueCache,
        counts: Counts,
        *,
        leaving: bool = True,
        full_prediction: Tensor | None = None,
        seed: int = 0,
        plan: Plan | None = None,
    ) -> None:
        self.layers, self.exits, self.chunk = layers, exits, chunk
        self.cache, self.counts, self.leaving = cache, counts, leaving
        self.full_prediction, self.seed = full_prediction, seed
        plan = plan or chunk.plan(layers, cache)
        self.calls = plan.calls
        self.layer = 0
        self.hidden = plan.embedded
        self.undecided = chunk.valid
        #: The layer at which each token left; N where it did not.
        self.exit_layers = torch.full_like(chunk.ids, layers.stack.num_layers)
        self.selection = Selection(chunk.valid, torch.zeros_like(chunk.valid))
        self._history: dict[int, Tensor] = {0: self.hidden}
        self._kept_entries = max((at.rule.entries for at in exits), default=0)
        self._earlier: list[Tensor] = []
        self._predicted: list[tuple[Tensor, Tensor, int]] = []
        self._predicts_states = any(
            at.propagation.of_states for at in exits if at.propagation is not None
        )

    def fork(self) -> Pass:
        """Return a pass that goes on from here by itself, without touching this one."""
        other = object.__new__(Pass)
        other.__dict__.update(self.__dict__)
        other.exit_layers = self.exit_layers.clone()
        other._history = dict(self._history)
        other._earlier = list(self._earlier)
        other._predicted = list(self._predicted)
        return other

    def climb(self, layer: int) -> None:
        """Compute the layers up to and including `layer`."""
        while self.layer < layer:
            output = self.layers.run(
                self.layer + 1,
                self.hidden,
                self.selection,
                self.calls[self.layer],
                self.cache,
                self.counts,
                predicted=self._prediction(self.layer + 1),
                of_states=self._predicts_states,
            )
            self.reach(self.layer + 1, output)

    def reach(self, layer: int, hidden: Tensor) -> None:
        """Take a layer's output as computed.

        Args:
            layer: 1..N.
            hidden: `[B, T, D]`.
        """
        self.layer, self.hidden = layer, hidden
        self._history[layer] = hidden
        self._history.pop(layer - self._kept_entries - 1, None)

    def point(self, at: Exit, rows: Tensor, columns: Tensor) -> ExitPoint:
        """Return what the exit's rule may see of some tokens at the layer reached.

        Args:
            at: The exit.
            rows: `[n]`.
            columns: `[n]`.
        """
        entries = {
            entry: states[rows, columns]
            for entry, states in self._history.items()
            if entry >= self.layer - at.rule.entries
        }
        history = HiddenHistory(self.layers.stack.num_layers, entries)
        full = self.full_prediction
        return ExitPoint(
            layer=at.layer,
            history=history,
            compute_logits=lambda: self._head_logits(at, history.entries[self.layer]),
            token_ids=self.chunk.ids[rows, columns],
            positions=self.chunk.positions[rows, columns],
            earlier=[prediction[rows, columns] for prediction in self._earlier],
            full_prediction=None if full is None else full[rows, columns],
            seed=self.seed,
        )

    def decide(self, at: Exit, wanted: Tensor, sink: Sink) -> None:
        """Let undecided tokens leave at the layer reached, where the exit's rule says so.

        Args:
            at: The exit at this layer.
            wanted: `[B, T]`, the tokens whose logits are to be made.
            sink: Takes the logits of those that leave.

        Raises:
            ModelError: A confidence or logits are not finite.
        """
        leaves = torch.zeros_like(self.undecided)
        predictions = torch.zeros_like(self.chunk.ids)
        remembers = any(later.rule.needs_earlier for later in self.exits)
        rows, columns = torch.nonzero(self.undecided, as_tuple=True)
        for some in slices(len(rows), self.layers.stack.max_positions):
            point = self.point(at, rows[some], columns[some])
            confidence = at.rule.confidence(point)
            if torch.isnan(confidence).any():
                raise ModelError(
                    f"the rule {at.rule.name} is NaN at exit layer {at.layer}: the states or "
                    "logits there are not finite; use a wider --dtype, or get the checkpoint again"
                )
            out = reaches(confidence, at.threshold)
            leaves[rows[some], columns[some]] = out
            if remembers:
                predictions[rows[some], columns[some]] = point.prediction
            self._emit(at, point, rows[some], columns[some], out, wanted, sink)
        if remembers:
            self._earlier.append(predictions)
        self.take_out(at, leaves)

    def _emit(
        self,
        at: Exit,
        point: ExitPoint,
        rows: Tensor,
        columns: Tensor,
        out: Tensor,
        wanted: Tensor,
        sink: Sink,
    ) -> None:
        chosen = out & wanted[rows, columns]
        if not chosen.any():
            return
        rows, columns = rows[chosen], columns[chosen]
        if at.rule.needs_logits or "logits" in point.__dict__:
            logits = point.logits[chosen]
        else:
            logits = self._head_logits(at, self._history[self.layer][rows, columns]).float()
        sink(at.layer, rows, columns, _finite(logits, at.layer))

    def take_out(self, at: Exit, leaves: Tensor) -> None:
        """Let tokens leave at the layer reached.

        Args:
            at: The exit at this layer.
            leaves: `[B, T]`.
        """
        leaves = leaves & self.undecided
        if not leaves.any():
            return
        self.exit_layers[leaves] = at.layer
        self.undecided = self.undecided & ~leaves
        if not self.leaving:
            return
        if at.propagation is not None:
            predicted = at.propagation.predict(self.hidden[leaves])
            flat = torch.nonzero(leaves.flatten(), as_tuple=True)[0]
            self._predicted.append((flat, predicted, at.propagation.first))
        self.selection = Selection(self.undecided, self.selection.exited | leaves)

    def _prediction(self, layer: int) -> Tensor | None:
        """Return the ridge maps' word on the exited tokens at a layer, in their order."""
        if not self._predicted:
            return None
        parts = [values[:, layer - first] for _, values, first in self._predicted]
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([flat for flat, _, _ in self._predicted]).argsort()
        return torch.cat(parts)[order]

    def _head_logits(self, at: Exit, hidden: Tensor) -> Tensor:
        self.counts.lm_head_rows += len(hidden)
        if at.head.multiplications:
            before = self.counts.head_rows.get(at.layer, 0)
            self.counts.head_rows[at.layer] = before + len(hidden)
        return at.head.logits(hidden)

    def finish(self, wanted: Tensor, sink: Sink) -> None:
        """Compute the remaining layers, and the logits of the tokens that went all the way.

        Args:
            wanted: `[B, T]`, the tokens whose logits are to be made.
            sink: Takes them.
        """
        self.climb(self.layers.stack.num_layers)
        decode_tokens(self.layers.stack, self.hidden, self.undecided & wanted, self.counts, sink)

    def run(self, wanted: Tensor, sink: Sink) -> None:
        """Climb from exit to exit and to the end."""
        for at in self.exits:
            self.climb(at.layer)
            self.decide(at, wanted, sink)
        self.finish(wanted, sink)


def decode_tokens(
    stack: DecoderStack, hidden: Tensor, wanted: Tensor, counts: Counts, sink: Sink
) -> None:
    """Make the full model's logits of some tokens.

    Args:
        stack: The model.
        hidden: `[B, T, D]`, the last layer's output.
        wanted: `[B, T]`.
        counts: What is computed is added here.
        sink: Takes the logits.

    Raises:
        ModelError: They are not finite.
    """
    rows, columns = torch.nonzero(wanted, as_tuple=True)
    for some in slices(len(rows), stack.max_positions):
        states = hidden[rows[some], columns[some]]
        counts.lm_head_rows += len(states)
        logits = stack.decode(states[None])[0].float()
        sink(stack.num_layers, rows[some], columns[some], _finite(logits, stack.num_layers))


def _finite(logits: Tensor, layer: int) -> Tensor:
    # The largest one tells: NaN is larger than any number, and -inf alone rules single tokens out.
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise ModelError(
            f"the logits of layer {layer} are not finite; use a wider --dtype, or get the "
            "checkpoint again"
        )
    return logits


def slices(count: int, limit: int | None) -> list[slice]:
    """Cut rows into parts that fit through the LM head at once.

    Args:
        count: How many rows.
        limit: The model's positions, which its forward must not exceed either.
    """
    size = min(_LOGIT_ROWS, limit or _LOGIT_ROWS)
    return [slice(start, start + size) for start in range(0, count, size)]
