"""The records of the gate: noise, comparison, budgets, and the report of a session."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from msgspec import field
from msgspec.structs import asdict

from cascade.core.display import Displayed
from cascade.core.provenance import Provenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Positive,
    StoredRecord,
    Text,
    UnsetType,
)
from cascade.evaluation.lossless.records import LosslessFigures
from cascade.evaluation.records import EvaluationSettings, ExitProvenance, OperatingPointRow
from cascade.gate.remote.records import RemoteOrigin
from cascade.saturation.records import Change, NoiseFloor

Verdict = Literal["FAIL", "NOT COMPARABLE", "INCONCLUSIVE", "PASS"]
CellVerdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]

#: How two profiles are compared: each sequence with itself, or means over different sequences.
Method = Literal["same sequences", "other sequences"]

#: How the tokens of a pass with a KV cache are given to the model.
DecodingKind = Literal["prefix", "token", "draft", "after draft"]

#: Verdicts, the worst first.
VERDICTS: tuple[Verdict, ...] = ("FAIL", "NOT COMPARABLE", "INCONCLUSIVE", "PASS")


class NoiseRecord(StoredRecord, frozen=True, kw_only=True):
    """The noise floor of a model on this machine, as stored in the cache: kind `noise`.

    Attributes:
        repeat: The largest change from another batch size, thread count or attention kernel.
        exact: The largest change from float64; None where it could not be measured.
        variants: The largest change of each variant, or the reason why it could not be measured.
        sequences: The number of sequences measured.
        long: The largest change of a range of positions of a long sequence; absent where it was not
            measured.
    """

    KIND: ClassVar[str] = "noise"
    COMMAND: ClassVar[str] = "gate"

    schema: int = 1
    kind: Literal["noise"] = "noise"
    repeat: Change
    exact: Change | None
    variants: dict[str, float | str] = field(name="ways")
    sequences: Count
    long: Change | UnsetType = UNSET

    @classmethod
    def of(cls, floor: NoiseFloor) -> NoiseRecord:
        """Return the record of a measured noise floor."""
        return cls(**asdict(floor))

    def floor(self) -> NoiseFloor:
        """Return the noise floor."""
        return NoiseFloor(
            repeat=self.repeat,
            exact=self.exact,
            variants=self.variants,
            sequences=self.sequences,
            long=self.long,
        )


# --- Comparisons -----------------------------------------------------------------------------


class Mismatch(Part, frozen=True, kw_only=True):
    """One thing that makes two profiles not comparable.

    Attributes:
        name: What differs, e.g. "model.dtype".
        expected: The baseline's value.
        obtained: The new one.
        remedy: How to resolve the mismatch.
    """

    name: str
    expected: str | None
    obtained: str | None
    remedy: str


#: Kinds of causes, see `Attribution`.
CauseKind = Literal[
    "rows", "capture", "counting", "layer", "numerics", "model", "long context", "decoding"
]


class TriedCause(Part, frozen=True, kw_only=True):
    """A cause that was tried, and how much of the movement it leaves unexplained.

    Attributes:
        name: The cause.
        left: The largest distance of a row from what the cause predicts, in tolerances; None if a
            row has no value.
    """

    name: str
    left: Finite | None


class Attribution(Part, frozen=True, kw_only=True):
    """The likely cause of a drift.

    Attributes:
        cause: "rows" (one side lacks some rows), "capture" (the model is right, and its states are
            read wrongly), "counting" (means agree, shares or quantiles do not), "layer" (one
            layer's weights or code), "numerics" (rounding), "model" (the whole model, or its
            input), "long context" (the sequences agree with the baseline, the long ones do not) or
            "decoding" (the prefill agrees with the baseline, passes with a KV cache do not agree
            with the prefill).
        layer: The first row that moved, where this identifies a layer.
        text: The evidence, in one sentence.
        named: The name of the cause, if one explains the numbers clearly better than all others.
        tried: The causes that were tried, the best first.
    """

    cause: CauseKind
    layer: str | None
    text: str
    named: str | UnsetType = UNSET
    tried: list[TriedCause] | UnsetType = UNSET


class SequenceCounts(Part, frozen=True, kw_only=True):
    """The number of compared sequences on each side: the baseline's and the new ones."""

    baseline: Index
    new: Index


class MeanRow(Part, frozen=True, kw_only=True):
    """The mean similarity of one layer on both sides; None where a side has no value."""

    layer: str
    expected: Finite | None
    obtained: Finite | None


