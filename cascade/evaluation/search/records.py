"""The exit-search record: tried points, their agreement and cost, certificates and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cascade.core.display import Displayed, origin_of
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Share,
    StoredRecord,
    Text,
    UnsetType,
    beyond,
)
from cascade.evaluation.records import ExitProvenance, FullModelFigures, OperatingPointRow

#: How the agreement of a point was confirmed. "running": the point was run. "table": the agreement
#: comes from the exit table, which counts every continuing token as agreeing with the full model.
#: "exact table": the same with exact propagation, for which this is true.
ConfirmedBy = Literal["running", "table", "exact table"]
RUNNING: ConfirmedBy = "running"
TABLE: ConfirmedBy = "table"
EXACT_TABLE: ConfirmedBy = "exact table"

#: Whether a point keeps the target agreement on the sequences to confirm on. "kept": its point
#: estimate does. "significant": its whole 95 % interval does.
Outcome = Literal["significant", "kept", "lost"]
SIGNIFICANT: Outcome = "significant"
KEPT: Outcome = "kept"
LOST: Outcome = "lost"


class ExitVariant(Part, frozen=True, kw_only=True):
    """A variant of early exit for which a threshold is searched.

    Attributes:
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        head: The name of the exit head.
        propagation: How upper layers get keys and values of exited tokens.
        source: The index of its source, from 0; 0 without sources.
    """

    exit_layer: Count
    rule: Text
    head: Text
    propagation: Text
    source: Index


class TriedPoint(Part, frozen=True, kw_only=True):
    """An operating point that a search tried; ratios are relative to the full model.

    Figures that are unknown unless the point is run are None.

    Attributes:
        exit_layer: The exit layer.
        rule: The name of the exit rule.
        head: The name of the exit head.
        threshold: Tokens with a confidence at or above it exit.
        threshold_from: The origin of the threshold, e.g. "agreement 0.95".
        exit_share: The share of the tokens to confirm on that exit.
        agreement: The share of the tokens to confirm on whose prediction is the full model's.
        agreement_interval: Its 95 % interval.
        perplexity_ratio: The perplexity divided by the full model's; also None beyond e^700.
        nats_difference: The mean loss minus the full model's, in nats per token; absent in records
            of earlier releases.
        layers_per_token: Decoder layers computed per token.
        flops_ratio: Counted operations divided by the full model's.
        seconds_ratio: Seconds divided by the full model's.
        seconds_ratio_interval: Its 95 % interval; also None if there was only one batch.
        propagation: How upper layers get keys and values of exited tokens.
        source: The index of its source, from 0; 0 without sources.
        fit_exit_share: The share of the tokens to fit on that exit.
        fit_agreement: The share of the tokens to fit on whose prediction is the full model's.
        fit_by: The origin of the previous two, e.g. "table".
        candidate: Whether the sequences to fit on keep the target agreement.
        confirmed_by: How the agreement was confirmed.
    """

    exit_layer: Count
    rule: Text
    head: Text
    threshold: Finite
    threshold_from: Text
    exit_share: Share
    agreement: Share
    agreement_interval: Interval
    perplexity_ratio: Finite | None
    nats_difference: Finite | UnsetType | None = UNSET
    layers_per_token: Finite | None
    flops_ratio: Finite | None
    seconds_ratio: Finite | None
    seconds_ratio_interval: Interval | None
    propagation: Text
    source: Index
    fit_exit_share: Share | None
    fit_agreement: Share | None
    fit_by: Text
    candidate: bool
    confirmed_by: ConfirmedBy

    @property
    def variant(self) -> ExitVariant:
        """The variant to which the threshold belongs."""
        return ExitVariant(
            exit_layer=self.exit_layer,
            rule=self.rule,
            head=self.head,
            propagation=self.propagation,
            source=self.source,
        )

    @property
    def only_on_table(self) -> bool:
        """Whether its agreement is only an estimate from a table."""
        return self.confirmed_by == TABLE


@dataclass(frozen=True)
class FitFigures:
    """The figures of a point on the sequences to fit on.

    Attributes:
        exit_share: The share of tokens that exit, or None if it is not recorded.
        agreement: The share of tokens whose prediction is the full model's, or None if it is not
            recorded.
        by: The origin of these two, e.g. "table".
    """

    exit_share: float | None
    agreement: float | None
    by: str


def tried_point(
    row: OperatingPointRow, fit: FitFigures, *, propagation: str, source: int, candidate: bool
) -> TriedPoint:
    """Return a point that was run.

    Args:
        row: Its figures on the sequences to confirm on.
        fit: Its figures on the sequences to fit on.
        propagation: How upper layers get keys and values of exited tokens.
        source: The index of its source.
        candidate: Whether the sequences to fit on keep the target agreement.
    """
    shared = [name for name in TriedPoint.__struct_fields__ if name in row.__struct_fields__]
    return TriedPoint(
        **{name: getattr(row, name) for name in shared},
        propagation=propagation,
        source=source,
        fit_exit_share=fit.exit_share,
        fit_agreement=fit.agreement,
        fit_by=fit.by,
        candidate=candidate,
        confirmed_by=RUNNING,
    )


class SearchedPoint(TriedPoint, frozen=True, kw_only=True):
    """A tried point with its outcome and its certificate.

    Attributes:
        outcome: Whether it keeps the target agreement on the sequences to confirm on.
        risk_bound: The lowest risk that can be certified for it; None if it was not tested.
        certified: Whether the target risk is certified; None if it was not tested.
    """

    outcome: Outcome
    risk_bound: Share | None
    certified: bool | None

    def as_tried(self) -> TriedPoint:
        """Return the point without outcome and certificate."""
        return TriedPoint(**{name: getattr(self, name) for name in TriedPoint.__struct_fields__})


class NoThreshold(ExitVariant, frozen=True, kw_only=True):
    """A layer and rule without a threshold that keeps the target agreement, with the reason."""

    why: Text


class VariantResult(ExitVariant, frozen=True, kw_only=True):
    """The thresholds of a layer and rule; numbers are indices of points.

    Attributes:
        fitted: The lowest candidate, or None.
        kept: The lowest candidate that keeps the target agreement when confirmed.
        beyond_doubt: The lowest one whose whole interval keeps it.
    """

    fitted: Index | None
    kept: Index | None
    beyond_doubt: Index | None


class SearchSettings(Part, frozen=True, kw_only=True):
    """The settings of a search.

    Attributes:
        agreement: The target share of all tokens whose prediction is the full model's.
        risk: The risk to certify; None if 1 - agreement is not a valid risk.
        confidence: The probability with which all certificates hold together.
        layers: Exit layers.
        rules: Names of the rules.
        batch_size: Sequences per forward pass.
        seed: Seed of the intervals.
        computes_every_token_because: Why exited tokens are computed too; None if they are skipped.
        interval: The method of the intervals.
        seconds: How seconds were measured.
    """

    agreement: Share
    risk: Share | None
    confidence: Share
    layers: list[Count]
    rules: list[Text]
    batch_size: Count
    seed: Index
    computes_every_token_because: Text | None
    interval: Text
    seconds: Text


class SearchSource(Part, frozen=True, kw_only=True):
    """A stored evaluation that was searched.

    Attributes:
        name: The given file or folder.
        command: The command that created it.
        heads_fingerprint: The fingerprint of its exit heads; None for the logit lens.
        propagation: How upper layers get keys and values of exited tokens.
        words: A description of the points taken from it.
    """

    name: Text
    command: Text | None
    heads_fingerprint: Text | None
    propagation: Text
    words: Text


class SearchCertificate(Part, frozen=True, kw_only=True):
    """The certificates of a search; numbers are indices of points.

    Attributes:
        tested: The number of candidates that were tested.
        confidence_each: The confidence of each test, at which all hold together.
        sequences: The number of sequences that they were tested on.
        sequences_needed: The number that would certify a point without any loss; None without a
            risk to certify.
        certified: The certified points.
        best: The cheapest certified point, or None.
    """

    tested: Index
    confidence_each: Share
    sequences: Count
    sequences_needed: Count | None
    certified: list[Index]
    best: Index | None


class SearchVerdict(Part, frozen=True, kw_only=True):
    """The verdict of a search.

    Attributes:
        exit: Whether a point keeps the agreement and is significantly faster.
        headline: The verdict in one sentence.
        also: Additional notes.
    """

    exit: bool
    headline: Text
    also: list[Text]


class SearchRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A search for an exit layer, rule and threshold: kind `exit-search`.

    Attributes:
        schema: The schema of the record.
        kind: Always "exit-search".
        provenance: The model, the corpora and the exit heads.
        settings: The settings of the search.
        sources: The stored evaluations that were searched; empty if the search measured.
        full: The figures of the full model on the sequences to confirm on.
        points: The tried points, by layer, rule, source and threshold.
        nothing: Layers and rules without a threshold.
        pairs: The thresholds of each layer and rule.
        best: The index of the cheapest candidate that keeps the agreement, or None; significantly
            faster candidates come first.
        best_beyond_doubt: The same among candidates whose whole interval keeps the agreement.
        best_on_table: The same among candidates that were not run.
        nearest: The candidate with the largest agreement.
        certificate: The certificates.
        verdict: The verdict.
    """

    KIND: ClassVar[str] = "exit-search"
    COMMAND: ClassVar[str] = "search-exit --output"
    RENAMED: ClassVar[dict[tuple[str, str], dict[str, str]]] = {
        ("points", "outcome"): {"beyond doubt": SIGNIFICANT}
    }

    schema: int = 1
    kind: Literal["exit-search"] = "exit-search"
    provenance: ExitProvenance
    settings: SearchSettings
    sources: list[SearchSource]
    full: FullModelFigures
    points: list[SearchedPoint]
    nothing: list[NoThreshold]
    pairs: list[VariantResult]
    best: Index | None
    best_beyond_doubt: Index | None
    best_on_table: Index | None
    nearest: Index | None
    certificate: SearchCertificate
    verdict: SearchVerdict

    def inconsistency(self) -> str | None:
        """Describe the first number of a point, source or layer that the record does not have."""
        numbers = {
            "best": self.best,
            "best_beyond_doubt": self.best_beyond_doubt,
            "best_on_table": self.best_on_table,
            "nearest": self.nearest,
            "certificate.best": self.certificate.best,
            "certificate.certified": max(self.certificate.certified, default=None),
        }
        for number, pair in enumerate(self.pairs):
            for name in ("fitted", "kept", "beyond_doubt"):
                numbers[f"pairs[{number}].{name}"] = getattr(pair, name)
        rows: list[TriedPoint | ExitVariant] = [*self.points, *self.nothing, *self.pairs]
        sources = {"source": max((row.source for row in rows), default=None)}
        deepest = max((row.exit_layer for row in rows), default=1)
        if deepest > self.full.layers:
            return f"expected exit layers of the model's {self.full.layers}, got {deepest}"
        return beyond(numbers, len(self.points), "points") or beyond(
            sources, max(1, len(self.sources)), "sources"
        )

    def _in_one_line(self) -> str:
        points = f"{len(self.points)} operating points"
        return f"{origin_of(self.provenance)}, {points}; {self.verdict.headline}"
