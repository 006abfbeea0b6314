"""Models that cannot be measured are rejected, by name."""

from __future__ import annotations

import pytest
import torch
from support.stacks import one_line
from support.tiny_models import tiny_model
from transformers import AutoConfig

from cascade.core.errors import ModelError, UnsupportedModelError
from cascade.models.architecture import check_config
from cascade.models.stack import DecoderStack


def test_encoder_decoder_is_rejected() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_config(AutoConfig.for_model("t5"))
    assert one_line(error) == (
        "t5 is an encoder-decoder; expected a decoder-only causal language model"
    )


def test_family_without_causal_model_is_rejected() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        check_config(AutoConfig.for_model("distilbert"))
    assert one_line(error).startswith("distilbert is not a causal language model")


def test_a_model_without_an_lm_head_is_rejected() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(tiny_model("llama").model)
    assert one_line(error).startswith("LlamaModel has no LM head; expected a causal language")


def test_model_without_list_of_layers_is_rejected() -> None:
    model = tiny_model("llama")
    model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error).startswith("llama has no list of 4 decoder layers; expected")


def test_layers_removed_in_memory_ask_for_the_config() -> None:
    model = tiny_model("llama")
    del model.base_model.layers[1]
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "the model has 3 decoder layers, but its config counts 4; set"
        " model.config.num_hidden_layers to 3 where layers were removed or added"
    )
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError) as moved:
        DecoderStack(model)
    assert "decoder layer 2 has layer_idx 2, expected 1" in one_line(moved)
    for index, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = index
    assert DecoderStack(model).num_layers == 3


def test_a_layer_in_another_dtype_is_rejected() -> None:
    model = tiny_model("llama")
    model.base_model.layers[2].half()
    with pytest.raises(ModelError, match=r"is float16 in decoder layer 3 and float32 in"):
        DecoderStack(model)


def test_weights_on_no_device_are_rejected() -> None:
    model = tiny_model("llama")
    model.base_model.layers[2].to("meta")
    with pytest.raises(ModelError, match=r"layers\.2\..* is on no device, and nothing holds"):
        DecoderStack(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.2.mlp.up_proj.weight", "decoder layer 3"),
        ("model.layers.0.input_layernorm.weight", "decoder layer 1"),
        ("model.embed_tokens.weight", "outside the decoder layers"),
        ("model.norm.weight", "outside the decoder layers"),
        ("lm_head.weight", "outside the decoder layers"),
    ],
)
def test_error_names_the_non_finite_weight(name: str, where: str, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(ModelError) as error:
        DecoderStack(model)
    assert error.type is ModelError
    assert f"NaN or infinite values ({where}: {name})" in one_line(error)


def test_float16_overflow_suggests_a_wider_dtype() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = 1e5
    name = "model.layers.2.mlp.up_proj.weight"
    DecoderStack(model)
    with pytest.raises(ModelError) as error:
        DecoderStack(model.half())
    assert one_line(error) == (
        f"the weights are infinite in float16 (decoder layer 3: {name}), which holds numbers up to "
        "65504; use --dtype bfloat16 or float32"
    )
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="get the checkpoint again"):
        DecoderStack(model)
