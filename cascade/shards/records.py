"""The records of a plan and of a measured shard."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

from cascade.core.provenance import MachineProvenance, Provenance
from cascade.core.schema import UNSET, Count, Index, Part, StoredRecord, UnsetType, known
from cascade.saturation.records import LongContext, ModelParts, NoiseFloor


class PlannedShard(Part, frozen=True, kw_only=True):
    """Consecutive sequences that one task measures.

    Attributes:
        number: The shard's number, from 0.
        first: The number of its first sequence, from 0.
        end: One more than the number of its last sequence.
        tokens_hash: SHA-256 of its token ids.
    """

    number: Index
    first: Index
    end: Count
    tokens_hash: str

    @property
    def sequences(self) -> range:
        """The numbers of its sequences."""
        return range(self.first, self.end)


class PlannedPilot(Part, frozen=True, kw_only=True):
    """The first batches of a corpus, which planning measured for the bin edges.

    Attributes:
        sequences: The number of their sequences.
        arrays_hash: The hash of the array in `pilot.npz`: the similarity of every token.
    """

    sequences: Count
    arrays_hash: str


class PlanRecord(StoredRecord, frozen=True, kw_only=True):
    """A plan to measure a profile in shards: kind `plan`.

    Attributes:
        provenance: Model, corpus and versions; the machine and the command that made the plan.
        batch_size: Sequences per forward pass. Batch k holds the sequences from k * batch_size on,
            for any number of shards.
        weights_hash: The hash of the model's weights, whether they were loaded or made in memory.
        layers: Row labels.
        shards: The shards, which hold whole batches.
        noise: The noise floor of the machine that made the plan; None if it was not measured.
        parts: The parts of the model (see `cascade.saturation.model_parts`); absent if not read.
        long_context: The long sequences, which were measured for the plan.
        pilot: The batches that shards take from the plan; absent where bin edges were given, or
            where the pilot is too large to store.
        arrays_hash: The hash of the arrays in `plan.npz`: bin edges and long sequences.
        hash: The hash of the record, which every shard names.
    """

    KIND: ClassVar[str] = "plan"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "plan"

    schema: int = 1
    kind: Literal["plan"] = "plan"
    provenance: Provenance
    batch_size: Count
    weights_hash: str
    layers: list[str]
    shards: list[PlannedShard]
    noise: NoiseFloor | None
    parts: ModelParts | UnsetType = UNSET
    long_context: LongContext | UnsetType = UNSET
    pilot: PlannedPilot | UnsetType = UNSET
    arrays_hash: str
    hash: str | UnsetType = UNSET

    def inconsistency(self) -> str | None:
        """Describe the first shard that does not continue the one before it."""
        corpus, size = self.provenance.corpus, self.batch_size
        numbers = [shard.number for shard in self.shards]
        if numbers != list(range(len(numbers))) or not numbers:
            return f"expected shards with numbers from 0 on, got {numbers[:5]}"
        borders = [0, *(shard.end for shard in self.shards)]
        for shard, (first, end) in zip(self.shards, itertools.pairwise(borders), strict=True):
            if shard.first != first or end <= first or first % size:
                return f"expected whole batches from sequence {first:,} on in shard {shard.number}"
        if borders[-1] != corpus.sequences:
            return f"expected shards of {corpus.sequences:,} sequences, got {borders[-1]:,}"
        pilot = known(self.pilot)
        if pilot is not None and not (
            pilot.sequences == corpus.sequences
            or (pilot.sequences < corpus.sequences and pilot.sequences % size == 0)
        ):
            return f"expected a pilot of whole batches, got {pilot.sequences:,} sequences"
        if len(set(self.layers)) != len(self.layers) or not self.layers:
            return "expected distinct layers"
        return None


class ShardRecord(StoredRecord, frozen=True, kw_only=True):
    """A measured shard: kind `shard`.

    Attributes:
        plan_hash: The hash of the plan.
        number: The shard's number, from 0.
        first: The number of its first sequence, from 0.
        end: One more than the number of its last sequence.
        device: The device of the model.
        attention: The attention kernel of the model.
        machine: The machine that measured it.
        versions: The versions that measured it.
        engine: What started the task, such as "ray 2.60.0"; absent for `cascade measure-shard`.
        piloted: How many of its sequences were measured for the plan, on a machine like this one,
            and taken from there; absent for none.
        seconds: How long measuring the others took, without loading the model.
        arrays_hash: The hash of the arrays in `state.npz`, which has the hashes of the rows.
        hash: The hash of the record.
    """

    KIND: ClassVar[str] = "shard"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "measure-shard"

    schema: int = 1
    kind: Literal["shard"] = "shard"
    plan_hash: str
    number: Index
    first: Index
    end: Count
    device: str
    attention: str | None
    machine: MachineProvenance
    versions: dict[str, str]
    engine: str | UnsetType = UNSET
    piloted: Count | UnsetType = UNSET
    seconds: float
    arrays_hash: str
    hash: str | UnsetType = UNSET
