"""Layers that return no hidden states or attend to later tokens are rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.stacks import one_line
from support.tiny_models import WIDTH, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cascade.core.errors import UnsupportedModelError
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48}),
        ("roberta", {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48}),
    ],
)
def test_bidirectional_model_is_rejected(family: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(
        family, num_hidden_layers=2, vocab_size=97, pad_token_id=1, **settings
    )
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(AutoModelForCausalLM.from_config(config))
    assert one_line(error).startswith(f"the layers of {family} attend to later tokens")


def test_bert_as_a_decoder_is_accepted() -> None:
    config = AutoConfig.for_model(
        "bert",
        num_hidden_layers=2,
        vocab_size=97,
        is_decoder=True,
        hidden_size=WIDTH,
        num_attention_heads=4,
        intermediate_size=48,
    )
    assert DecoderStack(AutoModelForCausalLM.from_config(config)).layer_labels == ["1", "2"]


class WrongShape(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states[:, :1]


class NoTensor(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return Stream(hidden_states)


class Stream:
    """An output that is neither a tensor nor a tuple."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def to(self, *_: Any) -> Stream:
        return self


def test_error_names_the_layer_that_returns_another_shape() -> None:
    model = tiny_model("llama")
    model.model.layers[3] = WrongShape()
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "decoder layer 4 of llama returns (2, 1, 32), expected hidden states (2, 3, 32)"
    )


def test_error_names_the_layer_that_returns_no_tensor() -> None:
    model = tiny_model("llama")
    model.model.layers[3] = NoTensor()
    model.model.norm = nn.Identity()
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "decoder layer 4 of llama returns Stream, expected hidden states (2, 3, 32)"
    )


def test_model_that_runs_a_layer_twice_is_rejected() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "decoder layer 2 of llama (LlamaDecoderLayer) runs twice: decoder layer 3 is the same"
        " module; expected every layer to run exactly once for each token"
    )
