"""A stored plan: the sequences of a corpus in shards, and everything that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError, RecordError, UsageError, first_line
from cascade.core.files import AnyPath
from cascade.core.records import arrays_hash, read_arrays, read_typed
from cascade.core.run_folder import current
from cascade.corpora.blocks import ids_hash
from cascade.corpora.streaming import ID_BYTES, mapped_ids
from cascade.saturation.long_statistics import LongStatistics
from cascade.shards.records import PlannedShard, PlanRecord

#: The files of a plan.
PLAN_FILES = ("plan.json", "plan.npz", "tokens.bin")

#: A further file, of plans that hold what their pilot measured.
PILOT_FILE = "pilot.npz"

#: The folder of the measured shards.
SHARDS = "shards"


@dataclass(frozen=True)
class Planning:
    """How a plan was made, for messages and benchmarks; none of it is stored.

    Attributes:
        seconds: The seconds of what planning measured: "pilot", "noise" and "long".
        too_short: Why the corpus has no long sequences, where more text would give some.
    """

    seconds: dict[str, float]
    too_short: str | None = None


@dataclass(frozen=True)
class Plan:
    """A plan to measure a profile in shards.

    Attributes:
        folder: The folder of the plan.
        record: The content of `plan.json`.
        state: The arrays of `plan.npz`.
        planning: How it was made; None for a plan that was read.

    Example:
        >>> import cascade
        >>> stack, texts = cascade.load("smollm2-135m"), ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan(stack, texts, "PLAN", shards=2, batch_size=2, seq_len=32)
        >>> Plan.read("PLAN").record.shards[1].first
        4
    """

    folder: Path
    record: PlanRecord
    state: dict[str, Array]
    planning: Planning | None = None

    @classmethod
    def read(cls, folder: AnyPath) -> Self:
        """Read a plan, without its token ids.

        Args:
            folder: The folder that `cascade plan` wrote.

        Raises:
            BrokenRecordError: A file is torn or edited.
            RecordError: A file is missing or of a newer release.
        """
        folder = Path(folder)
        record = read_typed(folder / "plan.json", PlanRecord)
        state = read_arrays(folder / "plan.npz")
        if arrays_hash(state) != record.arrays_hash or not isinstance(record.hash, str):
            raise BrokenRecordError(
                f"{folder / 'plan.npz'} is not the file that was written with plan.json (expected "
                f"hash {record.arrays_hash[:19]}..., got {arrays_hash(state)[:19]}...); restore "
                "both, or run `cascade plan` again"
            )
        plan = cls(folder, record, state)
        plan._check_size()
        return plan

    def _check_size(self) -> None:
        corpus, path = self.record.provenance.corpus, self.folder / "tokens.bin"
        expected = corpus.tokens * ID_BYTES
        try:
            size = current(path).stat().st_size
        except OSError as error:
            raise RecordError(f"no token ids {path}; restore it, or run `cascade plan`") from error
        if size != expected:
            raise BrokenRecordError(
                f"{path} is torn or edited: expected {expected:,} bytes, got {size:,}; restore it, "
                "or run `cascade plan` again"
            )

    @property
    def hash(self) -> str:
        """The hash of the plan, which every shard names."""
        return str(self.record.hash)

    @property
    def edges(self) -> Array:
        """The bin edges of the shares of each sequence, `[L, 3]`."""
        return self.state["edges"]

    @property
    def long(self) -> LongStatistics | None:
        """The statistics of the long sequences; None if there are none.

        Raises:
            BrokenRecordError: They are not readable.
        """
        try:
            about = self.record.provenance.corpus
            rest = {
                "layers": np.array(self.record.layers),
                "sequence_fingerprint": np.zeros(about.sequences, np.uint8),  # counted only
            }
            return LongStatistics.from_arrays(self.state | rest)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BrokenRecordError(
                f"{self.folder / 'plan.npz'} is torn or edited ({first_line(error)}); restore it, "
                "or run `cascade plan` again"
            ) from error

    def shard(self, number: int) -> PlannedShard:
        """Return a shard.

        Raises:
            UsageError: There is no such shard.
        """
        count = len(self.record.shards)
        if not 0 <= number < count:
            raise UsageError(
                f"expected a shard from 0 to {count - 1} in {self.folder}, got {number}"
            )
        return self.record.shards[number]

    def shard_folder(self, number: int) -> Path:
        """Return the folder of a measured shard, which exists once it is complete."""
        return self.folder / SHARDS / f"{number:05d}"

    def ids(self, shard: PlannedShard) -> npt.NDArray[np.int32]:
        """Return the token ids of a shard, `[S, T]`, as a memory map.

        Raises:
            BrokenRecordError: The ids are not those that were planned.
        """
        ids = self.all_ids()[shard.first : shard.end]
        if ids_hash(ids) != shard.tokens_hash:
            raise BrokenRecordError(
                f"{self.folder / 'tokens.bin'} was changed after it was written (expected hash "
                f"{shard.tokens_hash[:19]}... for shard {shard.number}, got "
                f"{ids_hash(ids)[:19]}...); restore it, or run `cascade plan` again"
            )
        return ids

    def all_ids(self) -> npt.NDArray[np.int32]:
        """Return the token ids of all shards, `[S, T]`, as a memory map; no hash is checked."""
        corpus = self.record.provenance.corpus
        return mapped_ids(current(self.folder / "tokens.bin"), corpus.sequences, corpus.seq_len)


def batches_of(
    ids: npt.NDArray[np.int32], shard: PlannedShard, batch_size: int
) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """Return the batches of a shard: token ids `[B, T]` and sequence numbers `[B]`.

    Args:
        ids: The token ids of the shard.
        shard: The shard.
        batch_size: Sequences per forward pass.
    """
    starts = range(0, len(ids), batch_size)
    return [
        (rows, np.arange(shard.first + start, shard.first + start + len(rows)))
        for start in starts
        for rows in (ids[start : start + batch_size],)
    ]
