"""Where a baseline is looked up: in a project's own folder, then among those that ship with us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.core.errors import RecordError
from cascade.core.names import recorded_name, same_source
from cascade.core.provenance import Provenance
from cascade.core.records import at, read_plain
from cascade.core.run_folder import is_stored, recover
from cascade.core.schema import SchemaError, from_plain, known
from cascade.gate.baselines import baseline_paths
from cascade.gate.records import BudgetsRecord
from cascade.saturation.records import ProfileRecord

#: The folder of a project's own baselines.
LOCAL = Path("baselines")

PACKAGE = Path(__file__).parents[1]


def shipped_baselines() -> Path | None:
    """Return the folder of the baselines that ship with the package.

    The wheel has them in `cascade/data/baselines`. In a source tree they are in `baselines/` at the
    top level, next to `pyproject.toml`.

    Returns:
        The folder; None for an installation without baselines.

    Example:
        >>> folder = shipped_baselines()
        >>> (folder / "smollm2-135m-instruct-q4_1/embedded.saturation.json").exists()
        True
    """
    if (PACKAGE / "data/baselines").is_dir():
        return PACKAGE / "data/baselines"
    top = PACKAGE.parent
    if (top / "pyproject.toml").is_file() and (top / "baselines").is_dir():
        return top / "baselines"
    return None


@dataclass(frozen=True)
class Sought:
    """What a baseline is looked up by, where its name is not enough.

    Attributes:
        model: The model as the user named it; None for one in memory.
        corpus: The corpus as the user named it.
        dtype: The dtype of the model.
        options: The corpus options that the user gave, under the names of `CorpusProvenance`.
    """

    model: str | None = None
    corpus: str | None = None
    dtype: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def has_text(self, about: Provenance, *, exactly: bool = False) -> bool:
        """Return whether a baseline has the options that the user gave, or can have them.

        Args:
            about: The provenance of the baseline. Records of earlier releases lack some options.
            exactly: Whether it must have all of them.
        """
        names = ("seq_len", "split", "config", "text_column", "seed")
        recorded = {name: known(getattr(about.corpus, name)) for name in names}
        return all(
            recorded[name] == value or (recorded[name] is None and not exactly)
            for name, value in self.options.items()
            if name in recorded
        )

    def is_by(self, about: Provenance) -> bool:
        """Return whether a baseline can be of the model and corpus, whatever its name."""
        return _agrees(self.model, known(about.model.source)) and _agrees(
            self.corpus, about.corpus.source
        )


def _agrees(sought: str | None, recorded: str | None) -> bool:
    if sought is None or recorded is None:
        return False
    # A moved folder with a general name is known by the parent that its name takes along.
    return same_source(sought, recorded) or "--" in recorded_name(recorded) == recorded_name(sought)


def find_baseline(
    folder: Path | None,
    kind: str,
    *,
    model: str | None,
    corpus: str | None,
    local: Path = LOCAL,
    sought: Sought | None = None,
) -> Path:
    """Return the path of a baseline: the project's own, or else the one that ships with us.

    A baseline is found by its name. If there is none of that name, or it is of another model or
    text, it is found by the sources in its record. So baselines with names of `cascade accept
    --name` and of earlier releases are found.

    Args:
        folder: The folder of all baselines, where the user names one; only this folder is searched.
        kind: "saturation" or "budgets". Only saturation baselines ship with the package.
        model: The name of the model.
        corpus: The name of the corpus.
        local: The project's own folder of baselines, which is searched first.
        sought: The sources, to find baselines with other names.

    Returns:
        The `.json` that was found; where there is none, the path in `folder` or `local` that it
        would have.

    Raises:
        RecordError: A name is missing, or would lead out of the folder; or several baselines are
            of this model and corpus.

    Example:
        >>> find_baseline(None, "saturation", model="tiny", corpus="texts").as_posix()
        'baselines/tiny/texts.saturation.json'
    """
    place = folder or local
    own, _ = baseline_paths(place, kind, model=model, corpus=corpus)
    if sought is not None:
        own = _by_record(place, kind, own, sought)
    shipped = shipped_baselines()
    if folder is not None or is_stored(own) or kind != "saturation" or shipped is None:
        return own
    found, _ = baseline_paths(shipped, kind, model=model, corpus=corpus)
    return found if found.exists() else own


def _by_record(folder: Path, kind: str, own: Path, sought: Sought) -> Path:
    """Return the baseline of the sought text: that of this name, or one with another name."""
    about = provenance_of_baseline(own) if is_stored(own) else None
    if is_stored(own) and about is None:  # torn, as its reader says
        return own
    fits = about is not None and sought.is_by(about) and sought.has_text(about)
    if about is not None and fits and sought.has_text(about, exactly=True):
        return own
    others = [one for one in baselines_in(folder, kind) if one[0] != own and sought.is_by(one[1])]
    found = [one for one in others if sought.has_text(one[1], exactly=True)]
    if not found and not fits:
        found = [one for one in others if sought.has_text(one[1])]
    if len(found) > 1:
        same = [one for one in found if known(one[1].model.dtype) == sought.dtype]
        found = same or found
    if len(found) > 1 and not is_stored(own):
        names = ", ".join(str(path) for path, _ in found)
        raise RecordError(
            f"expected one baseline of {sought.model} on {sought.corpus}, got {names}; name one "
            "with --baseline, or give its --split, --config, --text-column, --seed or --seq-len"
        )
    return found[0][0] if len(found) == 1 else own


def baselines_in(folder: Path, kind: str) -> Iterator[tuple[Path, Provenance]]:
    """Yield the path and the provenance of every readable baseline in a folder.

    Args:
        folder: The folder of all baselines.
        kind: "saturation" or "budgets".
    """
    for model in folder.glob("*/"):
        recover(model)
    for path in sorted(folder.glob(f"*/*.{kind}.json")):
        about = provenance_of_baseline(path)
        if about is not None:
            yield path, about


def provenance_of_baseline(path: Path) -> Provenance | None:
    """Return the provenance of a baseline of either kind; None if it cannot be read.

    Args:
        path: Its `.json`.
    """
    with contextlib.suppress(RecordError, SchemaError):
        if path.name.endswith(f".{BudgetsRecord.KIND}.json"):
            groups = read_plain(path, BudgetsRecord).get("groups")
            origin = groups[0].get("provenance") if groups else None
        else:
            origin = at(read_plain(path, ProfileRecord), ("provenance",))
        return from_plain(origin, Provenance)
    return None


def is_shipped(path: Path) -> bool:
    """Return whether a baseline is one of those that ship with the package.

    Args:
        path: Of a baseline, as `find_baseline` returns it.

    Example:
        >>> is_shipped(Path("baselines/tiny/texts.saturation.json"))
        False
    """
    shipped = shipped_baselines()
    # In our own source tree, the project's baselines are those that ship.
    return shipped not in (None, LOCAL.absolute()) and shipped in path.absolute().parents


def described(path: Path) -> str:
    """Return a baseline's path in words for the user: where it is, and whether it ships with us.

    Args:
        path: Of a baseline, as `find_baseline` returns it.

    Example:
        >>> described(Path("baselines/tiny/texts.saturation.json"))
        'baselines/tiny/texts.saturation.json'
    """
    from cascade import __version__

    return f"{path} (shipped with cascade {__version__})" if is_shipped(path) else str(path)
