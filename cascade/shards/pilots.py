"""The pilot of a plan: batches that planning has measured, and that shards do not measure again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError
from cascade.core.provenance import machine_of
from cascade.core.records import arrays_hash, read_arrays
from cascade.core.schema import known
from cascade.models.stack import DecoderStack
from cascade.saturation.pilot import MeasuredBatch
from cascade.shards.plan import PILOT_FILE, Plan
from cascade.shards.records import PlannedPilot, PlannedShard

#: The largest pilot that a plan holds, in bytes. Shards measure a larger one again: a file of that
#: size would have to be packed and read in one piece.
LARGEST_PILOT = 1 << 28

_NAME = "similarity"

#: Details of a model that change the last digits of what it computes, apart from those that each
#: shard is checked for.
_ARITHMETIC = ("device", "attention", "placed", "packages")


def pilot_state(pilot: Sequence[MeasuredBatch]) -> dict[str, Array]:
    """Return the arrays of `pilot.npz`: the similarities `[L, S, T]`, as they were measured.

    Args:
        pilot: Measured batches, from the first one of the corpus on. They can be none.

    Returns:
        The arrays; nothing if there are no batches, or if they are too large to store.
    """
    if not pilot or sum(values.nbytes for values, _ in pilot) > LARGEST_PILOT:
        return {}
    return {_NAME: np.concatenate([values for values, _ in pilot], axis=1)}


def pilot_record(state: dict[str, Array]) -> PlannedPilot:
    """Return what the record of a plan says of its pilot.

    Args:
        state: What `pilot_state` returned: at least one batch.
    """
    return PlannedPilot(sequences=state[_NAME].shape[1], arrays_hash=arrays_hash(state))


def taken_from_pilot(plan: Plan, shard: PlannedShard, stack: DecoderStack) -> list[MeasuredBatch]:
    """Return the first batches of a shard, if the pilot of its plan measured them.

    They are taken only where measuring them again would give the same bits: on the same device and
    type of machine, with as many threads, and with the same attention kernel.

    Args:
        plan: The plan.
        shard: The shard.
        stack: The model that measures the shard.

    Returns:
        Whole batches; none if the shard lies behind the pilot or another machine measures it.

    Raises:
        BrokenRecordError: The file of the pilot is missing, torn or edited.
    """
    about = known(plan.record.pilot)
    if about is None or shard.first >= about.sequences or not _computes_alike(plan, stack):
        return []
    values, size = read_pilot(plan, about), plan.record.batch_size
    end = min(shard.end, about.sequences)
    return [
        (np.ascontiguousarray(values[:, start:stop]), np.arange(start, stop))
        for start in range(shard.first, end, size)
        for stop in (min(start + size, end),)
    ]


def read_pilot(plan: Plan, about: PlannedPilot) -> Array:
    """Read the similarities of a pilot, `[L, S, T]`.

    Args:
        plan: The plan.
        about: What its record says of the pilot.

    Raises:
        BrokenRecordError: The file is missing, torn or edited.
    """
    path = plan.folder / PILOT_FILE
    state = read_arrays(path)
    if arrays_hash(state) != about.arrays_hash:
        raise BrokenRecordError(
            f"{path} is not the file that was written with plan.json (expected hash "
            f"{about.arrays_hash[:19]}..., got {arrays_hash(state)[:19]}...); restore both, or run "
            "`cascade plan` again"
        )
    shape = (len(plan.record.layers), about.sequences, plan.record.provenance.corpus.seq_len)
    values = state.get(_NAME)
    if values is None or values.shape != shape or values.dtype != np.float32:
        raise BrokenRecordError(
            f"{path} is torn or edited (expected similarities of shape {list(shape)} in float32); "
            "run `cascade plan` again"
        )
    return values


def _computes_alike(plan: Plan, stack: DecoderStack) -> bool:
    """Return whether this process computes the bits of the process that made the plan."""
    planned, here = plan.record.provenance, stack.provenance
    same = all(getattr(planned.model, name) == getattr(here, name) for name in _ARITHMETIC)
    return same and planned.machine == machine_of(stack.device)
