"""Run a model over a corpus, shard by shard, for its last states and the token similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import ModelError, not_finite
from cascade.exits.history import HiddenHistory, exit_entries
from cascade.exits.rules import ExitPoint, find_rule
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.plan import CollectionPlan, Shard
from cascade.stages.hard_tokens.shards import holds, stored, write_shard

#: From this value, float16 rounds to infinity.
_FLOAT16_END = 65520


def write_shards(plan: CollectionPlan, folder: Path, progress: Callable[[int], None]) -> None:
    """Write the missing shards. Their hard masks are not set yet.

    Args:
        plan: Plan of the collection.
        folder: Output folder of the shards.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        ModelError: A state is not finite, or too large for float16.
        OutputError: A shard cannot be written.
    """
    for shard in plan.shards:
        if is_written(shard, folder):
            progress(len(shard.sequences) * plan.seq_len)
        else:
            write_one(plan, shard, folder, progress)


def is_written(shard: Shard, folder: Path) -> bool:
    """Return whether a folder holds a shard, complete and unchanged."""
    return holds(folder / shard.name, shard.sequences)


def write_one(
    plan: CollectionPlan, shard: Shard, folder: Path, progress: Callable[[int], None]
) -> None:
    """Write one shard, all of it or nothing. Its hard mask is not set yet.

    Args:
        plan: Plan of the collection.
        shard: The shard.
        folder: Output folder of the shards.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        ModelError: A state is not finite, or too large for float16.
        OutputError: The shard cannot be written.
    """
    write_shard(folder / shard.name, plan.features, _batches(plan, shard, progress))


def _batches(
    plan: CollectionPlan, shard: Shard, progress: Callable[[int], None]
) -> Iterator[dict[str, Array]]:
    """Yield the columns of a shard, batch by batch."""
    text, size = plan.texts[shard.split], plan.config.batch_size
    for start in range(shard.sequences.start, shard.sequences.stop, size):
        rows = slice(start, min(start + size, shard.sequences.stop))
        ids = text.blocks.ids[rows]
        states, similarity = exit_states(
            plan.stack, torch.from_numpy(ids).long().to(plan.stack.device), plan.layer
        )
        _check_states(states, plan)
        yield {
            "states": stored(states, plan.config.dtype),
            "input_ids": ids,
            "labels": _next_tokens(ids),
            "positions": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape),
            "similarity": similarity.cpu().numpy(),
            "response": text.response[rows],
            "records": text.record_of[rows],
            "sequence": np.arange(rows.start, rows.stop, dtype=np.int32),
        }
        progress(ids.size)


@torch.no_grad()
def exit_states(stack: DecoderStack, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return the last layer's output and the similarity at an exit layer.

    Args:
        stack: The model.
        ids: Token ids on the model's device, `[B, T]`.
        layer: Exit layer, 1..N.

    Returns:
        States before the final norm, `[B, T, D]`, and similarities in fp32, `[B, T]`.

    Raises:
        ModelError: A similarity is not finite.
    """
    last = stack.num_layers
    history = HiddenHistory(last)
    at = ExitPoint(layer, history, lambda: ids, token_ids=ids, positions=ids)
    kept = {*exit_entries(layer, last), last}
    found: list[Tensor] = []

    def visitor(entry: int, hidden: Tensor) -> None:
        if entry in kept:
            history.entries[entry] = hidden
        if entry == layer:
            found.append(find_rule("cosine").confidence(at))
            history.entries.pop(layer - 1)

    stack.visit(ids, visitor)
    (similarity,) = found
    if not torch.isfinite(similarity).all():
        raise _not_finite(layer)
    return history.entries[last], similarity


def _check_states(states: Tensor, plan: CollectionPlan) -> None:
    largest = states.abs().amax().item()
    layer = plan.stack.num_layers
    if not np.isfinite(largest):
        raise _not_finite(layer)
    if plan.config.dtype == "float16" and largest >= _FLOAT16_END:
        raise ModelError(
            f"the states of layer {layer} reach {largest:.4g}, but float16 holds numbers only up "
            "to 65504; store them with --states-dtype bfloat16"
        )


def _not_finite(layer: int) -> ModelError:
    return not_finite(f"layer {layer} gives NaN or infinite hidden states")


def _next_tokens(ids: Array) -> Array:
    """Return the next token of each token in its sequence, -100 for the last one."""
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels
