"""Sampled tokens follow the distribution and depend only on seed, row and column."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from support.generating import (
    INF,
    NEW,
    PROMPT,
    as_tensor,
    drawn,
    generated,
    generator,
    own_generate,
)
from support.reference_early_exit import (
    ALL_PROPAGATIONS,
    a_stack,
    head_logits,
    own_logits,
    some_heads,
    visited,
)
from support.tiny_models import VOCABULARY, random_ids, tiny_model
from torch import Tensor
from transformers import GenerationConfig

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.models.stack import DecoderStack


@ALL_PROPAGATIONS
def test_seed_determines_sampled_text(propagation: Propagation) -> None:
    early = generator("llama", propagation)
    first, again, other = (drawn(early, PROMPT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert bool((first != other).any(dim=1).all())
    assert not torch.equal(first, generated(early, PROMPT).sequences)


def test_rows_sample_independently_and_first_row_matches_single_row() -> None:
    early = generator("llama")
    same = PROMPT[:1].expand(4, -1)
    rows = drawn(early, same)
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert torch.equal(rows[:1], drawn(early, same[:1]))


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**32 - 1, 20_240_101, 2**63, 10**30])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert drawn(EarlyExit(a_stack("llama")), PROMPT, seed=seed).shape == (3, 9 + NEW)


@functools.cache
def draws(**settings: Any) -> Tensor:
    """Return 4,096 next tokens after one prompt: 256 rows of 16 seeds."""
    early = EarlyExit(a_stack("llama"))
    rows = PROMPT[:1].expand(256, -1)
    return torch.cat(
        [drawn(early, rows, seed=seed, max_new_tokens=1, **settings)[:, -1] for seed in range(16)]
    )


def check_distribution(tokens: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless the tokens are consistent with the probabilities."""
    count = len(tokens)
    shares = torch.bincount(tokens, minlength=VOCABULARY).double() / count
    spread = (expected * (1 - expected) / count).sqrt()
    # 4.5 standard deviations plus one token for rare ones fail once in 10,000 tables of 97.
    assert bool(((shares - expected).abs() <= 4.5 * spread + 1 / count).all())


@functools.cache
def next_logits() -> Tensor:
    return own_logits(a_stack("llama"), PROMPT[:1])[0, -1].double()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_softmax_of_logits(temperature: float) -> None:
    tokens = draws(temperature=temperature)
    check_distribution(tokens, (next_logits() / temperature).softmax(dim=-1))
    if temperature != 1.0:
        with pytest.raises(AssertionError):
            check_distribution(tokens, next_logits().softmax(dim=-1))


def test_top_k_samples_follow_renormalized_softmax() -> None:
    kept = next_logits().topk(5)
    expected = torch.zeros(VOCABULARY).double()
    expected[kept.indices] = kept.values.softmax(dim=-1)
    check_distribution(draws(top_k=5), expected)
    assert set(draws(top_k=5).tolist()) == set(kept.indices.tolist())


def test_top_p_samples_from_smallest_set_that_reaches_probability() -> None:
    ordered = next_logits().softmax(dim=-1).sort(descending=True)
    before = ordered.values.cumsum(dim=0) - ordered.values
    kept = ordered.indices[before < 0.4]
    assert 2 < len(kept) < VOCABULARY / 2
    expected = torch.zeros(VOCABULARY).double()
    expected[kept] = next_logits()[kept].softmax(dim=-1)
    check_distribution(draws(top_p=0.4), expected)
    assert set(draws(top_p=0.4).tolist()) == set(kept.tolist())


def own_draws(stack: DecoderStack, **settings: Any) -> Tensor:
    """Return 4,096 next tokens sampled by `transformers`."""
    rows = PROMPT[:1].expand(256, -1)
    torch.manual_seed(0)
    return torch.cat(
        [
            own_generate(stack, rows, do_sample=True, max_new_tokens=1, **settings)[:, -1]
            for _ in range(16)
        ]
    )


