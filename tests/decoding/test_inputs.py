"""Token ids and attention masks are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    SKIPPING,
    a_stack,
    one_line,
    some_mask,
)
from support.scoring import TEXT, logits_of, scorer
from support.tiny_models import FAMILIES, VOCABULARY, random_ids
from transformers import BatchEncoding

from cascade.core.errors import UsageError
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.inputs import make_chunk

# --- In between: the mixed pass, written out by hand ------------------------------------------


def test_a_mask_without_padding_is_no_mask() -> None:
    early = scorer("llama")
    with_mask = early.score(TEXT, torch.ones_like(TEXT), keep_logits=True)
    assert torch.equal(logits_of(with_mask), logits_of(early.score(TEXT, keep_logits=True)))


def test_token_ids_may_be_lists_or_narrow_integers() -> None:
    early, ids = scorer("llama"), random_ids(2, 12)
    expected = early.score(ids)
    kinds: list[Any] = [ids.tolist(), ids.numpy(), ids.int(), ids.to(torch.uint8)]
    for same in kinds:
        assert torch.equal(early.score(same).predictions, expected.predictions)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "expected token ids [B, T], a row per prompt and none empty, got shape [0]"),
        ([[]], "expected token ids [B, T], a row per prompt and none empty, got shape [1, 0]"),
        ([3, 4], "expected token ids [B, T], a row per prompt and none empty, got shape [2]"),
        (
            [[[3]]],
            "expected token ids [B, T], a row per prompt and none empty, got shape [1, 1, 1]",
        ),
        (
            [[2, 3], [4]],
            "expected token ids [B, T], got rows of different length; pad them on the left and "
            "give an attention_mask",
        ),
        (
            [[2, VOCABULARY]],
            "expected token ids in 0..96, got 2 to 97; use the model's own tokenizer",
        ),
        ([[-1, 5]], "expected token ids in 0..96, got -1 to 5; use the model's own tokenizer"),
        (
            [[2.0, 3.0]],
            "expected token ids as whole numbers, got float32; use the model's own tokenizer",
        ),
        (
            [[True, False]],
            "expected token ids as whole numbers, got bool; use the model's own tokenizer",
        ),
        (
            torch.full((1, 65), 2),
            "65 tokens exceed the model's 64 positions; shorten the prompt",
        ),
        ("a text", "expected token ids [B, T], got str; use the model's own tokenizer"),
        (
            [["a", "text"]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
        (
            [[None]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
        (
            [[10**30]],
            "expected token ids [B, T], got a list that is no array of numbers; use the model's "
            "own tokenizer",
        ),
    ],
)
def test_token_ids_that_cannot_be_are_refused(ids: Any, said: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(ids)
        assert one_line(error) == said


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(2, 4), "expected an attention_mask of the ids' shape [2, 5], got [2, 4]"),
        (torch.ones(5), "expected an attention_mask of the ids' shape [2, 5], got [5]"),
        (
            torch.ones(2, 1, 5, 5),
            "expected an attention_mask of the ids' shape [2, 5], got [2, 1, 5, 5]",
        ),
        (
            torch.tensor([[1] * 5, [0] * 5]),
            "a row of the attention_mask is all zeros; expected at least one token",
        ),
        (
            [[1, 1, 1, 1, 1], [1]],
            "expected an attention_mask of the ids' shape [2, 5], got rows of different length",
        ),
        ("ones", "expected an attention_mask of the ids' shape [2, 5], got str"),
        *(
            (
                [[1] * 5, [0, value, 1, 1, 1]],
                "expected an attention_mask of 0 for padding and 1 for tokens alone, got "
                f"{shown} among them",
            )
            for value, shown in ((math.nan, "nan"), (0.5, "0.5"), (2, "2"), (-1, "-1"))
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Any, said: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(random_ids(2, 5), mask)
        assert one_line(error) == said


def test_a_mask_of_any_kind_of_ones_and_zeros_is_read_alike() -> None:
    early, ids, mask = scorer("llama"), random_ids(2, 12), some_mask(2, 12)
    expected = early.score(ids, mask, keep_logits=True)
    kinds: list[Any] = [mask.bool(), mask.float(), mask.tolist(), mask.to(torch.int8)]
    for same in kinds:
        assert torch.equal(logits_of(early.score(ids, same, keep_logits=True)), logits_of(expected))


def test_a_chunk_knows_its_positions() -> None:
    chunk = make_chunk(a_stack("llama"), random_ids(2, 5), some_mask(2, 5, left=2))
    assert chunk.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert chunk.valid.tolist() == [[False, False, True, True, True], [True] * 5]
    assert set(FAMILIES) >= set(SKIPPING)


@pytest.mark.parametrize(
    "given", [None, {"input_ids": [[1, 2]]}, BatchEncoding({"input_ids": [[1]]})]
)
@pytest.mark.parametrize("method", ["score", "generate"])
def test_what_a_tokenizer_returns_is_refused_with_what_to_take_of_it(
    method: str, given: Any
) -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError) as error:
        getattr(early, method)(given)
    assert 'give ["input_ids"]' in one_line(error)


def test_values_that_are_no_numbers_are_refused() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError, match="expected token ids"):
        early.score([["a", "b"]])  # type: ignore[arg-type]
