"""Making a plan: the corpus as numbered sequences in shards, and what all tasks share."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import UsageError
from cascade.core.files import AnyPath
from cascade.core.provenance import provenance_of
from cascade.core.records import arrays_hash, packed, to_file
from cascade.core.run_folder import RunFolder
from cascade.core.schema import UNSET
from cascade.corpora.blocks import Texts, TokenBlocks, check_blocks, ids_hash
from cascade.corpora.streaming import StreamingOptions, stream_blocks, write_ids
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import quick_ids
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.saturation.long_context import LongChoice, choose_long, measure_long
from cascade.saturation.model_parts import parts_of
from cascade.saturation.pilot import MeasuredBatch, pilot_edges, pilot_of
from cascade.saturation.profile import as_stack, measured_batches
from cascade.saturation.records import LongContext, NoiseFloor
from cascade.shards.pilots import pilot_record, pilot_state
from cascade.shards.plan import PILOT_FILE, PLAN_FILES, Plan, Planning
from cascade.shards.records import PlannedShard, PlanRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def plan(
    model: DecoderStack | PreTrainedModel | str,
    corpus: TokenBlocks | Texts | str | os.PathLike[str],
    output: AnyPath,
    *,
    shards: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    edges: Array | None = None,
    long_context: int | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
    **reading: Unpack[StreamingOptions],
) -> Plan:
    """Plan to measure a profile in shards, each of which one task measures.

    The corpus is read once, in order, and its token ids are written to the plan without holding
    them in memory. The bin edges, the noise floor and the long sequences are measured here, once.
    The batches that were measured for the edges are kept, for the shards that they belong to.

    Args:
        model: The result of `load`, a source that `load` takes, or a causal language model of
            `transformers`.
        corpus: A source that `load_blocks` takes, texts, a `datasets.Dataset`, or blocks. Datasets
            of the hub are streamed, unless a seed is given.
        output: The folder of the plan.
        shards: The number of shards. Each holds whole batches.
        tokenizer: The tokenizer of a `transformers` model.
        batch_size: Sequences per forward pass, the same for any number of shards.
        edges: `[L, 3]` bin edges for the shares of each sequence, e.g. those of a baseline to
            compare with (default: from the first 16 sequences).
        long_context: The number of tokens of a long sequence, 0 for none; None for the default.
        overwrite: Replace an earlier plan.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens that were read since the last call.
        reading: Options for reading the corpus, as for `load_blocks`.

    Raises:
        CorpusError: There is too little text for one sequence, or for the long sequences.
        ModelError: A token id is outside the model's vocabulary, or a layer's output is NaN.
        OutputError: The folder holds another plan, or cannot be written.
        UsageError: There are more shards than batches, or the model has another type.

    Example:
        >>> import cascade
        >>> stack, texts = cascade.load("smollm2-135m"), ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan(stack, texts, "PLAN", shards=3, batch_size=2, seq_len=32)
        >>> [len(shard.sequences) for shard in plan.record.shards]
        [2, 4, 3]
    """
    if shards < 1:
        raise UsageError(f"expected at least 1 shard, got {shards}")
    model = load(model) if isinstance(model, str) else model
    folder = Path(output)
    with (
        RunFolder(folder, PLAN_FILES, optional=(PILOT_FILE,), overwrite=overwrite) as target,
        as_stack(model, tokenizer) as stack,
    ):
        path = target.staging / "tokens.bin"
        if isinstance(corpus, TokenBlocks):
            if reading:
                raise UsageError(f"{', '.join(reading)}: the corpus is already cut into blocks")
            blocks = write_ids(path, corpus)
        else:
            blocks = stream_blocks(corpus, stack.tokenizer, path, progress=progress, **reading)
        check_blocks(stack, blocks, batch_size)
        planned = planned_shards(blocks, shards, batch_size)
        measured = _measured(stack, blocks, batch_size, edges, long_context)
        target.write("plan.npz", packed(measured.state))
        if measured.pilot:
            target.write(PILOT_FILE, packed(measured.pilot))
        record = PlanRecord(
            provenance=provenance_of(stack, blocks, command),
            batch_size=batch_size,
            weights_hash=stack.weights_hash(),
            layers=list(stack.layer_labels),
            shards=planned,
            noise=measured.noise,
            parts=parts_of(stack),
            long_context=measured.long,
            pilot=pilot_record(measured.pilot) if measured.pilot else UNSET,
            arrays_hash=arrays_hash(measured.state),
        )
        target.write("plan.json", to_file(record))
    return replace(Plan.read(folder), planning=measured.planning)


def planned_shards(blocks: TokenBlocks, shards: int, batch_size: int) -> list[PlannedShard]:
    """Return the shards of a corpus: whole batches, as equal as they can be.

    Args:
        blocks: The corpus.
        shards: The number of shards.
        batch_size: Sequences per forward pass.

    Raises:
        UsageError: There are more shards than batches.
    """
    sequences = len(blocks.ids)
    batches = -(-sequences // batch_size)
    if shards > batches:
        raise UsageError(
            f"expected at most {batches:,} shards, one for each batch of {batch_size} of the "
            f"{sequences:,} sequences, got {shards:,}; use fewer shards, a smaller --batch-size or "
            "more text"
        )
    borders = [min(number * batches // shards * batch_size, sequences) for number in range(shards)]
    return [
        PlannedShard(
            number=number, first=first, end=end, tokens_hash=ids_hash(blocks.ids[first:end])
        )
        for number, (first, end) in enumerate(zip(borders, [*borders[1:], sequences], strict=True))
    ]


# --- What planning measures ------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """What planning measures, once for all shards.

    Attributes:
        state: The arrays of `plan.npz`: bin edges and long sequences.
        pilot: The arrays of `pilot.npz`; empty for none.
        noise: The noise floor.
        long: What the record says of the long sequences.
        planning: How long it took.
    """

    state: dict[str, Array]
    pilot: dict[str, Array]
    noise: NoiseFloor
    long: LongContext
    planning: Planning


def _measured(
    stack: DecoderStack,
    blocks: TokenBlocks,
    batch_size: int,
    edges: Array | None,
    long_context: int | None,
) -> _Measured:
    seconds: dict[str, float] = {}
    chosen = choose_long(stack, blocks, long_context)
    pilot: list[MeasuredBatch] = []
    if edges is not None:
        edges = _checked(edges, stack)
    else:
        # Its batches are those of the shards, which take them from the plan.
        with _timed(seconds, "pilot"):
            pilot = pilot_of(measured_batches(stack, blocks.batches(batch_size)))
        edges = pilot_edges(pilot)
    with _timed(seconds, "long"):
        long, state = _long(stack, chosen)
    with _timed(seconds, "noise"):
        noise = measure_noise(stack, quick_ids(blocks), chosen.sequences)
    return _Measured(
        state={"edges": edges} | state,
        pilot=pilot_state(pilot),
        noise=noise,
        long=long,
        planning=Planning(seconds, chosen.reason if chosen.is_short else None),
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _checked(edges: Array, stack: DecoderStack) -> Array:
    edges = np.asarray(edges, dtype=np.int64)
    if len(edges) != len(stack.layer_labels):
        raise UsageError(
            f"expected the bin edges of {len(stack.layer_labels)} layers, got {len(edges)}; use a "
            "baseline of this model"
        )
    return edges


def _long(stack: DecoderStack, chosen: LongChoice) -> tuple[LongContext, dict[str, Array]]:
    """Return what the record says of the long sequences, and their arrays."""
    if chosen.sequences is None:
        return LongContext(length=0, sequences=0, ranges=0, reason=chosen.reason or UNSET), {}
    measured = measure_long(stack, chosen.sequences)
    return measured.record(), measured.arrays()
