"""The text of a history, for terminal and HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cascade.core.provenance import Provenance
from cascade.core.schema import known
from cascade.gate.history.records import (
    HistoryVersion,
    LayerChange,
    LayerDrift,
    VersionComparison,
    VersionSeries,
)
from cascade.report.common.words import counted, listed

#: Libraries whose change is shown, with the names that people use.
_LIBRARIES = {"cascade-exit": "cascade", "torch": "torch", "transformers": "transformers"}

#: The number of digits shown of a hash; enough to distinguish two hashes.
_DIGEST = 12
#: The longest subject of a commit in the terminal.
_SUBJECT = 48
#: The number of layers that a sentence names.
_NAMED = 5

_ORDERS = {
    "commit": "versions in the order of their commits",
    "name": "reports in the order of their names, because they hold no time",
}


# --- The whole series ------------------------------------------------------------------------


def about_series(series: VersionSeries) -> str:
    """Return what a series consists of, in one line."""
    kind = {"baseline": "version", "profiles": "run", "gate reports": "gate report"}[series.source]
    return f"{counted(len(series.versions), kind)}; {_ORDERS[series.order]}"


def outcome_words(series: VersionSeries) -> str:
    """Return what the last version is, compared with the first one, in one sentence."""
    if series.last is None:
        return "no version can be read"
    last = series.versions[series.last]
    if last.first is None or last.first.method is None:
        if series.outcome == "one version":
            return "there is no earlier version to compare with"
        reason = last.first or last.before
        why = "" if reason is None else f": {why_not(reason)}"
        return f"{version_name(last)} is not comparable with any earlier version{why}"
    unit = units(last.first)
    since = f"since {start_name(series)}"
    headline = last.first.headline.removeprefix("no drift: ")
    if series.outcome == "slow drift":
        return _slow_words(series, unit, since)
    far = farthest(series.drifts)
    if far is None:
        return f"{headline}, {since}"
    moved = f"layer {far.layer} moved most, by {number(far.standardized)} {unit}"
    return f"{headline}, {since}; {moved}"


def _slow_words(series: VersionSeries, unit: str, since: str) -> str:
    slow = [drift for drift in series.drifts if drift.slow]
    far = farthest(slow) or slow[0]
    layers = [drift.layer for drift in slow]
    many = "" if len(layers) == 1 else f"s {listed(layers)}"
    if len(layers) > _NAMED:
        many = f"s {', '.join(layers[:_NAMED])} and {len(layers) - _NAMED:,} more"
    which = f" {far.layer}" if len(layers) == 1 else f"{many}, most in layer {far.layer}"
    return (
        f"small steps add up in layer{which}: {counted(far.up + far.down, 'step')} moved its mean "
        f"by {number(far.standardized)} {unit} {since}, {far.up:,} up and {far.down:,} down, the "
        f"largest by {number(far.largest_step)}"
    )


def farthest(drifts: Sequence[LayerDrift]) -> LayerDrift | None:
    """Return the layer whose mean moved most; None if no layer has a value."""
    measured = [drift for drift in drifts if drift.standardized is not None]
    return max(measured, key=lambda drift: abs(drift.standardized or 0.0), default=None)


def start_name(series: VersionSeries) -> str:
    """Return the name of what the last version is compared with."""
    if series.first is None:
        return "the baseline of the gate"
    return version_name(series.versions[series.first])


def units(comparison: VersionComparison) -> str:
    """Return the unit of standardized changes."""
    return "margins" if comparison.method == "other sequences" else "tolerances"


def unit_words(comparison: VersionComparison) -> str:
    """Return what the unit of standardized changes is, in one sentence."""
    if comparison.method == "other sequences":
        return (
            "A margin is the change of a mean that does not matter on different sequences "
            "(`--margin`)."
        )
    return (
        "A tolerance is the largest change of a sequence's mean that counts as rounding. Changes "
        "are given for the sequence that moved most."
    )


def series_notes(series: VersionSeries) -> list[tuple[str, str]]:
    """Return notes and the versions that cannot be read, as (label, text)."""
    pairs = [("Note", note) for note in series.notes]
    pairs += [
        ("Not read", f"{version_name(version)}: {version.error}")
        for version in series.versions
        if version.error is not None
    ]
    last = None if series.last is None else series.versions[series.last]
    if last is not None and last.first is not None:
        if last.first.attribution is not None:
            pairs.append(("Likely cause", last.first.attribution.text))
        pairs += [("Note", note) for note in last.first.notes]
    return pairs


# --- Versions --------------------------------------------------------------------------------


def version_name(version: HistoryVersion) -> str:
    """Return the name of a version with the day of its commit."""
    return f"{version.name} ({day(version)})" if version.date else version.name


def day(version: HistoryVersion) -> str:
    """Return the day of a version's commit; a dash without one."""
    return version.date[:10] if version.date else "-"


def version_header(series: VersionSeries) -> tuple[str, ...]:
    """Return the columns of `version_row`; the last two hold text."""
    dated = ("date",) if _is_dated(series) else ()
    return ("version", *dated, "step", "in all", "layer", "what differs", *_last(series))


def _is_dated(series: VersionSeries) -> bool:
    return series.order == "commit"


def _last(series: VersionSeries) -> tuple[str, ...]:
    return ("subject",) if _is_dated(series) else ()


