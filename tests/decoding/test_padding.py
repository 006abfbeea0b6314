"""Padding without a mask is inferred as in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.generating import (
    MASK,
    NEW,
    PROMPT,
    as_tensor,
    generated,
    longer,
    own_generate,
    padding_stack,
)
from support.reference_early_exit import (
    one_line,
    some_exits,
)

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit, Propagation

#: Prompts as a tokenizer that pads with token 0 returns them.
PADDED = PROMPT.masked_fill(MASK == 0, 0)


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_padding_without_mask_is_inferred_as_in_transformers(
    family: str, propagation: Propagation
) -> None:
    stack = padding_stack(family, pad_token_id=0, eos_token_id=1)
    expected = own_generate(stack, PADDED, attention_mask=None, pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack, propagation=propagation)
    got = as_tensor(early.generate(PADDED, max_new_tokens=NEW))
    assert torch.equal(got, expected)
    assert torch.equal(got, as_tensor(early.generate(PADDED, MASK, max_new_tokens=NEW)))
    as_text = as_tensor(early.generate(PADDED, torch.ones_like(PADDED), max_new_tokens=NEW))
    assert not torch.equal(got, as_text)


@pytest.mark.parametrize(
    ("own", "single"),
    [
        ({"pad_token_id": 0, "eos_token_id": 0}, {}),
        ({"pad_token_id": 0, "eos_token_id": [1, 0]}, {}),
        ({"pad_token_id": 0, "eos_token_id": 1}, {"eos_token_id": 0}),
        ({"eos_token_id": 0}, {}),
        ({}, {}),
    ],
)
def test_end_tokens_and_unused_padding_tokens_are_text(
    own: dict[str, Any], single: dict[str, Any]
) -> None:
    stack = padding_stack("llama", **own)
    settings: dict[str, Any] = {"max_new_tokens": NEW} | single
    model: Any = stack.model
    expected = model.generate(PADDED, **settings)
    got = as_tensor(EarlyExit(stack).generate(PADDED, **settings))
    assert torch.equal(got, expected)
    as_text = model.generate(PADDED, attention_mask=torch.ones_like(PADDED), **settings)
    assert torch.equal(got, as_text)


def test_padding_is_inferred_without_end_tokens() -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=0)
    expected = own_generate(stack, PADDED, attention_mask=None, pad_token_id=0)
    assert torch.equal(generated(EarlyExit(stack), PADDED).sequences, expected)
    assert torch.equal(expected, own_generate(stack, PADDED, attention_mask=MASK))


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
def test_scoring_and_generation_infer_the_same_padding(propagation: Propagation) -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack, exits=some_exits(stack, layers=(2, 3)), propagation=propagation)
    result = generated(early, PADDED, eos_token_id=1)
    assert 0 not in result.sequences[:, 9:]
    score = early.score(result.sequences)
    assert torch.equal(
        score.scored, early.score(result.sequences, longer(MASK, result.sequences)).scored
    )
    assert torch.equal(score.predictions[:, 8:-1], result.sequences[:, 9:])
    assert torch.equal(score.exit_layers[:, 8:-1], result.exit_layers)


def test_scoring_infers_padding_of_ended_rows() -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early = EarlyExit(stack)
    ids = PADDED.clone()
    ids[1, -2:] = 0
    mask = (ids != 0).long()
    assert torch.equal(early.score(ids).scored, early.score(ids, mask).scored)
    assert early.score(ids).perplexity == early.score(ids, mask).perplexity
    text = early.score(ids, torch.ones_like(ids))
    assert text.perplexity != early.score(ids).perplexity
    stack.model.generation_config.eos_token_id = 0
    assert early.score(ids).perplexity == text.perplexity


@pytest.mark.parametrize("row", [[5, 0, 6], [0, 5, 0, 6], [0, 0], [5, 0, 0, 6, 0]])
def test_ambiguous_padding_is_rejected(row: list[int]) -> None:
    stack = padding_stack("llama", pad_token_id=0, eos_token_id=1)
    early, ids = EarlyExit(stack), torch.tensor([row, [7] * len(row)])
    for call in (early.score, early.generate):
        with pytest.raises(UsageError) as error:
            call(ids)
        assert one_line(error) == (
            "the padding token 0 is between other tokens or fills a whole row, so it could be "
            "text; pass an attention_mask"
        )
    assert early.score(ids, torch.ones_like(ids)).scored.all()
