"""Files of rows: the bits that were written, read a group at a time, each checked by its hash."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disk import largest_file

from cascade.core.errors import BrokenRecordError, RecordError
from cascade.saturation import row_files
from cascade.saturation.row_files import RowWriter, StoredRows, hashes_of, rows_hash
from cascade.stats.sequence_rows import SequenceRows

LAYERS = ["1", "2", "2+norm"]


def rows_of(count: int, first: int = 0, seed: int = 0) -> SequenceRows:
    draw = np.random.default_rng(seed)
    mean, square = draw.uniform(-1, 1, (2, count, 3))
    share = draw.integers(0, 9, (count, 3, 3)) / 8
    return SequenceRows(np.arange(first, first + count), mean, square, share)


def prints_of(rows: SequenceRows) -> Any:
    return rows.numbers.astype(np.uint64) * 7 + 1


def written(path: Path, rows: SequenceRows, sizes: list[int]) -> RowWriter:
    """Write rows in parts of some sizes, and the rest at the end."""
    with RowWriter(path, LAYERS) as writer:
        start = 0
        for size in [*sizes, len(rows)]:
            places = np.arange(start, min(start + size, len(rows)))
            writer.add(rows.read(places), prints_of(rows)[places])
            start += len(places)
    return writer


@given(st.integers(0, 30), st.lists(st.integers(1, 9), max_size=4), st.integers(1, 7))
@settings(max_examples=50)
def test_rows_are_read_as_they_were_written_in_any_parts(
    count: int, sizes: list[int], group: int
) -> None:
    rows = rows_of(count, first=5)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "GROUP", group)
        path, other = Path(folder, "a.parquet"), Path(folder, "b.parquet")
        hashes = written(path, rows, sizes).hashes
        written(other, rows, [])
        assert path.read_bytes() == other.read_bytes()
        stored = StoredRows(path, LAYERS, hashes, range(5, 5 + count))
        assert np.array_equal(stored.all().statistics(), rows.statistics())
        assert np.array_equal(stored.all().numbers, rows.numbers)
        places = np.random.default_rng(0).permutation(count)[:5]
        assert np.array_equal(stored.read(places).statistics(), rows.read(places).statistics())
        assert np.array_equal(stored.read(places).numbers, rows.numbers[places])
        assert sum(len(batch) for batch in stored.batches()) == count


def test_the_hashes_of_rows_in_memory_are_those_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "GROUP", 4)
    rows = rows_of(10)
    assert np.array_equal(
        hashes_of(rows, prints_of(rows)), written(tmp_path / "a", rows, []).hashes
    )


def test_only_the_groups_of_the_wanted_sequences_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "GROUP", 4)
    rows = rows_of(40)
    hashes = written(tmp_path / "a", rows, []).hashes
    stored = StoredRows(tmp_path / "a", LAYERS, hashes, range(40))
    read: list[int] = []
    group = stored.group
    monkeypatch.setattr(stored, "group", lambda number: read.append(number) or group(number))
    stored.read(np.array([39, 0, 1, 17]))
    assert read == [0, 4, 9]


def test_numbers_and_fingerprints_that_are_kept_hold_no_column(tmp_path: Path) -> None:
    rows = rows_of(6)
    hashes = written(tmp_path / "a", rows, []).hashes
    found, fingerprints = StoredRows(tmp_path / "a", LAYERS, hashes, range(6)).group(0)
    # A merge keeps them for all sequences.
    assert found.numbers.base is None
    assert fingerprints.base is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux, to count threads")
def test_reading_starts_no_thread_that_could_outlive_the_interpreter(tmp_path: Path) -> None:
    rows = rows_of(300)
    hashes = written(tmp_path / "a", rows, []).hashes
    code = f"""
