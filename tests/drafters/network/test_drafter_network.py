"""The network of a drafter: unrolled for training, it computes what it does when it decodes."""

from __future__ import annotations

import pytest
import torch
from support.tiny_drafters import DRAFTED, LAYERS, a_drafted_stack, a_moved_network, some_texts
from torch import Tensor

from cascade.core.errors import UsageError
from cascade.drafters.config import ARCHITECTURES, Architecture
from cascade.drafters.network.drafter_network import (
    CascadeNetwork,
    DrafterNetwork,
    DraftHead,
    embeddings_of,
    feature_layers_of,
    usual_start_layer,
)
from cascade.drafters.network.layers import attend, rotary_tables
from cascade.models.stack import DecoderStack


def one_chain(
    network: DrafterNetwork, stack: DecoderStack, ids: Tensor, features: Tensor, steps: int
) -> list[Tensor]:
    """Return the states of the chain behind the last position, one token at a time."""
    embedding, tables = embeddings_of(stack), rotary_tables(stack, 64)
    hidden = network.first_input(embedding[ids[1 : len(features) + 1]], features)
    inputs, states = hidden, []
    for step in range(steps):
        if step:
            token = ids[len(features) + step]
            new = network.next_input(embedding[token][None], states[-1][None])
            inputs = torch.cat([inputs, new])
        cut = (tables[0][:, : len(inputs)], tables[1][:, : len(inputs)])
        attended = attend(network.layer, *network.heads(inputs[None], cut), None)
        states.append(network.output(inputs[None], attended)[0, -1])
    return states


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", DRAFTED)
def test_unrolled_states_are_those_of_each_chain_by_itself(
    family: str, architecture: Architecture
) -> None:
    stack = a_drafted_stack(family)
    network = a_moved_network(stack, architecture=architecture)
    text = max(some_texts(family), key=lambda text: text.new_tokens)
    ids, rows, steps = text.ids.long(), len(text.ids) - 2, 4
    tables = rotary_tables(stack, rows)
    with torch.no_grad():
        states = network.unroll(
            embeddings_of(stack)[ids[1:-1]][None], text.features[None, :rows], tables, steps
        )
        for place in range(rows - steps):
            alone = one_chain(network, stack, ids, text.features[: place + 1], steps)
            for step in range(steps):
                # In fp32, in another order of operations.
                made = states[step][0, place + step]
                torch.testing.assert_close(made, alone[step], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_behind_a_text_changes_nothing(architecture: Architecture) -> None:
    stack = a_drafted_stack()
    network, text = a_moved_network(stack, architecture=architecture), some_texts()[0]
    rows = len(text.ids) - 2
    embedded, features = embeddings_of(stack)[text.ids[1:-1].long()], text.features[:rows]
    with torch.no_grad():
        short = network.unroll(embedded[None], features[None], rotary_tables(stack, rows), 3)
        longer = network.unroll(
            torch.cat([embedded, embedded.flip(0)])[None],
            torch.cat([features, features.flip(0)])[None],
            rotary_tables(stack, 2 * rows),
            3,
        )
    for step, (one, other) in enumerate(zip(short, longer, strict=True)):
        # The rows before belong to no chain.
        torch.testing.assert_close(one[:, step:], other[:, step:rows])


def test_network_begins_as_a_copy_of_its_layer_and_of_the_final_norm() -> None:
    stack = a_drafted_stack()
    network = CascadeNetwork(stack, LAYERS)
    for name, weight in stack.layers[3].state_dict().items():
        assert torch.equal(network.layer.state_dict()[name], weight)
    assert torch.equal(network.norm.weight, stack.decoder.norm.weight)
    with torch.no_grad():
        network.layer.self_attn.q_proj.weight.zero_()
    assert stack.layers[3].self_attn.q_proj.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(30, (3, 16, 28)), (4, (1, 3, 4)), (2, (1, 2)), (1, (1,))]
)
def test_usual_layers_are_low_middle_and_late(num_layers: int, layers: tuple[int, ...]) -> None:
    assert feature_layers_of(num_layers, usual_start_layer(num_layers)) == layers


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_the_model_does_not_have_is_refused(layer: int) -> None:
    with pytest.raises(UsageError, match=f"expected --layer in 1..4, .* got {layer}"):
        feature_layers_of(4, layer)


def test_a_head_has_the_logits_of_its_tokens_and_of_those_that_are_added() -> None:
    stack = a_drafted_stack()
    tokens = torch.tensor([1, 5, 9, 40])
    head = DraftHead(stack, tokens, torch.float32)
    normed = torch.randn(3, stack.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = stack.decode_normed(normed[None])[0]
    torch.testing.assert_close(head.logits(normed), whole[:, tokens])
    wider = head.with_tokens([9, 3, 3, 60])
    assert wider.tokens.tolist() == [1, 5, 9, 40, 3, 60]
    torch.testing.assert_close(wider.logits(normed), whole[:, wider.tokens])
    assert head.with_tokens([40, 1]) is head
    assert head.tokens.tolist() == tokens.tolist()
