"""Budgets: stored limits of early exit, on records by hand and on the real model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cascade.budgets import SLACK, accept_budgets, check_budgets
from cascade.errors import RecordError
from cascade.evaluation import Request, evaluate, split
from cascade.heads import load_heads
from cascade.points import Point

if TYPE_CHECKING:
    from cascade import DecoderStack

BASELINES = Path(__file__).parents[1] / "baselines" / "smollm2-135m-instruct-q4_1"
BUDGETS = BASELINES / "embedded-held-out-confirm.budgets.json"
HEADS = BASELINES / "embedded.heads.safetensors"

Record = dict[str, Any]


def a_row(**changes: Any) -> Record:
    row = {
        "exit_layer": 3,
        "rule": "cosine",
        "head": "logit_lens",
        "threshold": 0.95,
        "threshold_from": "given",
        "exit_share": 0.7,
        "agreement": 0.9,
        "perplexity_ratio": 1.2,
        "layers_per_token": 3.3,
        "seconds_ratio": 0.9,
        "seconds_ratio_interval": [0.8, 1.0],
    }
    return row | changes


def an_evaluation(*rows: Record, propagation: str = "frozen", heads: str | None = None) -> Record:
    return {
        "schema": 1,
        "kind": "evaluation",
        "provenance": {
            "model": {"name": "tiny", "weights_hash": "w", "revision": None, "dtype": "float32"},
            "tokenizer_hash": "t",
            "corpus": {"name": "words", "fingerprint": "c"},
            "heads_fingerprint": heads,
            "command": "cascade evaluate --point 3:cosine:0.95",
        },
        "settings": {"propagation": propagation},
        "points": list(rows),
    }


def stored(tmp_path: Path, *evaluations: Record) -> Record:
    for evaluation in evaluations:
        path, _ = accept_budgets(tmp_path, evaluation)
    record: Record = json.loads(path.read_text())
    return record


def test_what_was_accepted_keeps_its_budgets(tmp_path: Path) -> None:
    evaluation = an_evaluation(a_row(), a_row(threshold=0.9))
    assert check_budgets(evaluation, stored(tmp_path, evaluation)) == []


@pytest.mark.parametrize(
    ("figure", "sign"),
    [
        ("perplexity_ratio", 1),
        ("agreement", -1),
        ("exit_share", 1),
        ("exit_share", -1),
        ("layers_per_token", 1),
    ],
)
def test_each_hard_limit_fails_just_beyond_its_slack_and_not_before(
    tmp_path: Path, figure: str, sign: int
) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    for share, count in ((0.9, 0), (1.2, 1)):
        moved = a_row(**{figure: a_row()[figure] + sign * share * SLACK[figure]})
        overruns = check_budgets(an_evaluation(moved), budgets)
        assert [overrun.figure for overrun in overruns] == [figure] * count


@pytest.mark.parametrize("figure", ["perplexity_ratio", "agreement", "layers_per_token"])
def test_what_got_better_keeps_its_budget(tmp_path: Path, figure: str) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    better = {"perplexity_ratio": 1.0, "agreement": 1.0, "layers_per_token": 1.0}[figure]
    assert check_budgets(an_evaluation(a_row(**{figure: better})), budgets) == []


@pytest.mark.parametrize(
    ("ratio", "interval", "fails"),
    [
        (1.5, [1.1, 1.9], False),  # the good end keeps to it: noise, not a verdict
        (1.5, [1.4, 1.6], True),
        (1.5, None, True),
        (0.5, None, False),
    ],
)
def test_seconds_fail_only_where_the_good_end_of_the_interval_misses(
    tmp_path: Path, ratio: float, interval: list[float] | None, fails: bool
) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    row = a_row(seconds_ratio=ratio, seconds_ratio_interval=interval)
    assert [o.figure for o in check_budgets(an_evaluation(row), budgets)] == (
        ["seconds_ratio"] if fails else []
    )


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("figure", SLACK)
def test_a_figure_that_is_missing_or_nan_fails(tmp_path: Path, figure: str, value: Any) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    row = a_row(**{figure: value, "seconds_ratio_interval": None})
    assert figure in {o.figure for o in check_budgets(an_evaluation(row), budgets)}


def test_a_point_that_was_not_measured_fails(tmp_path: Path) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row(), a_row(exit_layer=2)))
    (overrun,) = check_budgets(an_evaluation(a_row()), budgets)
    assert "layer 2" in str(overrun)
    assert "not at all" in str(overrun)


def test_a_failure_says_budget_measured_and_what_to_run(tmp_path: Path) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    (overrun,) = check_budgets(an_evaluation(a_row(agreement=0.5)), budgets)
    assert str(overrun) == (
        "layer 3, cosine >= 0.95, logit_lens: agreement budget at least 0.897, measured 0.5000; "
        "look closer with `cascade evaluate --point 3:cosine:0.95`"
    )


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (("model",), "weights_hash"),
        (("model",), "dtype"),
        (("corpus",), "fingerprint"),
        ((), "heads_fingerprint"),
        ((), "tokenizer_hash"),
    ],
)
def test_another_model_corpus_or_heads_cannot_be_compared(
    tmp_path: Path, part: tuple[str, ...], name: str
) -> None:
    budgets = stored(tmp_path, an_evaluation(a_row()))
    other = copy.deepcopy(an_evaluation(a_row()))
    place = other["provenance"]
    for key in part:
        place = place[key]
    place[name] = "another"
    with pytest.raises(RecordError, match=f"{name} is another"):
        check_budgets(other, budgets)


def test_groups_of_other_heads_and_propagations_live_side_by_side(tmp_path: Path) -> None:
    lens, ridge = an_evaluation(a_row()), an_evaluation(a_row(), heads="h", propagation="ridge")
    budgets = stored(tmp_path, lens, ridge)
    assert len(budgets["groups"]) == 2
    assert check_budgets(lens, budgets) == check_budgets(ridge, budgets) == []
    again, overruns = accept_budgets(tmp_path, an_evaluation(a_row(agreement=0.5)))
    assert [overrun.figure for overrun in overruns] == ["agreement"]
    groups = json.loads(again.read_text())["groups"]
    assert [group["points"][0]["agreement"] for group in groups] == [0.5, 0.9]


def test_only_given_points_become_budgets(tmp_path: Path) -> None:
    evaluation = an_evaluation(a_row(), a_row(exit_layer=1, threshold_from="hard ratio 0.3"))
    (group,) = stored(tmp_path, evaluation)["groups"]
    assert [point["exit_layer"] for point in group["points"]] == [3]
    with pytest.raises(RecordError, match="no point to budget"):
        accept_budgets(tmp_path, an_evaluation(a_row(threshold_from="control")))


# --- The real model --------------------------------------------------------------------------


def measured(stack: DecoderStack, group: Record) -> Record:
    """Evaluate a group's points again, as its own settings say."""
    from cascade import load_blocks

    blocks = load_blocks(
        "embedded", stack.tokenizer, num_samples=None, split="held-out", max_tokens=8192
    )
    fit, confirm = split(blocks)
    with_heads = group["provenance"]["heads_fingerprint"] is not None
    points = tuple(
        Point(point["exit_layer"], point["rule"], point["threshold"], "given")
        for point in group["points"]
    )
    request = Request(layers=(), rules=(), thresholds=points, only_given=True)
    return evaluate(
        stack,
        fit,
        confirm,
        request,
        heads=load_heads(HEADS, stack) if with_heads else None,
        propagation=group["settings"]["propagation"],
    )


