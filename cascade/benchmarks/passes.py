"""What measurements are compared with: bare passes, the study's, a peer's, and `generate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cascade.core.arrays import Array
from cascade.corpora.blocks import TokenBlocks
from cascade.exits.history import HiddenHistory
from cascade.models.stack import DecoderStack


def _batches(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Iterator[Tensor]:
    for ids, _ in blocks.batches(batch_size):
        yield torch.from_numpy(ids.astype(np.int64)).to(stack.device)


def _pairs(stack: DecoderStack, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run the whole model as a user of `transformers` would: LM head and KV cache included.

    Returns:
        What rows 1..N-1 and N+norm compare, `[B, T, D]` twice.
    """
    output = stack.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    )
    history = HiddenHistory.from_transformers(output.hidden_states)
    last = history.num_layers
    return [history.pair(layer) for layer in (*range(1, last), f"{last}+norm")]


@torch.no_grad()
def seed_means(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect as the original study did: keep every similarity, then average.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        The mean similarity of rows 1..N-1 and, because the last of the hidden states of
        `transformers` is behind the final norm, N+norm; `[N]`.
    """
    kept: list[Array] = []
    for ids in _batches(stack, blocks, batch_size):
        rows = [
            (functional.normalize(before, dim=-1) * functional.normalize(after, dim=-1)).sum(dim=-1)
            for before, after in _pairs(stack, ids)
        ]
        kept.append(torch.stack(rows).flatten(1).cpu().numpy())
    means: Array = np.concatenate(kept, axis=1).mean(axis=1, dtype=np.float64)
    return means


@torch.no_grad()
def bare_forward(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> None:
    """Run embeddings, decoder layers and final norm, and nothing else: no analysis can be faster.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.
    """
    for ids in _batches(stack, blocks, batch_size):
        stack.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


@torch.no_grad()
def angular_distances(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect what layer pruning uses: each layer's angular distance at the last token.

    The distance of a layer is arccos(cosine) / pi between its input and its output at the last
    token of a sequence, averaged over sequences: Gromov et al. 2024, The Unreasonable
    Ineffectiveness of the Deeper Layers, section 3.2, for blocks of one layer. One minus the mean
    cosine is the block influence of Men et al. 2024, ShortGPT, section 2.2.

    Args:
        stack: The model.
        blocks: The token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        The mean distance of rows 1..N-1 and N+norm, `[N]`, in [0, 1].
    """
    total = torch.zeros(stack.num_layers, dtype=torch.float64)
    for ids in _batches(stack, blocks, batch_size):
        rows = [
            functional.cosine_similarity(before[:, -1], after[:, -1], dim=-1)
            for before, after in _pairs(stack, ids)
        ]
        cosine = torch.stack(rows).clamp(-1.0, 1.0)
        total += (torch.arccos(cosine) / math.pi).sum(dim=1).double().cpu()
    distances: Array = (total / len(blocks.ids)).numpy()
    return distances


@torch.no_grad()
def generate_plainly(stack: DecoderStack, ids: Tensor, new_tokens: int, **settings: Any) -> Tensor:
    """Generate greedily with `transformers`, exactly so many tokens.

    Args:
        stack: The model.
        ids: The prompts, `[B, T]`, without padding.
        new_tokens: How many tokens to add to each.
        settings: Further ones of its generation config.

    Returns:
        `[B, T + new_tokens]`.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        # No token has this number, so nothing ends early; None would mean the model's own.
        eos_token_id=stack.vocab_size,
        pad_token_id=0,
        **settings,
    )
    made: Tensor = stack.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), generation_config=config
    )
    return made
