"""Generation matches scoring; without exits it matches `generate` of transformers."""

from __future__ import annotations

import functools

import pytest
import torch
from support.generating import (
    INF,
    MASK,
    NEW,
    PROMPT,
    REPEATING,
    RULES,
    check_refusal,
    generated,
    generator,
    length_of,
    longer,
    own_ended_text,
    own_text,
)
from support.reference_early_exit import (
    ALL_FAMILIES,
    ALL_PROPAGATIONS,
    LAYERS,
    PROPAGATIONS,
    SKIPPING,
    a_bf16_stack,
    a_stack,
    bf16_heads,
    head_logits,
    some_exits,
    some_heads,
    visited,
)
from torch import Tensor

from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.decoding.forward import Exit
from cascade.decoding.growing_text import Generation


@functools.cache
def a_text(family: str, propagation: Propagation, *, padded: bool = True) -> Generation:
    """Return a cached generation after the prompts; callers must not change it."""
    return generated(generator(family, propagation), PROMPT, MASK if padded else None)


# --- Generation matches scoring ---------------------------------------------------------------


def check_generation_matches_scoring(
    early: EarlyExit, result: Generation, mask: Tensor | None
) -> None:
    """Raise AssertionError unless scoring the text gives the same tokens and exits."""
    start = PROMPT.shape[1]
    assert result.sequences.shape == (len(PROMPT), start + NEW)
    assert result.exit_layers.shape == (len(PROMPT), NEW)
    assert torch.equal(result.sequences[:, :start], PROMPT)
    score = early.score(result.sequences, None if mask is None else longer(mask, result.sequences))
    assert torch.equal(score.predictions[:, start - 1 : -1], result.sequences[:, start:])
    assert torch.equal(score.exit_layers[:, start - 1 : -1], result.exit_layers)


#: Without padding, transformers prepares no mask, and layers take a different code path.
PADDED_AND_NOT = pytest.mark.parametrize(
    ("propagation", "padded"),
    [("frozen", False), *((propagation, True) for propagation in PROPAGATIONS)],
    ids=["frozen-unpadded", *PROPAGATIONS],
)


@PADDED_AND_NOT
@ALL_FAMILIES
def test_generation_matches_scoring_of_generated_text(
    family: str, propagation: Propagation, padded: bool
) -> None:
    result = a_text(family, propagation, padded=padded)
    check_generation_matches_scoring(
        generator(family, propagation), result, MASK if padded else None
    )
    exit_layers = set(result.exit_layers.flatten().tolist())
    assert LAYERS in exit_layers, "expected a token that does not exit"
    assert len(exit_layers) >= 3, f"expected exits at several layers, got {exit_layers}"


@ALL_PROPAGATIONS
@pytest.mark.parametrize(
    ("family", "rule"),
    [
        (family, rule)
        for family in ("llama", "gpt2")
        for rule in RULES
        if (family, rule) != ("gpt2", "patience")  # two exits that always agree
    ],
)
def test_generation_matches_scoring_for_every_rule(
    family: str, rule: str, propagation: Propagation
) -> None:
    early = generator(family, propagation, rule=rule, layers=(2, 3))
    result = generated(early, PROMPT, MASK)
    check_generation_matches_scoring(early, result, MASK)
    exit_layers = result.exit_layers
    assert 0 < int((exit_layers < LAYERS).sum()) < exit_layers.numel()


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_fixed_exit_matches_scoring(family: str, propagation: Propagation) -> None:
    heads = some_heads(family)
    for layer in (1, 3, LAYERS):
        early = EarlyExit(
            a_stack(family),
            layer=layer,
            rule="fixed",
            threshold=1.0,
            heads=heads,
            propagation=propagation,
        )
        result = generated(early, PROMPT, MASK)
        check_generation_matches_scoring(early, result, MASK)
        assert bool((result.exit_layers == layer).all())


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_exit_at_last_layer(family: str, propagation: Propagation) -> None:
    early = generator(family, propagation, layers=(2, LAYERS))
    result = generated(early, PROMPT, MASK)
    check_generation_matches_scoring(early, result, MASK)
    assert {2, LAYERS} == set(result.exit_layers.flatten().tolist())


@pytest.mark.parametrize(
    ("family", "propagation"),
    [*((family, "frozen") for family in SKIPPING), ("qwen3", "ridge"), ("gemma3_text", "ridge")],
)
def test_skipping_does_not_change_text_beyond_window(family: str, propagation: Propagation) -> None:
    packed, generic = (generator(family, propagation, skip=skip) for skip in (True, False))
    assert (packed.fallback_reason is None, generic.fallback_reason is None) == (True, False)
    one, other = a_text(family, propagation), generated(generic, PROMPT, MASK)
    assert one.sequences.shape[1] - 3 >= 2 * 8  # the windows have 8 tokens
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.exit_layers, other.exit_layers)
    assert sum(one.counts.layer_rows) < sum(other.counts.layer_rows)


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_bfloat16_generation_agrees_with_scoring(family: str, propagation: Propagation) -> None:
    stack, heads = a_bf16_stack(family), bf16_heads(family)
    rule = REPEATING.get(family, "top2_gap")
    exits = some_exits(stack, rule, (2, 3), heads=heads, propagation=propagation, share=0.35)
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    exit_layers = generated(early, PROMPT).exit_layers
    assert 0 < int((exit_layers < LAYERS).sum()) < exit_layers.numel()
    for ids in (PROMPT, PROMPT[1:2]):
        result = generated(early, ids)
        score = early.score(result.sequences)
        # bfloat16 has eight bits: two logits may round to the same number, in either order.
        same = score.predictions[:, 8:-1] == result.sequences[:, 9:]
        assert same.float().mean() >= 0.8
        assert (score.exit_layers[:, 8:-1] == result.exit_layers).float().mean() >= 0.8


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_left_padded_row_generates_like_row_alone(family: str, propagation: Propagation) -> None:
    together = a_text(family, propagation)
    alone = generated(generator(family, propagation), PROMPT[:1, 3:])
    assert torch.equal(together.sequences[:1, 3:], alone.sequences)
    assert torch.equal(together.exit_layers[:1], alone.exit_layers)


