"""Reference passes of the benchmarks: bare, the original study's, a peer's, and `generate`."""

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
from cascade.decoding.generation_settings import plain_settings
from cascade.exits.history import HiddenHistory
from cascade.models.stack import DecoderStack


def _batches(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Iterator[Tensor]:
    for ids, _ in blocks.batches(batch_size):
        yield torch.from_numpy(ids.astype(np.int64)).to(stack.device)


def _pairs(stack: DecoderStack, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Run the whole model as in `transformers`, with LM head and KV cache.

    Returns:
        Pairs of states that rows 1..N-1 and N+norm compare, `[B, T, D]` each.
    """
    output = stack.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
    )
    history = HiddenHistory.from_transformers(output.hidden_states)
    last = history.num_layers
    return [history.pair(layer) for layer in (*range(1, last), f"{last}+norm")]


@torch.no_grad()
def seed_means(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect similarities as in the original study: keep all of them, then average.

    Args:
        stack: The model.
        blocks: Token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        Mean similarity of rows 1..N-1 and N+norm, `[N]`. Row N is missing, because the last hidden
        state of `transformers` lies behind the final norm.
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
    """Run only embeddings, decoder layers and final norm. No analysis can be faster.

    Args:
        stack: The model.
        blocks: Token blocks.
        batch_size: Sequences per forward pass.
    """
    for ids in _batches(stack, blocks, batch_size):
        stack.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


@torch.no_grad()
def angular_distances(stack: DecoderStack, blocks: TokenBlocks, batch_size: int) -> Array:
    """Collect the metric of layer pruning: the angular distance of each layer at the last token.

    The distance of a layer is arccos(cosine) / pi of its input and output at the last token of a
    sequence, averaged over sequences (Gromov et al. 2024, The Unreasonable Ineffectiveness of the
    Deeper Layers, section 3.2, for blocks of one layer). One minus the mean cosine is the block
    influence of Men et al. 2024, ShortGPT, section 2.2.

    Args:
        stack: The model.
        blocks: Token blocks.
        batch_size: Sequences per forward pass.

    Returns:
        Mean distance of rows 1..N-1 and N+norm in [0, 1], `[N]`.
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
    """Generate an exact number of tokens greedily with `transformers`.

    What the model's generation config adds (penalties, bans, beams) is turned off.

    Args:
        stack: The model.
        ids: Prompts without padding, `[B, T]`.
        new_tokens: Number of new tokens per prompt.
        settings: Other settings of a generation config.

    Returns:
        Prompts and new tokens, `[B, T + new_tokens]`.
    """
    made: Tensor = stack.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        **plain_settings(stack.model.generation_config)
        | {
            "do_sample": False,
            "max_new_tokens": new_tokens,
            # No token has this id, so generation never ends early.
            "eos_token_id": stack.vocab_size,
            "pad_token_id": 0,
        }
        | settings,
    )
    return made
