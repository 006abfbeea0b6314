"""Faults that only long sequences show, planted in tiny models of the families concerned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.long_faults import LONG_FAULTS, LongFault, long_blocks, long_stack
from support.paths import ROOT

from cascade.core.schema import known
from cascade.gate.baselines import StoredProfile, seal
from cascade.gate.comparison import Comparison
from cascade.gate.quick_gate import run_gate
from cascade.gate.remeasuring import measure_whole
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from pytest_regressions.file_regression import FileRegressionFixture

#: One fault of each model: a family with its settings.
MODELS = {f"{fault.family} {fault.changes}": name for name, fault in LONG_FAULTS.items()}


@dataclass(frozen=True)
class Measured:
    """A tiny model and its baseline."""

    stack: DecoderStack
    baseline: StoredProfile

    def gate(self, *, long_context: bool = True) -> Comparison:
        found = run_gate(self.stack, long_blocks(), self.baseline, long_context=long_context)
        return found.comparison


@cache
def _measured(name: str) -> Measured:
    fault = LONG_FAULTS[name]
    stack = long_stack(fault.family, **fault.changes)
    profile = measure_whole(stack, long_blocks())
    arrays = profile.arrays()
    return Measured(stack, StoredProfile(seal(profile.record(), arrays), arrays, profile.rows))


def measured(fault: LongFault) -> Measured:
    return _measured(MODELS[f"{fault.family} {fault.changes}"])


@cache
def planted(name: str) -> Comparison:
    """Return what the gate makes of a fault."""
    fault = LONG_FAULTS[name]
    found = measured(fault)
    with fault.fault.plant(found.stack):
        return found.gate()


@pytest.mark.parametrize("name", LONG_FAULTS)
def test_a_fault_of_long_contexts_is_seen_and_named(name: str) -> None:
    fault, comparison = LONG_FAULTS[name], planted(name)
    assert comparison.verdict == "FAIL"
    found = comparison.attribution
    assert found is not None
    expected = (fault.fault.cause, fault.fault.layer, fault.fault.named)
    assert (found.cause, found.layer, known(found.named)) == expected
    long = comparison.long_context
    if fault.begins is None:
        assert long is None  # the other sequences have drifted already
    else:
        assert long is not None
        assert long.moved[0].first == fault.begins
        assert "short sequences: no drift" in comparison.headline()


@pytest.mark.parametrize(
    "name", [name for name, fault in LONG_FAULTS.items() if fault.begins is not None]
)
def test_without_the_long_sequence_it_is_not_seen(name: str) -> None:
    fault = LONG_FAULTS[name]
    found = measured(fault)
    with fault.fault.plant(found.stack):
        assert found.gate(long_context=False).verdict == "PASS"


# --- No crying wolf --------------------------------------------------------------------------


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS.values())
@pytest.mark.parametrize("threads", [1, 2])
def test_a_clean_model_passes(name: str, threads: int) -> None:
    found = measured(LONG_FAULTS[name])
    with with_threads(threads):
        comparison = found.gate()
    assert comparison.verdict == "PASS"
    assert comparison.long_context is not None
    assert comparison.long_context.verdict == "PASS"
    assert comparison.long_context.length == 512


@pytest.mark.parametrize("name", ["llama frozen", "mistral longer", "gemma3_text longer"])
def test_another_attention_kernel_passes(name: str) -> None:
    found = measured(LONG_FAULTS[name])
    model: Any = found.stack.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
    try:
        comparison = found.gate()
    finally:
        model.set_attn_implementation(before)
    long = comparison.long_context
    assert long is not None
    assert long.verdict == "PASS"
    # It did compute something else.
    assert max(each.difference for each in long.ranges) > 0


# --- The table of the docs -------------------------------------------------------------------


def test_the_table_of_the_docs_is_what_was_measured(
    file_regression: FileRegressionFixture,
) -> None:
    lines = ["family,fault,verdict,points to,layer,first positions,named cause"]
    for name, fault in LONG_FAULTS.items():
        comparison = planted(name)
        found = comparison.attribution
        assert found is not None
        long = comparison.long_context
        first = "all" if long is None else f"{long.moved[0].first} to {long.moved[0].last}"
        row = (fault.family, fault.fault.what, comparison.verdict, found.cause)
        lines.append(",".join([*row, found.layer or "-", first, known(found.named) or "-"]))
    file_regression.check(
        "\n".join(lines) + "\n", fullpath=ROOT / "docs" / "long-contexts.csv", extension=".csv"
    )
