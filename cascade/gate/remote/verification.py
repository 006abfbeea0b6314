"""Files of remote baselines: which belong together, and whether they are whole and unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cascade.core.errors import BrokenRecordError, RecordError
from cascade.core.reading import UnreadableError, read_json
from cascade.core.records import check_hash

_PROFILE = ".saturation.json"

#: The files next to a profile, if it has them: profiles of earlier releases have no rows.
_BESIDE = (".saturation.npz", ".saturation.parquet")


def belonging(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the files that make up each baseline: a profile has its arrays and rows next to it.

    Args:
        names: The names of all files. Those next to no profile are left out.

    Returns:
        For each baseline its `.json` or its exit heads, and all of its files.

    Example:
        >>> belonging(["m/a.saturation.npz", "m/a.saturation.json", "m/b.saturation.parquet"])
        {'m/a.saturation.json': ('m/a.saturation.json', 'm/a.saturation.npz')}
    """
    known = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(known):
        if name.endswith(_BESIDE):
            continue
        beside = [f"{name.removesuffix(_PROFILE)}{ending}" for ending in _BESIDE]
        is_profile = name.endswith(_PROFILE)
        found[name] = (name, *(one for one in beside if is_profile and one in known))
    return found


def check_baseline(path: Path) -> None:
    """Raise unless a baseline's files are whole and as they were written.

    A record of a newer release passes if its hash is right: its reader refuses it by name.

    Args:
        path: The `.json`, with the other files of a profile next to it, or the
            `.heads.safetensors`.

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

            for _ in read_profile(path).rows.batches():  # checked while they are read
                pass
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
