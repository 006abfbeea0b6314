"""Baselines: sealed profiles, read with checks and stored."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from cascade.core.arrays import Array
from cascade.core.errors import RecordError, first_line
from cascade.core.files import RunFolder
from cascade.core.records import Record, at, read_arrays, read_record, record_hash, to_json
from cascade.stats.similarity_statistics import SimilarityStatistics

#: Held while a baseline is written; not beside it, which is somebody's git tree.
_LOCK = Path(tempfile.gettempdir()) / "cascade-baselines.lock"


def baseline_paths(folder: Path, record: Record) -> tuple[Path, Path]:
    """Return where the baseline of `record` is stored: `<model>/<corpus>.saturation.json`, `.npz`.

    Args:
        folder: The folder of all baselines.
        record: A record; its provenance names model and corpus.

    Raises:
        RecordError: A name is missing, or would lead out of the folder.
    """
    names = [at(record, ("provenance", part, "name")) for part in ("model", "corpus")]
    for name in names:
        if not isinstance(name, str) or not name or name[0] == "." or set(name) & set("/\\"):
            raise RecordError(
                f"expected the provenance to name model and corpus, got {name!r}; make it anew"
            )
    stem = f"{names[1]}.{record['kind']}"
    return folder / names[0] / f"{stem}.json", folder / names[0] / f"{stem}.npz"


# --- Profiles --------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredProfile:
    """A profile as its two files hold it.

    Attributes:
        content: What `profile.json` holds.
        state: What `profile.npz` holds: histograms, and one row per sequence.
    """

    content: Record
    state: dict[str, Array]

    def record(self) -> Record:
        """Return the record: provenance and tables."""
        return self.content

    def arrays(self) -> dict[str, Array]:
        """Return the statistics' whole state."""
        return self.state


def seal(record: Record, arrays: Mapping[str, Array]) -> Record:
    """Return a record with the hashes by which an edit, or another run's arrays, are noticed.

    Args:
        record: Of kind `saturation`.
        arrays: The arrays stored beside it.
    """
    bound = {name: value for name, value in record.items() if name != "hash"}
    bound["arrays_hash"] = _arrays_hash(arrays)
    return bound | {"hash": record_hash(bound)}


def _arrays_hash(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
        digest.update(values.tobytes())
    return f"sha256:{digest.hexdigest()}"


def read_profile(path: Path) -> StoredProfile:
    """Read a profile or a baseline, and make sure that nobody changed it since it was made.

    Args:
        path: Its `.json`, beside which its `.npz` lies, or the folder of a run.

    Raises:
        RecordError: A file is missing, torn or edited, of a newer schema, or holds NaN; a layer is
            there twice, or the two files are not of one run.
    """
    if path.is_dir():
        path = path / "profile.json"
    record = read_record(path, kind="saturation")
    arrays = read_arrays(path.with_suffix(".npz"))
    # The first schema had no seal; with one, an older number is an edit like any other.
    if record["schema"] >= 2 or {"hash", "arrays_hash"} & record.keys():
        _check_seal(path, record, arrays)
    for part in ("model", "corpus"):
        if not isinstance(at(record, ("provenance", part)), dict):
            raise RecordError(
                f"{path} does not say which {part} it is of; restore it, or run `cascade analyze` "
                "again"
            )
    try:
        table = SimilarityStatistics.from_arrays(arrays).table()
        fingerprints = len(arrays["sequence_fingerprint"])
        whole = fingerprints == len(arrays["sequence"]) == len(arrays["sequence_mean"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecordError(
            f"{path.with_suffix('.npz')} is torn or edited ({first_line(error)}); run "
            "`cascade analyze` again"
        ) from error
    rows = record.get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(
            f"{path} has no table of layers; restore it, or run `cascade analyze` again"
        )
    labels = [row.get("layer") for row in rows]
    twice = sorted({str(label) for label in labels if labels.count(label) > 1})
    if twice:
        raise RecordError(
            f"{path} has layer {twice[0]} twice, expected every layer once; restore it, or run "
            "`cascade analyze` again"
        )
    if not whole or table != rows:
        raise RecordError(
            f"{path} and {path.with_suffix('.npz').name} are not of one run, or hold NaN; run "
            "`cascade analyze` again"
        )
    return StoredProfile(record, arrays)


def _check_seal(path: Path, record: Record, arrays: Mapping[str, Array]) -> None:
    for name, found in (
        ("hash", _record_hash_of(record, path)),
        ("arrays_hash", _arrays_hash(arrays)),
    ):
        if record.get(name) != found:
            changed = path if name == "hash" else path.with_suffix(".npz")
            raise RecordError(
                f"{changed} was changed after it was made ({name} is {found[:19]}..., expected"
                f" {str(record.get(name))[:19]}...); restore it, or make both files anew with "
                "`cascade analyze --output` and `cascade accept`"
            )


def _record_hash_of(record: Record, path: Path) -> str:
    try:
        return record_hash(record)
    except ValueError as error:
        raise RecordError(
            f"{path} holds NaN or an infinite number, which no record is written with; restore it"
        ) from error


def accept(folder: Path, run: Path) -> tuple[Path, StoredProfile | None]:
    """Store a run's profile as the baseline of its model and corpus.

    Args:
        folder: The folder of all baselines.
        run: A folder that `cascade analyze --output` wrote.

    Returns:
        The baseline's path, and the one that it replaces, if there was one.

    Raises:
        RecordError: The run is missing, torn or edited, or its two files are not of one run.
        OutputError: The baseline cannot be written.
    """
    profile = read_profile(run / "profile.json")
    return store(folder, profile.content, (run / "profile.npz").read_bytes())


def store(folder: Path, record: Record, arrays: bytes) -> tuple[Path, StoredProfile | None]:
    """Write a baseline, both of its files or none.

    Args:
        folder: The folder of all baselines.
        record: A sealed record of kind `saturation`.
        arrays: The `.npz` beside it.

    Returns:
        The baseline's path, and the one that it replaces, if there was one that can be read.

    Raises:
        OutputError: The baseline cannot be written.
    """
    json_path, npz_path = baseline_paths(folder, record)
    before = None
    if json_path.exists():
        with contextlib.suppress(RecordError):  # what is torn is replaced, not compared with
            before = read_profile(json_path)
    # Both are on disk before either takes its place: a full disk leaves the old pair whole.
    names = (npz_path.name, json_path.name)
    # One writer at a time: two of them could leave one's table beside the other's arrays.
    with FileLock(_LOCK, mode=0o666), RunFolder(json_path.parent, names, overwrite=True) as target:
        target.write(npz_path.name, arrays)
        target.write(json_path.name, to_json(record) + "\n")
    return json_path, before
