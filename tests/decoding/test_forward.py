"""Forward passes can be forked and raise an error for numbers that are not finite."""

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

# --- Passes -----------------------------------------------------------------------------------


def test_more_tokens_than_one_lm_head_call_are_scored() -> None:
    early, ids = scorer("qwen3", "ridge"), random_ids(8, 40)
    assert early.stack.max_positions == 64
    score = check_it_is_the_mixed_pass(early, ids, None, heads=some_heads("qwen3"))
    assert score.counts.lm_head_rows > 8 * 40


def test_forked_pass_is_independent() -> None:
    stack = a_stack("llama")
    exit_all, later = (make_exit(stack, layer, "patience", -INF) for layer in (2, 3))
    exit_none = make_exit(stack, 2, "patience", INF)
    counts = Counts.of(LAYERS)
    layers, chunk = SkippingLayers(stack), make_chunk(stack, TEXT)
    cache = layers.new_cache(*TEXT.shape, keep=False)
    cache.window(0, TEXT.shape[1])
    first = ForwardPass(layers, [exit_none, later], chunk, cache, counts)
    first.run_layers_to(2)
    second = first.fork()
    second.exits = [exit_all, later]
    made: dict[ForwardPass, list[tuple[int, int]]] = {first: [], second: []}
    for forward in (second, first):  # the fork runs first, since it must not change the original
        take = functools.partial(keep_layer, made[forward])
        for at in forward.exits:
            forward.run_layers_to(at.layer)
            forward.decide(at, chunk.valid, take)
        forward.finish(chunk.valid, take)
    assert made == {first: [(3, 60)], second: [(2, 60)]}
    assert bool((first.exit_layers == 3).all())
    assert bool((second.exit_layers == 2).all())


def keep_layer(made: list[tuple[int, int]], layer: int, rows: Tensor, *_: Tensor) -> None:
    made.append((layer, len(rows)))


# --- Numbers that are not finite --------------------------------------------------------------


def with_nan(family: str, name: str) -> DecoderStack:
    """Return a stack in which one weight is set to NaN after loading."""
    stack = DecoderStack(tiny_model(family))
    with torch.no_grad():
        stack.model.get_parameter(name)[0] = math.nan
    return stack


@pytest.mark.parametrize("rule", ["cosine", "top2_gap", "entropy", "max_probability"])
def test_nan_confidence_error_names_rule_and_layer(rule: str) -> None:
    stack = with_nan("llama", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ModelError) as error:
        EarlyExit(stack, layer=2, rule=rule, threshold=0.5).score(random_ids())
    assert one_line(error) == (
        f"the rule {rule} is NaN at exit layer 2, because states or logits are not finite; use a "
        "wider --dtype, or get the checkpoint again"
    )


@pytest.mark.parametrize("settings", [{}, {"layer": 3, "rule": "cosine", "threshold": -INF}])
def test_nan_logits_are_rejected_even_if_no_rule_needs_logits(
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
