"""The record of a history: versions of a baseline, each compared with earlier ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.provenance import Provenance
from cascade.core.schema import Finite, Index, Part, StoredRecord, Text, beyond
from cascade.gate.records import Attribution, CellVerdict, Method, Mismatch, Verdict

#: What a series of versions shows about its last version.
Outcome = Literal[
    "slow drift", "drift", "unreadable", "not comparable", "undecided", "no drift", "one version"
]


class VersionMean(Part, frozen=True, kw_only=True):
    """The mean similarity of one layer in one version; None where it has no value."""

    layer: Text
    mean: Finite | None


class LayerChange(Part, frozen=True, kw_only=True):
    """How far one layer is from an earlier version.

    Attributes:
        layer: The layer.
        change: The change of the mean similarity over the compared sequences; None if a side has
            no value.
        limit: The tolerance or margin of the mean.
        standardized: The largest change of a sequence's mean in tolerances, or the change of the
            mean over different sequences in margins; None if a side has no value.
        mean_verdict: The verdict of the mean; None if it was not compared.
        verdict: The worst verdict of the layer's statistics.
        statistic: The statistic that is farthest beyond its limit, or nearest to it.
    """

    layer: Text
    change: Finite | None
    limit: Finite | None
    standardized: Finite | None
    mean_verdict: CellVerdict | None
    verdict: CellVerdict
    statistic: str


class VersionComparison(Part, frozen=True, kw_only=True):
    """A version compared with an earlier one, as the gate compares a profile with its baseline.

    Attributes:
        version: The number of the earlier version, from 0; None for the baseline of a gate's
            report.
        verdict: The verdict.
        headline: The verdict and its reason, in one sentence.
        method: How the two were compared; None if they are not comparable.
        mismatches: What makes the two not comparable.
        attribution: The likely cause, if something failed.
        notes: Further notes for the reader.
        layers: The change of every layer; empty if the two are not comparable.
    """

    version: Index | None
    verdict: Verdict
    headline: str
    method: Method | None
    mismatches: list[Mismatch]
    attribution: Attribution | None
    notes: list[str]
    layers: list[LayerChange]


class HistoryVersion(Part, frozen=True, kw_only=True):
    """One version of a baseline, or one report.

    Attributes:
        name: The short hash of the commit, "uncommitted", or the path of the report.
        commit: The whole hash of the commit; None for a version that is in no commit.
        date: The date of the commit, in ISO 8601.
        subject: The subject of the commit.
        path: The path of the file in this version.
        error: Why the version cannot be read; None if it can.
        provenance: The provenance of the version.
        baseline: The provenance of the baseline that a gate compared with; None without a gate.
        means: The mean similarity of every layer.
        before: The comparison with the readable version before; None for the first one.
        first: The comparison with the first version that is comparable; None if no earlier one is.
        resumed: The comparison with the last version that is comparable, where the version before
            is not, and the first one is another.
    """

    name: Text
    commit: str | None
    date: str | None
    subject: str | None
    path: Text
    error: str | None
    provenance: Provenance | None
    baseline: Provenance | None = None
    means: list[VersionMean]
    before: VersionComparison | None
    first: VersionComparison | None
    resumed: VersionComparison | None = None

    @property
    def step(self) -> VersionComparison | None:
        """The comparison with the last comparable version, if there is one."""
        if self.before is not None and self.before.method is not None:
            return self.before
        return self.resumed or self.first


class LayerDrift(Part, frozen=True, kw_only=True):
    """How one layer moved from the first comparable version to the last one.

    Attributes:
        layer: The layer.
        start: The mean similarity of the first version; None where it has no value.
        end: The mean similarity of the last version.
        change: The cumulative change, over the compared sequences.
        standardized: The cumulative change in tolerances or margins, as in `LayerChange`.
        verdict: The verdict of the cumulative change, over all statistics of the layer.
        statistic: The statistic that is farthest beyond its limit, or nearest to it.
        up: The number of steps in which the mean rose.
        down: The number of steps in which the mean fell.
        largest_step: The largest change of a single step, in tolerances or margins.
        slow: Whether the cumulative change fails although no single step did, of the mean or of all
            statistics together.
    """

    layer: Text
    start: Finite | None
    end: Finite | None
    change: Finite | None
    standardized: Finite | None
    verdict: CellVerdict
    statistic: str
    up: Index
    down: Index
    largest_step: Finite | None
    slow: bool


class VersionSeries(Part, frozen=True, kw_only=True):
    """The versions of one baseline, or the reports of one model and corpus, in order.

    Attributes:
        name: The path of the baseline, or "<model>/<corpus>".
        source: "baseline" (versions of a file in git), "profiles" (runs of `cascade analyze`) or
            "gate reports" (comparisons with a baseline; the first version is the baseline).
        order: What the versions are ordered by: "commit" or "name".
        outcome: What the last version is, compared with the first one.
        first: The number of the version that the last one is compared with; None for the baseline
            of gate reports, or if there is none.
        last: The number of the last readable version; None if none can be read.
        versions: The versions, the oldest first.
        drifts: How every layer moved between the two; empty if they are not comparable.
        notes: Further notes for the reader.
    """

    name: Text
    source: Literal["baseline", "profiles", "gate reports"]
    order: Literal["commit", "name"]
    outcome: Outcome
    first: Index | None
    last: Index | None
    versions: list[HistoryVersion]
    drifts: list[LayerDrift]
    notes: list[str]


class HistoryRecord(StoredRecord, frozen=True, kw_only=True):
    """How baselines moved over their versions: kind `history`.

    Attributes:
        path: The file or folder whose history this is.
        series: One series per baseline, or per model and corpus of the reports.
        unread: Why reports that belong to no series cannot be read.
        command: The command line that made the record; None from Python.
    """

    KIND: ClassVar[str] = "history"
    COMMAND: ClassVar[str] = "history --output"

    schema: int = 1
    kind: Literal["history"] = "history"
    path: Text
    series: list[VersionSeries]
    unread: list[str]
    command: str | None

    def inconsistency(self) -> str | None:
        """Describe the first number of a version that a series does not have."""
        for place, series in enumerate(self.series):
            where = f"series[{place}]"
            numbers = {f"{where}.first": series.first, f"{where}.last": series.last}
            for number, version in enumerate(series.versions):
                for name in ("before", "first", "resumed"):
                    found: VersionComparison | None = getattr(version, name)
                    if found is not None:
                        numbers[f"{where}.versions[{number}].{name}.version"] = found.version
            flaw = beyond(numbers, len(series.versions), "versions")
            if flaw is not None:
                return flaw
        return None