def text_columns(series: VersionSeries) -> int:
    """Return the number of columns of `version_row` that hold text."""
    return 2 if _is_dated(series) else 1


def version_row(series: VersionSeries, place: int, *, short: bool) -> tuple[str, ...]:
    """Return one version as a row of text.

    Args:
        series: The series.
        place: The number of the version.
        short: Whether to cut a long subject, for the terminal.
    """
    version = series.versions[place]
    first = version.first
    far = None if first is None else _worst(first.layers)
    if version.error is not None:
        step, total = "not read", ""
    else:
        step, total = _change_words(version.before), _change_words(first)
    subject = version.subject or ""
    if short and len(subject) > _SUBJECT:
        subject = f"{subject[: _SUBJECT - 3]}..."
    return (
        version.name,
        *((day(version),) if _is_dated(series) else ()),
        step,
        total,
        "" if far is None else far.layer,
        "; ".join(differences(series, place)),
        *((subject,) if _is_dated(series) else ()),
    )


def _change_words(comparison: VersionComparison | None) -> str:
    """Return the change of the layer that moved most, and the verdict."""
    if comparison is None:
        return "-"
    if comparison.method is None:
        return "not comparable"
    far = _worst(comparison.layers)
    words = {"INCONCLUSIVE": "undecided"}.get(comparison.verdict, comparison.verdict.lower())
    if far is None:
        return words
    found = [each for each in comparison.layers if each.verdict == comparison.verdict]
    if comparison.verdict != "PASS" and found and far not in found:
        words = f"{words} (layer {found[0].layer})"
    elif comparison.verdict != "PASS" and far.statistic != "mean":
        words = f"{words} ({far.statistic})"
    return f"{number(far.standardized)} {words}"


def _worst(layers: Sequence[LayerChange]) -> LayerChange | None:
    measured = [layer for layer in layers if layer.standardized is not None]
    return max(measured, key=lambda layer: abs(layer.standardized or 0.0), default=None)


def differences(series: VersionSeries, place: int) -> list[str]:
    """Return the libraries that changed since the version before, and why it is not comparable.

    Args:
        series: The series.
        place: The number of the version.
    """
    version = series.versions[place]
    if version.before is None or version.before.version is None:
        return []
    old = series.versions[version.before.version]
    found = _changed(_versions(old.provenance), _versions(version.provenance))
    if version.before.method is not None:
        return found
    found.append(why_not(version.before))
    if version.resumed is not None and version.resumed.version is not None:
        last = series.versions[version.resumed.version]
        found.append(f"since {last.name}: {_change_words(version.resumed)}")
    return found


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {old.get(key, 'unknown')} to {new.get(key, 'unknown')}"
        for key, name in _LIBRARIES.items()
        if old.get(key) != new.get(key)
    ]


def _versions(about: Provenance | None) -> Mapping[str, str]:
    return {} if about is None else known(about.versions) or {}


def why_not(comparison: VersionComparison) -> str:
    """Return why a version is not comparable."""
    if not comparison.mismatches:
        return comparison.headline
    return "; ".join(
        f"{found.name} {_short(found.expected)} to {_short(found.obtained)}"
        for found in comparison.mismatches
    )


def _short(value: str | None) -> str:
    """Return a value, with hashes cut to their first digits."""
    if value is None:
        return "none"
    kind, _, digits = value.rpartition(":")
    is_hash = len(digits) >= 32 and set(digits) <= set("0123456789abcdef")
    if not is_hash:
        return value
    return f"{kind}:{digits[:_DIGEST]}..." if kind else f"{digits[:_DIGEST]}..."


# --- Layers ----------------------------------------------------------------------------------

#: The columns of `drift_row`; the last one holds text.
DRIFT_HEADER = (
    "layer", "first", "last", "moved", "in all", "largest step", "up", "down", "verdict"
)  # fmt: skip


def drift_row(drift: LayerDrift) -> tuple[str, ...]:
    """Return one layer's movement as a row of text."""
    verdict = {"INCONCLUSIVE": "undecided"}.get(drift.verdict, drift.verdict.lower())
    if drift.slow:
        verdict = "fail, slow"
    if drift.verdict != "PASS" and drift.statistic != "mean":
        verdict = f"{verdict} ({drift.statistic})"
    return (
        drift.layer,
        _mean(drift.start),
        _mean(drift.end),
        "none" if drift.change is None else f"{drift.change:+.1e}",
        number(drift.standardized),
        number(drift.largest_step),
        f"{drift.up:,}",
        f"{drift.down:,}",
        verdict,
    )


def _mean(value: float | None) -> str:
    return "none" if value is None else f"{value:z.6f}"


def number(value: float | None) -> str:
    """Format a standardized change with its sign, two digits after the point below 100."""
    if value is None or not math.isfinite(value):
        return "none"
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+z.2f}"


def worst_first(drifts: Sequence[LayerDrift]) -> list[LayerDrift]:
    """Return the layers that did not pass, failures first, each group the farthest first."""
    order = {"FAIL": 0, "INCONCLUSIVE": 1}

    def badness(drift: LayerDrift) -> tuple[int, float]:
        return order[drift.verdict], -abs(drift.standardized or 0.0)

    return sorted((drift for drift in drifts if drift.verdict in order), key=badness)
