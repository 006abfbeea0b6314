"""Shards: Arrow files with one row per sequence. The hard mask is set after all are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.files import atomic_path, write_text, xxh3_of
from cascade.core.reading import read_bytes
from cascade.stats.decision import reaches

if TYPE_CHECKING:
    import datasets
    import pyarrow

#: The folder of the hashes of shards, while a collection is unfinished.
SEALS = "seals"

#: Storage dtype -> column type. Arrow has no bfloat16, so its bits are stored as int16.
STATE_DTYPES = {"float16": "float16", "bfloat16": "int16"}


_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


#: Types of the columns with one value per token, in addition to the states.
_PER_TOKEN = {
    "input_ids": "int32",
    "labels": "int32",
    "positions": "int32",
    "similarity": "float32",
    "hard": "bool",
    "response": "bool",
    "records": "int32",
}


#: Metadata key of a shard that holds the lowest similarity of an easy token.
_THRESHOLD = b"cascade.threshold"


#: Maximum number of state values in one record batch. Arrow counts them with 31 bits.
MOST_VALUES = 2**28


def features_of(seq_len: int, hidden_size: int, dtype: str) -> datasets.Features:
    """Return the columns of a shard as `datasets` features.

    Args:
        seq_len: Tokens per sequence, T.
        hidden_size: Width of a state, D.
        dtype: Storage dtype, one of `STATE_DTYPES`.
    """
    from datasets import Array2D, Features, Value
    from datasets import Sequence as Values

    return Features(
        {"states": Array2D((seq_len, hidden_size), STATE_DTYPES[dtype])}
        | {name: Values(Value(kind)) for name, kind in _PER_TOKEN.items()}
        | {"sequence": Value("int32")}
    )


def row_bytes(seq_len: int, hidden_size: int) -> float:
    """Return the size of one sequence on disk, in bytes.

    Args:
        seq_len: Tokens per sequence.
        hidden_size: Width of a state. Each value takes 2 bytes.
    """
    # Every list has an offset of 4 bytes, and so has every state in the list of states.
    per_token = 2 * hidden_size + 4 + 5 * 4 + 2 / 8
    return seq_len * per_token + 4 * (len(_PER_TOKEN) + 2)


def stored(states: Tensor, dtype: str) -> Array:
    """Return states in their storage format. Values too large for float16 become infinite.

    Args:
        states: States of any shape and dtype.
        dtype: Storage dtype, one of `STATE_DTYPES`.
    """
    half = states.to(_TORCH_DTYPES[dtype]).cpu()
    half = half.view(torch.int16) if dtype == "bfloat16" else half
    values: Array = half.numpy()
    return values


def write_shard(
    path: Path, features: datasets.Features, batches: Iterable[Mapping[str, Array]]
) -> None:
    """Write a shard atomically. Its hard mask is not set yet.

    Args:
        path: Output file.
        features: Columns, from `features_of`.
        batches: Columns `[B, T, D]`, `[B, T]` or `[B]` by name, all except `hard`.

    Raises:
        OutputError: The file cannot be written.
    """
    import pyarrow

    schema = features.arrow_schema
    with (
        atomic_path(path) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
    ):
        for batch in batches:
            size = max(1, MOST_VALUES // batch["states"][0].size)
            for start in range(0, len(batch["states"]), size):
                rows = {name: values[start : start + size] for name, values in batch.items()}
                rows["hard"] = np.zeros_like(rows["response"])
                columns = [_column(rows[field.name], field.type) for field in schema]
                writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))
    _seal(path)


def _seal_of(path: Path) -> Path:
    """Return the file that holds the hash of a shard while its collection is unfinished."""
    return path.parent.parent / SEALS / f"{path.parent.name}-{path.name}.xxh3"


def _seal(path: Path) -> None:
    write_text(_seal_of(path), xxh3_of(path))


def _column(values: Array, kind: Any) -> Any:
    import pyarrow

    column = pyarrow.array(values.reshape(-1))
    for size in values.shape[:0:-1]:  # the innermost lists first
        offsets = np.arange(0, len(column) + 1, size, dtype=np.int32)
        column = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), column)
    if isinstance(kind, pyarrow.ExtensionType):
        return pyarrow.ExtensionArray.from_storage(kind, column)
    return column


def write_split(
    folder: Path, names: Sequence[str], features: datasets.Features, *, made_of: str
) -> None:
    """Write the metadata files that `Dataset.save_to_disk` writes next to the shards of a split.

    Args:
        folder: Folder of the shards.
        names: File names of the shards, in order.
        features: Columns, from `features_of`.
        made_of: Text that is unique to this split. `datasets` finds cached results by it.

    Raises:
        OutputError: A file cannot be written.
    """
    from datasets import DatasetInfo

    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(made_of.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,  # `datasets` does not allow a hyphen in the name here
    }
    info = asdict(DatasetInfo(features=features))
    write_text(folder / "state.json", json.dumps(state, indent=2, allow_nan=False) + "\n")
    write_text(folder / "dataset_info.json", json.dumps(info, indent=2, allow_nan=False) + "\n")


def mark_hard(path: Path, least: float) -> None:
    """Set the hard mask of a shard. A shard that already has this mask is not changed.

    Args:
        path: The shard. It is replaced atomically.
        least: Lowest similarity of an easy token, an fp32 number.

    Raises:
        OutputError: The file cannot be written.
    """
    import pyarrow

    mark = repr(least).encode()
    with pyarrow.OSFile(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        if reader.schema.metadata.get(_THRESHOLD) == mark:
            return
        schema = reader.schema.with_metadata(reader.schema.metadata | {_THRESHOLD: mark})
        index = schema.get_field_index("hard")
        with (
            atomic_path(path) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as writer,
        ):
            for batch in reader:
                similarity = _values(batch.column("similarity")).reshape(batch.num_rows, -1)
                columns = batch.columns
                columns[index] = _column(~reaches(similarity, least), None)
                writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))
    _seal(path)


def read_similarity(path: Path) -> Array:
    """Return the similarity of every token of a shard, `[rows, T]` fp32. No states are read."""
    with _mapped(path) as table:
        column = table.column("similarity")
        return np.concatenate([_values(chunk) for chunk in column.chunks]).reshape(len(table), -1)


def holds(path: Path, sequences: range) -> bool:
    """Return whether a file is an unchanged shard of exactly these sequences, in order.

    Args:
        path: The shard of an unfinished collection.
        sequences: The numbers of its sequences.
    """
    try:
        if read_bytes(_seal_of(path), largest=100) != xxh3_of(path).encode():
            return False
        with _mapped(path) as table:
            return bool(table.column("sequence").to_pylist() == list(sequences))
    except (OSError, ValueError, KeyError):  # Arrow's own errors are OSErrors and ValueErrors
        return False


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[pyarrow.Table]:
    """Memory-map a shard inside a `with` block."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        yield pyarrow.ipc.open_stream(source).read_all()


