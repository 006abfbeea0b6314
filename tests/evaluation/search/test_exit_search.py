"""The search for an exit layer on tiny models, fitted on one split and confirmed on another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.reference_early_exit import a_settled_stack, a_stack
from support.reference_points import blocks_of, settled_heads

from cascade.core.errors import CascadeError, CorpusError, RecordError, UsageError
from cascade.core.records import to_json
from cascade.core.schema import UNSET, UnsetType, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import PROPAGATIONS, Propagation
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.evaluation.search.choice import SearchConfig
from cascade.evaluation.search.exit_search import measure_missing, search_exits, tokens_to_read
from cascade.evaluation.search.records import SearchRecord, TriedPoint
from cascade.evaluation.search.stored_evaluations import Answer, StoredEvaluation, answer

FIT, CONFIRM = split(blocks_of(24, seed=1))
LAYERS, RULES = (1, 2), ("cosine", "top2_gap")

#: With this configuration, no token of an unsettled model exits.
NOTHING_EXITS = SearchConfig(1.0, layers=(1,), rules=("cosine",))


@functools.cache
def searched(propagation: Propagation = "ridge", agreement: float = 0.9) -> SearchRecord:
    config = SearchConfig(
        agreement, confidence=0.9, layers=LAYERS, rules=RULES, propagation=propagation
    )
    stack = a_settled_stack("llama")
    return search_exits(stack, FIT, CONFIRM, config, heads=settled_heads("llama"))


def run_again(tried: Sequence[TriedPoint], blocks: TokenBlocks) -> list[OperatingPointRow]:
    """Run a search's points on a corpus."""
    evaluator = Evaluator(
        a_settled_stack("llama"),
        dict.fromkeys(LAYERS, RULES),
        heads=settled_heads("llama"),
        propagation=tried[0].propagation,
    )
    points = [OperatingPoint(row.exit_layer, row.rule, row.threshold, "again") for row in tried]
    return evaluator.run(blocks, points)[0]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_fit_and_confirm_figures_are_measured_on_their_split(propagation: Propagation) -> None:
    record = searched(propagation)
    assert to_json(to_plain(record))
    wanted = record.settings.agreement, record.settings.risk, record.settings.confidence
    assert wanted == (0.9, 0.1, 0.9)
    fit, confirm = run_again(record.points, FIT), run_again(record.points, CONFIRM)
    for row, fitted, confirmed in zip(record.points, fit, confirm, strict=True):
        for name in ("exit_share", "agreement", "agreement_interval", "flops_ratio"):
            assert getattr(row, name) == getattr(confirmed, name)
        assert row.fit_exit_share == pytest.approx(fitted.exit_share)
        if row.fit_by == "running" or propagation == "exact":
            assert row.fit_agreement == pytest.approx(fitted.agreement)
        assert row.fit_agreement is not None
        assert row.candidate is (row.fit_agreement >= 0.9)
    assert not isinstance(record.provenance.fitted_on, UnsetType)
    assert record.provenance.fitted_on.fingerprint == FIT.fingerprint()
    assert record.provenance.corpus.fingerprint == CONFIRM.fingerprint()


@pytest.mark.parametrize("agreement", [0.7, 0.9, 0.95])
def test_corrected_threshold_predicts_measured_agreement(agreement: float) -> None:
    record = searched("frozen", agreement)
    found = [
        (row, other.agreement)
        for row, other in zip(record.points, run_again(record.points, FIT), strict=True)
    ]
    corrected = [pair for pair in found if pair[0].fit_by == "table, corrected by running"]
    assert corrected
    for row, run in corrected:
        assert row.fit_agreement >= agreement
        # At most two of 288 tokens. The lowest threshold of the table differs by up to ten.
        assert run == pytest.approx(row.fit_agreement, abs=2 / FIT.tokens)
        boldest = [
            other
            for other, _ in found
            if (other.exit_layer, other.rule) == (row.exit_layer, row.rule)
        ]
        assert min(other.fit_agreement for other in boldest) < agreement


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_every_layer_and_rule_has_threshold_or_reason(propagation: Propagation) -> None:
    record = searched(propagation)
    pairs = [(row.exit_layer, row.rule) for row in record.pairs]
    assert pairs == [(layer, rule) for layer in LAYERS for rule in RULES]
    for row in record.pairs:
        reasons = [
            one.why
            for one in record.nothing
            if (one.exit_layer, one.rule) == (row.exit_layer, row.rule)
        ]
        assert (row.fitted is None) is (len(reasons) == 1)


