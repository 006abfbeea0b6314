"""Collect hard tokens: store a model's exit states over a corpus, for training stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.core.files import AnyPath
from cascade.decoding.exit_support import check_exits
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.completing import complete
from cascade.stages.hard_tokens.dataset import (
    RECORD,
    HardTokens,
    load_hard_tokens,
    read_hard_tokens_record,
)
from cascade.stages.hard_tokens.exit_states import write_shards
from cascade.stages.hard_tokens.plan import CollectingConfig, CollectionPlan
from cascade.stages.hard_tokens.shards import SEALS
from cascade.stages.hard_tokens.splits import Splits, marked_splits
from cascade.stages.hard_tokens.working_folder import (
    INPUTS,
    REQUEST,
    check_disk,
    check_free,
    check_output,
    prepare,
    publish,
    working_folder,
)


def collect_hard(
    stack: DecoderStack,
    splits: Splits,
    folder: AnyPath,
    config: CollectingConfig,
    *,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
    reuse: bool = False,
) -> HardTokens:
    """Run a model once over a corpus, and store its exit states and a mask of hard tokens.

    Each row of the dataset is one whole sequence with its original positions. No token is left out,
    and sequences are never joined. Memory grows with the corpus only by one similarity per token.
    After an interruption, a second call with the same arguments resumes from the last finished
    shard, and the result is identical to the byte. Only the threshold and the hard ratio may
    differ, because they are applied at the end.

    Args:
        stack: The model.
        splits: The corpus: splits "train" and "held-out", read with `marks=True`.
        folder: Output folder of the dataset.
        config: Options of the collection.
        progress: Called with the number of tokens processed since the last call.
        overwrite: Replace an existing dataset, or an unfinished one with other arguments.
        reuse: Return an existing finished dataset if it has the same arguments.

    Returns:
        The finished dataset.

    Raises:
        UsageError: The layer or dtype does not exist, the threshold or ratio is invalid, both are
            missing, or the threshold makes no token or every token hard.
        CorpusError: A split is missing, has no marks, is too long, or the lengths differ.
        ModelError: A state is not finite, or too large for float16.
        OutputError: The folder holds other files or cannot be written, or the disk is too small.

    Example:
        >>> from tempfile import mkdtemp
        >>> from cascade import CollectingConfig, collect_hard, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> splits = {
        ...     split: load_blocks(
        ...         "embedded", stack.tokenizer, max_tokens=256, record_split=split, marks=True
        ...     )
        ...     for split in ("train", "held-out")
        ... }
        >>> tokens = collect_hard(stack, splits, mkdtemp(), CollectingConfig(hard_ratio=0.5))
        >>> tokens.layer, len(tokens)
        (29, 4)
    """
    plan = collection_plan(stack, splits, config)

    def write(plan: CollectionPlan, work: Path) -> None:
        write_shards(plan, work, progress or (lambda _: None))

    return collect(plan, Path(folder), write, overwrite=overwrite, reuse=reuse)


def collection_plan(
    stack: DecoderStack, splits: Splits, config: CollectingConfig
) -> CollectionPlan:
    """Return the plan of a collection, after checking model, corpus and options.

    Args:
        stack: The model.
        splits: The corpus: splits "train" and "held-out", read with `marks=True`.
        config: Options of the collection.

    Raises:
        UsageError: The layer or dtype does not exist, or the threshold or ratio is invalid.
        CorpusError: A split is missing, has no marks, is too long, or the lengths differ.
        UnsupportedModelError: Tokens of the model cannot exit.
    """
    config.check()
    check_exits(stack)
    layer = config.layer_of(stack)
    texts = marked_splits(stack, splits, config.batch_size)
    return CollectionPlan(stack, texts, config, layer)


def collect(
    plan: CollectionPlan,
    folder: Path,
    write: Callable[[CollectionPlan, Path], None],
    *,
    overwrite: bool = False,
    reuse: bool = False,
) -> HardTokens:
    """Collect hard tokens as `collect_hard` does, with another function that writes the shards.

    Args:
        plan: Plan of the collection.
        folder: Output folder of the dataset.
        write: Writes the missing shards of the plan to a folder.
        overwrite: Replace an existing dataset, or an unfinished one with other arguments.
        reuse: Return an existing finished dataset if it has the same arguments.

    Raises:
        UsageError: The threshold makes no token or every token hard.
        ModelError: A state is not finite, or too large for float16.
        OutputError: The folder holds other files or cannot be written, or the disk is too small.
    """
    check_output(folder, overwrite=overwrite or reuse)
    with working_folder(folder) as (work, interrupted):
        finished = _finished(plan, folder) if interrupted or reuse else None
        if finished is not None:
            shutil.rmtree(work)
            return finished
        check_free(folder, overwrite=overwrite)
        prepare(plan, folder, overwrite=overwrite)
        if not (work / RECORD).exists():
            check_disk(plan, folder)
            write(plan, work)
            complete(plan, work, own_files=(REQUEST, SEALS, INPUTS))
        publish(folder)
    return HardTokens(folder, read_hard_tokens_record(folder / RECORD))


def _finished(plan: CollectionPlan, folder: Path) -> HardTokens | None:
    """Return the dataset in the folder if it is complete and matches the plan; else None."""
    try:
        found = load_hard_tokens(folder)
    except RecordError:
        return None
    return found if plan.is_met_by(found.record) else None
