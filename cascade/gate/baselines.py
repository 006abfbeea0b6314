"""Baselines: their paths, their seals, and reading them with checks."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from cascade.core.arrays import Array
from cascade.core.display import Displayed
from cascade.core.errors import BrokenRecordError, RecordError, first_line
from cascade.core.files import AnyPath
from cascade.core.names import file_name
from cascade.core.records import (
    Record,
    arrays_hash,
    at,
    packed,
    read_arrays,
    read_plain,
    record_hash,
    to_json,
    typed,
)
from cascade.core.run_folder import RunFolder
from cascade.core.schema import UNSET, known, to_plain
from cascade.saturation.long_statistics import LongStatistics
from cascade.saturation.records import ProfileRecord
from cascade.saturation.row_files import ROWS_HASH, RowWriter, StoredRows
from cascade.stats.sequence_rows import ARRAYS as OLD_ROWS
from cascade.stats.sequence_rows import Rows, SequenceRows
from cascade.stats.token_statistics import TokenStatistics

if TYPE_CHECKING:  # it needs torch, which comparing records does without
    from cascade.saturation.profile import SaturationProfile

#: The endings of the files next to a profile's or baseline's `.json`.
ARRAYS, ROWS = ".npz", ".parquet"

#: The files of a profile in the folder of a run.
PROFILE_FILES = ("profile.json", f"profile{ARRAYS}", f"profile{ROWS}")

#: The first schema with rows in a file of their own.
ROWS_SINCE = 3

#: Seconds that `accept` waits for another process that stores a baseline of the same model.
ACCEPT_WAITS = 60.0


def baseline_paths(
    folder: Path, kind: str, *, model: str | None, corpus: str | None
) -> tuple[Path, Path]:
    """Return where a baseline is stored: `<model>/<corpus>.<kind>.json`, and the same as `.npz`.

    Args:
        folder: The folder of all baselines.
        kind: "saturation" or "budgets".
        model: The name of the model.
        corpus: The name of the corpus.

    Raises:
        RecordError: A name is missing or would lead out of the folder.

    Example:
        >>> baseline_paths(Path("baselines"), "budgets", model="tiny", corpus="texts")[0].as_posix()
        'baselines/tiny/texts.budgets.json'
    """
    for name in (model, corpus):
        # Names of `file_name` are valid on every system, and stay in their folder.
        if not name or file_name(name) != unicodedata.normalize("NFC", name).lower():
            raise RecordError(
                f"expected the provenance to name model and corpus, got {name!r}; measure again"
            )
    stem = f"{corpus}.{kind}"
    return folder / f"{model}" / f"{stem}.json", folder / f"{model}" / f"{stem}.npz"


def profile_path(folder: Path, record: ProfileRecord) -> Path:
    """Return the path of a profile's baseline, its `.json`.

    Args:
        folder: The folder of all baselines.
        record: The profile.

    Raises:
        RecordError: A name is missing or would lead out of the folder.
    """
    about = record.provenance
    names = {"model": known(about.model.name), "corpus": about.corpus.name}
    return baseline_paths(folder, ProfileRecord.KIND, **names)[0]


# --- Profiles --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class StoredProfile(Displayed):
    """A profile as stored in its three files.

    Attributes:
        content: The content of `profile.json`.
        state: The content of `profile.npz`: histograms and fingerprints.
        rows: The content of `profile.parquet`: one row per sequence and layer, of which only those
            are read that are asked for. Profiles of earlier releases have them in `profile.npz`.

    Example:
        >>> from cascade import analyze, load
        >>> profile = analyze(load("smollm2-135m"), ["One text."] * 20, seq_len=8)
        >>> stored = StoredProfile(profile.record(), profile.arrays(), profile.rows)
        >>> stored.record() == profile.record()
        True
    """

    content: ProfileRecord
    state: dict[str, Array]
    rows: Rows

    def record(self) -> ProfileRecord:
        """Return the record: provenance and tables."""
        return self.content

    def arrays(self) -> dict[str, Array]:
        """Return the state of the statistics of all tokens."""
        return self.state

    def _to_show(self) -> tuple[ProfileRecord, dict[str, Array]]:
        return self.content, self.state

    def _in_one_line(self) -> str:
        return self.content._in_one_line()


def seal(record: ProfileRecord, arrays: Mapping[str, Array]) -> ProfileRecord:
    """Return a record with hashes that reveal an edit or the arrays of another run.

    Args:
        record: The profile, sealed or not.
        arrays: The arrays stored next to it.
    """
    bound = replace(
        record, schema=ProfileRecord.SCHEMA, arrays_hash=arrays_hash(arrays), hash=UNSET
    )
    return replace(bound, hash=record_hash(to_plain(bound)))


def stage_profile(
    folder: RunFolder, profile: SaturationProfile | StoredProfile, stem: str = "profile"
) -> ProfileRecord:
    """Stage the three files of a profile, and return its sealed record.

    Args:
        folder: The folder of the run or baseline.
        profile: The profile. Rows that it has in the staged file already stay there.
        stem: The name of the files, without their endings.

    Raises:
        OutputError: The disk is full, or the folder was removed.
    """
    arrays = dict(profile.arrays())
    with folder.staged(f"{stem}{ROWS}") as path:
        arrays[ROWS_HASH] = _write_rows(path, profile)
    record = seal(profile.record(), arrays)
    folder.write(f"{stem}{ARRAYS}", packed(arrays))
    folder.write(f"{stem}.json", to_json(to_plain(record)) + "\n")
    return record


def _write_rows(path: Path, profile: SaturationProfile | StoredProfile) -> Array:
    """Write the rows of a profile to a file, and return the hashes of its groups."""
    rows = profile.rows
    if isinstance(rows, StoredRows):
        if rows.path != path:
            rows.copy_to(path)
        return rows.hashes
    arrays = profile.arrays()
    prints = np.asarray(arrays["sequence_fingerprint"])
    with RowWriter(path, [str(label) for label in arrays["layers"]]) as writer:
        for batch in rows.batches():
            writer.add(batch, prints[batch.numbers])
    return writer.hashes


def read_profile(path: AnyPath) -> StoredProfile:
    """Read a profile or a baseline, and check that it has not changed since it was written.

    Its rows are checked where they are read, so that a few of many take no time.

    Args:
        path: The `.json` file, with its `.npz` and `.parquet` next to it, or the folder of a run.

    Raises:
        BrokenRecordError: A file is torn or edited or contains NaN, a layer appears twice, or the
            files come from different runs.
        RecordError: The record is missing or has a newer schema.

    Example:
        >>> from cascade.gate.baseline_lookup import shipped_baselines
        >>> folder = shipped_baselines() / "smollm2-135m-instruct-q4_1"
        >>> baseline = read_profile(folder / "embedded.saturation.json")
        >>> baseline.record().thresholds.exit_layer
        '29'
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / "profile.json"
    record = read_plain(path, ProfileRecord)
    arrays = read_arrays(path.with_suffix(ARRAYS))
    # Schema 1 had no seal. A sealed record with schema 1 was edited.
    if record["schema"] >= 2 or {"hash", "arrays_hash"} & record.keys():
        _check_seal(path, record, arrays)
    for origin in ("model", "corpus"):
        if not isinstance(at(record, ("provenance", origin)), dict):
            raise BrokenRecordError(
                f"{path} has no provenance of its {origin}; restore it, or run `cascade analyze` "
                "again"
            )
    rows = _read_rows(path, record["schema"], arrays)
    state = {name: values for name, values in arrays.items() if name not in OLD_ROWS}
    _check_table(path, record, state, rows)
    return StoredProfile(typed(record, ProfileRecord, path), state, rows)


