"""Explaining long contexts: what is tried on a long sequence, and what is said if nothing fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec.structs import replace
from support.faults import Plant, attribute_of
from support.long_faults import LONG_FAULTS, WINDOW, long_blocks, long_stack

from cascade.core.schema import UNSET, known
from cascade.gate.baselines import StoredProfile, seal
from cascade.gate.causes.bench import MOST_PASSES, Bench
from cascade.gate.causes.long_explaining import LongSides
from cascade.gate.quick_gate import run_gate
from cascade.gate.records import Attribution
from cascade.gate.remeasuring import measure_whole
from cascade.models.stack import DecoderStack
from cascade.saturation.long_statistics import LongStatistics

BLOCKS = long_blocks()


@cache
def mistral() -> tuple[DecoderStack, StoredProfile]:
    stack = long_stack("mistral", sliding_window=WINDOW)
    profile = measure_whole(stack, BLOCKS)
    arrays = profile.arrays()
    return stack, StoredProfile(seal(profile.record(), arrays), arrays, profile.rows)


def explained(plant: Plant, *, with_parts: bool = True, **options: Any) -> Attribution:
    stack, baseline = mistral()
    if not with_parts:
        baseline = StoredProfile(
            replace(baseline.content, parts=UNSET), baseline.state, baseline.rows
        )
    before = stack.weights_in_memory()
    with plant(stack):
        comparison = run_gate(stack, BLOCKS, baseline, **options).comparison
    assert stack.weights_in_memory() == before
    assert comparison.verdict == "FAIL"
    found = comparison.attribution
    assert found is not None
    assert found.cause == "long context"
    return found


def window_setting(value: int | None) -> Plant:
    return lambda stack: attribute_of(stack.model.config, "sliding_window", value)


def scaled_beyond(positions: int) -> Plant:
    """Scale what layer 3 writes for later tokens, which no trial undoes."""

    def plant(stack: DecoderStack) -> Any:
        mlp: Any = stack.layers[2].mlp
        right = mlp.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = right(hidden)
            later = torch.arange(output.shape[1])[:, None] >= positions
            return torch.where(later, output * 1.1, output)

        return attribute_of(mlp, "forward", forward)

    return plant


@pytest.mark.parametrize("value", [WINDOW + 1, WINDOW - 1, 32, None])
def test_a_window_in_the_config_is_named_with_the_baselines_value(value: int | None) -> None:
    found = explained(window_setting(value))
    assert known(found.named) == "setting sliding_window"
    assert f"config.sliding_window is {value}, and the baseline was measured with 64" in found.text
    assert "are computed differently, from layer 1 on" in found.text


def test_what_is_known_of_positions_and_layer_stays_in_the_text() -> None:
    found = explained(LONG_FAULTS["mistral longer"].fault.plant)
    assert found.layer == "1"
    assert found.text.startswith("positions beyond 64 are computed differently, from layer 1 on")
    assert "the sliding window is one token longer than the 64 of the config" in found.text


@pytest.mark.parametrize("name", ["mistral longer", "mistral ignored"])
def test_a_window_in_code_is_named_without_the_parts_of_the_baseline(name: str) -> None:
    found = explained(LONG_FAULTS[name].fault.plant, with_parts=False)
    assert known(found.named) == "sliding window"


def test_with_the_whole_corpus_both_sequences_are_compared_and_the_cause_is_named() -> None:
    assert known(explained(window_setting(32), full=True).named) == "setting sliding_window"


def test_the_sequence_that_moved_most_is_run_and_found_in_the_baseline_by_its_tokens() -> None:
    similarity = np.full((1, 3, 128), 0.5)
    similarity[0, 1] = 0.25

    def statistics(values: npt.NDArray[np.float64], order: list[int]) -> LongStatistics:
        numbers = np.array(order)
        return LongStatistics.of(["1"], values[:, order], numbers, numbers.astype(np.uint64))

    moved = similarity.copy()
    moved[0, 0, 64:] += 1e-4
    moved[0, 1, 64:] += 1e-3
    ids = np.arange(3)[:, None] * np.ones((1, 128), dtype=np.int64)
    sides = LongSides(ids, statistics(moved, [0, 1, 2]), statistics(similarity, [2, 1, 0]), 2e-6)
    chosen, evidence = sides.worst()
    assert (chosen == 1).all()
    assert evidence.expected[:, 0, 0] == pytest.approx([0.25, 0.25], abs=1e-9)
    assert evidence.obtained[:, 0, 0] == pytest.approx([0.25, 0.251], abs=1e-9)
    assert evidence.tolerance.tolist() == [[2e-6, 4e-6]]


def test_nothing_is_named_if_no_trial_fits() -> None:
    found = explained(scaled_beyond(200))
    assert found.named is UNSET
    assert found.layer == "3"
    assert "; the setting" not in found.text
    assert known(found.tried)


def test_settings_that_differ_and_explain_nothing_are_mentioned() -> None:
    def plant(stack: DecoderStack) -> Any:
        entered = ExitStack()
        entered.enter_context(scaled_beyond(200)(stack))
        mlp: Any = stack.layers[0].mlp
        entered.enter_context(attribute_of(mlp, "intermediate_size", 7))
        return entered

    found = explained(plant)
    assert found.named is UNSET
    assert "mlp.intermediate_size is 7, the baseline's was 48" in found.text


def test_a_model_that_gives_other_numbers_each_time_is_said_to() -> None:
    def plant(stack: DecoderStack) -> Any:
        mlp: Any = stack.layers[2].mlp
        right = mlp.forward
        draw = torch.Generator().manual_seed(0)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = right(hidden)
            later = torch.arange(output.shape[1])[:, None] >= 200
            return torch.where(later, output * (1 + torch.rand(1, generator=draw)), output)

        return attribute_of(mlp, "forward", forward)

    found = explained(plant)
    assert found.named is UNSET
    assert found.text.endswith("the model, run again on the same tokens, gives other numbers")


def test_passes_are_counted_and_a_model_that_agrees_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Bench] = []
    right: Callable[..., None] = Bench.__init__

    def noted(self: Bench, *args: Any) -> None:
        right(self, *args)
        made.append(self)

    monkeypatch.setattr(Bench, "__init__", noted)
    stack, baseline = mistral()
    assert run_gate(stack, BLOCKS, baseline).comparison.verdict == "PASS"
    assert made == []
    explained(LONG_FAULTS["mistral ignored"].fault.plant)
    assert [bench.passes for bench in made] == [6]
    assert made[0].passes <= MOST_PASSES