@pytest.mark.budgets
@pytest.mark.parametrize("index", [0, 1], ids=["logit_lens", "ridge"])
def test_early_exit_on_the_real_model_keeps_its_budgets(
    reference_model: DecoderStack, index: int
) -> None:
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    evaluation = measured(reference_model, budgets["groups"][index])
    overruns = check_budgets(evaluation, budgets)
    assert not overruns, "\n".join(map(str, overruns))
    if index == 1:
        check_promises(evaluation)


def check_promises(evaluation: Record) -> None:
    """Hold the ridge points to what the project promises, not only to what it once measured."""
    rows = {
        (row["exit_layer"], row["rule"]): row
        for row in evaluation["points"]
        if 0.25 <= row["exit_share"] <= 0.35
    }
    # Promised are 0.93 and 0.98 (measured: 0.950 and 0.982 over all of the held-out text, 0.936 and
    # 0.980 over these 4,096 tokens); three tokens' room for another processor's arithmetic.
    assert rows[24, "top2_gap"]["exit_agreement"] >= 0.93 - 0.003
    assert rows[28, "top2_gap"]["exit_agreement"] >= 0.98 - 0.003
    assert rows[28, "top2_gap"]["perplexity_ratio"] <= 1.08


@pytest.mark.budgets
def test_the_seeds_thresholds_with_the_logit_lens_are_budgeted_as_bad_as_they_are() -> None:
    (lens, _) = json.loads(BUDGETS.read_text(encoding="utf-8"))["groups"]
    points = {point["threshold"]: point for point in lens["points"]}
    assert sorted(points) == [0.9453, 0.9517, 0.957]
    assert all(point["exit_layer"] == 29 for point in points.values())
    assert points[0.9453]["perplexity_ratio"] > 2
