"""Forward passes in which some tokens of a chunk exit early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.core.errors import not_finite
from cascade.decoding.engine.engine import EngineCall
from cascade.decoding.kv_cache import KeyValueCache, Selection
from cascade.decoding.selective_layers import LayerTask, SkippingLayers
from cascade.exits.heads import ExitHead, PropagationMap
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint, ExitRule
from cascade.models.flops import Counts
from cascade.models.stack import Plan
from cascade.stats.decision import reaches

#: Rows that go through the LM head at once: 512 rows of 49,152 logits in fp32 are 100 MB.
_LOGIT_ROWS = 512

#: A callback that receives computed logits: `(layer, rows [n], columns [n], logits [n, V])`.
OnLogits = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Exit:
    """One exit: its layer, rule, threshold and head.

    Attributes:
        layer: 1..N.
        rule: Gives each token's confidence.
        threshold: Tokens with a confidence at or above it exit.
        head: Computes the logits of tokens that exit.
        propagation: Predicts the keys and values of exited tokens for upper layers. None: they are
            projected from the exit state.
    """

    layer: int
    rule: ExitRule
    threshold: float
    head: ExitHead
    propagation: PropagationMap | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens that are computed together.

    Attributes:
        ids: `[B, T]`.
        valid: `[B, T]`, false for padding and for sequences that have ended.
        positions: `[B, T]`.
        attention_mask: `[B, past + T]`, or None without padding.
    """

    ids: Tensor
    valid: Tensor
    positions: Tensor
    attention_mask: Tensor | None

    def plan(self, layers: SkippingLayers, cache: KeyValueCache) -> Plan:
        """Return the model's plan of the chunk; the cache's window gives the chunk's columns."""
        if layers.engine is not None:
            made = layers.engine.plan(self, cache)
            if made is not None:
                return made
        return layers.stack.plan(
            self.ids,
            attention_mask=self.attention_mask,
            position_ids=None if self.attention_mask is None else self.positions,
            cache=cache,
        )


@dataclass(frozen=True)
class PassConfig:
    """How a chunk is computed.

    Attributes:
        stop_exited: Whether upper layers skip exited tokens (frozen, ridge). False: every token is
            computed, and only the logits of exited tokens come from the exit (exact).
        full_prediction: The full model's predictions, `[B, T]`; for rules that need them.
        seed: Seed for rules that draw random numbers.
    """

    stop_exited: bool = True
    full_prediction: Tensor | None = None
    seed: int = 0


