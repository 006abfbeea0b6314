"""Which long sequences are measured, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_model

from cascade.core.errors import CorpusError, ModelError
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation
from cascade.saturation.long_context import (
    LONG_SEQUENCES,
    choose_long,
    default_length,
    measure_long,
)
from cascade.saturation.profile import similarities


def a_stack(positions: int = 512, family: str = "llama") -> DecoderStack:
    changes = {} if family == "bloom" else {"max_position_embeddings": positions}
    return DecoderStack(tiny_model(family, **changes))


def blocks_of(tokens: int, length: int = 16) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(2, 97, (tokens // length, length)).astype(np.int32)
    return TokenBlocks(ids, "random", "random", 1)


@pytest.mark.parametrize(
    ("positions", "seq_len", "expected"),
    [
        (255, 16, None),
        (256, 16, 256),
        (2048, 128, 2048),
        (8192, 128, 2048),
        (8192, 2048, None),
        (512, 511, 512),
        (None, 16, 2048),
    ],
)
def test_the_default_is_the_models_positions_and_at_most_2048(
    positions: int | None, seq_len: int, expected: int | None
) -> None:
    stack = a_stack()
    stack.max_positions = positions
    assert default_length(stack, seq_len) == expected


def test_the_chosen_sequences_depend_on_the_corpus_alone() -> None:
    stack, blocks = a_stack(), blocks_of(4096)
    one, other = (choose_long(stack, blocks, None).sequences for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.ids.shape == (LONG_SEQUENCES, 512)
    assert np.array_equal(one.ids, other.ids)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (513, "--long-context 513 exceeds the model's 512 positions; use 512 or less, or 0"),
        (16, "expected --long-context above the 16 tokens of a sequence, got 16; use a larger"),
        (500, "random gives 320 tokens, too few for a sequence of 500; take more records, a sm"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(wanted: int, message: str) -> None:
    with pytest.raises(CorpusError) as error:
        choose_long(a_stack(), blocks_of(320), wanted)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("positions", "tokens", "length", "wanted", "reason", "is_short"),
    [
        (512, 4096, 16, 0, "turned off with --long-context 0", False),
        (128, 4096, 16, None, "the model has 128 positions, fewer than 256", False),
        (512, 320, 16, None, "random gives 320 tokens, too few for a sequence of 512", True),
        (512, 4096, 512, None, "sequences of 512 tokens are long already", False),
    ],
)
def test_none_are_measured_with_a_reason(
    positions: int, tokens: int, length: int, wanted: int | None, reason: str, is_short: bool
) -> None:
    found = choose_long(a_stack(positions), blocks_of(tokens, length), wanted)
    assert found.sequences is None
    assert str(found.reason).startswith(reason)
    assert found.is_short is is_short


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_ranges_are_means_of_the_tokens_similarities(family: str) -> None:
    stack = a_stack(family=family)
    chosen = choose_long(stack, blocks_of(4096), 256).sequences
    assert chosen is not None
    found = measure_long(stack, chosen)
    tokens = similarities(stack, torch.from_numpy(chosen.ids).long()).double().numpy()
    expected = tokens.reshape(len(tokens), 2, 4, 64).mean(-1).transpose(1, 2, 0)
    np.testing.assert_allclose(found.means(), expected, atol=2e-6)


def test_nan_beyond_the_short_sequences_names_the_layer_and_the_length() -> None:
    stack = a_stack()

    def broken(_: DecoderStack, ids: torch.Tensor) -> torch.Tensor:
        values = similarities(stack, ids)
        values[2, :, 100:] = float("nan")
        return values

    chosen = choose_long(stack, blocks_of(4096), 256).sequences
    assert chosen is not None
    with pytest.raises(ModelError, match=r"layer 3 is the first to give NaN .* 256 tokens; use"):
        measure_long(stack, chosen, measured=broken)


def test_an_error_of_the_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise IndexError("index out of range in self\nat some place")

    stack = a_stack()
    chosen = choose_long(stack, blocks_of(4096), 256).sequences
    assert chosen is not None
    monkeypatch.setattr(saturation, "similarities", fails)
    with pytest.raises(ModelError) as error:
        measure_long(stack, chosen)
    assert str(error.value) == (
        "the model raises an error for a sequence of 256 tokens (index out of range in self); "
        "measure without long contexts"
    )
