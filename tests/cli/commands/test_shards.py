"""`cascade plan`, `measure-shard` and `merge` on the corpus at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run

from cascade.cli.commands.analyze import RUN_FILES


@pytest.fixture
def plan(run: Run, models: Path) -> Run:
    """Plan with the tiny model and the corpus at hand; later options replace these."""

    def plan(*arguments: object) -> Any:
        common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 32)
        return run("plan", *common, "--batch-size", 2, *arguments)

    return plan


def without_engine(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    for name in ("engine", "command"):
        record["provenance"].pop(name, None)
    record.pop("hash")
    return record


def test_three_shards_give_the_profile_of_analyze(
    plan: Run, run: Run, analyze: Run, here: Path
) -> None:
    done = plan("--shards", 3, "--output", "PLAN")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].startswith("3 shards, ")
    assert "cascade measure-shard PLAN --shard 0 (to 2)" in done.out
    assert done.err == "Wrote PLAN\n"
    for number in (2, 0, 1):
        measured = run("measure-shard", "PLAN", "--shard", number)
        assert measured.out.startswith(f"Measured shard {number} of 0 to 2: "), measured.err
    again = run("measure-shard", "PLAN", "--shard", 1)
    assert (again.status, again.out) == (0, "Complete already: shard 1 of 0 to 2\n")
    merged = run("merge", "PLAN", "--output", "report")
    assert (merged.status, merged.err) == (0, "Wrote report/report.html\n")
    assert "hard ratio" in merged.out
    assert sorted(os.listdir("report")) == sorted(RUN_FILES)
    assert analyze("--batch-size", 2, "--output", "whole").status == 0
    assert without_engine(here / "report/profile.json") == without_engine(
        here / "whole/profile.json"
    )
    for name in ("profile.npz", "profile.parquet"):
        assert (here / "report" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_a_merged_profile_becomes_a_baseline_that_the_gate_passes(
    plan: Run, run: Run, models: Path
) -> None:
    assert plan("--shards", 2, "--output", "PLAN").status == 0
    for number in range(2):
        assert run("measure-shard", "PLAN", "--shard", number).status == 0
    assert run("merge", "PLAN", "--output", "report").status == 0
    assert run("accept", "report").status == 0
    gate = ("gate", "--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 32)
    done = run(*gate)
    assert (done.status, done.out.splitlines()[0][:4]) == (0, "PASS"), done.out + done.err


def test_json_prints_the_records(plan: Run, run: Run) -> None:
    done = plan("--output", "PLAN", "--json", "--quiet")
    assert json.loads(done.out)["kind"] == "plan"
    done = run("measure-shard", "PLAN", "--shard", 0, "--json", "--quiet")
    assert json.loads(done.out)["kind"] == "shard"
    done = run("merge", "PLAN", "--output", "report", "--json", "--quiet")
    assert (json.loads(done.out)["kind"], done.err) == ("saturation", "")


def test_refusals_are_one_line_with_status_2(plan: Run, run: Run) -> None:
    refused = [
        (plan("--shards", 99999, "--output", "many"), "expected at most"),
        (run("measure-shard", "none", "--shard", 0), "no record none/plan.json; make one with"),
        (run("merge", "none", "--output", "report"), "no record none/plan.json"),
    ]
    assert plan("--shards", 2, "--output", "PLAN").status == 0
    refused += [
        (plan("--output", "PLAN"), "PLAN holds another run (plan.json)"),
        (run("measure-shard", "PLAN", "--shard", 2), "expected a shard from 0 to 1 in PLAN, got 2"),
        (run("merge", "PLAN", "--output", "report"), "PLAN lacks 2 of 2 shards (0, 1)"),
    ]
    for done, words in refused:
        assert done.status == 2
        assert words in done.err
        assert done.err.count("\n") == 1, done.err
    assert not Path("many").exists()
    assert not Path("report").exists()


def test_the_edges_of_a_baseline(plan: Run, run: Run, analyze: Run) -> None:
    import numpy as np

    assert analyze("--max-tokens", 320, "--output", "first").status == 0
    assert plan("--baseline", "first", "--output", "PLAN").status == 0
    with np.load("PLAN/plan.npz") as made, np.load("first/profile.npz") as first:
        assert np.array_equal(made["edges"], first["edges"])
