"""Shards for schedulers that call a function with a rank: datatrove, torchrun, or a loop."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cascade.engines.work import loaded
from cascade.shards.measuring import measure_shard, planned_source
from cascade.shards.plan import Plan
from cascade.shards.shard_files import read_shard


@dataclass(frozen=True)
class MeasureShards:
    """Measures the shards of a plan whose number leaves a rank as the remainder.

    It is a step of a `datatrove` pipeline, which calls it in its tasks. The model is loaded once in
    each process, and only if a shard is missing.

    Args:
        plan: The folder of the plan.
        device: The device to load the model on.
        device_map: Passed to `transformers` instead of the device, e.g. "auto".
        engine: What calls it, for the provenance, e.g. "datatrove 0.10.1".

    Example:
        >>> import cascade
        >>> texts = ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan("smollm2-135m", texts, "PLAN", shards=2, batch_size=2, seq_len=32)
        >>> step = MeasureShards("PLAN")
        >>> for rank in range(3):  # rank 2 has nothing to do
        ...     step(rank=rank, world_size=3)
        >>> len(cascade.merge("PLAN", "RUN").rows)
        9
    """

    plan: str | os.PathLike[str]
    device: str = "cpu"
    device_map: str | None = None
    engine: str | None = None

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Measure the shards of a rank.

        Args:
            data: Not used; `datatrove` passes what the step before it returned.
            rank: The number of the task, from 0.
            world_size: The number of tasks.

        Raises:
            CascadeError: As for `measure_shard`.
        """
        plan = Plan.read(self.plan)
        for number in range(rank, len(plan.record.shards), world_size):
            if read_shard(plan, number) is None:
                stack = loaded(planned_source(plan, self.device, self.device_map))
                measure_shard(plan, number, model=stack, engine=self.engine)
