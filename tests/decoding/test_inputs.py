"""Checks of token ids and attention masks."""

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

# --- Valid inputs -----------------------------------------------------------------------------


def test_mask_without_padding_is_dropped() -> None:
    early = scorer("llama")
    with_mask = early.score(TEXT, torch.ones_like(TEXT), keep_logits=True)
    assert torch.equal(logits_of(with_mask), logits_of(early.score(TEXT, keep_logits=True)))


def test_token_ids_may_be_lists_or_narrow_integers() -> None:
    early, ids = scorer("llama"), random_ids(2, 12)
    expected = early.score(ids)
    kinds: list[Any] = [ids.tolist(), ids.numpy(), ids.int(), ids.to(torch.uint8)]
    for same in kinds:
        assert torch.equal(early.score(same).predictions, expected.predictions)


# --- Invalid inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected token ids [B, T] with one non-empty row per prompt, got shape [0]"),
        ([[]], "expected token ids [B, T] with one non-empty row per prompt, got shape [1, 0]"),
        ([3, 4], "expected token ids [B, T] with one non-empty row per prompt, got shape [2]"),
        (
            [[[3]]],
            "expected token ids [B, T] with one non-empty row per prompt, got shape [1, 1, 1]",
        ),
        (
            [[2, 3], [4]],
            "expected token ids [B, T], got rows of different length; pad them on the left and "
            "pass an attention_mask",
        ),
        (
            [[2, VOCABULARY]],
            "expected token ids in 0..96, got 2 to 97; use the model's tokenizer",
        ),
        ([[-1, 5]], "expected token ids in 0..96, got -1 to 5; use the model's tokenizer"),
        (
            [[2.0, 3.0]],
            "expected integer token ids, got float32; use the model's tokenizer",
        ),
        (
            [[True, False]],
            "expected integer token ids, got bool; use the model's tokenizer",
        ),
        (
            torch.full((1, 65), 2),
            "65 tokens exceed the model's 64 positions; shorten the prompt",
        ),
        ("a text", "expected token ids [B, T], got str; use the model's tokenizer"),
        (
            [["a", "text"]],
            "expected token ids [B, T], got a list that is not an array of numbers; use the "
            "model's tokenizer",
        ),
        (
            [[None]],
            "expected token ids [B, T], got a list that is not an array of numbers; use the "
            "model's tokenizer",
        ),
        (
            [[10**30]],
            "expected token ids [B, T], got a list that is not an array of numbers; use the "
            "model's tokenizer",
        ),
    ],
)
def test_invalid_token_ids_give_one_line_error(ids: Any, message: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(ids)
        assert one_line(error) == message


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 4), "expected an attention_mask of the ids' shape [2, 5], got [2, 4]"),
        (torch.ones(5), "expected an attention_mask of the ids' shape [2, 5], got [5]"),
        (
            torch.ones(2, 1, 5, 5),
            "expected an attention_mask of the ids' shape [2, 5], got [2, 1, 5, 5]",
        ),
        (
            torch.tensor([[1] * 5, [0] * 5]),
            "expected at least one token in every row, got a row of zeros in the attention_mask",
        ),
        (
            [[1, 1, 1, 1, 1], [1]],
            "expected an attention_mask of the ids' shape [2, 5], got rows of different length",
        ),
        ("ones", "expected an attention_mask of the ids' shape [2, 5], got str"),
        *(
            (
                [[1] * 5, [0, value, 1, 1, 1]],
                "expected an attention_mask of zeros (padding) and ones (tokens), got the value "
                f"{shown}",
            )
            for value, shown in ((math.nan, "nan"), (0.5, "0.5"), (2, "2"), (-1, "-1"))
        ),
    ],
)
def test_invalid_mask_gives_one_line_error(mask: Any, message: str) -> None:
    for call in (EarlyExit(a_stack("llama")).score, EarlyExit(a_stack("llama")).generate):
        with pytest.raises(UsageError) as error:
            call(random_ids(2, 5), mask)
        assert one_line(error) == message


def test_mask_may_have_any_dtype() -> None:
    early, ids, mask = scorer("llama"), random_ids(2, 12), some_mask(2, 12)
    expected = early.score(ids, mask, keep_logits=True)
    kinds: list[Any] = [mask.bool(), mask.float(), mask.tolist(), mask.to(torch.int8)]
    for same in kinds:
        assert torch.equal(logits_of(early.score(ids, same, keep_logits=True)), logits_of(expected))


def test_positions_start_after_left_padding() -> None:
    chunk = make_chunk(a_stack("llama"), random_ids(2, 5), some_mask(2, 5, left=2))
    assert chunk.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert chunk.valid.tolist() == [[False, False, True, True, True], [True] * 5]
    assert set(FAMILIES) >= set(SKIPPING)


@pytest.mark.parametrize(
    "given", [None, {"input_ids": [[1, 2]]}, BatchEncoding({"input_ids": [[1]]})]
)
@pytest.mark.parametrize("method", ["score", "generate"])
def test_tokenizer_output_error_names_its_fields(method: str, given: Any) -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError) as error:
        getattr(early, method)(given)
    assert 'pass the tokenizer\'s ["input_ids"]' in one_line(error)


def test_non_numeric_values_are_rejected() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, threshold=0.9)
    with pytest.raises(UsageError, match="expected token ids"):
        early.score([["a", "b"]])  # type: ignore[arg-type]
