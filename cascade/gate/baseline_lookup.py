"""Where a baseline is looked up: in a project's own folder, then among those that ship with us."""

from __future__ import annotations

from pathlib import Path

from cascade.gate.baselines import baseline_paths

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


def find_baseline(
    folder: Path | None, kind: str, *, model: str | None, corpus: str | None, local: Path = LOCAL
) -> Path:
    """Return the path of a baseline: the project's own, or else the one that ships with us.

    Args:
        folder: The folder of all baselines, where the user names one; only this folder is searched.
        kind: "saturation" or "budgets". Only saturation baselines ship with the package.
        model: The name of the model.
        corpus: The name of the corpus.
        local: The project's own folder of baselines, which is searched first.

    Returns:
        The `.json` that was found; where there is none, the path in `folder` or `local` that it
        would have.

    Raises:
        RecordError: A name is missing, or would lead out of the folder.

    Example:
        >>> find_baseline(None, "saturation", model="tiny", corpus="texts").as_posix()
        'baselines/tiny/texts.saturation.json'
    """
    own, _ = baseline_paths(folder or local, kind, model=model, corpus=corpus)
    shipped = shipped_baselines()
    if folder is not None or own.exists() or kind != "saturation" or shipped is None:
        return own
    found, _ = baseline_paths(shipped, kind, model=model, corpus=corpus)
    return found if found.exists() else own


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
