"""Files of rows: one row for each sequence and layer, as Parquet, read a group at a time.

A group holds the rows of some thousand consecutive sequences and has a hash of its own. A reader
that needs a few sequences reads and checks only their groups.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError, RecordError, first_line
from cascade.core.files import open_regular
from cascade.core.run_folder import current
from cascade.stats.sequence_rows import QUANTILES, Rows, SequenceRows

if TYPE_CHECKING:
    import pyarrow

#: Sequences of one group. Files of the same rows have the same groups, however they were made.
GROUP = 2048

#: Smaller files are read into memory. Larger ones are mapped: they must not change while in use.
_SMALL = 1 << 24

#: The columns of the shares of each sequence.
_SHARES = tuple(f"share_p{round(100 * q)}" for q in QUANTILES)

#: Columns with few different values in a group.
_REPEATED = ("sequence", "layer", "fingerprint", *_SHARES)

#: The array of an `.npz` file that has the hash of each group of the rows next to it.
ROWS_HASH = "rows_hash"

#: Bytes of a group's hash, which is a SHA-256.
_HASH = 32


def rows_hash(rows: SequenceRows, fingerprints: Array) -> bytes:
    """Return the hash of the rows of one group; it does not depend on how they are stored.

    Args:
        rows: The rows.
        fingerprints: `[S]`, the fingerprint of each sequence.
    """
    digest = hashlib.sha256(f"{rows.share.shape}".encode())
    columns = (rows.numbers, fingerprints, rows.mean, rows.mean_square, rows.share)
    for column, kind in zip(columns, ("<i8", "<u8", "<f8", "<f8", "<f8"), strict=True):
        digest.update(np.ascontiguousarray(column, dtype=kind).data)
    return digest.digest()


def hashes_of(rows: Rows, fingerprints: Array) -> npt.NDArray[np.uint8]:
    """Return the hash of each group that a file of these rows has, `[G, 32]`.

    Args:
        rows: The rows, in memory or in a file, which knows them.
        fingerprints: The fingerprint of each sequence of the corpus, by its number.
    """
    if isinstance(rows, StoredRows):
        return rows.hashes
    found = rows.all()
    prints = np.asarray(fingerprints)[found.numbers]
    hashes = []
    for start in range(0, len(found), GROUP):
        places = np.arange(start, min(start + GROUP, len(found)))
        hashes.append(rows_hash(found.read(places), prints[places]))
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, _HASH)


# --- Writing ---------------------------------------------------------------------------------


class RowWriter:
    """Writes a file of rows inside a `with` block; rows are added in ascending order.

    Args:
        path: The file, which is replaced. It is not written atomically.
        layers: Row labels.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.parquet"
        >>> with RowWriter(path, ["1"]) as writer:
        ...     writer.add(SequenceRows.none(1), np.zeros(0, np.uint64))
        >>> writer.hashes.shape
        (0, 32)
    """

    def __init__(self, path: Path, layers: Sequence[str]) -> None:
        import pyarrow.parquet

        self.path = path
        self.layers = tuple(layers)
        self._hashes: list[bytes] = []
        self._waiting: list[tuple[SequenceRows, Array]] = []
        self._count = 0
        self._file = path.open("wb")
        self._writer = pyarrow.parquet.ParquetWriter(
            self._file,
            _schema(),
            compression="zstd",
            use_dictionary=list(_REPEATED),
            column_encoding=dict.fromkeys(("mean", "mean_square"), "BYTE_STREAM_SPLIT"),
            write_statistics=False,
        )

    @property
    def hashes(self) -> npt.NDArray[np.uint8]:
        """The hash of each group, `[G, 32]`, complete after the `with` block."""
        return np.frombuffer(b"".join(self._hashes), dtype=np.uint8).reshape(-1, _HASH)

    def add(self, rows: SequenceRows, fingerprints: Array) -> None:
        """Add rows of sequences.

        Args:
            rows: Rows in ascending order of their numbers, after those that were added before.
            fingerprints: `[S]`, the fingerprint of each sequence.
        """
        self._waiting.append((rows, fingerprints))
        self._count += len(rows)
        if self._count >= GROUP:
            self._write_groups(all_rows=False)

    def _write_groups(self, *, all_rows: bool) -> None:
        rows = SequenceRows.joined([some for some, _ in self._waiting])
        prints = np.concatenate([found for _, found in self._waiting])
        last = len(rows) if all_rows else len(rows) - len(rows) % GROUP
        for start in range(0, last, GROUP):
            places = np.arange(start, min(start + GROUP, last))
            self._write(rows.read(places), prints[places])
        rest = np.arange(last, len(rows))
        self._waiting, self._count = [(rows.read(rest), prints[rest])], len(rest)

    def _write(self, rows: SequenceRows, fingerprints: Array) -> None:
        table = _table(rows, fingerprints, self.layers)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._hashes.append(rows_hash(rows, fingerprints))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Write the last rows and close the file; after an error, only close it."""
        try:
            if kind is None:
                if self._waiting:
                    self._write_groups(all_rows=True)
                self._writer.close()
        finally:
            # Else Arrow would write the end of the file when the writer is collected.
            self._writer.is_open = False
            with contextlib.suppress(OSError):  # on a full disk, after its own error
                self._file.close()


