"""Early exits to score with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cascade.decoding.early_exit import EarlyExit, Propagation, Score
from cascade.decoding.forward import Exit
from cascade.exits.fitted_heads import FittedHeads
from cascade.models.stack import DecoderStack
from support.reference_early_exit import (
    CLOSE,
    a_stack,
    by_hand,
    difference,
    some_exits,
    some_heads,
)
from support.tiny_models import random_ids

INF = math.inf


TEXT = random_ids(3, 20, seed=1)


@functools.cache
def scorer(
    family: str,
    propagation: Propagation = "frozen",
    *,
    rule: str = "top2_gap",
    layers: tuple[int, ...] = (1, 2, 3),
    seed: int = 0,
    skip: bool = True,
) -> EarlyExit:
    """Return early exit with fitted heads whose exits each let a third of TEXT go."""
    exits = exits_for_text(a_stack(family), some_heads(family), propagation, rule, layers, seed)
    return EarlyExit(a_stack(family), exits=exits, propagation=propagation, seed=seed, skip=skip)


def exits_for_text(
    stack: DecoderStack,
    heads: FittedHeads,
    propagation: Propagation,
    rule: str = "top2_gap",
    layers: Sequence[int] = (1, 2, 3),
    seed: int = 0,
) -> list[Exit]:
    return some_exits(
        stack,
        rule,
        layers,
        heads=heads,
        propagation=propagation,
        share=0.35,
        text=TEXT,
        seed=seed,
    )


def logits_of(score: Score) -> Tensor:
    assert score.logits is not None
    return score.logits


def check_it_is_the_mixed_pass(
    early: EarlyExit, ids: Tensor, mask: Tensor | None, *, heads: FittedHeads, close: float = CLOSE
) -> Score:
    """Raise AssertionError unless everything in a score is what the mixed pass by hand gives."""
    score = early.score(ids, mask, keep_logits=True)
    expected = by_hand(
        early.stack,
        ids,
        early.exits,
        mask,
        propagation=early.propagation,
        heads=heads,
        seed=early.seed,
    )
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert torch.equal(score.exit_layers, expected.exit_layers), "other exits"
    assert difference(logits_of(score), expected.logits * valid[..., None]) <= close, "other logits"
    assert torch.equal(score.predictions[valid], expected.logits.argmax(dim=-1)[valid])
    logs = expected.logits.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    scored = valid[:, 1:] & valid[:, :-1]
    assert torch.equal(score.scored, scored)
    assert difference(score.log_probabilities[scored], logs[scored]) <= close
    assert score.perplexity == pytest.approx(math.exp(-logs[scored].double().mean()), rel=1e-5)
    return score
