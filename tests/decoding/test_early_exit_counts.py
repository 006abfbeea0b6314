"""The counts of a score match the rows that the modules compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    ALL_PROPAGATIONS,
    LAYERS,
    SKIPPING_FAMILIES,
    a_stack,
    is_mixed,
    some_exits,
)
from support.scoring import TEXT, scorer
from support.tiny_models import random_ids
from torch import nn

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.models.stack import DecoderStack


@contextmanager
def rows_seen(stack: DecoderStack) -> Iterator[dict[str, list[int]]]:
    """Count the token rows that the model's modules compute, per layer."""
    seen = {name: [0] * LAYERS for name in ("mlp", "q_proj", "k_proj", "v_proj", "o_proj")}
    seen["lm_head"] = [0]

    def counting(name: str, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
            rows = args[0] if args else kwargs["hidden_states"]
            seen[name][index] += rows.numel() // rows.shape[-1]

        return hook

    handles = []
    for index, layer in enumerate(stack.layers):
        attention = layer.get_submodule("self_attn")
        modules = {name: getattr(attention, name) for name in seen if hasattr(attention, name)}
        modules["mlp"] = layer.get_submodule("mlp")
        for name, module in modules.items():
            hook = counting(name, index)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    hook = counting("lm_head", 0)
    handles.append(stack.lm_head.register_forward_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("rule", ["top2_gap", "cosine"])
@ALL_PROPAGATIONS
@SKIPPING_FAMILIES
def test_counts_match_rows_of_modules(family: str, propagation: Propagation, rule: str) -> None:
    early = scorer(family, propagation, rule=rule)
    with rows_seen(early.stack) as seen:
        score = early.score(TEXT)
    counts, exit_layers = score.counts, score.exit_layers
    assert is_mixed(exit_layers, [1, 2, 3])
    assert seen["mlp"] == seen["q_proj"] == seen["o_proj"] == counts.layer_rows
    projected = [a + b for a, b in zip(counts.layer_rows, counts.key_value_rows, strict=True)]
    assert seen["k_proj"] == seen["v_proj"] == projected
    assert seen["lm_head"] == [counts.lm_head_rows]
    above = [int((exit_layers >= layer).sum()) for layer in range(1, LAYERS + 1)]
    exited = [int((exit_layers < layer).sum()) for layer in range(1, LAYERS + 1)]
    if propagation == "exact":
        assert counts.layer_rows == [60] * LAYERS
        assert not any(counts.key_value_rows + counts.predicted_rows)
    else:
        # No MLP, query or output projection is computed for an exited token.
        assert counts.layer_rows == above
        of_exited = counts.key_value_rows if propagation == "frozen" else counts.predicted_rows
        unused = counts.predicted_rows if propagation == "frozen" else counts.key_value_rows
        assert of_exited == exited
        assert not any(unused)
    # Rules that need logits compute them for all undecided tokens, cosine only for exiting ones.
    at_exits = sum(int((exit_layers == layer).sum()) for layer in (1, 2, 3))
    probed = sum(above[:3]) if rule == "top2_gap" else at_exits
    assert counts.lm_head_rows == probed + int((exit_layers == LAYERS).sum())
    assert sum(counts.head_rows.values()) == probed
    assert set(counts.head_rows) == {1, 2, 3}


def test_pairs_are_queries_times_visible_columns() -> None:
    stack = a_stack("llama")
    ids = random_ids(2, 10)
    assert EarlyExit(stack).score(ids).counts.pairs == [2 * 10 * 10] * LAYERS
    early = scorer("llama", layers=(2,))
    score = early.score(ids)
    hard = (score.exit_layers == LAYERS).sum(dim=1)
    # The engine computes exactly the active rows.
    assert score.counts.pairs == [200, 200, int(hard.sum()) * 10, int(hard.sum()) * 10]
    own = EarlyExit(stack, exits=early.exits, engine="model").score(ids)
    assert torch.equal(own.exit_layers, score.exit_layers)
    most = int(hard.max()) * int((hard > 0).sum())
    assert own.counts.pairs == [200, 200, most * 10, most * 10]
    assert most < 20


def test_generic_path_counts_every_computed_row() -> None:
    early = scorer("llama", "ridge", skip=False)
    with rows_seen(early.stack) as seen:
        score = early.score(TEXT)
    assert is_mixed(score.exit_layers, [1, 2, 3])
    assert score.counts.layer_rows == seen["mlp"] == seen["q_proj"] == [60] * LAYERS
    assert not any(score.counts.key_value_rows)
    exited = [int((score.exit_layers < layer).sum()) for layer in range(1, LAYERS + 1)]
    assert score.counts.predicted_rows == exited


def test_logit_lens_has_no_head_rows() -> None:
    stack = a_stack("llama")
    early = EarlyExit(stack, exits=some_exits(stack, layers=(2,)))
    assert early.score(random_ids()).counts.head_rows == {}


def test_full_pass_of_oracle_is_not_counted() -> None:
    early = EarlyExit(a_stack("llama"), layer=2, rule="oracle", threshold=1.0)
    score = early.score(random_ids(2, 10))
    assert score.counts.layer_rows[:2] == [20, 20]
    assert score.counts.layer_rows[3] == int((score.exit_layers == LAYERS).sum()) < 20
