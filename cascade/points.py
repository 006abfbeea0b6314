"""Points: ways to exit early, each measured against the full model on the same tokens."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade.corpora import TokenBlocks
from cascade.costs import flops, full_flops
from cascade.early_exit import Propagation, make_chunk, make_exit
from cascade.errors import CorpusError, ModelError, UsageError
from cascade.exits import RULES, ExitPoint, ExitRule
from cascade.heads import FittedHeads
from cascade.models import DecoderStack
from cascade.passes import Exit, Pass, decode_tokens, slices
from cascade.skipping import Counts, SkippingLayers

Array = npt.NDArray[Any]

_RESAMPLES = 999
INTERVAL = "95 % percentile bootstrap, 999 resamples of whole sequences (of batches for seconds)"


@dataclass(frozen=True)
class Point:
    """One way to exit early: a layer, a rule and a threshold.

    Attributes:
        layer: The exit layer.
        rule: The rule's name.
        threshold: From which confidence on tokens leave.
        source: Where the threshold comes from, e.g. "hard ratio 0.3".
    """

    layer: int
    rule: str
    threshold: float
    source: str


@dataclass
class ExitTable:
    """What every token would do at every exit layer; nothing was skipped to learn it.

    Attributes:
        confidence: (layer, rule) -> `[S, T]` fp32.
        agrees: layer -> `[S, T]`, whether the exit head predicts what the full model does.
        head_log_probability: layer -> `[S, T]`, of the token that came next; NaN at the last.
        full_log_probability: `[S, T]`, the full model's.
        divergence: layer -> `[S, T]`, KL(full || exit head), in nats.
        seconds: What the parts of the pass took, by name, one entry per batch.
    """

    confidence: dict[tuple[int, str], Array] = field(default_factory=dict)
    agrees: dict[int, Array] = field(default_factory=dict)
    head_log_probability: dict[int, Array] = field(default_factory=dict)
    full_log_probability: Array = field(default_factory=lambda: np.zeros((0, 0)))
    divergence: dict[int, Array] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


class _Clock:
    """Adds up seconds by name, leaving out what is done inside `aside`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._aside = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
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


