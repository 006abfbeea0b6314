"""Scoring with exits is the mixed pass that the paper describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    ALL_PROPAGATIONS,
    CLOSE,
    LAYERS,
    PROPAGATIONS,
    SKIPPING,
    SKIPPING_FAMILIES,
    a_bf16_stack,
    a_stack,
    bf16_heads,
    confidence,
    difference,
    head_logits,
    is_mixed,
    own_logits,
    some_exits,
    some_heads,
    some_mask,
    state_of,
    visited,
)
from support.scoring import INF, TEXT, check_it_is_the_mixed_pass, exits_for_text, logits_of, scorer
from support.tiny_models import random_ids
from torch import nn

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.exits.rules import RULES
from cascade.models.stack import DecoderStack

MASK = some_mask(3, 20)


#: Rules whose confidences differ from token to token, in families of either kind.
RULES_THAT_TELL_TOKENS_APART = [name for name in RULES if name != "fixed"]


# --- The two ends: nobody leaves, everybody leaves --------------------------------------------


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_where_nobody_leaves_it_is_the_full_model(family: str, propagation: Propagation) -> None:
    stack, ids = a_stack(family), random_ids(3, 20)
    expected = own_logits(stack, ids)
    for layers in ((), (1,), (2, 3), (LAYERS,)):
        exits = [
            make_exit(
                stack, layer, "top2_gap", INF, heads=some_heads(family), propagation=propagation
            )
            for layer in layers
        ]
        score = EarlyExit(stack, exits=exits, propagation=propagation).score(ids, keep_logits=True)
        assert difference(logits_of(score), expected) == 0.0
        assert torch.equal(score.predictions, expected.argmax(dim=-1))
        assert bool((score.exit_layers == LAYERS).all())


@ALL_FAMILIES
def test_a_padded_row_where_nobody_leaves_is_the_full_models(family: str) -> None:
    stack, ids, mask = a_stack(family), random_ids(2, 20), some_mask(2, 20)
    score = EarlyExit(stack).score(ids, mask, keep_logits=True)
    expected = own_logits(stack, ids, mask)
    assert difference(logits_of(score)[mask.bool()], expected[mask.bool()]) == 0.0
    assert not bool(logits_of(score)[~mask.bool()].any())


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_where_everybody_leaves_it_is_the_exit_head_alone(
    family: str, propagation: Propagation
) -> None:
    stack, ids = a_stack(family), random_ids(2, 20)
    history = visited(stack, ids)
    for layer in range(1, LAYERS + 1):
        for heads in (None, some_heads(family)):
            if propagation == "ridge" and heads is None:
                continue
            early = EarlyExit(
                stack,
                layer=layer,
                rule="cosine",
                threshold=-INF,
                heads=heads,
                propagation=propagation,
            )
            score = early.score(ids, keep_logits=True)
            expected = head_logits(stack, early.exits[0], history[layer])
            # Written out, the head rounds otherwise than in one fused product.
            assert difference(logits_of(score), expected) <= (0.0 if heads is None else CLOSE)
            assert bool((score.exit_layers == layer).all())


# --- In between: the mixed pass, written out by hand ------------------------------------------


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_a_mixture_of_exits_is_the_mixed_pass_by_hand(
    family: str, propagation: Propagation
) -> None:
    early = scorer(family, propagation)
    for mask in (None, MASK):
        score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
        assert is_mixed(score.exit_layers, [1, 2, 3])


@pytest.mark.parametrize("rule", RULES_THAT_TELL_TOKENS_APART)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rule_decides_as_by_hand(family: str, rule: str) -> None:
    layers = (2, 3, 4) if rule == "mean_cosine" else (1, 2, 3)
    early = scorer(family, "ridge", rule=rule, layers=layers, seed=5)
    # The oracle's full model is run on padded rows too, where own_logits knows no mask.
    mask = None if rule == "oracle" else MASK
    score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
    assert is_mixed(score.exit_layers, [layers[1], layers[2]])


def test_a_rule_without_logits_and_patience_can_share_a_cascade() -> None:
    stack = a_stack("llama")
    first = some_exits(stack, "cosine", (1,), share=0.3)
    rest = some_exits(stack, "patience", (2, 3))
    early = EarlyExit(stack, exits=first + rest)
    score = check_it_is_the_mixed_pass(early, TEXT, None, heads=some_heads("llama"))
    assert is_mixed(score.exit_layers, [1, 3])


def test_a_token_at_the_threshold_leaves() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, layer=2, rule="fixed", threshold=1.0)
    assert bool((early.score(TEXT).exit_layers == 2).all())
    at = make_exit(stack, 2, "cosine", 0.0)
    value = confidence(stack, TEXT, at)[1, 3].item()
    for threshold, layer in ((value, 2), (math.nextafter(value, 1.0), LAYERS)):
        early = EarlyExit(stack, layer=2, rule="cosine", threshold=threshold)
        assert early.score(TEXT).exit_layers[1, 3] == layer


def test_the_oracle_lets_go_exactly_those_on_whom_head_and_full_model_agree() -> None:
    stack, ids = a_stack("llama"), random_ids(4, 20)
    early = EarlyExit(stack, layer=3, rule="oracle", threshold=1.0)
    score = early.score(ids)
    full = own_logits(stack, ids).argmax(dim=-1)
    assert is_mixed(score.exit_layers, [3])
    agrees = stack.decode(visited(stack, ids)[3]).argmax(dim=-1) == full
    assert torch.equal(score.exit_layers == 3, agrees)


@pytest.mark.parametrize("seed", [1.5, "1", None, True, [1]])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(UsageError) as caught:
        EarlyExit(a_stack("llama"), seed=seed)
    assert str(caught.value) == f"expected seed a whole number, got {seed!r}"


def test_a_seed_of_numpy_is_one_of_pythons() -> None:
    assert type(EarlyExit(a_stack("llama"), seed=np.int64(3)).seed) is int  # type: ignore[arg-type]


def test_random_exits_depend_on_the_seed() -> None:
    first, again, other = (
        scorer("llama", rule="random", seed=seed).score(TEXT).exit_layers for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@ALL_FAMILIES
def test_exact_hard_tokens_are_the_full_models(family: str) -> None:
    early = scorer(family, "exact")
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert is_mixed(score.exit_layers, [1, 2, 3])
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) == 0.0


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@ALL_FAMILIES
def test_hard_tokens_behind_exited_ones_are_not_the_full_models(
    family: str, propagation: Propagation
) -> None:
    early = scorer(family, propagation)
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) > 1e-3


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_a_left_padded_row_is_the_row_alone(family: str, propagation: Propagation) -> None:
    early, mask = scorer(family, propagation), some_mask(3, 20, left=5)
    together = early.score(TEXT, mask, keep_logits=True)
    alone = early.score(TEXT[:1, 5:], keep_logits=True)
    assert len(set(alone.exit_layers.flatten().tolist())) > 1
    assert torch.equal(together.exit_layers[:1, 5:], alone.exit_layers)
    assert difference(logits_of(together)[:1, 5:], logits_of(alone)) <= CLOSE
    other = TEXT.clone()
    other[0, :5] = 2
    assert torch.equal(logits_of(early.score(other, mask, keep_logits=True)), logits_of(together))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_padding_on_the_right_changes_nothing_before_it(family: str) -> None:
    early, mask = scorer(family), torch.ones_like(TEXT)
    mask[1, 14:] = 0
    together = early.score(TEXT, mask, keep_logits=True)
    alone = early.score(TEXT[1:2, :14], keep_logits=True)
    assert torch.equal(together.exit_layers[1:2, :14], alone.exit_layers)
    assert difference(logits_of(together)[1:2, :14], logits_of(alone)) <= CLOSE
    assert together.scored[1].tolist() == [True] * 13 + [False] * 6


def test_one_token_has_no_perplexity() -> None:
    score = scorer("llama").score(random_ids(2, 1))
    assert score.log_probabilities.shape == (2, 0)
    assert math.isnan(score.perplexity)


def test_a_score_carries_no_gradient() -> None:
    score = scorer("llama").score(random_ids(), keep_logits=True)
    assert not logits_of(score).requires_grad
    assert not score.log_probabilities.requires_grad


# --- Packed and generic: the same results -----------------------------------------------------


@pytest.fixture
def with_attention() -> Iterator[Callable[[str, str], DecoderStack]]:
    """Return a family's stack with another implementation of attention, for one test."""
    changed: list[tuple[DecoderStack, str]] = []

    def change(family: str, implementation: str) -> DecoderStack:
        stack = a_stack(family)
        changed.append((stack, stack.model.config._attn_implementation))
        stack.model.set_attn_implementation(implementation)
        return stack

    yield change
    for stack, implementation in changed:
        stack.model.set_attn_implementation(implementation)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (family, implementation)
        for family in SKIPPING
        for implementation in ("sdpa", "eager")
        if (family, implementation) != ("gemma2", "sdpa")  # soft-caps inside, which sdpa cannot
    ],
)
@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
def test_skipping_changes_no_result(
    family: str,
    implementation: str,
    propagation: Propagation,
    with_attention: Callable[[str, str], DecoderStack],
) -> None:
    stack = with_attention(family, implementation)
    exits = exits_for_text(stack, some_heads(family), propagation)
    packed, generic = (
        EarlyExit(stack, exits=exits, propagation=propagation, skip=skip) for skip in (True, False)
    )
    assert packed.fallback_reason is None
    assert generic.fallback_reason == "asked to compute every token"
    for mask in (None, MASK):
        one, other = (early.score(TEXT, mask, keep_logits=True) for early in (packed, generic))
        assert is_mixed(one.exit_layers, [1, 2, 3])
        assert torch.equal(one.exit_layers, other.exit_layers)
        assert torch.equal(one.predictions, other.predictions)
        assert difference(logits_of(one), logits_of(other)) <= CLOSE


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@SKIPPING_FAMILIES
def test_skipping_in_bfloat16_agrees(family: str, propagation: Propagation) -> None:
    stack = a_bf16_stack(family)
    exits = exits_for_text(stack, bf16_heads(family), propagation)
    packed, generic = (
        EarlyExit(stack, exits=exits, propagation=propagation, skip=skip) for skip in (True, False)
    )
    assert packed.fallback_reason is None
    one, other = (early.score(TEXT) for early in (packed, generic))
    assert is_mixed(one.exit_layers, [1, 2, 3])
    # Eight bits: a token whose confidence lies within a rounding of the threshold may part.
    assert (one.exit_layers == other.exit_layers).float().mean() >= 0.9
    assert (one.predictions == other.predictions).float().mean() >= 0.9


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_bfloat16_where_nobody_leaves_is_the_full_model(
    family: str, propagation: Propagation
) -> None:
    stack, heads = a_bf16_stack(family), bf16_heads(family)
    exits = [
        make_exit(stack, layer, "max_probability", INF, heads=heads, propagation=propagation)
        for layer in (1, 3)
    ]
    score = EarlyExit(stack, exits=exits, propagation=propagation).score(TEXT, keep_logits=True)
    assert difference(logits_of(score), own_logits(stack, TEXT).float()) == 0.0
    assert bool((score.exit_layers == LAYERS).all())


