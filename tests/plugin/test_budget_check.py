"""The check of early exit against its budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.plugin_project import (
    BUDGETS,
    STORED,
    failure,
    marked_test,
    ran,
)
from support.records import edit_sealed, write_sealed

from cascade.core.provenance import provenance_of
from cascade.corpora.blocks import load_blocks
from cascade.evaluation.exit_evaluation import split
from cascade.evaluation.lossless.comparison import compare_with_lossless
from cascade.evaluation.lossless.decoding import LosslessConfig
from cascade.evaluation.operating_points import OperatingPoint
from cascade.exits.head_fitting import fit_heads
from cascade.gate.budgets import accept_budgets
from cascade.gate.remeasuring import PointsConfig, evaluate_points
from cascade.models.loading import load


def groups() -> Any:
    return json.loads(STORED.read_text())


def test_only_operating_points_at_the_exit_layer_are_checked(guarded: pytest.Pytester) -> None:
    stored = groups()
    (group,) = stored["groups"]
    group["points"][0] |= {"exit_layer": 2}  # with the budget of another layer, which is exceeded
    write_sealed(STORED, stored)
    only = ("-m", "budgets")
    assert "layer 2" in failure(ran(guarded, *only))
    ran(guarded, *only, "--cascade-exit-layer", 3).assert_outcomes(passed=1, deselected=1)
    assert "layer 2" in failure(ran(guarded, *only, "--cascade-exit-layer", 2))
    done = failure(ran(guarded, *only, "--cascade-exit-layer", 1))
    assert "expected an operating point at exit layer 1 in" in done
    assert "got layers 2, 3 and propagation" in done
    done = ran(guarded, "-m", "saturation", "--cascade-exit-layer", 9)
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done) == "expected an exit layer in 1..4, got 9"
    guarded.makepyfile(
        test_my_budgets="import pytest\n"
        + marked_test(BUDGETS, "budgets(exit_layer=3)", "here")
        + marked_test(BUDGETS, "budgets(propagation='ridge')", "ridge")
    )
    done = ran(guarded, *only)
    done.assert_outcomes(passed=1, failed=1, deselected=1)
    assert "operating point at any exit layer with propagation ridge in" in failure(done)


#: Exits that the generation of another release takes at other tokens than scoring.
_OTHER_EXITS = """
import pytest
from cascade.decoding.early_exit import EarlyExit

@pytest.fixture(scope="session", autouse=True)
def other_exits():
    right = EarlyExit.generate
    def generate(self, *args, **kwargs):
        return right(EarlyExit(self.stack), *args, **kwargs)
    EarlyExit.generate = generate
    yield
    EarlyExit.generate = right
"""


def test_generating_that_differs_from_scoring_fails_within_every_budget(
    guarded: pytest.Pytester,
) -> None:
    guarded.makeconftest(_OTHER_EXITS)
    done = ran(guarded, "-m", "budgets", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert "when generated, 3 when scored" in failure(done)
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert budget["verdict"] == "FAIL"
    assert {overrun["figure"] for overrun in budget["overruns"]} == {"generation"}
    ran(guarded, "-m", "budgets", "--cascade-prefill-only").assert_outcomes(passed=1, deselected=1)


def test_budgets_of_fitted_heads_are_measured_with_those_heads(
    guarded: pytest.Pytester, models: Path
) -> None:
    stack = load(str(models / "tiny"))
    blocks = load_blocks("texts.jsonl", stack.tokenizer, seq_len=16)
    heads = fit_heads(stack, blocks, (3,), provenance=provenance_of(stack, blocks, None))
    heads.save(STORED.parent / "texts.heads.safetensors")
    points = [OperatingPoint(3, "cosine", 0.8, "given")]
    config = PointsConfig(propagation="ridge")
    record = evaluate_points(stack, points, blocks, heads=heads, config=config)
    row = replace(record.points[0], seconds_ratio=50.0, seconds_ratio_interval=None)
    accept_budgets(Path("baselines"), replace(record, points=[row]))
    done = ran(guarded, "-m", "budgets", "--cascade-report", "out")
    done.assert_outcomes(passed=1, deselected=1)
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert (budget["verdict"], budget["points"]) == ("PASS", 4)
    (STORED.parent / "texts.heads.safetensors").unlink()
    assert "no exit heads sha256:" in failure(ran(guarded, "-m", "budgets"))


def test_given_evaluation_records_are_checked_against_the_budgets(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(
        test_my_budgets="""
        import pytest
        from msgspec.structs import replace

        def test_one(exit_budget, cascade_evaluation):
            exit_budget.check(cascade_evaluation[0])

        def test_several(exit_budget, cascade_evaluation):
            assert len(cascade_evaluation) == len(cascade_evaluation[:]) == 1
            assert cascade_evaluation[0].kind == "evaluation"
            exit_budget.check(list(cascade_evaluation))

        def test_worse(exit_budget, cascade_evaluation):
            right = cascade_evaluation[0]
            worse = replace(right, points=[replace(row, agreement=0.0) for row in right.points])
            with pytest.raises(pytest.fail.Exception, match="agreement budget at least"):
                exit_budget.check(worse)

        def test_nothing(exit_budget):  # and an incomplete record
            with pytest.raises(pytest.fail.Exception, match="the evaluation is torn or edited"):
                exit_budget.check({"kind": "evaluation", "points": []})
            with pytest.raises(pytest.fail.Exception, match="expected cascade_evaluation"):
                exit_budget.check([])
        """
    )
    ran(guarded, "-m", "budgets").assert_outcomes(passed=4, deselected=1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text(path.read_text()[:-60]), "torn or edited"),
        (lambda path: path.write_text('{"schema": 1, "kind": "budgets"}'), "groups"),
        (lambda path: path.write_text('{"schema": 4, "kind": "budgets"}'), "has schema 4"),
    ],
)
def test_damaged_budgets_give_a_one_line_error(
    guarded: pytest.Pytester, damage: Callable[[Path], Any], words: str
) -> None:
    damage(guarded.path / STORED)
    done = ran(guarded, "-m", "budgets", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert words in failure(done)
    assert len(failure(done).splitlines()) == 1
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert (budget["verdict"], budget["points"]) == ("NOT COMPARABLE", 0)
    assert words in budget["reason"]


# --- Lossless decoding -----------------------------------------------------------------------


def accept_lossless(models: Path) -> None:
    """Add lossless decoding to the stored budgets, at costs at which drafts pay."""
    stack = load(str(models / "tiny"))
    blocks = load_blocks("texts.jsonl", stack.tokenizer, seq_len=16)
    points = [OperatingPoint(3, "cosine", 0.8, "given")]
    record = evaluate_points(stack, points, blocks)
    config = LosslessConfig(new_tokens=8, pass_costs=tuple(1 + n / 50 for n in range(9)))
    record = compare_with_lossless(record, stack, split(blocks)[1], config=config)
    row = replace(record.points[0], seconds_ratio=50.0, seconds_ratio_interval=None)
    accept_budgets(Path("baselines"), replace(record, points=[row]))


#: A conftest.py whose proposers get worse, or whose texts differ from the full model's.
WORSE = """
from cascade.decoding.drafting.ngrams import NgramLookup
from cascade.decoding.drafting.runner_ups import RunnerUps

