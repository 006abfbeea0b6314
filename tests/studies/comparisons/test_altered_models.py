"""Tests of altered models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_model
from torch import Tensor

from cascade.core.errors import ModelError, UsageError
from cascade.models.stack import DecoderStack
from cascade.studies.comparisons.altered_models import (
    INT4_GROUP,
    Alteration,
    alter,
    copy_of,
    rounded,
)

COPIES = ("int8", "int4", "bf16", "noise:0.01")


def a_stack(family: str = "llama") -> DecoderStack:
    return DecoderStack(tiny_model(family), provenance={"name": "tiny", "weights_hash": "w"})


def weights_of(stack: DecoderStack) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stack.model.state_dict().items()}


@pytest.mark.parametrize("text", COPIES)
def test_a_copy_changes_only_the_matrices_of_layers_and_not_the_original(text: str) -> None:
    stack = a_stack()
    before = weights_of(stack)
    altered = copy_of(stack, Alteration.parse(text))
    after = weights_of(stack)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = {name for name, value in weights_of(altered).items() if not value.equal(before[name])}
    matrices = {name for name, value in before.items() if ".layers." in name and value.ndim == 2}
    assert changed == matrices
    assert len(matrices) == 7 * 4


@pytest.mark.parametrize("text", COPIES)
def test_the_provenance_of_a_copy_names_its_alteration(text: str) -> None:
    stack = a_stack()
    altered = copy_of(stack, Alteration.parse(text))
    made = altered.provenance
    assert made.name == f"tiny+{text}"
    assert made.weights_hash == altered.weights_in_memory() != stack.weights_in_memory()
    assert "all decoder layers" in made.altered
    assert stack.provenance.name == "tiny"
    assert stack.provenance.weights_hash == "w"


def test_int8_rounds_to_the_nearest_of_255_values_per_output() -> None:
    stack = a_stack()
    before = stack.layers[0].mlp.up_proj.weight.detach().clone()  # type: ignore[union-attr]
    alter(stack, Alteration("int8"))
    after = stack.layers[0].mlp.up_proj.weight.detach()  # type: ignore[union-attr]
    step = before.abs().amax(dim=1, keepdim=True) / 127
    assert ((after / step) - (after / step).round()).abs().max() < 1e-3
    assert ((after - before).abs() <= 0.5001 * step).all()


def test_int4_has_one_scale_per_output_and_group_of_inputs() -> None:
    stack = a_stack()
    weight = stack.layers[1].self_attn.q_proj.weight  # type: ignore[union-attr]
    down = stack.layers[1].mlp.down_proj.weight  # type: ignore[union-attr]
    assert weight.shape[1] == INT4_GROUP
    assert down.shape[1] % INT4_GROUP
    alter(stack, Alteration("int4"))
    for matrix in (weight, down):  # a row that is not divisible into groups is one group
        for row in matrix.detach():
            assert len(row.unique()) <= 15


def test_gpt2_weights_are_scaled_by_column() -> None:
    stack = a_stack("gpt2")
    before = stack.layers[0].mlp.c_fc.weight.detach().clone()  # type: ignore[union-attr]
    alter(stack, Alteration("int8"))
    after = stack.layers[0].mlp.c_fc.weight.detach()  # type: ignore[union-attr]
    assert torch.equal(after, rounded(before.T, 127).T)
    assert not torch.equal(after, rounded(before, 127))


def test_noise_has_the_given_size_and_seed() -> None:
    stack = a_stack()
    before = weights_of(stack)
    one, same, other = (
        weights_of(copy_of(stack, Alteration.parse("noise:0.05", seed=seed))) for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    factor = one[name] / before[name] - 1
    assert 0.045 < float(factor.std()) < 0.055
    assert abs(float(factor.mean())) < 0.005


def test_bf16_does_not_change_a_bfloat16_model() -> None:
    stack = DecoderStack(tiny_model("llama").bfloat16())
    before = weights_of(stack)
    alter(stack, Alteration("bf16"))
    assert all(torch.equal(before[name], value) for name, value in weights_of(stack).items())


def test_packed_weights_are_refused() -> None:
    stack = a_stack()
    linear = stack.layers[2].mlp.up_proj  # type: ignore[union-attr]
    linear.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"expected floating-point weights .* got uint8"):
        alter(stack, Alteration("int8"))


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    st.sampled_from([7, 127]),
)
@settings(deadline=None)
def test_rounding_is_near_and_rounding_again_changes_nothing(
    values: list[float], largest: int
) -> None:
    weight = torch.tensor([values])
    once = rounded(weight, largest)
    step = weight.abs().max() / largest
    assert ((once - weight).abs() <= 0.5001 * step + 1e-6).all()
    assert torch.allclose(rounded(once, largest), once, atol=float(step) * 1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int3", "expected a copy such as int8"),
        ("int8:2", "expected a copy such as int8"),
        ("noise", "expected a copy such as int8"),
        ("noise:", "above 0 and below 1"),
        ("noise:0", "above 0 and below 1"),
        ("noise:1.5", "above 0 and below 1"),
        ("noise:nan", "above 0 and below 1"),
        ("noise:much", "above 0 and below 1"),
        ("", "expected a copy such as int8"),
    ],
)
def test_invalid_alterations_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Alteration.parse(text)
    assert f"got {text}" in str(caught.value)


@pytest.mark.parametrize("text", COPIES)
def test_the_name_of_an_alteration_is_the_text_it_was_parsed_from(text: str) -> None:
    assert Alteration.parse(text).name == text
