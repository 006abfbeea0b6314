"""Evaluation of early exit: quality and cost of layers, rules and thresholds, and a verdict."""

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
from cascade.corpora.bos import check_same_bos
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
from cascade.stats.perplexity import perplexity
from cascade.stats.thresholds import quantile_threshold


@dataclass(frozen=True)
class EvaluationConfig:
    """The options of an evaluation.

    Attributes:
        layers: Exit layers.
        rules: Names of the rules; the controls are added.
        hard_ratios: Hard ratios; a threshold is fitted to each.
        thresholds: Additional operating points, measured with the given thresholds.
        agreement: The minimum share of agreeing tokens, for the search and the verdict.
        perplexity_ratio: The largest perplexity ratio that the verdict accepts.
        only_given: Measure only `thresholds`, without a fit, a search or controls.

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
        """The names of the rules, including those of given operating points."""
        return tuple(dict.fromkeys([*self.rules, *(point.rule for point in self.thresholds)]))

    @property
    def all_layers(self) -> list[int]:
        """The exit layers in ascending order, including those of given operating points."""
        return sorted({*self.layers, *(point.layer for point in self.thresholds)})

    def check(self) -> None:
        """Check that the options are valid.

        Raises:
            UsageError: A ratio or a threshold is out of range, there is no exit layer, or all rules
                are controls.
        """
        if self.only_given and not self.thresholds:
            raise UsageError(
                "expected at least one operating point to measure, got none; add some with --point"
            )
        if not self.layers and not self.thresholds:
            raise UsageError("expected at least one exit layer, got none; add one with --layers")
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
                    "always measured, and the rule fixed lets every token exit"
                )
            rule.check(point.threshold, infinite=False)
        self._check_judged()

    def check_layers(self, num_layers: int) -> None:
        """Check that the exit layers exist and have enough layers below them for their rules.

        Args:
            num_layers: The number of decoder layers of the model.

        Raises:
            UsageError: A layer is outside the valid range; names the range.
        """
        given = [(point.layer, point.rule) for point in self.thresholds]
        for layer, name in [*itertools.product(self.layers, self.rules), *given]:
            check_layers({layer: find_rule(name)}, num_layers)

    def _check_judged(self) -> None:
        """Check that at least one rule is not a control."""
        if self.only_given or any(name not in CONTROLS for name in self.all_rules):
            return
        if not self.all_rules:
            raise UsageError("expected a rule to judge, got none; add one with --rule")
        raise UsageError(
            f"expected a rule to judge, got only controls ({', '.join(self.all_rules)}), which are "
            "always measured; add another rule"
        )


_MORE_SEQUENCES = "use a larger corpus, a larger --max-tokens or a smaller --seq-len"


def split(blocks: TokenBlocks) -> tuple[TokenBlocks, TokenBlocks]:
    """Return two halves of a corpus with alternating sequences: to fit on and to confirm on.

    Args:
        blocks: The corpus.

    Raises:
        CorpusError: The corpus has fewer than four sequences.
    """
    if len(blocks.ids) < 4:
        raise CorpusError(
            f"expected at least 4 sequences to split, got {len(blocks.ids)}; {_MORE_SEQUENCES}"
        )
    return (
        replace(blocks, ids=blocks.ids[0::2], name=f"{blocks.name}-fit"),
        replace(blocks, ids=blocks.ids[1::2], name=f"{blocks.name}-confirm"),
    )


def check_split(fit: TokenBlocks, confirm: TokenBlocks, heads: FittedHeads | None) -> None:
    """Check that both corpora are large enough for an interval, and begin as the heads' text did.

    Args:
        fit: The corpus to fit on.
        confirm: The corpus to confirm on.
        heads: Fitted heads; None for the logit lens.

    Raises:
        CorpusError: One of them has fewer than two sequences, or only some of the texts begin with
            BOS.
    """
    for blocks in (fit, confirm):
        if len(blocks.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences to fit on and 2 to confirm on, got "
                f"{len(blocks.ids)} in {blocks.name}; {_MORE_SEQUENCES}"
            )
    check_same_bos(fit.bos, confirm.bos, what="thresholds are fitted on text")
    if heads is not None:
        heads.check_bos(confirm.bos)


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
    """Return the quality and cost of early exit over layers, rules and thresholds, and a verdict.

    Args:
        stack: The model.
        fit: The corpus on which thresholds are fitted.
        confirm: The corpus on which every figure is measured.
        config: The options of the evaluation.
        heads: Fitted heads (default: the logit lens).
        propagation: How upper layers get keys and values of exited tokens.
        batch_size: Sequences per forward pass.
        seed: Seed of the random control and of the intervals.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call, in both corpora.

    Raises:
        UsageError: The options are invalid, or a rule needs more layers than there are below an
            exit layer.
        CorpusError: There are too few sequences for an interval, or they are too long.
        ModelError: The heads belong to another model, or a state is not finite.

    Example:
        >>> from cascade import evaluate, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=256)
        >>> fit, confirm = split(blocks)
        >>> config = EvaluationConfig(layers=(29,), rules=("cosine",), hard_ratios=(0.5,))
        >>> record = evaluate(stack, fit, confirm, config)
        >>> record.full.layers, record.points[0].exit_layer
        (30, 29)
    """
    config.check()
    check_seed(seed)
    check_split(fit, confirm, heads)
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
    """Return the provenance of measurements of early exit.

    Args:
        stack: The model.
        blocks: The corpus of the measurement.
        command: The command that the user ran.
        fitted_on: The corpus on which thresholds are fitted; None without fitted thresholds.
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

    A layer omits rules that need more layers than there are below it. Such a rule can come from an
    operating point that is given for another layer.
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


#: How the seconds of a row are measured.
SECONDS = (
    "one process runs each batch through the full model and then through every point; the time of "
    "a point includes the layers up to its exit, its rule and head for every token that they "
    "evaluate, and the upper layers and the LM head for the tokens that continue (with exact "
    "propagation, the upper layers for all tokens)"
)


#: A random control matches a point if their exit shares differ by at most this fraction. The costs
#: of exiting at random then differ by no more.
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
        # If no token exits here, some may on the other sequences, so assume one token.
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
    """Return, for every layer and rule, the lowest threshold that keeps a target agreement.

    In the table, tokens that continue agree with the full model. With frozen or ridge propagation
    this is not exactly true, and the thresholds must be confirmed.

    Args:
        table: The exit table of the corpus to fit on.
        layers: Exit layers.
        rules: Names of rules.
        agreement: The minimum share of all tokens whose prediction is the full model's.

    Returns:
        One point for each layer and rule at which a token can exit.
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
        table: The exit table of the measured corpus.
    """
    scored = table.full_log_probability[:, :-1]
    tokens = int(table.full_log_probability.size)
    nats = -float(scored.mean(dtype=np.float64))
    return FullModelFigures(
        perplexity=perplexity(nats),
        nats_per_token=nats,
        tokens=tokens,
        scored_tokens=int(scored.size),
        sequences=len(scored),
        layers=stack.num_layers,
        flops_per_token=full_flops(stack, *table.full_log_probability.shape) / tokens,
    )


def _curves(
    fitted: ExitTable, table: ExitTable, points: Sequence[OperatingPoint], seed: int
) -> ExitCurves:
    """Return the exit curve of each layer and rule, for searches at other agreements."""
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
    """Return which of the searched points keep the agreement on the corpus to confirm on."""
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