NgramLookup.propose = RunnerUps.propose = lambda *_: []
"""
DIFFERENT = """
from cascade import EarlyExit

original = EarlyExit.generate

def generate(self, *args, **kwargs):
    made = original(self, *args, **kwargs)
    if kwargs.get("verify"):
        made.sequences[0, -1] += 1
    return made

EarlyExit.generate = generate
"""


def test_lossless_decoding_is_decoded_again(
    guarded: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade import EarlyExit
    from cascade.decoding.drafting.ngrams import NgramLookup
    from cascade.decoding.drafting.runner_ups import RunnerUps

    # An inner session changes them in this process; monkeypatch restores them.
    for owner, name in ((NgramLookup, "propose"), (RunnerUps, "propose"), (EarlyExit, "generate")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    kept = (NgramLookup.propose, RunnerUps.propose, EarlyExit.generate)
    accept_lossless(models)
    only = ("-m", "budgets")
    ran(guarded, *only).assert_outcomes(passed=1, deselected=1)
    guarded.makeconftest(WORSE)
    done = failure(ran(guarded, *only, "--cascade-report", "out"))
    assert "1 budgets of 1 operating points and lossless decoding exceeded" in done
    assert "lossless decoding: tokens_per_pass budget at least" in done
    assert "measured 1.0000" in done
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert [overrun["point"] for overrun in budget["overruns"]] == ["lossless decoding"]
    NgramLookup.propose, RunnerUps.propose, _ = kept  # type: ignore[method-assign]
    guarded.makeconftest(DIFFERENT)
    done = failure(ran(guarded, *only))
    assert "texts budget all 4 equal to the full model's, measured 4 of 4 different" in done
    # A text that differs cannot be accepted either.
    assert "expected texts of lossless decoding that equal" in failure(
        ran(guarded, *only, "--force-regen")
    )


def test_tokens_per_pass_below_their_budget_are_regenerated(
    guarded: pytest.Pytester, models: Path
) -> None:
    accept_lossless(models)
    measured = groups()["lossless"]

    def better(record: Any) -> None:
        record["lossless"] |= {"tokens_per_pass": 9.0, "budget": {"least": 8.5}}

    edit_sealed(STORED, better)
    only = ("-m", "budgets")
    assert "tokens_per_pass budget at least 8.5" in failure(ran(guarded, *only))
    ran(guarded, *only, "--force-regen").assert_outcomes(failed=1, deselected=1)
    assert groups()["lossless"]["budget"] == measured["budget"]
    ran(guarded, *only, "--force-regen").assert_outcomes(passed=1, deselected=1)


def test_drafts_of_another_form_are_noted_and_not_compared(
    guarded: pytest.Pytester, models: Path
) -> None:
    accept_lossless(models)
    edit_sealed(STORED, lambda record: record["lossless"].update(trees=False))
    done = ran(guarded, "-m", "budgets")
    done.assert_outcomes(passed=1, deselected=1)
    assert "drafts were trees here and chains there" in " ".join(str(done.stdout).split())
