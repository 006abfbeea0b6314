"""Collecting hard tokens on Ray, one task per shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import OutputError, os_reason
from cascade.core.files import atomic_path, write_text
from cascade.core.provenance import SPLITS
from cascade.core.reading import read_json
from cascade.corpora.blocks import TokenBlocks
from cascade.engines.cluster import Cluster
from cascade.engines.config import EngineConfig
from cascade.engines.running import run_tasks
from cascade.engines.work import Task, Work
from cascade.models.source import ModelSource
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.exit_states import is_written, write_one
from cascade.stages.hard_tokens.plan import CollectingConfig, CollectionPlan
from cascade.stages.hard_tokens.splits import MarkedText
from cascade.stages.hard_tokens.working_folder import INPUTS

#: The options of a collection that tasks need, in the folder of inputs.
_OPTIONS = "options.json"


def shards_on_ray(
    found: Cluster,
    config: EngineConfig,
    model: ModelSource,
    done: Callable[[int], None],
) -> Callable[[CollectionPlan, Path], None]:
    """Return a function that writes the missing shards of a collection on Ray.

    Args:
        found: The cluster.
        config: How tasks run.
        model: Where workers load the model from.
        done: Called with the number of tokens of each shard that is done.
    """

    def write(plan: CollectionPlan, folder: Path) -> None:
        _write_inputs(plan, folder / INPUTS)
        missing = [
            Task(number, len(shard.sequences) * plan.seq_len)
            for number, shard in enumerate(plan.shards)
            if not is_written(shard, folder)
        ]
        work = Work(
            name="shard of hard tokens",
            function=collect_shard,
            model=model,
            folder=os.path.abspath(folder),
            engine=found.engine,
            threads=config.threads_of(),
        )
        run_tasks(found, config, work, missing, lambda task: done(task.tokens))

    return write


def collect_shard(stack: DecoderStack, work: Work, number: int) -> None:
    """Write one shard of a collection in a worker, unless it is there.

    Args:
        stack: The model of the worker.
        work: What every task does; its folder is the working folder of the collection.
        number: The number of the shard in the plan.
    """
    folder = Path(work.folder)
    plan = _plan_of(stack, folder / INPUTS)
    shard = plan.shards[number]
    if not is_written(shard, folder):
        write_one(plan, shard, folder, lambda _: None)


def _write_inputs(plan: CollectionPlan, folder: Path) -> None:
    """Write the text and the options that tasks need."""
    try:
        for split in SPLITS:
            text = plan.texts[split]
            _save(folder / f"{split}.ids.npy", text.blocks.ids)
            _save(folder / f"{split}.records.npy", text.record_of)
            _save(folder / f"{split}.response.npy", text.response)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {os_reason(error)}; free some space or make it writable"
        ) from error
    options: dict[str, Any] = {
        "layer": plan.layer,
        "dtype": plan.config.dtype,
        "batch_size": plan.config.batch_size,
        "shard_bytes": plan.shard_bytes,
        "most_shards": plan.most_shards,
    }
    write_text(folder / _OPTIONS, json.dumps(options, allow_nan=False) + "\n")


def _save(path: Path, values: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, values)


def _plan_of(stack: DecoderStack, folder: Path) -> CollectionPlan:
    """Return the plan of a collection, with its text mapped from files."""
    options = read_json(folder / _OPTIONS)
    texts = {}
    for split in SPLITS:
        ids, records, response = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r")
            for name in ("ids", "records", "response")
        )
        texts[split] = MarkedText(TokenBlocks(ids, "", "", records=0), records, response)
    config = CollectingConfig(
        layer=options["layer"], dtype=options["dtype"], batch_size=options["batch_size"]
    )
    plan = CollectionPlan(stack, texts, config, options["layer"])
    return replace(plan, shard_bytes=options["shard_bytes"], most_shards=options["most_shards"])
