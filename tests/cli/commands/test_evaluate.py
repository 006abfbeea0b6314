"""`cascade evaluate`, and `accept` of what it gives, on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Run, read_record
from support.disk import contents
from support.tiny_drafters import stored

from cascade import load


def test_an_evaluation_says_whether_early_exit_pays_and_becomes_budgets(
    tiny: Run, run: Run, here: Path
) -> None:
    done = tiny("evaluate", "--layers", "2,3", "--point", "3:cosine:0.5", "--output", "e")
    assert done.status == 0, done.err
    assert "early exit here" in done.out
    assert sorted(contents(here / "e")) == ["evaluation.html", "evaluation.json", "pareto.svg"]
    columns = {
        *("exit_layer", "rule", "head", "threshold", "exit_share", "agreement", "perplexity"),
        *("perplexity_ratio", "kl", "layers_per_token", "flops_ratio", "seconds_ratio"),
    }
    record = read_record("e/evaluation.json")
    assert all(columns <= row.keys() for row in record["points"])
    assert {row["rule"] for row in record["points"]} >= {"cosine", "random", "fixed", "oracle"}
    accepted = run("accept", "e")
    assert accepted.status == 0, accepted.err
    (budgets,) = Path("baselines").rglob("*.budgets.json")
    assert [p["threshold"] for p in read_record(str(budgets))["groups"][0]["points"]] == [0.5]


def test_only_points_gives_the_same_results_as_a_full_evaluation(tiny: Run, here: Path) -> None:
    point = ("--point", "3:top2_gap:0.1")
    assert tiny("evaluate", "--layers", "2", *point, "--output", "all").status == 0
    assert tiny("evaluate", "--only-points", *point, "--output", "one").status == 0
    (alone,) = read_record("one/evaluation.json")["points"]
    among = next(
        row
        for row in read_record("all/evaluation.json")["points"]
        if row["threshold_from"] == "given"
    )
    timed = {"seconds_ratio", "seconds_ratio_interval"}
    assert {k: v for k, v in alone.items() if k not in timed} == {
        k: v for k, v in among.items() if k not in timed
    }


def test_lossless_decoding_is_compared_and_becomes_a_budget(
    tiny: Run, run: Run, here: Path
) -> None:
    point = ("--only-points", "--point", "3:cosine:0.5", "--agreement", 0)
    assert tiny("evaluate", *point, "--no-lossless", "--output", "without").status == 0
    without = read_record("without/evaluation.json")
    assert "lossless" not in without
    assert "lossless" not in without["verdict"]
    done = tiny("evaluate", *point, "--perplexity-ratio", 1000, "--output", "with")
    assert done.status == 0, done.err
    record = read_record("with/evaluation.json")
    methods = [row["method"] for row in record["lossless"]["rows"]]
    assert methods == ["modules", "engine", "drafts", "exits"]
    headline = record["verdict"]["lossless"]["headline"]
    assert " ".join(headline.split()) in " ".join(done.out.split())
    accepted = run("accept", "with")
    assert accepted.status == 0, accepted.err
    (path,) = Path("baselines").rglob("*.budgets.json")
    budget = read_record(str(path))["lossless"]
    least = f"{budget['budget']['least']:g}"
    assert f"Lossless decoding: at least {least} tokens per pass on 4 prompts" in accepted.out
    # An evaluation without it keeps the stored one.
    accepted = run("accept", "without")
    assert "Lossless decoding" not in accepted.out
    assert read_record(str(path))["lossless"] == budget


def test_drafts_of_a_trained_drafter_are_timed(tiny: Run, models: Path, here: Path) -> None:
    stored(here / "drafter", load(str(models / "tiny")))
    point = ("--only-points", "--point", "3:cosine:0.5")
    done = tiny("evaluate", *point, "--drafter", "drafter", "--output", "e")
    assert done.status == 0, done.err
    record = read_record("e/evaluation.json")
    assert "drafter" in [row["method"] for row in record["lossless"]["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drafter", "d", "--no-lossless"), "--drafter drafts for lossless decoding"),
        (("--drafter", "none-there"), "no record none-there/record.json"),
        (("--layers", "7"), "expected an exit layer in 1..4, got 7"),
        (("--point", "3:cosine"), "expected an operating point LAYER:RULE:THRESHOLD"),
        (("--point", "3:cosine:1.5"), "expected a threshold in this range, got 1.5"),
        (("--point", "3:cosine:nan"), "the rule cosine gives confidences from -1 to 1"),
        (("--rule", "none"), "expected a rule among cosine"),
        (("--agreement", 2), "expected a share of agreement in 0..1, got 2"),
        (("--perplexity-ratio", 0.5), "expected a finite perplexity ratio of at least 1, got 0.5"),
        (("--propagation", "ridge"), "ridge propagation needs fitted heads"),
        (("--only-points",), "expected at least one operating point"),
        (("--max-tokens", 32), "a larger --max-tokens"),
        (("--rule", "oracle"), "expected a rule to judge, got only controls (oracle)"),
        (("--layers", 1, "--rule", "mean_cosine"), "the rule mean_cosine compares 2 layers"),
        (("--perplexity-ratio", "inf"), "got inf"),
        (("--seed", -1), "got '-1'"),
        (("--heads", "."), ". is a folder, expected the .safetensors file"),
    ],
)
def test_evaluate_rejects_invalid_options_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("evaluate", "--output", "e", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_accepting_an_evaluation_without_a_given_point_is_refused(
    tiny: Run, run: Run, here: Path
) -> None:
    assert tiny("evaluate", "--layers", "3", "--output", "e").status == 0
    done = run("accept", "e")
    assert done.status == 2
    assert "no operating point to budget" in done.err
    assert not Path("baselines").exists()


def test_accept_reports_replaced_budgets_and_refuses_another_dtype(
    tiny: Run, run: Run, fitted: Path, here: Path
) -> None:
    point = ("--only-points", "--point", "3:cosine:0.5")
    assert tiny("fit-heads", "--layers", 3, "--output", "refitted.safetensors").status == 0
    for name, heads in (("a", fitted), ("b", here / "refitted.safetensors")):
        assert tiny("evaluate", *point, "--heads", heads, "--output", name).status == 0
        done = run("accept", name)
        assert done.status == 0, done.err
    assert "Replaces the budgets of other heads, sha256:" in done.out
    before = contents(here / "baselines")
    assert tiny("evaluate", *point, "--dtype", "bfloat16", "--output", "c").status == 0
    done = run("accept", "c")
    assert (done.status, done.out) == (2, "")
    assert "expected model.dtype float32, got bfloat16" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here / "baselines") == before
