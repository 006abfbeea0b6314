"""Evaluation: quality and cost of early exit over layers, rules and thresholds, and a verdict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from msgspec.structs import asdict

from cascade.core.arguments import check_seed
from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import UNSET
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.exit_curves import curve, lowest_threshold
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import INTERVAL, Evaluator, OperatingPoint
from cascade.evaluation.records import (
    AurocRow,
    EvaluationRecord,
    EvaluationSettings,
    ExitCurves,
    ExitProvenance,
    FullModelFigures,
    OperatingPointRow,
    SearchResult,
    Verdict,
    WantedQuality,
)
from cascade.evaluation.verdict import CONTROLS, judge, no_verdict
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.flops import full_flops
from cascade.models.stack import DecoderStack
from cascade.stats.auroc import auroc
from cascade.stats.decision import reaches
from cascade.stats.thresholds import quantile_threshold


@dataclass(frozen=True)
class EvaluationConfig:
    """What to evaluate.

    Attributes:
        layers: Exit layers.
        rules: Names of the rules; the controls are added.
        hard_ratios: A threshold is fitted for each.
        thresholds: Further operating points, measured as they are.
        agreement: The least share of agreeing tokens, for the search and the verdict.
        perplexity_ratio: The largest perplexity ratio that the verdict accepts.
        only_given: Measure `thresholds` alone: no fit, no search and no controls.

    Example:
        >>> EvaluationConfig(layers=(24, 28), rules=("top2_gap",)).hard_ratios
        (0.3, 0.5, 0.7)
    """

    layers: tuple[int, ...]
    rules: tuple[str, ...] = ("cosine", "top2_gap")
    hard_ratios: tuple[float, ...] = HARD_RATIOS
    thresholds: tuple[OperatingPoint, ...] = ()
    agreement: float = 0.95
    perplexity_ratio: float = 1.05
    only_given: bool = False

    @property
    def all_rules(self) -> tuple[str, ...]:
        """The names of the rules, those of given operating points among them."""
        return tuple(dict.fromkeys([*self.rules, *(point.rule for point in self.thresholds)]))

    @property
    def all_layers(self) -> list[int]:
        """The exit layers in ascending order, those of given operating points among them."""
        return sorted({*self.layers, *(point.layer for point in self.thresholds)})

    def check(self) -> None:
        """Refuse a configuration that cannot be evaluated.

        Raises:
            UsageError: A ratio or a threshold is outside its range, or there is no exit layer, or
                no rule but controls.
        """
        if self.only_given and not self.thresholds:
            raise UsageError("expected at least one point to measure; name some with --point")
        if not self.layers and not self.thresholds:
            raise UsageError("expected at least one exit layer, got none; name some")
        for name, values in (
            ("hard ratio", self.hard_ratios),
            ("share of agreement", (self.agreement,)),
        ):
            for value in values:
                if not 0 <= value <= 1:
                    raise UsageError(f"expected a {name} in 0..1, got {value:g}")
        if not 1 <= self.perplexity_ratio < math.inf:
            raise UsageError(
                f"expected a finite perplexity ratio of at least 1, got {self.perplexity_ratio:g}"
            )
        for name in self.rules:
            find_rule(name)
        for point in self.thresholds:
            rule = find_rule(point.rule)
            if math.isinf(point.threshold):
                raise UsageError(
                    f"expected a finite threshold, got {point.threshold:g}; the full model is "
                    "always measured, and that every token leaves is the rule fixed"
                )
            rule.check(point.threshold, infinite=False)
        self._check_judged()

    def check_layers(self, num_layers: int) -> None:
        """Refuse exit layers that the model or a rule does not have.

        Args:
            num_layers: Decoder layers of the model.

        Raises:
            UsageError: Names the valid range.
        """
        given = [(point.layer, point.rule) for point in self.thresholds]
        for layer, name in [*itertools.product(self.layers, self.rules), *given]:
            check_layers({layer: find_rule(name)}, num_layers)

    def _check_judged(self) -> None:
        """Refuse to judge where there are only controls."""
        if self.only_given or any(name not in CONTROLS for name in self.all_rules):
            return
        if not self.all_rules:
            raise UsageError("expected a rule to judge, got none; name one")
        raise UsageError(
            f"the rules {', '.join(self.all_rules)} are controls, measured beside every rule; name "
            "a rule to judge"
        )


_MORE_SEQUENCES = "take a larger corpus, a larger --max-tokens or a smaller --seq-len"


def split(blocks: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks]:
    """Deal the sequences out to two corpora in turn: one to fit on, one to confirm on.

    Raises:
        CorpusError: Fewer than four sequences.
    """
    if len(blocks.ids) < 4:
        raise CorpusError(
            f"{len(blocks.ids)} sequences cannot be split, expected at least 4; {_MORE_SEQUENCES}"
        )
    return (
        replace(blocks, ids=blocks.ids[0::2], name=f"{blocks.name}-fit"),
        replace(blocks, ids=blocks.ids[1::2], name=f"{blocks.name}-confirm"),
    )


def check_split(fit: TokenBlocks, confirm: TokenBlocks) -> None:
    """Refuse corpora too small for an interval.

    Raises:
        CorpusError: One of them has fewer than two sequences.
    """
    for blocks in (fit, confirm):
        if len(blocks.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences to fit on and 2 to confirm on, got "
                f"{len(blocks.ids)} in {blocks.name}; {_MORE_SEQUENCES}"
            )


def evaluate(
    stack: DecoderStack,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    config: EvaluationConfig,
    *,
    heads: FittedHeads | None = None,
    propagation: Propagation = "frozen",
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvaluationRecord:
    """Measure early exit over layers, rules and thresholds, and judge it.

    Args:
        stack: The model.
        fit: The corpus on which thresholds are fitted.
        confirm: The corpus on which every figure is measured.
        config: What to evaluate.
        heads: Fitted heads; the logit lens where not given.
        propagation: What upper layers see of tokens that exited.
        batch_size: Sequences per forward pass.
        seed: Of the random control and of the intervals.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call, both corpora.

    Raises:
        UsageError: The configuration cannot be evaluated, or a rule needs more layers than lie
            below an exit layer.
        CorpusError: Too few sequences for an interval, or too long ones.
        ModelError: The heads belong to another model, or a state is not finite.
    """
    config.check()
    check_seed(seed)
    check_split(fit, confirm)
    config.check_layers(stack.num_layers)
    rules = _measured_rules(config)
    evaluator = Evaluator(stack, rules, heads=heads, propagation=propagation, seed=seed)
    points, searched, fitted = [*config.thresholds], list[OperatingPoint](), None
    if not config.only_given:
        fitted = evaluator.table(fit, batch_size=batch_size, progress=progress)
        searched = search(fitted, config.all_layers, config.all_rules, config.agreement)
        points += [*_fitted_points(fitted, rules, config.hard_ratios), *searched]
        points += _random_controls(fitted, points)
    points = list({(p.layer, p.rule, p.threshold): p for p in reversed(points)}.values())
    points.sort(key=lambda point: (point.layer, point.rule, point.threshold))
    rows, table = evaluator.run(confirm, points, batch_size=batch_size, progress=progress)
    fitted_on = None if config.only_given else fit
    return EvaluationRecord(
        provenance=exit_provenance(stack, confirm, command, fitted_on=fitted_on, heads=heads),
        settings=EvaluationSettings(
            propagation=propagation,
            layers=config.all_layers,
            rules=list(config.all_rules),
            hard_ratios=list(config.hard_ratios),
            agreement=config.agreement,
            perplexity_ratio=config.perplexity_ratio,
            batch_size=batch_size,
            seed=seed,
            computes_every_token_because=evaluator.layers.reason,
            interval=INTERVAL,
            seconds=SECONDS,
        ),
        full=full_record(stack, table),
        points=rows,
        auroc=_auroc_rows(table, rules),
        curves=None if fitted is None else _curves(fitted, table, points, seed),
        search=_search_result(rows, searched, config.agreement),
        verdict=_verdict(rows, config),
    )


def exit_provenance(
    stack: DecoderStack,
    blocks: TokenBlocks,
    command: str | None,
    *,
    fitted_on: TokenBlocks | None = None,
    heads: FittedHeads | None = None,
) -> ExitProvenance:
    """Return where figures of early exit come from.

    Args:
        stack: The model.
        blocks: The corpus that is measured on.
        command: The command that the user ran.
        fitted_on: The corpus that thresholds are fitted on; None where none is fitted.
        heads: Fitted heads; None for the logit lens.
    """
    corpora = [blocks] if fitted_on is None else [fitted_on, blocks]
    return ExitProvenance(
        **asdict(provenance_of(stack, blocks, command)),
        fitted_on=UNSET if fitted_on is None else fitted_on.provenance(),
        heads=None if heads is None else heads.provenance,
        heads_fingerprint=None if heads is None else heads.fingerprint(),
        heads_saw_corpus=heads is not None and any(map(heads.saw, corpora)),
    )


def _measured_rules(config: EvaluationConfig) -> dict[int, list[str]]:
    """Return the rules of every exit layer, controls last.

    Rules that compare more layers than lie below an exit layer are left out there: a given
    operating point may bring them in for another layer.
    """
    names = config.all_rules
    controls = () if config.only_given else tuple(c for c in CONTROLS if c not in names)
    return {
        layer: [name for name in (*names, *controls) if find_rule(name).entries <= layer]
        for layer in config.all_layers
    }


def _verdict(rows: Sequence[OperatingPointRow], config: EvaluationConfig) -> Verdict:
    wanted = WantedQuality(agreement=config.agreement, perplexity_ratio=config.perplexity_ratio)
    return no_verdict(wanted) if config.only_given else judge(rows, wanted)


#: How a row's seconds come about.
SECONDS = (
    "one process, every batch through the full model and through every point in turn; a point's "
    "time is that of the layers below its exit, of its rule and head on every token that they "
    "look at, and of the layers and the LM head above for the tokens that stayed (with exact "
    "propagation, of the layers for all tokens)"
)


#: Exit shares count as equal for the random control if they differ by at most this part of them;
#: what exiting at random costs then differs by no more either.
_SAME_SHARE = 0.05


def _fitted_points(
    fitted: ExitTable, rules: dict[int, list[str]], hard_ratios: Sequence[float]
) -> Iterator[OperatingPoint]:
    for layer, names in rules.items():
        for name in names:
            if name in ("fixed", "oracle"):
                yield OperatingPoint(layer, name, 0.5, "control")
                continue
            for ratio in hard_ratios:
                threshold = ratio
                if name != "random":
                    threshold = quantile_threshold(fitted.confidence[layer, name], ratio)
                yield OperatingPoint(layer, name, threshold, f"hard ratio {ratio:g}")


def _random_controls(fitted: ExitTable, points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """Return a random control for each point whose exit share no existing control matches."""
    found: list[OperatingPoint] = []
    for point in points:
        if point.rule in CONTROLS:
            continue
        exits = reaches(fitted.confidence[point.layer, point.rule], point.threshold)
        # Where none exits here, some may on the other sequences: assume one token.
        share = max(float(exits.mean()), 1 / exits.size)
        near = any(
            other.rule == "random"
            and other.layer == point.layer
            and abs(1 - other.threshold - share) <= _SAME_SHARE * share
            for other in (*points, *found)
        )
        if not near:
            source = f"the share of {point.rule}"
            found.append(OperatingPoint(point.layer, "random", 1 - share, source))
    return found


def search(
    table: ExitTable, layers: Sequence[int], rules: Sequence[str], agreement: float
) -> list[OperatingPoint]:
    """Find, for every layer and rule, the lowest threshold that keeps a wanted agreement.

    On the table a token that stays agrees with the full model: with frozen or ridge propagation
    that is not quite so, and what is found has to be confirmed.

    Args:
        table: Of the corpus to fit on.
        layers: Exit layers.
        rules: Names of rules.
        agreement: The least share of all tokens whose prediction is the full model's.

    Returns:
        One point per layer and rule that lets any token exit.
    """
    points = []
    for layer, rule in itertools.product(layers, rules):
        if (layer, rule) not in table.confidence or rule in CONTROLS:
            continue
        found = lowest_threshold(table.confidence[layer, rule], table.agrees[layer], agreement)
        if found is not None:
            points.append(OperatingPoint(layer, rule, found, f"agreement {agreement:g}"))
    return points


def full_record(stack: DecoderStack, table: ExitTable) -> FullModelFigures:
    """Return the figures of the full model.

    Args:
        stack: The model.
        table: Of the corpus that was measured on.
    """
    scored = table.full_log_probability[:, :-1]
    tokens = int(table.full_log_probability.size)
    return FullModelFigures(
        perplexity=math.exp(-scored.mean(dtype=np.float64)),
        tokens=tokens,
        scored_tokens=int(scored.size),
        sequences=len(scored),
        layers=stack.num_layers,
        flops_per_token=full_flops(stack, *table.full_log_probability.shape) / tokens,
    )


def _curves(
    fitted: ExitTable, table: ExitTable, points: Sequence[OperatingPoint], seed: int
) -> ExitCurves:
    """Return each layer's and rule's exit curve, from which other agreements are searched."""
    rows = []
    for layer, name in fitted.confidence:
        if name in CONTROLS:
            continue
        found = curve(
            layer,
            name,
            (fitted.confidence[layer, name], fitted.agrees[layer]),
            (table.confidence[layer, name], table.agrees[layer]),
            [point.threshold for point in points if (point.layer, point.rule) == (layer, name)],
            seed=seed,
        )
        rows.append(found)
    return ExitCurves(
        fit_tokens=int(fitted.full_log_probability.size),
        tokens=int(table.full_log_probability.size),
        rows=rows,
    )


def _auroc_rows(table: ExitTable, rules: dict[int, list[str]]) -> list[AurocRow]:
    return [
        AurocRow(
            exit_layer=layer,
            rule=name,
            head_agreement=float(table.agrees[layer].mean()),
            auroc=auroc(table.confidence[layer, name], table.agrees[layer]),
        )
        for layer, names in rules.items()
        for name in names
        if name not in ("fixed", "oracle")
    ]


def _search_result(
    rows: Sequence[OperatingPointRow], searched: Sequence[OperatingPoint], agreement: float
) -> SearchResult:
    """Return which of the searched points keep the agreement on the other corpus."""
    keys = {(point.layer, point.rule, float(point.threshold)) for point in searched}
    found = [
        number
        for number, row in enumerate(rows)
        if (row.exit_layer, row.rule, row.threshold) in keys
    ]
    kept = [number for number in found if rows[number].agreement >= agreement]
    best = min(kept, key=lambda number: rows[number].flops_ratio, default=None)
    return SearchResult(
        agreement=agreement,
        points=found,
        confirmed=kept,
        best=best,
        saves=best is not None and rows[best].flops_ratio < 1,
    )
