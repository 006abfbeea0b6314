"""Evaluations as a whole: what is fitted where, searched, confirmed and judged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sklearn.metrics import roc_auc_score
from support.reference_early_exit import (
    LAYERS,
    a_settled_stack,
    a_stack,
    confidence,
    one_line,
    own_logits,
    some_heads,
)
from support.reference_points import FAMILIES, blocks_of, settled_heads
from support.tiny_models import tiny_model

from cascade.core.errors import CascadeError, CorpusError, ModelError, UsageError
from cascade.core.records import read_typed, to_json, write_record
from cascade.core.schema import UNSET, to_plain
from cascade.decoding.early_exit import make_exit
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, search, split
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow, WantedQuality
from cascade.evaluation.verdict import CONTROLS, judge
from cascade.models.stack import DecoderStack

FIT, CONFIRM = split(blocks_of(19, seed=1))
REQUEST = EvaluationConfig(
    layers=(2, 3),
    rules=("cosine", "top2_gap", "patience"),
    hard_ratios=(0.25, 0.5),
    thresholds=(
        OperatingPoint(3, "cosine", 0.875, "given"),
        OperatingPoint(2, "entropy", 0.125, "given"),
    ),
    agreement=0.9,
)

#: What the issue wants in every row.
PROMISED = {
    "exit_layer",
    "rule",
    "head",
    "threshold",
    "exit_share",
    "agreement",
    "perplexity",
    "perplexity_ratio",
    "kl",
    "layers_per_token",
    "flops_ratio",
    "seconds_ratio",
}


@functools.cache
def evaluated(family: str = "gemma2") -> EvaluationRecord:
    return evaluate(
        a_settled_stack(family), FIT, CONFIRM, REQUEST, heads=settled_heads(family), batch_size=4
    )


def key(row: OperatingPointRow) -> tuple[int, str, float]:
    return row.exit_layer, row.rule, row.threshold


def refusal(kind: type[CascadeError], work: Callable[[], Any]) -> str:
    with pytest.raises(kind) as error:
        work()
    return one_line(error)


# --- The split -------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [4, 5, 19, 20])
def test_the_split_deals_sequences_out_in_turn(sequences: int) -> None:
    blocks = blocks_of(sequences)
    fit, confirm = split(blocks)
    assert np.array_equal(fit.ids, blocks.ids[[n for n in range(sequences) if n % 2 == 0]])
    assert np.array_equal(confirm.ids, blocks.ids[[n for n in range(sequences) if n % 2 == 1]])
    prints = [set(part.sequence_fingerprints().tolist()) for part in (fit, confirm)]
    assert not prints[0] & prints[1]
    assert len(prints[0]) + len(prints[1]) == sequences
    assert fit.fingerprint() != confirm.fingerprint()
    assert (fit.name, confirm.name) == ("random-0-fit", "random-0-confirm")


def test_too_few_sequences_cannot_be_split() -> None:
    words = refusal(CorpusError, lambda: split(blocks_of(3)))
    assert "3 sequences cannot be split, expected at least 4" in words
    assert "--max-tokens" in words


# --- The record ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_can_be_written_and_read_back(family: str, tmp_path: Path) -> None:
    record = evaluated(family)
    write_record(tmp_path / "evaluation.json", record)
    assert read_typed(tmp_path / "evaluation.json", EvaluationRecord) == record
    for row in record.points:
        assert to_plain(row).keys() >= PROMISED


def test_a_record_says_on_what_it_was_fitted_and_measured() -> None:
    record = evaluated()
    provenance, stack = record.provenance, a_settled_stack("gemma2")
    assert provenance.corpus == CONFIRM.provenance()
    assert provenance.fitted_on == FIT.provenance()
    assert provenance.model.family == "gemma2"
    assert provenance.heads.corpus.name == "random"
    assert provenance.heads_fingerprint == settled_heads("gemma2").fingerprint()
    full = record.full
    ids = torch.from_numpy(CONFIRM.ids).long()
    logs = own_logits(stack, ids).double().log_softmax(dim=-1)[:, :-1]
    nll = -logs.gather(-1, ids[:, 1:, None]).mean()
    assert full.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
    assert (full.tokens, full.scored_tokens, full.sequences) == (9 * 12, 9 * 11, 9)
    assert full.layers == LAYERS
    for row in record.points:
        ratio = row.perplexity / full.perplexity
        assert row.perplexity_ratio == pytest.approx(ratio, rel=1e-6)


def test_a_record_says_where_tokens_that_left_save_no_work() -> None:
    assert evaluated("llama").settings.computes_every_token_because is None
    reason = evaluated("gpt2").settings.computes_every_token_because
    assert "gpt2" in reason
    for row in evaluated("gpt2").points:
        assert row.layers_per_token == LAYERS


def test_every_point_is_measured_once_and_on_the_sequences_kept_for_it() -> None:
    record = evaluated()
    rows = record.points
    assert [key(row) for row in rows] == sorted({key(row) for row in rows})
    layers = {2: ["cosine", "top2_gap", "patience", "entropy", *CONTROLS], 3: ["cosine"]}
    layers[3] = layers[2]
    evaluator = Evaluator(a_settled_stack("gemma2"), layers, heads=settled_heads("gemma2"))
    points = [OperatingPoint(*key(row), row.threshold_from) for row in rows]
    again, _ = evaluator.run(CONFIRM, points, batch_size=4)
    for row, other in zip(rows, again, strict=True):
        alike = {"seconds_ratio": 1.0, "seconds_ratio_interval": None}
        assert replace(row, **alike) == replace(other, **alike)


def test_thresholds_come_from_the_other_sequences_quantiles() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    ids = torch.from_numpy(FIT.ids).long()
    found = {
        (row.exit_layer, row.rule, row.threshold_from): row.threshold for row in evaluated().points
    }
    for layer in (2, 3):
        for rule in ("cosine", "top2_gap", "entropy"):
            values = confidence(stack, ids, make_exit(stack, layer, rule, 0.0, heads=heads))
            for ratio in (0.25, 0.5):
                expected = np.quantile(values.numpy(), ratio)
                got = found[layer, rule, f"hard ratio {ratio:g}"]
                assert got == pytest.approx(expected, abs=1e-6), (layer, rule)
        assert found[layer, "random", "hard ratio 0.25"] == 0.25
        assert found[layer, "fixed", "control"] == found[layer, "oracle", "control"] == 0.5


def test_other_sequences_to_confirm_on_leave_every_fitted_threshold_as_it_is() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    other = evaluate(stack, FIT, blocks_of(9, seed=2), REQUEST, heads=heads, batch_size=4)
    assert [key(row) for row in other.points] == [key(row) for row in evaluated().points]
    assert [row.agreement for row in other.points] != [row.agreement for row in evaluated().points]


def test_given_points_are_measured_as_they_are() -> None:
    rows = {key(row): row for row in evaluated().points}
    assert rows[3, "cosine", 0.875].threshold_from == "given"
    assert rows[2, "entropy", 0.125].threshold_from == "given"


def test_given_points_alone_fit_search_and_compare_nothing() -> None:
    request = dataclasses.replace(REQUEST, layers=(), rules=(), only_given=True)
    done: list[int] = []
    record = evaluate(
        a_settled_stack("gemma2"),
        FIT,
        CONFIRM,
        request,
        heads=settled_heads("gemma2"),
        batch_size=4,
        progress=done.append,
    )
    assert [key(row) for row in record.points] == [(2, "entropy", 0.125), (3, "cosine", 0.875)]
    assert sum(done) == CONFIRM.tokens
    assert record.search.points == []
    assert record.provenance.fitted_on is UNSET
    same = {key(row): row for row in evaluated().points}
    for row in record.points:
        for name in ("exit_share", "agreement", "perplexity_ratio", "layers_per_token"):
            assert getattr(row, name) == pytest.approx(getattr(same[key(row)], name), abs=1e-9)
    to_json(to_plain(record))


def test_every_point_has_a_random_control_of_its_share() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    record = evaluated()
    layers = {
        layer: sorted({row.rule for row in record.points if row.exit_layer == layer})
        for layer in (2, 3)
    }
    fitted = Evaluator(stack, layers, heads=heads).table(FIT, batch_size=4)
    apart = 0.0
    for row in record.points:
        if row.rule in CONTROLS:
            continue
        values = fitted.confidence[row.exit_layer, row.rule]
        share = max((values >= row.threshold).mean(), 1 / values.size)
        shares = [
            1 - other.threshold
            for other in record.points
            if (other.rule, other.exit_layer) == ("random", row.exit_layer)
        ]
        nearest = min(abs(share - other) for other in shares)
        assert nearest <= 0.05 * share
        apart = max(apart, min(abs(share - other) for other in (0.75, 0.5)))
    assert apart > 0.1  # the hard ratios' own would not have done


def test_a_point_that_lets_few_go_is_not_compared_with_a_control_that_lets_none() -> None:
    stack = a_settled_stack("gemma2")
    ratios = (1.0, 0.98, 0.97, 0.96)
    request = EvaluationConfig(layers=(2,), rules=("top2_gap",), hard_ratios=ratios)
    fit, confirm = split(blocks_of(60, seed=6))
    record = evaluate(stack, fit, confirm, request, batch_size=30)
    fitted = Evaluator(stack, {2: ["top2_gap"]}).table(fit, batch_size=30)
    shares = [1 - row.threshold for row in record.points if row.rule == "random"]
    seen = 0
    for row in record.points:
        if row.rule == "top2_gap":
            values = fitted.confidence[2, "top2_gap"]
            share = max(float((values >= row.threshold).mean()), 1 / values.size)
            assert min(abs(share - other) for other in shares) <= 0.05 * share
            seen += 0 < share < 0.05
    assert seen >= 2


def test_progress_counts_both_corpora() -> None:
    done: list[int] = []
    request = EvaluationConfig(layers=(2,), rules=("cosine",), hard_ratios=(0.5,))
    evaluate(a_stack("llama"), FIT, CONFIRM, request, batch_size=4, progress=done.append)
    assert sum(done) == FIT.tokens + CONFIRM.tokens


def test_the_verdict_is_that_of_the_rows() -> None:
    record = evaluated()
    wanted = WantedQuality(agreement=0.9, perplexity_ratio=1.05)
    assert record.verdict == judge(record.points, wanted)
    assert record.verdict.wanted == wanted


def test_the_logit_lens_of_an_unsettled_model_is_not_to_be_used() -> None:
    request = EvaluationConfig(layers=(2, 3), rules=("cosine",), hard_ratios=(0.3,))
    record = evaluate(a_stack("llama"), FIT, CONFIRM, request, batch_size=3)
    assert not record.verdict.use
    assert record.verdict.headline.startswith("Do not use early exit here: ")
    assert {row.head for row in record.points} == {"logit_lens"}


def test_a_hard_ratio_of_1_lets_nothing_go_even_where_confidences_are_saturated() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.lm_head.weight.data.mul_(100)  # probabilities of exactly 1
    request = EvaluationConfig(layers=(2,), rules=("max_probability",), hard_ratios=(1.0,))
    record = evaluate(stack, FIT, CONFIRM, request)
    rows = [row for row in record.points if row.threshold_from == "hard ratio 1"]
    row = next(row for row in rows if row.rule == "max_probability")
    assert row.threshold == np.nextafter(np.float32(1), np.float32(2))
    assert row.exit_share == 0
    to_json(to_plain(record))


# --- The search ------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> ExitTable:
    """Return a table of one layer and one rule, with few distinct confidences."""
    count = draw(st.integers(1, 12))
    values = draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=count, max_size=count)
    )
    agrees = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    shape = (1, count)
    return ExitTable(
        confidence={(2, "cosine"): np.array(values, dtype=np.float32).reshape(shape)},
        agrees={2: np.array(agrees).reshape(shape)},
    )


def lowest_by_hand(table: ExitTable, agreement: float) -> float | None:
    """Try every threshold."""
    values, agrees = table.confidence[2, "cosine"], table.agrees[2]
    fine = [
        float(value)
        for value in np.unique(values)
        if (agrees | (values < value)).sum() / values.size >= agreement
    ]
    return min(fine, default=None)


@given(tables(), st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.95, 1.0]), st.floats(0, 1)))
@settings(max_examples=300)
def test_the_search_finds_the_lowest_threshold_that_keeps_the_agreement(
    table: ExitTable, agreement: float
) -> None:
    found = search(table, [2], ["cosine"], agreement)
    expected = lowest_by_hand(table, agreement)
    assert [point.threshold for point in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("wrong", range(1, 10))
def test_an_agreement_that_is_met_exactly_is_kept(wrong: int) -> None:
    # 1 - 0.9 is 0.09999999999999998 in double precision: less than one token of ten.
    values = np.linspace(0.1, 1.0, 10, dtype=np.float32)[None]
    table = ExitTable({(2, "cosine"): values}, {2: values > wrong / 10 + 0.05})
    (point,) = search(table, [2], ["cosine"], (10 - wrong) / 10)
    assert point.threshold == values.min()


def test_the_search_takes_tied_tokens_together() -> None:
    values = np.array([[0.9, 0.5, 0.5, 0.1]], dtype=np.float32)
    table = ExitTable({(2, "cosine"): values}, {2: np.array([[True, True, False, True]])})
    (point,) = search(table, [2], ["cosine"], 1.0)
    assert point == OperatingPoint(2, "cosine", float(np.float32(0.9)), "agreement 1")


def test_the_search_passes_controls_and_absent_rules_by() -> None:
    table = ExitTable(
        {(2, "random"): np.ones((1, 4)), (2, "cosine"): np.ones((1, 4))},
        {2: np.ones((1, 4), dtype=bool)},
    )
    found = search(table, [1, 2], ["random", "cosine", "entropy"], 0.9)
    assert [(point.layer, point.rule) for point in found] == [(2, "cosine")]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_on_one_split_is_confirmed_on_the_other(family: str) -> None:
    record = evaluated(family)
    rows, found = record.points, record.search
    rules = {layer: ["cosine", "top2_gap", "patience", "entropy"] for layer in (2, 3)}
    evaluator = Evaluator(a_settled_stack(family), rules, heads=settled_heads(family))
    table = evaluator.table(FIT, batch_size=4)
    expected = {
        (layer, rule): lowest_by_hand(
            ExitTable({(2, "cosine"): table.confidence[layer, rule]}, {2: table.agrees[layer]}),
            0.9,
        )
        for layer in rules
        for rule in rules[layer]
    }
    got = {(rows[n].exit_layer, rows[n].rule): rows[n].threshold for n in found.points}
    assert got == {place: value for place, value in expected.items() if value is not None}
    kept = [n for n in found.points if rows[n].agreement >= 0.9]
    assert found.confirmed == kept
    if kept:
        assert rows[found.best].flops_ratio == min(rows[n].flops_ratio for n in kept)
    assert found.saves == (bool(kept) and rows[found.best].flops_ratio < 1)


def test_not_all_that_is_found_is_confirmed() -> None:
    found = [evaluated(family).search for family in FAMILIES]
    assert any(len(one.confirmed) < len(one.points) for one in found)
    assert any(one.confirmed for one in found)


# --- AUROC -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_records_auroc_is_measured_on_the_sequences_kept_for_it(family: str) -> None:
    record = evaluated(family)
    rules = {layer: ["cosine", "top2_gap", "patience", "entropy", "random"] for layer in (2, 3)}
    evaluator = Evaluator(a_settled_stack(family), rules, heads=settled_heads(family))
    table = evaluator.table(CONFIRM, batch_size=4)
    places = [(row.exit_layer, row.rule) for row in record.auroc]
    assert places == [(layer, rule) for layer in rules for rule in rules[layer]]
    for row in record.auroc:
        values = table.confidence[row.exit_layer, row.rule].ravel()
        agrees = table.agrees[row.exit_layer].ravel()
        assert row.head_agreement == pytest.approx(agrees.mean())
        expected = None if agrees.all() else pytest.approx(roc_auc_score(agrees, values))
        assert row.auroc == expected


# --- Bad input -------------------------------------------------------------------------------

WRONG = {
    "hard ratio above 1": ({"hard_ratios": (0.3, 1.5)}, "expected a hard ratio in 0..1, got 1.5"),
    "hard ratio NaN": ({"hard_ratios": (math.nan,)}, "got nan"),
    "agreement": ({"agreement": -0.1}, "agreement in 0..1, got -0.1"),
    "perplexity": ({"perplexity_ratio": 0.9}, "at least 1, got 0.9"),
    "perplexity infinite": (
        {"perplexity_ratio": math.inf},
        "expected a finite perplexity ratio of at least 1, got inf",
    ),
    "controls alone": (
        {"rules": ("oracle", "random")},
        "the rules oracle, random are controls, measured beside every rule; name a rule to judge",
    ),
    "no rule": ({"rules": ()}, "expected a rule to judge, got none"),
    "a rule too wide for the layer": (
        {"layers": (1,), "rules": ("mean_cosine",)},
        "in 2..4, got 1",
    ),
    "a rule too wide for one of the layers": (
        {"layers": (1, 3), "rules": ("cosine", "mean_cosine")},
        "the rule mean_cosine compares 2 layers; expected an exit layer in 2..4, got 1",
    ),
    "perplexity NaN": ({"perplexity_ratio": math.nan}, "at least 1, got nan"),
    "no layers": ({"layers": ()}, "expected at least one exit layer"),
    "layer 0": ({"layers": (0, 2)}, "expected an exit layer in 1..4, got 0"),
    "layer 5": ({"layers": (5,)}, "expected an exit layer in 1..4, got 5"),
    "rule": ({"rules": ("cosin",)}, "expected a rule among cosine"),
    "given rule": ({"thresholds": (OperatingPoint(2, "cosin", 0.5, ""),)}, "got 'cosin'"),
    "given layer": ({"thresholds": (OperatingPoint(7, "cosine", 0.5, ""),)}, "in 1..4, got 7"),
    "given threshold": ({"thresholds": (OperatingPoint(2, "cosine", 2.0, ""),)}, "from -1 to 1"),
    "given NaN": ({"thresholds": (OperatingPoint(2, "cosine", math.nan, ""),)}, "got nan"),
    "given beyond the range": (
        {"thresholds": (OperatingPoint(2, "cosine", 5.0, ""),)},
        "expected a threshold in this range, got 5",
    ),
    "given infinity": (
        {"thresholds": (OperatingPoint(2, "cosine", math.inf, ""),)},
        "a finite threshold",
    ),
    "too wide": ({"thresholds": (OperatingPoint(1, "mean_cosine", 0.5, ""),)}, "in 2..4, got 1"),
    "only given, none": ({"only_given": True}, "expected at least one point"),
    "only given, too wide": (
        {"layers": (), "rules": (), "only_given": True}
        | {"thresholds": (OperatingPoint(1, "mean_cosine", 0.5, ""),)},
        "in 2..4, got 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_evaluated_is_refused_before_any_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "_batches", lambda *_: pytest.fail("a pass was begun"))
    changes, words = WRONG[name]
    request = dataclasses.replace(EvaluationConfig(layers=(2,), rules=("cosine",)), **changes)
    assert words in refusal(UsageError, lambda: evaluate(a_stack("llama"), FIT, CONFIRM, request))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_not_every_generator_takes_is_refused_before_any_pass(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "_batches", lambda *_: pytest.fail("a pass was begun"))
    request = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(
        UsageError, lambda: evaluate(a_stack("llama"), FIT, CONFIRM, request, seed=seed)
    )
    assert words == f"expected a seed in 0..{2**63 - 1}, got {seed}"


def test_controls_beside_a_rule_or_a_given_point_are_welcome() -> None:
    beside = EvaluationConfig(layers=(2,), rules=("cosine", "random"))
    given = EvaluationConfig(
        layers=(2,), rules=("fixed",), thresholds=(OperatingPoint(2, "cosine", 0.5, "given"),)
    )
    for request in (beside, given):
        request.check()


def test_a_rule_of_a_given_point_is_not_asked_for_at_other_layers() -> None:
    request = EvaluationConfig(
        layers=(1,), rules=("cosine",), thresholds=(OperatingPoint(2, "mean_cosine", 0.5, "given"),)
    )
    record = evaluate(a_stack("llama"), FIT, CONFIRM, request)
    layers = {row.exit_layer for row in record.points if row.rule == "mean_cosine"}
    assert layers == {2}


def test_a_propagation_or_heads_that_cannot_serve_are_refused() -> None:
    request = EvaluationConfig(layers=(2,), rules=("cosine",))
    stack: DecoderStack = a_stack("llama")

    def run(**options: Any) -> Callable[[], Any]:
        return lambda: evaluate(stack, FIT, CONFIRM, request, **options)

    assert "needs fitted heads" in refusal(UsageError, run(propagation="ridge"))
    assert "got 'melted'" in refusal(UsageError, run(propagation="melted"))
    words = refusal(ModelError, run(heads=some_heads("qwen2")))
    assert "family qwen2" in words
    assert "family llama" in words


@pytest.mark.parametrize("place", [0, 1])
def test_too_few_sequences_to_fit_or_confirm_on_are_refused(place: int) -> None:
    parts = [blocks_of(4), blocks_of(4)]
    parts[place] = blocks_of(1)
    request = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(CorpusError, lambda: evaluate(a_stack("llama"), *parts, request))
    assert "expected at least 2 sequences to fit on and 2 to confirm on, got 1" in words


def test_sequences_beyond_the_positions_are_refused() -> None:
    request = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(
        CorpusError, lambda: evaluate(a_stack("llama"), *split(blocks_of(4, 65)), request)
    )
    assert "exceed the model's 64 positions" in words


def test_given_points_alone_are_not_judged() -> None:
    stack = a_stack("llama")
    blocks = blocks_of(8)
    request = EvaluationConfig(
        layers=(), rules=(), thresholds=(OperatingPoint(2, "cosine", 0.5, "given"),)
    )
    alone = dataclasses.replace(request, only_given=True)
    record = evaluate(stack, *split(blocks), alone)
    assert [row.threshold_from for row in record.points] == ["given"]
    assert not record.verdict.use
    assert record.verdict.headline.startswith("Not judged")
