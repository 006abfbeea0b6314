"""The exit table: what every token would do at every exit layer, from one full pass."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import ModelError
from cascade.decoding.forward import Exit, ForwardPass, PassConfig, decode_tokens, slices
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.exits.rules import ExitPoint, ExitRule
from cascade.models.flops import Counts
from cascade.stats.perplexity import MOST_NATS


@dataclass
class ExitTable:
    """What every token would do at every exit layer; nothing was skipped to learn it.

    Attributes:
        confidence: (layer, rule) -> `[S, T]` fp32.
        agrees: layer -> `[S, T]`, whether the exit head predicts what the full model does.
        head_log_probability: layer -> `[S, T]`, of the token that came next; NaN at the last.
        full_log_probability: `[S, T]`, the full model's; NaN at the last.
        divergence: layer -> `[S, T]`, KL(full || exit head), in nats.
    """

    confidence: dict[tuple[int, str], Array] = field(default_factory=dict)
    agrees: dict[int, Array] = field(default_factory=dict)
    head_log_probability: dict[int, Array] = field(default_factory=dict)
    full_log_probability: Array = field(default_factory=lambda: np.zeros((0, 0)))
    divergence: dict[int, Array] = field(default_factory=dict)


class Clock:
    """Adds up seconds by name, leaving out what is done inside `aside`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._aside = 0.0

    def now(self) -> float:
        """Return the time in seconds, once the device has finished."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` and add its seconds to `name`."""
        aside, start = self._aside, self.now()
        result = work()
        spent = self.now() - start - (self._aside - aside)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return result

    def aside(self, work: Callable[..., None]) -> Callable[..., None]:
        """Return `work`, its time not counted to whatever runs it."""

        def run(*args: Any) -> None:
            start = self.now()
            work(*args)
            self._aside += self.now() - start

        return run


class ExitBatch:
    """One batch through the full model, its states at the exit layers kept for the points."""

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
        self.clock = Clock(self.stack.device)
        self.seed = seed
        cache = layers.new_cache(*self.chunk.ids.shape, keep=False)
        cache.window(0, self.chunk.ids.shape[1])
        going = self.clock.time(
            "layers to 0",
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
            self.clock.time(f"layers to {layer}", functools.partial(going.run_layers_to, layer))
            self.forks[layer] = going.fork()
        last = self.stack.num_layers
        self.clock.time(f"layers to {last}", lambda: going.run_layers_to(last))
        self.final = going.hidden
        self._measure()

    def _measure(self) -> None:
        """Compare every exit layer's head and rules with the full model, token by token."""
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

        self.clock.time(
            "full head",
            lambda: decode_tokens(
                self.stack,
                self.final,
                everything,
                Counts.of(self.stack.num_layers),
                self.clock.aside(take),
            ),
        )
        target = following.flatten()[:, None]
        chosen = self.full_logs.gather(1, target).reshape(shape)
        self.table.full_log_probability = but_the_last(chosen)
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
            logits = self.clock.time(f"head {layer}", functools.partial(getattr, point, "logits"))
            # As in a pass: NaN is larger than any number, and -inf rules single tokens out.
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise ModelError(
                    f"the logits of exit layer {layer} are not finite; use a wider --dtype, or get"
                    " the checkpoint again"
                )
            for rule in self.rules[layer]:
                confidence[rule.name][some] = self.clock.time(
                    f"rule {layer} {rule.name}",
                    functools.partial(rule.confidence, _with_logits(point)),
                )
            logs = point.log_probabilities
            prediction[some] = point.prediction
            agrees[some] = point.prediction == point.full_prediction
            log_probability[some] = logs.gather(1, target[some])[:, 0]
            divergence[some] = kl_divergence(self.full_logs[some], logs)
        for name, values in confidence.items():
            if torch.isnan(values).any():
                raise ModelError(
                    f"the rule {name} is NaN at exit layer {layer}: the states or logits there are"
                    " not finite; use a wider --dtype, or get the checkpoint again"
                )
            self.table.confidence[layer, name] = values.reshape(shape).cpu().numpy()
        self.table.agrees[layer] = agrees.reshape(shape).cpu().numpy()
        self.table.head_log_probability[layer] = but_the_last(log_probability.reshape(shape))
        self.table.divergence[layer] = divergence.reshape(shape).cpu().numpy()
        return prediction

    def full_seconds(self) -> float:
        """Return the seconds of the full model: all layers and its head."""
        return self.lower_seconds(self.stack.num_layers) + self.clock.seconds["full head"]

    def lower_seconds(self, layer: int) -> float:
        """Return the seconds of the layers up to and including `layer`."""
        return sum(
            spent
            for name, spent in self.clock.seconds.items()
            if name.startswith("layers to ") and int(name.rpartition(" ")[2]) <= layer
        )


def but_the_last(values: Tensor) -> Array:
    """Return `[B, T]` log-probabilities, NaN at the last token: nothing comes next."""
    known: Array = values.cpu().numpy()
    known[:, -1] = np.nan
    return known


def _with_logits(point: ExitPoint) -> ExitPoint:
    """Return a point with the logits made, but nothing that a rule makes of them."""
    fresh = ExitPoint(
        point.layer,
        point.history,
        point.compute_logits,
        point.token_ids,
        point.positions,
        point.earlier,
        point.full_prediction,
        point.seed,
    )
    fresh.__dict__["logits"] = point.logits
    return fresh


def kl_divergence(full: Tensor, other: Tensor) -> Tensor:
    """Return KL(full || other) per row, in nats, from log-probabilities `[n, V]`."""
    # Where both are minus infinity there is nothing; where the other alone is, the most.
    difference = (full - other).nan_to_num(nan=0.0, neginf=0.0, posinf=MOST_NATS)
    return (full.exp() * difference).sum(dim=-1)
