"""Layers of every kind are measured; those that hand on more than one stream are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.stacks import difference, one_line, own_run, stepped, visited
from support.tiny_models import KINDS, random_ids, tiny_model
from torch import Tensor, nn
from transformers import MllamaForCausalLM, MllamaTextConfig

from cascade.core.errors import UnsupportedModelError
from cascade.models.flops import full_flops
from cascade.models.layer_states import attending, other_state
from cascade.models.stack import DecoderStack
from cascade.models.sublayers import find_sublayers

#: Where the parallel residual streams of a family are, by its paper.
STREAMS = {"gemma3n_text": 0, "deepseek_v4": 2, "hy_v4": 2}
#: The first layer that keeps other things than keys and values.
OTHER_STATES = {
    "mamba": "decoder layer 1 (MambaBlock, linear_attention) keeps a recurrent state instead of",
    "jamba": "decoder layer 1 (JambaMambaDecoderLayer, linear_attention) keeps a recurrent state",
    "lfm2": "decoder layer 1 (Lfm2DecoderLayer, conv) keeps a recurrent state instead of keys",
    "qwen3_next": "decoder layer 1 (Qwen3NextDecoderLayer, linear_attention) keeps a recurrent",
    "falcon_h1": "decoder layer 1 (FalconH1DecoderLayer, hybrid) keeps a recurrent state in",
    "zaya": "decoder layer 1 (ZayaDecoderLayer, hybrid) keeps a recurrent state in addition to",
    "rwkv": "RwkvForCausalLM keeps a recurrent state instead of keys and values",
    "deepseek_v4": "_attention) keeps a DeepseekV4",
}


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers by their name in the model, which `find_layers` does not use."""
    inner = next(model.get_submodule(name) for name in PATHS if _has(model, name))
    return list(inner)


PATHS = ("backbone.layers", "rwkv.blocks", "model.layers")


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


@pytest.mark.parametrize("family", KINDS)
def test_history_is_what_hooks_on_the_layers_see(family: str) -> None:
    model, ids = tiny_model(family), random_ids()
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        axis = STREAMS.get(family)
        for states, into in ((taken, inputs), (made, outputs)):
            into.append(states if axis is None else torch.cat(states.unbind(axis), dim=-1))

    stack = DecoderStack(model)
    handles = [
        layer.register_forward_hook(keep, with_kwargs=True) for layer in decoder_layers(model)
    ]
    own = own_run(model, ids)
    for handle in handles:
        handle.remove()
    history, normed = visited(stack, ids)
    # Kernels of mixtures of experts sum in another order when more is returned.
    assert difference(history[0], inputs[0]) <= 1e-6
    for layer, output in enumerate(outputs, start=1):
        assert difference(history[layer], output) <= 1e-5, layer
        assert difference(history[layer], history[layer - 1]) > 1e-3, layer
    assert difference(stack.decode(history[-1]), own.logits) <= 1e-4
    assert (normed is None) == (family in STREAMS)
    assert stack.hidden_size == history[0].shape[-1]
    if stack.step_obstacle is None:
        steps = stepped(stack, stack.plan(ids))
        assert max(map(difference, steps, history)) <= 1e-5


@pytest.mark.parametrize("family", KINDS)
def test_the_first_layer_without_keys_and_values_is_named(family: str) -> None:
    model = tiny_model(family)
    found = other_state(model, nn.ModuleList(decoder_layers(model)))
    assert (found is None) == (family not in OTHER_STATES)
    assert OTHER_STATES.get(family, "") in (found or "")


@pytest.mark.parametrize(
    ("family", "layer", "kind"), [("zaya", 2, "ZayaDecoderLayer"), ("hy_v4", 2, "HYV4DecoderLayer")]
)
def test_layers_that_hand_on_more_do_not_run_one_at_a_time(
    family: str, layer: int, kind: str
) -> None:
    stack = DecoderStack(tiny_model(family))
    with pytest.raises(UnsupportedModelError) as error:
        stack.plan(random_ids())
    assert one_line(error).startswith(
        f"the layers of {family} cannot be run one at a time: decoder layer {layer} ({kind}) takes"
        " a second value from an earlier layer"
    )


def test_recurrent_layers_have_no_pairs_of_tokens_to_count() -> None:
    jamba = tiny_model("jamba")
    assert attending(jamba, nn.ModuleList(decoder_layers(jamba))) == (False, True, False, True)
    for family in ("mamba", "rwkv"):
        stack = DecoderStack(tiny_model(family))
        assert full_flops(stack, 1, 40) == 10 * full_flops(stack, 1, 4), family


def test_the_update_of_a_layer_without_attention_is_not_split() -> None:
    stack = DecoderStack(tiny_model("jamba"))
    with pytest.raises(UnsupportedModelError) as error:
        find_sublayers(stack, 1)
    assert one_line(error).startswith(
        "decoder layer 1 of jamba (JambaMambaDecoderLayer) has no attention next to an MLP"
    )


def test_the_update_of_a_layer_that_shares_keys_is_not_split() -> None:
    stack = DecoderStack(tiny_model("gemma4_text"))
    with pytest.raises(UnsupportedModelError, match="decoder layer 3 of gemma4_text takes the k"):
        find_sublayers(stack, 1)


def test_a_residual_stream_wider_than_the_weights_is_decoded() -> None:
    model, ids = tiny_model("zaya").to(torch.bfloat16), random_ids()
    stack = DecoderStack(model)
    history, _ = visited(stack, ids)
    assert (stack.dtype, history[-1].dtype) == (torch.bfloat16, torch.float32)
    assert difference(stack.decode(history[-1]), own_run(model, ids).logits) == 0.0


class Backwards(nn.Module):
    """A recurrent layer that reads the sequence from its end."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_later_layer_that_looks_ahead_is_rejected(layer: int) -> None:
    model = tiny_model("llama")
    model.model.layers[layer] = Backwards()
    with pytest.raises(UnsupportedModelError, match="the layers of llama attend to later tokens"):
        DecoderStack(model)


def test_layers_run_several_times_are_rejected() -> None:
    model = tiny_model("llama")
    inner, forward = model.model, type(model.model).forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        forward(inner, *args, **kwargs)
        return forward(inner, *args, **kwargs)

    inner.forward = twice
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error) == (
        "llama runs its 4 decoder layers 2 times; expected every layer to run exactly once for"
        " each token"
    )


def test_a_layer_that_does_not_run_on_text_is_named() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1],
        "pad_token_id": 1,
    }
    model = MllamaForCausalLM(MllamaTextConfig(**settings))
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error).startswith(
        "decoder layer 2 of mllama_text_model (MllamaCrossAttentionDecoderLayer) does not run on"
    )
