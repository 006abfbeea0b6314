"""Searches in stored evaluations use their contents and report what is missing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from support.reference_early_exit import a_settled_stack
from support.reference_points import blocks_of, settled_heads

from cascade.core.errors import RecordError
from cascade.core.records import sealed, to_json, write_record
from cascade.core.schema import UNSET, UnsetType, to_plain
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.records import EvaluationRecord, OperatingPointRow
from cascade.evaluation.search.choice import SearchConfig
from cascade.evaluation.search.records import SearchRecord, TriedPoint
from cascade.evaluation.search.stored_evaluations import (
    StoredEvaluation,
    answer,
    read_evaluations,
    search_evaluations,
)

Plain = dict[str, Any]

FIT, CONFIRM = split(blocks_of(20, seed=1))


@functools.cache
def _evaluated(propagation: Propagation, layers: tuple[int, ...], heads: bool) -> EvaluationRecord:
    config = EvaluationConfig(
        layers=layers,
        rules=("cosine", "top2_gap"),
        hard_ratios=(0.25, 0.5, 0.75),
        thresholds=(OperatingPoint(layers[0], "cosine", 0.9375, "given"),),
        agreement=0.9,
    )
    return evaluate(
        a_settled_stack("llama"),
        FIT,
        CONFIRM,
        config,
        heads=settled_heads("llama") if heads else None,
        propagation=propagation,
        command="cascade evaluate",
    )


def evaluated(
    propagation: Propagation = "ridge", layers: tuple[int, ...] = (1, 2), *, heads: bool = True
) -> EvaluationRecord:
    record = _evaluated(propagation, layers, heads)
    # A model created in memory has neither.
    model = structs.replace(record.provenance.model, name="tiny", weights_hash="sha256:11aa")
    return structs.replace(record, provenance=structs.replace(record.provenance, model=model))


def searched(*records: EvaluationRecord, agreement: float) -> SearchRecord:
    config = SearchConfig(agreement)
    answers = []
    for number, record in enumerate(records):
        assert not isinstance(record.provenance.fitted_on, UnsetType)
        evaluation = StoredEvaluation(
            f"record {number}", number, record, record.provenance.fitted_on
        )
        answers.append(answer(evaluation, config))
    return search_evaluations(answers, config, command="cascade search-exit")


def written(folder: Path, *records: Plain) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(records))]
    for path, record in zip(paths, records, strict=True):
        write_record(path, record)
    return paths


def key(row: TriedPoint | OperatingPointRow) -> tuple[int, str, float]:
    return row.exit_layer, row.rule, row.threshold


def test_evaluation_answers_for_its_agreement_with_points_that_were_run() -> None:
    record = evaluated()
    found = searched(record, agreement=0.9)
    rows = {key(row): row for row in record.points}
    assert {row.confirmed_by for row in found.points} == {"running"}
    searched_keys = {key(record.points[number]) for number in record.search.points}
    assert {key(found.points[pair.fitted]) for pair in found.pairs} == searched_keys
    for row in found.points:
        for name in ("agreement", "agreement_interval", "flops_ratio", "seconds_ratio"):
            assert getattr(row, name) == getattr(rows[key(row)], name)


def test_evaluation_without_curves_answers_only_for_its_agreement() -> None:
    record = evaluated()
    with_curves = searched(record, agreement=0.9)
    record = structs.replace(record, curves=UNSET)  # as earlier releases wrote it
    found = searched(record, agreement=0.9)
    for name in ("best", "best_beyond_doubt", "pairs"):
        assert getattr(found, name) == getattr(with_curves, name)
    assert {row.fit_agreement for row in found.points} == {None}
    with pytest.raises(RecordError, match=r"record 0 has no thresholds for agreement 0.8: .*0.9"):
        searched(record, agreement=0.8)


@pytest.mark.parametrize("agreement", [0.7, 0.8, 0.95, 1.0])
def test_other_agreements_are_searched_on_curves(agreement: float) -> None:
    record = evaluated()
    found = searched(record, agreement=agreement)
    table = _table("ridge")
    assert record.curves
    for pair in found.pairs:
        curve = next(
            row
            for row in record.curves.rows
            if (row.exit_layer, row.rule) == (pair.exit_layer, pair.rule)
        )
        confidence = table.confidence[pair.exit_layer, pair.rule]
        agrees = table.agrees[pair.exit_layer]
        fine = [
            threshold
            for threshold in curve.thresholds
            if np.mean(agrees | (confidence < threshold)) >= agreement
            and (confidence >= threshold).any()
        ]
        if pair.fitted is None:
            assert not fine
            continue
        row = found.points[pair.fitted]
        if row.threshold_from != "given":
            assert row.threshold == min(fine)
        exits = confidence >= row.threshold
        assert row.fit_exit_share == exits.mean()
        assert row.fit_agreement == np.mean(agrees | ~exits)
    assert found.pairs


@functools.cache
def _table(propagation: Propagation) -> Any:
    evaluator = Evaluator(
        a_settled_stack("llama"),
        {1: ["cosine", "top2_gap"], 2: ["cosine", "top2_gap"]},
        heads=settled_heads("llama"),
        propagation=propagation,
    )
    return evaluator.table(FIT)


@pytest.mark.parametrize(("propagation", "by"), [("ridge", "table"), ("exact", "exact table")])
def test_points_that_were_not_run_are_marked_as_from_table(
    propagation: Propagation, by: str
) -> None:
    record = evaluated(propagation)
    found = searched(record, agreement=0.8)
    from_table = [row for row in found.points if row.confirmed_by != "running"]
    assert from_table
    evaluator = Evaluator(
        a_settled_stack("llama"),
        {layer: ["cosine", "top2_gap"] for layer in (1, 2)},
        heads=settled_heads("llama"),
        propagation=propagation,
    )
    points = [OperatingPoint(*key(row), "here") for row in from_table]
    run, _ = evaluator.run(CONFIRM, points)
    for row, again in zip(from_table, run, strict=True):
        assert row.confirmed_by == by
        assert row.exit_share == again.exit_share
        assert row.flops_ratio == pytest.approx(again.flops_ratio, abs=0.03)
        assert (row.risk_bound is None) is (by == "table")
        if by == "exact table":
            assert row.agreement == again.agreement
            assert row.agreement_interval == pytest.approx(again.agreement_interval, abs=1e-6)


def test_given_threshold_is_not_a_candidate() -> None:
    found = searched(evaluated(), agreement=0.5)
    given = [row for row in found.points if row.threshold_from == "given"]
    assert [row.candidate for row in given] == [False]


def test_several_evaluations_are_searched_together() -> None:
    ridge, lens = evaluated(), evaluated("frozen", heads=False)
    found = searched(ridge, lens, agreement=0.9)
    assert {(row.source, row.head) for row in found.points} == {
        (0, "ridge"),
        (1, "logit_lens"),
    }
    assert [source.propagation for source in found.sources] == ["ridge", "frozen"]
    alone = [searched(record, agreement=0.9) for record in (ridge, lens)]
    prices = [one.points[one.best].flops_ratio for one in alone if one.best is not None]
    assert found.points[found.best].flops_ratio <= max(prices)


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    record = evaluated()
    (path,) = written(tmp_path, to_plain(record))
    path.rename(tmp_path / "evaluation.json")
    (from_folder,) = read_evaluations([tmp_path])
    (from_file,) = read_evaluations([tmp_path / "evaluation.json"])
    assert from_folder.record == from_file.record
    assert from_folder.name == str(tmp_path)
    text = to_json(to_plain(record))
    assert to_json(to_plain(from_folder.record)) == text
    assert sealed(json.loads(text)) == json.loads((tmp_path / "evaluation.json").read_text("utf-8"))


def _without(*path: str) -> Callable[[Plain], None]:
    *places, last = path

    def change(record: Plain) -> None:
        for name in places:
            record = record[name]
        del record[last]

    return change


def _set(*places: Any) -> Callable[[Plain], None]:
    *path, last, value = places

    def change(record: Plain) -> None:
        for name in path:
            record = record[name]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("points", 0, "agreement", "most"), "expected a share in 0..1 at points[0].agreement"),
        (_set("points", 0, "threshold", None), "expected a finite number at points[0].threshold"),
        (
            _set("search", "points", [99]),
            "one of 31 points at search.points, got number 99",
        ),
        (
            _set("curves", "rows", 0, "wrong", [1]),
            "expected columns of 48 rows in the curve",
        ),
        (_without("provenance", "fitted_on"), "contains only given operating points"),
        (_set("provenance", "fitted_on", {}), "expected text at provenance.fitted_on.source"),
    ],
)
def test_corrupt_evaluation_gives_one_line_error(
    tmp_path: Path, change: Callable[[Plain], None], words: str
) -> None:
    record = to_plain(evaluated())
    change(record)
    with pytest.raises(RecordError) as error:
        read_evaluations(written(tmp_path, record))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: None, "both measured layer 1 with cosine"),
        (_set("provenance", "model", "weights_hash", "other"), "differ in model weights_hash"),
        (_set("provenance", "corpus", "fingerprint", "other"), "differ in corpus fingerprint"),
        (_set("provenance", "fitted_on", "fingerprint", "x"), "differ in fitted_on fingerprint"),
    ],
)
def test_evaluations_that_do_not_match_are_rejected(
    tmp_path: Path, change: Callable[[Plain], None], words: str
) -> None:
    record, other = to_plain(evaluated()), to_plain(evaluated())
    change(other)
    with pytest.raises(RecordError) as error:
        read_evaluations(written(tmp_path, record, other))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
