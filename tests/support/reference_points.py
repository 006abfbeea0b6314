"""Points measured by hand: what a row must say, from scored batches and the model's own logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.evaluation.operating_points import OperatingPoint
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.models.flops import Counts, flops, full_flops
from cascade.models.stack import DecoderStack
from support.reference_early_exit import LAYERS, a_settled_stack, own_logits, random_blocks

#: Llama-shaped, Llama-shaped with soft-capping and sliding windows, and not Llama-shaped.
FAMILIES = ("llama", "gemma2", "gpt2")


@functools.cache
def settled_heads(family: str) -> FittedHeads:
    """Return heads of every layer, for a stack whose exits often agree with the full model."""
    return fit_heads(a_settled_stack(family), random_blocks(), range(1, LAYERS + 1))


def blocks_of(sequences: int, length: int = 12, *, seed: int = 0) -> TokenBlocks:
    ids = np.random.default_rng(seed).integers(2, 97, (sequences, length)).astype(np.int32)
    return TokenBlocks(ids, "random", f"random-{seed}", sequences)


@dataclass
class Scored:
    """A corpus scored with one point's exit, next to the full model.

    Attributes:
        leaves: `[S, T]`.
        logits: `[S, T, V]`.
        full: `[S, T, V]`, the model's own.
        counts: What was computed, all batches together.
    """

    leaves: Tensor
    logits: Tensor
    full: Tensor
    counts: Counts


def score_by_hand(
    stack: DecoderStack,
    blocks: TokenBlocks,
    point: OperatingPoint,
    *,
    heads: FittedHeads | None,
    propagation: Propagation,
    batch_size: int,
    earlier: Sequence[int] = (),
    seed: int = 0,
) -> Scored:
    """Score a corpus by `EarlyExit`, batch by batch.

    Args:
        stack: The model.
        blocks: The corpus.
        point: Below the last layer, so that a token's exit layer says whether it left.
        heads: Fitted heads; the logit lens where not given.
        propagation: What upper layers see.
        batch_size: Sequences per pass: packed queries are padded to the longest of a batch.
        earlier: Exit layers that let nothing go, for a rule that looks at them.
        seed: For rules that draw.
    """
    assert point.layer < stack.num_layers
    exits = [
        make_exit(stack, layer, point.rule, threshold, heads=heads, propagation=propagation)
        for layer, threshold in [
            *((layer, math.inf) for layer in earlier),
            (point.layer, point.threshold),
        ]
    ]
    early = EarlyExit(stack, exits=exits, propagation=propagation, seed=seed)
    leaves, logits, full, counts = [], [], [], Counts.of(stack.num_layers)
    for rows, _ in blocks.batches(batch_size):
        ids = torch.from_numpy(rows).long()
        score = early.score(ids, keep_logits=True)
        assert score.logits is not None
        leaves.append(score.exit_layers == point.layer)
        logits.append(score.logits)
        full.append(own_logits(stack, ids))
        counts = counts + score.counts
    return Scored(torch.cat(leaves), torch.cat(logits), torch.cat(full), counts)


def row_by_hand(
    stack: DecoderStack, blocks: TokenBlocks, scored: Scored, heads: FittedHeads | None
) -> dict[str, float | None]:
    """Return the figures of a point's row that do not depend on a clock or on draws."""
    leaves = scored.leaves
    same = scored.logits.argmax(dim=-1) == scored.full.argmax(dim=-1)
    logs = scored.logits.double().log_softmax(dim=-1)
    full_logs = scored.full.double().log_softmax(dim=-1)
    following = torch.from_numpy(blocks.ids[:, 1:]).long()[..., None]
    nll, full_nll = (-some[:, :-1].gather(-1, following)[..., 0] for some in (logs, full_logs))
    hard = ~leaves[:, :-1]
    divergence = (full_logs.exp() * (full_logs - logs)).sum(dim=-1)
    hidden = stack.hidden_size
    operations = flops(
        stack,
        scored.counts,
        map_width=heads.width if heads else 0,
        head_size=hidden * hidden if heads else 0,
    )
    return {
        "exit_share": leaves.double().mean().item(),
        "agreement": same.double().mean().item(),
        "exit_agreement": same[leaves].double().mean().item() if leaves.any() else None,
        "perplexity": nll.mean().exp().item(),
        "perplexity_ratio": (nll.mean() - full_nll.mean()).exp().item(),
        "hard_perplexity_ratio": (nll - full_nll)[hard].mean().exp().item() if hard.any() else None,
        "kl": divergence.mean().item(),
        "layers_per_token": sum(scored.counts.layer_rows) / blocks.ids.size,
        "flops_ratio": operations / full_flops(stack, *blocks.ids.shape),
    }


def losses_by_hand(scored: Scored) -> Any:
    """Return the share of each sequence's tokens not predicted as by the full model, `[S]`."""
    differs = scored.logits.argmax(dim=-1) != scored.full.argmax(dim=-1)
    return differs.double().mean(dim=1).numpy()
