"""Measuring the shards of a plan on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cascade.core.files import AnyPath
from cascade.engines.cluster import cluster
from cascade.engines.config import EngineConfig
from cascade.engines.running import run_tasks
from cascade.engines.work import Task, Work
from cascade.models.source import ModelSource, model_source
from cascade.models.stack import DecoderStack
from cascade.shards.measuring import measure_shard, planned_source
from cascade.shards.merging import missing_shards
from cascade.shards.plan import Plan


def measure_on_ray(
    plan: Plan | AnyPath,
    config: EngineConfig | None = None,
    *,
    model: DecoderStack | ModelSource | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Measure the missing shards of a plan on Ray, each in one task.

    Several drivers may do this at once, and any of them may be killed: a shard is written as a
    whole, by the first task that completes it.

    Args:
        plan: The plan, or its folder. Every node has it under this path.
        config: How tasks run (default: on this machine, one worker per CPU).
        model: The plan's model, or where workers load it from (default: as the plan says).
        progress: Called with the number of tokens of each shard that is done.

    Returns:
        The number of tasks at once; 0 if no shard was missing.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        DeviceError: The cluster has no room for a worker.
        CascadeError: A shard cannot be measured; the shards before it are complete.

    Example:
        >>> import cascade
        >>> stack, texts = cascade.load("smollm2-135m"), ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan(stack, texts, "PLAN", shards=2, batch_size=2, seq_len=32)
        >>> workers = measure_on_ray(plan, EngineConfig(workers=2))  # doctest: +SKIP
    """
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    config = config or EngineConfig()
    length = plan.record.provenance.corpus.seq_len
    tasks = [
        Task(number, len(plan.shard(number).sequences) * length) for number in missing_shards(plan)
    ]
    if not tasks:
        return 0
    source = model if isinstance(model, ModelSource) else _source(plan, config, model)
    with cluster(config) as found:
        work = Work(
            name="shard",
            function=measure_planned,
            model=source,
            folder=os.path.abspath(plan.folder),
            engine=found.engine,
            threads=config.threads_of(),
        )
        run_tasks(
            found, config, work, tasks, lambda task: progress(task.tokens) if progress else None
        )
        return found.workers


def _source(plan: Plan, config: EngineConfig, model: DecoderStack | None) -> ModelSource:
    if model is not None:
        return model_source(model, gpus=config.gpus_per_worker)
    gpus = config.gpus_per_worker
    return planned_source(plan, "cuda" if gpus else "cpu", "auto" if gpus > 1 else None)


def measure_planned(stack: DecoderStack, work: Work, number: int) -> None:
    """Measure one shard of a plan in a worker.

    Args:
        stack: The model of the worker.
        work: What every task does; its folder is the plan's.
        number: The number of the shard.
    """
    measure_shard(Path(work.folder), number, model=stack, engine=work.engine)
