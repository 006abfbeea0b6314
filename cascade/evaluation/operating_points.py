"""Operating points (exit layer, rule and threshold), measured against the full model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, ModelError, UsageError
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import PROPAGATIONS, Propagation, make_exit
from cascade.decoding.exit_support import check_exits
from cascade.decoding.selective_layers import SkippingLayers
from cascade.evaluation.exit_table import ExitBatch, ExitTable, kl_divergence
from cascade.evaluation.records import OperatingPointRow
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import Counts, flops, full_flops
from cascade.models.stack import DecoderStack
from cascade.stats.decision import reaches
from cascade.stats.perplexity import perplexity, stored_nats
from cascade.stats.perplexity_intervals import nats_interval, ratio_interval, resampled_nats
from cascade.stats.ratios import student_ratio_interval
from cascade.stats.resampling import mean_interval

INTERVAL = (
    "95 % percentile bootstrap over whole sequences, 999 resamples; for seconds, Student's t over "
    "batches, because there are too few batches to resample"
)


@dataclass(frozen=True)
class OperatingPoint:
    """One setting of early exit: a layer, a rule and a threshold.

    Attributes:
        layer: The exit layer.
        rule: The name of the exit rule.
        threshold: Tokens with a confidence at or above it exit.
        source: The origin of the threshold, e.g. "hard ratio 0.3".
    """

    layer: int
    rule: str
    threshold: float
    source: str


@dataclass
class _Outcome:
    """The results of one batch at one operating point.

    Attributes:
        exits: Whether each token exits, `[B, T]`.
        log_probability: The log-probability of the next token, `[B, T]`; NaN at the last token.
        agrees: Whether the prediction is the full model's, `[B, T]`.
        divergence: KL divergence from the full model's prediction, `[B, T]`, in nats.
        counts: The work that is computed.
        seconds: The duration of this work.
    """

    exits: Array
    log_probability: Array
    agrees: Array
    divergence: Array
    counts: Counts
    seconds: float = 0.0


@dataclass
class _Tally:
    """Sums over tokens of one operating point, one array `[B]` per batch, and its cost."""

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

    def add(self, outcome: _Outcome, full_log_probability: Array, operations: float) -> None:
        """Add a batch.

        Args:
            outcome: The results of the batch.
            full_log_probability: The full model's log-probabilities, `[B, T]`.
            operations: The number of operations of the batch.
        """
        scored = np.ones(outcome.exits.shape, dtype=bool)
        scored[:, -1] = False
        hard = scored & ~outcome.exits
        self.nll.append(-_sum(outcome.log_probability, scored))
        self.hard_nll.append(-_sum(outcome.log_probability, hard))
        self.full_hard_nll.append(-_sum(full_log_probability, hard))
        self.hard_scored.append(hard.sum(axis=1))
        self.agreement.append(outcome.agrees.sum(axis=1))
        self.exit_agreement.append((outcome.agrees & outcome.exits).sum(axis=1))
        self.exits.append(outcome.exits.sum(axis=1))
        self.divergence.append(outcome.divergence.sum(axis=1, dtype=np.float64))
        self.seconds.append(outcome.seconds)
        self.flops += operations
        self.layer_rows += sum(outcome.counts.layer_rows)

    def sums(self, name: str) -> Array:
        """Return the sums of a figure per sequence, `[S]`."""
        values: Array = np.concatenate(getattr(self, name))
        return values


class Evaluator:
    """Measures operating points: one full pass per batch, then the upper layers of each point.

    A rule that needs earlier exit layers (patience) uses every layer of `rules` below its own, and
    the cost of their heads is included. This corresponds to an `EarlyExit` with exits at those
    layers at which no token exits.

    Args:
        stack: The model.
        rules: Exit layer -> names of the rules.
        heads: Fitted heads (default: the logit lens).
        propagation: "frozen", "ridge" or "exact".
        seed: Seed for rules that draw random numbers.

    Raises:
        UsageError: A layer, rule or propagation is invalid, or no head was fitted for a layer.
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
        check_exits(stack, exact=propagation == "exact")
        if propagation == "ridge" and heads is None:
            raise UsageError(
                "ridge propagation needs fitted heads; create them with `cascade fit-heads`"
            )
        if not rules or not all(rules.values()):
            raise UsageError("expected at least one exit layer with a rule, got none; add one")
        self.stack, self.heads, self.propagation = stack, heads, propagation
        self.rules = {layer: [find_rule(name) for name in rules[layer]] for layer in sorted(rules)}
        # The rule that needs most entries decides how many earlier entries are kept.
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

    def check(self, points: Sequence[OperatingPoint]) -> None:
        """Check that operating points can be measured.

        Args:
            points: The operating points.

        Raises:
            UsageError: A threshold is outside its rule's range, or the evaluator does not have the
                layer or the rule.
        """
        for point in points:
            rule = find_rule(point.rule)
            check_layers({point.layer: rule}, self.stack.num_layers)
            rule.check(point.threshold)
            if rule not in self.rules.get(point.layer, ()):
                raise UsageError(
                    f"expected a layer among {', '.join(map(str, self.rules))} with one of its "
                    f"rules, got layer {point.layer} with the rule {point.rule}"
                )

    @torch.no_grad()
    def batches(
        self, blocks: TokenBlocks, batch_size: int, progress: Callable[[int], None] | None
    ) -> Iterator[ExitBatch]:
        """Yield one full pass per batch, with its states at all exit layers.

        Args:
            blocks: The corpus.
            batch_size: Sequences per forward pass.
            progress: Called with the number of tokens processed since the last call.

        Raises:
            CorpusError: There is no sequence, or sequences have a single token.
        """
        if not len(blocks.ids):
            raise CorpusError("expected at least one sequence to evaluate on, got none")
        check_blocks(self.stack, blocks, batch_size)
        if blocks.ids.shape[1] < 2:
            raise CorpusError(
                "expected sequences of at least 2 tokens, got 1, which has no next token to score; "
                "use a larger --seq-len"
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
        """Return confidence and predictions of every token at every exit layer.

        Args:
            blocks: The corpus.
            batch_size: Sequences per forward pass; each needs T x V log-probabilities in memory.
            progress: Called with the number of tokens processed since the last call.
        """
        tables = [batch.table for batch in self.batches(blocks, batch_size, progress)]
        return ExitTable.joined(tables)

    @torch.no_grad()
    def run(
        self,
        blocks: TokenBlocks,
        points: Sequence[OperatingPoint],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[OperatingPointRow], ExitTable]:
        """Return quality, operations and seconds of operating points, against the full model.

        Args:
            blocks: The corpus.
            points: The operating points, with layers and rules of the evaluator.
            batch_size: Sequences per forward pass.
            progress: Called with the number of tokens processed since the last call.

        Returns:
            One row per point, and the exit table of the corpus.
        """
        self.check(points)
        tallies = [_Tally() for _ in points]
        full_seconds: list[float] = []
        tables = []
        for batch in self.batches(blocks, batch_size, progress):
            full_seconds.append(batch.seconds.full_model())
            tables.append(batch.table)
            for point, tally in zip(points, tallies, strict=True):
                self._measure(batch, point, tally)
        table = ExitTable.joined(tables)
        full = _Full(table, full_seconds, full_flops(self.stack, *blocks.ids.shape))
        rows = [self._row(point, tally, full) for point, tally in zip(points, tallies, strict=True)]
        return rows, table

    @torch.no_grad()
    def losses(
        self,
        blocks: TokenBlocks,
        points: Sequence[OperatingPoint],
        *,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
    ) -> Array:
        """Return the loss of each sequence at each operating point, `[points, S]`.

        The loss is the share of a sequence's tokens after which the prediction is not the full
        model's (textual consistency: Schuster et al. 2022, section 4.1, token by token).

        Args:
            blocks: The corpus.
            points: The operating points.
            batch_size: Sequences per forward pass.
            progress: Called with the number of tokens processed since the last call.
        """
        self.check(points)
        tallies = [_Tally() for _ in points]
        for batch in self.batches(blocks, batch_size, progress):
            for point, tally in zip(points, tallies, strict=True):
                self._measure(batch, point, tally)
        length = blocks.ids.shape[1]
        return np.stack([1 - tally.sums("agreement") / length for tally in tallies])

    def _measure(self, batch: ExitBatch, point: OperatingPoint, tally: _Tally) -> None:
        """Measure one batch at one operating point and add it to the sums."""
        outcome = self._below(batch, point)
        if self.propagation == "exact":
            self._above_exactly(batch, point, outcome)
        else:
            self._above_run(batch, point, outcome)
        operations = flops(
            self.stack,
            outcome.counts,
            map_width=self.heads.width if self.heads else 0,
            head_size=self.exits[point.layer].head.multiplications,
        )
        tally.add(outcome, batch.table.full_log_probability, operations)

    def _below(self, batch: ExitBatch, point: OperatingPoint) -> _Outcome:
        """Return the outcome at the exit; continuing tokens get the full model's results."""
        table, layer = batch.table, point.layer
        exits = reaches(table.confidence[layer, point.rule], point.threshold)
        counts = Counts.of(self.stack.num_layers)
        rows, length = exits.size, exits.shape[1]
        for lower in range(layer):
            counts.layer_rows[lower] += rows
            counts.pairs[lower] += rows * length
        probed = dict.fromkeys(self._probed(point), rows)
        if not find_rule(point.rule).needs_logits:
            probed[layer] = int(exits.sum())
        for exit_layer, count in probed.items():
            counts.lm_head_rows += count
            if self.exits[exit_layer].head.multiplications:
                counts.head_rows[exit_layer] = count
        return _Outcome(
            exits,
            np.where(exits, table.head_log_probability[layer], table.full_log_probability),
            exits & table.agrees[layer] | ~exits,
            np.where(exits, table.divergence[layer], 0.0),
            counts,
            batch.seconds.up_to(layer) + self._deciding_seconds(batch, point, exits),
        )

    def _above_run(self, batch: ExitBatch, point: OperatingPoint, outcome: _Outcome) -> None:
        """Run the layers above the exit, and update an outcome with their results.

        The predictions of continuing tokens change, because upper layers use approximate keys and
        values of exited tokens.
        """
        forward = batch.forks[point.layer].fork(Counts.of(self.stack.num_layers))
        mask = torch.from_numpy(outcome.exits).to(batch.stack.device)
        following = torch.cat([batch.chunk.ids[:, 1:], batch.chunk.ids[:, :1]], dim=1)

        def take(_: int, rows: Tensor, columns: Tensor, logits: Tensor) -> None:
            logs = logits.log_softmax(dim=-1)
            place = rows.cpu().numpy(), columns.cpu().numpy()
            target = following[rows, columns][:, None]
            outcome.log_probability[place] = logs.gather(1, target)[:, 0].cpu().numpy()
            full = batch.full_prediction[rows, columns]
            outcome.agrees[place] = (logs.argmax(dim=-1) == full).cpu().numpy()
            reference = batch.full_logs[rows * mask.shape[1] + columns]
            outcome.divergence[place] = kl_divergence(reference, logs).cpu().numpy()

        clock = batch.clock
        _, exiting = clock.time(lambda: forward.exit_tokens(self.exits[point.layer], mask))
        _, finishing = clock.time(lambda: forward.finish(batch.chunk.valid, clock.aside(take)))
        outcome.counts = outcome.counts + forward.counts
        outcome.seconds += exiting + finishing

    def _above_exactly(self, batch: ExitBatch, point: OperatingPoint, outcome: _Outcome) -> None:
        """Add the cost of the layers above the exit, which do not change predictions."""
        exits, last = outcome.exits, self.stack.num_layers
        for layer in range(point.layer + 1, last + 1):
            outcome.counts.layer_rows[layer - 1] += exits.size
            outcome.counts.pairs[layer - 1] += exits.size * exits.shape[1]
        outcome.counts.lm_head_rows += int((~exits).sum())
        outcome.seconds += batch.seconds.up_to(last) - batch.seconds.up_to(point.layer)
        outcome.seconds += batch.seconds.full_head * float((~exits).mean())

    def _probed(self, point: OperatingPoint) -> list[int]:
        """Return the exit layers whose heads have to run for an operating point."""
        if not find_rule(point.rule).needs_earlier:
            return [point.layer]
        return [layer for layer in self.rules if layer <= point.layer]

    def _deciding_seconds(self, batch: ExitBatch, point: OperatingPoint, exits: Array) -> float:
        heads = sum(batch.seconds.heads[layer] for layer in self._probed(point))
        if not find_rule(point.rule).needs_logits:
            heads *= float(exits.mean())
        return heads + batch.seconds.rules[point.layer, point.rule]

    def _row(self, point: OperatingPoint, tally: _Tally, full: _Full) -> OperatingPointRow:
        tokens = full.table.full_log_probability.size
        scored = tokens - len(full.table.full_log_probability)
        exits = tally.sums("exits")
        hard_scored = tally.sums("hard_scored")
        more = tally.sums("nll") - full.nll
        nats = float(tally.sums("nll").sum() / scored)
        resampled = resampled_nats(more, scored, self.seed)
        hard_more = _ratio_of(tally.sums("hard_nll") - tally.sums("full_hard_nll"), hard_scored)
        length = full.table.full_log_probability.shape[1]
        agreed = tally.sums("agreement")
        return OperatingPointRow(
            exit_layer=point.layer,
            rule=point.rule,
            head=self.exits[point.layer].head.name,
            threshold=float(point.threshold),
            threshold_from=point.source,
            exit_share=float(exits.sum() / tokens),
            agreement=float(agreed.sum() / tokens),
            agreement_interval=mean_interval(agreed / length, self.seed),
            exit_agreement=_ratio_of(tally.sums("exit_agreement"), exits),
            perplexity=perplexity(nats),
            nats_per_token=stored_nats(nats),
            perplexity_ratio=perplexity(more.sum() / scored),
            perplexity_ratio_interval=ratio_interval(resampled),
            nats_difference=stored_nats(more.sum() / scored),
            nats_difference_interval=nats_interval(resampled),
            hard_perplexity_ratio=None if hard_more is None else perplexity(hard_more),
            hard_nats_difference=None if hard_more is None else stored_nats(hard_more),
            kl=float(tally.sums("divergence").sum() / tokens),
            layers_per_token=tally.layer_rows / tokens,
            flops_ratio=tally.flops / full.flops,
            seconds_ratio=sum(tally.seconds) / sum(full.seconds),
            seconds_ratio_interval=student_ratio_interval(tally.seconds, full.seconds),
        )


class _Full:
    """The figures of the full model."""

    def __init__(self, table: ExitTable, seconds: list[float], operations: float) -> None:
        self.table, self.seconds, self.flops = table, seconds, operations
        self.nll = -table.full_log_probability[:, :-1].sum(axis=1, dtype=np.float64)
        if not np.isfinite(self.nll).all():
            raise ModelError(
                "the full model assigns zero probability to a token of sequence "
                f"{int(np.isfinite(self.nll).argmin())}, so its perplexity is infinite; use a wider"
                " --dtype, or remove that text"
            )


def _ratio_of(numerator: Array, denominator: Array) -> float | None:
    total = float(denominator.sum())
    return float(numerator.sum()) / total if total else None


def _sum(values: Array, where: Array) -> Array:
    """Return the sums of values `[B, T]` over selected tokens per sequence, in float64."""
    sums: Array = np.where(where, values, 0).sum(axis=1, dtype=np.float64)
    return sums
