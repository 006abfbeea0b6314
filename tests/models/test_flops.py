"""Operations match a hand count and torch's own counter."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_early_exit import (
    ALL_FAMILIES,
    LAYERS,
    SKIPPING_FAMILIES,
    a_stack,
    is_mixed,
    random_blocks,
    some_heads,
)
from support.tiny_models import VOCABULARY, WIDTH, random_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from cascade.decoding.early_exit import EarlyExit, Propagation, make_exit
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.models import flops as costs
from cascade.models.flops import Counts, flops, full_flops
from cascade.models.stack import DecoderStack

# The tiny Llama has 32 x 32 queries and outputs, 16 x 32 keys and values, and 3 x 32 x 48 MLPs.
LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48
KEYS_AND_VALUES = 2 * 16 * 32


def counts(**changes: object) -> Counts:
    made = Counts.of(LAYERS)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


# --- Hand counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ({}, 0),
        ({"layer_rows": [7, 0, 0, 0]}, 2 * 7 * LAYER),
        ({"layer_rows": [1, 2, 3, 4]}, 2 * 10 * LAYER),
        # Each pair takes 32 multiplications for the weight and 32 for its value.
        ({"pairs": [0, 5, 0, 6]}, 2 * 11 * (32 + 32)),
        ({"key_value_rows": [0, 0, 3, 0]}, 2 * 3 * KEYS_AND_VALUES),
        ({"predicted_rows": [0, 0, 0, 9]}, 2 * 9 * 32 * 32),
        ({"lm_head_rows": 11}, 2 * 11 * 32 * 97),
        ({"head_rows": {1: 2, 3: 5}}, 2 * 7 * 1024),
    ],
)
def test_flops_of_a_tiny_llama_match_a_hand_count(
    counted: dict[str, object], expected: int
) -> None:
    assert (VOCABULARY, WIDTH) == (97, 32)
    got = flops(a_stack("llama"), counts(**counted), map_width=32, head_size=1024)
    assert got == expected


def test_absent_heads_and_maps_cost_nothing() -> None:
    some = counts(predicted_rows=[1, 1, 1, 1], head_rows={2: 5})
    assert flops(a_stack("llama"), some) == 0.0


def test_full_flops_match_a_hand_count() -> None:
    expected = 4 * (2 * 6 * LAYER + 4 * 18 * 32) + 2 * 6 * 32 * 97
    assert full_flops(a_stack("llama"), 2, 3) == expected


def test_flops_of_summed_counts_add_up() -> None:
    stack = a_stack("qwen3")
    one = counts(layer_rows=[3, 2, 1, 0], pairs=[9, 9, 4, 0], lm_head_rows=4, head_rows={1: 1})
    other = counts(key_value_rows=[0, 1, 2, 3], lm_head_rows=1, head_rows={1: 2, 3: 4})
    total = flops(stack, one, head_size=9) + flops(stack, other, head_size=9)
    assert flops(stack, one + other, head_size=9) == total


# --- Torch's counter -------------------------------------------------------------------------


@functools.cache
def an_eager_stack(family: str) -> DecoderStack:
    """Return a stack with eager attention, because torch does not count every kernel."""
    model = tiny_model(family)
    if model.config._attn_implementation != "eager" and family not in WITHOUT_A_CHOICE:
        model.set_attn_implementation("eager")
    return DecoderStack(model)


#: Families with only their own attention, which consists of plain products.
WITHOUT_A_CHOICE = ("bloom", "gpt_neo", "gptj", "falcon")


def counted_by_torch(stack: DecoderStack, early: EarlyExit | None, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if early is None:
            stack.model(input_ids=ids, use_cache=False)
        else:
            early.score(ids)
    return int(counter.get_total_flops())


@ALL_FAMILIES
def test_full_flops_match_torchs_counter(family: str) -> None:
    stack = an_eager_stack(family)
    for batch, length in ((1, 1), (3, 40)):
        counted = counted_by_torch(stack, None, random_ids(batch, length))
        # Torch also counts the products of rotary tables, up to 2 %.
        assert full_flops(stack, batch, length) == pytest.approx(counted, rel=0.02)


@ALL_FAMILIES
def test_scoring_at_full_depth_counts_the_full_model(family: str) -> None:
    stack = a_stack(family)
    score = EarlyExit(stack).score(random_ids(3, 20))
    assert flops(stack, score.counts) == full_flops(stack, 3, 20)


@functools.cache
def eager_heads(family: str) -> FittedHeads:
    return fit_heads(an_eager_stack(family), random_blocks(), [1, 2, 3])


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "cohere", "gpt2", "gpt_neox"])
def test_flops_of_early_exit_match_torchs_counter(family: str, propagation: Propagation) -> None:
    stack, heads, ids = an_eager_stack(family), eager_heads(family), random_ids(4, 32)
    early = EarlyExit(
        stack, layer=1, rule="random", threshold=0.3, heads=heads, propagation=propagation
    )
    score = early.score(ids)
    exited = int((score.exit_layers == 1).sum())
    assert 60 < exited < 110
    # The rule does not use logits, so the head runs once for each token that exited.
    assert score.counts.head_rows == {1: exited}
    head = early.exits[0].head.multiplications
    counted = counted_by_torch(stack, early, ids)
    got = flops(stack, score.counts, map_width=heads.width, head_size=head)
    # Torch also counts rotary tables, and maps once for all upper layers: up to 3 %.
    assert got == pytest.approx(counted, rel=0.03)
    if early.fallback_reason is None and propagation != "exact":
        assert got < 0.8 * full_flops(stack, 4, 32)


@SKIPPING_FAMILIES
def test_ridge_and_frozen_propagation_cost_the_same_in_layers(family: str) -> None:
    stack, heads, ids = an_eager_stack(family), eager_heads(family), random_ids(4, 32)
    propagations: tuple[Propagation, ...] = ("frozen", "ridge")
    counted, products = {}, {}
    for propagation in propagations:
        exits = [
            make_exit(stack, layer, "random", 0.6, heads=heads, propagation=propagation)
            for layer in (1, 2, 3)
        ]
        early = EarlyExit(stack, exits=exits, propagation=propagation)
        score = early.score(ids)
        # The rule draws from token and position, so the same tokens exit at the same layers.
        assert is_mixed(score.exit_layers, [1, 2, 3])
        counted[propagation] = score.counts
        products[propagation] = counted_by_torch(stack, early, ids)
    frozen, ridge = counted["frozen"], counted["ridge"]
    assert ridge.predicted_rows == frozen.key_value_rows
    assert 0 < sum(ridge.predicted_rows) < sum(ridge.layer_rows)
    assert sum(ridge.key_value_rows) == sum(frozen.predicted_rows) == 0
    assert (
        dataclasses.replace(
            ridge, key_value_rows=ridge.predicted_rows, predicted_rows=ridge.key_value_rows
        )
        == frozen
    )
    assert flops(stack, ridge, map_width=heads.width) == flops(stack, frozen)
    assert products["ridge"] == products["frozen"]


# --- Properties ------------------------------------------------------------------------------


def layer_flops(stack: DecoderStack, score_counts: Counts, width: int) -> float:
    """Return the operations without heads."""
    layers = Counts(
        score_counts.layer_rows,
        score_counts.pairs,
        score_counts.key_value_rows,
        score_counts.predicted_rows,
    )
    return flops(stack, layers, map_width=width)


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
@pytest.mark.parametrize("family", ["llama", "cohere", "gpt2"])
@settings(max_examples=6, deadline=None)  # a tiny model is run four times
@given(
    layer=st.integers(1, LAYERS),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 9),
)
def test_more_exits_never_increase_the_cost_of_layers(
    family: str, propagation: Propagation, layer: int, rates: tuple[float, float], seed: int
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    costs, exits = [], []
    for threshold in (math.inf, *sorted(rates, reverse=True), -math.inf):
        early = EarlyExit(
            stack,
            layer=layer,
            rule="random",
            threshold=threshold,
            heads=heads,
            propagation=propagation,
            seed=seed,
        )
        score = early.score(random_ids(2, 12))
        # Where no layer is skipped, ridge maps are additional work and save nothing.
        width = 0 if early.fallback_reason else heads.width
        costs.append(layer_flops(stack, score.counts, width))
        exits.append(int((score.exit_layers == layer).sum()))
    assert exits == sorted(exits)
    assert costs == sorted(costs, reverse=True)
    skips = EarlyExit(stack).fallback_reason is None and propagation != "exact" and layer < LAYERS
    assert (costs[-1] < 0.9 * costs[0]) == skips


@ALL_FAMILIES
def test_layers_and_lm_head_add_up_to_the_full_model(family: str) -> None:
    stack = a_stack(family)
    layers = costs.layer_flops(stack, 3, 8)
    assert len(layers) == stack.num_layers
    head = 2 * 3 * 8 * stack.hidden_size * stack.vocab_size
    assert sum(layers) + head == full_flops(stack, 3, 8)
