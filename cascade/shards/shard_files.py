"""The files of a measured shard, and reading them with checks."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError, OutputError, RecordError, first_line, os_reason
from cascade.core.files import files_below, flush_to_disk, staging_folder
from cascade.core.names import file_name
from cascade.core.records import arrays_hash, packed, read_arrays, read_typed, to_file
from cascade.core.schema import known
from cascade.saturation.row_files import ROWS_HASH, RowWriter, StoredRows
from cascade.shards.plan import Plan
from cascade.shards.records import ShardRecord
from cascade.stats.sequence_rows import SequenceRows
from cascade.stats.token_statistics import TokenStatistics

RECORD, STATE, ROWS = "shard.json", "state.npz", "rows.parquet"


@dataclass(frozen=True)
class StoredShard:
    """A measured shard.

    Attributes:
        folder: Its folder.
        record: The content of `shard.json`.
        tokens: The statistics of its tokens.
        rows: One row per sequence and layer, in a file.
    """

    folder: Path
    record: ShardRecord
    tokens: TokenStatistics
    rows: StoredRows


def read_shard(plan: Plan, number: int) -> StoredShard | None:
    """Read a measured shard; its rows are checked where they are read.

    Args:
        plan: The plan.
        number: The number of the shard.

    Returns:
        The shard; None if it was not measured.

    Raises:
        BrokenRecordError: A file is torn or edited.
        RecordError: A file is missing, or the shard is of another plan, model or version.
    """
    folder, shard = plan.shard_folder(number), plan.shard(number)
    if not folder.is_dir():
        return None
    try:
        record = read_typed(folder / RECORD, ShardRecord)
        state = read_arrays(folder / STATE)
    except BrokenRecordError as error:
        raise BrokenRecordError(f"{error}; or {_again(plan, number)}") from error
    except RecordError as error:
        raise RecordError(f"{error}; or {_again(plan, number)}") from error
    if record.plan_hash != plan.hash:
        raise RecordError(
            f"{folder / RECORD} is of another plan (expected hash {plan.hash[:19]}..., got "
            f"{record.plan_hash[:19]}...): its model, corpus, edges or batches differ; "
            f"{_again(plan, number)}"
        )
    if (record.number, record.first, record.end) != (number, shard.first, shard.end):
        raise RecordError(
            f"{folder / RECORD} is shard {record.number} of sequences {record.first:,} to "
            f"{record.end - 1:,}, expected shard {number} of {shard.first:,} to {shard.end - 1:,}; "
            f"{_again(plan, number)}"
        )
    check_versions(plan, record.versions, f"{folder / RECORD} was measured")
    if arrays_hash(state) != record.arrays_hash:
        raise BrokenRecordError(
            f"{folder / STATE} was changed after it was written (expected hash "
            f"{record.arrays_hash[:19]}..., got {arrays_hash(state)[:19]}...); "
            f"{_again(plan, number)}"
        )
    return StoredShard(folder, record, _tokens(plan, number, state), _rows(plan, number, state))


def _again(plan: Plan, number: int) -> str:
    return (
        f"remove {plan.shard_folder(number)} and run `cascade measure-shard {plan.folder} --shard "
        f"{number}`"
    )


def check_versions(plan: Plan, versions: Mapping[str, str], what: str) -> None:
    """Check that the versions that measured a shard are those of the plan.

    Args:
        plan: The plan.
        versions: The versions of Python and of every library that can change a result.
        what: What is checked, e.g. "shard 3 was measured".

    Raises:
        RecordError: A version is another one; the message names it.
    """
    expected = known(plan.record.provenance.versions) or {}
    differing = [name for name in expected if versions.get(name) != expected[name]]
    if differing:
        name = differing[0]
        raise RecordError(
            f"{what} with {name} {versions.get(name)}, expected {expected[name]} as in the plan "
            f"{plan.folder}; install that version and measure the shard again, or run `cascade "
            "plan` again"
        )


def _tokens(plan: Plan, number: int, state: Mapping[str, Array]) -> TokenStatistics:
    shard, length = plan.shard(number), plan.record.provenance.corpus.seq_len
    try:
        tokens = TokenStatistics.of_arrays(state)
        if list(tokens.layers) != plan.record.layers:
            raise ValueError("expected the layers of the plan")
        if not np.array_equal(tokens.edges, plan.edges):
            raise ValueError("expected the bin edges of the plan")
        if tokens.count != len(shard.sequences) * length:
            raise ValueError(f"expected {len(shard.sequences) * length:,} tokens")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BrokenRecordError(
            f"{plan.shard_folder(number) / STATE} is torn or edited ({first_line(error)}); "
            f"{_again(plan, number)}"
        ) from error
    return tokens


def _rows(plan: Plan, number: int, state: Mapping[str, Array]) -> StoredRows:
    path = plan.shard_folder(number) / ROWS
    hashes = state.get(ROWS_HASH, np.zeros((0, 0), np.uint8))
    try:
        return StoredRows(path, plan.record.layers, hashes, plan.shard(number).sequences)
    except BrokenRecordError as error:
        raise BrokenRecordError(f"{error}; or {_again(plan, number)}") from error
    except RecordError as error:
        raise RecordError(f"{error}; or {_again(plan, number)}") from error


def write_shard(
    plan: Plan,
    record: ShardRecord,
    tokens: TokenStatistics,
    rows: SequenceRows,
    fingerprints: Array,
) -> bool:
    """Write a measured shard: all of its files, or none.

    Args:
        plan: The plan.
        record: The shard's record, with any hash of arrays.
        tokens: The statistics of its tokens.
        rows: One row per sequence and layer.
        fingerprints: `[S]`, the fingerprint of each sequence.

    Returns:
        False if another process has completed the shard in the meantime.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    from msgspec.structs import replace

    folder = plan.shard_folder(record.number)
    # What a killed process left behind is removed by the next one on the same machine. Locks of a
    # shared folder do not say whether a process of another machine lives.
    prefix = f".{folder.name}-{file_name(socket.gethostname())}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder.parent, prefix) as staging:
            made = staging / folder.name
            made.mkdir()
            with RowWriter(made / ROWS, plan.record.layers) as writer:
                writer.add(rows, fingerprints)
            state = tokens.token_arrays() | {ROWS_HASH: writer.hashes}
            (made / STATE).write_bytes(packed(state))
            content = to_file(replace(record, arrays_hash=arrays_hash(state)))
            (made / RECORD).write_text(content, encoding="utf-8", newline="\n")
            for path in (*files_below(made), made):
                flush_to_disk(path)
            try:
                made.rename(folder)
            except OSError:
                if folder.is_dir():
                    return False
                raise
            flush_to_disk(folder.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {os_reason(error)}; free some space or make it writable, and "
            "measure the shard again"
        ) from error
    return True
