"""Read a finished dataset of hard tokens, check it, and iterate over it as tensors."""

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
from cascade.core.files import AnyPath, xxh3_of
from cascade.core.provenance import SPLITS
from cascade.core.records import read_plain, record_hash
from cascade.core.run_folder import recover
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.records import (
    DatasetFile,
    HardTokensRecord,
    SplitCounts,
)
from cascade.stages.hard_tokens.shards import read_similarity, tensors_of
from cascade.stats.decision import least_fp32, reaches

if TYPE_CHECKING:
    import datasets

#: File name of the record in the folder of a finished dataset.
RECORD = "hard-tokens.json"

#: Subfolder of the dataset in which it is collected, shard by shard.
WORK = ".cascade-collecting"

#: Name that `datasets` gives to the file that lists the splits of a dataset.
SPLITS_FILE = "dataset_dict.json"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HardTokens:
    """A finished dataset of whole sequences, with the exit state and hardness of each token.

    Attributes:
        folder: Folder of the dataset. `datasets.load_from_disk` can read it.
        record: Record of the dataset: its contents and its provenance.

    Example:
        >>> from tempfile import mkdtemp
        >>> from cascade import CollectingConfig, collect_hard, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> splits = {
        ...     split: load_blocks(
        ...         "embedded", stack.tokenizer, max_tokens=256, record_split=split, marks=True
        ...     )
        ...     for split in ("train", "held-out")
        ... }
        >>> tokens = collect_hard(stack, splits, mkdtemp(), CollectingConfig(hard_ratio=0.5))
        >>> batch = next(tokens.batches("train", batch_size=2))
        >>> list(batch["states"].shape)
        [2, 128, 576]
    """

    folder: Path
    record: HardTokensRecord

    @property
    def layer(self) -> int:
        """Exit layer whose similarity decides which tokens are hard."""
        return self.record.layer

    @property
    def threshold(self) -> float:
        """A token with a similarity below this value is hard."""
        return self.record.threshold

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the collected dataset, one line each."""
        return tuple(self.record.notes)

    def __len__(self) -> int:
        return sum(counts.sequences for counts in self.record.splits.values())

    @cached_property
    def _dataset(self) -> datasets.DatasetDict:
        return _read_dataset(self.folder)

    def split(self, name: str) -> datasets.Dataset:
        """Return one split, memory-mapped from disk.

        Args:
            name: "train" or "held-out".

        Raises:
            UsageError: The split does not exist.
        """
        if name not in SPLITS:
            raise UsageError(f"expected a split among {', '.join(SPLITS)}, got {name!r}")
        return self._dataset[name]

    def check(
        self, stack: DecoderStack, *, layer: int | None = None, threshold: float | None = None
    ) -> None:
        """Check that the states were collected from this model, exit layer and threshold.

        Args:
            stack: The model.
            layer: Exit layer; None to skip this check.
            threshold: Threshold of the exit; None to skip this check.

        Raises:
            ModelError: The states belong to another model. The message names both.
            UsageError: The states were collected for another layer or threshold.
        """
        check_same_model(
            to_plain(self.record.provenance.model),
            stack,
            what=f"the hard tokens in {self.folder}",
        )
        if layer is not None and layer != self.layer:
            raise UsageError(
                f"the hard tokens in {self.folder} were collected for exit layer {self.layer}, got "
                f"layer {layer}; collect them again for that layer"
            )
        # Two thresholds are equivalent if every fp32 similarity lies on the same side of both.
        if threshold is not None and least_fp32(threshold) != least_fp32(self.threshold):
            raise UsageError(
                f"the hard tokens in {self.folder} were collected for threshold "
                f"{self.threshold:.9g}, got {threshold:.9g}; collect them again for that threshold"
            )

    def batches(
        self, split: str, batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Yield sequences as tensors. The last batch can be smaller.

        Args:
            split: "train" or "held-out".
            batch_size: Sequences per batch.
            order: Indices of the sequences to yield, from 0 (default: all, in stored order).

        Yields:
            `states [B, T, D]` (output of the last layer, before the final norm) and `similarity
            [B, T]` in fp32; `input_ids`, `labels` (the next token of the sequence, -100 for the
            last token), `positions` and `records`, `[B, T]` int64; `hard` and `response`, `[B, T]`
            bool; `sequence [B]` int64.

        Raises:
            UsageError: The split or a sequence does not exist, or the batch size is below 1.
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
        # `datasets` raises many unrelated types, depending on what is broken.
        raise RecordError(
            f"{folder} cannot be read as a dataset ({first_line(error)}); collect it again"
        ) from error
    return found


def load_hard_tokens(folder: AnyPath) -> HardTokens:
    """Load a dataset that `collect_hard` wrote, and check that it was not changed.

    The check reads all files once (14 GB/s from the page cache, on one core of an EPYC).

    Args:
        folder: Folder of the dataset.

    Raises:
        RecordError: The dataset is missing, unfinished, incomplete, edited or from a newer release.

    Example:
        >>> from tempfile import mkdtemp
        >>> from cascade import CollectingConfig, collect_hard, load, load_blocks, load_hard_tokens
        >>> stack, folder = load("smollm2-135m"), mkdtemp()
        >>> splits = {
        ...     split: load_blocks(
        ...         "embedded", stack.tokenizer, max_tokens=256, record_split=split, marks=True
        ...     )
        ...     for split in ("train", "held-out")
        ... }
        >>> tokens = collect_hard(stack, splits, folder, CollectingConfig(hard_ratio=0.5))
        >>> load_hard_tokens(folder).record == tokens.record
        True
    """
    folder = Path(folder)
    recover(folder)
    if is_unfinished(folder):
        raise RecordError(
            f"{folder} is not finished; run the same `cascade collect-hard` command again to resume"
        )
    record = read_hard_tokens_record(folder / RECORD)
    for file in record.files:
        found = _changed(folder / file.name, file)
        if found is not None:
            raise RecordError(
                f"{folder / file.name} {found}; collect the dataset again with --overwrite"
            )
    tokens = HardTokens(folder, record)
    _check_rows(tokens)
    return tokens


def _check_rows(tokens: HardTokens) -> None:
    """Raise unless the shards hold the sequences and hard tokens that the record counts."""
    states = tokens.record.states
    for split, counts in tokens.record.splits.items():
        flaw = None
        rows = tokens.split(split)
        files = [file for file in tokens.record.files if file.name.startswith(f"{split}/data-")]
        needed = counts.tokens * states.hidden_size * 2
        if len(rows) != counts.sequences:
            flaw = f"expected {counts.sequences:,} sequences, got {len(rows):,}"
        elif sum(file.bytes for file in files) < needed:
            flaw = f"expected states of {needed:,} bytes, got smaller files"
        else:
            flaw = _wrong_similarity(tokens, files, counts)
        if flaw is not None:
            raise _edited(tokens.folder / split, flaw)


def _wrong_similarity(
    tokens: HardTokens, files: Sequence[DatasetFile], counts: SplitCounts
) -> str | None:
    found = hard = 0
    for file in files:
        try:
            similarity = read_similarity(tokens.folder / file.name)
        except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are among these
            return first_line(error)
        if not np.isfinite(similarity).all():
            return f"{file.name} holds similarities that are not finite"
        found += similarity.size
        hard += int((~reaches(similarity, least_fp32(tokens.threshold))).sum())
    if (found, hard) != (counts.tokens, counts.hard):
        return (
            f"expected {counts.hard:,} hard of {counts.tokens:,} tokens, got {hard:,} of {found:,}"
        )
    return None


def read_hard_tokens_record(path: Path) -> HardTokensRecord:
    """Read the record of a dataset and check it against the hash that it contains.

    Args:
        path: JSON file of the record.

    Raises:
        RecordError: The record is missing, torn, edited or from a newer release.
    """
    plain = read_plain(path, HardTokensRecord)
    try:
        record = from_plain(plain, HardTokensRecord)
        found = record.inconsistency()
    except SchemaError as error:
        raise _edited(path, str(error)) from error
    if found is None and record.hash != record_hash(plain):
        found = "its hash does not match its contents"
    if found is not None:
        raise _edited(path, found)
    return record


def _edited(path: Path, flaw: str) -> RecordError:
    return RecordError(
        f"{path} is torn or edited ({flaw}); collect the dataset again with --overwrite"
    )


def is_unfinished(folder: Path) -> bool:
    """Return whether a folder holds an unfinished dataset that `collect_hard` can resume."""
    return os.path.isdir(folder / WORK) and not (folder / RECORD).exists()


def _changed(path: Path, file: DatasetFile) -> str | None:
    """Describe how a file of a dataset was changed; None if it was not."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"is incomplete or edited (expected {file.bytes:,} bytes, got {size:,})"
        return None if hash_of(path) == file.hash else "was edited (its hash differs)"
    except OSError as error:
        return f"cannot be read ({os_reason(error)})"


def hash_of(path: Path) -> str:
    """Return a hash over a file's bytes. It detects edits but does not protect against forgery."""
    return f"xxh3_128:{xxh3_of(path)}"
