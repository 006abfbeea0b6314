"""Searches in stored evaluations: what they have is used, what they lack is said."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.reference_early_exit import a_settled_stack
from support.reference_points import blocks_of, settled_heads

from cascade.core.errors import RecordError
from cascade.core.records import write_record
from cascade.core.schema import to_plain
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.evaluation.search_choice import Wish
from cascade.evaluation.stored_evaluations import look_up, read_evaluations, search_evaluations

Record = dict[str, Any]

FIT, CONFIRM = split(blocks_of(20, seed=1))


@functools.cache
def _evaluated(propagation: Propagation, layers: tuple[int, ...], heads: bool) -> Record:
    request = EvaluationConfig(
        layers=layers,
        rules=("cosine", "top2_gap"),
        hard_ratios=(0.25, 0.5, 0.75),
        thresholds=(OperatingPoint(layers[0], "cosine", 0.9375, "given"),),
        agreement=0.9,
    )
    record: Record = to_plain(
        evaluate(
            a_settled_stack("llama"),
            FIT,
            CONFIRM,
            request,
            heads=settled_heads("llama") if heads else None,
            propagation=propagation,
            command="cascade evaluate",
        )
    )
    return record


def evaluated(
    propagation: Propagation = "ridge", layers: tuple[int, ...] = (1, 2), *, heads: bool = True
) -> Record:
    record = copy.deepcopy(_evaluated(propagation, layers, heads))
    # A model made in memory has neither.
    record["provenance"]["model"] |= {"name": "tiny", "weights_hash": "sha256:11aa"}
    return record


def searched(*records: Record, agreement: float) -> Record:
    wish = Wish(agreement)
    found = [look_up(record, wish, source=number) for number, record in enumerate(records)]
    names = [f"record {number}" for number in range(len(records))]
    return search_evaluations(records, found, wish, names=names, command="cascade search-exit")


def stored(folder: Path, *records: Record) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(records))]
    for path, record in zip(paths, records, strict=True):
        write_record(path, record)
    return paths


def key(row: Record) -> tuple[int, str, float]:
    return row["exit_layer"], row["rule"], row["threshold"]


def test_at_its_own_agreement_a_record_answers_by_what_it_ran() -> None:
    record = evaluated()
    found = searched(record, agreement=0.9)
    rows = {key(row): row for row in record["points"]}
    assert {row["confirmed_by"] for row in found["points"]} == {"running"}
    searched_keys = {key(record["points"][number]) for number in record["search"]["points"]}
    assert {key(found["points"][pair["fitted"]]) for pair in found["pairs"]} == searched_keys
    for row in found["points"]:
        for name in ("agreement", "agreement_interval", "flops_ratio", "seconds_ratio"):
            assert row[name] == rows[key(row)][name]


def test_a_record_without_curves_answers_for_its_own_agreement_and_no_other() -> None:
    record = evaluated()
    with_curves = searched(record, agreement=0.9)
    del record["curves"]  # as earlier releases wrote it
    found = searched(record, agreement=0.9)
    for name in ("best", "best_beyond_doubt", "pairs"):
        assert found[name] == with_curves[name]
    assert {row["fit_agreement"] for row in found["points"]} == {None}
    with pytest.raises(
        RecordError, match=r"record 0 does not have what agreement 0.8 needs: .*0.9"
    ):
        searched(record, agreement=0.8)


@pytest.mark.parametrize("agreement", [0.7, 0.8, 0.95, 1.0])
def test_any_agreement_is_searched_on_the_curves(agreement: float) -> None:
    record = evaluated()
    found = searched(record, agreement=agreement)
    table = _table("ridge")
    for pair in found["pairs"]:
        curve = next(
            row
            for row in record["curves"]["rows"]
            if (row["exit_layer"], row["rule"]) == (pair["exit_layer"], pair["rule"])
        )
        confidence = table.confidence[pair["exit_layer"], pair["rule"]]
        agrees = table.agrees[pair["exit_layer"]]
        fine = [
            threshold
            for threshold in curve["thresholds"]
            if np.mean(agrees | (confidence < threshold)) >= agreement
            and (confidence >= threshold).any()
        ]
        if pair["fitted"] is None:
            assert not fine
            continue
        row = found["points"][pair["fitted"]]
        if row["threshold_from"] != "given":
            assert row["threshold"] == min(fine)
        leaves = confidence >= row["threshold"]
        assert row["fit_exit_share"] == leaves.mean()
        assert row["fit_agreement"] == np.mean(agrees | ~leaves)
    assert found["pairs"]


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
def test_what_was_not_run_is_said_to_be_read_off_the_table(
    propagation: Propagation, by: str
) -> None:
    record = evaluated(propagation)
    found = searched(record, agreement=0.8)
    read_off = [row for row in found["points"] if row["confirmed_by"] != "running"]
    assert read_off
    evaluator = Evaluator(
        a_settled_stack("llama"),
        {layer: ["cosine", "top2_gap"] for layer in (1, 2)},
        heads=settled_heads("llama"),
        propagation=propagation,
    )
    points = [OperatingPoint(*key(row), "here") for row in read_off]
    run, _ = evaluator.run(CONFIRM, points)
    for row, again in zip(read_off, run, strict=True):
        assert row["confirmed_by"] == by
        assert row["exit_share"] == again["exit_share"]
        assert row["flops_ratio"] == pytest.approx(again["flops_ratio"], abs=0.03)
        assert (row["risk_bound"] is None) is (by == "table")
        if by == "exact table":
            assert row["agreement"] == again["agreement"]
            assert row["agreement_interval"] == pytest.approx(again["agreement_interval"], abs=1e-6)


def test_a_given_threshold_is_drawn_but_is_no_candidate() -> None:
    found = searched(evaluated(), agreement=0.5)
    given = [row for row in found["points"] if row["threshold_from"] == "given"]
    assert [row["candidate"] for row in given] == [False]


def test_several_records_are_searched_together() -> None:
    ridge, lens = evaluated(), evaluated("frozen", heads=False)
    found = searched(ridge, lens, agreement=0.9)
    assert {(row["source"], row["head"]) for row in found["points"]} == {
        (0, "ridge"),
        (1, "logit_lens"),
    }
    assert [source["propagation"] for source in found["sources"]] == ["ridge", "frozen"]
    alone = [searched(record, agreement=0.9) for record in (ridge, lens)]
    prices = [one["points"][one["best"]]["flops_ratio"] for one in alone if one["best"] is not None]
    assert found["points"][found["best"]]["flops_ratio"] <= max(prices)


def test_files_and_folders_are_read(tmp_path: Path) -> None:
    record = evaluated()
    (path,) = stored(tmp_path, record)
    path.rename(tmp_path / "evaluation.json")
    assert read_evaluations([tmp_path]) == read_evaluations([tmp_path / "evaluation.json"])
    assert read_evaluations([tmp_path]) == [json.loads(json.dumps(record))]


def _set(*places: Any) -> Callable[[Record], None]:
    *path, last, value = places

    def change(record: Record) -> None:
        for name in path:
            record = record[name]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("points", 0, "agreement", "most"), "expected a share in 0..1 at points[0].agreement"),
        (_set("points", 0, "threshold", None), "expected a finite number at points[0].threshold"),
        (_set("search", "points", [99]), "a searched point beyond the"),
        (_set("curves", "rows", 0, "wrong", [1]), "a curve whose columns differ in length"),
        (_set("provenance", "fitted_on", None), "holds given points alone"),
        (_set("provenance", "fitted_on", {}), "torn or edited (fitted_on)"),
    ],
)
def test_a_torn_evaluation_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Record], None], words: str
) -> None:
    record = evaluated()
    change(record)
    with pytest.raises(RecordError) as error:
        read_evaluations(stored(tmp_path, record))
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
def test_evaluations_that_cannot_be_searched_together_are_refused(
    tmp_path: Path, change: Callable[[Record], None], words: str
) -> None:
    record, other = evaluated(), evaluated()
    change(other)
    with pytest.raises(RecordError) as error:
        read_evaluations(stored(tmp_path, record, other))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