class _Batch:
    """One batch through the full model, its states at the exit layers kept for the points."""

    def __init__(
        self,
        layers: SkippingLayers,
        ids: Tensor,
        heads: FittedHeads | None,
        rules: dict[int, list[ExitRule]],
        propagation: Propagation,
        seed: int,
    ) -> None:
        self.layers, self.stack, self.rules = layers, layers.stack, rules
        self.chunk = make_chunk(self.stack, ids)
        self.clock = _Clock(self.stack.device)
        self.seed = seed
        cache = layers.new_cache(*self.chunk.ids.shape, keep=False)
        cache.window(0, self.chunk.ids.shape[1])
        # The widest rule of a layer decides how many entries before it are kept.
        self.exits = {
            layer: make_exit(
                self.stack,
                layer,
                max(found, key=lambda rule: rule.entries),
                math.inf,
                heads=heads,
                propagation=propagation,
            )
            for layer, found in rules.items()
        }
        going = self.clock.time(
            "layers to 0",
            lambda: Pass(
                layers,
                tuple(self.exits.values()),
                self.chunk,
                cache,
                Counts.of(self.stack.num_layers),
                seed=seed,
            ),
        )
        self.forks: dict[int, Pass] = {}
        for layer in sorted(rules):
            self.clock.time(f"layers to {layer}", functools.partial(going.climb, layer))
            self.forks[layer] = going.fork()
        last = self.stack.num_layers
        self.clock.time(f"layers to {last}", lambda: going.climb(last))
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
        self.table.full_log_probability = chosen.cpu().numpy()
        earlier: list[Tensor] = []
        for layer, fork in self.forks.items():
            earlier.append(self._measure_layer(layer, fork, rows, columns, target, earlier))

    def _measure_layer(
        self,
        layer: int,
        fork: Pass,
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
            point = fork.point(self.exits[layer], rows[some], columns[some])
            point.earlier = [before[some] for before in earlier]
            point.full_prediction = self.full_prediction[rows[some], columns[some]]
            self.clock.time(f"head {layer}", functools.partial(getattr, point, "logits"))
            for rule in self.rules[layer]:
                confidence[rule.name][some] = self.clock.time(
                    f"rule {layer} {rule.name}",
                    functools.partial(rule.confidence, _with_logits(point)),
                )
            logs = point.log_probabilities
            prediction[some] = point.prediction
            agrees[some] = point.prediction == point.full_prediction
            log_probability[some] = logs.gather(1, target[some])[:, 0]
            divergence[some] = _divergence(self.full_logs[some], logs)
        for name, values in confidence.items():
            if torch.isnan(values).any():
                raise ModelError(
                    f"the rule {name} is NaN at exit layer {layer}: the states or logits there are"
                    " not finite; use a wider --dtype, or get the checkpoint again"
                )
            self.table.confidence[layer, name] = values.reshape(shape).cpu().numpy()
        self.table.agrees[layer] = agrees.reshape(shape).cpu().numpy()
        self.table.head_log_probability[layer] = log_probability.reshape(shape).cpu().numpy()
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


def _divergence(full: Tensor, other: Tensor) -> Tensor:
    """Return KL(full || other) per row, in nats, from log-probabilities `[n, V]`."""
    difference = (full - other).nan_to_num(nan=0.0, neginf=0.0)  # where both are minus infinity
    return (full.exp() * difference).sum(dim=-1)


@dataclass
class _Tally:
    """Sums of one point, sequence by sequence, and its cost."""

    nll: list[Array] = field(default_factory=list)
    hard_nll: list[Array] = field(default_factory=list)
    full_hard_nll: list[Array] = field(default_factory=list)
    hard_scored: list[Array] = field(default_factory=list)
    agreement: list[Array] = field(default_factory=list)
    exit_agreement: list[Array] = field(default_factory=list)
    exits: list[Array] = field(default_factory=list)
    divergence: list[Array] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    layer_rows: int = 0

    def sums(self, name: str) -> Array:
        values: Array = np.concatenate(getattr(self, name))
        return values


class Evaluator:
    """Runs batches through the full model once, and through every point's own upper part.

    Args:
        stack: The model.
        rules: Exit layer -> the rules' names.
        heads: Fitted heads; the logit lens where not given.
        propagation: "frozen", "ridge" or "exact".
        seed: For rules that draw.

    Raises:
        UsageError: A layer, rule or propagation that cannot be.
        ModelError: The heads belong to another model.
    """

    def __init__(
        self,
        stack: DecoderStack,
        rules: Mapping[int, Sequence[str]],
        *,
        heads: FittedHeads | None = None,
        propagation: Propagation = "frozen",
        seed: int = 0,
    ) -> None:
        if heads is not None:
            heads.check(stack)
        unknown = sorted({name for names in rules.values() for name in names} - RULES.keys())
        if unknown:
            raise UsageError(f"expected rules among {', '.join(RULES)}, got {', '.join(unknown)}")
        self.stack, self.heads, self.propagation = stack, heads, propagation
        self.rules = {layer: [RULES[name] for name in rules[layer]] for layer in sorted(rules)}
        self.layers = SkippingLayers(stack)
        self.seed = seed

    def _exit(self, point: Point) -> Exit:
        return make_exit(
            self.stack,
            point.layer,
            point.rule,
            point.threshold,
            heads=self.heads,
            propagation=self.propagation,
        )

    @torch.no_grad()
    def _batches(
        self, blocks: TokenBlocks, batch_size: int, progress: Callable[[int], None] | None
    ) -> Iterator[_Batch]:
        for ids, _ in blocks.batches(batch_size):
            tensor = torch.from_numpy(ids).long().to(self.stack.device)
            yield _Batch(self.layers, tensor, self.heads, self.rules, self.propagation, self.seed)
            if progress is not None:
                progress(ids.size)

    @torch.no_grad()
    def table(
        self,
        blocks: TokenBlocks,
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> ExitTable:
        """Learn what every token would do at every exit layer.

        Args:
            blocks: The corpus.
            batch_size: Sequences per forward pass; each holds T x V full log-probabilities.
            progress: Called with the number of tokens done since the last call.
        """
        parts = [batch.table for batch in self._batches(blocks, batch_size, progress)]
        return _joined(parts)

    @torch.no_grad()
    def run(
        self,
        blocks: TokenBlocks,
        points: Sequence[Point],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[dict[str, Any]], ExitTable]:
        """Measure points: quality, counted operations, and seconds, each against the full model.

        Args:
            blocks: The corpus.
            points: What to measure; their layers and rules are among the evaluator's.
            batch_size: Sequences per forward pass.
            progress: Called with the number of tokens done since the last call.

        Returns:
            One row per point, and the table that the pass gives besides.
        """
        for point in points:
            RULES[point.rule].check(point.threshold)
        tallies = [_Tally() for _ in points]
        full_seconds: list[float] = []
        tables = []
        for batch in self._batches(blocks, batch_size, progress):
            full_seconds.append(batch.full_seconds())
            tables.append(batch.table)
            for point, tally in zip(points, tallies, strict=True):
                self._measure(batch, point, tally)
        table = _joined(tables)
        full = _Full(table, full_seconds, full_flops(self.stack, *blocks.ids.shape))
        rows = [self._row(point, tally, full) for point, tally in zip(points, tallies, strict=True)]
        return rows, table

    @torch.no_grad()
    def losses(
        self,
        blocks: TokenBlocks,
        points: Sequence[Point],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> Array:
        """Return each sequence's loss at each point, `[points, S]`.

        The loss is the share of a sequence's tokens after which the prediction is not the full
        model's (textual consistency: Schuster et al. 2022, section 4.1, token by token).

        Args:
            blocks: The corpus.
            points: Ways to exit.
            batch_size: Sequences per forward pass.
            progress: Called with the number of tokens done since the last call.
        """
        tallies = [_Tally() for _ in points]
        for batch in self._batches(blocks, batch_size, progress):
            for point, tally in zip(points, tallies, strict=True):
                self._measure(batch, point, tally)
        length = blocks.ids.shape[1]
        return np.stack([1 - tally.sums("agreement") / length for tally in tallies])

    def _measure(self, batch: _Batch, point: Point, tally: _Tally) -> None:
        shape = tuple(batch.chunk.ids.shape)
        table, clock = batch.table, batch.clock
        way_out = self._exit(point)
        confidence = table.confidence[point.layer, point.rule]
        leaves = confidence >= np.float32(point.threshold)
        log_probability = np.where(
            leaves, table.head_log_probability[point.layer], table.full_log_probability
        )
        agrees = leaves & table.agrees[point.layer] | ~leaves
        divergence = np.where(leaves, table.divergence[point.layer], 0.0)
        counts = Counts.of(self.stack.num_layers)
        if self.propagation != "exact":
            going = batch.forks[point.layer].fork()
            going.counts = counts
            mask = torch.from_numpy(leaves).to(batch.stack.device)
            name = f"upper {point}"
            clock.time(name, lambda: going.take_out(way_out, mask))
            following = torch.cat([batch.chunk.ids[:, 1:], batch.chunk.ids[:, :1]], dim=1)

            def take(_: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
                logs = logits.log_softmax(dim=-1)
                place = rows.cpu().numpy(), columns.cpu().numpy()
                target = following[rows, columns][:, None]
                log_probability[place] = logs.gather(1, target)[:, 0].cpu().numpy()
                full = batch.full_prediction[rows, columns]
                agrees[place] = (logs.argmax(dim=-1) == full).cpu().numpy()
                reference = batch.full_logs[rows * shape[1] + columns]
                divergence[place] = _divergence(reference, logs).cpu().numpy()

            clock.time(name, lambda: going.finish(batch.chunk.valid, clock.aside(take)))
            upper = clock.seconds.pop(name)
        else:
            rest = [self.stack.num_layers]
            upper = batch.full_seconds() - batch.lower_seconds(point.layer)
            for layer in range(point.layer + 1, rest[0] + 1):
                counts.layer_rows[layer - 1] += leaves.size
                counts.pairs[layer - 1] += leaves.size * shape[1]
            counts.lm_head_rows += int((~leaves).sum())
        self._count(batch, point, way_out, counts, int(leaves.sum()))
        tally.seconds.append(
            batch.lower_seconds(point.layer) + self._deciding_seconds(batch, point, leaves) + upper
        )
        tally.flops += flops(
            self.stack,
            counts,
            map_width=self.heads.width if self.heads else 0,
            head_size=way_out.head.multiplications,
        )
        tally.layer_rows += sum(counts.layer_rows)
        scored = np.ones(shape, dtype=bool)
        scored[:, -1] = False
        hard = scored & ~leaves
        full_log_probability = table.full_log_probability
        tally.nll.append(-np.where(scored, log_probability, 0).sum(axis=1))
        tally.hard_nll.append(-np.where(hard, log_probability, 0).sum(axis=1))
        tally.full_hard_nll.append(-np.where(hard, full_log_probability, 0).sum(axis=1))
        tally.hard_scored.append(hard.sum(axis=1))
        tally.agreement.append(agrees.sum(axis=1))
        tally.exit_agreement.append((agrees & leaves).sum(axis=1))
        tally.exits.append(leaves.sum(axis=1))
        tally.divergence.append(divergence.sum(axis=1))

    def _count(
        self, batch: _Batch, point: Point, way_out: Exit, counts: Counts, exited: int
    ) -> None:
        """Add what lies below the exit, and its probing, to the counts of what lies above."""
        rows, length = batch.chunk.ids.numel(), batch.chunk.ids.shape[1]
        for layer in range(1, point.layer + 1):
            counts.layer_rows[layer - 1] += rows
            counts.pairs[layer - 1] += rows * length
        probed = rows if way_out.rule.needs_logits else exited
        counts.lm_head_rows += probed
        if way_out.head.multiplications:
            counts.head_rows[point.layer] = probed

    def _deciding_seconds(self, batch: _Batch, point: Point, leaves: Array) -> float:
        seconds = batch.clock.seconds
        head = seconds[f"head {point.layer}"]
        if not RULES[point.rule].needs_logits:
            head *= float(leaves.mean())
        return head + seconds[f"rule {point.layer} {point.rule}"]

    def _row(self, point: Point, tally: _Tally, full: _Full) -> dict[str, Any]:
        tokens = full.table.full_log_probability.size
        scored = tokens - len(full.table.full_log_probability)
        exits = tally.sums("exits")
        hard_scored = tally.sums("hard_scored")
        perplexity = math.exp(tally.sums("nll").sum() / scored)
        ratios = _resampled_ratio(tally.sums("nll") - full.nll, scored, self.seed)
        length = full.table.full_log_probability.shape[1]
        agreement = tally.sums("agreement") / length
        head = self._exit(point).head.name
        return {
            "exit_layer": point.layer,
            "rule": point.rule,
            "head": head,
            "threshold": float(point.threshold),
            "threshold_from": point.source,
            "exit_share": float(exits.sum() / tokens),
            "agreement": float(agreement.mean()),
            "agreement_interval": _mean_interval(agreement, self.seed),
            "exit_agreement": _ratio_of(tally.sums("exit_agreement"), exits),
            "perplexity": perplexity,
            "perplexity_ratio": perplexity / full.perplexity,
            "perplexity_ratio_interval": ratios,
            "hard_perplexity_ratio": _exp(
                _ratio_of(tally.sums("hard_nll") - tally.sums("full_hard_nll"), hard_scored)
            ),
            "kl": float(tally.sums("divergence").sum() / tokens),
            "layers_per_token": tally.layer_rows / tokens,
            "flops_ratio": tally.flops / full.flops,
            "seconds_ratio": sum(tally.seconds) / sum(full.seconds),
            "seconds_ratio_interval": _seconds_interval(tally.seconds, full.seconds, self.seed),
        }


class _Full:
    """The full model's own figures."""

    def __init__(self, table: ExitTable, seconds: list[float], operations: float) -> None:
        self.table, self.seconds, self.flops = table, seconds, operations
        self.nll = -table.full_log_probability[:, :-1].sum(axis=1, dtype=np.float64)
        scored = table.full_log_probability[:, :-1].size
        self.perplexity = math.exp(self.nll.sum() / scored)


def _joined(parts: Sequence[ExitTable]) -> ExitTable:
    if not parts:
        raise CorpusError("expected at least one sequence to evaluate on, got none")

    def join(name: str) -> dict[Any, Array]:
        return {
            key: np.concatenate([getattr(part, name)[key] for part in parts])
            for key in getattr(parts[0], name)
        }

    return ExitTable(
        join("confidence"),
        join("agrees"),
        join("head_log_probability"),
        np.concatenate([part.full_log_probability for part in parts]),
        join("divergence"),
    )


def _ratio_of(part: Array, whole: Array) -> float | None:
    total = float(whole.sum())
    return float(part.sum()) / total if total else None


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)


def _draws(count: int, seed: int) -> Array:
    draws: Array = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))
    return draws


def _interval(values: Array) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]


def _mean_interval(values: Array, seed: int) -> list[float]:
    return _interval(values[_draws(len(values), seed)].mean(axis=1))


def _resampled_ratio(difference: Array, scored: int, seed: int) -> list[float]:
    per_token = difference * (len(difference) / scored)
    return _interval(np.exp(per_token[_draws(len(per_token), seed)].mean(axis=1)))


def _seconds_interval(seconds: list[float], full: list[float], seed: int) -> list[float] | None:
    if len(seconds) < 2:
        return None
    draws = _draws(len(seconds), seed)
    return _interval(np.array(seconds)[draws].sum(axis=1) / np.array(full)[draws].sum(axis=1))
