"""Trials of experts: routers are run again with other weights, choices and numbers of experts."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from msgspec.structs import replace
from support.family_faults import (
    FAMILY_FAULTS,
    baseline_of,
    family_stack,
    random_blocks,
    routed,
    router_setting,
)
from support.faults import Plant

from cascade.core.schema import UNSET, known
from cascade.gate.baselines import StoredProfile
from cascade.gate.causes.bench import Bench
from cascade.gate.causes.experts import expert_trials, routers
from cascade.gate.causes.hypotheses import CLEARLY, MOST_LEFT, Evidence, Hypothesis
from cascade.gate.causes.part_differences import part_differences
from cascade.gate.causes.trial_runs import TrialRuns
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import Attribution
from cascade.models.stack import DecoderStack
from cascade.saturation.model_parts import parts_of

BLOCKS = random_blocks()
MIXTURES = ["mixtral", "qwen3_moe"]


def tried(stack: DecoderStack, plant: Plant, *, with_parts: bool = False) -> list[Hypothesis]:
    """Return the trials of experts for a fault."""
    bench = Bench(stack, BLOCKS.ids[:2])
    right, parts = bench.rows(), parts_of(stack)
    assert right is not None
    with plant(stack):
        plain = bench.rows()
        assert plain is not None
        layers = [*map(str, range(1, stack.num_layers + 1)), f"{stack.num_layers}+norm"]
        evidence = Evidence(layers, plain, right, np.full((len(layers), 2), 1e-6))
        differences = part_differences(stack, parts) if with_parts else None
        found = list(expert_trials(TrialRuns(bench, evidence, plain, differences)))
        assert all(not module._forward_hooks for module in routers(stack))
    again = bench.rows()
    assert again is not None
    assert np.array_equal(again, right)
    return found


def best(stack: DecoderStack, plant: Plant) -> str:
    """Return the name of the only trial that leaves little; all other names leave much."""
    found = sorted(tried(stack, plant), key=lambda one: one.left)
    assert found[0].left <= MOST_LEFT
    others = [one.left for one in found if one.name != found[0].name]
    assert min(others) >= CLEARLY
    return found[0].name


@pytest.mark.parametrize("family", MIXTURES)
def test_each_fault_of_a_router_is_undone_by_one_trial(family: str) -> None:
    stack = family_stack(family)
    assert best(stack, routed(experts=3)) == "choice of experts"
    assert best(stack, routed(is_normalized=False)) == "weights of experts"
    assert best(stack, routed(top_k=1)) == "experts per token"
    assert best(stack, routed(top_k=3)) == "experts per token"


def test_weights_that_are_normalized_and_should_not_be_are_named() -> None:
    stack = family_stack("qwen3_moe")
    with router_setting("norm_topk_prob", False)(stack):  # as the model is
        assert best(stack, routed()) == "weights of experts"


def test_the_text_says_how_many_experts_are_missing() -> None:
    found = tried(family_stack("mixtral"), routed(top_k=1))
    text = min(found, key=lambda one: one.left).text
    assert text == (
        "each token goes to 1 expert too few; with 1 more, the model gives the baseline's numbers"
    )


def test_no_trial_asks_for_more_experts_than_there_are_or_for_none() -> None:
    stack = family_stack("mixtral")
    names = [one.name for one in tried(stack, router_setting("top_k", 4))]
    assert names.count("experts per token") == 1
    names = [one.name for one in tried(stack, router_setting("top_k", 1))]
    assert names.count("experts per token") == 1
    assert len(names) == 4


def test_a_setting_of_the_router_that_differs_is_tried_as_a_setting_only() -> None:
    stack = family_stack("mixtral")
    assert tried(stack, router_setting("top_k", 1), with_parts=True) == []
    assert tried(stack, routed(top_k=1), with_parts=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_without_routers_are_not_run(family: str) -> None:
    stack = family_stack(family)
    assert routers(stack) == []
    assert tried(stack, lambda _: nullcontext()) == []


def gated(name: str, *, with_parts: bool) -> Attribution:
    fault = FAMILY_FAULTS[name]
    stack = family_stack(fault.family)
    baseline = baseline_of(stack, BLOCKS)
    if not with_parts:
        content = replace(baseline.content, parts=UNSET)
        baseline = StoredProfile(content, baseline.state, baseline.rows)
    with fault.plant(stack):
        found = run_gate(stack, BLOCKS, baseline).comparison.attribution
    assert found is not None
    return found


@pytest.mark.parametrize("with_parts", [True, False])
def test_the_gate_names_a_router_that_leaves_out_an_expert(with_parts: bool) -> None:
    found = gated("fewer experts", with_parts=with_parts)
    assert known(found.named) == "choice of experts"
    assert "the routers do not choose the experts with their highest scores" in found.text
