"""Explaining: each cause that is computed, on tiny models of several families."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support import faults
from support.family_faults import (
    baseline_of,
    family_stack,
    learned_positions_late,
    left_padding,
    random_blocks,
)
from support.faults import Plant, attribute_of, weights

from cascade.core import float32_products
from cascade.core.float32_products import product_precision, products_in
from cascade.core.schema import UNSET, known
from cascade.gate.baselines import StoredProfile
from cascade.gate.causes import bench as benches
from cascade.gate.causes.bench import MOST_PASSES, Bench, tensors_set, values_set
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import Attribution
from cascade.models.stack import DecoderStack
from cascade.saturation import profile as saturation

BLOCKS = random_blocks()


def explained(
    stack: DecoderStack, plant: Plant, *, with_parts: bool = True, **options: Any
) -> Attribution:
    """Return what a gate says of a fault, after checking that the model is as before."""
    baseline = baseline_of(stack, BLOCKS, with_parts=with_parts)
    before = stack.weights_in_memory()
    with plant(stack):
        found = run_gate(stack, BLOCKS, baseline, **options).comparison
    assert stack.weights_in_memory() == before
    assert found.verdict == "FAIL"
    assert found.attribution is not None
    return found.attribution


def epsilon(value: float) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        changes = [
            (module, key, value)
            for module in stack.model.modules()
            for key in ("variance_epsilon", "eps")
            if isinstance(vars(module).get(key), float)
        ]
        assert changes
        return values_set(*changes)()

    return plant


def norm_of_ones(stack: DecoderStack) -> Any:
    norm: Any = stack.decoder.norm
    # Gemma adds 1 to the weight, so that zeros are ones.
    return weights(norm, lambda: norm.weight.data.fill_(0.5))


def norm_skipped(stack: DecoderStack) -> Any:
    return attribute_of(stack.decoder.norm, "forward", lambda hidden_states: hidden_states)


def one_weight(name: str, change: Any) -> Plant:
    def plant(stack: DecoderStack) -> Any:
        module = stack.layers[1].get_submodule(name)
        return weights(module, lambda: change(module.weight.data))

    return plant


WITH_A_NORM = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])


@WITH_A_NORM
@pytest.mark.parametrize("with_parts", [True, False])
def test_a_final_norm_of_equal_weights_is_told_from_a_skipped_one_and_from_wrong_reading(
    family: str, with_parts: bool
) -> None:
    stack = family_stack(family)
    label = stack.layer_labels[-1]
    found = explained(stack, norm_of_ones, with_parts=with_parts)
    assert (found.named, found.cause) == ("final norm of equal weights", "layer")
    assert found.layer == label
    assert "are all 0.5" in found.text
    found = explained(stack, norm_skipped, with_parts=with_parts)
    assert (found.named, found.cause, found.layer) == ("final norm skipped", "layer", label)
    found = explained(stack, faults.wrong_pairs(faults.never_normed), with_parts=with_parts)
    assert (found.named, found.cause) == ("last state read before the final norm", "capture")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("with_parts", [True, False])
def test_another_epsilon_is_named(family: str, with_parts: bool) -> None:
    found = explained(family_stack(family), epsilon(1e-2), with_parts=with_parts)
    assert str(known(found.named)).startswith("setting ")
    assert "0.01" in found.text
    assert "1e-06" in found.text


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("with_parts", [True, False])
def test_a_scaled_projection_is_named_with_its_scale(family: str, with_parts: bool) -> None:
    plant = one_weight("self_attn.o_proj", lambda weight: weight.mul_(1.25))
    found = explained(family_stack(family), plant, with_parts=with_parts)
    assert (found.named, found.cause, found.layer) == ("scaled self_attn.o_proj", "layer", "2")
    assert "multiplied by 1.25;" in found.text


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("with_parts", [True, False])
def test_swapped_layers_are_named(family: str, with_parts: bool) -> None:
    found = explained(family_stack(family), faults.swapped(2), with_parts=with_parts)
    assert (found.named, found.cause, found.layer) == ("layers swapped", "layer", "2")


def test_layers_in_another_order_are_named_with_the_parts_of_the_baseline() -> None:
    def rotated(stack: DecoderStack) -> Any:
        own = [list(layer.parameters()) for layer in stack.layers]
        return tensors_set(
            *(
                (mine, lambda other=other: other)  # type: ignore[misc]
                for number in (1, 2, 3)
                for mine, other in zip(own[number], own[1 + number % 3], strict=True)
            )
        )()

    found = explained(family_stack("llama"), rotated)
    assert found.named == "layers swapped"
    assert "layer 2 has those of 3, layer 3 has those of 4, layer 4 has those of 2" in found.text


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_skipped_layer_is_named_without_trials(family: str) -> None:
    stack = family_stack(family)

    def skipped(_: DecoderStack) -> Any:
        def forward(hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states

        return attribute_of(stack.layers[2], "forward", forward)

    found = explained(stack, skipped)
    assert (found.named, found.layer) == ("layer skipped", "3")


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rounded_weights_are_named_by_their_format(family: str, form: str) -> None:
    plant = faults.int8() if form == "int8" else faults.through(getattr(torch, form))
    found = explained(family_stack(family), plant)
    assert (found.named, found.cause) == (f"weights in {form}", "numerics")
    # Without the baseline's parts, its weights may have been the same.
    assert explained(family_stack(family), plant, with_parts=False).named is UNSET


def test_weights_of_a_bfloat16_checkpoint_are_not_said_to_be_rounded() -> None:
    stack = family_stack("llama")
    for parameter in stack.model.parameters():
        parameter.data.copy_(parameter.data.bfloat16().float())

    def other(stack: DecoderStack) -> Any:
        layer: Any = stack.layers[1].mlp.down_proj  # type: ignore[union-attr]
        return weights(layer, lambda: layer.weight.data.copy_(layer.weight.data.flip(0)))

    found = explained(stack, other)
    assert (found.named, found.layer) == ("weights changed", "2")
    assert "mlp.down_proj in layer 2 differ" in found.text


def test_positions_are_named_for_learned_ones_in_the_model_and_around_it() -> None:
    inside = explained(family_stack("gpt2"), learned_positions_late)
    assert inside.named == "positions shifted"
    assert "1 too high" in inside.text
    outside = explained(family_stack("gpt2"), left_padding(3))
    assert outside.named == "positions shifted"
    assert "begin at 3" in outside.text


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("with_parts", [True, False])
def test_rotary_frequencies_are_named(family: str, with_parts: bool) -> None:
    found = explained(family_stack(family), _slower, with_parts=with_parts)
    assert (found.named, found.cause) == ("rotary frequencies", "model")


def _slower(stack: DecoderStack) -> Any:
    frequencies: Any = stack.decoder.rotary_emb.inv_freq  # type: ignore[union-attr]
    return tensors_set((frequencies, lambda: frequencies * 0.5))()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_mask_that_shows_later_tokens_is_named(family: str) -> None:
    stack = family_stack(family)
    if family == "mistral":  # its window is made elsewhere
        stack.model.config.sliding_window = None
    found = explained(stack, faults.mask(None))
    assert (found.named, found.cause) == ("mask", "model")


def test_a_wrong_kernel_is_named_because_the_other_one_is_right() -> None:
    found = explained(family_stack("llama"), faults.wrong_sdpa)
    assert found.named == "attention kernel"
    assert "with eager" in found.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_similarities_in_another_dtype_are_told_from_a_model_in_it(dtype: str) -> None:
    def plant(_: DecoderStack) -> Any:
        form = getattr(torch, dtype)
        right = saturation.similarities

        def similarities(stack: DecoderStack, ids: torch.Tensor) -> torch.Tensor:
            states: list[torch.Tensor] = []
            normed = stack.visit(ids, lambda _, hidden: states.append(hidden))
            values = benches.similarities_of(states, normed, form)
            assert values.shape[0] == len(right(stack, ids)[0])
            return values.permute(1, 0, 2).float()

        return attribute_of(saturation, "similarities", similarities)

    found = explained(family_stack("llama"), plant)
    assert (found.named, found.cause) == (f"similarity in {dtype}", "numerics")


# --- What is not named -----------------------------------------------------------------------


def test_a_model_that_is_right_by_itself_points_to_how_it_was_run() -> None:
    found = explained(family_stack("llama"), faults.changed(lambda values: values * 0.999))
    assert (found.named, found.cause) == (UNSET, "capture")
    assert "by itself" in found.text
    assert "layer 1 is the first that moved" in found.text


def test_a_model_that_gives_other_numbers_each_time_is_called_not_repeatable() -> None:
    def plant(stack: DecoderStack) -> Any:
        layer: Any = stack.layers[1].mlp.down_proj  # type: ignore[union-attr]
        forward = layer.forward
        return attribute_of(layer, "forward", lambda x: forward(x) * (1 + 0.1 * torch.rand(1)))

    found = explained(family_stack("llama"), plant, decoding=False)
    assert found.named is UNSET
    assert "not repeatable" in found.text


def test_code_of_one_layer_is_not_named_and_the_weights_are_said_to_be_right() -> None:
    def plant(stack: DecoderStack) -> Any:
        mlp: Any = stack.layers[2].mlp
        forward = mlp.forward
        return attribute_of(mlp, "forward", lambda x: forward(x).clamp(-0.01, 0.01))

    found = explained(family_stack("llama"), plant)
    assert (found.named, found.cause, found.layer) == (UNSET, "layer", "3")
    assert "all weights are the baseline's" in found.text
    assert "layer 3 is the first that moved" in found.text


def test_weights_above_the_first_row_that_moved_are_not_blamed() -> None:
    """A setting moves layer 1; weights of layer 4 differ too, but cannot move layer 1."""

    def plant(stack: DecoderStack) -> Any:
        entered = ExitStack()
        entered.enter_context(faults.scaled_mlp(4)(stack))
        entered.enter_context(faults.attention_scale(stack))
        return entered

    found = explained(family_stack("llama"), plant)
    assert found.named is UNSET
    assert "self_attn.scaling" in found.text


def test_a_setting_that_differs_and_explains_nothing_is_mentioned_but_not_named() -> None:
    def plant(stack: DecoderStack) -> Any:
        entered = ExitStack()
        mlp: Any = stack.layers[0].mlp
        forward = mlp.forward
        entered.enter_context(attribute_of(mlp, "forward", lambda x: forward(x).clamp(-0.01, 0.01)))
        entered.enter_context(attribute_of(mlp, "intermediate_size", 7))
        return entered

    found = explained(family_stack("llama"), plant)
    assert found.named is UNSET
    assert "mlp.intermediate_size is 7, the baseline's was 48" in found.text


# --- The budget ------------------------------------------------------------------------------


def test_an_attribution_takes_no_more_passes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Bench] = []
    right = Bench.__init__

    def noted(self: Bench, *args: Any) -> None:
        right(self, *args)
        made.append(self)

    monkeypatch.setattr(Bench, "__init__", noted)
    explained(family_stack("gpt2"), _another_table, with_parts=False)
    (bench,) = made
    assert 1 < bench.passes <= MOST_PASSES


def _another_table(stack: DecoderStack) -> Any:
    table: Any = stack.decoder.wpe
    return weights(table, lambda: table.weight.data.mul_(1.5))


def test_a_spent_bench_says_nothing() -> None:
    bench = Bench(family_stack("llama"), BLOCKS.ids[:1])
    assert bench.rows() is not None
    bench.passes = MOST_PASSES
    assert bench.rows() is None


def test_a_change_that_the_model_does_not_run_with_is_no_cause() -> None:
    stack = family_stack("llama")
    bench = Bench(stack, BLOCKS.ids[:1])
    first: Any = stack.layers[0]
    assert bench.rows(values_set((first, "forward", None))) is None
    again = bench.rows(nullcontext)
    assert again is not None


def test_passing_models_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = family_stack("llama")
    baseline = baseline_of(stack, BLOCKS)

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Bench, "__init__", never)
    assert run_gate(stack, BLOCKS, baseline).comparison.verdict == "PASS"


def test_a_baseline_of_an_earlier_release_has_no_parts_and_is_read() -> None:
    stack = family_stack("llama")
    baseline = baseline_of(stack, BLOCKS)
    old = StoredProfile(replace(baseline.content, parts=UNSET), baseline.state, baseline.rows)
    with faults.scaled_mlp(2)(stack):
        found = run_gate(stack, BLOCKS, old).comparison.attribution
    assert found is not None
    assert found.layer == "2"


def test_products_that_autocast_rounds_are_named() -> None:
    stack = family_stack("llama")
    for with_parts in (True, False):
        found = explained(stack, faults.autocast, with_parts=with_parts)
        assert (found.cause, found.named) == ("numerics", "precision of products")
        assert "rounded to bfloat16 by autocast" in found.text
        assert "torch.set_float32_matmul_precision" in found.text


def test_products_that_were_rounded_in_the_baseline_alone_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = family_stack("llama")
    right = torch.nn.functional.linear

    def linear(rows: Any, weight: Any, bias: Any = None) -> Any:
        if product_precision(stack.device) is None:
            return right(rows, weight, bias)
        rounded = right(rows.bfloat16(), weight.bfloat16()).float()
        return rounded if bias is None else rounded + bias

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(float32_products, "_rounds", lambda *_: True)
    with products_in(stack.device, "bf16"):
        baseline = baseline_of(stack, BLOCKS)
        # The same on both sides is no drift, and decoding agrees up to the rounding.
        noisy = replace(baseline.content, noise=measure_noise(stack, BLOCKS.ids))
        same = StoredProfile(noisy, baseline.state, baseline.rows)
        comparison = run_gate(stack, BLOCKS, same).comparison
        assert comparison.verdict == "PASS"
        assert comparison.decoding is not None
        assert comparison.decoding.verdict == "PASS"
    found = run_gate(stack, BLOCKS, baseline).comparison
    assert found.verdict == "FAIL"
    assert found.attribution is not None
    assert found.attribution.named == "precision of products"
    assert "in the baseline they are rounded to bf16" in found.attribution.text
