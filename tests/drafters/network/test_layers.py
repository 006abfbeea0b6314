"""Which models can have a drafter, and why others cannot."""

from __future__ import annotations

import pytest
import torch
from support.tiny_drafters import DRAFTED, a_drafted_stack
from support.tiny_models import tiny_model
from torch import nn

from cascade.core.errors import UnsupportedModelError
from cascade.drafters.network.layers import check_can_draft, rotary_tables
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize("family", DRAFTED)
def test_models_with_the_layers_of_llama_can_have_a_drafter(family: str) -> None:
    check_can_draft(a_drafted_stack(family))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "its layers lack q_proj, k_proj, v_proj, o_proj"),
        ("mixtral", "gate_proj, up_proj, down_proj in mlp"),
        ("cohere", "its layers lack input_layernorm and post_attention_layernorm"),
        ("granite", "decoder layer 1 computes something else than Llama's"),
        ("gemma2", "decoder layer 1 computes something else than Llama's"),
        ("gemma3_text", "its layers cannot be computed as Llama's"),
        ("zaya", "takes a second value from an earlier layer"),
    ],
)
def test_other_models_are_refused_with_the_reason(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot have a trained drafter: .*{reason}"):
        check_can_draft(DecoderStack(tiny_model(family)))


def test_a_hooked_layer_is_refused() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[2].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="its module self_attn has hooks"):
        check_can_draft(stack)


def test_another_attention_than_sdpa_or_eager_is_refused() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention, expected eager or sdpa"):
        check_can_draft(stack)
    stack.model.config._attn_implementation = "eager"
    check_can_draft(stack)


def test_a_projection_of_another_class_is_refused() -> None:
    class Quantized(nn.Linear):
        pass

    stack = DecoderStack(tiny_model("llama"))
    stack.layers[1].mlp.up_proj.__class__ = Quantized
    with pytest.raises(UnsupportedModelError, match="its projections are quantized or wrapped"):
        check_can_draft(stack)


@pytest.mark.parametrize("family", DRAFTED)
def test_rotary_tables_are_those_of_the_model(family: str) -> None:
    stack = a_drafted_stack(family)
    (call, *_) = stack.plan(torch.zeros((1, 20), dtype=torch.long)).calls
    for made, own in zip(rotary_tables(stack, 20), call.kwargs["position_embeddings"], strict=True):
        assert torch.equal(made, own)
