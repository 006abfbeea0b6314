"""The history of a path: baselines through their commits, or reports in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.core.printable import printable
from cascade.gate.history.comparing import HistoryConfig, compared_versions
from cascade.gate.history.records import HistoryRecord, VersionSeries
from cascade.gate.history.reports import by_text, find_reports, gated, gated_versions
from cascade.gate.history.summary import SeriesName, series_of
from cascade.gate.history.versions import SUFFIX, baseline_versions, run_versions
from cascade.gate.history.work_tree import WorkTree
from cascade.gate.records import SessionRecord
from cascade.saturation.records import ProfileRecord

Progress = Callable[[str], None]


def read_history(
    path: Path,
    config: HistoryConfig | None = None,
    *,
    command: str | None = None,
    progress: Progress = lambda name: None,
) -> HistoryRecord:
    """Return how baselines moved over their commits, or reports over their names.

    Args:
        path: A baseline, a folder of baselines in a git work tree, or a folder of reports. A folder
            that has baselines in its work tree is read as one of baselines.
        config: How versions are compared.
        command: The command that the user ran; None from Python.
        progress: Called with the name of each version before it is read.

    Raises:
        RecordError: There is neither a baseline nor a report, git is missing or cannot read the
            repository, or no version can be read.

    Example:
        >>> import shutil
        >>> from cascade.gate.baseline_lookup import shipped_baselines
        >>> stored = shipped_baselines() / "smollm2-135m-instruct-q4_1/embedded.saturation"
        >>> for run in (Path("runs/monday"), Path("runs/tuesday")):
        ...     run.mkdir(parents=True)
        ...     for kind in (".json", ".npz"):
        ...         _ = shutil.copy(f"{stored}{kind}", run / f"profile{kind}")
        >>> [series.outcome for series in read_history(Path("runs")).series]
        ['no drift']
    """
    config = config or HistoryConfig()
    if not path.exists() and not path.name.endswith(SUFFIX):
        raise RecordError(
            f"no file or folder {path}; name a baseline, a folder of baselines or of reports"
        )
    tree = _work_tree(path)
    series, unread = [], list[str]()
    if isinstance(tree, WorkTree):
        series = _baselines(tree, path, config, progress)
    if not series and not path.name.endswith(SUFFIX):
        series, unread = _reports(path, config, progress)
    if not series and isinstance(tree, RecordError) and _has_baselines(path):
        raise tree
    if not series and path.name.endswith(SUFFIX):
        raise RecordError(
            f"no baseline {path}, neither in the work tree nor in a commit; make one with "
            "`cascade accept RUN`"
        )
    if not series:
        why = f" ({'; '.join(unread)})" if unread else ""
        raise RecordError(
            f"expected a baseline (*{SUFFIX}) or a report (profile.json, report.json) in {path}, "
            f"got none{why}; name the folder that `cascade accept` or `cascade analyze` wrote"
        )
    errors = [version.error for each in series for version in each.versions if version.error]
    if all(each.last is None for each in series):
        raise RecordError(f"no version of {path} can be read: {errors[0]}")
    return HistoryRecord(path=printable(str(path)), series=series, unread=unread, command=command)


# --- Baselines -------------------------------------------------------------------------------


def _work_tree(path: Path) -> WorkTree | RecordError:
    """Return the work tree of a path, or why there is none: reports need none."""
    folder = path if path.is_dir() else path.parent
    try:
        return WorkTree(_existing(folder))
    except RecordError as error:
        return error


def _has_baselines(path: Path) -> bool:
    return path.name.endswith(SUFFIX) or any(path.rglob(f"*{SUFFIX}"))


def _baselines(
    tree: WorkTree, path: Path, config: HistoryConfig, progress: Progress
) -> list[VersionSeries]:
    """Return one series per baseline; [] if the path is no baseline and has none."""
    if path.name.endswith(SUFFIX):
        paths = [tree.relative(path)]
    else:
        paths = tree.files(path, SUFFIX) if path.is_dir() else []
    found = []
    for each in paths:
        versions = baseline_versions(tree, each)
        if not versions:
            continue
        notes = _notes(tree, each)
        kept = versions if config.last is None else versions[-config.last :]
        compared = compared_versions(kept, config, progress)
        what = SeriesName(printable(each), "baseline", "commit")
        found.append(series_of(what, compared, notes))
    return found


def _existing(folder: Path) -> Path:
    """Return a folder, or its nearest parent that exists: a baseline can be in commits alone."""
    return next((each for each in (folder, *folder.parents) if each.is_dir()), folder)


def _notes(tree: WorkTree, path: str) -> list[str]:
    notes = []
    if tree.shallow:
        notes.append(
            "the clone is shallow, so older commits are missing; run `git fetch --unshallow`"
        )
    if not (tree.top / path).exists():
        notes.append("the file is not in the work tree")
    return notes


# --- Reports ---------------------------------------------------------------------------------


def _reports(
    path: Path, config: HistoryConfig, progress: Progress
) -> tuple[list[VersionSeries], list[str]]:
    """Return one series per model and corpus, and why some reports cannot be read."""
    reports, unread = find_reports(path)
    last = 0 if config.last is None else -config.last
    found = []
    texts, strangers = by_text(reports.get(ProfileRecord.KIND, ()))
    for name, runs in texts.items():
        compared = compared_versions(run_versions(runs[last:]), config, progress)
        found.append(series_of(SeriesName(name, "profiles", "name"), compared))
    sessions, broken = gated(reports.get(SessionRecord.KIND, ()))
    for name, comparisons in sessions.items():
        what = SeriesName(name, "gate reports", "name")
        found.append(series_of(what, gated_versions(comparisons[last:])))
    return found, [*unread, *strangers, *broken]
