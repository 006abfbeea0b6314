"""What a series of versions shows: how far each layer moved in all, and in how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cascade.gate.history.records import (
    HistoryVersion,
    LayerChange,
    LayerDrift,
    Outcome,
    VersionComparison,
    VersionSeries,
)

_OUTCOMES: dict[str, Outcome] = {
    "PASS": "no drift",
    "INCONCLUSIVE": "undecided",
    "FAIL": "drift",
    "NOT COMPARABLE": "not comparable",
}


@dataclass(frozen=True)
class SeriesName:
    """What a series is of; the fields are those of `VersionSeries`."""

    name: str
    source: Literal["baseline", "profiles", "gate reports"]
    order: Literal["commit", "name"]


def series_of(
    what: SeriesName, versions: Sequence[HistoryVersion], notes: Iterable[str] = ()
) -> VersionSeries:
    """Return a series with its outcome, and the movement of every layer up to its last version.

    Args:
        what: What the series is of.
        versions: The compared versions, the oldest first.
        notes: Further notes for the reader.
    """
    readable = [number for number, version in enumerate(versions) if version.error is None]
    last = readable[-1] if readable else None
    total = None if last is None else versions[last].first
    drifts: list[LayerDrift] = []
    if last is not None and total is not None and total.method is not None:
        drifts = _drifts(versions, last, total)
    return VersionSeries(
        name=what.name,
        source=what.source,
        order=what.order,
        outcome=_outcome(len(readable), total, drifts),
        first=None if total is None else total.version,
        last=last,
        versions=list(versions),
        drifts=drifts,
        notes=list(notes),
    )


def _outcome(
    readable: int, total: VersionComparison | None, drifts: Sequence[LayerDrift]
) -> Outcome:
    if total is None:
        return ("unreadable", "one version")[readable] if readable < 2 else "not comparable"
    if any(drift.slow for drift in drifts):
        return "slow drift"
    return _OUTCOMES[total.verdict]


def _drifts(
    versions: Sequence[HistoryVersion], last: int, total: VersionComparison
) -> list[LayerDrift]:
    """Return how every layer moved from the version that `total` compares with to the last one."""
    steps, whole = _steps(versions, last, total)
    means = (
        ({} if total.version is None else _means(versions[total.version])),
        _means(versions[last]),
    )
    return [
        _drift(
            layer,
            [step[layer.layer] for step in steps if layer.layer in step],
            means,
            whole=whole,
        )
        for layer in total.layers
    ]


def _means(version: HistoryVersion) -> dict[str, float | None]:
    return {row.layer: row.mean for row in version.means}


def _steps(
    versions: Sequence[HistoryVersion], last: int, total: VersionComparison
) -> tuple[list[dict[str, LayerChange]], bool]:
    """Return the changes of each step by layer, and whether the steps lead all the way."""
    members = [number for number in range(last + 1) if _is_member(versions, number, last, total)]
    ends = set(members) if total.version is None else {*members, total.version}
    if total.version is None:
        # The first report is itself one step from the baseline.
        later = [versions[number].before for number in members[1:]]
        steps = [versions[members[0]].first, *later]
    else:
        steps = [versions[number].step for number in members]
    found = [
        step
        for step in steps
        if step is not None
        and step.method is not None
        and (step.version is None or step.version in ends)
    ]
    changes = [{change.layer: change for change in step.layers} for step in found]
    return changes, len(found) == len(members)


def _is_member(
    versions: Sequence[HistoryVersion], number: int, last: int, total: VersionComparison
) -> bool:
    """Return whether a version is compared with what the last one is compared with."""
    version = versions[number]
    if version.first is None or version.first.method is None:
        return False
    if total.version is not None:
        return version.first.version == total.version
    # Of a gate's reports, those on one baseline.
    return version.baseline == versions[last].baseline


def _drift(
    total: LayerChange,
    steps: Sequence[LayerChange],
    means: tuple[Mapping[str, float | None], Mapping[str, float | None]],
    *,
    whole: bool,
) -> LayerDrift:
    """Return how one layer moved.

    Args:
        total: Its cumulative change.
        steps: Its change in each step.
        means: The mean similarities of the first version, if it is one of the series, and of the
            last one.
        whole: Whether the steps lead from the first version to the last one.
    """
    start, end = (side.get(total.layer) for side in means)
    if start is None and end is not None and total.change is not None:
        start = end - total.change
    sizes = [step.standardized for step in steps if step.standardized is not None]
    changes = [step.change for step in steps if step.change is not None]
    return LayerDrift(
        layer=total.layer,
        start=start,
        end=end,
        change=total.change,
        standardized=total.standardized,
        verdict=total.verdict,
        statistic=total.statistic,
        up=sum(change > 0 for change in changes),
        down=sum(change < 0 for change in changes),
        largest_step=max(sizes, key=abs, default=None),
        slow=whole and _is_slow(total, steps),
    )


def _is_slow(total: LayerChange, steps: Sequence[LayerChange]) -> bool:
    """Return whether a cumulative change fails although no step did."""
    means = total.mean_verdict, [step.mean_verdict for step in steps]
    layers = total.verdict, [step.verdict for step in steps]
    return any(whole == "FAIL" and "FAIL" not in parts for whole, parts in (means, layers))
