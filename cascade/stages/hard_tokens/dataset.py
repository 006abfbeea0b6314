"""A finished dataset of hard tokens: read, checked, and given out as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cascade.core.errors import RecordError, UsageError, first_line, os_reason
from cascade.core.files import xxh3_of
from cascade.core.records import read_plain, record_hash
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.records import (
    SPLITS,
    DatasetFile,
    HardTokensRecord,
    missing_split,
)
from cascade.stages.hard_tokens.shards import tensors_of
from cascade.stats.decision import least_fp32

if TYPE_CHECKING:
    import datasets

#: The record of a finished dataset, in its folder.
RECORD = "hard-tokens.json"

#: The folder inside the dataset's in which it is made, shard by shard.
WORK = ".cascade-collecting"

#: What `datasets` calls the file that lists a dataset's splits.
SPLITS_FILE = "dataset_dict.json"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HardTokens:
    """A finished dataset: whole sequences in order, each token's exit state, and which are hard.

    Attributes:
        folder: Where it is; `datasets.load_from_disk` reads it.
        record: What it is and where it comes from.
    """

    folder: Path
    record: HardTokensRecord

    @property
    def layer(self) -> int:
        """The exit layer, whose similarity decides."""
        return self.record.layer

    @property
    def threshold(self) -> float:
        """Below this similarity a token is hard."""
        return self.record.threshold

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it came out, one line each."""
        return tuple(self.record.notes)

    def __len__(self) -> int:
        return sum(counts.sequences for counts in self.record.parts.values())

    @cached_property
    def _dataset(self) -> datasets.DatasetDict:
        return _read_dataset(self.folder)

    def split(self, name: str) -> datasets.Dataset:
        """Return one split, mapped from disk.

        Args:
            name: "train" or "held-out".

        Raises:
            UsageError: There is no such split.
        """
        if name not in SPLITS:
            raise UsageError(f"expected a part among {', '.join(SPLITS)}, got {name!r}")
        return self._dataset[name]

    def check(
        self, stack: DecoderStack, *, layer: int | None = None, threshold: float | None = None
    ) -> None:
        """Refuse a model, an exit layer or a threshold that these states are not of.

        Args:
            stack: The model.
            layer: The exit layer; not checked where None.
            threshold: The exit's threshold; not checked where None.

        Raises:
            ModelError: These are the states of another model (both are named).
            UsageError: They were collected for another layer or threshold.
        """
        check_same_model(
            to_plain(self.record.provenance.model),
            stack,
            what=f"the hard tokens in {self.folder}",
        )
        if layer is not None and layer != self.layer:
            raise UsageError(
                f"the hard tokens in {self.folder} are those of exit layer {self.layer}, got layer "
                f"{layer}; collect them anew for it"
            )
        # Two thresholds are one where every fp32 similarity lies on the same side of both.
        if threshold is not None and least_fp32(threshold) != least_fp32(self.threshold):
            raise UsageError(
                f"the hard tokens in {self.folder} lie below the threshold {self.threshold:.9g}, "
                f"got {threshold:.9g}; collect them anew for it"
            )

    def batches(
        self, split: str, batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yield sequences as tensors; the last batch can be smaller.

        Args:
            split: "train" or "held-out".
            batch_size: Sequences per batch.
            order: Which sequences to take, by number from 0, in this order; all of them in their
                own order where None.

        Yields:
            `states [B, T, D]` (the output of the last layer, before the final norm) and `similarity
            [B, T]` in fp32; `input_ids`, `labels` (the next token of the sequence, -100 behind the
            last), `positions` and `records`, `[B, T]` int64; `hard` and `response`, `[B, T]` bool;
            `sequence [B]` int64.

        Raises:
            UsageError: No such split or sequence, or a batch size below 1.
        """
        rows = self.split(split).with_format("arrow")
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
        numbers = np.arange(len(rows)) if order is None else np.asarray(order, dtype=np.int64)
        if ((numbers < 0) | (numbers >= len(rows))).any():
            raise UsageError(
                f"expected sequences in 0..{len(rows) - 1}, got {numbers.min()}..{numbers.max()}"
            )
        states = self.record.states
        shape = (states.seq_len, states.hidden_size)
        for start in range(0, len(numbers), batch_size):
            table = rows[numbers[start : start + batch_size].tolist()]
            yield tensors_of(table, shape, states.dtype)


def _read_dataset(folder: Path) -> datasets.DatasetDict:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:
        # Many unrelated types, by what is broken.
        raise RecordError(
            f"{folder} cannot be read as a dataset ({first_line(error)}); collect it anew"
        ) from error
    return found


def load_hard_tokens(folder: Path | str) -> HardTokens:
    """Read a dataset of `collect_hard`; refuse one that was changed.

    All of it is read once (14 GB/s from the page cache, on one core of an EPYC).

    Args:
        folder: Where it was written.

    Raises:
        RecordError: It is missing, unfinished, cut short or edited, or of a newer release.
    """
    folder = Path(folder)
    if is_unfinished(folder):
        raise RecordError(
            f"{folder} is not finished; run the same `cascade collect-hard` again to go on"
        )
    record = read_hard_tokens_record(folder / RECORD)
    for file in record.files:
        found = _changed(folder / file.name, file)
        if found is not None:
            raise RecordError(
                f"{folder / file.name} {found}; collect the dataset anew with --overwrite"
            )
    return HardTokens(folder, record)


def read_hard_tokens_record(path: Path) -> HardTokensRecord:
    """Read the record of a dataset, and compare it with its own hash.

    Args:
        path: Its JSON file.

    Raises:
        RecordError: It is missing, torn or edited, or of a newer release.
    """
    plain = read_plain(path, HardTokensRecord)
    try:
        record = from_plain(plain, HardTokensRecord)
        found = missing_split(record)
    except SchemaError as error:
        raise _edited(path, str(error)) from error
    if found is None and record.hash != record_hash(plain):
        found = "it is not what its hash says"
    if found is not None:
        raise _edited(path, found)
    return record


def _edited(path: Path, flaw: str) -> RecordError:
    return RecordError(
        f"{path} is torn or edited ({flaw}); collect the dataset anew with --overwrite"
    )


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds an unfinished dataset that `collect_hard` would resume."""
    return os.path.isdir(folder / WORK) and not (folder / RECORD).exists()


def _changed(path: Path, file: DatasetFile) -> str | None:
    """Return how a file of a dataset was changed, in words; None where it was not."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"was cut short or edited ({size:,} bytes, expected {file.bytes:,})"
        return None if hash_of(path) == file.hash else "was edited (its hash is another)"
    except OSError as error:
        return f"cannot be read ({os_reason(error)})"


def hash_of(path: Path) -> str:
    """Return a hash over a file's bytes: it shows an edit, but does not protect against forgery."""
    return f"xxh3_128:{xxh3_of(path)}"
