"""Comparing versions in order: each with the one before and with the first comparable one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cascade.core.errors import RecordError
from cascade.gate.baseline_identity import identity_difference
from cascade.gate.baselines import StoredProfile
from cascade.gate.comparison import mismatches_of
from cascade.gate.drift import CONFIDENCE, MARGIN, compare
from cascade.gate.history.records import (
    HistoryVersion,
    LayerChange,
    VersionComparison,
    VersionMean,
)
from cascade.gate.history.versions import Version
from cascade.gate.records import CellRow, ComparisonRecord, MeanRow, Mismatch


@dataclass(frozen=True)
class HistoryConfig:
    """How versions are compared; the fields are the options of `cascade.gate.drift.compare`.

    Attributes:
        independent: Compare means even if sequences are shared.
        margin: The margin on different sequences, in standard deviations between sequences.
        confidence: The probability that all intervals hold simultaneously.
        anyway: Compare versions of different models, tokenizers and corpora too.
        seed: The seed of the resampling.
        last: Read only this many versions, the newest ones; None reads all.
    """

    independent: bool = False
    margin: float = MARGIN
    confidence: float = CONFIDENCE
    anyway: bool = False
    seed: int = 0
    last: int | None = None


@dataclass(frozen=True)
class _Read:
    """A version that could be read, with its number."""

    number: int
    profile: StoredProfile


def compared_versions(
    versions: Iterable[Version],
    config: HistoryConfig,
    progress: Callable[[str], None] = lambda name: None,
) -> list[HistoryVersion]:
    """Read versions and compare each with the one before and with the first comparable one.

    A version that cannot be read is marked with the reason, and the following one is compared with
    the one before it. Of versions that are comparable, two are in memory: the first and the last.

    Args:
        versions: The versions, the oldest first.
        config: How they are compared.
        progress: Called with the name of each version before it is read.
    """
    made: list[HistoryVersion] = []
    before: _Read | None = None
    kinds: list[_Kind] = []
    for number, version in enumerate(versions):
        progress(version.name)
        try:
            read = _Read(number, version.read())
        except RecordError as error:
            made.append(_unread(version, str(error)))
            continue
        made.append(_placed(version, read, before, kinds, config))
        before = read
    return made


@dataclass
class _Kind:
    """Versions that are comparable with each other: the first one and the last one so far."""

    first: _Read
    last: _Read


def _placed(
    version: Version,
    read: _Read,
    before: _Read | None,
    kinds: list[_Kind],
    config: HistoryConfig,
) -> HistoryVersion:
    """Compare a version with earlier ones, and add it to the kind that it is comparable with."""
    done: dict[int, VersionComparison] = {}

    def against(earlier: _Read) -> VersionComparison:
        if earlier.number not in done:
            done[earlier.number] = _compared(read.profile, earlier, config)
        return done[earlier.number]

    step = None if before is None else against(before)
    kind = next((each for each in kinds if against(each.first).method is not None), None)
    first = resumed = None
    if kind is None:
        kinds.append(_Kind(read, read))
    else:
        first = against(kind.first)
        if kind.last is not before and kind.last is not kind.first:
            resumed = against(kind.last)
        kind.last = read
    record = read.profile.record()
    return HistoryVersion(
        name=version.name,
        commit=version.commit,
        date=version.date,
        subject=version.subject,
        path=version.path,
        error=None,
        provenance=record.provenance,
        means=[VersionMean(layer=row.layer, mean=row.mean) for row in record.layers],
        before=step,
        first=first,
        resumed=resumed,
    )


def _unread(version: Version, error: str) -> HistoryVersion:
    return HistoryVersion(
        name=version.name,
        commit=version.commit,
        date=version.date,
        subject=version.subject,
        path=version.path,
        error=error,
        provenance=None,
        means=[],
        before=None,
        first=None,
    )


def _compared(profile: StoredProfile, earlier: _Read, config: HistoryConfig) -> VersionComparison:
    """Compare a version with an earlier one, as the gate compares a profile with its baseline."""
    old = earlier.profile
    if not config.anyway:
        mismatches = _mismatches(profile, old)
        if mismatches:
            return not_comparable(earlier.number, mismatches)
    try:
        found = compare(
            profile,
            old,
            independent=config.independent,
            margin=config.margin,
            confidence=config.confidence,
            anyway=config.anyway,
            seed=config.seed,
        )
    except RecordError as error:  # too few sequences for an interval
        return not_comparable(earlier.number, [], str(error))
    return version_comparison(earlier.number, found.record())


def _mismatches(new: StoredProfile, old: StoredProfile) -> list[Mismatch]:
    """Return what makes two versions not comparable: for the gate, or another model or text."""
    found = mismatches_of(new.record().provenance, old.record().provenance)
    if found:
        return found
    difference = identity_difference(new, old)
    if difference is None:
        return []
    expected, obtained = (
        None if value is None else str(value)
        for value in (difference.expected, difference.obtained)
    )
    remedy = "keep both baselines, under names of their own"
    name = f"{difference.origin}.{difference.field}"
    return [Mismatch(name=name, expected=expected, obtained=obtained, remedy=remedy)]


def not_comparable(
    number: int | None, mismatches: list[Mismatch], reason: str | None = None
) -> VersionComparison:
    """Return that a version is not comparable with an earlier one.

    Args:
        number: The number of the earlier version.
        mismatches: What makes the two not comparable.
        reason: Why, where nothing differs.
    """
    names = " and ".join(mismatch.name for mismatch in mismatches)
    verb = "differs" if len(mismatches) == 1 else "differ"
    return VersionComparison(
        version=number,
        verdict="NOT COMPARABLE",
        headline=reason or f"{names} {verb}",
        method=None,
        mismatches=mismatches,
        attribution=None,
        notes=[],
        layers=[],
    )


def version_comparison(number: int | None, found: ComparisonRecord) -> VersionComparison:
    """Return what a history keeps of a comparison: one row per layer.

    Args:
        number: The number of the earlier version; None for the baseline of a gate's report.
        found: The comparison.
    """
    cells: dict[str, list[CellRow]] = {}
    for cell in found.cells:
        cells.setdefault(cell.layer, []).append(cell)
    return VersionComparison(
        version=number,
        verdict=found.verdict,
        headline=found.headline,
        method=found.method,
        mismatches=found.mismatches,
        attribution=found.attribution,
        notes=found.notes,
        layers=[
            _layer_change(row, cells[row.layer]) for row in found.profile if row.layer in cells
        ],
    )


def _layer_change(row: MeanRow, cells: Sequence[CellRow]) -> LayerChange:
    """Return one layer's change from all of its cells."""
    worst = max(cells, key=_badness)
    # On the same sequences, the mean of the one that moved most comes before the table's.
    mean = next((cell for cell in cells if cell.statistic == "mean"), None)
    change = None
    if row.expected is not None and row.obtained is not None:
        change = row.obtained - row.expected
    return LayerChange(
        layer=row.layer,
        change=change,
        limit=None if mean is None else mean.limit,
        standardized=None if mean is None else mean.standardized,
        mean_verdict=None if mean is None else mean.verdict,
        verdict=worst.verdict,
        statistic=worst.statistic,
    )


def _badness(cell: CellRow) -> tuple[int, float]:
    order = ("PASS", "INCONCLUSIVE", "FAIL").index(cell.verdict)
    return order, math.inf if cell.standardized is None else abs(cell.standardized)
