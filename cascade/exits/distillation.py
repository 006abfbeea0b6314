"""Distillation: training fitted heads further on the full model's distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from cascade.core.arguments import check_seed
from cascade.core.errors import CorpusError, UsageError
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.exits.fitted_heads import HELD_OUT, FittedHeads
from cascade.exits.head_fitting import rows_of
from cascade.exits.records import Distillation
from cascade.models.overrides.hooks import frozen
from cascade.models.stack import DecoderStack
from cascade.stats.ridge import rms_normalized

#: Token rows per step: 1,024 rows of 49,152 logits in fp32 are 200 MB.
STEP_ROWS = 1024

#: With 0.99, Adam's second moment averages about 100 steps. An epoch has only about as many.
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class _Head:
    """The trainable parameters of a head."""

    weight: nn.Parameter
    bias: nn.Parameter

    def copy(self) -> tuple[Tensor, Tensor]:
        return self.weight.detach().clone(), self.bias.detach().clone()


def distill(
    stack: DecoderStack,
    heads: FittedHeads,
    blocks: TokenBlocks,
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FittedHeads:
    """Train fitted heads on the full model's distributions and return the improved heads.

    Training minimizes KL(full || head) over every token (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1). One of every ten sequences is held out. For each head, the result is the state
    with the lowest KL on the held-out sequences: the state after the best epoch, or the closed
    form if no epoch improves on it.

    Args:
        stack: The model; its weights are not changed.
        heads: Closed-form heads of this model.
        blocks: The corpus, preferably the one that the heads were fitted on.
        epochs: Passes over the corpus; all heads are trained in the same pass.
        learning_rate: Initial learning rate of Adam; it decays to 0 along a half cosine.
        batch_size: Sequences per forward pass.
        seed: Seed of the shuffling.
        progress: Called with the number of tokens processed since the last call.

    Returns:
        New heads with the same propagation maps. `provenance.distillation` lists, per exit layer,
        the KL on the held-out sequences in nats: of the closed form, then after each epoch.

    Raises:
        CorpusError: The corpus has fewer than ten sequences, so that none is held out, or the
            model cannot read it.
        UsageError: `epochs` is below 1, the learning rate is not positive, or the seed is out of
            range.
        ModelError: The heads belong to another model.

    Example:
        >>> from cascade import distill, fit_heads, load, load_blocks
        >>> stack = load("smollm2-135m")
        >>> blocks = load_blocks("embedded", stack.tokenizer, seq_len=32, max_tokens=640)
        >>> heads = fit_heads(stack, blocks, [29])
        >>> distilled = distill(stack, heads, blocks, epochs=1)
        >>> distilled.layers
        [29]
    """
    if epochs < 1 or not learning_rate > 0:
        raise UsageError(
            "expected at least one epoch and a positive learning rate, got "
            f"{epochs} and {learning_rate}"
        )
    check_seed(seed)
    heads.check(stack)
    check_blocks(stack, blocks, batch_size)
    numbers = np.arange(len(blocks.ids))
    training, held_out = numbers[numbers % 10 != HELD_OUT], numbers[numbers % 10 == HELD_OUT]
    if len(held_out) == 0:
        raise CorpusError(
            f"expected at least 10 sequences, one of them to validate distilled heads on, got "
            f"{len(numbers)}; use a larger corpus"
        )
    trained = {
        layer: _Head(*(nn.Parameter(tensor.clone().to(stack.device)) for tensor in pair))
        for layer, pair in heads.weights.items()
    }
    best = {layer: head.copy() for layer, head in trained.items()}
    parameters = [tensor for head in trained.values() for tensor in (head.weight, head.bias)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=_BETAS)
    steps = epochs * step_count(len(training), batch_size, blocks.ids.shape[1])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    shuffler = torch.Generator().manual_seed(seed)
    on_progress = progress or (lambda _: None)
    losses = {
        layer: [loss] for layer, loss in validation_losses(stack, trained, blocks, held_out).items()
    }
    with frozen(stack.model):
        for _ in range(epochs):
            order = training[torch.randperm(len(training), generator=shuffler).numpy()]
            for start in range(0, len(order), batch_size):
                ids = blocks.ids[order[start : start + batch_size]]
                _train(stack, trained, ids, optimizer, schedule, shuffler)
                on_progress(ids.size)
            for layer, loss in validation_losses(stack, trained, blocks, held_out).items():
                if loss < min(losses[layer]):
                    best[layer] = trained[layer].copy()
                losses[layer].append(loss)
    distillation = Distillation(
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        kl_on_sequences_kept_aside={str(layer): values for layer, values in losses.items()},
    )
    provenance = msgspec.structs.replace(heads.provenance, distillation=distillation)
    return replace(heads, weights=best, provenance=provenance)


def trained_tokens(blocks: TokenBlocks) -> int:
    """Return the number of tokens that an epoch trains on: all but one of every ten sequences."""
    sequences, length = blocks.ids.shape
    trained = sum(number % 10 != HELD_OUT for number in range(sequences))
    return trained * int(length)


def step_count(sequences: int, batch_size: int, length: int) -> int:
    """Return the optimizer steps of an epoch: every batch is split into `STEP_ROWS` token rows."""
    sizes = [min(batch_size, sequences - start) for start in range(0, sequences, batch_size)]
    return sum(math.ceil(size * length / STEP_ROWS) for size in sizes)


def _train(
    stack: DecoderStack,
    heads: dict[int, _Head],
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    shuffler: torch.Generator,
) -> None:
    states, final = rows_of(stack, ids, list(heads))
    order = torch.randperm(len(final), generator=shuffler).to(final.device)
    for rows in order.split(STEP_ROWS):
        teacher = log_probabilities(stack, final[rows])
        optimizer.zero_grad()
        with torch.enable_grad():
            for layer, head in heads.items():
                # One backward pass per head, so that only one head's logits are in memory.
                _loss(stack, head, states[layer][rows], teacher).backward()
        optimizer.step()
        schedule.step()


def validation_losses(
    stack: DecoderStack, heads: dict[int, _Head], blocks: TokenBlocks, numbers: np.ndarray
) -> dict[int, float]:
    """Return each head's mean KL on the held-out sequences, in nats."""
    totals = dict.fromkeys(heads, 0.0)
    tokens = 0
    with torch.no_grad():
        for start in range(0, len(numbers), 8):
            states, final = rows_of(stack, blocks.ids[numbers[start : start + 8]], list(heads))
            tokens += len(final)
            for rows in torch.arange(len(final), device=final.device).split(STEP_ROWS):
                teacher = log_probabilities(stack, final[rows])
                for layer, head in heads.items():
                    loss = _loss(stack, head, states[layer][rows], teacher)
                    totals[layer] += float(loss) * len(rows)
    return {layer: total / tokens for layer, total in totals.items()}


def log_probabilities(stack: DecoderStack, normed: Tensor) -> Tensor:
    """Return the full model's log-probabilities of normed final states `[R, D]`, as `[R, V]`."""
    logits: Tensor = stack.decode_normed(_shaped(stack, normed)).flatten(0, 1)[: len(normed)]
    return logits.float().log_softmax(dim=-1)


def _shaped(stack: DecoderStack, rows: Tensor) -> Tensor:
    """Return rows as `[B, T, D]`, with T within the model's positions; repeat the last row."""
    length = min(len(rows), stack.max_positions or len(rows))
    missing = -len(rows) % length
    shaped: Tensor = torch.cat([rows, rows[-1:].expand(missing, -1)]).unflatten(0, (-1, length))
    return shaped


def _loss(stack: DecoderStack, head: _Head, states: Tensor, teacher: Tensor) -> Tensor:
    predicted = torch.addmm(head.bias, rms_normalized(states), head.weight).to(states.dtype)
    logits = stack.decode_normed(_shaped(stack, predicted)).flatten(0, 1)[: len(states)]
    student = logits.float().log_softmax(dim=-1)
    loss: Tensor = nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss
