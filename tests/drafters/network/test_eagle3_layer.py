"""Whether EAGLE-3's layout can describe a model's layer, and with which config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_drafters import DRAFTED, LAYERS, a_drafted_stack
from support.tiny_models import tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cascade.core.errors import UnsupportedModelError, UsageError
from cascade.drafters.network.architectures import check_architecture
from cascade.drafters.network.eagle3_layer import layer_config_of
from cascade.drafters.network.layers import rotary_tables
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize("family", DRAFTED)
def test_config_describes_the_layer(family: str) -> None:
    stack = a_drafted_stack(family)
    config = layer_config_of(stack, LAYERS)
    assert config.model_type == ("qwen3" if family == "qwen3" else "llama")
    assert config.attention_bias == (family == "qwen2")
    assert not config.mlp_bias
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (97, 32, 1)
    own = stack.model.config
    assert config.num_attention_heads == own.num_attention_heads
    assert config.num_key_value_heads == own.num_key_value_heads
    assert config.rms_norm_eps == own.rms_norm_eps


ROTATIONS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 500_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("old", [False, True])
def test_config_rotates_as_the_model_does(kind: str, old: bool) -> None:
    stack = DecoderStack(tiny_model("llama", rope_parameters=ROTATIONS[kind]))
    config = layer_config_of(stack, LAYERS)
    if old:  # the names of transformers 4
        rope = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
        assert (config.rope_scaling is None) == (kind == "plain")
    else:
        rope = {"rope_parameters": config.rope_parameters}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    made = LlamaRotaryEmbedding(LlamaConfig(head_dim=config.head_dim, **sizes, **rope))
    tables = made(torch.zeros(1), torch.arange(64)[None])
    for found, wanted in zip(tables, rotary_tables(stack, 64), strict=True):
        torch.testing.assert_close(found, wanted)


class Plus(nn.Module):
    """A norm whose weight is counted from one, as Gemma's."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight - 1)
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        size = (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return hidden * size * (self.weight + 1)


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(97))


def with_a_norm(model: Any) -> None:
    model.model.layers[3].input_layernorm = Plus(model.model.layers[3].input_layernorm)


def with_another_eps(model: Any) -> None:
    model.model.norm.variance_epsilon *= 10


def with_another_activation(model: Any) -> None:
    model.model.layers[3].mlp.act_fn = nn.ReLU()


def with_a_part(model: Any) -> None:
    model.model.layers[3].mlp.gate = nn.Linear(2, 2, bias=False)


def with_half_rotations(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_bias, "its LM head has a bias"),
        (with_a_norm, "its norm Plus computes something else than Llama's"),
        (with_another_eps, "its norm LlamaRMSNorm computes something else"),
        (with_another_activation, "its activation is not the silu that its config names"),
        (with_a_part, "its layers have mlp.gate.weight"),
        (with_half_rotations, "its rotations are not Llama's"),
    ],
)
def test_a_layer_that_the_layout_cannot_describe_is_refused(
    change: Callable[[Any], None], reason: str
) -> None:
    model = tiny_model("llama")
    change(model)
    stack = DecoderStack(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        check_architecture("eagle3", stack, LAYERS)
    assert "cannot have a drafter of architecture eagle3" in str(caught.value)
    assert str(caught.value).endswith("; train one with --architecture cascade")
    check_architecture("cascade", stack, LAYERS)


@pytest.mark.parametrize("layers", [(1,), (1, 2), (1, 2, 3, 4)])
def test_another_number_of_layers_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected 3 layers for EAGLE-3 to read, got 1"):
        check_architecture("eagle3", a_drafted_stack(), layers)


def test_other_families_are_refused_as_for_any_drafter() -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2 cannot have a trained drafter"):
        check_architecture("eagle3", DecoderStack(tiny_model("gpt2")), LAYERS)


def test_names_are_those_of_the_config_classes() -> None:
    names = {"attention_bias", "head_dim", "rope_parameters", "rms_norm_eps", "hidden_act"}
    for kind in (LlamaConfig, Qwen3Config):
        assert names <= set(kind().to_dict())
