"""A forward pass can be forked, and refuses numbers that are not finite."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    LAYERS,
    a_stack,
    one_line,
    some_heads,
)
from support.scoring import INF, TEXT, check_it_is_the_mixed_pass, scorer
from support.tiny_models import random_ids, tiny_model
from torch import Tensor

from cascade.core.errors import ModelError
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.decoding.forward import ForwardPass
from cascade.decoding.inputs import make_chunk
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack

# --- In between: the mixed pass, written out by hand ------------------------------------------


def test_more_tokens_than_the_lm_head_takes_at_once_are_all_scored() -> None:
    early, ids = scorer("qwen3", "ridge"), random_ids(8, 40)
    assert early.stack.max_positions == 64
    score = check_it_is_the_mixed_pass(early, ids, None, heads=some_heads("qwen3"))
    assert score.counts.lm_head_rows > 8 * 40


def test_a_forked_pass_goes_on_by_itself() -> None:
    stack, nobody = a_stack("llama"), INF
    everybody, later = (make_exit(stack, layer, "patience", -INF) for layer in (2, 3))
    stays = make_exit(stack, 2, "patience", nobody)
    counts = Counts.of(LAYERS)
    layers, chunk = SkippingLayers(stack), make_chunk(stack, TEXT)
    cache = layers.new_cache(*TEXT.shape, keep=False)
    cache.window(0, TEXT.shape[1])
    first = ForwardPass(layers, [stays, later], chunk, cache, counts)
    first.run_layers_to(2)
    second = first.fork()
    second.exits = [everybody, later]
    made: dict[ForwardPass, list[tuple[int, int]]] = {first: [], second: []}
    for going in (second, first):  # the fork first: it must leave nothing of itself behind
        take = functools.partial(keep_layer, made[going])
        for at in going.exits:
            going.run_layers_to(at.layer)
            going.decide(at, chunk.valid, take)
        going.finish(chunk.valid, take)
    assert made == {first: [(3, 60)], second: [(2, 60)]}
    assert bool((first.exit_layers == 3).all())
    assert bool((second.exit_layers == 2).all())


def keep_layer(made: list[tuple[int, int]], layer: int, rows: Tensor, *_: Tensor) -> None:
    made.append((layer, len(rows)))


# --- Refusals ---------------------------------------------------------------------------------


def with_nan(family: str, name: str) -> DecoderStack:
    """Return a stack one of whose weights became NaN after it was checked."""
    stack = DecoderStack(tiny_model(family))
    with torch.no_grad():
        stack.model.get_parameter(name)[0] = math.nan
    return stack


@pytest.mark.parametrize("rule", ["cosine", "top2_gap", "entropy", "max_probability"])
def test_a_confidence_that_is_nan_is_refused_with_rule_and_layer(rule: str) -> None:
    stack = with_nan("llama", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ModelError) as error:
        EarlyExit(stack, layer=2, rule=rule, threshold=0.5).score(random_ids())
    assert one_line(error) == (
        f"the rule {rule} is NaN at exit layer 2: the states or logits there are not finite; use a "
        "wider --dtype, or get the checkpoint again"
    )


@pytest.mark.parametrize("settings", [{}, {"layer": 3, "rule": "cosine", "threshold": -INF}])
def test_logits_that_are_nan_are_refused_where_no_rule_looks_at_them(
    settings: dict[str, Any],
) -> None:
    early = EarlyExit(with_nan("llama", "lm_head.weight"), **settings)
    for call in (early.score, early.generate):
        with pytest.raises(ModelError) as error:
            call(random_ids())
        assert one_line(error) == (
            f"the logits of layer {settings.get('layer', LAYERS)} are not finite; use a wider "
            "--dtype, or get the checkpoint again"
        )
