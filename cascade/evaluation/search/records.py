"""The exit-search record: what was tried, what it kept and costs, certificates and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cascade.core.display import Displayed, origin_of
from cascade.core.schema import Count, Finite, Index, Interval, Part, Share, StoredRecord, Text
from cascade.evaluation.records import ExitProvenance, FullModelFigures, OperatingPointRow

#: How the agreement of a point was confirmed. "running": it was run. "table": read off the table
#: of what every token would do, on which each continuing token counts as predicted alike. "exact
#: table": the same with exact propagation, where that holds.
ConfirmedBy = Literal["running", "table", "exact table"]
RUNNING: ConfirmedBy = "running"
TABLE: ConfirmedBy = "table"
EXACT_TABLE: ConfirmedBy = "exact table"

#: Whether a point keeps the wanted agreement on the sequences to confirm on. "beyond doubt": its
#: whole 95 % interval does.
Outcome = Literal["beyond doubt", "kept", "lost"]
BEYOND_DOUBT: Outcome = "beyond doubt"
KEPT: Outcome = "kept"
LOST: Outcome = "lost"


class ExitVariant(Part, frozen=True, kw_only=True):
    """What a threshold is searched for.

    Attributes:
        exit_layer: The exit layer.
        rule: The exit rule's name.
        head: The exit head's name.
        propagation: What upper layers see of exited tokens.
        source: Which of the sources it is from, counted from 0; 0 without sources.
    """

    exit_layer: Count
    rule: Text
    head: Text
    propagation: Text
    source: Index


class TriedPoint(Part, frozen=True, kw_only=True):
    """An operating point that a search tried; ratios are relative to the full model.

    A figure that is not known without running the point is None.

    Attributes:
        exit_layer: The exit layer.
        rule: The exit rule's name.
        head: The exit head's name.
        threshold: Tokens exit from this confidence on.
        threshold_from: Where the threshold comes from, e.g. "agreement 0.95".
        exit_share: The share of the tokens to confirm on that exit.
        agreement: The share of the tokens to confirm on whose prediction is the full model's.
        agreement_interval: Its 95 % interval.
        perplexity_ratio: The perplexity, relative.
        layers_per_token: Decoder layers computed per token.
        flops_ratio: Counted operations, relative.
        seconds_ratio: Seconds, relative.
        seconds_ratio_interval: Its 95 % interval; None where there was one batch, too.
        propagation: What upper layers see of exited tokens.
        source: Which of the sources it is from, counted from 0; 0 without sources.
        fit_exit_share: The share of the tokens to fit on that exit.
        fit_agreement: The share of the tokens to fit on whose prediction is the full model's.
        fit_by: What these two come from, e.g. "table".
        candidate: Whether the sequences to fit on keep the wanted agreement.
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
        """What this is a threshold of."""
        return ExitVariant(
            exit_layer=self.exit_layer,
            rule=self.rule,
            head=self.head,
            propagation=self.propagation,
            source=self.source,
        )

    @property
    def only_on_table(self) -> bool:
        """Whether its agreement is known from a table that running it may contradict."""
        return self.confirmed_by == TABLE


@dataclass(frozen=True)
class FitFigures:
    """What the sequences to fit on say of a point.

    Attributes:
        exit_share: The share of their tokens that exit; None where it is not recorded.
        agreement: The share of their tokens whose prediction is the full model's; None as well.
        by: What these two come from, e.g. "table".
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
        propagation: What upper layers see of exited tokens.
        source: Which of the sources it is from.
        candidate: Whether the sequences to fit on keep the wanted agreement.
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
    """A point as a search judges it.

    Attributes:
        outcome: Whether it keeps the wanted agreement on the sequences to confirm on.
        risk_bound: The least risk that can be certified for it; None where it was not tested.
        certified: Whether the wanted risk is certified; None where it was not tested.
    """

    outcome: Outcome
    risk_bound: Share | None
    certified: bool | None

    def as_tried(self) -> TriedPoint:
        """Return the point without what the search made of it."""
        return TriedPoint(**{name: getattr(self, name) for name in TriedPoint.__struct_fields__})


class NoThreshold(ExitVariant, frozen=True, kw_only=True):
    """A layer and rule without any threshold that keeps the wanted agreement, and why."""

    why: Text


class VariantResult(ExitVariant, frozen=True, kw_only=True):
    """The thresholds of a layer and rule; numbers are indices of points.

    Attributes:
        fitted: The lowest candidate; None where there is none.
        kept: The lowest candidate that keeps the wanted agreement when confirmed.
        beyond_doubt: The lowest one whose whole interval keeps it.
    """

    fitted: Index | None
    kept: Index | None
    beyond_doubt: Index | None


class SearchSettings(Part, frozen=True, kw_only=True):
    """What was searched for, and how it was measured.

    Attributes:
        agreement: The wanted share of all tokens whose prediction is the full model's.
        risk: The risk to certify; None where the agreement leaves none.
        confidence: The probability with which all certificates hold together.
        layers: Exit layers.
        rules: Names of the rules.
        batch_size: Sequences per forward pass.
        seed: Of the intervals.
        computes_every_token_because: Why exited tokens are computed too; None where they are not.
        interval: How the intervals were made.
        seconds: How the seconds were measured.
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
        name: Its file or folder, as it was given.
        command: The command that made it.
        heads_fingerprint: The fingerprint of its exit heads; None for the logit lens.
        propagation: What upper layers see of exited tokens.
        words: What was taken from it, in words.
    """

    name: Text
    command: Text | None
    heads_fingerprint: Text | None
    propagation: Text
    words: Text


class SearchCertificate(Part, frozen=True, kw_only=True):
    """What the sequences to confirm on certify; numbers are indices of points.

    Attributes:
        tested: How many candidates were tested.
        confidence_each: The confidence of each test, with which all hold together.
        sequences: How many sequences they were tested on.
        sequences_needed: How many would certify a point that loses nothing; None where no risk is
            to be certified.
        certified: The points that are certified.
        best: The cheapest of them; None where there is none.
    """

    tested: Index
    confidence_each: Share
    sequences: Count
    sequences_needed: Count | None
    certified: list[Index]
    best: Index | None


class SearchVerdict(Part, frozen=True, kw_only=True):
    """What comes of a search, in words.

    Attributes:
        exit: Whether a point keeps the agreement and is significantly faster.
        headline: The verdict in one sentence.
        also: What to know about it, one text each.
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
        settings: What was searched for.
        sources: The stored evaluations that were searched; none for a search that measured.
        full: The full model on the sequences to confirm on.
        points: What was tried, by layer, rule, source and threshold.
        nothing: Layers and rules without a threshold.
        pairs: The thresholds of each layer and rule.
        best: The index of the cheapest candidate that keeps the agreement, those first that are
            significantly faster; None where none keeps it.
        best_beyond_doubt: The same among those whose whole interval keeps it.
        best_on_table: The same among those that were not run.
        nearest: The candidate with the largest agreement.
        certificate: What is certified.
        verdict: What comes of it.
    """

    KIND: ClassVar[str] = "exit-search"
    COMMAND: ClassVar[str] = "search-exit --output"

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

    def _in_one_line(self) -> str:
        points = f"{len(self.points)} operating points"
        return f"{origin_of(self.provenance)}, {points}; {self.verdict.headline}"
