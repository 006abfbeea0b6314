"""Measuring one shard of a plan: the unit of work of any engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from cascade.core.errors import ModelError, RecordError
from cascade.core.files import AnyPath
from cascade.core.provenance import library_versions, machine_of
from cascade.core.schema import UNSET, known
from cascade.corpora.blocks import TokenBlocks
from cascade.models.identity import model_differences
from cascade.models.loading import DeviceMap
from cascade.models.source import ModelSource, recorded_source
from cascade.models.stack import DecoderStack
from cascade.saturation.pilot import MeasuredBatch
from cascade.saturation.profile import as_stack, measured_batches, statistics_of
from cascade.shards.pilots import taken_from_pilot
from cascade.shards.plan import Plan, batches_of
from cascade.shards.records import PlannedShard, ShardRecord
from cascade.shards.shard_files import check_versions, read_shard, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MeasuredShard:
    """The outcome of a task.

    Attributes:
        record: The content of `shard.json`.
        folder: The folder of the shard.
        skipped: Whether the shard was complete before.
    """

    record: ShardRecord
    folder: Path
    skipped: bool


def measure_shard(
    plan: Plan | AnyPath,
    number: int,
    *,
    model: DecoderStack | PreTrainedModel | None = None,
    device: str = "cpu",
    device_map: DeviceMap | None = None,
    engine: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> MeasuredShard:
    """Measure one shard of a plan, unless it is complete.

    The shard appears at once when it is complete. A task that dies leaves nothing that counts, so
    it can be started again, and several times at once.

    Args:
        plan: The plan, or its folder.
        number: The number of the shard, from 0.
        model: The plan's model, if it is loaded already; needed if the plan was made for a model
            in memory.
        device: The device to load the model on.
        device_map: Passed to `transformers` instead of the device.
        engine: What started the task, such as "ray 2.60.0", for the provenance.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        RecordError: The plan or the shard is torn, edited or of another plan, or other versions
            are installed than those that made the plan.
        ModelError: The model is not that of the plan or was in memory, or a layer's output is NaN.
        UsageError: There is no such shard.
        OutputError: The shard cannot be written.

    Example:
        >>> import cascade
        >>> stack, texts = cascade.load("smollm2-135m"), ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan(stack, texts, "PLAN", shards=2, batch_size=2, seq_len=32)
        >>> cascade.measure_shard(plan, 1, model=stack).skipped
        False
        >>> cascade.measure_shard(plan, 1).skipped
        True
    """
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    shard = plan.shard(number)
    stored = read_shard(plan, number)
    if stored is not None:
        stored.rows.check()
        return MeasuredShard(stored.record, stored.folder, skipped=True)
    check_versions(plan, library_versions(), f"shard {number} would be measured")
    model = planned_source(plan, device, device_map).load() if model is None else model
    with as_stack(model, None) as stack:
        _check_model(plan, stack)
        written = _measured(plan, shard, stack, engine, progress)
    stored = read_shard(plan, number)
    if stored is None:
        raise RecordError(f"{plan.shard_folder(number)} was removed while it was written")
    return MeasuredShard(stored.record, stored.folder, skipped=not written)


def planned_source(
    plan: Plan, device: str = "cpu", device_map: DeviceMap | None = None
) -> ModelSource:
    """Return where the model of a plan is loaded from.

    Args:
        plan: The plan.
        device: The device to load it on.
        device_map: Passed to `transformers` instead of the device.

    Raises:
        ModelError: The plan was made for a model in memory.
    """
    record = plan.record
    return recorded_source(
        record.provenance.model,
        record.weights_hash,
        device=device,
        device_map=device_map,
        of=str(plan.folder),
    )


def _check_model(plan: Plan, stack: DecoderStack) -> None:
    about = plan.record.provenance
    expected = structs.replace(
        about.model,
        weights_hash=plan.record.weights_hash,
        # A model in memory may come without the tokenizer, which is no longer needed.
        tokenizer_hash=about.tokenizer_hash or UNSET,
    )
    differing = model_differences(expected, stack)
    if differing:
        one = differing[0]
        raise ModelError(
            f"{plan.folder} is a plan for {known(about.model.name) or 'another model'} with "
            f"{one.name} {one.expected}, but the model has {one.found}; use the plan's model, or "
            "run `cascade plan` again"
        )


def _measured(
    plan: Plan,
    shard: PlannedShard,
    stack: DecoderStack,
    engine: str | None,
    progress: Callable[[int], None] | None,
) -> bool:
    """Measure and write a shard; return whether it was this process that completed it."""
    start = time.perf_counter()
    ids = plan.ids(shard)
    taken = taken_from_pilot(plan, shard, stack)
    rest = batches_of(ids, shard, plan.record.batch_size)[len(taken) :]
    batches = itertools.chain(
        _counted(taken, progress), measured_batches(stack, rest, progress=progress)
    )
    statistics = statistics_of(stack.layer_labels, plan.edges, batches)
    record = ShardRecord(
        plan_hash=plan.hash,
        number=shard.number,
        first=shard.first,
        end=shard.end,
        device=stack.device.type,
        attention=known(stack.provenance.attention),
        machine=machine_of(stack.device),
        versions=library_versions(),
        engine=engine or UNSET,
        piloted=sum(len(numbers) for _, numbers in taken) or UNSET,
        seconds=round(time.perf_counter() - start, 3),
        arrays_hash="",
    )
    prints = TokenBlocks(ids, "", "", records=0).sequence_fingerprints()
    return write_shard(plan, record, statistics, statistics.rows.all(), prints)


def _counted(
    taken: list[MeasuredBatch], progress: Callable[[int], None] | None
) -> Iterator[MeasuredBatch]:
    for values, numbers in taken:
        yield values, numbers
        if progress is not None:
            progress(values[0].size)
