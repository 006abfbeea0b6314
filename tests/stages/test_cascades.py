"""Test that the laws of early exit hold across the stages of a cascade."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    SKIPPING_FAMILIES,
    a_bf16_stack,
    a_stack,
    apart,
    by_hand,
    difference,
    one_line,
    own_logits,
    some_mask,
    visited,
)
from support.tiny_stages import (
    TEXT,
    a_cascade,
    ends,
    logits_of,
    share_of,
)

from cascade.core.errors import (
    UsageError,
)
from cascade.core.schema import to_plain
from cascade.decoding.early_exit import Propagation
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.stage import new_stage

INF = math.inf


MASK = some_mask(3, 20)


BOTH = pytest.mark.parametrize("propagation", ["frozen", "exact"])


STAGES = pytest.mark.parametrize("stages", [1, 2])


@BOTH
@STAGES
@ALL_FAMILIES
def test_the_cascade_equals_the_base_if_all_tokens_exit(
    family: str, stages: int, propagation: Propagation
) -> None:
    stack = a_stack(family)
    cascade = ends(stack, [-INF] * stages, propagation=propagation)
    for mask in (None, MASK):
        expected = own_logits(stack, TEXT, mask)
        valid = torch.ones_like(TEXT).bool() if mask is None else mask.bool()
        score = cascade.score(TEXT, mask, keep_logits=True)
        assert difference(logits_of(score)[valid], expected[valid]) == 0.0
        assert bool((score.exit_layers[valid] == LAYERS).all())


@BOTH
@STAGES
@ALL_FAMILIES
def test_the_cascade_equals_the_extended_model_if_no_token_exits(
    family: str, stages: int, propagation: Propagation
) -> None:
    stack = a_stack(family)
    cascade = ends(stack, [INF] * stages, propagation=propagation)
    expected = own_logits(cascade.stack, TEXT)
    score = cascade.score(TEXT, keep_logits=True)
    assert cascade.stack.num_layers == LAYERS + (2, 3)[stages - 1]
    assert difference(logits_of(score), expected) == 0.0
    assert difference(own_logits(stack, TEXT), expected) > 0.1, "the stages do nothing"
    for fewer in range(stages):
        alone = cascade.score(TEXT, stages=fewer, keep_logits=True)
        assert torch.equal(logits_of(alone), own_logits(cascade.stack_below(fewer), TEXT))


@ALL_FAMILIES
def test_all_tokens_can_enter_the_first_stage_and_none_the_second(family: str) -> None:
    cascade = ends(a_stack(family), [INF, -INF])
    score = cascade.score(TEXT, keep_logits=True)
    assert torch.equal(logits_of(score), own_logits(cascade.stack_below(1), TEXT))
    assert bool((score.exit_layers == LAYERS + 2).all())


@ALL_FAMILIES
def test_an_untrained_stage_changes_no_token(family: str) -> None:
    stack = a_stack(family)
    cascade = Cascade(stack)
    cascade.add_stage(new_stage(stack, 2), Entry(3, share_of(stack, TEXT, 3)))
    score = cascade.score(TEXT, keep_logits=True)
    assert set(score.exit_layers.flatten().tolist()) == {LAYERS, LAYERS + 2}
    assert difference(logits_of(score), own_logits(stack, TEXT)) <= CLOSE


@BOTH
@STAGES
@ALL_FAMILIES
def test_a_cascade_with_easy_and_hard_tokens_matches_the_reference(
    family: str, stages: int, propagation: Propagation
) -> None:
    cascade = a_cascade(family, propagation, stages=stages)
    exits = cascade.early_exit().exits
    for mask in (None, MASK):
        score = cascade.score(TEXT, mask, keep_logits=True)
        expected = by_hand(cascade.stack, TEXT, exits, mask, propagation=propagation)
        valid = torch.ones_like(TEXT).bool() if mask is None else mask.bool()
        exit_layers = [LAYERS, LAYERS + 2, LAYERS + 3][: stages + 1]
        assert set(score.exit_layers[valid].tolist()) == {*exit_layers}
        assert torch.equal(score.exit_layers, expected.exit_layers)
        assert apart(logits_of(score), expected.logits * valid[..., None]) <= CLOSE


@BOTH
@ALL_FAMILIES
def test_a_left_padded_row_equals_the_row_without_padding(
    family: str, propagation: Propagation
) -> None:
    cascade = a_cascade(family, propagation)
    together = cascade.score(TEXT, some_mask(3, 20, left=5), keep_logits=True)
    alone = cascade.score(TEXT[:1, 5:], keep_logits=True)
    assert torch.equal(together.exit_layers[:1, 5:], alone.exit_layers)
    assert apart(logits_of(together)[:1, 5:], logits_of(alone)) <= CLOSE


@ALL_FAMILIES
def test_with_exact_propagation_hard_tokens_get_the_logits_of_the_extended_model(
    family: str,
) -> None:
    cascade = a_cascade(family, "exact")
    score = cascade.score(TEXT, keep_logits=True)
    hard = score.exit_layers == cascade.stack.num_layers
    assert 0 < int(hard.sum()) < hard.numel()
    expected = own_logits(cascade.stack, TEXT)
    assert difference(logits_of(score)[hard], expected[hard]) == 0.0


@ALL_FAMILIES
def test_easy_tokens_keep_the_logits_of_the_base(family: str) -> None:
    cascade = a_cascade(family)
    score = cascade.score(TEXT, keep_logits=True)
    easy = score.exit_layers == LAYERS
    assert difference(logits_of(score)[easy], own_logits(a_stack(family), TEXT)[easy]) <= CLOSE


def test_a_bf16_base_has_bf16_stages() -> None:
    stack = a_bf16_stack("llama")
    cascade = ends(stack, [INF])
    assert {value.dtype for value in cascade.stages[0].parameters()} == {torch.bfloat16}
    expected = own_logits(cascade.stack, TEXT).float()
    assert torch.equal(logits_of(cascade.score(TEXT, keep_logits=True)), expected)


def test_ridge_propagation_is_refused() -> None:
    with pytest.raises(UsageError, match="among frozen, exact") as caught:
        Cascade(a_stack("llama"), propagation="ridge")
    one_line(caught)


@pytest.mark.parametrize("stages", [-1, 3])
def test_a_stage_count_out_of_range_is_refused(stages: int) -> None:
    with pytest.raises(UsageError, match=f"expected 0 to 2 stages, got {stages}"):
        a_cascade("llama").score(TEXT, stages=stages)


@STAGES
@SKIPPING_FAMILIES
def test_a_stage_computes_only_the_tokens_that_enter_it(family: str, stages: int) -> None:
    cascade = a_cascade(family, stages=stages)
    assert cascade.early_exit().fallback_reason is None
    score = cascade.score(TEXT)
    hard = [int((score.exit_layers > layer).sum()) for layer in (LAYERS, LAYERS + 2)][:stages]
    assert 0 < hard[-1] <= hard[0] < TEXT.numel()
    expected = [
        {"layer_rows": rows * layers, "key_value_rows": (TEXT.numel() - rows) * layers}
        for rows, layers in zip(hard, (2, 1), strict=False)
    ]
    assert to_plain(cascade.stage_rows(score.counts)) == expected
    shares = cascade.exit_shares(score)
    remaining = [TEXT.numel(), *hard, 0]
    assert shares == [(a - b) / TEXT.numel() for a, b in itertools.pairwise(remaining)]
    assert sum(shares) == pytest.approx(1.0)


def test_without_skipping_every_row_is_counted() -> None:
    cascade = a_cascade("gpt2")
    score = cascade.score(TEXT)
    assert to_plain(cascade.stage_rows(score.counts)) == [
        {"layer_rows": 120, "key_value_rows": 0},
        {"layer_rows": 60, "key_value_rows": 0},
    ]


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_routed_states_match_the_reference(family: str, propagation: Propagation) -> None:
    cascade = a_cascade(family, propagation)
    states = visited(cascade.routed(), TEXT)
    exits = cascade.early_exit().exits
    expected = by_hand(cascade.stack, TEXT, exits, propagation="frozen").states
    assert len(states) == cascade.stack.num_layers + 1
    for got, wanted in zip(states, expected, strict=True):
        assert apart(got, wanted) <= CLOSE
