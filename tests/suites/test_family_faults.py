"""Faults of parts that SmolLM2 does not have: experts, learned positions, soft-caps, adapters."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from msgspec.structs import replace
from support.family_faults import (
    ALL_FAMILY_FAULTS,
    FAMILY_FAULTS,
    WRONG_MERGES,
    FamilyFault,
    adapter_of,
    baseline_of,
    family_stack,
    merged,
    random_blocks,
)
from support.paths import ROOT
from support.tiny_models import tiny_tokenizer

from cascade.core.schema import known
from cascade.corpora.blocks import load_blocks
from cascade.evaluation.operating_points import OperatingPoint
from cascade.gate.budgets import accept_budgets, check_budgets, read_budgets
from cascade.gate.quick_gate import Gate, run_gate
from cascade.gate.records import Attribution
from cascade.gate.remeasuring import PointsConfig, evaluate_points
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from pytest_regressions.file_regression import FileRegressionFixture

#: What peft 0.18 calls of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BLOCKS = random_blocks()


def gated(fault: FamilyFault, *, with_parts: bool = True) -> Gate:
    stack = family_stack(fault.family)
    baseline = baseline_of(stack, BLOCKS, with_parts=with_parts)
    with fault.plant(stack):
        gate = run_gate(stack, BLOCKS, baseline)
    assert run_gate(stack, BLOCKS, baseline, decoding=False).comparison.verdict == "PASS"
    return gate


@pytest.fixture(scope="module")
def gates() -> dict[str, Gate]:
    return {name: gated(fault) for name, fault in FAMILY_FAULTS.items()}


@ALL_FAMILY_FAULTS
def test_a_fault_of_a_family_is_seen_and_named(gates: dict[str, Gate], name: str) -> None:
    fault, comparison = FAMILY_FAULTS[name], gates[name].comparison
    if fault.cause is None:
        assert fault.reason
        assert comparison.verdict == "PASS"
        return
    assert comparison.verdict == "FAIL"
    found = comparison.attribution
    assert found is not None
    assert (found.cause, found.layer, known(found.named)) == (fault.cause, fault.layer, fault.named)
    assert not fault.reason


@pytest.mark.parametrize("name", [n for n, fault in FAMILY_FAULTS.items() if fault.cause])
def test_without_the_parts_of_the_baseline_a_fault_is_not_named_as_another(name: str) -> None:
    found = gated(FAMILY_FAULTS[name], with_parts=False).comparison.attribution
    assert found is not None
    assert known(found.named) == FAMILY_FAULTS[name].without_parts


# --- Adapters --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapter_of("llama", folder)
    return folder


@pytest.fixture(scope="module")
def merges(adapter: Path) -> dict[str, Attribution]:
    """Adapters merged wrongly, compared with a baseline of one merged once."""
    baseline = baseline_of(merged("llama", adapter), BLOCKS)
    assert run_gate(merged("llama", adapter), BLOCKS, baseline).comparison.verdict == "PASS"
    found = {}
    for name, merge in WRONG_MERGES.items():
        comparison = run_gate(merge("llama", adapter), BLOCKS, baseline).comparison
        assert comparison.verdict == "FAIL"
        assert comparison.attribution is not None
        found[name] = comparison.attribution
    return found


@pytest.mark.parametrize("name", WRONG_MERGES)
def test_an_adapter_merged_wrongly_names_the_weights_that_it_changed(
    merges: dict[str, Attribution], name: str
) -> None:
    found = merges[name]
    assert (found.cause, known(found.named)) == ("model", "weights changed")
    assert "self_attn.q_proj, self_attn.v_proj in every layer" in found.text
    assert "adapter merged twice" in found.text


def test_another_checkpoint_is_not_comparable_and_says_which_weights_differ(adapter: Path) -> None:
    baseline = baseline_of(merged("llama", adapter), BLOCKS)
    other = merged("llama", adapter, times=2)
    other.provenance = replace(other.provenance, weights_hash="other")
    comparison = run_gate(other, BLOCKS, baseline).comparison
    assert [one.name for one in comparison.mismatches] == ["model.weights_hash"]
    assert comparison.notes == (
        "the weights of self_attn.q_proj, self_attn.v_proj in every layer differ from the "
        "baseline's, no others do",
    )


# --- What budgets see ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "point", "figures"),
    [
        ("tied", OperatingPoint(3, "cosine", 0.8, "given"), {"agreement"}),
        ("soft-cap", OperatingPoint(3, "max_probability", 0.03, "given"), {"exit_share"}),
    ],
)
def test_budgets_see_what_no_row_depends_on(
    tmp_path: Path, name: str, point: OperatingPoint, figures: set[str]
) -> None:
    fault = FAMILY_FAULTS[name]
    stack, blocks = family_stack(fault.family), random_blocks(80)
    config = PointsConfig(propagation="exact", batch_size=8, seed=0, command="cascade evaluate")

    def exceeded() -> set[str]:
        measured = evaluate_points(stack, [point], blocks, config=config)
        return {one.figure for one in check_budgets(measured, groups)} - {"seconds_ratio"}

    accepted = evaluate_points(stack, [point], blocks, config=config)
    groups = read_budgets(accept_budgets(tmp_path, accepted).path).groups
    assert exceeded() == set()
    with fault.plant(stack):
        assert exceeded() & figures
    assert exceeded() == set()


# --- The text --------------------------------------------------------------------------------

_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_a_chat_template_that_changed_makes_the_text_another_one() -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, _answer(n)]} for n in range(40)
    ]
    tokenizer: Any = tiny_tokenizer()

    def blocks_with(template: str) -> Any:
        tokenizer.chat_template = template
        return load_blocks(chats, tokenizer, seq_len=16)

    stack = family_stack("llama")
    before = blocks_with(_TEMPLATE)
    baseline = baseline_of(stack, before)
    comparison = run_gate(stack, blocks_with(f"Be brief.\n{_TEMPLATE}"), baseline).comparison
    assert comparison.verdict == "NOT COMPARABLE"
    assert [one.name for one in comparison.mismatches] == ["corpus"]
    assert run_gate(stack, blocks_with(_TEMPLATE), baseline).comparison.verdict == "PASS"


def _answer(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"Answer {number}, and some more text."}


# --- Compiled layers -------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[DecoderStack]:
    torch._dynamo.reset()
    stack = family_stack("llama")
    yield stack
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of torch
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_layers_raise_no_alarm(compiled: DecoderStack, backend: str) -> None:
    baseline = baseline_of(compiled, BLOCKS)
    torch._dynamo.utils.counters.clear()
    for layer in compiled.layers:
        layer.compile(backend=backend)
    gate = run_gate(compiled, BLOCKS, baseline)
    assert gate.comparison.verdict == "PASS"
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # the layers were compiled


# --- The docs --------------------------------------------------------------------------------


def test_the_record_of_the_docs_is_what_was_measured(
    gates: dict[str, Gate],
    merges: dict[str, Attribution],
    file_regression: FileRegressionFixture,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fault", "verdict", "points to"])
    for name, gate in gates.items():
        fault, found = FAMILY_FAULTS[name], gate.comparison.attribution
        points = f"not seen: {fault.reason}" if found is None else _points(found)
        writer.writerow([fault.what, gate.comparison.verdict, points])
    for name, found in merges.items():
        writer.writerow([f"Llama: {name}", "FAIL", _points(found)])
    for what, verdict, points in _OTHERS:
        writer.writerow([what, verdict, points])
    file_regression.check(
        text.getvalue(), fullpath=ROOT / "docs/family_faults.csv", extension=".csv"
    )


#: Rows of tests above that have another form.
_OTHERS = [
    ("Llama: a chat template that changed", "NOT COMPARABLE", "corpus"),
    (
        "Llama: layers run by torch.compile",
        "PASS",
        "no fault: compiled layers differ by rounding only (1.1e-7 with inductor)",
    ),
]


def _points(found: Attribution) -> str:
    layer = "" if found.layer is None else f", layer {found.layer}"
    named = known(found.named)
    return f"{found.cause}{layer}" + ("" if named is None else f": {named}")