def _read_rows(path: Path, schema: int, arrays: Mapping[str, Array]) -> Rows:
    """Return the rows of a profile, which records of schemas 1 and 2 have among their arrays."""
    try:
        layers = [str(label) for label in arrays["layers"]]
        if schema < ROWS_SINCE:
            return SequenceRows.joined([SequenceRows.from_arrays(arrays, len(layers))])
        hashes, sequences = arrays[ROWS_HASH], len(arrays["sequence_fingerprint"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _torn(path, error) from error
    return StoredRows(path.with_suffix(ROWS), layers, hashes, range(sequences))


def _torn(path: Path, error: Exception) -> BrokenRecordError:
    return BrokenRecordError(
        f"{path.with_suffix(ARRAYS)} is torn or edited ({first_line(error)}); run "
        "`cascade analyze` again"
    )


def _check_table(path: Path, record: Record, arrays: Mapping[str, Array], rows: Rows) -> None:
    """Raise unless the table of layers is the table of the arrays next to it."""
    try:
        table = TokenStatistics.of_arrays(arrays).table()
        long = LongStatistics.from_arrays(arrays)
        whole = len(arrays["sequence_fingerprint"]) == len(rows)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _torn(path, error) from error
    _check_long(path, record, long)
    layers = record.get("layers")
    if not isinstance(layers, list) or not all(isinstance(row, dict) for row in layers):
        raise BrokenRecordError(
            f"{path} has no table of layers; restore it, or run `cascade analyze` again"
        )
    labels = [row.get("layer") for row in layers]
    twice = sorted({str(label) for label in labels if labels.count(label) > 1})
    if twice:
        raise BrokenRecordError(
            f"expected every layer once in {path}, got layer {twice[0]} twice; restore it, or run "
            "`cascade analyze` again"
        )
    if not whole or to_plain(table) != layers:
        raise BrokenRecordError(
            f"{path} and {path.with_suffix(ARRAYS).name} are from different runs or contain NaN; "
            "run `cascade analyze` again"
        )


def _check_long(path: Path, record: Record, long: LongStatistics | None) -> None:
    """Raise unless the long sequences in the record are those of the arrays next to it."""
    of_arrays = {} if long is None else to_plain(long.record())
    of_record = record.get("long_context")
    if isinstance(of_record, dict) and of_record.get("sequences") == 0:
        of_record = None
    if (of_record or {}) != of_arrays:
        raise BrokenRecordError(
            f"{path} and {path.with_suffix(ARRAYS).name} have other long sequences; run "
            "`cascade analyze` again"
        )


def _check_seal(path: Path, record: Record, arrays: Mapping[str, Array]) -> None:
    """Raise unless the arrays are those that were stored with the record.

    The record's own hash is checked where the record is read.
    """
    for name, found in (("hash", record.get("hash")), ("arrays_hash", arrays_hash(arrays))):
        if found is None or record.get(name) != found:
            changed = path if name == "hash" else path.with_suffix(ARRAYS)
            raise BrokenRecordError(
                f"{changed} was changed after it was written (expected {name} "
                f"{str(record.get(name))[:19]}..., got {str(found)[:19]}...); restore it, or "
                "create both files again with `cascade analyze --output` and `cascade accept`"
            )
