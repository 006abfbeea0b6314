"""Files of remote baselines: which belong together, and whether they are whole and unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cascade.core.errors import BrokenRecordError, RecordError
from cascade.core.reading import UnreadableError, read_json
from cascade.core.records import check_hash

_PROFILE, _ARRAYS = ".saturation.json", ".saturation.npz"


def belonging(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the files that make up each baseline: a profile has its arrays next to it.

    Args:
        names: The names of all files. Arrays without a profile are left out.

    Returns:
        For each baseline its `.json` or its exit heads, and all of its files.

    Example:
        >>> belonging(["m/a.saturation.npz", "m/a.saturation.json"])
        {'m/a.saturation.json': ('m/a.saturation.json', 'm/a.saturation.npz')}
    """
    known = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(known):
        if name.endswith(_ARRAYS):
            continue
        arrays = f"{name.removesuffix(_PROFILE)}{_ARRAYS}"
        has_arrays = name.endswith(_PROFILE) and arrays in known
        found[name] = (name, arrays) if has_arrays else (name,)
    return found


def check_baseline(path: Path) -> None:
    """Raise unless a baseline's files are whole and as they were written.

    A record of a newer release passes if its hash is right: its reader refuses it by name.

    Args:
        path: The `.json`, with its `.npz` next to it, or the `.heads.safetensors`.

    Raises:
        RecordError: A file is torn, was changed after it was written, or belongs to another run.
    """
    if path.suffix == ".safetensors":
        from cascade.exits.fitted_heads import read_heads

        read_heads(path)
        return
    _check_seal(path)
    try:
        if path.name.endswith(_PROFILE):
            from cascade.gate.baselines import read_profile

            read_profile(path)
        elif path.name.endswith(".budgets.json"):
            from cascade.gate.budgets import read_budgets

            read_budgets(path)
    except BrokenRecordError:
        raise
    except RecordError:  # of a newer release
        return


def _check_seal(path: Path) -> None:
    try:
        record = read_json(path)
    except UnreadableError as error:
        raise BrokenRecordError(f"{path} is torn or edited ({error})") from error
    if not isinstance(record, dict):
        raise BrokenRecordError(f"{path} is torn or edited (expected a record)")
    check_hash(record, path)
