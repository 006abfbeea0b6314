"""Trials of positions: rotary embeddings made again, sliding windows, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.family_faults import ABOUT, baseline_of, family_stack, random_blocks
from support.faults import attribute_of
from support.long_faults import long_stack, other_rope

from cascade.core.schema import known
from cascade.gate.causes.bench import Bench, values_set
from cascade.gate.causes.part_differences import part_differences
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import Attribution
from cascade.models.stack import DecoderStack
from cascade.saturation.model_parts import parts_of

BLOCKS = random_blocks()


def with_config(stack: DecoderStack, change: Any) -> DecoderStack:
    """Return the same weights in a model of another config, as an edited `config.json` gives it."""
    config = copy.deepcopy(stack.model.config)
    change(config)
    model: Any = type(stack.model)(config)
    model.load_state_dict(stack.model.state_dict())
    return DecoderStack(model.eval(), provenance=ABOUT)


def attributed(stack: DecoderStack, other: DecoderStack) -> Attribution:
    comparison = run_gate(other, BLOCKS, baseline_of(stack, BLOCKS)).comparison
    assert comparison.verdict == "FAIL"
    assert comparison.attribution is not None
    return comparison.attribution


def test_another_base_in_the_config_is_named_with_the_baselines() -> None:
    stack = family_stack("llama")
    other = with_config(stack, lambda config: config.rope_parameters.update(rope_theta=500.0))
    found = attributed(stack, other)
    assert (known(found.named), found.layer) == ("rotary frequencies", "1")
    assert "the baseline's config (rope_parameters.rope_theta 10000.0)" in found.text


def test_frequencies_of_one_kind_of_layer_are_recorded_and_named() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    stack = long_stack("gemma3_text", layer_types=kinds)
    name = "config.rope_parameters.full_attention.rope_theta"
    assert name in parts_of(stack).settings

    def change(config: Any) -> None:
        config.rope_parameters["full_attention"]["rope_theta"] = 50.0

    other = with_config(stack, change)
    (setting,) = part_differences(other, parts_of(stack)).settings
    assert (setting.name, setting.new) == (name, ["50.0"])
    assert known(attributed(stack, other).named) == "rotary frequencies"


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_rotary_embedding_that_ignores_its_config_is_named_without_parts(kind: str) -> None:
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = 128
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stack = long_stack("llama", num_attention_heads=2, rope_parameters=scaling)
    baseline = baseline_of(stack, BLOCKS, with_parts=False)
    with other_rope(factor=1.0)(stack):
        found = run_gate(stack, BLOCKS, baseline).comparison.attribution
    assert found is not None
    assert (known(found.named), found.cause) == ("rotary frequencies", "model")
    assert "does not compute what the config says" in found.text


def test_a_change_leaves_no_attribute_behind() -> None:
    stack = family_stack("llama")
    rotary: Any = stack.decoder.rotary_emb
    bench = Bench(stack, BLOCKS.ids[:1])
    assert bench.rows(values_set((rotary, "forward", rotary.forward))) is not None
    assert "forward" not in vars(rotary)
    with attribute_of(rotary, "forward", rotary.forward):
        patched = vars(rotary)["forward"]
        bench.rows(values_set((rotary, "forward", lambda *_, **__: None)))
        assert vars(rotary)["forward"] is patched
