"""Generating with a cascade equals scoring and does not change the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    a_stack,
    some_mask,
    state_of,
)
from support.tiny_models import random_ids, tiny_model
from support.tiny_stages import (
    TEXT,
    a_cascade,
    ends,
)
from torch import Tensor

from cascade.decoding.early_exit import Propagation
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack
from cascade.stages.cascades import Cascade

NEW = 8


#: The first row is three tokens shorter, padded on the left.
PROMPT, PROMPT_MASK = random_ids(3, 9, seed=3), some_mask(3, 9)


BOTH = pytest.mark.parametrize("propagation", ["frozen", "exact"])


def generated(cascade: Cascade, *args: Any, **settings: Any) -> Generation:
    settings = {"max_new_tokens": NEW, "eos_token_id": None} | settings
    result = cascade.generate(*args, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def own_generate(stack: DecoderStack, ids: Tensor, mask: Tensor) -> Tensor:
    model: Any = stack.model
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1}
    sequences: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return sequences


#: With the cosine rule, most tiny models send all or none of their own text to a stage. The random
#: rule always sends some tokens.
RULES = pytest.mark.parametrize("rule", ["cosine", "random"])


@RULES
@BOTH
@ALL_FAMILIES
def test_generating_equals_scoring_the_generated_text(
    family: str, propagation: Propagation, rule: str
) -> None:
    cascade = a_cascade(family, propagation, rule=rule)
    result = generated(cascade, PROMPT, PROMPT_MASK)
    start = PROMPT.shape[1]
    new = PROMPT_MASK.new_ones((3, NEW))
    score = cascade.score(result.sequences, torch.cat([PROMPT_MASK, new], dim=1))
    assert result.sequences.shape == (3, start + NEW)
    assert torch.equal(score.predictions[:, start - 1 : -1], result.sequences[:, start:])
    assert torch.equal(score.exit_layers[:, start - 1 : -1], result.exit_layers)
    if rule == "random":
        assert len(set(result.exit_layers.flatten().tolist())) == 3, "too few exits to prove it"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_a_batch_generates_the_same_rows_as_single_prompts(family: str) -> None:
    cascade = a_cascade(family, rule="random")
    together = generated(cascade, PROMPT, PROMPT_MASK)
    for row, first in enumerate((3, 0, 0)):
        alone = generated(cascade, PROMPT[row : row + 1, first:])
        assert torch.equal(together.sequences[row, first:], alone.sequences[0])
        assert torch.equal(together.exit_layers[row], alone.exit_layers[0])


@pytest.mark.parametrize("rule", ["cosine", "random"])
@ALL_FAMILIES
def test_verified_generation_equals_transformers_on_the_extended_model(
    family: str, rule: str
) -> None:
    cascade = a_cascade(family, "exact", rule=rule)
    result = generated(cascade, PROMPT, PROMPT_MASK, verify=True)
    assert torch.equal(result.sequences, own_generate(cascade.stack, PROMPT, PROMPT_MASK))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generating_with_zero_stages_equals_the_base(family: str) -> None:
    cascade = a_cascade(family)
    ids = cascade.generate(PROMPT, PROMPT_MASK, stages=0, max_new_tokens=NEW, eos_token_id=None)
    assert isinstance(ids, Tensor)
    assert torch.equal(ids, own_generate(a_stack(family), PROMPT, PROMPT_MASK))


def test_a_cascade_does_not_change_the_base() -> None:
    stack = DecoderStack(tiny_model("llama"))
    before, weights = state_of(stack), stack.weights_in_memory()
    cascade = ends(stack, [0.5, 0.5])
    cascade.score(TEXT)
    generated(cascade, PROMPT, PROMPT_MASK)
    assert state_of(stack) == before
    assert stack.weights_in_memory() == weights
