"""Scoring with exits matches a reference implementation of the paper."""

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


#: Rules whose confidences differ between tokens.
VARYING_RULES = [name for name in RULES if name != "fixed"]


# --- No token exits, all tokens exit ----------------------------------------------------------


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_without_exits_scores_match_full_model(family: str, propagation: Propagation) -> None:
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
def test_without_exits_padded_row_matches_full_model(family: str) -> None:
    stack, ids, mask = a_stack(family), random_ids(2, 20), some_mask(2, 20)
    score = EarlyExit(stack).score(ids, mask, keep_logits=True)
    expected = own_logits(stack, ids, mask)
    assert difference(logits_of(score)[mask.bool()], expected[mask.bool()]) == 0.0
    assert not bool(logits_of(score)[~mask.bool()].any())


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_if_all_tokens_exit_scores_match_exit_head(family: str, propagation: Propagation) -> None:
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
            # The fused product of the head rounds differently from separate operations.
            assert difference(logits_of(score), expected) <= (0.0 if heads is None else CLOSE)
            assert bool((score.exit_layers == layer).all())


# --- Some tokens exit -------------------------------------------------------------------------


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_mixed_exits_match_reference(family: str, propagation: Propagation) -> None:
    early = scorer(family, propagation)
    for mask in (None, MASK):
        score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
        assert is_mixed(score.exit_layers, [1, 2, 3])


@pytest.mark.parametrize("rule", VARYING_RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rule_matches_reference(family: str, rule: str) -> None:
    layers = (2, 3, 4) if rule == "mean_cosine" else (1, 2, 3)
    early = scorer(family, "ridge", rule=rule, layers=layers, seed=5)
    # The reference computes the oracle's full predictions without a mask.
    mask = None if rule == "oracle" else MASK
    score = check_it_is_the_mixed_pass(early, TEXT, mask, heads=some_heads(family))
    assert is_mixed(score.exit_layers, [layers[1], layers[2]])


def test_rule_without_logits_can_be_combined_with_patience() -> None:
    stack = a_stack("llama")
    first = some_exits(stack, "cosine", (1,), share=0.3)
    rest = some_exits(stack, "patience", (2, 3))
    early = EarlyExit(stack, exits=first + rest)
    score = check_it_is_the_mixed_pass(early, TEXT, None, heads=some_heads("llama"))
    assert is_mixed(score.exit_layers, [1, 3])


def test_token_at_threshold_exits() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, layer=2, rule="fixed", threshold=1.0)
    assert bool((early.score(TEXT).exit_layers == 2).all())
    at = make_exit(stack, 2, "cosine", 0.0)
    value = confidence(stack, TEXT, at)[1, 3].item()
    for threshold, layer in ((value, 2), (math.nextafter(value, 1.0), LAYERS)):
        early = EarlyExit(stack, layer=2, rule="cosine", threshold=threshold)
        assert early.score(TEXT).exit_layers[1, 3] == layer


def test_oracle_exits_tokens_on_which_head_and_full_model_agree() -> None:
    stack, ids = a_stack("llama"), random_ids(4, 20)
    early = EarlyExit(stack, layer=3, rule="oracle", threshold=1.0)
    score = early.score(ids)
    full = own_logits(stack, ids).argmax(dim=-1)
    assert is_mixed(score.exit_layers, [3])
    agrees = stack.decode(visited(stack, ids)[3]).argmax(dim=-1) == full
    assert torch.equal(score.exit_layers == 3, agrees)


@pytest.mark.parametrize("seed", [1.5, "1", None, True, [1]])
def test_non_integer_seed_is_rejected(seed: Any) -> None:
    with pytest.raises(UsageError) as caught:
        EarlyExit(a_stack("llama"), seed=seed)
    assert str(caught.value) == f"expected seed to be an integer, got {seed!r}"


def test_numpy_seed_is_converted_to_int() -> None:
    assert type(EarlyExit(a_stack("llama"), seed=np.int64(3)).seed) is int  # type: ignore[arg-type]


