"""Shards: Arrow files with one row per sequence, written whole, their hard mask set afterwards."""

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
from cascade.core.files import atomic_path, write_text
from cascade.stats.decision import reaches

if TYPE_CHECKING:
    import datasets
    import pyarrow

#: How states are stored -> the column's type. Arrow has no bfloat16: its bits are kept as int16.
STATE_DTYPES = {"float16": "float16", "bfloat16": "int16"}


_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


#: Columns of one value per token, beside the states -> their type.
_PER_TOKEN = {
    "input_ids": "int32",
    "labels": "int32",
    "positions": "int32",
    "similarity": "float32",
    "hard": "bool",
    "response": "bool",
    "records": "int32",
}


#: Where a shard says from which threshold on its tokens are easy.
_THRESHOLD = b"cascade.threshold"


#: Values of states in one record batch; Arrow counts them with 31 bits.
_MOST_VALUES = 2**28


def features_of(seq_len: int, hidden_size: int, dtype: str) -> datasets.Features:
    """Return the columns of a shard, as `datasets` describes them.

    Args:
        seq_len: Tokens per sequence, T.
        hidden_size: Width of a state, D.
        dtype: How states are stored, of `STATE_DTYPES`.
    """
    from datasets import Array2D, Features, Value
    from datasets import Sequence as Values

    return Features(
        {"states": Array2D((seq_len, hidden_size), STATE_DTYPES[dtype])}
        | {name: Values(Value(kind)) for name, kind in _PER_TOKEN.items()}
        | {"sequence": Value("int32")}
    )


def row_bytes(seq_len: int, hidden_size: int) -> float:
    """Return what one sequence takes on disk, bytes.

    Args:
        seq_len: Tokens per sequence.
        hidden_size: Width of a state, of 2 bytes a number.
    """
    # Every list has an offset of 4 bytes, as has every state in the list of states.
    per_token = 2 * hidden_size + 4 + 5 * 4 + 2 / 8
    return seq_len * per_token + 4 * (len(_PER_TOKEN) + 2)


def stored(states: Tensor, dtype: str) -> Array:
    """Return states as a shard holds them, of any shape; infinite where float16 cannot hold one.

    Args:
        states: In any dtype.
        dtype: Of `STATE_DTYPES`.
    """
    half = states.to(_TORCH_DTYPES[dtype]).cpu()
    half = half.view(torch.int16) if dtype == "bfloat16" else half
    values: Array = half.numpy()
    return values


def write_shard(
    path: Path, features: datasets.Features, batches: Iterable[Mapping[str, Array]]
) -> None:
    """Write a shard, whole or not at all; no token of it is hard yet.

    Args:
        path: The file.
        features: Of `features_of`.
        batches: Columns `[B, T, D]`, `[B, T]` or `[B]` by name, all but `hard`.

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
            size = max(1, _MOST_VALUES // batch["states"][0].size)
            for start in range(0, len(batch["states"]), size):
                rows = {name: values[start : start + size] for name, values in batch.items()}
                rows["hard"] = np.zeros_like(rows["response"])
                columns = [_column(rows[field.name], field.type) for field in schema]
                writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))


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
    """Write what makes a folder of shards a split, in the layout of `Dataset.save_to_disk`.

    Args:
        folder: Where the shards are.
        names: Their names, in order.
        features: Of `features_of`.
        made_of: Tells this split from all others: `datasets` knows cached results by it.

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
        "_split": None,  # the name of a split may not have a hyphen there
    }
    info = asdict(DatasetInfo(features=features))
    write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
    write_text(folder / "dataset_info.json", json.dumps(info, indent=2) + "\n")


def mark_hard(path: Path, least: float) -> None:
    """Set a shard's hard mask; a shard that has it already stays as it is.

    Args:
        path: The shard; it is replaced whole or not at all.
        least: The least similarity, an fp32 number, at which a token is easy.

    Raises:
        OutputError: The file cannot be written.
    """
    import pyarrow

    said = repr(least).encode()
    with pyarrow.OSFile(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        if reader.schema.metadata.get(_THRESHOLD) == said:
            return
        schema = reader.schema.with_metadata(reader.schema.metadata | {_THRESHOLD: said})
        place = schema.get_field_index("hard")
        with (
            atomic_path(path) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as writer,
        ):
            for batch in reader:
                similarity = _values(batch.column("similarity")).reshape(batch.num_rows, -1)
                columns = batch.columns
                columns[place] = _column(~reaches(similarity, least), None)
                writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))


def read_similarity(path: Path) -> Array:
    """Return the similarity of every token of a shard, `[rows, T]` fp32; no state is read."""
    with _mapped(path) as table:
        column = table.column("similarity")
        return np.concatenate([_values(chunk) for chunk in column.chunks]).reshape(len(table), -1)


def holds(path: Path, sequences: range) -> bool:
    """Say whether a file is a shard of exactly these sequences, from first to last."""
    try:
        with _mapped(path) as table:
            return bool(table.column("sequence").to_pylist() == list(sequences))
    except (OSError, ValueError, KeyError):  # Arrow's own errors are OSErrors and ValueErrors
        return False


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[pyarrow.Table]:
    """Map a shard into memory for as long as it is read."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        yield pyarrow.ipc.open_stream(source).read_all()


def tensors_of(table: pyarrow.Table, shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """Return rows of a shard as tensors.

    Args:
        table: `B` rows.
        shape: T and D.
        dtype: How the states are stored.

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
            # A copy of its own: what is mapped from a file must not be written to.
            own = torch.from_numpy(np.array(values, dtype=kind))
            found[name] = own if name == "sequence" else own.reshape(len(table), shape[0])
    return found


def _restored(values: Array, dtype: str) -> Tensor:
    if dtype == "float16":
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(np.array(values)).view(torch.bfloat16).float()


def _values(array: Any) -> Array:
    """Return the numbers of a column's chunk, all its lists put together."""
    import pyarrow

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    while pyarrow.types.is_list(array.type):
        array = array.flatten()
    values: Array = array.to_numpy(zero_copy_only=False)
    return values
