"""Operating points: exit layer, rule and threshold, measured against the full model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import PROPAGATIONS, Propagation, make_exit
from cascade.decoding.selective_layers import SkippingLayers
from cascade.evaluation.exit_table import ExitBatch, ExitTable, kl_divergence
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import Counts, flops, full_flops
from cascade.models.stack import DecoderStack
from cascade.stats.decision import reaches
from cascade.stats.perplexity import perplexity, perplexity_ratio_interval
from cascade.stats.resampling import mean_interval

INTERVAL = (
    "95 %: percentile bootstrap, 999 resamples of whole sequences; for seconds Student's t over "
    "batches, whose number is too small to resample"
)


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

    A rule that looks at earlier exit layers (patience) sees every layer of `rules` below its own,
    and pays for their heads: as `EarlyExit` with exits at those layers that let nothing leave.

    Raises:
        UsageError: A layer, rule or propagation that cannot be, or no head was fitted for a layer.
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
        if propagation not in PROPAGATIONS:
            raise UsageError(
                f"expected a propagation among {', '.join(PROPAGATIONS)}, got {propagation!r}"
            )
        if propagation == "ridge" and heads is None:
            raise UsageError(
                "ridge propagation needs fitted heads; make them with `cascade fit-heads`"
            )
        if not rules or not all(rules.values()):
            raise UsageError("expected at least one exit layer, and a rule for each; name them")
        self.stack, self.heads, self.propagation = stack, heads, propagation
        self.rules = {layer: [find_rule(name) for name in rules[layer]] for layer in sorted(rules)}
        # The widest rule of a layer decides how many entries before it are kept.
        self.exits = {
            layer: make_exit(
                stack,
                layer,
                max(found, key=lambda rule: rule.entries),
                math.inf,
                heads=heads,
                propagation=propagation,
            )
            for layer, found in self.rules.items()
        }
        self.layers = SkippingLayers(stack)
        self.seed = seed

    def check(self, points: Sequence[Point]) -> None:
        """Refuse points that cannot be measured.

        Args:
            points: Ways to exit.

        Raises:
            UsageError: A threshold outside its rule's range, or a layer or rule that is not among
                the evaluator's.
        """
        for point in points:
            rule = find_rule(point.rule)
            check_layers({point.layer: rule}, self.stack.num_layers)
            rule.check(point.threshold)
            if rule not in self.rules.get(point.layer, ()):
                raise UsageError(
                    f"layer {point.layer} with the rule {point.rule} is not measured here; expected"
                    f" layers among {', '.join(map(str, self.rules))}, with their own rules"
                )

    @torch.no_grad()
    def _batches(
        self, blocks: TokenBlocks, batch_size: int, progress: Callable[[int], None] | None
    ) -> Iterator[ExitBatch]:
        if not len(blocks.ids):
            raise CorpusError("expected at least one sequence to evaluate on, got none")
        check_blocks(self.stack, blocks, batch_size)
        if blocks.ids.shape[1] < 2:
            raise CorpusError(
                "expected sequences of at least 2 tokens, got 1: nothing comes next to score; take "
                "a larger --seq-len"
            )
        for ids, _ in blocks.batches(batch_size):
            tensor = torch.from_numpy(ids).long().to(self.stack.device)
            yield ExitBatch(self.layers, tensor, self.exits, self.rules, self.seed)
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
        self.check(points)
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
        self.check(points)
        tallies = [_Tally() for _ in points]
        for batch in self._batches(blocks, batch_size, progress):
            for point, tally in zip(points, tallies, strict=True):
                self._measure(batch, point, tally)
        length = blocks.ids.shape[1]
        return np.stack([1 - tally.sums("agreement") / length for tally in tallies])

    def _measure(self, batch: ExitBatch, point: Point, tally: _Tally) -> None:
        shape = tuple(batch.chunk.ids.shape)
        table, clock = batch.table, batch.clock
        way_out = self.exits[point.layer]
        leaves = reaches(table.confidence[point.layer, point.rule], point.threshold)
        log_probability = np.where(
            leaves, table.head_log_probability[point.layer], table.full_log_probability
        )
        agrees = leaves & table.agrees[point.layer] | ~leaves
        divergence = np.where(leaves, table.divergence[point.layer], 0.0)
        counts = Counts.of(self.stack.num_layers)
        if self.propagation != "exact":
            going = batch.forks[point.layer].fork(counts)
            mask = torch.from_numpy(leaves).to(batch.stack.device)
            name = f"upper {point}"
            clock.time(name, lambda: going.exit_tokens(way_out, mask))
            following = torch.cat([batch.chunk.ids[:, 1:], batch.chunk.ids[:, :1]], dim=1)

            def take(_: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
                logs = logits.log_softmax(dim=-1)
                place = rows.cpu().numpy(), columns.cpu().numpy()
                target = following[rows, columns][:, None]
                log_probability[place] = logs.gather(1, target)[:, 0].cpu().numpy()
                full = batch.full_prediction[rows, columns]
                agrees[place] = (logs.argmax(dim=-1) == full).cpu().numpy()
                reference = batch.full_logs[rows * shape[1] + columns]
                divergence[place] = kl_divergence(reference, logs).cpu().numpy()

            clock.time(name, lambda: going.finish(batch.chunk.valid, clock.aside(take)))
            upper = clock.seconds.pop(name)
        else:
            last = self.stack.num_layers
            upper = batch.lower_seconds(last) - batch.lower_seconds(point.layer)
            upper += clock.seconds["full head"] * float((~leaves).mean())
            for layer in range(point.layer + 1, last + 1):
                counts.layer_rows[layer - 1] += leaves.size
                counts.pairs[layer - 1] += leaves.size * shape[1]
            counts.lm_head_rows += int((~leaves).sum())
        self._count(batch, point, counts, int(leaves.sum()))
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
        tally.nll.append(-_sum(log_probability, scored))
        tally.hard_nll.append(-_sum(log_probability, hard))
        tally.full_hard_nll.append(-_sum(full_log_probability, hard))
        tally.hard_scored.append(hard.sum(axis=1))
        tally.agreement.append(agrees.sum(axis=1))
        tally.exit_agreement.append((agrees & leaves).sum(axis=1))
        tally.exits.append(leaves.sum(axis=1))
        tally.divergence.append(divergence.sum(axis=1, dtype=np.float64))

    def _count(self, batch: ExitBatch, point: Point, counts: Counts, exited: int) -> None:
        """Add what lies below the exit, and its probing, to the counts of what lies above."""
        rows, length = batch.chunk.ids.numel(), batch.chunk.ids.shape[1]
        for layer in range(1, point.layer + 1):
            counts.layer_rows[layer - 1] += rows
            counts.pairs[layer - 1] += rows * length
        probed = dict.fromkeys(self._looked_at(point), rows)
        if not find_rule(point.rule).needs_logits:
            probed[point.layer] = exited
        for layer, count in probed.items():
            counts.lm_head_rows += count
            if self.exits[layer].head.multiplications:
                counts.head_rows[layer] = count

    def _looked_at(self, point: Point) -> list[int]:
        """Return the exit layers whose heads have to run for a point."""
        if not find_rule(point.rule).needs_earlier:
            return [point.layer]
        return [layer for layer in self.rules if layer <= point.layer]

    def _deciding_seconds(self, batch: ExitBatch, point: Point, leaves: Array) -> float:
        seconds = batch.clock.seconds
        heads = sum(seconds[f"head {layer}"] for layer in self._looked_at(point))
        if not find_rule(point.rule).needs_logits:
            heads *= float(leaves.mean())
        return heads + seconds[f"rule {point.layer} {point.rule}"]

    def _row(self, point: Point, tally: _Tally, full: _Full) -> dict[str, Any]:
        tokens = full.table.full_log_probability.size
        scored = tokens - len(full.table.full_log_probability)
        exits = tally.sums("exits")
        hard_scored = tally.sums("hard_scored")
        more = tally.sums("nll") - full.nll
        hard_more = _ratio_of(tally.sums("hard_nll") - tally.sums("full_hard_nll"), hard_scored)
        length = full.table.full_log_probability.shape[1]
        agreed = tally.sums("agreement")
        return {
            "exit_layer": point.layer,
            "rule": point.rule,
            "head": self.exits[point.layer].head.name,
            "threshold": float(point.threshold),
            "threshold_from": point.source,
            "exit_share": float(exits.sum() / tokens),
            "agreement": float(agreed.sum() / tokens),
            "agreement_interval": mean_interval(agreed / length, self.seed),
            "exit_agreement": _ratio_of(tally.sums("exit_agreement"), exits),
            "perplexity": perplexity(tally.sums("nll").sum() / scored),
            "perplexity_ratio": perplexity(more.sum() / scored),
            "perplexity_ratio_interval": perplexity_ratio_interval(more, scored, self.seed),
            "hard_perplexity_ratio": None if hard_more is None else perplexity(hard_more),
            "kl": float(tally.sums("divergence").sum() / tokens),
            "layers_per_token": tally.layer_rows / tokens,
            "flops_ratio": tally.flops / full.flops,
            "seconds_ratio": sum(tally.seconds) / sum(full.seconds),
            "seconds_ratio_interval": _seconds_interval(tally.seconds, full.seconds),
        }


class _Full:
    """The full model's own figures."""

    def __init__(self, table: ExitTable, seconds: list[float], operations: float) -> None:
        self.table, self.seconds, self.flops = table, seconds, operations
        self.nll = -table.full_log_probability[:, :-1].sum(axis=1, dtype=np.float64)
        if not np.isfinite(self.nll).all():
            raise ModelError(
                f"the full model gives a token of sequence {int(np.isfinite(self.nll).argmin())} no"
                " probability at all: there is no perplexity to compare with; use a wider --dtype,"
                " or leave that text out"
            )


def _joined(parts: Sequence[ExitTable]) -> ExitTable:
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


def _sum(values: Array, where: Array) -> Array:
    """Return the sums of `[B, T]` over the chosen tokens of each sequence, in double precision."""
    sums: Array = np.where(where, values, 0).sum(axis=1, dtype=np.float64)
    return sums


def _seconds_interval(seconds: list[float], full: list[float]) -> list[float] | None:
    """Return an interval of a ratio of sums over few batches (Cochran 1977, section 6.3).

    Resampled batches would cover the true ratio 79 % of the time where there are 4, half of it
    where there are 2 (3,000 simulations each); this covers it 95 % of the time.
    """
    from scipy.stats import t

    count = len(seconds)
    if count < 2:
        return None
    point, whole = np.array(seconds), np.array(full)
    ratio = point.sum() / whole.sum()
    spread = math.sqrt(((point - ratio * whole) ** 2).sum() / (count * (count - 1)))
    half = float(t.ppf(0.975, count - 1)) * spread / whole.mean()
    return [max(0.0, float(ratio - half)), float(ratio + half)]
