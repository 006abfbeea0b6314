"""The exit table: confidence and predictions of every token at every exit layer."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import not_finite
from cascade.decoding.forward import Exit, ForwardPass, PassConfig, decode_tokens, slices
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.exits.rules import ExitRule
from cascade.models.flops import Counts
from cascade.stats.perplexity import MAX_NATS

T = TypeVar("T")


@dataclass
class ExitTable:
    """The results of every token at every exit layer, from one full pass without skipping.

    Attributes:
        confidence: (layer, rule) -> confidences, `[S, T]`, fp32.
        agrees: Layer -> whether exit head and full model predict the same token, `[S, T]`.
        head_log_probability: Layer -> the exit head's log-probability of the next token, `[S, T]`;
            NaN at the last token.
        full_log_probability: The full model's log-probability of the next token, `[S, T]`; NaN at
            the last token.
        divergence: Layer -> KL(full || exit head), `[S, T]`, in nats.
    """

    confidence: dict[tuple[int, str], Array] = field(default_factory=dict)
    agrees: dict[int, Array] = field(default_factory=dict)
    head_log_probability: dict[int, Array] = field(default_factory=dict)
    full_log_probability: Array = field(default_factory=lambda: np.zeros((0, 0)))
    divergence: dict[int, Array] = field(default_factory=dict)

    @classmethod
    def joined(cls, tables: Sequence[ExitTable]) -> ExitTable:
        """Return the concatenated table of several batches."""

        def join(name: str) -> dict[Any, Array]:
            return {
                key: np.concatenate([getattr(table, name)[key] for table in tables])
                for key in getattr(tables[0], name)
            }

        return cls(
            join("confidence"),
            join("agrees"),
            join("head_log_probability"),
            np.concatenate([table.full_log_probability for table in tables]),
            join("divergence"),
        )


class Clock:
    """Measures the duration of work in seconds, excluding calls wrapped by `aside`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._aside = 0.0

    def now(self) -> float:
        """Return the time in seconds, after the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def time(self, work: Callable[[], T]) -> tuple[T, float]:
        """Run `work`; return its result and its duration in seconds."""
        aside, start = self._aside, self.now()
        result = work()
        return result, self.now() - start - (self._aside - aside)

    def aside(self, work: Callable[..., None]) -> Callable[..., None]:
        """Return `work` wrapped so that its duration is excluded from the work that calls it."""

        def run(*args: Any) -> None:
            start = self.now()
            work(*args)
            self._aside += self.now() - start

        return run


@dataclass
class BatchSeconds:
    """The durations of the work of one batch, in seconds.

    Attributes:
        layers: Layer -> the decoder layers after the previous key, up to and including this one;
            key 0 is the work before the first layer.
        heads: Exit layer -> its exit head, for all tokens.
        rules: (exit layer, rule) -> the rule's confidences, for all tokens.
        full_head: The LM head of the full model, for all tokens.
    """

    layers: dict[int, float] = field(default_factory=dict)
    heads: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    rules: defaultdict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    full_head: float = 0.0

    def up_to(self, layer: int) -> float:
        """Return the seconds of the layers up to and including `layer`."""
        return sum(spent for reached, spent in self.layers.items() if reached <= layer)

    def full_model(self) -> float:
        """Return the seconds of the full model: all layers and its head."""
        return sum(self.layers.values()) + self.full_head


class ExitBatch:
    """A full pass over one batch that keeps its states at the exit layers for operating points."""

    def __init__(
        self,
        layers: SkippingLayers,
        ids: Tensor,
        exits: dict[int, Exit],
        rules: dict[int, list[ExitRule]],
        seed: int,
    ) -> None:
        self.layers, self.stack, self.rules, self.exits = layers, layers.stack, rules, exits
        self.chunk = make_chunk(self.stack, ids)
        self.clock, self.seconds = Clock(self.stack.device), BatchSeconds()
        self.seed = seed
        cache = layers.new_cache(*self.chunk.ids.shape, keep=False)
        cache.window(0, self.chunk.ids.shape[1])
        forward, self.seconds.layers[0] = self.clock.time(
            lambda: ForwardPass(
                layers,
                tuple(self.exits.values()),
                self.chunk,
                cache,
                Counts.of(self.stack.num_layers),
                PassConfig(seed=seed),
            ),
        )
        self.forks: dict[int, ForwardPass] = {}
        for layer in sorted(rules):
            self._run_to(forward, layer)
            self.forks[layer] = forward.fork()
        self._run_to(forward, self.stack.num_layers)
        self.final = forward.hidden
        self._measure()

    def _run_to(self, forward: ForwardPass, layer: int) -> None:
        """Run the layers up to and including `layer`, which may be reached already."""
        _, spent = self.clock.time(lambda: forward.run_layers_to(layer))
        self.seconds.layers[layer] = self.seconds.layers.get(layer, 0.0) + spent

    def _measure(self) -> None:
        """Compare the head and rules of every exit layer with the full model, token by token."""
        shape = tuple(self.chunk.ids.shape)
        following = torch.cat([self.chunk.ids[:, 1:], self.chunk.ids[:, :1]], dim=1)
        self.table = ExitTable(full_log_probability=np.zeros(shape, dtype=np.float32))
        self.full_prediction = torch.zeros_like(self.chunk.ids)
        everything = torch.ones_like(self.chunk.valid)
        rows, columns = torch.nonzero(everything, as_tuple=True)
        #: Full log-probabilities `[B * T, V]`, for the points' divergence.
        self.full_logs = torch.empty(
            (rows.numel(), self.stack.vocab_size), device=self.stack.device
        )

        def take(_: int, some_rows: Tensor, some_columns: Tensor, logits: Tensor) -> None:
            flat = some_rows * shape[1] + some_columns
            self.full_logs[flat] = logits.log_softmax(dim=-1)
            self.full_prediction[some_rows, some_columns] = logits.argmax(dim=-1)

        _, self.seconds.full_head = self.clock.time(
            lambda: decode_tokens(
                self.layers,
                self.final,
                everything,
                Counts.of(self.stack.num_layers),
                self.clock.aside(take),
            ),
        )
        target = following.flatten()[:, None]
        chosen = self.full_logs.gather(1, target).reshape(shape)
        self.table.full_log_probability = without_last(chosen)
        earlier: list[Tensor] = []
        for layer, fork in self.forks.items():
            earlier.append(self._measure_layer(layer, fork, rows, columns, target, earlier))

    def _measure_layer(
        self,
        layer: int,
        fork: ForwardPass,
        rows: Tensor,
        columns: Tensor,
        target: Tensor,
        earlier: list[Tensor],
    ) -> Tensor:
        shape = tuple(self.chunk.ids.shape)
        count = rows.numel()
        agrees = torch.zeros(count, dtype=torch.bool, device=rows.device)
        log_probability = torch.zeros(count, device=rows.device)
        divergence = torch.zeros(count, device=rows.device)
        prediction = torch.zeros_like(rows)
        confidence = {
            rule.name: torch.zeros(count, device=rows.device) for rule in self.rules[layer]
        }
        for some in slices(count, self.stack.max_positions):
            point = fork.exit_point(self.exits[layer], rows[some], columns[some])
            point.earlier = [before[some] for before in earlier]
            point.full_prediction = self.full_prediction[rows[some], columns[some]]
            logits, spent = self.clock.time(functools.partial(getattr, point, "logits"))
            self.seconds.heads[layer] += spent
            # As in a forward pass: amax propagates NaN, and -inf only excludes a token.
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise not_finite(f"the logits of exit layer {layer} are not finite")
            for rule in self.rules[layer]:
                confidence[rule.name][some], spent = self.clock.time(
                    functools.partial(rule.confidence, point.with_computed_logits())
                )
                self.seconds.rules[layer, rule.name] += spent
            logs = point.log_probabilities
            prediction[some] = point.prediction
            agrees[some] = point.prediction == point.full_prediction
            log_probability[some] = logs.gather(1, target[some])[:, 0]
            divergence[some] = kl_divergence(self.full_logs[some], logs)
        for name, values in confidence.items():
            if torch.isnan(values).any():
                raise not_finite(
                    f"the rule {name} is NaN at exit layer {layer}, because states or logits are "
                    "not finite"
                )
            self.table.confidence[layer, name] = values.reshape(shape).cpu().numpy()
        self.table.agrees[layer] = agrees.reshape(shape).cpu().numpy()
        self.table.head_log_probability[layer] = without_last(log_probability.reshape(shape))
        self.table.divergence[layer] = divergence.reshape(shape).cpu().numpy()
        return prediction


def without_last(values: Tensor) -> Array:
    """Return log-probabilities `[B, T]` with NaN at the last token, which has no next token."""
    known: Array = values.cpu().numpy()
    known[:, -1] = np.nan
    return known


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """Return KL(full || other) per row, in nats, from log-probabilities `[n, V]`."""
    # The difference is 0 if both are -inf, and the maximum if only the other is.
    difference = (full - other).nan_to_num(nan=0.0, neginf=0.0, posinf=MAX_NATS)
    return (full.exp() * difference).sum(dim=-1)
