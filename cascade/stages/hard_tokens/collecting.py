"""Collecting hard tokens: a model's exit states over a corpus, stored once for stages to learn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.completing import complete
from cascade.stages.hard_tokens.dataset import (
    RECORD,
    WORK,
    HardTokens,
    load_hard_tokens,
    read_hard_tokens_record,
)
from cascade.stages.hard_tokens.exit_states import write_shards
from cascade.stages.hard_tokens.plan import CollectingConfig, CollectionPlan
from cascade.stages.hard_tokens.splits import Splits, marked_splits
from cascade.stages.hard_tokens.working_folder import (
    LOCK,
    REQUEST,
    check_disk,
    check_free,
    check_output,
    locked,
    prepare,
    publish,
)


def collect_hard(
    stack: DecoderStack,
    splits: Splits,
    folder: Path | str,
    config: CollectingConfig,
    *,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
    reuse: bool = False,
) -> HardTokens:
    """Run a model once over a corpus; store its exit states and which tokens are hard.

    A row of the dataset is one whole sequence, at the positions that it had: no token is left out,
    and no two sequences are joined. Memory does not grow with the corpus except for one similarity
    per token. After an interruption a second call with the same arguments resumes from the last
    finished shard, and the result is the same to the byte; only threshold and ratio, which are
    applied at the end, may differ.

    Args:
        stack: The model.
        splits: The corpus, "train" and "held-out", read with `marks=True`.
        folder: Where the dataset goes.
        config: Which states, and which tokens are hard.
        progress: Called with the number of tokens done since the last call.
        overwrite: Replace an earlier dataset, or an unfinished one of other arguments.
        reuse: Return a finished dataset of the same arguments that is there, instead.

    Raises:
        UsageError: No such layer or dtype, an invalid threshold or ratio or neither of them, or a
            threshold that makes no token hard or every token.
        CorpusError: A split is missing, of another length, without marks, or too long.
        ModelError: A state is not finite, or larger than float16 can hold.
        OutputError: The folder holds something else, cannot be written, or the disk is too small.
    """
    config.check()
    layer = config.layer_of(stack)
    texts = marked_splits(stack, splits, config.batch_size)
    plan, folder = CollectionPlan(stack, texts, config, layer), Path(folder)
    check_output(folder, overwrite=overwrite or reuse)
    interrupted = os.path.isdir(folder / WORK)
    with locked(folder) as work:
        finished = _finished(plan, folder) if interrupted or reuse else None
        if finished is not None:
            shutil.rmtree(work)
            return finished
        check_free(folder, overwrite=overwrite)
        prepare(plan, folder, overwrite=overwrite)
        if not (work / RECORD).exists():
            check_disk(plan, folder)
            write_shards(plan, work, progress or (lambda _: None))
            complete(plan, work, own_files=(LOCK, REQUEST))
        publish(folder)
    return HardTokens(folder, read_hard_tokens_record(folder / RECORD))


def _finished(plan: CollectionPlan, folder: Path) -> HardTokens | None:
    """Return the dataset in the folder where it is whole and of this plan; else None."""
    try:
        found = load_hard_tokens(folder)
    except RecordError:
        return None
    return found if plan.is_met_by(found.record) else None