class CellRow(Part, frozen=True, kw_only=True):
    """One compared statistic of one layer (see `Cell`); None for a value that is not finite."""

    layer: str
    statistic: str
    expected: Finite | None
    obtained: Finite | None
    difference: Finite | None
    limit: Finite
    standardized: Finite | None
    interval: Interval | None
    sequence: Index | None
    needed: Index | None
    verdict: CellVerdict


class GateStep(Part, frozen=True, kw_only=True):
    """One comparison within a gate: the tokens measured so far, and the verdict."""

    tokens: Index
    verdict: Verdict


class DecodingPass(Part, frozen=True, kw_only=True):
    """One pass through the model's own KV cache, compared with the prefill.

    Attributes:
        kind: "prefix" (the tokens before the cached steps, at once), "token" (one token), "draft"
            (several tokens at once, some of them rejected afterwards) or "after draft" (one token,
            after the rejected ones were removed from the cache).
        start: The number of tokens in the cache before the pass.
        tokens: The number of compared tokens of each sequence.
        rejected: The number of tokens that were rejected afterwards.
        difference: The largest difference of a similarity from the prefill's; None if it is not
            finite.
        layer: The first row that differs by more than its tolerance: in one token, or in all cached
            steps together; None if none does.
    """

    kind: DecodingKind
    start: Index
    tokens: Count
    rejected: Index
    difference: Finite | None
    layer: str | None


class DecodingTolerance(Part, frozen=True, kw_only=True):
    """How much the similarities of one layer may differ between prefill and cached steps.

    Attributes:
        layer: The row.
        noise: The largest change of a token's similarity if all hidden states are rounded
            differently.
        tolerance: The largest difference of a token that counts as rounding.
        mean_noise: The root mean square of these changes, over the tokens of the cached steps.
        mean_tolerance: The largest root mean square of the differences in all cached steps that
            counts as rounding.
    """

    layer: str
    noise: Finite
    tolerance: Finite
    mean_noise: Finite
    mean_tolerance: Finite


class DecodingRecord(Part, frozen=True, kw_only=True):
    """Whether passes through the model's own KV cache compute what the prefill computes.

    Attributes:
        verdict: "PASS", "FAIL", or "NOT CHECKED" if the model does not run with a KV cache.
        reason: Why it was not checked, or why only single tokens were.
        error: The error that a cached step raised, if one did.
        error_layer: The decoder layer that raised it.
        sequences: The number of sequences.
        tokens: The number of tokens of each sequence.
        passes: The passes, in order, up to the one that raised an error.
        tolerances: The tolerance of each row.
        seconds: The duration.
    """

    verdict: Literal["PASS", "FAIL", "NOT CHECKED"]
    reason: str | None
    error: str | None
    error_layer: str | None
    sequences: Index
    tokens: Index
    passes: list[DecodingPass]
    tolerances: list[DecodingTolerance]
    seconds: Finite

    @property
    def first(self) -> int | None:
        """The number of the first pass that differs or raised an error, from 0; None if none."""
        found = next((at for at, made in enumerate(self.passes) if made.layer is not None), None)
        return len(self.passes) if found is None and self.error is not None else found


class PositionRange(Part, frozen=True, kw_only=True):
    """One range of positions of the long sequences, compared with the baseline.

    Attributes:
        first: The first position, from 1.
        last: The last position.
        difference: The largest difference of a mean similarity, of any layer and sequence.
        layer: The first row that differs by more than the tolerance; None if none does.
    """

    first: Count
    last: Count
    difference: Finite
    layer: str | None


class LongContextRecord(Part, frozen=True, kw_only=True):
    """Whether long sequences have the baseline's similarities.

    Attributes:
        verdict: "PASS", "FAIL", or "NOT CHECKED" if there is nothing to compare.
        reason: Why they were not checked.
        length: The number of tokens of each long sequence.
        sequences: The number of long sequences.
        tolerance: The largest difference of a mean that counts as rounding.
        ranges: The ranges of positions, in order.
        seconds: How long the long sequences took to measure.
    """

    verdict: Literal["PASS", "FAIL", "NOT CHECKED"]
    reason: str | None
    length: Index
    sequences: Index
    tolerance: Finite
    ranges: list[PositionRange]
    seconds: Finite

    @property
    def moved(self) -> list[PositionRange]:
        """The ranges that differ by more than the tolerance."""
        return [each for each in self.ranges if each.layer is not None]


class GateRun(Part, frozen=True, kw_only=True):
    """How a gate reached its verdict.

    Attributes:
        steps: The comparisons, one after each batch.
        budget_tokens: The maximum number of tokens to measure.
        seconds: The duration, without loading the model.
        noise: The noise floor measured on this machine, if the baseline was made on another one.
    """

    steps: list[GateStep] = field(name="looks")
    budget_tokens: Index
    seconds: Finite
    noise: NoiseRecord | None


class ComparisonRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A profile compared with its baseline: kind `comparison`.

    Attributes:
        verdict: The verdict.
        headline: The verdict and its reason, in one sentence.
        method: How the two were compared; None if they are not comparable.
        mismatches: What makes the two not comparable.
        attribution: The likely cause, if something failed.
        sequences: The number of compared sequences.
        tokens: The number of new tokens.
        notes: Further notes for the reader.
        profile: The mean similarities of both sides, per layer.
        cells: Every statistic of every layer of either side.
        provenance: The provenance of the new profile.
        baseline: The provenance of the baseline.
        gate: How the gate reached its verdict, if a gate made the comparison.
        decoding: Whether decoding computes what the prefill computes, if a gate checked it.
        long_context: Whether long sequences have the baseline's similarities, if it was checked.
    """

    KIND: ClassVar[str] = "comparison"
    COMMAND: ClassVar[str] = "compare --output"

    schema: int = 1
    kind: Literal["comparison"] = "comparison"
    verdict: Verdict
    headline: str
    method: Method | None = field(name="way")
    mismatches: list[Mismatch]
    attribution: Attribution | None
    sequences: SequenceCounts
    tokens: Index
    notes: list[str]
    profile: list[MeanRow]
    cells: list[CellRow]
    provenance: Provenance | None
    baseline: Provenance | None
    gate: GateRun | UnsetType = UNSET
    decoding: DecodingRecord | UnsetType = UNSET
    long_context: LongContextRecord | UnsetType = UNSET

    def _in_one_line(self) -> str:
        return f"{self.verdict}, {self.headline}"


class NamedComparison(ComparisonRecord, frozen=True, kw_only=True):
    """A comparison made in a session.

    Attributes:
        name: "<model>/<corpus>".
        path: The path of the baseline, or its address.
        remote: Where the baseline was read from, and which version; absent for a local one.
    """

    name: str
    path: str
    remote: RemoteOrigin | UnsetType = UNSET

    @classmethod
    def of(
        cls,
        record: ComparisonRecord,
        *,
        name: str,
        path: str,
        remote: RemoteOrigin | UnsetType = UNSET,
    ) -> NamedComparison:
        """Return a comparison with its name, and the path and origin of its baseline."""
        return cls(**{**asdict(record), "name": name, "path": path, "remote": remote})


# --- Budgets ---------------------------------------------------------------------------------


class BudgetSource(Part, frozen=True, kw_only=True):
    """The fields of an evaluation that budgets are made from and compared with.

    Attributes:
        provenance: The provenance of the evaluation.
        settings: The settings of the evaluation.
        points: The operating points.
        lossless: Prompts that were continued without loss; absent where that was not measured.
    """

    provenance: ExitProvenance
    settings: EvaluationSettings
    points: list[OperatingPointRow]
    lossless: LosslessFigures | UnsetType = UNSET


class Limit(Part, frozen=True, kw_only=True):
    """The lower and upper limit of a figure; at least one of them is set."""

    least: Finite | UnsetType = UNSET
    most: Finite | UnsetType = UNSET


class PointBudget(Part, frozen=True, kw_only=True):
    """The limits of one operating point's figures."""

    perplexity_ratio: Limit
    agreement: Limit
    exit_share: Limit
    layers_per_token: Limit
    seconds_ratio: Limit


class BudgetedPoint(OperatingPointRow, frozen=True, kw_only=True):
    """An accepted operating point with its budget."""

    budget: PointBudget


class BudgetGroup(Part, frozen=True, kw_only=True):
    """The budgets of one kind of exit head with one propagation.

    Attributes:
        provenance: The provenance of the accepted evaluation.
        settings: The settings of that evaluation.
        points: The operating points with their budgets.
    """

    provenance: ExitProvenance
    settings: EvaluationSettings
    points: list[BudgetedPoint]


class LosslessBudget(Part, frozen=True, kw_only=True):
    """What lossless decoding has to reach on a few prompts: equal texts and tokens per pass.

    Attributes:
        prompts: The number of prompts. The text of each must be the full model's.
        prompt_tokens: The number of tokens of a prompt.
        new_tokens: The largest number of new tokens of a prompt.
        fingerprint: SHA-256 of the prompts.
        pass_costs: The milliseconds of a pass over 1, 2, ... tokens that decide how much is
            drafted. They are fixed, so that tokens per pass do not depend on times.
        trees: Whether drafts could be trees; otherwise they were chains.
        engine: What computed the passes in the accepted run.
        tokens_per_pass: New tokens per pass in the accepted run.
        budget: The limit of the tokens per pass.
        command: The command that made the accepted run; None from Python.
    """

    prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    fingerprint: Text
    pass_costs: list[Positive]
    trees: bool
    engine: Text
    tokens_per_pass: Positive
    budget: Limit
    command: str | None


