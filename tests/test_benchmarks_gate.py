"""Benchmark of the gate: the same tokens both ways. No test asserts a speed."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import Run
from rich.console import Console

from cascade import benchmarks
from cascade.benchmarks import BenchmarkError, GateSetup
from cascade.report import print_gating


@pytest.fixture
def record(run: Run, here: Path, models: Path) -> dict[str, Any]:
    model = str(models / "tiny")
    made = run("analyze", "--model", model, "--seq-len", 16, "--num-samples", 20, "--output", "run")
    assert made.status == 0, made.err
    assert run("accept", "run").status == 0
    setup = GateSetup(model=model, tokens=64, rounds=2)
    return benchmarks.gate(setup, command="cascade bench gate")


def test_the_gate_is_timed_against_a_forward_over_the_tokens_that_it_takes(
    record: dict[str, Any],
) -> None:
    assert record["settings"]["tokens"] == 64
    assert record["looks"][-1] == 64
    assert set(record["ways"]) == {"bare", "gate", "noise"}
    assert {row["name"] for row in record["ratios"]} == {"gate/bare", "noise/bare"}
    targets = {row["name"]: (row["sense"], row["limit"]) for row in record["targets"]}
    assert targets == {
        "gate/bare": ("at most", 2.0),
        "compare, seconds": ("below", 1.0),
        "load, seconds": ("below", 2.0),
        "plugin, seconds": ("below", 0.05),
    }
    assert all(len(row["seconds"]) == 2 for row in record["alone"].values())
    assert json.loads(json.dumps(record)) == record


def test_the_report_says_what_surrounds_the_gate_and_refuses_another_kind(
    record: dict[str, Any],
) -> None:
    text = io.StringIO()
    print_gating(record, Console(file=text, width=100))
    for words in ("gate/bare", "compare", "import of the plugin", "made on this machine"):
        assert words in text.getvalue()
    with pytest.raises(ValueError, match="expected kind"):
        print_gating(record | {"kind": "bench.fit"}, Console(file=text))


def test_a_gate_that_does_not_pass_is_not_timed(
    record: dict[str, Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = importlib.import_module("cascade.benchmarks.gate")
    failed = SimpleNamespace(comparison=SimpleNamespace(verdict="FAIL"))
    monkeypatch.setattr(room, "run_gate", lambda *_, **__: failed)
    with pytest.raises(BenchmarkError, match="says FAIL, and stopped before its budget"):
        benchmarks.gate(GateSetup(model=str(models / "tiny"), tokens=64, rounds=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "expected --tokens of at least 1, got 0"),
        ({"rounds": 1}, "expected --rounds of at least 2, got 1"),
        ({"threads": 0}, "expected --threads of at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        GateSetup(**changes)


def test_a_missing_baseline_is_one_line(run: Run, here: Path, models: Path) -> None:
    done = run("bench", "gate", "--model", models / "tiny", "--output", "out")
    assert done.status == 2
    assert "no record baselines/tiny/embedded.saturation.json" in done.err
    assert not Path("out/bench.json").exists()
