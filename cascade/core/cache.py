"""The cache folder of the package: what it stores there, and how to clear it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.core.errors import OutputError, UsageError, os_reason

#: Folder in the cache -> what it stores.
KINDS = {
    "baselines": "copies of baselines that live elsewhere",
    "offload": "weights that a device map keeps on disk, of processes that were killed",
    "weights": "dequantized copies of .gguf files",
    "noise": "noise floors of models on this machine",
    "kernels": "compiled layers, and the times of kernels and passes on this machine",
}


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder in the cache.

    Attributes:
        name: Its path inside the cache folder, e.g. "noise/0123.json".
        kind: The folder that it is in, a key of `KINDS`.
        path: Its full path.
        size: In bytes, with everything inside.
    """

    name: str
    kind: str
    path: Path
    size: int


def cache_folder() -> Path:
    """Return the user's cache folder of this package (`CASCADE_CACHE` overrides it)."""
    import platformdirs

    override = os.environ.get("CASCADE_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("cascade-exit"))


def cache_entries() -> list[CacheEntry]:
    """Return what the package stored in its cache folder, by kind and name.

    Raises:
        OutputError: The folder cannot be read.
    """
    folder = cache_folder()
    found = []
    for kind in KINDS:
        try:
            paths = sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []
            found += [
                CacheEntry(f"{kind}/{path.name}", kind, path, size_of(path))
                for path in paths
                if path.suffix != ".lock"
            ]
        except OSError as error:
            raise OutputError(
                f"cannot read {folder / kind}: {os_reason(error)}; make it readable, or set "
                "CASCADE_CACHE to another folder"
            ) from error
    return found


def size_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if not each.is_dir())


def entries_named(names: Iterable[str]) -> list[CacheEntry]:
    """Return the entries of the cache with these names or kinds.

    Args:
        names: Names such as "noise/0123.json", or kinds such as "noise".

    Raises:
        UsageError: The cache has no such entry.
    """
    entries = cache_entries()
    chosen: dict[str, CacheEntry] = {}
    for name in names:
        matching = [entry for entry in entries if name in (entry.name, entry.kind)]
        if not matching and name not in KINDS:
            known = ", ".join([*KINDS, *(entry.name for entry in entries)])
            raise UsageError(f"expected a name in the cache, one of {known}, got {name!r}")
        chosen |= {entry.name: entry for entry in matching}
    return list(chosen.values())


def clear(entries: Sequence[CacheEntry]) -> None:
    """Delete entries of the cache.

    Raises:
        OutputError: One cannot be deleted.
    """
    for entry in entries:
        try:
            if entry.path.is_dir():
                _remove_folder(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot delete {entry.path}: {os_reason(error)}; delete it yourself"
            ) from error


def _remove_folder(path: Path) -> None:
    """Delete a folder, all of it or nothing: what an interrupted deletion leaves is hidden."""
    from cascade.core.files import INCOMING, staging_folder

    if path.name.startswith(INCOMING):  # such a leftover
        shutil.rmtree(path)
        return
    with staging_folder(path.parent, INCOMING) as aside:
        path.rename(aside / path.name)
        shutil.rmtree(aside / path.name)


def hub_cache() -> Path:
    """Return the folder of models and datasets of the hub."""
    # As huggingface_hub finds it, without importing it: torch is all that `cascade env` loads.
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "huggingface" / "hub"