@ALL_PROPAGATIONS
@ALL_FAMILIES
def test_if_all_tokens_exit_text_is_exit_heads(family: str, propagation: Propagation) -> None:
    stack, heads = a_stack(family), some_heads(family)
    early = EarlyExit(
        stack, layer=3, rule="entropy", threshold=-INF, heads=heads, propagation=propagation
    )
    ids = PROMPT
    for _ in range(4):
        logits = head_logits(stack, early.exits[0], visited(stack, ids)[3])[:, -1:]
        ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
    assert torch.equal(generated(early, PROMPT, max_new_tokens=4).sequences, ids)


# --- Without exits: generate of transformers --------------------------------------------------


@PADDED_AND_NOT
@ALL_FAMILIES
def test_exits_without_exiting_tokens_match_transformers(
    family: str, propagation: Propagation, padded: bool
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    exits = [
        make_exit(stack, layer, "top2_gap", INF, heads=heads, propagation=propagation)
        for layer in (1, 3)
    ]
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    result = generated(early, PROMPT, MASK if padded else None)
    expected = own_text(stack, padded=padded)
    assert result.sequences.dtype == expected.dtype
    assert torch.equal(result.sequences, expected)
    assert bool((result.exit_layers == LAYERS).all())
    if padded:
        end, expected = own_ended_text(stack)
        result = generated(early, PROMPT, MASK, eos_token_id=end, pad_token_id=1)
        assert torch.equal(result.sequences, expected)
        assert set(result.exit_layers.flatten().tolist()) <= {0, LAYERS}


@ALL_FAMILIES
def test_generation_without_exits_matches_transformers(family: str) -> None:
    stack = a_stack(family)
    end, expected = own_ended_text(stack)
    result = generated(EarlyExit(stack), PROMPT, MASK, eos_token_id=end, pad_token_id=1)
    assert torch.equal(result.sequences, expected)


@ALL_PROPAGATIONS
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neo", "falcon"])
def test_ended_rows_are_padded(family: str, propagation: Propagation) -> None:
    early = generator(family, propagation)
    free = generated(early, PROMPT, MASK)
    ends = [int(free.sequences[0, 9 + 2]), int(free.sequences[1, 9 + 5])]
    result = generated(early, PROMPT, MASK, eos_token_id=ends, pad_token_id=1)
    lengths = [length_of(row, ends) for row in free.sequences[:, 9:].tolist()]
    assert len(set(lengths)) > 1
    assert result.sequences.shape[1] == 9 + max(lengths)
    for row, length in enumerate(lengths):
        kept = 9 + length
        assert torch.equal(result.sequences[row, :kept], free.sequences[row, :kept])
        assert bool((result.sequences[row, kept:] == 1).all())
        assert torch.equal(result.exit_layers[row, :length], free.exit_layers[row, :length])
        assert not bool(result.exit_layers[row, length:].any())


def test_ended_row_is_not_computed() -> None:
    early = generator("llama")
    alone = generated(early, PROMPT[2:])
    end = int(generated(early, PROMPT[1:]).sequences[0, 9])
    assert end not in alone.sequences[0, 9:].tolist()
    both = generated(early, PROMPT[1:], eos_token_id=end)
    assert both.exit_layers[0].tolist()[1:] == [0] * (NEW - 1)
    assert torch.equal(both.sequences[1:], alone.sequences)
    prompt = both.passed - alone.passed
    assert prompt == 9
    rows = [a - b for a, b in zip(both.counts.layer_rows, alone.counts.layer_rows, strict=True)]
    assert rows[0] == 9


def test_generation_stops_if_every_row_has_ended() -> None:
    early = generator("llama")
    first = generated(early, PROMPT).sequences[:, 9].tolist()
    result = generated(early, PROMPT, eos_token_id=first)
    assert result.sequences.shape == (3, 10)
    assert result.passed == 27


# --- Controls and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_rules_that_need_full_prediction_cannot_generate(propagation: Propagation) -> None:
    stack = a_stack("llama")
    exits: list[Exit] = [make_exit(stack, 1, "cosine", 0.9), make_exit(stack, 2, "oracle", 1.0)]
    early = EarlyExit(stack, exits=exits, propagation=propagation)
    early.score(PROMPT)
    message = (
        "the rule oracle needs the full model's prediction, so it can score but not generate; use "
        "another rule"
    )
    check_refusal(early, PROMPT, message)
    check_refusal(early, PROMPT, message, verify=propagation == "exact")


def test_sequences_share_no_memory_with_prompt() -> None:
    result = generated(generator("llama"), PROMPT)
    assert result.sequences.data_ptr() != PROMPT.data_ptr()
    assert by_name(result) == {
        "sequences",
        "exit_layers",
        "counts",
        "passed",
        "drafted",
        "accepted",
        "passes",
        "sources",
        "proposed",
        "positions",
        "proposers",
        "engine",
        "pass_costs",
        "trees",
    }


def by_name(result: Generation) -> set[str]:
    return set(vars(result))
