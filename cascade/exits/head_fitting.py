"""Fitting exit heads and propagation maps in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.errors import UnsupportedModelError, UsageError
from cascade.core.provenance import Provenance
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_sums import HeadSums
from cascade.exits.history import exit_entries
from cascade.exits.records import HeadsProvenance
from cascade.models.stack import DecoderStack


def fit_heads(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    provenance: Provenance | None = None,
    progress: Callable[[int], None] | None = None,
) -> FittedHeads:
    """Return a ridge head and a propagation map for every exit layer, fitted in one pass.

    The fit is in closed form, from normal equations that are accumulated over the corpus. Memory
    grows with the square of the model's width, not with the size of the corpus.

    Args:
        stack: The model.
        blocks: The corpus.
        layers: Exit layers, 1..N.
        batch_size: Sequences per forward pass.
        provenance: Provenance of the fit (default: model and corpus only).
        progress: Called with the number of tokens processed since the last call.

    Raises:
        UsageError: A layer is outside 1..N or is given twice, or no layer is given.
        CorpusError: Sequences are longer than the model's positions, or the batch size is below 1.
        ModelError: A layer's output is NaN or infinite, or a token id exceeds the vocabulary.
        UnsupportedModelError: The LM head does not read states of the layers' width.

    Example:
        >>> from cascade import fit_heads, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=640)
        >>> fit_heads(stack, blocks, [24, 29]).layers
        [24, 29]
    """
    sums = HeadSums(stack, fitted_layers(stack, blocks, layers, batch_size))
    for ids, numbers in blocks.batches(batch_size):
        sums.add(ids, numbers)
        if progress is not None:
            progress(ids.size)
    return heads_of(sums, stack, blocks, provenance)


def fitted_layers(
    stack: DecoderStack, blocks: TokenBlocks, layers: Sequence[int], batch_size: int
) -> list[int]:
    """Return exit layers, sorted, after checking that heads can be fitted for them.

    Args:
        stack: The model.
        blocks: The corpus.
        layers: Exit layers, 1..N.
        batch_size: Sequences per forward pass.

    Raises:
        UsageError: A layer is outside 1..N or is given twice, or no layer is given.
        CorpusError: Sequences are longer than the model's positions, or the batch size is below 1.
        ModelError: A token id exceeds the vocabulary.
        UnsupportedModelError: The LM head does not read states of the layers' width.
    """
    # Converts NumPy integers to int.
    layers = [exit_entries(layer, stack.num_layers)[1] for layer in layers]
    if len(set(layers)) != len(layers) or not layers:
        raise UsageError(f"expected distinct exit layers, got {layers}")
    check_blocks(stack, blocks, batch_size)
    read = getattr(stack.lm_head, "in_features", stack.hidden_size)
    if read != stack.hidden_size:
        raise UnsupportedModelError(
            f"no heads can be fitted for {stack.model.config.model_type}: its LM head reads {read}"
            f" numbers per token, its states have {stack.hidden_size}; use the logit lens"
        )
    return sorted(layers)


def heads_of(
    sums: HeadSums,
    stack: DecoderStack,
    blocks: TokenBlocks,
    provenance: Provenance | None = None,
) -> FittedHeads:
    """Return the heads that follow from the sums over a whole corpus.

    Args:
        sums: The sums.
        stack: The model.
        blocks: The corpus.
        provenance: Provenance of the fit (default: model and corpus only).
    """
    heads = sums.fit()
    heads.provenance = _with_origin(heads.provenance, stack, blocks, provenance)
    return heads


def _with_origin(
    fitted: HeadsProvenance,
    stack: DecoderStack,
    blocks: TokenBlocks,
    provenance: Provenance | None,
) -> HeadsProvenance:
    """Return the provenance of a fit, with the model, the corpus and the given provenance."""
    if provenance is None:
        return replace(
            fitted,
            model=replace(stack.provenance, weights_hash=stack.weights_hash()),
            corpus=blocks.provenance(),
        )
    return replace(
        fitted,
        model=replace(provenance.model, weights_hash=stack.weights_hash()),
        corpus=provenance.corpus,
        tokenizer_hash=provenance.tokenizer_hash,
        machine=provenance.machine,
        versions=provenance.versions,
        command=provenance.command,
    )


def rows_of(
    stack: DecoderStack, ids: npt.NDArray[np.int32], layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the exit states by layer and the final normed states, `[B * T, D]` each.

    The decoder runs once. Models without a final norm return entry N as the final states.

    Args:
        stack: The model.
        ids: Token ids, `[B, T]`.
        layers: Exit layers.
    """
    states: dict[int, Tensor] = {}

    def keep(entry: int, hidden: Tensor) -> None:
        if entry in layers or entry == stack.num_layers:
            states[entry] = hidden.flatten(0, 1)

    normed = stack.visit(torch.from_numpy(ids).long().to(stack.device), keep)
    final = states[stack.num_layers] if normed is None else normed.flatten(0, 1)
    return states, final