@ALL_FAMILIES
def test_bfloat16_where_everybody_leaves_is_the_exit_head_alone(family: str) -> None:
    stack = a_bf16_stack(family)
    history = visited(stack, TEXT)
    for layer, heads, propagation in (
        (2, None, "frozen"),
        (2, bf16_heads(family), "ridge"),
        (LAYERS, None, "exact"),
    ):
        early = EarlyExit(stack, layer=layer, threshold=-INF, heads=heads, propagation=propagation)
        score = early.score(TEXT, keep_logits=True)
        expected = head_logits(stack, early.exits[0], history[layer]).float()
        # Written out, a ridge head may round otherwise, by a unit in the last of eight bits.
        close = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        assert difference(logits_of(score), expected) <= (close if heads else 0.0)
        assert bool((score.exit_layers == layer).all())


@ALL_FAMILIES
def test_a_family_that_cannot_skip_says_so(family: str) -> None:
    reason = EarlyExit(a_stack(family)).fallback_reason
    if family in SKIPPING:
        assert reason is None
    else:
        assert reason == (
            f"{family} layers have no separate q_proj, k_proj, v_proj and o_proj behind an "
            "input_layernorm"
        )


# --- What a pass leaves behind ----------------------------------------------------------------


def raise_it(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("planted")


#: Where a pass can break: in a layer, inside its attention, in the LM head.
BREAKS: dict[str, Callable[[DecoderStack], nn.Module]] = {
    "layer": lambda stack: stack.layers[2],
    "attention": lambda stack: stack.layers[2].get_submodule("self_attn.o_proj"),
    "projection": lambda stack: stack.layers[3].get_submodule("self_attn.k_proj"),
    "lm_head": lambda stack: stack.lm_head,
}


@pytest.mark.parametrize("place", BREAKS)
@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_model_is_left_as_it_was_also_when_something_raises(
    family: str, skip: bool, place: str
) -> None:
    early = scorer(family, "ridge", skip=skip)
    before, expected = state_of(early.stack), early.score(TEXT, keep_logits=True)
    assert is_mixed(expected.exit_layers, [1, 2, 3])
    assert state_of(early.stack) == before
    handle = BREAKS[place](early.stack).register_forward_pre_hook(raise_it)
    try:
        planted = state_of(early.stack)
        with pytest.raises(ArithmeticError, match="planted"):
            early.score(TEXT)
        assert state_of(early.stack) == planted
    finally:
        handle.remove()
    assert torch.equal(logits_of(early.score(TEXT, keep_logits=True)), logits_of(expected))


@ALL_FAMILIES
def test_scoring_leaves_every_family_as_it_was(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    before, logits = state_of(stack), own_logits(stack, ids)
    for propagation in PROPAGATIONS:
        scorer(family, propagation).score(ids)
        assert state_of(stack) == before
    assert difference(own_logits(stack, ids), logits) == 0.0
