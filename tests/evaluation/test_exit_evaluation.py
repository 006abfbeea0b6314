"""Evaluations: fitting, searching, confirming and judging on the right split."""

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
from cascade.core.schema import UNSET, from_plain, to_plain
from cascade.decoding.early_exit import EarlyExit, make_exit
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, search, split
from cascade.evaluation.exit_table import ExitTable
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow, WantedQuality
from cascade.evaluation.verdict import CONTROLS, judge
from cascade.models.stack import DecoderStack
from cascade.report.common.sections import html_page
from cascade.report.exits.evaluation import evaluation_report
from cascade.report.exits.pareto import pareto_svg
from cascade.stats.perplexity import MAX_NATS

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

#: Figures that every row must have.
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


def test_a_model_whose_perplexity_overflows_is_evaluated() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30_000)
    record = evaluate(DecoderStack(model), FIT, CONFIRM, EvaluationConfig(layers=(2,)))
    assert record.full.perplexity is None
    assert record.full.nats_per_token > MAX_NATS  # type: ignore[operator]
    assert "Infinity" not in to_json(to_plain(record))
    assert from_plain(to_plain(record), EvaluationRecord) == record
    # Reports and figures have nats in its place.
    page = html_page(evaluation_report(record))
    assert f"{record.full.nats_per_token:,.0f} nats per token" in page
    assert "nats per token above the full model" in pareto_svg(record)
    early = EarlyExit(DecoderStack(model))
    ids = torch.from_numpy(CONFIRM.ids[:2].astype(np.int64))
    assert early.score(ids).perplexity == math.inf
    assert early.score(ids).nats_per_token > MAX_NATS


# --- The split -------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [4, 5, 19, 20])
def test_split_alternates_sequences(sequences: int) -> None:
    blocks = blocks_of(sequences)
    fit, confirm = split(blocks)
    assert np.array_equal(fit.ids, blocks.ids[[n for n in range(sequences) if n % 2 == 0]])
    assert np.array_equal(confirm.ids, blocks.ids[[n for n in range(sequences) if n % 2 == 1]])
    prints = [set(half.sequence_fingerprints().tolist()) for half in (fit, confirm)]
    assert not prints[0] & prints[1]
    assert len(prints[0]) + len(prints[1]) == sequences
    assert fit.fingerprint() != confirm.fingerprint()
    assert (fit.name, confirm.name) == ("random-0-fit", "random-0-confirm")


def test_splitting_fewer_than_four_sequences_is_rejected() -> None:
    words = refusal(CorpusError, lambda: split(blocks_of(3)))
    assert "expected at least 4 sequences to split, got 3" in words
    assert "--max-tokens" in words


# --- The record ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_record_survives_round_trip(family: str, tmp_path: Path) -> None:
    record = evaluated(family)
    write_record(tmp_path / "evaluation.json", record)
    assert read_typed(tmp_path / "evaluation.json", EvaluationRecord) == record
    for row in record.points:
        assert to_plain(row).keys() >= PROMISED


def test_record_names_both_corpora() -> None:
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


def test_record_says_why_exited_tokens_save_no_work() -> None:
    assert evaluated("llama").settings.computes_every_token_because is None
    reason = evaluated("gpt2").settings.computes_every_token_because
    assert "gpt2" in reason
    for row in evaluated("gpt2").points:
        assert row.layers_per_token == LAYERS


def test_every_point_is_measured_once_on_sequences_to_confirm_on() -> None:
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


def test_thresholds_are_quantiles_on_sequences_to_fit_on() -> None:
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


def test_fitted_thresholds_do_not_depend_on_sequences_to_confirm_on() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    other = evaluate(stack, FIT, blocks_of(9, seed=2), REQUEST, heads=heads, batch_size=4)
    assert [key(row) for row in other.points] == [key(row) for row in evaluated().points]
    assert [row.agreement for row in other.points] != [row.agreement for row in evaluated().points]


def test_given_points_are_measured_at_given_thresholds() -> None:
    rows = {key(row): row for row in evaluated().points}
    assert rows[3, "cosine", 0.875].threshold_from == "given"
    assert rows[2, "entropy", 0.125].threshold_from == "given"


