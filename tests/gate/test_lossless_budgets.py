"""Budgets of lossless decoding: equal texts, tokens per pass at fixed costs, never seconds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.build_evaluations import a_row, an_evaluation
from support.lossless import drafts, some_figures
from support.records import edit_sealed
from support.reference_early_exit import a_settled_stack, one_line
from support.reference_points import blocks_of

from cascade import TokenBlocks
from cascade.core.errors import RecordError
from cascade.core.schema import UNSET, known
from cascade.decoding.drafting.ngrams import NgramLookup
from cascade.decoding.drafting.runner_ups import RunnerUps
from cascade.decoding.early_exit import EarlyExit
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.lossless.comparison import compare_with_lossless
from cascade.evaluation.lossless.decoding import LosslessConfig
from cascade.evaluation.lossless.records import LosslessFigures
from cascade.evaluation.operating_points import OperatingPoint
from cascade.evaluation.records import EvaluationRecord
from cascade.gate.budgets import accept_budgets, check_budgets, read_budgets
from cascade.gate.lossless_budgets import (
    SLACK,
    decode_again,
    incomparable_because,
    lossless_budget_of,
    lossless_overruns,
)
from cascade.gate.records import BudgetSource, LosslessBudget
from cascade.gate.remeasuring import replace_budgets

#: Tokens per pass of the accepted run.
TOKENS = 1.6

FIGURES = some_figures(drafts(TOKENS))


def a_source(figures: LosslessFigures | None = FIGURES) -> BudgetSource:
    return replace(an_evaluation(a_row()), lossless=UNSET if figures is None else figures)


def a_budget() -> LosslessBudget:
    budget = lossless_budget_of(a_source())
    assert budget is not None
    return budget


def overruns_of(row: dict[str, Any], **changes: Any) -> list[tuple[str, str, str]]:
    found = lossless_overruns(a_budget(), some_figures(row, **changes))
    return [(overrun.figure, overrun.limit, overrun.measured) for overrun in found]


# --- On constructed figures ------------------------------------------------------------------


def test_the_accepted_figures_are_within_their_budget() -> None:
    assert lossless_overruns(a_budget(), FIGURES) == []


@pytest.mark.parametrize(("share", "count"), [(0.9, 0), (1.1, 1)])
def test_fewer_tokens_per_pass_fail_just_beyond_the_slack(share: float, count: int) -> None:
    worse = TOKENS * (1 - share * SLACK)
    expected = [("tokens_per_pass", "at least 1.52", f"{worse:.4f}")] * count
    assert overruns_of(drafts(worse)) == expected


def test_more_tokens_per_pass_stay_within_budget() -> None:
    assert overruns_of(drafts(3.0)) == []


def test_seconds_do_not_count() -> None:
    slow = drafts(TOKENS, 50.0, seconds_ratio=50.0, seconds_ratio_interval=[49.0, 51.0])
    assert overruns_of(slow) == []


def test_a_text_that_differs_fails() -> None:
    assert overruns_of(drafts(TOKENS, equal=3)) == [
        ("texts", "all 4 equal to the full model's", "1 of 4 different")
    ]


def test_an_overrun_names_another_engine_and_the_command() -> None:
    (overrun,) = lossless_overruns(a_budget(), some_figures(drafts(1.0, engine="fused, plain")))
    assert str(overrun) == (
        "lossless decoding: tokens_per_pass budget at least 1.52, measured 1.0000 (computed by "
        "fused, plain, accepted with compiled); run `cascade evaluate --point 3:cosine:0.95`"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pass_costs": [1.0, 1.0]}, "drafts were chosen by other costs of passes"),
        ({"trees": False}, "drafts were chains here and trees there"),
        ({"fingerprint": "another"}, "other prompts were continued"),
        ({"new_tokens": 8}, "other prompts were continued"),
        ({}, None),
    ],
)
def test_tokens_per_pass_of_other_drafts_are_not_compared_but_texts_are(
    changes: dict[str, Any], words: str | None
) -> None:
    assert incomparable_because(a_budget(), some_figures(drafts(), **changes)) == words
    found = [figure for figure, *_ in overruns_of(drafts(1.0, equal=2), **changes)]
    assert found == ["texts"] + ["tokens_per_pass"] * (words is None)


def test_an_evaluation_with_another_text_is_not_accepted(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as error:
        accept_budgets(tmp_path, a_source(some_figures(drafts(equal=3))))
    assert "got 1 of 4 different; evaluate again with --no-lossless" in one_line(error)
    assert not list(tmp_path.rglob("*.budgets.json"))


def test_where_nothing_can_be_drafted_there_is_no_budget() -> None:
    assert lossless_budget_of(a_source(None)) is None
    assert lossless_budget_of(a_source(some_figures(drafts(), pass_costs=[]))) is None
    assert lossless_budget_of(a_source(some_figures())) is None


# --- In the file -----------------------------------------------------------------------------


def test_one_budget_of_lossless_decoding_is_stored_for_the_whole_file(tmp_path: Path) -> None:
    accepted = accept_budgets(tmp_path, a_source())
    stored = read_budgets(accepted.path)
    assert stored.lossless == accepted.lossless == a_budget()
    assert check_budgets(a_source(), stored.groups) == []
    # An evaluation without it keeps it, one with it replaces it.
    ridge = an_evaluation(a_row(), heads="h", propagation="ridge")
    assert accept_budgets(tmp_path, ridge).lossless is None
    assert read_budgets(accepted.path).lossless == a_budget()
    accept_budgets(tmp_path, replace(ridge, lossless=some_figures(drafts(2.0))))
    lossless = known(read_budgets(accepted.path).lossless)
    assert lossless is not None
    assert lossless.tokens_per_pass == 2.0


def test_budgets_without_lossless_decoding_are_read_and_stay_without(tmp_path: Path) -> None:
    path = accept_budgets(tmp_path, a_source(None)).path
    assert "lossless" not in path.read_text()
    assert read_budgets(path).lossless is UNSET


def test_replacing_operating_points_keeps_the_budget_of_lossless_decoding(tmp_path: Path) -> None:
    path = accept_budgets(tmp_path, a_source()).path
    replace_budgets(path, [an_evaluation(a_row(agreement=0.5))])
    assert read_budgets(path).groups[0].points[0].agreement == 0.5
    assert read_budgets(path).lossless == a_budget()
    replace_budgets(path, [a_source(some_figures(drafts(2.0)))])
    lossless = known(read_budgets(path).lossless)
    assert lossless is not None
    assert lossless.tokens_per_pass == 2.0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("budget", {}, "a number for least"),
        ("pass_costs", [], "costs of passes"),
        ("prompts", 0, "lossless"),
        ("tokens_per_pass", None, "lossless"),
    ],
)
def test_a_torn_budget_of_lossless_decoding_is_refused(
    tmp_path: Path, name: str, value: Any, words: str
) -> None:
    path = accept_budgets(tmp_path, a_source()).path
    edit_sealed(path, lambda record: record["lossless"].update({name: value}))
    with pytest.raises(RecordError, match=rf"torn or edited .*{words}"):
        read_budgets(path)


# --- On a tiny model -------------------------------------------------------------------------

BLOCKS = blocks_of(8, seed=1)


@functools.cache
def measured() -> EvaluationRecord:
    stack = a_settled_stack("llama")
    point = OperatingPoint(3, "cosine", 0.5, "given")
    config = EvaluationConfig(layers=(), rules=(), thresholds=(point,), only_given=True)
    fit, confirm = split(BLOCKS)
    record = evaluate(stack, fit, confirm, config)
    # Costs at which drafts pay, whatever else this machine does.
    costs = LosslessConfig(new_tokens=12, pass_costs=tuple(1 + n / 50 for n in range(9)))
    return compare_with_lossless(record, stack, confirm, config=costs)


def stored_budget(tmp_path: Path) -> LosslessBudget:
    lossless = accept_budgets(tmp_path, a_source(known(measured().lossless))).lossless
    assert lossless is not None
    assert lossless.tokens_per_pass > 1.2
    return lossless


def test_decoding_again_gives_the_accepted_tokens_per_pass(tmp_path: Path) -> None:
    budget = stored_budget(tmp_path)
    figures = decode_again(a_settled_stack("llama"), budget, BLOCKS)
    row = figures.row("drafts")
    assert row is not None
    assert (row.equal, row.tokens_per_pass) == (4, budget.tokens_per_pass)
    assert incomparable_because(budget, figures) is None
    assert lossless_overruns(budget, figures) == []


def test_proposers_that_get_worse_exceed_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = stored_budget(tmp_path)
    for proposer in (NgramLookup, RunnerUps):
        monkeypatch.setattr(proposer, "propose", lambda *_: [])
    figures = decode_again(a_settled_stack("llama"), budget, BLOCKS)
    assert [overrun.figure for overrun in lossless_overruns(budget, figures)] == ["tokens_per_pass"]


def test_another_text_exceeds_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, original = stored_budget(tmp_path), EarlyExit.generate

    def generate(self: EarlyExit, *args: Any, **kwargs: Any) -> Any:
        made: Any = original(self, *args, **kwargs)
        if kwargs.get("verify"):
            made.sequences[0, -1] += 1
        return made

    monkeypatch.setattr(EarlyExit, "generate", generate)
    figures = decode_again(a_settled_stack("llama"), budget, BLOCKS)
    assert [overrun.figure for overrun in lossless_overruns(budget, figures)] == ["texts"]


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    budget = stored_budget(tmp_path)
    ids = BLOCKS.ids.copy()
    ids[1, 0] += 1
    other = TokenBlocks(ids, BLOCKS.source, BLOCKS.name, BLOCKS.records)
    with pytest.raises(RecordError, match="for the budget of lossless decoding, got sha256:"):
        decode_again(a_settled_stack("llama"), budget, other)
