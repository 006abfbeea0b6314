"""The search for the best exit layer, rule and threshold, fitted and confirmed on two splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from msgspec import structs

from cascade.core.arrays import Array
from cascade.core.errors import RecordError, UsageError
from cascade.core.schema import known
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.bos import check_same_bos
from cascade.evaluation.exit_curves import exits_and_wrong, lowest_threshold, threshold_of_share
from cascade.evaluation.exit_evaluation import SECONDS, check_split, exit_provenance, full_record
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import INTERVAL, Evaluator, OperatingPoint
from cascade.evaluation.records import OperatingPointRow
from cascade.evaluation.search.choice import SearchConfig, SearchOrigin, search_record
from cascade.evaluation.search.records import (
    FitFigures,
    NoThreshold,
    SearchRecord,
    SearchSettings,
    tried_point,
)
from cascade.evaluation.search.stored_evaluations import Answer, StoredEvaluation
from cascade.evaluation.verdict import CONTROLS
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.rules import check_layers, find_rule
from cascade.models.identity import model_differences
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from cascade.decoding.early_exit import Propagation

Progress = Callable[[int], None] | None

#: An exit layer and the name of a rule.
LayerRule = tuple[int, str]

#: Fractions of the largest exit share that are tried. A higher threshold may be confirmed if the
#: lowest is not, and together they form a curve.
_FRACTIONS = (1.0, 2 / 3, 1 / 3)

#: Why a layer and rule have no threshold.
_NOT_ON_THE_TABLE = "no threshold at which a token exits keeps it on the sequences to fit on"
_NOT_BY_RUNNING = "none of the thresholds that keep it on the table kept it when they were run"


def search_exits(
    stack: DecoderStack,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    config: SearchConfig,
    *,
    heads: FittedHeads | None = None,
    command: str | None = None,
    progress: Progress = None,
) -> SearchRecord:
    """Return the exit layer, rule and threshold that save most and keep a target agreement.

    An exit table of the sequences to fit on gives, for every layer and rule, the lowest threshold
    that keeps the agreement if all continuing tokens are predicted as by the full model. With exact
    propagation this is true. With frozen or ridge propagation, this threshold and two higher ones
    are run on the same sequences. The additional disagreements that they show correct the table, by
    linear interpolation, and the lowest threshold that keeps the agreement after the correction is
    tried as well. All thresholds are run on the sequences to confirm on.

    Args:
        stack: The model.
        fit: The corpus on which thresholds are fitted.
        confirm: The corpus on which every figure is measured.
        config: The options of the search.
        heads: Fitted heads (default: the logit lens).
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: An option is out of range.
        CorpusError: There are too few sequences for an interval, or they are too long.
        ModelError: The heads belong to another model, or a state is not finite.

    Example:
        >>> from cascade import load, load_blocks, search_exits
        >>> from cascade.evaluation.exit_evaluation import split
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=256)
        >>> config = SearchConfig(agreement=0.5, layers=(29,), rules=("cosine",))
        >>> record = search_exits(stack, *split(blocks), config)
        >>> record.settings.layers, record.settings.rules
        ([29], ['cosine'])
    """
    config.check()
    check_split(fit, confirm, heads)
    pairs = _layer_rules(stack, config)
    by_layer: dict[int, list[str]] = {}
    for layer, rule in pairs:
        by_layer.setdefault(layer, []).append(rule)
    evaluator = Evaluator(
        stack, by_layer, heads=heads, propagation=config.propagation, seed=config.seed
    )
    fitted = _fit(evaluator, fit, pairs, config, progress)
    rows, table = evaluator.run(
        confirm,
        [one.point for one in fitted.points],
        batch_size=config.batch_size,
        progress=progress,
    )
    points = [
        tried_point(
            row,
            one.figures,
            propagation=config.propagation,
            source=0,
            candidate=one.agreement >= config.agreement,
        )
        for row, one in zip(rows, fitted.points, strict=True)
    ]
    nothing = [
        NoThreshold(
            exit_layer=layer,
            rule=rule,
            head=evaluator.exits[layer].head.name,
            propagation=config.propagation,
            source=0,
            why=why,
        )
        for (layer, rule), why in fitted.nothing.items()
    ]
    origin = SearchOrigin(
        provenance=exit_provenance(stack, confirm, command, fitted_on=fit, heads=heads),
        settings=_settings(config, pairs, evaluator),
        sources=[],
        full=full_record(stack, table),
    )
    return search_record(origin, points, nothing, config)


def _settings(
    config: SearchConfig, pairs: Sequence[LayerRule], evaluator: Evaluator
) -> SearchSettings:
    return SearchSettings(
        agreement=config.agreement,
        risk=config.bound,
        confidence=config.confidence,
        layers=sorted({layer for layer, _ in pairs}),
        rules=list(dict.fromkeys(rule for _, rule in pairs)),
        batch_size=config.batch_size,
        seed=config.seed,
        computes_every_token_because=evaluator.layers.reason,
        interval=INTERVAL,
        seconds=SECONDS,
    )


def tokens_to_read(fit: TokenBlocks, confirm: TokenBlocks, propagation: str) -> int:
    """Return the number of tokens that `search_exits` processes and reports to `progress` in total.

    Args:
        fit: The sequences to fit on.
        confirm: The sequences to confirm on.
        propagation: How upper layers get keys and values of exited tokens.
    """
    return confirm.tokens + fit.tokens * (1 if propagation == "exact" else 2)


def _layer_rules(stack: DecoderStack, config: SearchConfig) -> list[LayerRule]:
    """Return every pair of a layer and a rule once, after checking them."""
    if not config.layers or not config.rules:
        raise UsageError(
            f"expected at least one exit layer and one rule to search, got {len(config.layers)} "
            f"layers and {len(config.rules)} rules"
        )
    for name in config.rules:
        if name in CONTROLS:
            raise UsageError(
                f"the rule {name} is a control, which does not save work; search another rule"
            )
        find_rule(name)
    pairs = list(dict.fromkeys(itertools.product(config.layers, config.rules)))
    for layer, name in pairs:
        check_layers({layer: find_rule(name)}, stack.num_layers)
    return pairs


# --- Completing a stored evaluation ----------------------------------------------------------


def measure_missing(
    stack: DecoderStack,
    answer: Answer,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    config: SearchConfig,
    *,
    heads: FittedHeads | None = None,
    progress: Progress = None,
) -> Answer:
    """Return the answer of a stored evaluation after measuring what it does not contain.

    The settings are those of the evaluation. If it cannot answer at all, its layers and rules are
    searched. Otherwise only thresholds that are known from its curves are run.

    Args:
        stack: The model of the evaluation.
        answer: The evaluation's answer for the target agreement.
        fit: The sequences that the evaluation fitted on.
        confirm: The sequences that the evaluation measured on.
        config: The options of the search; layers, rules, propagation, batch size and seed come from
            the evaluation.
        heads: The heads of the evaluation, or None for the logit lens.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        RecordError: The model, the text or the heads are not those of the evaluation.
        ModelError: A state is not finite.
    """
    settings, source = answer.evaluation.record.settings, answer.evaluation.source
    check_same_inputs(stack, answer.evaluation, fit, confirm, heads)
    own = replace(
        config,
        layers=tuple(settings.layers),
        rules=tuple(name for name in settings.rules if name not in CONTROLS),
        propagation=cast("Propagation", settings.propagation),  # checked by the evaluator
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    if answer.lacks is None:
        return _run_table_points(stack, answer, confirm, own, heads, progress)
    made = search_exits(stack, fit, confirm, own, heads=heads, progress=progress)
    return Answer(
        answer.evaluation,
        points=[structs.replace(point.as_tried(), source=source) for point in made.points],
        nothing=[structs.replace(row, source=source) for row in made.nothing],
    )


def _run_table_points(
    stack: DecoderStack,
    answer: Answer,
    confirm: TokenBlocks,
    config: SearchConfig,
    heads: FittedHeads | None,
    progress: Progress,
) -> Answer:
    """Run the thresholds that an evaluation knows only from its curves."""
    settings = answer.evaluation.record.settings
    evaluator = Evaluator(
        stack,
        dict.fromkeys(settings.layers, settings.rules),
        heads=heads,
        propagation=config.propagation,
        seed=config.seed,
    )
    points = [
        OperatingPoint(point.exit_layer, point.rule, point.threshold, point.threshold_from)
        for point in answer.on_table
    ]
    rows, _ = evaluator.run(confirm, points, batch_size=config.batch_size, progress=progress)
    run = [
        tried_point(
            row,
            FitFigures(old.fit_exit_share, old.fit_agreement, old.fit_by),
            propagation=config.propagation,
            source=answer.evaluation.source,
            candidate=True,
        )
        for row, old in zip(rows, answer.on_table, strict=True)
    ]
    known = [point for point in answer.points if not point.only_on_table]
    return Answer(answer.evaluation, points=[*known, *run], nothing=answer.nothing)


def check_same_inputs(
    stack: DecoderStack,
    evaluation: StoredEvaluation,
    fit: TokenBlocks,
    confirm: TokenBlocks,
    heads: FittedHeads | None,
) -> None:
    """Check that model, text and heads are those of an evaluation.

    Args:
        stack: The model.
        evaluation: The evaluation.
        fit: The sequences to fit on.
        confirm: The sequences to confirm on.
        heads: The fitted heads, or None for the logit lens.

    Raises:
        RecordError: One of them differs; names which.
        CorpusError: Only one of the texts begins with BOS.
    """
    provenance = evaluation.record.provenance
    made_for = structs.replace(provenance.model, tokenizer_hash=provenance.tokenizer_hash)
    if known(made_for.weights_hash) is None:  # of a model in memory, which has no other record
        made_for = structs.replace(made_for, weights_hash=stack.weights_hash())
    differs = model_differences(made_for, stack)
    fingerprint = None if heads is None else heads.fingerprint()
    check_same_bos(
        provenance.corpus.bos,
        confirm.bos,
        what="the evaluation was made on text",
        again="evaluate again",
    )
    for what, was, now in (
        *((one.name, one.expected, one.found) for one in differs),
        ("text to fit on", evaluation.fitted_on.fingerprint, fit.fingerprint()),
        ("text to confirm on", provenance.corpus.fingerprint, confirm.fingerprint()),
        ("heads", provenance.heads_fingerprint, fingerprint),
    ):
        if was != now:
            raise RecordError(
                f"expected the {what} of the evaluation, {was}, got {now}; use the same {what}, or "
                "evaluate again"
            )


# --- Fitting thresholds ----------------------------------------------------------------------


@dataclass(frozen=True)
class _FittedPoint:
    """An operating point and its figures on the sequences to fit on (see `FitFigures`)."""

    point: OperatingPoint
    exit_share: float
    agreement: float
    by: str

    @property
    def figures(self) -> FitFigures:
        return FitFigures(self.exit_share, self.agreement, self.by)


@dataclass(frozen=True)
class _Fit:
    """The operating points to confirm, and why some layers and rules have none."""

    points: list[_FittedPoint]
    nothing: dict[LayerRule, str]


def _fit(
    evaluator: Evaluator,
    blocks: TokenBlocks,
    pairs: Sequence[LayerRule],
    config: SearchConfig,
    progress: Progress,
) -> _Fit:
    """Fit thresholds for every layer and rule, and run them if the table is not exact."""
    table = evaluator.table(blocks, batch_size=config.batch_size, progress=progress)
    tables = {pair: _PairTable(table, pair, config.agreement) for pair in pairs}
    on_table = {pair: one.candidates() for pair, one in tables.items()}
    nothing = {pair: _NOT_ON_THE_TABLE for pair, found in on_table.items() if not found}
    points = [one for found in on_table.values() for one in found]
    if config.propagation == "exact":
        return _Fit(points, nothing)
    if not points:
        if progress is not None:
            progress(blocks.tokens)
        return _Fit(points, nothing)
    rows, _ = evaluator.run(
        blocks,
        [one.point for one in points],
        batch_size=config.batch_size,
        progress=progress,
    )
    measured = iter(rows)
    found: list[_FittedPoint] = []
    for pair, candidates in on_table.items():
        if not candidates:
            continue
        own = [(one, _as_run(one, next(measured))) for one in candidates]
        run = [after for _, after in own]
        corrected = tables[pair].corrected_by(own)
        if corrected is not None:
            run.append(corrected)
        if not any(one.agreement >= config.agreement for one in run):
            nothing[pair] = _NOT_BY_RUNNING
        found += run
    return _Fit(found, nothing)


def _as_run(one: _FittedPoint, row: OperatingPointRow) -> _FittedPoint:
    return _FittedPoint(one.point, row.exit_share, row.agreement, "running")


class _PairTable:
    """The exit table of the corpus to fit on, for one exit layer and rule.

    Args:
        table: The table of all layers and rules.
        pair: The exit layer and the name of the rule.
        agreement: The target agreement.
    """

    def __init__(self, table: ExitTable, pair: LayerRule, agreement: float) -> None:
        self.layer, self.rule = pair
        self.wanted = agreement
        self.confidence, self.agrees = table.confidence[pair], table.agrees[self.layer]
        self.tokens = self.confidence.size

    def candidates(self) -> list[_FittedPoint]:
        """Return the lowest threshold that keeps the agreement, and higher ones."""
        lowest = lowest_threshold(self.confidence, self.agrees, self.wanted)
        if lowest is None:
            return []
        share = exits_and_wrong(self.confidence, self.agrees, lowest)[0] / self.tokens
        thresholds = {
            threshold_of_share(self.confidence, fraction * share) for fraction in _FRACTIONS
        }
        found = []
        for threshold in sorted(thresholds):
            exits, wrong = exits_and_wrong(self.confidence, self.agrees, threshold)
            source = f"agreement {self.wanted:g}" if threshold == lowest else "more cautious"
            found.append(self._fitted(threshold, source, exits, wrong, "table"))
        return found

    def corrected_by(self, run: Sequence[tuple[_FittedPoint, _FittedPoint]]) -> _FittedPoint | None:
        """Return the lowest threshold that keeps the agreement after correcting the table.

        If a threshold is run, more tokens disagree than in the table, since continuing tokens use
        approximate keys and values of exited tokens. The number of additional disagreements is
        interpolated linearly between the exit shares that were run.

        Args:
            run: For each threshold, its point by the table and its point as run.

        Returns:
            The point, or None if there is no such threshold or it was run already.
        """
        ordered = sorted(run, key=lambda pair: pair[1].exit_share)
        shares = [0.0, *(after.exit_share for _, after in ordered)]
        losses = [0.0, *(before.agreement - after.agreement for before, after in ordered)]

        def more_wrong(exits: Array) -> Array:
            return np.asarray(self.tokens * np.interp(exits / self.tokens, shares, losses))

        lowest = lowest_threshold(self.confidence, self.agrees, self.wanted, more_wrong=more_wrong)
        if lowest is None or any(one.point.threshold == lowest for one, _ in run):
            return None
        exits, wrong = exits_and_wrong(self.confidence, self.agrees, lowest)
        lost = wrong + float(more_wrong(np.array([exits]))[0])
        source = f"agreement {self.wanted:g}, corrected"
        return self._fitted(lowest, source, exits, lost, "table, corrected by running")

    def _fitted(
        self, threshold: float, source: str, exits: int, wrong: float, by: str
    ) -> _FittedPoint:
        return _FittedPoint(
            OperatingPoint(self.layer, self.rule, threshold, source),
            exits / self.tokens,
            (self.tokens - wrong) / self.tokens,
            by,
        )