import os, sys
from pathlib import Path
import numpy as np
import pyarrow.parquet
from cascade.saturation.row_files import StoredRows
hashes = np.frombuffer(bytes.fromhex("{hashes.tobytes().hex()}"), np.uint8).reshape(-1, 32)
before = set(os.listdir("/proc/self/task"))
stored = StoredRows(Path(r"{tmp_path / "a"}"), {LAYERS}, hashes, range(300))
print(len(stored.all()), set(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "300 set()\n"


def test_any_program_can_read_the_columns(tmp_path: Path) -> None:
    rows = rows_of(4)
    written(tmp_path / "a.parquet", rows, [])
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(table) == 12
    assert table[4] == {
        "sequence": 1,
        "layer": "2",
        "fingerprint": 8,
        "mean": rows.mean[1, 1],
        "mean_square": rows.mean_square[1, 1],
        "share_p10": rows.share[1, 1, 0],
        "share_p50": rows.share[1, 1, 1],
        "share_p90": rows.share[1, 1, 2],
    }


@pytest.mark.parametrize("column", ["numbers", "mean", "mean_square", "share", "fingerprints"])
def test_every_column_is_covered_by_the_hash(column: str) -> None:
    from dataclasses import replace

    rows = rows_of(3)
    prints = prints_of(rows)
    before = rows_hash(rows, prints)
    if column == "fingerprints":
        assert rows_hash(rows, prints + np.uint64(1)) != before
        return
    values = getattr(rows, column).copy()
    values.reshape(-1)[-1] += 1
    assert rows_hash(replace(rows, **{column: values}), prints) != before


def edited(path: Path, change: Any) -> None:
    table = pyarrow.parquet.read_table(path).to_pydict()
    change(table)
    fields = pyarrow.parquet.read_schema(path)
    pyarrow.parquet.write_table(
        pyarrow.table(table, schema=fields), path, row_group_size=len(table["mean"])
    )


BROKEN: dict[str, tuple[Any, str]] = {
    "a mean": (lambda t: t["mean"].__setitem__(4, 0.25), "sequences 0 to 5 have another hash"),
    "layers in another order": (
        lambda t: t["layer"].reverse(),
        "expected the layers in their order",
    ),
    "another number": (
        lambda t: t["sequence"].__setitem__(slice(0, 3), [9] * 3),
        "expected every sequence once",
    ),
    "two numbers in one sequence": (
        lambda t: t["sequence"].__setitem__(1, 9),
        "expected one sequence for all layers",
    ),
    "two fingerprints in one sequence": (
        lambda t: t["fingerprint"].__setitem__(1, 9),
        "expected one fingerprint for all layers",
    ),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_edited_rows_are_refused_where_they_are_read(
    tmp_path: Path, change: Any, words: str
) -> None:
    path = tmp_path / "a.parquet"
    hashes = written(path, rows_of(6), []).hashes
    edited(path, change)
    stored = StoredRows(path, LAYERS, hashes, range(6))
    for read in (stored.check, stored.all, lambda: stored.read(np.array([2]))):
        with pytest.raises(BrokenRecordError, match=words) as caught:
            read()
        assert str(path) in str(caught.value)


def test_a_file_with_other_sequences_or_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    hashes = written(path, rows_of(6), []).hashes
    with pytest.raises(BrokenRecordError, match="has 18 rows in 1 groups, expected 15 in 1"):
        StoredRows(path, LAYERS, hashes, range(5))
    with pytest.raises(BrokenRecordError, match="expected the hashes of 1 groups"):
        StoredRows(path, LAYERS, hashes[:0], range(6))
    with pytest.raises(BrokenRecordError, match="every sequence once, in ascending order"):
        StoredRows(path, LAYERS, hashes, range(1, 7)).check()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a Parquet file at all"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BrokenRecordError, match="is torn, edited or of another run"):
        StoredRows(tmp_path / "a", LAYERS, np.zeros((1, 32), np.uint8), range(6))
    with pytest.raises(RecordError, match="no rows"):
        StoredRows(tmp_path / "b", LAYERS, np.zeros((1, 32), np.uint8), range(6))


def test_a_large_file_is_mapped_and_a_small_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(30)
    hashes = written(tmp_path / "a", rows, []).hashes
    for small in (0, 1 << 24):
        monkeypatch.setattr(row_files, "_SMALL", small)
        stored = StoredRows(tmp_path / "a", LAYERS, hashes, range(30))
        assert np.array_equal(stored.all().statistics(), rows.statistics())


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with largest_file(500), pytest.raises(OSError, match="File too large"):
        written(tmp_path / "a", rows_of(300), [])
