"""A layer's update is split into those of attention and MLP, for every family."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, random_ids, tiny_model

from cascade.core.errors import UnsupportedModelError
from cascade.models.stack import DecoderStack
from cascade.models.sublayers import find_sublayers, silenced, split_update


def run_to(stack: DecoderStack, layer: int) -> tuple[torch.Tensor, object]:
    plan = stack.plan(random_ids())
    hidden = plan.embedded
    for number in range(1, layer):
        hidden = stack.step(number, hidden, plan.calls[number - 1])
    return hidden, plan.calls[layer - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_of_attention_and_mlp_add_up(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    hidden, call = run_to(stack, 2)
    sublayers = find_sublayers(stack, 2)
    output, update = split_update(stack, sublayers, 2, hidden, call)
    assert torch.equal(output, stack.step(2, hidden, call)), "expected an unchanged model"
    torch.testing.assert_close(hidden + update.whole, output, rtol=0, atol=1e-5)
    for addition in (update.attention, update.mlp):
        assert addition.abs().max() > 1e-3, "expected both to change a random model's stream"
    with silenced(sublayers.attention, sublayers.mlp):
        assert torch.equal(stack.step(2, hidden, call), hidden)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_update_of_a_sublayer_is_its_modules_output(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    hidden, call = run_to(stack, 3)
    layer = stack.layers[2]
    found = {}
    for name in ("self_attn", "mlp"):
        getattr(layer, name).register_forward_hook(
            lambda _, __, output, name=name: found.update({name: output})
        )
    stack.step(3, hidden, call)
    attention, mlp = found["self_attn"][0].clone(), found["mlp"].clone()
    scale = 0.5 if family == "granite" else 1.0  # its residual multiplier
    _, update = split_update(stack, find_sublayers(stack, 3), 3, hidden, call)
    torch.testing.assert_close(update.attention, scale * attention, rtol=0, atol=1e-5)
    torch.testing.assert_close(update.mlp, scale * mlp, rtol=0, atol=1e-5)


def test_post_norm_layer_is_rejected() -> None:
    stack = DecoderStack(tiny_model("opt", do_layer_norm_before=False))
    with pytest.raises(UnsupportedModelError, match=r"a layer of opt .* cannot be split"):
        find_sublayers(stack, 1)