def test_search_without_thresholds_has_no_points() -> None:
    # All layers of an unsettled model matter, so no threshold keeps the agreement.
    record = search_exits(a_stack("llama"), FIT, CONFIRM, NOTHING_EXITS)
    assert record.points == []
    assert [row.why[:12] for row in record.nothing] == ["no threshold"]
    assert record.verdict.headline.startswith("No early exit keeps 100.0 % agreement")
    assert record.best is None


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_progress_adds_up_to_tokens_to_read(propagation: Propagation) -> None:
    done: list[int] = []
    search_exits(
        a_settled_stack("llama"),
        FIT,
        CONFIRM,
        SearchConfig(0.9, layers=(3,), propagation=propagation),
        heads=settled_heads("llama"),
        progress=done.append,
    )
    assert sum(done) == tokens_to_read(FIT, CONFIRM, propagation)
    done.clear()
    search_exits(a_stack("llama"), FIT, CONFIRM, NOTHING_EXITS, progress=done.append)
    assert sum(done) == tokens_to_read(FIT, CONFIRM, "frozen")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"rules": ("random",)}, UsageError, "the rule random is a control"),
        ({"rules": ()}, UsageError, "expected at least one exit layer and one rule"),
        ({"layers": (9,)}, UsageError, "expected an exit layer in 1..4, got 9"),
        ({"rules": ("guess",)}, UsageError, "guess"),
        ({"propagation": "ridge"}, UsageError, "ridge propagation needs fitted heads"),
        ({"agreement": 2.0}, UsageError, "expected a share of agreement in 0..1, got 2"),
        ({"seed": -1}, UsageError, "seed"),
        ({"fit": blocks_of(1)}, CorpusError, "expected at least 2 sequences to fit on"),
        ({"batch_size": 0}, CorpusError, "--batch-size"),
    ],
)
def test_invalid_search_gives_one_line_error(
    changes: dict[str, Any], kind: type[CascadeError], words: str
) -> None:
    fit = changes.get("fit", FIT)
    fields = {name: value for name, value in changes.items() if name != "fit"}
    config = dataclasses.replace(SearchConfig(0.9, layers=(3,)), **fields)
    with pytest.raises(kind) as error:
        search_exits(a_settled_stack("llama"), fit, CONFIRM, config)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- Completing stored evaluations -----------------------------------------------------------


@functools.cache
def evaluated() -> EvaluationRecord:
    config = EvaluationConfig(layers=LAYERS, rules=RULES, agreement=0.9)
    return evaluate(
        a_settled_stack("llama"),
        FIT,
        CONFIRM,
        config,
        heads=settled_heads("llama"),
        propagation="ridge",
    )


def stored(record: EvaluationRecord, source: int = 0) -> StoredEvaluation:
    assert not isinstance(record.provenance.fitted_on, UnsetType)
    return StoredEvaluation("a record", source, record, record.provenance.fitted_on)


def completed(
    record: EvaluationRecord, agreement: float, *, source: int = 0, **changes: Any
) -> Answer:
    config = SearchConfig(agreement)
    options = {"fit": FIT, "confirm": CONFIRM, "heads": settled_heads("llama"), **changes}
    stack = options.pop("stack", a_settled_stack("llama"))
    found = answer(stored(record, source), config)
    return measure_missing(stack, found, config=config, **options)


def test_points_from_table_are_run_without_fitting_again() -> None:
    record = evaluated()
    before = answer(stored(record), SearchConfig(0.8))
    done: list[int] = []
    found = completed(record, 0.8, progress=done.append)
    assert before.on_table
    assert not found.on_table
    assert sum(done) == CONFIRM.tokens  # thresholds are not fitted again
    assert len(found.points) == len(before.points)
    again = {
        (row.exit_layer, row.rule, row.threshold): row.agreement
        for row in run_again(found.points, CONFIRM)
    }
    for row in found.points:
        name = row.exit_layer, row.rule, row.threshold
        assert row.agreement == pytest.approx(again[name])


def test_evaluation_without_curves_is_searched_again_with_its_settings() -> None:
    record = structs.replace(evaluated(), curves=UNSET)
    found = completed(record, 0.8, source=3)
    fresh = searched("ridge", 0.8)
    assert [row.threshold for row in found.points] == [row.threshold for row in fresh.points]
    assert {row.source for row in found.points} == {3}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": a_stack("qwen2")}, "expected the family of the evaluation, llama"),
        ({"heads": None}, "expected the heads of the evaluation"),
        ({"fit": blocks_of(4)}, "expected the text to fit on of the evaluation"),
        ({"confirm": FIT}, "expected the text to confirm on of the evaluation"),
    ],
)
def test_completing_with_other_model_text_or_heads_is_rejected(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecordError) as error:
        completed(evaluated(), 0.8, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_completing_with_other_weights_is_rejected() -> None:
    record = evaluated()
    model = structs.replace(record.provenance.model, weights_hash="sha256:11aa")
    record = structs.replace(record, provenance=structs.replace(record.provenance, model=model))
    with pytest.raises(
        RecordError, match="expected the weights_hash of the evaluation, sha256:11aa"
    ):
        completed(record, 0.8)


def test_best_point_keeps_agreement_at_fewest_operations() -> None:
    record = searched("exact")
    prices = [row.flops_ratio for row in record.points if row.candidate and row.agreement >= 0.9]
    best = record.points[record.best]
    assert best.agreement >= 0.9
    assert np.isfinite(prices).all()
    assert best.flops_ratio == min(prices) or best.seconds_ratio_interval is None