def test_random_exits_depend_on_the_seed() -> None:
    first, again, other = (
        scorer("llama", rule="random", seed=seed).score(TEXT).exit_layers for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@ALL_FAMILIES
def test_exact_hard_tokens_match_full_model(family: str) -> None:
    early = scorer(family, "exact")
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert is_mixed(score.exit_layers, [1, 2, 3])
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) == 0.0


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@ALL_FAMILIES
def test_hard_tokens_after_exited_tokens_differ_from_full_model(
    family: str, propagation: Propagation
) -> None:
    early = scorer(family, propagation)
    score = early.score(TEXT, keep_logits=True)
    hard = score.exit_layers == LAYERS
    assert difference(logits_of(score)[hard], own_logits(early.stack, TEXT)[hard]) > 1e-3


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_left_padded_row_scores_like_row_alone(family: str, propagation: Propagation) -> None:
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
def test_right_padding_does_not_change_tokens_before_it(family: str) -> None:
    early, mask = scorer(family), torch.ones_like(TEXT)
    mask[1, 14:] = 0
    together = early.score(TEXT, mask, keep_logits=True)
    alone = early.score(TEXT[1:2, :14], keep_logits=True)
    assert torch.equal(together.exit_layers[1:2, :14], alone.exit_layers)
    assert difference(logits_of(together)[1:2, :14], logits_of(alone)) <= CLOSE
    assert together.scored[1].tolist() == [True] * 13 + [False] * 6


def test_perplexity_of_one_token_is_nan() -> None:
    score = scorer("llama").score(random_ids(2, 1))
    assert score.log_probabilities.shape == (2, 0)
    assert math.isnan(score.perplexity)


def test_score_has_no_gradient() -> None:
    score = scorer("llama").score(random_ids(), keep_logits=True)
    assert not logits_of(score).requires_grad
    assert not score.log_probabilities.requires_grad


# --- Skipping changes no result ---------------------------------------------------------------


@pytest.fixture
def with_attention() -> Iterator[Callable[[str, str], DecoderStack]]:
    """Return a function that sets the attention implementation of a stack during a test."""
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
        if (family, implementation) != ("gemma2", "sdpa")  # sdpa cannot soft-cap scores
    ],
)
@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
def test_skipping_does_not_change_results(
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
    assert generic.fallback_reason == "skip=False computes every token"
    for mask in (None, MASK):
        one, other = (early.score(TEXT, mask, keep_logits=True) for early in (packed, generic))
        assert is_mixed(one.exit_layers, [1, 2, 3])
        assert torch.equal(one.exit_layers, other.exit_layers)
        assert torch.equal(one.predictions, other.predictions)
        assert difference(logits_of(one), logits_of(other)) <= CLOSE


@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
@SKIPPING_FAMILIES
def test_skipping_agrees_in_bfloat16(family: str, propagation: Propagation) -> None:
    stack = a_bf16_stack(family)
    exits = exits_for_text(stack, bf16_heads(family), propagation)
    packed, generic = (
        EarlyExit(stack, exits=exits, propagation=propagation, skip=skip) for skip in (True, False)
    )
    assert packed.fallback_reason is None
    one, other = (early.score(TEXT) for early in (packed, generic))
    assert is_mixed(one.exit_layers, [1, 2, 3])
    # bfloat16 has eight bits: a confidence close to the threshold may be rounded across it.
    assert (one.exit_layers == other.exit_layers).float().mean() >= 0.9
    assert (one.predictions == other.predictions).float().mean() >= 0.9


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_without_exits_bfloat16_scores_match_full_model(
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
def test_if_all_tokens_exit_bfloat16_scores_match_exit_head(family: str) -> None:
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
        # The fused product of a ridge head may differ by one unit in the last of eight bits.
        close = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
        assert difference(logits_of(score), expected) <= (close if heads else 0.0)
        assert bool((score.exit_layers == layer).all())


@ALL_FAMILIES
def test_fallback_reason_of_every_family(family: str) -> None:
    reason = EarlyExit(a_stack(family)).fallback_reason
    if family in SKIPPING:
        assert reason is None
    else:
        assert reason == (
            f"{family} layers have no separate q_proj, k_proj, v_proj and o_proj after an "
            "input_layernorm"
        )


# --- Side effects -----------------------------------------------------------------------------


def raise_it(*_: Any, **__: Any) -> Any:
    raise ArithmeticError("planted")


#: Modules that can raise an error during a pass.
BREAKS: dict[str, Callable[[DecoderStack], nn.Module]] = {
    "layer": lambda stack: stack.layers[2],
    "attention": lambda stack: stack.layers[2].get_submodule("self_attn.o_proj"),
    "projection": lambda stack: stack.layers[3].get_submodule("self_attn.k_proj"),
    "lm_head": lambda stack: stack.lm_head,
}


@pytest.mark.parametrize("place", BREAKS)
@pytest.mark.parametrize("skip", [True, False], ids=["packed", "generic"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scoring_restores_model_after_exception(family: str, skip: bool, place: str) -> None:
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
def test_scoring_does_not_change_model(family: str) -> None:
    stack, ids = a_stack(family), random_ids()
    before, logits = state_of(stack), own_logits(stack, ids)
    for propagation in PROPAGATIONS:
        scorer(family, propagation).score(ids)
        assert state_of(stack) == before
    assert difference(own_logits(stack, ids), logits) == 0.0
