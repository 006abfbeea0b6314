"""The law of early exit on a user's model: generating equals scoring, and every fault is named."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.faults import Plant, attribute_of
from support.reference_early_exit import (
    ALL_FAMILIES,
    PROPAGATIONS,
    a_bf16_stack,
    a_stack,
    bf16_heads,
    confidence,
    some_exits,
    some_heads,
)
from support.tiny_models import random_ids
from support.tiny_stages import a_cascade
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.decoding import kv_cache
from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.gate.generation_check import GENERATED_TOKENS, check_generation
from cascade.models.stack import DecoderStack

LENGTH = 20


def an_early_exit(
    family: str = "llama", propagation: Propagation = "frozen", *, half: bool = False
) -> EarlyExit:
    """Return an early exit in which about half of the tokens exit at layer 2."""
    stack = a_bf16_stack(family) if half else a_stack(family)
    heads = bf16_heads(family) if half else some_heads(family)
    text = random_ids(2, LENGTH)
    exits = some_exits(stack, "cosine", (2,), heads=heads, propagation=propagation, text=text)
    # The compiled engine writes keys and values past the Python code that faults are planted in.
    return EarlyExit(stack, exits=exits, propagation=propagation, engine="model")


def an_early_exit_of_a_cascade(
    family: str = "llama", propagation: Propagation = "frozen", rule: str = "random"
) -> EarlyExit:
    """Return the early exit of a base of 4 layers with stages of 2 and 1 layers.

    By chance, half of the tokens enter each stage.
    """
    early = a_cascade(family, propagation, rule=rule).early_exit()
    return EarlyExit(
        early.stack, exits=early.exits, propagation=propagation, engine="model", seed=early.seed
    )


#: Ridge maps are fitted for layers of one model, so a cascade has none.
CASCADE_PROPAGATIONS = pytest.mark.parametrize("propagation", ["frozen", "exact"])


def checked(early: EarlyExit, *, seed: int = 0, length: int = LENGTH) -> str | None:
    return check_generation(early, random_ids(2, length, seed=seed).numpy())


# --- Clean models ----------------------------------------------------------------------------


@ALL_FAMILIES
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_generating_equals_scoring_for_every_family_and_propagation(
    family: str, propagation: Propagation
) -> None:
    early = an_early_exit(family, propagation)
    assert checked(early) is None


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_rounding_of_half_precision_is_no_difference(family: str, propagation: Propagation) -> None:
    for seed in range(3):
        assert checked(an_early_exit(family, propagation, half=True), seed=seed) is None


@pytest.mark.parametrize("engine", ["auto", "compiled", "fused", "model"])
def test_every_engine_generates_what_it_scores(engine: Any) -> None:
    early = an_early_exit()
    other = EarlyExit(early.stack, exits=early.exits, engine=engine)
    assert checked(other) is None


@pytest.mark.parametrize("threshold", [-math.inf, 0.0, 1.0, math.inf])
def test_thresholds_at_the_ends_of_the_range_are_checked(threshold: float) -> None:
    assert checked(EarlyExit(a_stack("llama"), layer=3, threshold=threshold)) is None


@ALL_FAMILIES
@CASCADE_PROPAGATIONS
def test_a_cascade_generates_what_it_scores(family: str, propagation: Propagation) -> None:
    early = an_early_exit_of_a_cascade(family, propagation)
    assert checked(early) is None


@CASCADE_PROPAGATIONS
def test_tokens_enter_the_stages_of_the_cascade_that_is_checked(propagation: Propagation) -> None:
    early = an_early_exit_of_a_cascade(propagation=propagation)
    layers = early.score(random_ids(2, LENGTH)).exit_layers[:, -GENERATED_TOKENS - 1 : -1]
    assert len(set(layers.flatten().tolist())) == 3  # the base alone, and each of two stages


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_cascade_with_fewer_stages_generates_what_it_scores(stages: int) -> None:
    assert checked(a_cascade("llama").early_exit(stages)) is None


@pytest.mark.parametrize("length", [2, 5, GENERATED_TOKENS, 64])
def test_texts_of_any_length_are_checked(length: int) -> None:
    assert checked(an_early_exit(), length=length) is None


def test_a_text_with_tokens_that_end_it_is_generated_to_its_end() -> None:
    ids = random_ids(2, LENGTH).numpy()
    ids[:, -5] = 1  # EOS, and padding
    assert check_generation(an_early_exit(), ids) is None


def test_a_rule_that_cannot_generate_is_refused() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, rule="oracle", threshold=1.0)
    with pytest.raises(UsageError, match="expected rules that can generate"):
        checked(early)


# --- Faults ----------------------------------------------------------------------------------


def read(change: Any, layer: int = 3) -> Plant:
    """Change the keys and values of a layer that a step reads."""

    def plant(_: DecoderStack) -> Any:
        right = kv_cache.KeyValueCache.read

        def wrong(self: Any, index: int) -> tuple[Tensor, Tensor]:
            keys, values = right(self, index)
            # Scoring keeps no cache.
            return (
                change(keys, values)
                if self.keep and index == layer - 1 and self.start
                else (keys, values)
            )

        return attribute_of(kv_cache.KeyValueCache, "read", wrong)

    return plant


def _zeroed(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone()
    values[:, :, -2] = 0.0
    return keys, values


FAULTS = {
    "zeroed value": _zeroed,
    "shifted keys": lambda keys, values: (keys.roll(1, dims=2), values),
    "fp8 values": lambda keys, values: (keys, values.to(torch.float8_e4m3fn).to(values.dtype)),
}


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_cache_is_named_with_sequence_and_token(
    name: str, propagation: Propagation
) -> None:
    early = an_early_exit(propagation=propagation)
    with read(FAULTS[name])(early.stack):
        found = checked(early)
    assert found
    assert "of sequence " in found
    assert checked(early) is None


@CASCADE_PROPAGATIONS
@pytest.mark.parametrize("layer", [3, 5, 7])
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_cache_of_the_base_or_of_a_stage_is_named(
    name: str, layer: int, propagation: Propagation
) -> None:
    early = an_early_exit_of_a_cascade(propagation=propagation)
    with read(FAULTS[name], layer)(early.stack):
        found = checked(early)
    assert found
    assert "of sequence " in found
    assert checked(early) is None


def test_exits_that_only_generating_takes_are_named() -> None:
    early = an_early_exit()
    right = early.generate

    def moved(*args: Any, **kwargs: Any) -> Any:
        wrong = EarlyExit(early.stack, exits=early.exits, engine="model")
        wrong.exits = tuple(
            type(at)(at.layer, at.rule, -math.inf, at.head, at.propagation) for at in early.exits
        )
        return wrong.generate(*args, **kwargs)

    with attribute_of(early, "generate", moved):
        found = checked(early)
    assert found
    assert "exits at layer 2 when generated, 4 when scored" in found
    assert right.__self__ is early  # type: ignore[attr-defined]


def test_an_exit_that_rounding_decides_is_no_difference() -> None:
    text, stack = random_ids(2, LENGTH), a_stack("llama")
    (usual,) = an_early_exit().exits
    found = float(confidence(stack, text, usual)[0, -2])

    def with_threshold(by: float) -> EarlyExit:
        exits = [dataclasses.replace(usual, threshold=found + by)]
        return EarlyExit(stack, exits=exits, engine="model")

    # The second to last token exits when scored, and does not when generated.
    for least, difference in ((-1e-6, None), (-1e-3, "exits at layer 4 when generated, 2 when")):
        early = with_threshold(least)
        assert early.score(text).exit_layers[0, -2] == 2
        with attribute_of(early, "generate", with_threshold(2e-6).generate):
            assert (difference or "None") in str(checked(early))


def test_ids_need_no_certain_integer_type() -> None:
    ids = random_ids(2, LENGTH).numpy().astype(np.int32)
    assert check_generation(an_early_exit(), ids) is None
