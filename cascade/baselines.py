"""Records with provenance: written whole, read with care, and compared cell by cell."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade.errors import RecordError, first_line
from cascade.files import RunFolder, atomic_path, write_text
from cascade.statistics import SimilarityStatistics

Array = npt.NDArray[Any]
Record = dict[str, Any]

#: The newest schema this release reads and the one it writes.
SCHEMA = 1

#: Largest differences that arithmetic explains, fp32, same weights and same tokens: other thread
#: counts, batch sizes and attention kernels move a layer's mean by up to 2e-7 and another
#: processor's by some 1e-5; minimum and maximum are single tokens and move more.
TOLERANCE = 1e-4
EXTREME_TOLERANCE = 2e-3

#: The command that makes a record, by its kind.
_MADE_BY = {
    "saturation": "analyze --output",
    "calibration": "calibrate --output",
    "evaluation": "evaluate --output",
    "budgets": "accept",
}

#: Two results are comparable only where all of these agree.
_IDENTITY = (
    ("model", "weights_hash"),
    ("model", "quantization"),
    ("model", "dtype"),
    ("tokenizer_hash",),
    ("corpus", "fingerprint"),
)


def to_json(value: Any, indent: int = 0) -> str:
    """Return JSON for people: one line per row of a table, so that a diff shows what moved.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    pad = " " * (indent + 1)
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        items = [f"{pad}{json.dumps(k)}: {to_json(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [f"{pad}{to_json(item, indent + 1)}" for item in value]
        return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
        ValueError: A number is NaN or infinite.
    """
    write_text(path, to_json(record) + "\n")


def read_record(path: Path, *, kind: str) -> Record:
    """Read a record of the given kind.

    Raises:
        RecordError: It is missing, torn, of another kind or of a newer schema.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        command = _MADE_BY.get(kind, kind)
        raise RecordError(f"no record {path}; make one with `cascade {command}`") from None
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(
            f"{path} is torn or edited ({error}); restore it or make it anew"
        ) from error
    if not isinstance(record, dict) or record.get("kind") != kind:
        got = record.get("kind") if isinstance(record, dict) else type(record).__name__
        raise RecordError(f"{path}: expected a {kind} record, got {got}")
    schema = record.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RecordError(
            f"{path} has schema {schema}, this release reads up to {SCHEMA}; "
            "use the release that wrote it, or make it anew"
        )
    return record


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays as a compressed `.npz`, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, Array]:
    """Read an `.npz`.

    Raises:
        RecordError: It is missing or torn.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise RecordError(f"no file {path}; it belongs beside its .json record") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path} is torn ({error}); restore it or make it anew") from error


def baseline_paths(folder: Path, record: Record) -> tuple[Path, Path]:
    """Return where the baseline of `record` is stored: `<model>/<corpus>.saturation.json`, `.npz`.

    Args:
        folder: The folder of all baselines.
        record: A record; its provenance names model and corpus.

    Raises:
        RecordError: A name is missing, or would lead out of the folder.
    """
    names = [_at(record, ("provenance", part, "name")) for part in ("model", "corpus")]
    for name in names:
        if not isinstance(name, str) or not name or name[0] == "." or set(name) & set("/\\"):
            raise RecordError(
                f"expected the provenance to name model and corpus, got {name!r}; make it anew"
            )
    stem = f"{names[1]}.{record['kind']}"
    return folder / names[0] / f"{stem}.json", folder / names[0] / f"{stem}.npz"


@dataclass(frozen=True)
class Cell:
    """One statistic of one layer, against its baseline; NaN where a side lacks it."""

    layer: str
    statistic: str
    expected: float
    obtained: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Obtained minus expected."""
        return self.obtained - self.expected

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance; a missing value or NaN never is."""
        return abs(self.difference) <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """A record against its baseline.

    Attributes:
        mismatches: What makes the two not comparable: name, expected, obtained.
        cells: Every statistic of every layer of either side.
    """

    mismatches: tuple[tuple[str, Any, Any], ...]
    cells: tuple[Cell, ...]

    @property
    def verdict(self) -> str:
        """PASS, FAIL or NOT COMPARABLE."""
        if self.mismatches:
            return "NOT COMPARABLE"
        return "PASS" if self.cells and all(cell.ok for cell in self.cells) else "FAIL"

    def describe(self, worst: int = 10) -> str:
        """Return verdict first, then what differs: provenance, or the worst cells.

        Args:
            worst: How many cells to show.
        """
        if self.mismatches:
            return "\n".join(
                [self.verdict, *(f"  {n}: expected {e}, got {o}" for n, e, o in self.mismatches)]
            )
        failed = [cell for cell in self.cells if not cell.ok]
        lines = [f"{self.verdict}: {len(failed)} of {len(self.cells)} cells beyond tolerance"]
        for cell in sorted(failed, key=_badness, reverse=True)[:worst]:
            lines.append(
                f"  layer {cell.layer:>7} {cell.statistic:<15} expected {cell.expected:>10.6f}  "
                f"got {cell.obtained:>10.6f}  difference {cell.difference:>+10.6f}  "
                f"tolerance {cell.tolerance:g}"
            )
        if len(failed) > worst:
            lines.append(f"  ... and {len(failed) - worst} more")
        return "\n".join(lines)


def _badness(cell: Cell) -> float:
    excess = abs(cell.difference) / cell.tolerance if cell.tolerance else abs(cell.difference)
    return math.inf if math.isnan(excess) else excess


def compare(record: Record, baseline: Record) -> Comparison:
    """Compare two saturation records of the same sequences: nothing is random between them.

    Layers and statistics are the union of both sides: what one side lacks is a failure, and so
    is NaN.

    Args:
        record: The new result.
        baseline: The stored one.
    """
    mismatches = tuple(
        (".".join(path), expected, obtained)
        for path in _IDENTITY
        if (expected := _at(baseline, ("provenance", *path)))
        != (obtained := _at(record, ("provenance", *path)))
    )
    return Comparison(mismatches, tuple(_cells(_rows(record), _rows(baseline))))


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _cells(new: list[Record], old: list[Record]) -> Iterator[Cell]:
    rows = [_by_layer(new), _by_layer(old)]
    for layer in dict.fromkeys([*rows[1], *rows[0]]):
        obtained, expected = (side.get(layer, {}) for side in rows)
        for statistic in dict.fromkeys([*expected, *obtained]):
            if statistic != "layer":
                yield Cell(
                    layer,
                    statistic,
                    _number(expected.get(statistic)),
                    _number(obtained.get(statistic)),
                    _tolerance(statistic),
                )


def _rows(record: Record) -> list[Record]:
    rows = record.get("layers")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "layer" in r for r in rows):
        raise RecordError("expected a list of layers in the record; restore it or make it anew")
    return rows


def _by_layer(rows: list[Record]) -> dict[str, Record]:
    found = {str(row["layer"]): row for row in rows}
    if len(found) != len(rows):
        raise RecordError("a layer appears twice in a record; restore it or make it anew")
    return found


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _tolerance(statistic: str) -> float:
    if statistic == "count":
        return 0.0
    return EXTREME_TOLERANCE if statistic in ("min", "max") else TOLERANCE


def accept(folder: Path, run: Path) -> tuple[Path, Comparison | None]:
    """Store a run's profile as the baseline of its model and corpus.

    Args:
        folder: The folder of all baselines.
        run: A folder that `cascade analyze --output` wrote.

    Returns:
        The baseline's path, and how the run compares with the one before, if there was one.

    Raises:
        RecordError: The run is missing or torn, or its two files are not of one run.
        OutputError: The baseline cannot be written.
    """
    record = read_record(run / "profile.json", kind="saturation")
    arrays = read_arrays(run / "profile.npz")
    try:
        same = SimilarityStatistics.from_arrays(arrays).table() == record["layers"]
        text = to_json(record) + "\n"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecordError(
            f"{run}: profile.json or profile.npz is torn or edited ({first_line(error)}); "
            "run `cascade analyze` again"
        ) from error
    if not same:
        raise RecordError(
            f"{run}: profile.npz and profile.json are not of one run; run `cascade analyze` again"
        )
    json_path, npz_path = baseline_paths(folder, record)
    before = None
    if json_path.exists():
        before = compare(record, read_record(json_path, kind="saturation"))
    # Both are on disk before either takes its place: a full disk leaves the old pair whole.
    names = (npz_path.name, json_path.name)
    with RunFolder(json_path.parent, names, overwrite=True) as store:
        store.write(npz_path.name, (run / "profile.npz").read_bytes())
        store.write(json_path.name, text)
    return json_path, before