class ForwardPass:
    """The forward pass of one chunk, advanced layer by layer.

    Args:
        layers: Computes the layers.
        exits: The exits, in ascending order of layers.
        chunk: The tokens.
        cache: The KV cache, whose window is the chunk.
        counts: Receives the work that is computed.
        config: How the chunk is computed.
        plan: The plan of the chunk, if it exists already.

    Attributes:
        layer: The last layer computed; 0 before the first.
        hidden: The output of that layer, `[B, T, D]`; for exited tokens their exit state.
        undecided: `[B, T]`, true for tokens that have not exited.
        exit_layers: The layer at which each token exited, `[B, T]`; N if it has not exited.
        selection: Which tokens the next layer computes.
    """

    def __init__(
        self,
        layers: SkippingLayers,
        exits: Sequence[Exit],
        chunk: Chunk,
        cache: KeyValueCache,
        counts: Counts,
        config: PassConfig | None = None,
        *,
        plan: Plan | None = None,
    ) -> None:
        self.layers, self.exits, self.chunk = layers, exits, chunk
        self.cache, self.counts = cache, counts
        self.config = config or PassConfig()
        self.plan = plan or chunk.plan(layers, cache)
        self.layer = 0
        self.hidden = self.plan.embedded
        self.undecided = chunk.valid
        self.exit_layers = torch.full_like(chunk.ids, layers.stack.num_layers)
        self.selection = Selection(chunk.valid, torch.zeros_like(chunk.valid))
        self._history: dict[int, Tensor] = {0: self.hidden}
        self._kept_entries = max((at.rule.entries for at in exits), default=0)
        self._earlier: list[Tensor] = []
        self._predicted: list[tuple[Tensor, Tensor, int]] = []
        self._predicts_states = any(
            at.propagation.of_states for at in exits if at.propagation is not None
        )

    def fork(self, counts: Counts | None = None) -> ForwardPass:
        """Return an independent pass that continues from the layer reached.

        Args:
            counts: Receives the work that the new pass computes (default: this pass's counts).
        """
        other = ForwardPass(
            self.layers,
            self.exits,
            self.chunk,
            self.cache,
            self.counts if counts is None else counts,
            self.config,
            plan=self.plan,
        )
        other.layer, other.hidden = self.layer, self.hidden
        other.undecided, other.selection = self.undecided, self.selection
        other.exit_layers = self.exit_layers.clone()
        other._history = dict(self._history)
        other._earlier = list(self._earlier)
        other._predicted = list(self._predicted)
        return other

    def run_layers_to(self, layer: int) -> None:
        """Compute the layers up to and including `layer`."""
        while self.layer < layer:
            task = LayerTask(
                self.layer + 1,
                self.hidden,
                self.selection,
                self.plan.calls[self.layer],
                self.cache,
                self.counts,
                predicted=self._prediction(self.layer + 1),
                predicts_states=self._predicts_states,
            )
            self.set_output(self.layer + 1, self.layers.run(task))

    def set_output(self, layer: int, hidden: Tensor) -> None:
        """Set the output of a layer that was computed elsewhere.

        Args:
            layer: 1..N.
            hidden: `[B, T, D]`.
        """
        self.layer, self.hidden = layer, hidden
        self._history[layer] = hidden
        self._history.pop(layer - self._kept_entries - 1, None)

    def exit_point(self, at: Exit, rows: Tensor, columns: Tensor) -> ExitPoint:
        """Return the input of the exit's rule for some tokens at the layer reached.

        Args:
            at: The exit.
            rows: Rows of the tokens in the chunk, `[n]`.
            columns: Columns of the tokens in the chunk, `[n]`.
        """
        entries = {
            entry: states[rows, columns]
            for entry, states in self._history.items()
            if entry >= self.layer - at.rule.entries
        }
        history = HiddenHistory(self.layers.stack.num_layers, entries)
        full = self.config.full_prediction
        return ExitPoint(
            layer=at.layer,
            history=history,
            compute_logits=lambda: self._head_logits(at, history.entries[self.layer]),
            token_ids=self.chunk.ids[rows, columns],
            positions=self.chunk.positions[rows, columns],
            earlier=[prediction[rows, columns] for prediction in self._earlier],
            full_prediction=None if full is None else full[rows, columns],
            seed=self.config.seed,
        )

    def decide(self, at: Exit, outputs: Tensor, on_logits: OnLogits) -> None:
        """Let undecided tokens exit at the layer reached if their confidence suffices.

        Args:
            at: The exit at this layer.
            outputs: `[B, T]`, true for tokens whose logits are needed.
            on_logits: Called with the logits of tokens that exit.

        Raises:
            ModelError: A confidence or logits are not finite.
        """
        exits = torch.zeros_like(self.undecided)
        predictions = torch.zeros_like(self.chunk.ids)
        keeps_predictions = any(later.rule.needs_earlier for later in self.exits)
        rows, columns = torch.nonzero(self.undecided, as_tuple=True)
        for some in slices(len(rows), self.layers.stack.max_positions):
            point = self.exit_point(at, rows[some], columns[some])
            confidence = at.rule.confidence(point)
            if torch.isnan(confidence).any():
                raise not_finite(
                    f"the rule {at.rule.name} is NaN at exit layer {at.layer}, because states or "
                    "logits are not finite"
                )
            out = reaches(confidence, at.threshold)
            exits[rows[some], columns[some]] = out
            if keeps_predictions:
                predictions[rows[some], columns[some]] = point.prediction
            needed = out & outputs[rows[some], columns[some]]
            if needed.any():
                logits = self._exit_logits(at, point, needed)
                on_logits(at.layer, rows[some][needed], columns[some][needed], logits)
        if keeps_predictions:
            self._earlier.append(predictions)
        self.exit_tokens(at, exits)

    def _exit_logits(self, at: Exit, point: ExitPoint, needed: Tensor) -> Tensor:
        """Return the exit head's logits of some of a point's tokens, `[m, V]`, in fp32."""
        if at.rule.needs_logits or point.has_logits:
            logits = point.logits[needed]
        else:
            states = point.history.entries[self.layer]
            logits = self._head_logits(at, states[needed]).float()
        return finite_logits(logits, at.layer)

    def exit_tokens(self, at: Exit, exits: Tensor) -> None:
        """Let tokens exit at the layer reached.

        Args:
            at: The exit at this layer.
            exits: `[B, T]`, true for tokens that exit; tokens that exited before are ignored.
        """
        exits = exits & self.undecided
        if not exits.any():
            return
        self.exit_layers[exits] = at.layer
        self.undecided = self.undecided & ~exits
        if not self.config.stop_exited:
            return
        if at.propagation is not None:
            predicted = at.propagation.predict(self.hidden[exits])
            flat = torch.nonzero(exits.flatten(), as_tuple=True)[0]
            self._predicted.append((flat, predicted, at.propagation.first))
        self.selection = Selection(self.undecided, self.selection.exited | exits)

    def _prediction(self, layer: int) -> Tensor | None:
        """Return the ridge maps' predictions for exited tokens at a layer, in token order."""
        if not self._predicted:
            return None
        values = [values[:, layer - first] for _, values, first in self._predicted]
        if len(values) == 1:
            return values[0]
        order = torch.cat([flat for flat, _, _ in self._predicted]).argsort()
        return torch.cat(values)[order]

    def _head_logits(self, at: Exit, hidden: Tensor) -> Tensor:
        self.counts.lm_head_rows += len(hidden)
        if at.head.multiplications:
            before = self.counts.head_rows.get(at.layer, 0)
            self.counts.head_rows[at.layer] = before + len(hidden)
        return at.head.logits(hidden)

    def finish(self, outputs: Tensor, on_logits: OnLogits) -> None:
        """Compute the remaining layers and the logits of tokens that did not exit.

        Args:
            outputs: `[B, T]`, true for tokens whose logits are needed.
            on_logits: Called with the logits.
        """
        self.run_layers_to(self.layers.stack.num_layers)
        needed = self.undecided & outputs
        decode_tokens(
            self.layers,
            self.hidden,
            needed,
            self.counts,
            on_logits,
            by_engine=is_by_engine(self.plan),
        )

    def run(self, outputs: Tensor, on_logits: OnLogits) -> None:
        """Compute all layers and decide at every exit.

        Args:
            outputs: `[B, T]`, true for tokens whose logits are needed.
            on_logits: Called with the logits.
        """
        for at in self.exits:
            self.run_layers_to(at.layer)
            self.decide(at, outputs, on_logits)
        self.finish(outputs, on_logits)


