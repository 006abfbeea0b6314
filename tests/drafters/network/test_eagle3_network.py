"""The network of EAGLE-3: what it reads, how it begins, and that its scales are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_drafters import DRAFTED, LAYERS, a_drafted_stack, a_moved_network, some_texts
from support.tiny_models import tiny_model

from cascade.drafters.network.drafter_network import embeddings_of
from cascade.drafters.network.eagle3_network import Eagle3Network
from cascade.drafters.network.layers import heads_of, output_of, rotary_tables
from cascade.drafters.training import fit_inputs
from cascade.models.stack import DecoderStack


@pytest.mark.parametrize("family", DRAFTED)
def test_network_begins_as_a_copy_of_its_layer_that_ignores_embeddings(family: str) -> None:
    stack = a_drafted_stack(family)
    network, layer = Eagle3Network(stack, LAYERS), stack.layers[3]
    generator = torch.Generator().manual_seed(0)
    embedded, state = torch.randn(2, 1, 7, stack.hidden_size, generator=generator)
    tables = rotary_tables(stack, 7)
    with torch.no_grad():
        own = network.heads(network.next_input(embedded, state), tables)
        attended = torch.randn(own[0].shape, generator=generator)
        output = network.output(network.next_input(embedded, state), attended)
        if family != "smollm3":  # whose copied layer does not rotate
            for made, wanted in zip(own, heads_of(layer, state, tables), strict=True):
                torch.testing.assert_close(made, wanted)
        torch.testing.assert_close(output, output_of(layer, state, attended))
    assert torch.equal(network.norm.weight, stack.decoder.norm.weight)


def test_all_of_its_layers_rotate() -> None:
    stack = a_drafted_stack("smollm3")
    assert not stack.layers[3].self_attn.use_rope
    network = Eagle3Network(stack, LAYERS)
    hidden = torch.ones(1, 5, 2 * stack.hidden_size)
    with torch.no_grad():
        _, keys, _ = network.heads(hidden, rotary_tables(stack, 5))
    assert not torch.allclose(keys[:, :, 0], keys[:, :, 4])


@pytest.mark.parametrize("family", DRAFTED)
def test_state_and_embedding_reach_queries_keys_and_values(family: str) -> None:
    stack = a_drafted_stack(family)
    network = a_moved_network(stack, architecture="eagle3")
    tables = rotary_tables(stack, 3)
    generator = torch.Generator().manual_seed(0)
    embedded, state, other = torch.randn(3, 1, 3, stack.hidden_size, generator=generator)
    with torch.no_grad():
        before = network.heads(network.next_input(embedded, state), tables)
        for changed in (network.next_input(other, state), network.next_input(embedded, other)):
            for one, two in zip(before, network.heads(changed, tables), strict=True):
                assert not torch.allclose(one, two)


def test_the_last_normed_state_is_not_read() -> None:
    network = a_moved_network(a_drafted_stack(), architecture="eagle3")
    text = some_texts()[0]
    features = text.features.clone()
    embedded = torch.zeros(len(features), network.hidden_size)
    with torch.no_grad():
        before = network.first_input(embedded, features)
        features[:, -1] += 1
        assert torch.equal(network.first_input(embedded, features), before)
        features[:, 0] += 1
        assert not torch.equal(network.first_input(embedded, features), before)


@pytest.mark.parametrize("family", DRAFTED)
def test_closed_form_predicts_the_next_input_of_the_copied_layer(family: str) -> None:
    stack, texts = a_drafted_stack(family), some_texts(family, 24)
    network, embedding = Eagle3Network(stack, LAYERS), embeddings_of(stack)
    fit_inputs(network, embedding, texts)
    error = mean_error = 0.0
    wanted = torch.cat([text.features[text.prompt :, 2].float() for text in texts])
    with torch.no_grad():
        for text in texts:
            rows = slice(text.prompt - 1, -1)
            states = text.features.float()[rows]
            embedded = embedding[text.ids[1:-1].long()][rows.start :]
            made = network.first_input(embedded, states).chunk(2, dim=-1)[1]
            target = text.features[text.prompt :, 2].float()
            error += float((made - target).square().sum())
            mean_error += float((wanted.mean(0) - target).square().sum())
    assert error < 0.8 * mean_error


def test_closed_form_lets_queries_read_embeddings() -> None:
    stack = a_drafted_stack()
    network = Eagle3Network(stack, LAYERS)
    fit_inputs(network, embeddings_of(stack), some_texts("llama", 24))
    width = stack.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(network.layer.self_attn, name).weight
        assert torch.equal(weight[:, width:], getattr(stack.layers[3].self_attn, name).weight)
        assert weight[:, :width].abs().mean() > 0.01 * weight[:, width:].abs().mean()


def test_scales_are_powers_of_two_that_even_out_the_layers() -> None:
    stack, texts = a_drafted_stack(), some_texts("llama", 24)
    network = Eagle3Network(stack, LAYERS)
    fit_inputs(network, embeddings_of(stack), texts)
    assert torch.equal(network.scales, torch.exp2(network.scales.log2().round()))
    sizes = texts[0].features[texts[0].prompt :, :-1].float().square().mean(-1).sqrt().median(0)
    evened = sizes.values * network.scales
    assert (evened > 0.5).all()
    assert (evened < 2).all()


def test_scores_have_the_factor_of_llama_whatever_the_model_has() -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    network = Eagle3Network(DecoderStack(model), LAYERS)
    assert network.layer.self_attn.scaling == network.layer.self_attn.head_dim**-0.5
