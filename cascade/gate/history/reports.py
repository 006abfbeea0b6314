"""Reports in a folder: runs of `cascade analyze`, and comparisons that a gate stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.core.printable import printable
from cascade.core.provenance import Provenance
from cascade.core.reading import UnreadableError, read_json
from cascade.core.records import at, read_typed
from cascade.core.schema import SchemaError, from_plain, known
from cascade.gate.comparison import Cell, Comparison, mismatches_of
from cascade.gate.history.comparing import not_comparable, version_comparison
from cascade.gate.history.records import HistoryVersion, VersionComparison, VersionMean
from cascade.gate.records import NamedComparison, SessionRecord
from cascade.saturation.records import ProfileRecord

#: The names of reports in a run's folder.
_NAMES = ("profile.json", "report.json")

#: One report of a gate: the name of the version, its path, and the comparison.
Gated = tuple[str, Path, NamedComparison]


def find_reports(path: Path) -> tuple[dict[str, list[tuple[str, Path]]], list[str]]:
    """Return the reports of a file or folder by their kind, in order of their names.

    Searched are `profile.json` and `report.json` at any depth, and every other `.json` at the top.
    Files of other programs are left out.

    Args:
        path: The file or folder.

    Returns:
        The reports: kind -> the name of the version, which is the path of its folder or file, and
        the path; and why some cannot be read.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    unread = []
    top = path if path.is_dir() else path.parent
    for file in sorted(_files(path), key=lambda each: _by_number(each.relative_to(top))):
        try:
            plain = read_json(file)
        except UnreadableError as error:
            unread.append(f"{printable(str(file))}: {error}")
            continue
        kind = plain.get("kind") if isinstance(plain, dict) else None
        if kind in (ProfileRecord.KIND, SessionRecord.KIND):
            below = file.relative_to(top)
            name = below.parent if below.name in _NAMES and below.parent.name else below
            found.setdefault(kind, []).append((printable(name.as_posix()), file))
    return found, unread


def _files(path: Path) -> set[Path]:
    if not path.is_dir():
        return {path}
    files = {file for name in _NAMES for file in path.rglob(name)} | set(path.glob("*.json"))
    return {file for file in files if not _is_hidden(file.relative_to(path)) and file.is_file()}


def _is_hidden(path: Path) -> bool:
    return any(name.startswith(".") for name in path.parts)


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts `run2` before `run10`."""
    parts = re.findall(r"\d+|\D+", path.as_posix())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def by_text(
    profiles: Iterable[tuple[str, Path]],
) -> tuple[dict[str, list[tuple[str, Path]]], list[str]]:
    """Return runs grouped by model and corpus, under "<model>/<corpus>".

    A run that was edited is in the group that it names; its own reader refuses it.

    Args:
        profiles: The name and the `profile.json` of each run, in order.

    Returns:
        The groups, and why some runs belong to none.
    """
    found: dict[str, list[tuple[str, Path]]] = {}
    unread = []
    for name, path in profiles:
        try:
            about = from_plain(at(read_json(path), ("provenance",)), Provenance)
        except SchemaError as error:
            unread.append(f"{printable(str(path))} is torn or edited ({error})")
            continue
        text = printable(f"{known(about.model.name) or 'model'}/{about.corpus.name}")
        found.setdefault(text, []).append((name, path))
    return found, unread


# --- Reports of a gate -----------------------------------------------------------------------


def gated(paths: Iterable[tuple[str, Path]]) -> tuple[dict[str, list[Gated]], list[str]]:
    """Return the comparisons of sessions, grouped by their names.

    Args:
        paths: The name and the path of each session's record, in order.

    Returns:
        The comparisons by name, and why some records cannot be read.
    """
    found: dict[str, list[Gated]] = {}
    unread = []
    for name, path in paths:
        try:
            session = read_typed(path, SessionRecord)
        except RecordError as error:
            unread.append(str(error))
            continue
        for comparison in session.comparisons:
            found.setdefault(printable(comparison.name), []).append((name, path, comparison))
    return found, unread


def gated_versions(reports: Iterable[Gated]) -> list[HistoryVersion]:
    """Return stored comparisons as versions, each compared with the baseline and the one before.

    Args:
        reports: The comparisons of one name, in order.
    """
    made: list[HistoryVersion] = []
    before: NamedComparison | None = None
    for number, (name, path, found) in enumerate(reports):
        step = None if before is None else _between(found, before, number - 1)
        made.append(
            HistoryVersion(
                name=name,
                commit=None,
                date=None,
                subject=None,
                path=printable(str(path)),
                error=None,
                provenance=found.provenance,
                baseline=found.baseline,
                means=[VersionMean(layer=row.layer, mean=row.obtained) for row in found.profile],
                before=step,
                first=version_comparison(None, found),
            )
        )
        before = found
    return made


def _between(new: NamedComparison, old: NamedComparison, number: int) -> VersionComparison:
    """Compare two reports by their means, which are comparable over the same sequences."""
    if new.provenance is not None and old.provenance is not None:
        mismatches = mismatches_of(new.provenance, old.provenance)
        if mismatches:
            return not_comparable(number, mismatches)
    sides = [[(row.layer, row.expected) for row in side.profile] for side in (new, old)]
    if new.method != "same sequences" or old.method != "same sequences" or sides[0] != sides[1]:
        return not_comparable(number, [], "the two gates compared different sequences")
    limits = {
        cell.layer: cell.limit
        for side in (old, new)
        for cell in side.cells
        if cell.statistic == "mean" and cell.sequence is not None
    }
    rows = [
        (row.layer, row.obtained, then.obtained)
        for row, then in zip(new.profile, old.profile, strict=True)
        if row.obtained is not None and then.obtained is not None and row.layer in limits
    ]
    found = Comparison(
        "same sequences",
        cells=tuple(Cell(layer, "mean", then, now, limits[layer]) for layer, now, then in rows),
        sequences=(new.sequences.new, new.sequences.new),
        tokens=new.tokens,
        profile=tuple((layer, then, now) for layer, now, then in rows),
    )
    return version_comparison(number, found.record())
