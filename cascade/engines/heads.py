"""Fitting exit heads on Ray: each task sums over one shard, and the sums are added."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import BrokenRecordError, OutputError, first_line, os_reason
from cascade.core.files import atomic_path, write_text
from cascade.core.provenance import Provenance
from cascade.core.reading import read_json
from cascade.core.records import arrays_hash, packed, read_arrays
from cascade.corpora.blocks import TokenBlocks
from cascade.engines.cluster import Cluster
from cascade.engines.config import EngineConfig
from cascade.engines.running import run_tasks
from cascade.engines.work import Task, Work
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fitted_layers, heads_of
from cascade.exits.head_sums import HeadSums
from cascade.models.source import ModelSource
from cascade.models.stack import DecoderStack
from cascade.shards.planning import planned_shards

_IDS, _PLAN, _SUMS = "ids.npy", "plan.json", "sums"

#: The array with the hash of the others.
_HASH = "hash"


@dataclass(frozen=True)
class HeadsPlan:
    """How the sums of a fit are divided.

    Attributes:
        folder: The folder of the sums, which every node has under this path.
        layers: Exit layers, sorted.
        batch_size: Sequences per forward pass.
        borders: The first sequence of each shard, and the number of all sequences.
        seq_len: Tokens per sequence.
    """

    folder: Path
    layers: tuple[int, ...]
    batch_size: int
    borders: tuple[int, ...]
    seq_len: int

    @classmethod
    def read(cls, folder: Path) -> HeadsPlan:
        """Read a plan."""
        found = read_json(folder / _PLAN)
        layers, borders = tuple(found["layers"]), tuple(found["borders"])
        return cls(folder, layers, found["batch_size"], borders, found["seq_len"])

    def tasks(self) -> list[Task]:
        """Return all tasks."""
        sizes = np.diff(self.borders) * self.seq_len
        return [Task(number, int(size)) for number, size in enumerate(sizes)]

    def file(self, number: int) -> Path:
        """Return the file with the sums of a shard."""
        return self.folder / _SUMS / f"{number:05d}.npz"

    def missing(self) -> list[Task]:
        """Return the tasks whose sums are not there."""
        return [task for task in self.tasks() if not self.file(task.number).exists()]


def plan_heads(
    stack: DecoderStack,
    blocks: TokenBlocks,
    folder: Path,
    layers: Sequence[int],
    *,
    batch_size: int,
    shards: int,
) -> HeadsPlan:
    """Write the text and the options of a fit, which tasks read.

    Args:
        stack: The model.
        blocks: The corpus.
        folder: The folder.
        layers: Exit layers.
        batch_size: Sequences per forward pass.
        shards: The number of tasks.

    Raises:
        UsageError: A layer does not exist, or there are more shards than batches.
        OutputError: The folder cannot be written.
    """
    found = planned_shards(blocks, shards, batch_size)
    plan: dict[str, Any] = {
        "layers": fitted_layers(stack, blocks, layers, batch_size),
        "batch_size": batch_size,
        "borders": [0, *(shard.end for shard in found)],
        "seq_len": int(blocks.ids.shape[1]),
    }
    try:
        with atomic_path(folder / _IDS) as temporary, open(temporary, "wb") as file:
            np.save(file, blocks.ids)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / _IDS}: {os_reason(error)}; free some space or make it writable"
        ) from error
    write_text(folder / _PLAN, json.dumps(plan, allow_nan=False) + "\n")
    return HeadsPlan.read(folder)


def is_planned(folder: Path) -> bool:
    """Return whether a folder holds a whole plan."""
    return (folder / _PLAN).exists()


def sum_on_ray(
    found: Cluster,
    config: EngineConfig,
    plan: HeadsPlan,
    model: ModelSource,
    done: Callable[[int], None],
) -> None:
    """Compute the missing sums of a plan on Ray.

    Args:
        found: The cluster.
        config: How tasks run.
        plan: The plan.
        model: Where workers load the model from.
        done: Called with the number of tokens of each shard that is done.
    """
    work = Work(
        name="shard of heads",
        function=sum_shard,
        model=model,
        folder=os.path.abspath(plan.folder),
        engine=found.engine,
        threads=config.threads_of(),
    )
    run_tasks(found, config, work, plan.missing(), lambda task: done(task.tokens))


def sum_shard(stack: DecoderStack, work: Work, number: int) -> None:
    """Compute the sums of one shard in a worker, unless they are there.

    Args:
        stack: The model of the worker.
        work: What every task does; its folder is the plan's.
        number: The number of the shard.

    Raises:
        ModelError: A layer's output is NaN or infinite (the message names the layer).
        OutputError: The sums cannot be written.
    """
    plan = HeadsPlan.read(Path(work.folder))
    path = plan.file(number)
    if path.exists():
        return
    ids = np.load(plan.folder / _IDS, mmap_mode="r")
    sums = HeadSums(stack, plan.layers)
    for start in range(plan.borders[number], plan.borders[number + 1], plan.batch_size):
        end = min(start + plan.batch_size, plan.borders[number + 1])
        sums.add(np.array(ids[start:end]), np.arange(start, end))
    arrays = sums.arrays()
    arrays[_HASH] = _hash_of(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(packed(arrays))
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {os_reason(error)}; free some space or make it writable, and"
            " run the same command again"
        ) from error


def heads_of_shards(
    plan: HeadsPlan,
    stack: DecoderStack,
    blocks: TokenBlocks,
    provenance: Provenance | None = None,
) -> FittedHeads:
    """Return the heads that follow from the sums of all shards.

    Args:
        plan: The plan.
        stack: The model.
        blocks: The corpus.
        provenance: Provenance of the fit (default: model and corpus only).

    Raises:
        RecordError: The sums of a shard are missing, torn or edited.
    """
    sums = HeadSums(stack, plan.layers)
    for task in plan.tasks():
        path = plan.file(task.number)
        arrays = dict(read_arrays(path))
        try:
            if not np.array_equal(arrays.pop(_HASH), _hash_of(arrays)):
                raise ValueError("its hash does not match its contents")
            sums.include(arrays)
        except (KeyError, ValueError) as error:
            raise BrokenRecordError(
                f"{path} is torn or edited ({first_line(error)}); remove it and run the same"
                " command again"
            ) from error
    return heads_of(sums, stack, blocks, provenance)


def _hash_of(arrays: dict[str, Array]) -> Array:
    return np.frombuffer(arrays_hash(arrays).encode(), dtype=np.uint8)