def test_only_given_points_skips_fit_search_and_controls() -> None:
    config = dataclasses.replace(REQUEST, layers=(), rules=(), only_given=True)
    done: list[int] = []
    record = evaluate(
        a_settled_stack("gemma2"),
        FIT,
        CONFIRM,
        config,
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


def test_every_point_has_random_control_of_its_exit_share() -> None:
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
    assert apart > 0.1  # the random points of the hard ratios would not match


def test_point_with_few_exits_is_compared_with_control_that_exits_tokens() -> None:
    stack = a_settled_stack("gemma2")
    ratios = (1.0, 0.98, 0.97, 0.96)
    config = EvaluationConfig(layers=(2,), rules=("top2_gap",), hard_ratios=ratios)
    fit, confirm = split(blocks_of(60, seed=6))
    record = evaluate(stack, fit, confirm, config, batch_size=30)
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
    config = EvaluationConfig(layers=(2,), rules=("cosine",), hard_ratios=(0.5,))
    evaluate(a_stack("llama"), FIT, CONFIRM, config, batch_size=4, progress=done.append)
    assert sum(done) == FIT.tokens + CONFIRM.tokens


def test_verdict_matches_judged_rows() -> None:
    record = evaluated()
    wanted = WantedQuality(agreement=0.9, perplexity_ratio=1.05)
    assert record.verdict == judge(record.points, wanted)
    assert record.verdict.wanted == wanted


def test_verdict_rejects_logit_lens_of_unsettled_model() -> None:
    config = EvaluationConfig(layers=(2, 3), rules=("cosine",), hard_ratios=(0.3,))
    record = evaluate(a_stack("llama"), FIT, CONFIRM, config, batch_size=3)
    assert not record.verdict.use
    assert record.verdict.headline.startswith("Do not use early exit here: ")
    assert {row.head for row in record.points} == {"logit_lens"}


def test_hard_ratio_of_one_exits_no_token_with_saturated_confidences() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.lm_head.weight.data.mul_(100)  # probabilities of exactly 1
    config = EvaluationConfig(layers=(2,), rules=("max_probability",), hard_ratios=(1.0,))
    record = evaluate(stack, FIT, CONFIRM, config)
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


def reference_lowest(table: ExitTable, agreement: float) -> float | None:
    """Return the lowest threshold that keeps the agreement, by trying all."""
    values, agrees = table.confidence[2, "cosine"], table.agrees[2]
    fine = [
        float(value)
        for value in np.unique(values)
        if (agrees | (values < value)).sum() / values.size >= agreement
    ]
    return min(fine, default=None)


@given(tables(), st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.95, 1.0]), st.floats(0, 1)))
@settings(max_examples=300)
def test_search_finds_lowest_threshold_that_keeps_agreement(
    table: ExitTable, agreement: float
) -> None:
    found = search(table, [2], ["cosine"], agreement)
    expected = reference_lowest(table, agreement)
    assert [point.threshold for point in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("wrong", range(1, 10))
def test_search_accepts_exact_agreement(wrong: int) -> None:
    # In float64, 1 - 0.9 is 0.09999999999999998, which is less than one token of ten.
    values = np.linspace(0.1, 1.0, 10, dtype=np.float32)[None]
    table = ExitTable({(2, "cosine"): values}, {2: values > wrong / 10 + 0.05})
    (point,) = search(table, [2], ["cosine"], (10 - wrong) / 10)
    assert point.threshold == values.min()


def test_search_exits_tied_tokens_together() -> None:
    values = np.array([[0.9, 0.5, 0.5, 0.1]], dtype=np.float32)
    table = ExitTable({(2, "cosine"): values}, {2: np.array([[True, True, False, True]])})
    (point,) = search(table, [2], ["cosine"], 1.0)
    assert point == OperatingPoint(2, "cosine", float(np.float32(0.9)), "agreement 1")


def test_search_skips_controls_and_missing_rules() -> None:
    table = ExitTable(
        {(2, "random"): np.ones((1, 4)), (2, "cosine"): np.ones((1, 4))},
        {2: np.ones((1, 4), dtype=bool)},
    )
    found = search(table, [1, 2], ["random", "cosine", "entropy"], 0.9)
    assert [(point.layer, point.rule) for point in found] == [(2, "cosine")]


@pytest.mark.parametrize("family", FAMILIES)
def test_searched_points_are_confirmed_on_other_split(family: str) -> None:
    record = evaluated(family)
    rows, found = record.points, record.search
    rules = {layer: ["cosine", "top2_gap", "patience", "entropy"] for layer in (2, 3)}
    evaluator = Evaluator(a_settled_stack(family), rules, heads=settled_heads(family))
    table = evaluator.table(FIT, batch_size=4)
    expected = {
        (layer, rule): reference_lowest(
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


def test_some_searched_points_are_not_confirmed() -> None:
    found = [evaluated(family).search for family in FAMILIES]
    assert any(len(one.confirmed) < len(one.points) for one in found)
    assert any(one.confirmed for one in found)


# --- AUROC -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_auroc_is_measured_on_sequences_to_confirm_on(family: str) -> None:
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


# --- Invalid input ---------------------------------------------------------------------------

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
        "expected a rule to judge, got only controls (oracle, random), which are always measured",
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
    "only given, none": ({"only_given": True}, "expected at least one operating point"),
    "only given, too wide": (
        {"layers": (), "rules": (), "only_given": True}
        | {"thresholds": (OperatingPoint(1, "mean_cosine", 0.5, ""),)},
        "in 2..4, got 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_config_is_rejected_before_any_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "batches", lambda *_: pytest.fail("a forward pass was started"))
    changes, words = WRONG[name]
    config = dataclasses.replace(EvaluationConfig(layers=(2,), rules=("cosine",)), **changes)
    assert words in refusal(UsageError, lambda: evaluate(a_stack("llama"), FIT, CONFIRM, config))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_rejected_before_any_pass(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "batches", lambda *_: pytest.fail("a forward pass was started"))
    config = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(UsageError, lambda: evaluate(a_stack("llama"), FIT, CONFIRM, config, seed=seed))
    assert words == f"expected a seed in 0..{2**63 - 1}, got {seed}"


def test_controls_are_accepted_with_another_rule_or_given_point() -> None:
    with_rule = EvaluationConfig(layers=(2,), rules=("cosine", "random"))
    given = EvaluationConfig(
        layers=(2,), rules=("fixed",), thresholds=(OperatingPoint(2, "cosine", 0.5, "given"),)
    )
    for config in (with_rule, given):
        config.check()


def test_rule_of_given_point_is_not_measured_at_other_layers() -> None:
    config = EvaluationConfig(
        layers=(1,), rules=("cosine",), thresholds=(OperatingPoint(2, "mean_cosine", 0.5, "given"),)
    )
    record = evaluate(a_stack("llama"), FIT, CONFIRM, config)
    layers = {row.exit_layer for row in record.points if row.rule == "mean_cosine"}
    assert layers == {2}


def test_invalid_propagation_or_heads_are_rejected() -> None:
    config = EvaluationConfig(layers=(2,), rules=("cosine",))
    stack: DecoderStack = a_stack("llama")

    def run(**options: Any) -> Callable[[], Any]:
        return lambda: evaluate(stack, FIT, CONFIRM, config, **options)

    assert "needs fitted heads" in refusal(UsageError, run(propagation="ridge"))
    assert "got 'melted'" in refusal(UsageError, run(propagation="melted"))
    words = refusal(ModelError, run(heads=some_heads("qwen2")))
    assert "family qwen2" in words
    assert "family llama" in words


@pytest.mark.parametrize("place", [0, 1])
def test_too_few_sequences_to_fit_or_confirm_on_are_rejected(place: int) -> None:
    halves = [blocks_of(4), blocks_of(4)]
    halves[place] = blocks_of(1)
    config = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(CorpusError, lambda: evaluate(a_stack("llama"), *halves, config))
    assert "expected at least 2 sequences to fit on and 2 to confirm on, got 1" in words


def test_sequences_beyond_positions_are_rejected() -> None:
    config = EvaluationConfig(layers=(2,), rules=("cosine",))
    words = refusal(
        CorpusError, lambda: evaluate(a_stack("llama"), *split(blocks_of(4, 65)), config)
    )
    assert "exceed the model's 64 positions" in words


def test_only_given_points_are_not_judged() -> None:
    stack = a_stack("llama")
    blocks = blocks_of(8)
    config = EvaluationConfig(
        layers=(), rules=(), thresholds=(OperatingPoint(2, "cosine", 0.5, "given"),)
    )
    alone = dataclasses.replace(config, only_given=True)
    record = evaluate(stack, *split(blocks), alone)
    assert [row.threshold_from for row in record.points] == ["given"]
    assert not record.verdict.use
    assert record.verdict.headline.startswith("Not judged")