def top_k_probabilities(count: int) -> Tensor:
    """Return the probabilities of top-k sampling with k = `count`."""
    kept = next_logits().topk(count)
    expected = torch.zeros(VOCABULARY).double()
    expected[kept.indices] = kept.values.softmax(dim=-1)
    return expected


def default_draws(early: EarlyExit, **settings: Any) -> Tensor:
    """Return 4,096 next tokens sampled with default settings except those given."""
    settings = {"max_new_tokens": 1, "do_sample": True} | settings
    rows = PROMPT[:1].expand(256, -1)
    return torch.cat(
        [as_tensor(early.generate(rows, seed=seed, **settings))[:, -1] for seed in range(16)]
    )


def test_sampling_defaults_match_transformers() -> None:
    theirs, ours = own_draws(a_stack("llama")), default_draws(EarlyExit(a_stack("llama")))
    for tokens in (theirs, ours):
        check_distribution(tokens, top_k_probabilities(50))
    # Sampling among all tokens would be detected.
    with pytest.raises(AssertionError):
        check_distribution(draws(), top_k_probabilities(50))


@pytest.mark.parametrize(
    ("own", "given", "single", "kept"),
    [
        ({"top_k": 4}, {}, {}, 4),
        ({"top_k": 4}, {"top_k": 50}, {}, 50),
        ({"top_k": 4}, {"top_k": 9}, {"top_k": 6}, 6),
        ({"top_k": 4}, {}, {"top_k": 0}, VOCABULARY),
        ({"top_k": 4}, {}, {"top_k": None}, VOCABULARY),
        ({"top_p": 0.01}, {"top_k": 7}, {"top_p": 1.0}, 7),
        ({"temperature": 1e-6}, {"top_k": 7}, {"temperature": None}, 7),
    ],
)
def test_sampling_settings_override_as_in_transformers(
    own: dict[str, Any], given: dict[str, Any], single: dict[str, Any], kept: int
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.generation_config = GenerationConfig(pad_token_id=1, **own)
    config = GenerationConfig(max_new_tokens=1, do_sample=True, **given)
    settings: dict[str, Any] = {"generation_config": config} | single
    for tokens in (own_draws(stack, **settings), default_draws(EarlyExit(stack), **settings)):
        check_distribution(tokens, top_k_probabilities(kept))


def test_neighbouring_rows_and_seeds_sample_independently() -> None:
    tokens = draws().view(16, 256)
    chance = next_logits().softmax(dim=-1).square().sum().item()
    for one, other in ((tokens[:, 1:], tokens[:, :-1]), (tokens[1:], tokens[:-1])):
        count = one.numel()
        same = (one == other).double().mean().item()
        assert abs(same - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / count)


def test_neighbouring_columns_sample_independently() -> None:
    # All tokens have the same uniform distribution, so places agree by chance.
    stack = DecoderStack(tiny_model("llama"))
    with torch.no_grad():
        stack.model.get_parameter("lm_head.weight").zero_()
    new = drawn(EarlyExit(stack), random_ids(128, 1), max_new_tokens=24)[:, 1:]
    same = (new[:, 1:] == new[:, :-1]).double().mean().item()
    chance = 1 / VOCABULARY
    assert abs(same - chance) <= 4.5 * math.sqrt(chance / new[:, 1:].numel())
    check_distribution(new.flatten(), torch.full((VOCABULARY,), chance).double())


def test_exited_tokens_are_sampled_from_exit_head() -> None:
    stack, heads = a_stack("llama"), some_heads("llama")
    early = EarlyExit(stack, layer=2, rule="cosine", threshold=-INF, heads=heads)
    rows = PROMPT[:1].expand(512, -1)
    tokens = torch.cat(
        [drawn(early, rows, seed=seed, max_new_tokens=1)[:, -1] for seed in range(4)]
    )
    logits = head_logits(stack, early.exits[0], visited(stack, PROMPT[:1])[2])[0, -1]
    check_distribution(tokens, logits.double().softmax(dim=-1))
