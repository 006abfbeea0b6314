"""Accept runs as baselines: each replaces its earlier version, and no other baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from cascade.core.errors import BrokenRecordError, RecordError, UsageError
from cascade.core.names import same_source
from cascade.core.provenance import Provenance
from cascade.core.records import read_arrays_file, read_plain, to_json
from cascade.core.run_folder import RunFolder, is_stored
from cascade.core.schema import known
from cascade.gate.baseline_identity import identity_difference
from cascade.gate.baseline_lookup import baselines_in
from cascade.gate.baselines import (
    ACCEPT_WAITS,
    ARRAYS,
    ROWS,
    StoredProfile,
    baseline_paths,
    profile_path,
    read_profile,
    stage_profile,
)
from cascade.saturation.profile import SaturationProfile
from cascade.saturation.records import ProfileRecord
from cascade.saturation.row_files import StoredRows


def accept(
    folder: Path, run: Path, *, name: str | None = None, replace: bool = False
) -> tuple[Path, StoredProfile | None]:
    """Store a run's profile as the baseline of its model and corpus.

    Args:
        folder: The folder of all baselines.
        run: A folder that `cascade analyze --output` wrote.
        name: "MODEL/CORPUS", another name for the baseline (default: the names in the run).
        replace: Replace the baseline of another model or corpus that has this name.

    Returns:
        The path of the baseline, and the baseline that it replaces, if one existed.

    Raises:
        RecordError: The run is missing, torn or edited, or its files come from different runs;
            or the baseline of this name is of another model or corpus.
        UsageError: The name has another form.
        OutputError: The baseline cannot be written.
    """
    profile = read_profile(run / "profile.json")
    if isinstance(profile.rows, StoredRows):
        profile.rows.check()
    path = named_path(folder, ProfileRecord.KIND, name) if name else _path_of(folder, profile)
    return path, _store(path, profile, lambda to: _stage_run(to, run, path, profile), replace)


def store_profile(
    folder: Path,
    profile: SaturationProfile | StoredProfile,
    *,
    path: Path | None = None,
    replace: bool = False,
) -> tuple[Path, StoredProfile | None]:
    """Seal a profile and store it as the baseline of its model and corpus.

    Args:
        folder: The folder of all baselines.
        profile: The measured profile.
        path: The baseline's `.json` (default: by the names in the profile).
        replace: Replace the baseline of another model or corpus at this path.

    Returns:
        The path of the baseline, and the baseline that it replaces, if a readable one existed.

    Raises:
        RecordError: The provenance names no model or corpus, or the baseline there is of another
            model or corpus.
        OutputError: The baseline cannot be written; the previous one is unharmed.
    """
    plain = StoredProfile(profile.record(), dict(profile.arrays()), profile.rows)
    path = path or _path_of(folder, plain)
    return path, _store(path, plain, lambda to: stage_profile(to, profile, path.stem), replace)


def named_path(folder: Path, kind: str, name: str) -> Path:
    """Return the path of a baseline with a given name.

    Args:
        folder: The folder of all baselines.
        kind: "saturation" or "budgets".
        name: "MODEL/CORPUS".

    Raises:
        UsageError: The name has another form.
    """
    model, _, corpus = name.partition("/")
    try:
        return baseline_paths(folder, kind, model=model, corpus=corpus)[0]
    except RecordError:
        raise UsageError(
            f"expected --name MODEL/CORPUS, such as tiny/texts, got {name!r}"
        ) from None


def _path_of(folder: Path, profile: StoredProfile) -> Path:
    """Return the path of the baseline that a profile replaces, or of a new one.

    The earlier version may have another name: that of `--name`, or of an earlier release.
    """
    record = profile.record()
    own = profile_path(folder, record)
    if is_stored(own) and _is_version(profile, own):
        return own
    earlier = [
        path
        for path, about in baselines_in(folder, ProfileRecord.KIND)
        if path != own and _can_be(record.provenance, about) and _is_version(profile, path)
    ]
    return earlier[0] if len(earlier) == 1 else own


def _is_version(profile: StoredProfile, path: Path) -> bool:
    with contextlib.suppress(RecordError):
        return identity_difference(profile, read_profile(path)) is None
    return False


def _can_be(new: Provenance, old: Provenance) -> bool:
    """Return whether names and sources of a baseline are those of a run or of earlier releases."""
    sources = (
        (known(new.model.source), known(old.model.source)),
        (new.corpus.source, old.corpus.source),
    )
    names = (
        (known(new.model.name), known(old.model.name)),
        (new.corpus.name, old.corpus.name),
    )
    return all(
        own is not None and theirs is not None and same_source(own, theirs)
        for own, theirs in sources
    ) and all(own == theirs or f"{own}".endswith(f"--{theirs}") for own, theirs in names)


def _stage_run(target: RunFolder, run: Path, path: Path, profile: StoredProfile) -> None:
    """Stage the files of a run as they are, because their hashes cover every key."""
    text = to_json(read_plain(run / "profile.json", ProfileRecord)) + "\n"
    arrays = read_arrays_file(run / f"profile{ARRAYS}")
    if isinstance(profile.rows, StoredRows):
        with target.staged(path.with_suffix(ROWS).name) as staged:
            profile.rows.copy_to(staged)
    target.write(path.with_suffix(ARRAYS).name, arrays)
    target.write(path.name, text)


def _store(
    path: Path, profile: StoredProfile, stage: Callable[[RunFolder], object], replace: bool
) -> StoredProfile | None:
    """Write all files of a baseline, or none; return the baseline that they replace."""
    names = (path.with_suffix(ARRAYS).name, path.name)
    before = None
    rows = path.with_suffix(ROWS).name  # runs of earlier releases have none
    with RunFolder(
        path.parent, names, optional=[rows], overwrite=True, wait=ACCEPT_WAITS
    ) as target:
        # A broken baseline, and with --replace one of a newer release, is replaced unread.
        if path.exists():
            with contextlib.suppress(RecordError if replace else BrokenRecordError):
                before = read_profile(path)
        if before is not None and not replace:
            _check_identity(path, profile, before)
        stage(target)
    return before


def _check_identity(path: Path, profile: StoredProfile, before: StoredProfile) -> None:
    difference = identity_difference(profile, before)
    if difference is not None:
        model, corpus = path.parent.name, path.name.removesuffix(f".{ProfileRecord.KIND}.json")
        raise RecordError(
            f"{path} is the baseline of {difference.in_words()}; keep both with `cascade accept "
            f"RUN --name {difference.free_name(model, corpus)}`, or replace it with --replace"
        )