def tensors_of(table: pyarrow.Table, shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """Return rows of a shard as tensors.

    Args:
        table: `B` rows.
        shape: T and D.
        dtype: Storage dtype of the states.

    Returns:
        `states [B, T, D]` and `similarity [B, T]` in fp32; `input_ids`, `labels`, `positions` and
        `records`, `[B, T]` int64; `hard` and `response`, `[B, T]` bool; `sequence [B]` int64.
    """
    found = {}
    for name in table.column_names:
        chunks = [_values(chunk) for chunk in table.column(name).chunks]
        values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        if name == "states":
            found[name] = _restored(values, dtype).reshape(len(table), *shape)
        else:
            kind = np.int64 if values.dtype == np.int32 else values.dtype
            # Copy, because memory that is mapped from a file must not be written to.
            own = torch.from_numpy(np.array(values, dtype=kind))
            found[name] = own if name == "sequence" else own.reshape(len(table), shape[0])
    return found


def _restored(values: Array, dtype: str) -> Tensor:
    if dtype == "float16":
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(np.array(values)).view(torch.bfloat16).float()


def _values(array: Any) -> Array:
    """Return the values of a column's chunk, with nested lists flattened."""
    import pyarrow

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    while pyarrow.types.is_list(array.type):
        array = array.flatten()
    values: Array = array.to_numpy(zero_copy_only=False)
    return values
