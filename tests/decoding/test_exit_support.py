"""Tokens exit early where each layer keeps keys and values; elsewhere a layer is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.stacks import one_line, own_run
from support.tiny_models import KINDS, random_ids, tiny_model
from torch import Tensor, nn

from cascade.core.errors import UnsupportedModelError
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.exit_support import check_exits, exit_support
from cascade.decoding.selective_layers import SkippingLayers
from cascade.models.stack import DecoderStack

#: Kinds of layers through which tokens exit.
EXITING = ("mixtral", "llama4_text", "deepseek_v32", "gemma4_text", "gemma3n_text")
SHARING = ("gemma4_text", "gemma3n_text")


@pytest.mark.parametrize("family", sorted(set(KINDS) - set(EXITING)))
def test_exits_are_refused_and_the_layer_is_named(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    obstacle = exit_support(stack).obstacle
    assert obstacle is not None
    assert "a recurrent state" in obstacle or "layer" in obstacle
    for run in (lambda: EarlyExit(stack), lambda: SkippingLayers(stack, skip=False)):
        with pytest.raises(UnsupportedModelError) as error:
            run()
        assert one_line(error) == (
            f"tokens of {family} cannot exit early: {obstacle}; use `cascade analyze` and"
            " `cascade gate`, which measure this model"
        )


@pytest.mark.parametrize("propagation", ["frozen", "exact"])
@pytest.mark.parametrize("family", EXITING)
def test_the_three_laws_hold(family: str, propagation: Any) -> None:
    stack, ids = DecoderStack(tiny_model(family)), random_ids()
    if propagation == "exact" and family in SHARING:
        with pytest.raises(UnsupportedModelError) as error:
            EarlyExit(stack, layer=2, propagation=propagation)
        assert one_line(error) == (
            f"{family} has no exact propagation: decoder layer 3 takes the keys and values of"
            " decoder layer 1; use frozen propagation, without verify"
        )
        return
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    full = own_run(stack.model, ids).logits
    never = EarlyExit(stack, layer=2, propagation=propagation).score(ids, keep_logits=True)
    assert never.logits is not None
    assert (never.logits - full).abs().max() <= 1e-4
    own = stack.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(EarlyExit(stack).generate(ids, **settings), own)

    always = EarlyExit(stack, layer=2, threshold=-math.inf, propagation=propagation)
    history: dict[int, Tensor] = {}
    stack.visit(ids, history.__setitem__)
    lens = always.score(ids, keep_logits=True).logits
    assert lens is not None
    assert (lens - stack.decode(history[2])).abs().max() <= 1e-4

    some = EarlyExit(stack, layer=2, propagation=propagation)
    confidences = some.exits[0].rule
    similarity = torch.nn.functional.cosine_similarity(history[1], history[2], dim=-1)
    half = float(similarity.median())
    some = EarlyExit(stack, layer=2, rule=confidences.name, threshold=half, propagation=propagation)
    made = some.generate(ids, return_dict_in_generate=True, **settings)
    scored = some.score(made.sequences)
    assert 0 < (scored.exit_layers == 2).float().mean() < 1
    new = ids.shape[1]
    assert torch.equal(scored.predictions[:, new - 1 : -1], made.sequences[:, new:])


def test_layers_with_keys_and_values_that_carry_more_are_refused() -> None:
    """The whole pass is what it was, but two chunks differ: a state that no cache shows."""

    class Counting(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            output = self.layer(hidden_states, **kwargs)
            return output + hidden_states.cumsum(dim=1)

    model = tiny_model("llama")
    model.model.layers[2] = Counting(model.model.layers[2])
    with pytest.raises(UnsupportedModelError) as error:
        check_exits(DecoderStack(model))
    assert "cannot exit early: decoder layer 3 computes something else from the keys and" in (
        one_line(error)
    )