def _schema() -> pyarrow.Schema:
    import pyarrow

    names = {"sequence": "int64", "layer": "string", "fingerprint": "uint64"}
    names |= dict.fromkeys(("mean", "mean_square", *_SHARES), "double")
    fields = [
        pyarrow.field(name, getattr(pyarrow, kind.replace("double", "float64"))(), nullable=False)
        for name, kind in names.items()
    ]
    return pyarrow.schema(fields)


def _table(rows: SequenceRows, fingerprints: Array, layers: Sequence[str]) -> pyarrow.Table:
    import pyarrow

    count = len(layers)
    places = np.tile(np.arange(count, dtype=np.int32), len(rows))
    labels = pyarrow.DictionaryArray.from_arrays(_column(places), _texts(layers))
    columns = {
        "sequence": np.repeat(rows.numbers, count),
        "fingerprint": np.repeat(np.asarray(fingerprints, dtype=np.uint64), count),
        "mean": rows.mean.ravel(),
        "mean_square": rows.mean_square.ravel(),
    } | {name: rows.share[..., place].ravel() for place, name in enumerate(_SHARES)}
    made = {name: _column(values) for name, values in columns.items()}
    made["layer"] = labels.cast(pyarrow.string())
    schema = _schema()
    return pyarrow.table([made[name] for name in schema.names], schema=schema)


# Arrow's own conversions from and to NumPy load pandas, where it is installed.


def _column(values: Array) -> Any:
    """Return numbers as an Arrow array without copying them."""
    import pyarrow

    values = np.ascontiguousarray(values)
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])


def _texts(texts: Sequence[str]) -> Any:
    """Return texts as an Arrow array."""
    import pyarrow

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    content = pyarrow.py_buffer(b"".join(encoded))
    return pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends), content)


def _values(column: Any) -> Array:
    """Return the numbers of an Arrow array without copying them."""
    if column.null_count:
        raise ValueError("expected no empty cells")
    kind = np.dtype(column.type.to_pandas_dtype())
    values = np.frombuffer(column.buffers()[1] or b"", dtype=kind)
    return values[column.offset : column.offset + len(column)]


# --- Reading ---------------------------------------------------------------------------------


