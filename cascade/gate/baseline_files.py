"""The check of committed baselines without a model: sealed, readable, used and small enough.

Importing this module loads no torch, because the check runs before each commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade.core.errors import RecordError, UsageError, os_reason
from cascade.core.provenance import Provenance
from cascade.core.records import has_hash, read_plain
from cascade.core.schema import known
from cascade.gate.baseline_lookup import LOCAL, Sought, find_baseline
from cascade.gate.baselines import ARRAYS, ROWS, read_profile
from cascade.gate.budgets import read_budgets
from cascade.gate.records import BudgetsRecord
from cascade.saturation.records import ProfileRecord

#: The largest size of a committed file, in bytes. Every clone of a repository has every version.
MOST_BYTES = 2_000_000

#: The kinds of baselines, which are part of their files' names.
KINDS = (ProfileRecord.KIND, BudgetsRecord.KIND)

#: Options of a corpus that a baseline is looked up by.
_OPTIONS = ("seq_len", "split", "config", "text_column", "seed")


@dataclass(frozen=True)
class CheckedFiles:
    """The outcome of a check.

    Attributes:
        baselines: The `.json` files of the checked baselines; one that is missing is named too.
        problems: One line for each problem; it names the file and says what to do.
    """

    baselines: list[Path]
    problems: list[str]


def check_files(paths: Iterable[Path]) -> CheckedFiles:
    """Check the files of baselines and budgets, without a model.

    Each must be sealed with a hash, readable by this release, and at most `MOST_BYTES` long. A
    profile's `.json`, `.npz` and `.parquet` must be of the same run. And the gate must find each:
    it is looked up by the model and the corpus in its own record, as `cascade gate` and the plugin
    do.

    Args:
        paths: Files of baselines, or folders with such files. Other files are ignored.

    Raises:
        UsageError: A path does not exist, or there is no baseline among the files.

    Example:
        >>> from cascade.gate.baseline_lookup import shipped_baselines
        >>> check_files([shipped_baselines()]).problems
        []
    """
    given = list(paths)
    found = {record: folder for path in given for record, folder in _records(path)}
    if not found:
        names = ", ".join(map(str, given)) or "nothing"
        raise UsageError(
            f"expected files of baselines (<model>/<corpus>.saturation.json or .budgets.json), got "
            f"none in {names}; store one with `cascade accept`"
        )
    problems = [line for path in sorted(found) for line in _problems(path, found[path])]
    return CheckedFiles(sorted(found), problems)


# --- Which files -----------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the `.json` of each baseline at a path, and the folder of all baselines."""
    if path.is_dir():
        records = sorted(set(filter(None, map(_record_of, _files_below(path)))))
        deep = any(len(record.relative_to(path).parts) == 2 for record in records)
        folder = _named_folder(path) or (path if deep else path.absolute().parent)
        yield from ((record, folder) for record in records)
    elif os.path.lexists(path):
        record = _record_of(path)
        if record is not None:
            yield record, _named_folder(path.parent) or path.absolute().parent.parent
    else:
        raise UsageError(f"expected a file or folder of baselines, got {path}, which is missing")


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, except in hidden folders."""

    def fail(error: OSError) -> None:
        raise UsageError(f"cannot list {error.filename}: {os_reason(error)}") from error

    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _record_of(path: Path) -> Path | None:
    """Return the `.json` of the baseline that a file belongs to; None for any other file."""
    beside = [f".{ProfileRecord.KIND}{ending}" for ending in (ARRAYS, ROWS)]
    endings = [f".{kind}.json" for kind in KINDS] + beside
    return path.with_suffix(".json") if path.name.endswith(tuple(endings)) else None


def _named_folder(path: Path) -> Path | None:
    """Return the nearest folder with the default name of a folder of all baselines."""
    return next((one for one in (path, *path.parents) if one.absolute().name == LOCAL.name), None)


# --- What is wrong ---------------------------------------------------------------------------


def _problems(path: Path, folder: Path) -> Iterator[str]:
    """Yield what is wrong with the files of a baseline.

    Args:
        path: Its `.json`, which can be missing where there is an `.npz` or a `.parquet`.
        folder: The folder of all baselines.
    """
    beside = [path.with_suffix(ending) for ending in (ARRAYS, ROWS)]
    is_profile = path.name.endswith(f".{ProfileRecord.KIND}.json")
    if not os.path.lexists(path):
        alone = next(file for file in beside if os.path.lexists(file))
        yield f"{alone} has no {path.name} next to it; restore that, or remove this file"
        return
    for file in (path, *beside) if is_profile else (path,):
        size = file.stat().st_size if file.is_file() else 0
        if size > MOST_BYTES:
            yield (
                f"{file} has {size:,} bytes, expected at most {MOST_BYTES:,}; measure fewer "
                "sequences (--num-samples or --max-tokens), and accept that run"
            )
    try:
        about = _profiled(path) if is_profile else _budgeted(path)
        is_sealed = has_hash(read_plain(path, ProfileRecord if is_profile else BudgetsRecord))
    except RecordError as error:
        yield str(error)
        return
    if not is_sealed:
        yield f"{path} has no hash, as in files of earlier releases; measure and accept it again"
    unused = _unused(path, folder, about)
    if unused is not None:
        yield unused


def _profiled(path: Path) -> Provenance:
    """Read a profile with all of its rows, and return its provenance."""
    profile = read_profile(path)
    for _ in profile.rows.batches():  # checked while they are read
        pass
    return profile.record().provenance


def _budgeted(path: Path) -> Provenance:
    """Read budgets, and return the provenance of the first ones: it names model and corpus."""
    groups = read_budgets(path).groups
    if not groups:
        raise RecordError(f"{path} has no operating point, so no test can use it; remove it")
    return groups[0].provenance


def _unused(path: Path, folder: Path, about: Provenance) -> str | None:
    """Return why the gate does not find a baseline; None if it does."""
    kind = path.name.removesuffix(".json").rpartition(".")[2]
    if not _same(path.absolute().parent.parent, folder):
        return (
            f"{path} is unused: baselines are looked up as {folder}/<model>/{path.name}; move it "
            "there"
        )
    options = {name: known(getattr(about.corpus, name)) for name in _OPTIONS}
    sought = Sought(
        known(about.model.source),
        about.corpus.source,
        known(about.model.dtype),
        {name: value for name, value in options.items() if value is not None},
    )
    model, corpus = known(about.model.name), about.corpus.name
    try:
        found = find_baseline(folder, kind, model=model, corpus=corpus, sought=sought)
    except RecordError as error:
        return f"{path} is unused: {error}"
    if _same(found, path):
        return None
    return (
        f"{path} is unused: for its model {model} and corpus {corpus}, the gate "
        f"looks for {found}; move it there, or remove it"
    )


def _same(path: Path, other: Path) -> bool:
    return os.path.abspath(path) == os.path.abspath(other)
