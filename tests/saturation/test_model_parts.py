"""Model parts: what is recorded of tensors and settings, and what it does not depend on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.family_faults import family_stack

from cascade.models.stack import DecoderStack
from cascade.saturation.model_parts import (
    TIED,
    as_text,
    format_of,
    from_text,
    layer_and_kind,
    parts_of,
    setting_places,
)

FAMILIES = ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_same_for_a_copy_and_differ_in_what_was_changed(family: str) -> None:
    stack = family_stack(family)
    before = parts_of(stack)
    assert parts_of(DecoderStack(copy.deepcopy(stack.model))) == before
    name, weight = next(iter(stack.layers[1].named_parameters()))
    weight.data.flatten()[3] += 1e-3
    after = parts_of(stack)
    changed = [each for each in before.tensors if after.tensors[each] != before.tensors[each]]
    assert len(changed) == 1
    assert layer_and_kind(stack, changed[0]) == (2, name)
    assert after.settings == before.settings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_summary_and_its_size(family: str) -> None:
    stack = family_stack(family)
    parts = parts_of(stack)
    for name, parameter in stack.model.named_parameters():
        found = parts.tensors[name]
        assert found.digest
        assert found.rms == pytest.approx(float(parameter.data.double().square().mean() ** 0.5))


def test_settings_are_named_once_for_all_layers_and_found_again() -> None:
    stack = family_stack("qwen3_moe")
    parts = parts_of(stack)
    name = "model.layers.*.mlp.gate.top_k"
    assert parts.settings[name] == ["2"]
    places = setting_places(stack, name)
    assert len(places) == stack.num_layers
    owner, key = places[1]
    setattr(owner, key, 1)
    assert parts_of(stack).settings[name] == ["2", "1", "2", "2"]


def test_a_tied_embedding_is_recorded() -> None:
    stack = family_stack("llama")
    assert parts_of(stack).settings[TIED] == ["False"]
    head: Any = stack.lm_head
    head.weight = stack.model.get_input_embeddings().weight
    assert parts_of(stack).settings[TIED] == ["True"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of torch
def test_compiling_changes_no_name() -> None:
    stack = family_stack("llama")
    before = parts_of(stack)
    layer: Any = stack.layers[1]
    layer.mlp = torch.compile(layer.mlp, backend="eager")
    assert any("_orig_mod" in name for name, _ in stack.model.named_parameters())
    assert parts_of(stack).tensors == before.tensors


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-1e6, 1e6)))
def test_a_setting_is_read_back_with_its_type(value: object) -> None:
    found = from_text(as_text(value))
    assert type(found) is type(value)
    assert found == pytest.approx(value)


def test_text_stays_text() -> None:
    assert from_text(as_text("silu")) == "silu"
    assert as_text(50.0) == "50.0"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w, "float32"),
        (lambda w: w.half().float(), "float16"),
        (lambda w: w.bfloat16().float(), "bfloat16"),
        (lambda w: (w / (w.abs().max() / 127)).round() * (w.abs().max() / 127), "float32"),
        (lambda w: (w * 127).round() / 127 * w.abs().max(), "float32"),
    ],
)
def test_the_coarsest_exact_format_is_found(change: Any, expected: str) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    assert format_of(change(weight)) == expected


def test_int8_needs_one_scale_per_row() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert format_of((weight / scale).round() * scale) == "int8"
    assert format_of(torch.zeros(24, 32)) != "int8"
    assert format_of(torch.tensor(0.1)) == "float32"