class StoredRows:
    """Rows of all sequences of a corpus in a file; only the groups that are asked for are read.

    Sequence number n has place n - `first`.

    Args:
        path: The file.
        layers: Row labels.
        hashes: `[G, 32]`, the hash of each group.
        numbers: The numbers of the sequences.

    Raises:
        BrokenRecordError: The file is torn, or does not have these sequences and layers.
        RecordError: It is missing.
    """

    def __init__(self, path: Path, layers: Sequence[str], hashes: Array, numbers: range) -> None:
        self.path = path
        self.layers = tuple(layers)
        self.numbers = numbers
        self._hashes = np.asarray(hashes, dtype=np.uint8)
        groups = -(-len(numbers) // GROUP)
        if self._hashes.shape != (groups, _HASH):
            raise BrokenRecordError(
                f"{path}: expected the hashes of {groups} groups of rows next to it, got shape "
                f"{self._hashes.shape}; restore both files or make them again"
            )
        self._file = self._opened()

    def _opened(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        path = current(self.path)
        try:
            with open_regular(path) as file:
                small = path.stat().st_size <= _SMALL
                source = pyarrow.BufferReader(file.read()) if small else None
            if source is None:
                source = pyarrow.memory_map(str(path))
            found = pyarrow.parquet.ParquetFile(source, read_dictionary=["layer"])
            about = found.metadata
        except FileNotFoundError:
            raise RecordError(
                f"no rows {self.path}; restore this file, or make it again together with the "
                "record next to it"
            ) from None
        except Exception as error:  # Arrow raises many types for torn files
            raise self._broken(first_line(error)) from error
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        expected = [self._count(group) * len(self.layers) for group in range(len(self._hashes))]
        if sizes != expected:
            raise self._broken(
                f"it has {sum(sizes):,} rows in {len(sizes)} groups, expected {sum(expected):,} in "
                f"{len(expected)}"
            )
        return found

    def _broken(self, reason: str) -> BrokenRecordError:
        return BrokenRecordError(
            f"{self.path} is torn, edited or of another run ({reason}); restore it, or make it "
            "again together with the record next to it"
        )

    def _count(self, group: int) -> int:
        """Return the number of sequences in a group."""
        return min(GROUP, len(self.numbers) - group * GROUP)

    def __len__(self) -> int:
        return len(self.numbers)

    def group(self, number: int) -> tuple[SequenceRows, npt.NDArray[np.uint64]]:
        """Return the rows and the fingerprints of one group, after checking its hash.

        Args:
            number: The group's number, from 0.

        Raises:
            BrokenRecordError: The file was changed after it was written.
        """
        try:
            rows, fingerprints = self._decoded(number)
        except Exception as error:  # Arrow raises many types for torn files
            raise self._broken(first_line(error)) from error
        if rows_hash(rows, fingerprints) != self._hashes[number].tobytes():
            first = self.numbers[number * GROUP]
            last = self.numbers[number * GROUP + self._count(number) - 1]
            raise self._broken(f"the rows of sequences {first:,} to {last:,} have another hash")
        return rows, fingerprints

    def _decoded(self, number: int) -> tuple[SequenceRows, npt.NDArray[np.uint64]]:
        # Not in Arrow's threads: one that gives back Python's bytes at exit aborts the process.
        table = self._file.read_row_group(number, use_threads=False)
        count, layers = self._count(number), len(self.layers)

        def column(name: str) -> Array:
            return _values(table.column(name).combine_chunks()).reshape(count, layers)

        labels = table.column("layer").combine_chunks()
        names = np.array(labels.dictionary.to_pylist())[_values(labels.indices)]
        if not (names.reshape(count, layers) == np.array(self.layers)).all():
            raise ValueError("expected the layers in their order")
        once = []
        for name in ("sequence", "fingerprint"):
            values = column(name)
            if not (values == values[:, :1]).all():
                raise ValueError(f"expected one {name} for all layers of a sequence")
            once.append(values[:, 0].copy())  # a view would hold the column of all layers
        first = number * GROUP
        if not np.array_equal(once[0], np.asarray(self.numbers[first : first + count])):
            raise ValueError("expected every sequence once, in ascending order")
        share = np.stack([column(name) for name in _SHARES], axis=2)
        return SequenceRows(once[0], column("mean"), column("mean_square"), share), once[1]

    def read(self, places: Array) -> SequenceRows:
        """Return the rows of some sequences, as `Rows.read` does; only their groups are read."""
        places = np.asarray(places, dtype=np.int64)
        found = SequenceRows.none(len(self.layers))
        groups = places // GROUP
        parts, order = [found], [np.zeros(0, np.int64)]
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            parts.append(self.group(int(group))[0].read(places[mine] - group * GROUP))
            order.append(mine)
        back = np.argsort(np.concatenate(order), kind="stable")
        columns = ("numbers", "mean", "mean_square", "share")
        return SequenceRows(
            *(np.concatenate([getattr(part, name) for part in parts])[back] for name in columns)
        )

    @property
    def hashes(self) -> npt.NDArray[np.uint8]:
        """The hash of each group, `[G, 32]`."""
        return self._hashes

    def copy_to(self, path: Path) -> None:
        """Copy the file.

        Raises:
            OSError: The copy cannot be written.
        """
        shutil.copyfile(current(self.path), path)

    def groups(self) -> Iterator[tuple[SequenceRows, npt.NDArray[np.uint64]]]:
        """Yield the rows and the fingerprints of one group after the other."""
        for number in range(len(self._hashes)):
            yield self.group(number)

    def batches(self) -> Iterator[SequenceRows]:
        """Yield the rows of one group after the other, as `Rows.batches` does."""
        for rows, _ in self.groups():
            yield rows

    def all(self) -> SequenceRows:
        """Return the rows of all sequences, as `Rows.all` does."""
        return SequenceRows.joined([SequenceRows.none(len(self.layers)), *self.batches()])

    def close(self) -> None:
        """Give back the file or its memory. Without this, Arrow keeps both for a while."""
        self._file.close(force=True)

    def check(self) -> None:
        """Check the hash of every group.

        Raises:
            BrokenRecordError: The file was changed after it was written.
        """
        for number in range(len(self._hashes)):
            self.group(number)
