"""Evaluation records: what early exit costs and loses at operating points, and the verdict."""

from __future__ import annotations

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
)
from cascade.exits.records import HeadsProvenance


class ExitProvenance(Provenance, frozen=True, kw_only=True):
    """Where figures of early exit come from: model, corpora and exit heads.

    Attributes:
        fitted_on: The corpus that thresholds were fitted on; absent where none was fitted.
        heads: The provenance of the exit heads, as their file has it; None for the logit lens.
        heads_fingerprint: The fingerprint of the exit heads; None for the logit lens.
        heads_saw_corpus: Whether the heads were fitted on text that the figures are measured on;
            absent from the first records.
    """

    fitted_on: CorpusProvenance | UnsetType = UNSET
    heads: HeadsProvenance | None = None
    heads_fingerprint: Text | None = None
    heads_saw_corpus: bool | UnsetType = UNSET


class EvaluationSettings(Part, frozen=True, kw_only=True):
    """How an evaluation was made.

    Attributes:
        propagation: What upper layers see of exited tokens: "frozen", "ridge" or "exact".
        layers: Exit layers.
        rules: Names of the rules, without controls that were added.
        hard_ratios: A threshold was fitted to each.
        agreement: The least share of agreeing tokens, for the search and the verdict.
        perplexity_ratio: The largest perplexity ratio that the verdict accepts.
        batch_size: Sequences per forward pass.
        seed: Of the random control and of the intervals.
        computes_every_token_because: Why exited tokens are computed too; None where they are not.
        interval: How the intervals are made.
        seconds: How the seconds are measured.
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
    """The full model on the corpus that was measured on."""

    perplexity: Positive
    tokens: Count
    scored_tokens: Count
    sequences: Count
    layers: Count
    flops_per_token: Positive


class OperatingPointRow(Part, frozen=True, kw_only=True):
    """One operating point, measured; ratios are relative to the full model.

    Attributes:
        exit_layer: The exit layer.
        rule: The exit rule's name.
        head: The exit head's name.
        threshold: Tokens exit from this confidence on.
        threshold_from: Where the threshold comes from, e.g. "hard ratio 0.3".
        exit_share: The share of tokens that exit.
        agreement: The share of tokens whose prediction is the full model's.
        agreement_interval: Its 95 % interval.
        exit_agreement: The same among the tokens that exit; None where none does.
        perplexity: Of all scored tokens.
        perplexity_ratio: The same, relative to the full model's.
        perplexity_ratio_interval: Its 95 % interval.
        hard_perplexity_ratio: The ratio for the tokens that continue; None where none does.
        kl: Divergence from the full model's predictions, in nats per token.
        layers_per_token: Decoder layers computed per token.
        flops_ratio: Counted operations, relative.
        seconds_ratio: Seconds, relative.
        seconds_ratio_interval: Its 95 % interval; None where there was one batch.
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
    perplexity: Positive
    perplexity_ratio: Positive
    perplexity_ratio_interval: Interval
    hard_perplexity_ratio: Positive | None
    kl: Finite
    layers_per_token: Positive
    flops_ratio: Positive
    seconds_ratio: Positive
    seconds_ratio_interval: Interval | None


class AurocRow(Part, frozen=True, kw_only=True):
    """How well a rule's confidence separates agreeing tokens from others, at one layer.

    Attributes:
        exit_layer: The exit layer.
        rule: The exit rule's name.
        head_agreement: The share of all tokens on which exit head and full model agree.
        auroc: The area under the ROC; None where all tokens are of one kind.
    """

    exit_layer: Count
    rule: Text
    head_agreement: Share
    auroc: Share | None


class ExitCurve(Part, frozen=True, kw_only=True):
    """What exiting at each of many thresholds would do: columns of one length.

    Attributes:
        exit_layer: The exit layer.
        rule: The exit rule's name.
        thresholds: Strictly decreasing.
        fit_exits: Tokens to fit on that exit.
        fit_wrong: Those of them whose prediction is not the full model's.
        exits: Tokens to confirm on that exit.
        wrong: Those of them whose prediction is not the full model's.
        low: Lower end of the 95 % interval of the agreement of the tokens to confirm on.
        high: Its upper end.
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
    """The exit curves of every layer and rule, and how many tokens they count."""

    fit_tokens: Count
    tokens: Count
    rows: list[ExitCurve]


class SearchResult(Part, frozen=True, kw_only=True):
    """The exit-layer search of an evaluation; numbers are indices of the operating points.

    Attributes:
        agreement: The wanted share of agreeing tokens.
        points: What the search found on the corpus to fit on.
        confirmed: Those that keep the agreement on the other corpus.
        best: The confirmed one with the fewest operations; None where none was confirmed.
        saves: Whether the best one needs fewer operations than the full model.
    """

    agreement: Share
    points: list[Index]
    confirmed: list[Index]
    best: Index | None
    saves: bool


class ControlPoints(Part, frozen=True, kw_only=True):
    """The controls that a verdict compares with, as indices; None where there is none."""

    random: Index | None
    static: Index | None
    oracle: Index | None


class WantedQuality(Part, frozen=True, kw_only=True):
    """The quality that a verdict asks for."""

    agreement: Share
    perplexity_ratio: Finite


class Verdict(Part, frozen=True, kw_only=True):
    """Whether early exit pays; numbers are indices of the operating points.

    Attributes:
        use: Whether any operating point is worth using.
        point: The one to use, or the one that comes nearest; None where no token exited.
        headline: The verdict in one sentence.
        reasons: One sentence for each check of that point.
        failed: The names of the checks that failed.
        good_enough: The fastest one of sufficient quality.
        faster: Of those that are faster, the one of the best quality.
        against: The controls that it was compared with.
        wanted: The quality asked for.
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


class EvaluationRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """An evaluation of early exit: kind `evaluation`.

    Attributes:
        schema: The schema of the record.
        kind: Always "evaluation".
        provenance: Where the figures come from.
        settings: How they were made.
        full: The full model.
        points: The operating points, controls among them.
        auroc: How well each rule knows when the exit head is right.
        curves: Exit curves; None where nothing was fitted, absent from the first records.
        search: The exit-layer search.
        verdict: Whether early exit pays.
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

    def _in_one_line(self) -> str:
        points = f"{len(self.points)} operating points"
        return f"{origin_of(self.provenance)}, {points}; {self.verdict.headline}"
