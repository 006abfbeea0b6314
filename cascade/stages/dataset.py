"""The dataset of hard tokens: exit states by sequence, read with care and given out as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cascade.core.errors import RecordError, UsageError, first_line, os_reason
from cascade.core.records import read_record, record_hash
from cascade.core.shapes import COUNT, NUMBER, SHARE, TEXT, WHOLE, Maybe, flaw, one_of
from cascade.corpora.blocks import PARTS
from cascade.models.identity import check_same_model
from cascade.models.stack import DecoderStack
from cascade.stages.shards import STATE_DTYPES, tensors_of
from cascade.stats.decision import least_fp32

if TYPE_CHECKING:
    import datasets

#: The kind of the record.
KIND = "hard-tokens"

#: The record of a finished dataset, in its folder.
RECORD = "hard-tokens.json"

#: The folder inside the dataset's in which it is made, shard by shard.
WORK = ".cascade-collecting"


@dataclass(frozen=True)
class HardTokens:
    """A finished dataset: whole sequences in order, each token's exit state, and which are hard.

    Attributes:
        folder: Where it lies; `datasets.load_from_disk` reads it.
        record: What it is and where it comes from.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def layer(self) -> int:
        """The exit layer, whose similarity decides."""
        return int(self.record["layer"])

    @property
    def threshold(self) -> float:
        """Below this similarity a token is hard."""
        return float(self.record["threshold"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it came out, one line each."""
        return tuple(self.record["notes"])

    def __len__(self) -> int:
        return sum(part["sequences"] for part in self.record["parts"].values())

    @cached_property
    def _dataset(self) -> datasets.DatasetDict:
        return _read_dataset(self.folder)

    def part(self, name: str) -> datasets.Dataset:
        """Return one part, mapped from disk.

        Args:
            name: "train" or "held-out".

        Raises:
            UsageError: There is no such part.
        """
        if name not in PARTS:
            raise UsageError(f"expected a part among {', '.join(PARTS)}, got {name!r}")
        return self._dataset[name]

    def check(
        self, stack: DecoderStack, *, layer: int | None = None, threshold: float | None = None
    ) -> None:
        """Make sure that this is what a model gives at an exit.

        Args:
            stack: The model.
            layer: The exit layer; any where not given.
            threshold: The exit's threshold; any where not given.

        Raises:
            ModelError: These are the states of another model (both are named).
            UsageError: They were collected for another layer or threshold.
        """
        check_same_model(
            self.record["provenance"]["model"], stack, what=f"the hard tokens in {self.folder}"
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
        self, part: str, batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield sequences as tensors; the last batch can be smaller.

        Args:
            part: "train" or "held-out".
            batch_size: Sequences per batch.
            order: Which sequences to take, by number from 0, in this order; all, as they come,
                where not given.

        Yields:
            `states [B, T, D]` (what leaves the last layer, before the final norm) and `similarity
            [B, T]` in fp32; `input_ids`, `labels` (the next token of the sequence, -100 behind the
            last), `positions` and `records`, `[B, T]` int64; `hard` and `response`, `[B, T]` bool;
            `sequence [B]` int64.

        Raises:
            UsageError: No such part or sequence, or batches of none.
        """
        rows = self.part(part).with_format("arrow")
        if batch_size < 1:
            raise UsageError(f"expected a batch size of at least 1, got {batch_size}")
        numbers = np.arange(len(rows)) if order is None else np.asarray(order, dtype=np.int64)
        if ((numbers < 0) | (numbers >= len(rows))).any():
            raise UsageError(
                f"expected sequences in 0..{len(rows) - 1}, got {numbers.min()}..{numbers.max()}"
            )
        states = self.record["states"]
        shape = (states["seq_len"], states["hidden_size"])
        for start in range(0, len(numbers), batch_size):
            table = rows[numbers[start : start + batch_size].tolist()]
            yield tensors_of(table, shape, states["dtype"])


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


#: What is read of a record.
_SHAPE: Any = {
    "layer": COUNT,
    "threshold": NUMBER,
    "asked": {"threshold": Maybe(NUMBER), "hard_ratio": Maybe(NUMBER)},
    "request": TEXT,
    "states": {"dtype": one_of(*STATE_DTYPES), "seq_len": COUNT, "hidden_size": COUNT},
    "parts": {
        name: {"sequences": COUNT, "tokens": COUNT, "hard": COUNT, "hard_ratio": SHARE}
        for name in PARTS
    },
    "notes": [TEXT],
    "files": [{"name": TEXT, "bytes": WHOLE, "hash": TEXT}],
    "provenance": {"model": {}, "corpora": {name: {} for name in PARTS}},
    "hash": TEXT,
}


def load_hard_tokens(folder: Path | str) -> HardTokens:
    """Read a dataset of `collect_hard`, and make sure that nothing of it was changed.

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
    record = read_record(folder / RECORD, kind=KIND)
    found = flaw(record, _SHAPE)
    if found is None and record["hash"] != record_hash(record):
        found = "it is not what its hash says"
    if found is not None:
        raise RecordError(
            f"{folder / RECORD} is torn or edited ({found}); collect the dataset anew with "
            "--overwrite"
        )
    for said in record["files"]:
        found = _changed(folder / said["name"], said)
        if found is not None:
            raise RecordError(
                f"{folder / said['name']} {found}; collect the dataset anew with --overwrite"
            )
    return HardTokens(folder, record)


def is_unfinished(folder: Path) -> bool:
    """Say whether a folder holds a part of a dataset that `collect_hard` would go on from."""
    return os.path.isdir(folder / WORK) and not (folder / RECORD).exists()


def _changed(path: Path, said: dict[str, Any]) -> str | None:
    """Return what is wrong with a file of a dataset, in words; None where it is as it was."""
    try:
        size = path.stat().st_size
        if size != said["bytes"]:
            return f"was cut short or edited ({size:,} bytes, expected {said['bytes']:,})"
        return None if hash_of(path) == said["hash"] else "was edited (its hash is another)"
    except OSError as error:
        return f"cannot be read ({os_reason(error)})"


def hash_of(path: Path) -> str:
    """Return a hash over a file's bytes, by which an edit is noticed; not one against forgery."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"xxh3_128:{digest.hexdigest()}"