def is_by_engine(plan: Plan) -> bool:
    """Return whether the engine computes a plan."""
    return bool(plan.calls) and isinstance(plan.calls[0], EngineCall)


def decode_tokens(
    layers: SkippingLayers,
    hidden: Tensor,
    outputs: Tensor,
    counts: Counts,
    on_logits: OnLogits,
    *,
    by_engine: bool = False,
) -> None:
    """Compute the full model's logits of some tokens.

    Args:
        layers: The layers of the model.
        hidden: The output of the last layer, `[B, T, D]`.
        outputs: `[B, T]`, true for tokens whose logits are needed.
        counts: Receives the work that is computed.
        on_logits: Called with the logits.
        by_engine: Whether the engine computed the states.

    Raises:
        ModelError: The logits are not finite.
    """
    stack = layers.stack
    rows, columns = torch.nonzero(outputs, as_tuple=True)
    for some in slices(len(rows), stack.max_positions):
        states = hidden[rows[some], columns[some]]
        counts.lm_head_rows += len(states)
        logits = layers.logits(states, by_engine=by_engine)
        on_logits(
            stack.num_layers, rows[some], columns[some], finite_logits(logits, stack.num_layers)
        )


def finite_logits(logits: Tensor, layer: int) -> Tensor:
    """Return logits that are finite or, for excluded tokens, minus infinity.

    Args:
        logits: `[..., V]`.
        layer: The layer they belong to.

    Raises:
        ModelError: They are not.
    """
    # Checking the maximum is enough: amax propagates NaN, and -inf only excludes a token.
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise not_finite(f"the logits of layer {layer} are not finite")
    return logits


def slices(count: int, limit: int | None) -> list[slice]:
    """Return slices of rows, each small enough for one call of the LM head.

    Args:
        count: The number of rows.
        limit: The model's positions, which a slice must not exceed either; None for no limit.
    """
    size = min(_LOGIT_ROWS, limit or _LOGIT_ROWS)
    return [slice(start, start + size) for start in range(0, count, size)]
