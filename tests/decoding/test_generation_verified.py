"""Verified text is the full model's, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.generating import (
    INF,
    MASK,
    NEW,
    PROMPT,
    RULES,
    generated,
    generator,
    length_of,
    own_text,
    speaking,
)
from support.reference_early_exit import (
    LAYERS,
    a_settled_stack,
)
from support.tiny_models import FAMILIES

from cascade.decoding.early_exit import EarlyExit, make_exit

DRAFT_LENGTHS = (1, 2, 8)


@pytest.mark.parametrize(
    ("family", "settled"),
    [*((family, True) for family in FAMILIES), ("llama", False), ("gemma2", False)],
)
def test_verified_text_matches_transformers(family: str, settled: bool) -> None:
    early = generator(family, "exact", settled=settled)
    free = own_text(early.stack)
    end = int(free[1, 13])
    lengths = [length_of(row, [end]) for row in free[:, 9:].tolist()]
    result = generated(early, PROMPT, MASK, verify=True)
    assert torch.equal(result.sequences, free)
    exited = (result.exit_layers > 0) & (result.exit_layers < LAYERS)
    assert result.accepted == int(exited.sum())
    assert result.drafted >= result.accepted
    behind = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    for draft_length in DRAFT_LENGTHS:
        ended = generated(
            early,
            PROMPT,
            MASK,
            verify=True,
            draft_length=draft_length,
            eos_token_id=end,
            pad_token_id=1,
        )
        assert torch.equal(ended.sequences[:, 9:], free[:, 9 : 9 + max(lengths)].where(~behind, 1))
        assert torch.equal(ended.exit_layers == 0, behind)


def test_verification_both_accepts_and_rejects_drafts() -> None:
    drafted = accepted = 0
    for family in ("llama", "gemma2", "gpt2", "falcon"):
        result = generated(generator(family, "exact", settled=True), PROMPT, MASK, verify=True)
        drafted, accepted = drafted + result.drafted, accepted + result.accepted
    assert 0.2 * drafted < accepted < drafted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_verified_text_does_not_depend_on_the_rule(family: str, rule: str) -> None:
    early = generator(family, "exact", rule=rule, layers=(2, 3), settled=True)
    result = generated(early, PROMPT, MASK, verify=True, draft_length=3)
    assert torch.equal(result.sequences, own_text(early.stack))
    assert result.drafted > 0


@pytest.mark.parametrize("layers", [(1,), (2,), (LAYERS,), (2, LAYERS), (1, 2, 3, LAYERS)])
@pytest.mark.parametrize("threshold", [-INF, INF])
def test_verified_text_does_not_depend_on_the_exits(
    layers: tuple[int, ...], threshold: float
) -> None:
    stack = a_settled_stack("qwen3")
    exits = [make_exit(stack, layer, "cosine", threshold) for layer in layers]
    early = EarlyExit(stack, exits=exits, propagation="exact")
    for draft_length in DRAFT_LENGTHS:
        result = generated(early, PROMPT, MASK, verify=True, draft_length=draft_length)
        assert torch.equal(result.sequences, own_text(stack))
        assert (result.drafted > 0) == (threshold == -INF and layers[0] < LAYERS)


@pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neo", "bloom"])
def test_verified_samples_match_full_model(family: str, draft_length: int) -> None:
    early = generator(family, "exact", settled=True)
    full = EarlyExit(early.stack)
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 3}
    expected = generated(full, PROMPT, MASK, **settings)
    result = generated(early, PROMPT, MASK, verify=True, draft_length=draft_length, **settings)
    assert torch.equal(result.sequences, expected.sequences)
    assert not torch.equal(result.sequences, generated(full, PROMPT, MASK).sequences)
    assert result.accepted > 0


def test_stop_strings_end_verified_rows_like_unverified_rows() -> None:
    full, early = speaking("exact", exits=False), speaking("exact")
    tokenizer: Any = full.stack.tokenizer
    text = generated(full, PROMPT, MASK).sequences
    stops = [tokenizer.decode(text[0, 11:13]), tokenizer.decode(text[1, 14:16])]
    expected = generated(full, PROMPT, MASK, stop_strings=stops, pad_token_id=1)
    got = generated(early, PROMPT, MASK, stop_strings=stops, pad_token_id=1, verify=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert not torch.equal(got.sequences[:, : text.shape[1]], text)


def test_draft_length_limits_drafts_and_reduces_full_passes() -> None:
    stack = a_settled_stack("llama")
    exits = [make_exit(stack, 2, "cosine", -INF)]
    early = EarlyExit(stack, exits=exits, propagation="exact")
    rows: dict[int, int] = {}
    for draft_length in (1, 4):
        lengths: list[int] = []
        handle = (
            stack.layers[-1]
            .get_submodule("mlp")
            .register_forward_hook(
                lambda _, args, __, lengths=lengths: lengths.append(args[0].shape[1])
            )
        )
        try:
            generated(early, PROMPT[:1], verify=True, draft_length=draft_length)
        finally:
            handle.remove()
        assert max(lengths[1:]) <= draft_length
        rows[draft_length] = len(lengths)
    assert rows[1] == NEW
    assert rows[4] < NEW
