"""The tokens that a drafter can propose."""

from __future__ import annotations

import pytest
import torch
from support.tiny_drafters import a_drafted_stack
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import UsageError
from cascade.drafters.network.vocabulary import choose_tokens, ends_of
from cascade.models.stack import DecoderStack


def chosen(size: int, *texts: tuple[list[int], int], ends: tuple[int, ...] = (1,)) -> list[int]:
    pairs = [(torch.tensor(ids, dtype=torch.int32), prompt) for ids, prompt in texts]
    return choose_tokens(pairs, size, 20, ends).tolist()


def test_the_most_frequent_tokens_are_chosen_in_ascending_order() -> None:
    assert chosen(4, ([9, 9, 9, 7, 7, 12], 0)) == [1, 7, 9, 12]


def test_tokens_of_prompts_count_less_than_generated_ones() -> None:
    assert chosen(2, ([9, 9, 9, 7], 3)) == [1, 7]
    assert chosen(2, ([9, 9, 9, 9, 7], 4)) == [1, 9]


def test_tokens_that_end_a_text_are_always_chosen() -> None:
    assert chosen(3, ([9, 9, 9, 7, 7], 0), ends=(1, 19)) == [1, 9, 19]


def test_unused_tokens_fill_up_the_rest_lowest_first() -> None:
    assert chosen(5, ([9], 0)) == [0, 1, 2, 3, 9]
    assert chosen(100, ([9], 0)) == list(range(20))


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a --vocabulary above 2, .* got 2"):
        chosen(2, ([9], 0), ends=(1, 19))


def test_ends_are_those_of_the_generation_config_and_of_the_tokenizer() -> None:
    assert ends_of(a_drafted_stack()) == (1,)
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 8]
    assert ends_of(DecoderStack(model)) == (5, 8)
    assert ends_of(DecoderStack(model, tokenizer=tiny_tokenizer())) == (1, 5, 8)
