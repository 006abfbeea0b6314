"""Exit heads and propagation maps predict what the full model computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from support.head_probes import TEXT, is_projected, relative, truth
from support.reference_early_exit import (
    ALL_FAMILIES,
    LAYERS,
    a_stack,
    difference,
    own_logits,
    random_blocks,
    some_heads,
    visited,
)
from support.tiny_models import FAMILIES, WIDTH, tiny_model
from torch import Tensor

from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.exits.heads import LogitLens
from cascade.models.stack import DecoderStack

#: Families whose final norm only divides by the root mean square. It is then an affine map of the
#: head's input.
RMS_NORMED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "smollm3", "granite")


#: Families with separate key and value projections. Their maps predict keys and values; the maps of
#: other families predict layer inputs.
PROJECTED = (*RMS_NORMED, "cohere", "opt")


OF_STATES = tuple(family for family in FAMILIES if family not in (*PROJECTED, "gpt_neo"))


#: Relative error to which a fit recovers an existing affine map. The smallest penalty is 1e-6 of
#: the states' mean square.
FOUND = 2e-3


@torch.no_grad()
def with_idle_layers(family: str, above: int) -> DecoderStack:
    """Return a stack whose layers above `above` add nothing to the stream but still have keys."""
    model = tiny_model(family)
    stack = DecoderStack(model)
    last = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc_out", "fc2")
    for layer in stack.layers[above:]:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in last:
                for parameter in module.parameters():
                    parameter.zero_()
    history = visited(stack, TEXT)
    assert all(difference(entry, history[above]) == 0.0 for entry in history[above:])
    assert difference(history[above], history[above - 1]) > 0.1
    return stack


@functools.cache
def idle_upper_half(family: str) -> tuple[DecoderStack, FittedHeads]:
    stack = with_idle_layers(family, 2)
    return stack, fit_heads(stack, random_blocks(), [1, 2, LAYERS])


# --- Heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RMS_NORMED)
def test_head_of_last_layer_matches_final_norm(family: str) -> None:
    stack = a_stack(family)
    history, final, _ = truth(stack, TEXT)
    head = some_heads(family).head(stack, LAYERS)
    assert relative(head.normed(history[LAYERS]), final) < FOUND
    logits = own_logits(stack, TEXT).flatten(0, 1)
    got = head.logits(history[LAYERS][:60])
    assert relative(got, logits[:60]) < FOUND * 10  # soft-capping and scaling change the unit
    agrees = got.argmax(dim=-1) == logits[:60].argmax(dim=-1)
    assert agrees.float().mean().item() > 0.97


@pytest.mark.parametrize("family", RMS_NORMED)
def test_head_below_idle_layers_matches_full_model(family: str) -> None:
    stack, heads = idle_upper_half(family)
    history, final, _ = truth(stack, TEXT)
    assert relative(heads.head(stack, 2).normed(history[2]), final) < FOUND
    assert relative(heads.head(stack, 1).normed(history[1]), final) > 10 * FOUND


@ALL_FAMILIES
def test_head_beats_constant_prediction_on_fitted_text(family: str) -> None:
    stack, blocks = a_stack(family), random_blocks()
    history, final, _ = truth(stack, torch.from_numpy(blocks.ids).long())
    for layer in range(1, LAYERS):
        head = some_heads(family).head(stack, layer)
        fitted = (head.normed(history[layer]) - final).square().mean().item()
        constant = (final.mean(dim=0) - final).square().mean().item()
        assert fitted < constant


@ALL_FAMILIES
def test_head_logits_are_lm_head_of_predicted_normed_state(family: str) -> None:
    stack, hidden = a_stack(family), torch.randn(9, WIDTH)
    head = some_heads(family).head(stack, 2)
    normed = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt() @ head.weight + head.bias
    # 1e-5: the same sums in a different order.
    assert difference(head.normed(hidden), normed) < 1e-5 * normed.abs().max().item()
    expected = stack.decode_normed(head.normed(hidden)[:, None])[:, 0]
    assert difference(head.logits(hidden), expected) < 1e-4


@ALL_FAMILIES
def test_logit_lens_of_last_layer_matches_full_model(family: str) -> None:
    stack = a_stack(family)
    history = visited(stack, TEXT)
    logits = LogitLens(stack).logits(history[LAYERS][0])
    # 1e-5: kernels may sum a row of a batch in a different order than a single row.
    assert difference(logits, own_logits(stack, TEXT)[0]) < 1e-5


def test_heads_report_their_multiplications() -> None:
    stack = a_stack("llama")
    assert LogitLens(stack).multiplications == 0
    assert some_heads("llama").head(stack, 2).multiplications == WIDTH * WIDTH
    assert (LogitLens.name, some_heads("llama").head(stack, 2).name) == ("logit_lens", "ridge")


# --- Propagation maps -------------------------------------------------------------------------


def check_maps(stack: DecoderStack, heads: FittedHeads, layer: int, upper: range) -> None:
    """Raise AssertionError unless a layer's map predicts the inputs of these upper layers."""
    history, _, raw = truth(stack, TEXT)
    found = heads.propagation(stack, layer)
    assert found is not None
    assert found.first == layer + 1
    predicted = found.predict(history[layer])
    assert predicted.shape == (TEXT.numel(), LAYERS - layer, heads.width)
    for number in upper:
        given = [history[number - 1]] if heads.of_states else raw[number - 1]
        expected = torch.cat(given, dim=-1)
        error = relative(predicted[:, number - layer - 1], expected)
        assert error < FOUND, f"the prediction for layer {number} is wrong"


