"""Evaluation records: quality and cost of early exit at operating points, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

from cascade.core.display import Displayed, origin_of
from cascade.core.provenance import CorpusProvenance, Provenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Positive,
    Share,
    StoredRecord,
    Text,
    UnsetType,
    beyond,
    known,
)
from cascade.evaluation.lossless.records import LosslessFigures, LosslessVerdict, wrong_lossless
from cascade.exits.records import HeadsProvenance
from cascade.stats.perplexity import as_ratio


class ExitProvenance(Provenance, frozen=True, kw_only=True):
    """The provenance of measurements of early exit: model, corpora and exit heads.

    Attributes:
        fitted_on: The corpus on which thresholds were fitted; absent without fitted thresholds.
        heads: The provenance of the exit heads, from their file; None for the logit lens.
        heads_fingerprint: The fingerprint of the exit heads; None for the logit lens.
        heads_saw_corpus: Whether the heads were fitted on text of the measurement; absent from the
            first records.
    """

    fitted_on: CorpusProvenance | UnsetType = UNSET
    heads: HeadsProvenance | None = None
    heads_fingerprint: Text | None = None
    heads_saw_corpus: bool | UnsetType = UNSET


class EvaluationSettings(Part, frozen=True, kw_only=True):
    """The settings of an evaluation.

    Attributes:
        propagation: How upper layers get keys and values of exited tokens: "frozen", "ridge" or
            "exact".
        layers: Exit layers.
        rules: Names of the rules, without the controls that were added.
        hard_ratios: Hard ratios; a threshold was fitted to each.
        agreement: The minimum share of agreeing tokens, for the search and the verdict.
        perplexity_ratio: The largest perplexity ratio that the verdict accepts.
        batch_size: Sequences per forward pass.
        seed: Seed of the random control and of the intervals.
        computes_every_token_because: Why exited tokens are computed too; None if they are skipped.
        interval: The method of the intervals.
        seconds: How seconds are measured.
    """

    propagation: Text
    layers: list[Count]
    rules: list[Text]
    hard_ratios: list[Share]
    agreement: Share
    perplexity_ratio: Finite
    batch_size: Count
    seed: Index
    computes_every_token_because: Text | None
    interval: Text
    seconds: Text


class FullModelFigures(Part, frozen=True, kw_only=True):
    """The figures of the full model on the measured corpus.

    Attributes:
        perplexity: The perplexity; None above e^700, which no number holds.
        nats_per_token: The mean loss; absent in records of earlier releases.
    """

    perplexity: Positive | None
    nats_per_token: Finite | UnsetType = UNSET
    tokens: Count
    scored_tokens: Count
    sequences: Count
    layers: Count
    flops_per_token: Positive


class OperatingPointRow(Part, frozen=True, kw_only=True):
    """A measured operating point; ratios are relative to the full model.

    Attributes:
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        head: The name of the exit head.
        threshold: Tokens with a confidence at or above it exit.
        threshold_from: The origin of the threshold, e.g. "hard ratio 0.3".
        exit_share: The share of tokens that exit.
        agreement: The share of tokens whose prediction is the full model's.
        agreement_interval: Its 95 % interval.
        exit_agreement: The agreement of the tokens that exit; None if no token exits.
        perplexity: The perplexity of all scored tokens; None above e^700, which no number holds.
        nats_per_token: The mean loss; None if it is infinite. Like the next ones in nats, absent in
            records of earlier releases.
        perplexity_ratio: The perplexity divided by the full model's; None beyond e^700.
        perplexity_ratio_interval: Its 95 % interval; None if an end is beyond e^700.
        nats_difference: The mean loss minus the full model's, in nats per token: the logarithm of
            the ratio. None if it is infinite.
        nats_difference_interval: Its 95 % interval; None if an end is infinite.
        hard_perplexity_ratio: The ratio for the tokens that continue; None if no token continues,
            or beyond e^700.
        hard_nats_difference: The difference for these tokens; None if no token continues.
        kl: Divergence from the full model's predictions, in nats per token.
        layers_per_token: Decoder layers computed per token.
        flops_ratio: Counted operations divided by the full model's.
        seconds_ratio: Seconds divided by the full model's.
        seconds_ratio_interval: Its 95 % interval; None if there was only one batch.
    """

    exit_layer: Count
    rule: Text
    head: Text
    threshold: Finite
    threshold_from: Text
    exit_share: Share
    agreement: Share
    agreement_interval: Interval
    exit_agreement: Share | None
    perplexity: Positive | None
    nats_per_token: Finite | UnsetType | None = UNSET
    perplexity_ratio: Positive | None
    perplexity_ratio_interval: Interval | None
    nats_difference: Finite | UnsetType | None = UNSET
    nats_difference_interval: Interval | UnsetType | None = UNSET
    hard_perplexity_ratio: Positive | None
    hard_nats_difference: Finite | UnsetType | None = UNSET
    kl: Finite
    layers_per_token: Positive
    flops_ratio: Positive
    seconds_ratio: Positive
    seconds_ratio_interval: Interval | None

    @property
    def added_nats(self) -> float:
        """The difference in nats per token, also of earlier records; may be infinite."""
        nats = known(self.nats_difference)
        if nats is not None:
            return nats
        return math.inf if self.perplexity_ratio is None else math.log(self.perplexity_ratio)

    @property
    def compared_ratio(self) -> float:
        """The perplexity ratio for comparisons: 0 or infinity where no number holds it."""
        if self.perplexity_ratio is not None:
            return self.perplexity_ratio
        return as_ratio(self.added_nats)

    @property
    def compared_interval(self) -> list[float]:
        """The interval of the perplexity ratio for comparisons, with 0 and infinity as above."""
        if self.perplexity_ratio_interval is not None:
            return self.perplexity_ratio_interval
        nats = known(self.nats_difference_interval) or [-math.inf, math.inf]
        return [as_ratio(end) for end in nats]


class AurocRow(Part, frozen=True, kw_only=True):
    """How well a rule's confidence separates agreeing tokens from others, at one layer.

    Attributes:
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        head_agreement: The share of all tokens on which exit head and full model agree.
        auroc: The area under the ROC curve; None if all tokens agree or none does.
    """

    exit_layer: Count
    rule: Text
    head_agreement: Share
    auroc: Share | None


class ExitCurve(Part, frozen=True, kw_only=True):
    """Exits and disagreements at many thresholds; all columns have the same length.

    Attributes:
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        thresholds: The thresholds, strictly decreasing.
        fit_exits: The number of tokens to fit on that exit.
        fit_wrong: The number of these whose prediction is not the full model's.
        exits: The number of tokens to confirm on that exit.
        wrong: The number of these whose prediction is not the full model's.
        low: Lower end of the 95 % interval of the agreement of the tokens to confirm on.
        high: Upper end of this interval.
    """

    exit_layer: Count
    rule: Text
    thresholds: list[Finite]
    fit_exits: list[Index]
    fit_wrong: list[Index]
    exits: list[Index]
    wrong: list[Index]
    low: list[Share]
    high: list[Share]


class ExitCurves(Part, frozen=True, kw_only=True):
    """The exit curves of every layer and rule, and the number of tokens that they count."""

    fit_tokens: Count
    tokens: Count
    rows: list[ExitCurve]


def _wrong_layer(layers: Iterable[int], most: int) -> str | None:
    for layer in layers:
        if layer > most:
            return f"expected exit layers in 1..{most}, got {layer}"
    return None


def _wrong_curve(curves: ExitCurves | None) -> str | None:
    """Describe the first exit curve whose columns contradict each other; None if none does."""
    if curves is None:
        return None
    for row in curves.rows:
        columns = (row.fit_exits, row.fit_wrong, row.exits, row.wrong, row.low, row.high)
        where = f"the curve of layer {row.exit_layer} and {row.rule[:40]}"
        if any(len(column) != len(row.thresholds) for column in columns):
            return f"expected columns of {len(row.thresholds)} rows in {where}"
        for exits, wrong, tokens in (
            (row.fit_exits, row.fit_wrong, curves.fit_tokens),
            (row.exits, row.wrong, curves.tokens),
        ):
            if any(bad > of for bad, of in zip(wrong, exits, strict=True)):
                return f"expected no more wrong tokens than exits in {where}"
            if max(exits, default=0) > tokens:
                return f"expected at most {tokens:,} exits in {where}, got {max(exits):,}"
    return None


class SearchResult(Part, frozen=True, kw_only=True):
    """The exit-layer search of an evaluation; numbers are indices of operating points.

    Attributes:
        agreement: The target share of agreeing tokens.
        points: The points that the search found on the corpus to fit on.
        confirmed: Those that keep the agreement on the corpus to confirm on.
        best: The confirmed point with the fewest operations; None if no point was confirmed.
        saves: Whether the best point needs fewer operations than the full model.
    """

    agreement: Share
    points: list[Index]
    confirmed: list[Index]
    best: Index | None
    saves: bool


class ControlPoints(Part, frozen=True, kw_only=True):
    """The controls that a verdict compares with, as indices; None if there is none."""

    random: Index | None
    static: Index | None
    oracle: Index | None


class WantedQuality(Part, frozen=True, kw_only=True):
    """The quality that a verdict requires."""

    agreement: Share
    perplexity_ratio: Finite


class Verdict(Part, frozen=True, kw_only=True):
    """Whether early exit pays; numbers are indices of operating points.

    Attributes:
        use: Whether any operating point is worth using.
        point: The operating point to use, or the nearest one; None if no token exited.
        headline: The verdict in one sentence.
        reasons: One sentence for each check of this point.
        failed: The names of the checks that failed.
        good_enough: The fastest operating point of sufficient quality.
        faster: The faster operating point of the best quality.
        against: The controls that the point was compared with.
        wanted: The required quality.
        lossless: Whether lossless decoding saves more than exits; absent where it was not measured.
    """

    use: bool
    point: Index | None
    headline: Text
    reasons: list[Text]
    failed: list[Text]
    good_enough: Index | None
    faster: Index | None
    against: ControlPoints
    wanted: WantedQuality
    lossless: LosslessVerdict | UnsetType = UNSET


class EvaluationRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """An evaluation of early exit: kind `evaluation`.

    Attributes:
        schema: The schema of the record.
        kind: Always "evaluation".
        provenance: The provenance of the figures.
        settings: The settings of the evaluation.
        full: The figures of the full model.
        points: The operating points, including controls.
        auroc: How well each rule's confidence separates agreeing tokens from others.
        curves: Exit curves; None without fitted thresholds, absent from the first records.
        search: The exit-layer search.
        verdict: Whether early exit pays.
        lossless: Prompts that are continued without loss and with exits; absent where that was not
            measured.
    """

    KIND: ClassVar[str] = "evaluation"
    COMMAND: ClassVar[str] = "evaluate --output"

    schema: int = 1
    kind: Literal["evaluation"] = "evaluation"
    provenance: ExitProvenance
    settings: EvaluationSettings
    full: FullModelFigures
    points: list[OperatingPointRow]
    auroc: list[AurocRow]
    curves: ExitCurves | UnsetType | None = UNSET
    search: SearchResult
    verdict: Verdict
    lossless: LosslessFigures | UnsetType = UNSET

    def inconsistency(self) -> str | None:
        """Describe the first number of a point, layer or token that contradicts the others."""
        verdict, search = self.verdict, self.search
        numbers = {
            "search.best": search.best,
            "verdict.point": verdict.point,
            "verdict.good_enough": verdict.good_enough,
            "verdict.faster": verdict.faster,
            "verdict.against.random": verdict.against.random,
            "verdict.against.static": verdict.against.static,
            "verdict.against.oracle": verdict.against.oracle,
            "search.points": max(search.points, default=None),
            "search.confirmed": max(search.confirmed, default=None),
        }
        curves = known(self.curves)
        layers = [
            *(point.exit_layer for point in self.points),
            *(row.exit_layer for row in self.auroc),
            *(row.exit_layer for row in (curves.rows if curves is not None else ())),
        ]
        return (
            beyond(numbers, len(self.points), "points")
            or _wrong_layer(layers, self.full.layers)
            or _wrong_curve(curves)
            or wrong_lossless(known(self.lossless), known(verdict.lossless), self.points)
        )

    def _in_one_line(self) -> str:
        points = f"{len(self.points)} operating points"
        return f"{origin_of(self.provenance)}, {points}; {self.verdict.headline}"