class BudgetsRecord(StoredRecord, frozen=True, kw_only=True):
    """The early-exit budgets of one model and corpus: kind `budgets`.

    Attributes:
        groups: The budgets of operating points.
        lossless: The budget of lossless decoding; absent where no evaluation measured it.
    """

    KIND: ClassVar[str] = "budgets"
    COMMAND: ClassVar[str] = "accept"

    schema: int = 1
    kind: Literal["budgets"] = "budgets"
    groups: list[BudgetGroup]
    lossless: LosslessBudget | UnsetType = UNSET


class Overrun(Part, frozen=True, kw_only=True):
    """One budget that was exceeded.

    Attributes:
        point: The operating point, in words.
        figure: E.g. "perplexity_ratio"; "point" where the operating point was not measured,
            "generation" where generating differs from scoring.
        limit: The budget, in words; empty for "point" and "generation".
        measured: The measured value, in words.
        command: The command that measures the operating point again.
    """

    point: str
    figure: str
    limit: str
    measured: str
    command: str

    @property
    def found(self) -> str:
        """The budget and the measured value, in words."""
        if not self.limit:
            return self.measured
        return f"{self.figure} budget {self.limit}, measured {self.measured}"

    def __str__(self) -> str:
        return f"{self.point}: {self.found}; run `{self.command}`"


# --- Sessions --------------------------------------------------------------------------------


class BudgetOutcome(Part, frozen=True, kw_only=True):
    """The outcome of one file of budgets.

    Attributes:
        name: "<model>/<corpus>".
        path: The path of the file, or its address.
        verdict: The verdict.
        points: The number of checked operating points.
        overruns: The budgets that were exceeded.
        reason: Why nothing could be compared; None if it could.
        remote: Where the file was read from, and which version; absent for a local one.
    """

    name: str
    path: str
    verdict: Verdict
    points: Index
    overruns: list[Overrun]
    reason: str | None
    remote: RemoteOrigin | UnsetType = UNSET


class MissingBaseline(Part, frozen=True, kw_only=True):
    """A baseline that does not exist: its path, and the command that creates it."""

    path: Text
    command: str


class SessionRecord(StoredRecord, frozen=True, kw_only=True):
    """The outcome of a test session, or of one comparison on the command line: kind `report`.

    Attributes:
        verdict: The worst of all verdicts.
        comparisons: The comparisons with baselines.
        budgets: The budget files that were checked.
        missing: Baselines that do not exist.
        regenerated: Paths of regenerated baselines.
        unused: Paths of baselines that no test used.
    """

    KIND: ClassVar[str] = "report"
    COMMAND: ClassVar[str] = "gate --output"

    schema: int = 1
    kind: Literal["report"] = "report"
    verdict: Verdict
    comparisons: list[NamedComparison]
    budgets: list[BudgetOutcome]
    missing: list[MissingBaseline]
    regenerated: list[str]
    unused: list[str]


def session_record(
    comparisons: Iterable[NamedComparison],
    budgets: Iterable[BudgetOutcome] = (),
    missing: Iterable[MissingBaseline] = (),
    regenerated: Iterable[str] = (),
    unused: Iterable[str] = (),
) -> SessionRecord:
    """Return the record of a session.

    Args:
        comparisons: The comparisons with baselines.
        budgets: The budget files that were checked.
        missing: Baselines that do not exist.
        regenerated: Paths of regenerated baselines.
        unused: Paths of baselines that no test used.

    Returns:
        The record. Its verdict is the worst of all verdicts. A missing baseline is a FAIL. A
        session that compared nothing, or that regenerated a baseline, is at best INCONCLUSIVE.

    Example:
        >>> session_record([]).verdict
        'INCONCLUSIVE'
    """
    compared, checked, absent = list(comparisons), list(budgets), list(missing)
    made = list(regenerated)
    found: set[Verdict] = {entry.verdict for entry in compared}
    found |= {entry.verdict for entry in checked}
    if absent:
        found.add("FAIL")
    if made or not found:
        found.add("INCONCLUSIVE")
    return SessionRecord(
        verdict=min(found, key=VERDICTS.index),
        comparisons=compared,
        budgets=checked,
        missing=absent,
        regenerated=made,
        unused=list(unused),
    )