@pytest.mark.parametrize("family", [*RMS_NORMED, *OF_STATES])
def test_map_predicts_next_layer_exactly(family: str) -> None:
    stack, heads = a_stack(family), some_heads(family)
    check_maps(stack, heads, LAYERS - 1, range(LAYERS, LAYERS + 1))
    check_maps(stack, heads, 1, range(2, 3))
    # The map is affine, so it cannot predict across three layers.
    with pytest.raises(AssertionError, match="prediction for layer 4"):
        check_maps(stack, heads, 1, range(4, 5))


@pytest.mark.parametrize("family", [*RMS_NORMED, *OF_STATES])
def test_map_predicts_every_upper_layer_below_idle_layers(family: str) -> None:
    stack, heads = idle_upper_half(family)
    check_maps(stack, heads, 2, range(3, 5))


def swapped(heads: FittedHeads, order: Callable[[Tensor], Tensor]) -> FittedHeads:
    """Return heads whose maps have their outputs in a different order."""
    maps = {
        layer: (
            order(weight.unflatten(-1, (-1, heads.width))).flatten(-2),
            order(bias.unflatten(-1, (-1, heads.width))).flatten(-2),
        )
        for layer, (weight, bias) in heads.maps.items()
    }
    return dataclasses.replace(heads, maps=maps)


@pytest.mark.parametrize(
    ("wrong", "layers"),
    [
        (lambda outputs: outputs.flip(-2), "3"),  # the highest layer first
        (lambda outputs: outputs.roll(1, dims=-2), "3"),
        (lambda outputs: outputs.roll(outputs.shape[-1] // 2, dims=-1), "3"),  # values before keys
    ],
)
def test_check_maps_detects_reordered_outputs(
    wrong: Callable[[Tensor], Tensor], layers: str
) -> None:
    stack, heads = idle_upper_half("llama")
    with pytest.raises(AssertionError, match=f"prediction for layer {layers}"):
        check_maps(stack, swapped(heads, wrong), 2, range(3, 5))


@ALL_FAMILIES
def test_maps_predict_keys_and_values_or_layer_inputs_by_family(
    family: str,
) -> None:
    stack, heads = a_stack(family), some_heads(family)
    assert heads.of_states == (not is_projected(stack))
    config = stack.model.config
    if heads.of_states:
        assert heads.width == WIDTH
    else:
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        size = getattr(config, "head_dim", None) or WIDTH // config.num_attention_heads
        assert heads.width == 2 * groups * size
    assert heads.layers == [1, 2, 3, 4]
    assert sorted(heads.maps) == [1, 2, 3]
    assert heads.propagation(stack, LAYERS) is None
